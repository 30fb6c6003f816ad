"""qtlm: train small transformers, shrink them to INT8 and INT4, and go on training them while they stay small."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING

# Where each main name lives. Modules are imported at first use, so that `import qtlm` and the command line start without torch.
_HOME = {
    "compute_loss": "loss",
    "bits_per_byte": "loss",
    "distillation_loss": "loss",
    "LossError": "loss",
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
    "DataError": "data",
    "Tokens": "data",
    "load_text": "data",
    "load_vocab": "data",
    "stdlib_text": "data",
    "ModelInputError": "model",
    "TinyLM": "model",
    "QuantEmbedding": "quantization",
    "QuantLinear": "quantization",
    "QuantizationError": "quantization",
    "QuantizationReport": "quantization",
    "dequantize_model": "quantization",
    "get_quantization_info": "quantization",
    "quantize_model_ptq": "quantization",
    "configure_optimizer": "optim",
    "Checkpoint": "checkpoint",
    "CheckpointError": "checkpoint",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
    "verify_checkpoint": "checkpoint",
    "Callback": "trainer",
    "History": "trainer",
    "NonFiniteLossError": "trainer",
    "Trainer": "trainer",
    "resume_training": "trainer",
    "generate": "generation",
    "Comparison": "evaluation",
    "compare": "evaluation",
    "evaluate": "evaluation",
}
_MODULES = (
    "checkpoint", "cli", "config", "data", "evaluation", "generation", "kernels", "loss", "model", "optim", "quantization", "trainer",
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
    from .checkpoint import Checkpoint as Checkpoint
    from .checkpoint import CheckpointError as CheckpointError
