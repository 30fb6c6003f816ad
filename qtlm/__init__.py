"""qtlm: train small transformers, shrink them to INT8 and INT4, and go on training them while they stay small."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING

# Where each main name lives. Modules are imported at first use, so that `import qtlm` and the command line start without torch.
_HOME = {
    "compute_loss": "loss",
    "bits_per_byte": "loss",
    "distillation_loss": "loss",
    "LossError": "loss",
    "Config": "config",
    "ConfigError": "config",
    "LoRAConfig": "config",
    "ModelConfig": "config",
    "QuantizationConfig": "config",
    "TrainingConfig": "config",
    "ViTConfig": "config",
    "load_config": "config",
    "save_config": "config",
    "BPEVocab": "data",
    "Batches": "data",
    "ByteVocab": "data",
    "CharVocab": "data",
    "DataError": "data",
    "Tokens": "data",
    "load_text": "data",
    "load_vocab": "data",
    "stdlib_text": "data",
    "ModelInputError": "model",
    "TinyLM": "model",
    "QuantEmbedding": "layers",
    "QuantLinear": "layers",
    "QuantizationError": "layers",
    "QuantizationInfo": "account",
    "QuantizationReport": "account",
    "Calibration": "calibration",
    "calibrate": "calibration",
    "Sensitivity": "budget",
    "mixed_precision": "budget",
    "sensitivity": "budget",
    "dequantize_model": "quantization",
    "get_quantization_info": "account",
    "quantize_model_ptq": "quantization",
    "convert_qat": "qat",
    "fake_quantize": "qat",
    "prepare_qat": "qat",
    "QuantizedAdamW": "optim",
    "configure_optimizer": "optim",
    "Checkpoint": "checkpoint",
    "CheckpointError": "storage",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
    "verify_checkpoint": "checkpoint",
    "Inspection": "inspection",
    "inspect_checkpoint": "inspection",
    "Callback": "history",
    "History": "history",
    "NonFiniteLossError": "trainer",
    "Trainer": "trainer",
    "resume_training": "trainer",
    "assert_resume_exact": "resume",
    "generate": "generation",
    "digits": "images",
    "image_folder": "images",
    "BlockwiseLinear": "blockwise",
    "quantize_blockwise": "blockwise",
    "dequantize_blockwise": "blockwise",
    "ViT": "vit",
    "LoRALinear": "lora",
    "apply_lora": "lora",
    "print_trainable_parameters": "lora",
    "get_nb_trainable_parameters": "lora",
    "LoRAError": "lora",
    "merge_lora": "adapters",
    "save_adapter": "adapters",
    "load_adapter": "adapters",
    "MergeReport": "adapters",
    "build_model": "lora_vit",
    "quantize_backbone": "lora_vit",
    "KVCache": "cache",
    "stream_generate": "generation",
    "LoggerError": "loggers",
    "TensorBoardLogger": "loggers",
    "TrackioLogger": "loggers",
    "WandbLogger": "loggers",
    "adapt_vit": "adapt",
    "Adapted": "adapt",
    "ParallelError": "parallel",
    "load_vit": "adapt",
    "is_vit_config": "adapt",
    "make_loggers": "loggers",
    "World": "parallel",
    "join_world": "parallel",
    "build_native": "native",
    "NativeError": "native",
    "Comparison": "evaluation",
    "compare": "evaluation",
    "evaluate": "evaluation",
}
_MODULES = (
    "account", "adapt", "adapters", "base", "batches", "blockwise", "budget", "cache", "calibration", "checkpoint", "cli", "commands",
    "config", "data", "demo", "evaluation", "finetuning", "generation", "history", "images", "inspection", "kernels", "layers", "loggers",
    "lora", "lora_vit", "loss", "model", "modes", "moments", "native", "observers", "optim", "parallel", "plan", "qat", "quantization",
    "resume", "rounding", "sampling", "shards", "step", "storage", "straight_through", "trainer", "vit", "window",
)  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name):
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOME, *_MODULES})


if TYPE_CHECKING:  # for editors and type checkers, which do not run __getattr__; a test keeps it equal to _HOME
    from .account import QuantizationInfo as QuantizationInfo
    from .account import QuantizationReport as QuantizationReport
    from .account import get_quantization_info as get_quantization_info
    from .adapt import Adapted as Adapted
    from .adapt import adapt_vit as adapt_vit
    from .adapt import is_vit_config as is_vit_config
    from .adapt import load_vit as load_vit
    from .adapters import MergeReport as MergeReport
    from .adapters import load_adapter as load_adapter
    from .adapters import merge_lora as merge_lora
    from .adapters import save_adapter as save_adapter
    from .blockwise import BlockwiseLinear as BlockwiseLinear
    from .blockwise import dequantize_blockwise as dequantize_blockwise
    from .blockwise import quantize_blockwise as quantize_blockwise
    from .budget import Sensitivity as Sensitivity
    from .budget import mixed_precision as mixed_precision
    from .budget import sensitivity as sensitivity
    from .cache import KVCache as KVCache
    from .calibration import Calibration as Calibration
    from .calibration import calibrate as calibrate
    from .checkpoint import Checkpoint as Checkpoint
    from .checkpoint import load_checkpoint as load_checkpoint
    from .checkpoint import save_checkpoint as save_checkpoint
    from .checkpoint import verify_checkpoint as verify_checkpoint
    from .config import Config as Config
    from .config import ConfigError as ConfigError
    from .config import LoRAConfig as LoRAConfig
    from .config import ModelConfig as ModelConfig
    from .config import QuantizationConfig as QuantizationConfig
    from .config import TrainingConfig as TrainingConfig
    from .config import ViTConfig as ViTConfig
    from .config import load_config as load_config
    from .config import save_config as save_config
    from .data import BPEVocab as BPEVocab
    from .data import Batches as Batches
    from .data import ByteVocab as ByteVocab
    from .data import CharVocab as CharVocab
    from .data import DataError as DataError
    from .data import Tokens as Tokens
    from .data import load_text as load_text
    from .data import load_vocab as load_vocab
    from .data import stdlib_text as stdlib_text
    from .evaluation import Comparison as Comparison
    from .evaluation import compare as compare
    from .evaluation import evaluate as evaluate
    from .generation import generate as generate
    from .generation import stream_generate as stream_generate
    from .history import Callback as Callback
    from .history import History as History
    from .images import digits as digits
    from .images import image_folder as image_folder
    from .inspection import Inspection as Inspection
    from .inspection import inspect_checkpoint as inspect_checkpoint
    from .layers import QuantEmbedding as QuantEmbedding
    from .layers import QuantLinear as QuantLinear
    from .layers import QuantizationError as QuantizationError
    from .loggers import LoggerError as LoggerError
    from .loggers import TensorBoardLogger as TensorBoardLogger
    from .loggers import TrackioLogger as TrackioLogger
    from .loggers import WandbLogger as WandbLogger
    from .loggers import make_loggers as make_loggers
    from .lora import LoRAError as LoRAError
    from .lora import LoRALinear as LoRALinear
    from .lora import apply_lora as apply_lora
    from .lora import get_nb_trainable_parameters as get_nb_trainable_parameters
    from .lora import print_trainable_parameters as print_trainable_parameters
    from .lora_vit import build_model as build_model
    from .lora_vit import quantize_backbone as quantize_backbone
    from .loss import LossError as LossError
    from .loss import bits_per_byte as bits_per_byte
    from .loss import compute_loss as compute_loss
    from .loss import distillation_loss as distillation_loss
    from .model import ModelInputError as ModelInputError
    from .model import TinyLM as TinyLM
    from .native import NativeError as NativeError
    from .native import build_native as build_native
    from .optim import QuantizedAdamW as QuantizedAdamW
    from .optim import configure_optimizer as configure_optimizer
    from .parallel import ParallelError as ParallelError
    from .parallel import World as World
    from .parallel import join_world as join_world
    from .qat import convert_qat as convert_qat
    from .qat import fake_quantize as fake_quantize
    from .qat import prepare_qat as prepare_qat
    from .quantization import dequantize_model as dequantize_model
    from .quantization import quantize_model_ptq as quantize_model_ptq
    from .resume import assert_resume_exact as assert_resume_exact
    from .storage import CheckpointError as CheckpointError
    from .trainer import NonFiniteLossError as NonFiniteLossError
    from .trainer import Trainer as Trainer
    from .trainer import resume_training as resume_training
    from .vit import ViT as ViT
