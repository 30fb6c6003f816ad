"""Quantization-aware training: what it wins over rounding afterwards, on models that were really trained, and what a step costs; beside torchao's QAT where it is installed.

    python benchmarks/qat.py                 # quality (hours on two cores for all seeds) and speed
    python benchmarks/qat.py --speed         # step times alone, ten minutes; `--no-compile` leaves the compiled ones out
    python benchmarks/qat.py --quality --seeds 0 --only "row"   # some rows; those that are not measured anew stay as they were

Quality: the 1 M parameter model of accuracy.py, trained, goes on for the same further steps on the same batches: in full precision, and with the rounding on. All are measured on the
same 65,536 held-out ids; a row's loss is given as its difference from the model that went on in full precision, the mean over windows with its standard error, for each seed.
"Afterwards" is that model, rounded to nearest. "Distilled": half of the loss is the divergence from the predictions of the model
as it was before the further steps; what that alone does is the row "float32, distilled". Recovered: (loss afterwards - loss with QAT) / (loss afterwards - loss in full precision).
Speed: one `Trainer.training_step` of the 12 M model on 8 x 256 ids, the ratio to the same trainer without QAT in the same round.
"""

import argparse
import copy
import importlib.util
import math
import shutil
import statistics
from functools import partial

import torch
from accuracy import LENGTH, MODELS, read_text, trained
from common import in_turn, random_ids, tiny_lm, two_parts
from torch import nn

from qtlm import Trainer, convert_qat, prepare_qat, quantize_model_ptq
from qtlm.data import Batches
from qtlm.loss import compute_loss

KIND, FURTHER = "small", dict(max_steps=300, batch_size=8, block_size=LENGTH, learning_rate=2e-4, lr_scheduler_type="cosine", min_lr_ratio=0.05)
SCHEMES = {  # as the verbs are told; "row": 4 bits with one scale a row
    "INT4 default": dict(bits=4),
    "INT4 row": dict(bits=4, group_size=-1),
    "INT8 default": dict(bits=8),
    "INT8 static, minmax": dict(bits=8, type="static", observer="minmax"),
    "INT4 row, static": dict(bits=4, group_size=-1, type="static"),
}
LEARNED, DISTILLED = {"learned_scales": True}, {"distillation_weight": 0.5, "distillation_temperature": 1.0}
WAYS = {  # what the verb is told besides, and the trainer
    "": ({}, {}),
    ", learned scales": (LEARNED, {}),
    ", learned scales, from GPTQ": (LEARNED | {"rounding": "gptq"}, {}),
    ", distilled": ({}, DISTILLED),
    ", learned scales, distilled": (LEARNED, DISTILLED),
}
LEFT_OUT = {"INT8 default": ("from GPTQ", "learned"), "INT8 static, minmax": ("from GPTQ", "learned"), "INT4 row, static": ("from GPTQ",)}  # what those schemes hardly need
TORCHAO = "torchao, INT4 / 32"


def window_losses(model: nn.Module, held_out) -> list[float]:
    "The loss of each held-out window."
    losses = []
    with torch.no_grad():
        for inputs, targets in Batches.sequential(held_out, LENGTH, 8):
            rows = compute_loss(model(inputs), targets, reduction="none").view(targets.shape).mean(1)
            losses += rows.tolist()
            if len(losses) >= MODELS[KIND]["windows"]:
                return losses
    return losses


def go_on(model: nn.Module, seed: int, text, teacher: nn.Module | None = None, **fields) -> nn.Module:
    "Train a copy further; a `teacher` is asked where `fields` have a distillation_weight."
    model, given = copy.deepcopy(model).train(), {"teacher": teacher} if "distillation_weight" in fields else {}
    trainer = Trainer(model, FURTHER | fields, seed=1000 + seed, train_data=text, progress=False, output_dir=None, **given)
    trainer.train()
    return trainer.model.eval()


def difference(losses: list[float], base: list[float]) -> dict[str, float]:
    "Mean and standard error of the paired differences."
    paired = [a - b for a, b in zip(losses, base)]
    return {"increase": statistics.mean(paired), "error": statistics.stdev(paired) / math.sqrt(len(paired))}


