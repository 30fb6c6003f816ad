# python tests/golden.py            # makes the kinds that are missing; those that are there are never made again
"""Checkpoints that must load for ever: one tiny run of each kind, saved in its middle, and the logits that its model gave.

They lie in `checkpoints/golden/format-1/`, one folder a kind, and `golden.json` beside them. A new format gets a new folder; what is there stays as it is.
Format 2 is for what several processes saved in parts: one run of two.
"""
import json
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from qtlm import QuantizationConfig, TinyLM, TrainingConfig, quantize_model_ptq
from qtlm.base import _environment
from qtlm.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from qtlm.data import CharVocab
from qtlm.lora import apply_lora
from qtlm.lora_vit import quantize_backbone
from qtlm.trainer import Trainer

GOLDEN = Path(__file__).resolve().parent.parent / "checkpoints" / "golden" / "format-1"
PARTS = GOLDEN.with_name("format-2")
TEXT = "it was a dark and stormy night, and the brig tossed on the waves. " * 8
SHAPE = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, block_size=16, dropout=0.1)
PROMPTS = torch.arange(32).view(2, 16)
TRAINING = {  # runs that are saved in their middle
    "float32": {},
    "bf16": {"dtype": "bf16"},
    "qat-int8": {"quantization_mode": "qat"},
    "qat-int8-static": {"quantization_mode": "qat", "quantization_type": "static"},
    "qat-int4": {"quantization_mode": "qat", "quantization_bits": 4},
    "qat-int4-learned": {"quantization_mode": "qat", "quantization_bits": 4, "quantization_learned_scales": True},
    "finetune-int8": {"enable_quantized_finetuning": True},
    "finetune-int4": {"enable_quantized_finetuning": True, "quantization_bits": 4},
}
ADAPTED = {"lora-nf4": {}}  # runs beside a frozen backbone of 4 bits: they are loaded into such a model
QUANTIZED = {  # models alone
    "int8": {},
    "int4": {"bits": 4},
    "int8-static": {"type": "static"},
    "int4-gptq": {"bits": 4, "rounding": "gptq"},
    "mixed": {"bits": 4, "overrides": {"model.layers.0.mlp.*": {"bits": 8}}},
}


def vocabulary(): return CharVocab(sorted(set(TEXT)))


def ids(): return vocabulary().encode(TEXT)


def model():
    "The same float model each time."
    return TinyLM(**SHAPE, generator=torch.Generator().manual_seed(7))


def adapted():
    "The float model, frozen in 4 bits, and new adapters beside it."
    torch.manual_seed(7)
    return apply_lora(quantize_backbone(model(), double_quant=True), r=2, lora_dropout=0.1, backend="manual")


def given(kind):
    "The model that a checkpoint is loaded into; None: it builds its own."
    return adapted() if kind in ADAPTED else None


def trainer(fields, start=None):
    "A run over the text."
    start = model() if start is None else start
    if fields.get("enable_quantized_finetuning"): start = quantize_model_ptq(start, bits=fields.get("quantization_bits", 8))
    settings = dict(max_steps=6, batch_size=2, block_size=16, learning_rate=1e-2, eval_steps=2, warmup_steps=2, lr_scheduler_type="cosine", progress=False)
    return Trainer(start, TrainingConfig(**settings | fields), train_data=ids()[:400], eval_data=ids()[400:], vocab=vocabulary())


def logits(net):
    "What a model says of the prompts."
    with torch.no_grad(): return net.eval()(PROMPTS)


def make(kind, folder):
    "Save a checkpoint of one kind; return its model."
    if kind not in QUANTIZED:
        run = trainer((TRAINING | ADAPTED)[kind], given(kind))
        run.callbacks.append(StopAt(3))
        run.train()
        run.save(folder)
        return run.model
    float_model = trainer({})
    float_model.train()
    calibration = [(ids()[i : i + 16][None], ids()[i + 1 : i + 17][None]) for i in range(0, 320, 16)]
    net = quantize_model_ptq(float_model.model, QuantizationConfig(**QUANTIZED[kind]), calibration)
    save_checkpoint(net, vocab=vocabulary(), step=6, path=folder)
    return net


class StopAt:
    "Stops a run after some step."
    def __new__(cls, step):
        from qtlm.history import Callback

        class Stop(Callback):
            def on_step_end(self, run): run.stop() if run.step == step else None
        return Stop()


def fifty():
    "The losses of fifty steps, and the machine that they were made on."
    run = trainer({"max_steps": 50})
    run.train()
    return run.history.losses, _environment(run.model)


def make_parts():
    "Save a run of two processes in parts; called by each of them, under torchrun."
    run = trainer({"parallel": "fsdp", "device": "cpu"})
    run.callbacks.append(StopAt(3))
    run.train()
    run.save(PARTS / "parts")


def note(golden, kind, net):
    "Write down what a checkpoint of one kind is, and what its model says."
    file, step = golden / "golden.json", next((golden / kind).glob("step-*"))
    known = json.loads(file.read_text()) if file.exists() else {}
    known[kind] = {"sha256": verify_checkpoint(step).digest, "torch": str(torch.__version__), "logits": [round(x, 6) for x in logits(net)[:, -1].flatten().tolist()]}
    for hint in ("latest", "best", ".lock"): (golden / kind / hint).unlink(missing_ok=True)
    print(kind, sum(p.stat().st_size for p in step.iterdir()), "bytes")
    file.write_text(json.dumps(known, indent=0) + "\n")


def main():
    torch.set_num_threads(1)
    if sys.argv[1:] == ["parts"]: return make_parts()
    if not PARTS.exists():
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, "parts"], check=True)
        note(PARTS, "parts", load_checkpoint(PARTS / "parts").model)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    known = json.loads((GOLDEN / "golden.json").read_text()) if (GOLDEN / "golden.json").exists() else {}
    for kind in (*TRAINING, *QUANTIZED, *ADAPTED):
        if kind not in known: note(GOLDEN, kind, make(kind, GOLDEN / kind))
    losses = GOLDEN / "losses.json"
    if not losses.exists():
        found, environment = fifty()
        losses.write_text(json.dumps({"losses": [x.hex() for x in found], "environment": environment}, indent=0) + "\n")


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