def torchao_qat(model: nn.Module, seed: int, text) -> tuple[nn.Module, nn.Module]:
    "torchao's own: a model prepared, trained further and converted, and the float one beside it that was rounded afterwards."
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    only = lambda module, name: isinstance(module, nn.Linear) and "_proj" in name
    prepared = copy.deepcopy(model)
    quantize_(prepared, QATConfig(config, step="prepare"), filter_fn=only)
    done = go_on(prepared, seed, text)
    quantize_(done, QATConfig(config, step="convert"), filter_fn=only)
    after = go_on(model, seed, text)
    quantize_(after, config, filter_fn=only)
    return done, after


def quality(seed: int, only: str) -> dict[str, dict]:
    "All rows of one seed."
    _, text, held_out = read_text(KIND)
    model = trained(KIND, seed)
    calibration = [batch for batch, _ in zip(Batches(text, LENGTH, 8, seed=1), range(16))]
    float_model = go_on(model, seed, text)
    base, rows = window_losses(float_model, held_out), {}
    rows["float32"] = {"loss": statistics.mean(base), "before": statistics.mean(window_losses(model, held_out))}
    if only in "float32, distilled":
        rows["float32, distilled"] = difference(window_losses(go_on(model, seed, text, model, **DISTILLED), held_out), base)
        print(seed, "float32, distilled", rows["float32, distilled"], flush=True)
    for name, scheme in SCHEMES.items():
        data = calibration if scheme.get("type") == "static" else None
        after = difference(window_losses(quantize_model_ptq(float_model, calibration_data=data, **{"rounding": "nearest"} | scheme), held_out), base)
        for way, (more, training) in WAYS.items():
            if only not in name + way or any(word in way for word in LEFT_OUT.get(name, ())):
                continue
            needs = calibration if scheme.get("type") == "static" or "rounding" in more else None
            aware = go_on(prepare_qat(model, calibration_data=needs, **scheme | more), seed, text, model, quantization_mode="qat", **training)
            row = difference(window_losses(convert_qat(aware), held_out), base)
            rows[name + way] = row | {"afterwards": after["increase"], "recovered": 1 - row["increase"] / after["increase"]}
            print(seed, name + way, rows[name + way], flush=True)
    if only in TORCHAO and importlib.util.find_spec("torchao"):
        done, after = torchao_qat(model, seed, text)
        row, after = difference(window_losses(done, held_out), base), difference(window_losses(after, held_out), base)
        rows[TORCHAO] = row | {"afterwards": after["increase"], "recovered": 1 - row["increase"] / after["increase"]}
        print(seed, TORCHAO, rows[TORCHAO], flush=True)
    return rows


def speed(rounds: int, compiled: bool) -> dict[str, dict]:
    "Step times in turn, a table for each precision and mode."
    ids, tables = random_ids(8, 257), {}
    for dtype in ("fp32", "bf16"):
        for compile in (False, True) if compiled else (False,):
            settings = dict(dtype=dtype, compile=compile, progress=False, batch_size=8, block_size=256)
            ways = {"INT8": {}, "INT4": {"quantization_bits": 4}, "INT4, learned scales": {"quantization_bits": 4, "quantization_learned_scales": True}}
            trainers = {"no QAT": Trainer(tiny_lm(), **settings)}
            trainers |= {name: Trainer(tiny_lm(), quantization_mode="qat", **settings, **fields) for name, fields in ways.items()}
            if importlib.util.find_spec("torchao"):
                from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_
                from torchao.quantization.qat import QATConfig

                model = tiny_lm()
                config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
                quantize_(model, QATConfig(config, step="prepare"), filter_fn=lambda module, name: "_proj" in name and isinstance(module, nn.Linear))
                trainers["torchao INT4"] = Trainer(model, **settings)
            calls = {name: partial(trainer.training_step, ids) for name, trainer in trainers.items()}
            rows = in_turn(calls, rounds)
            for row in rows.values():
                row["cost"] = 1 / row["speedup"]
            tables[f"step, {dtype}, {'compiled' if compile else 'eager'}"] = rows
            print({name: round(row["cost"], 3) for name, row in rows.items()}, f"{dtype}, {'compiled' if compile else 'eager'}", flush=True)
    return tables


def all_speeds(options: argparse.Namespace) -> dict[str, dict]:
    "Eager, and compiled where there is a compiler for it."
    torch._dynamo.config.recompile_limit = 64
    return {"speed": speed(options.rounds, not options.no_compile and bool(shutil.which("g++") or shutil.which("clang++")))}


if __name__ == "__main__":
    two_parts(__doc__.splitlines()[0], "qat", all_speeds, quality, "--no-compile")
