"""Training a quantized model further, on text of another kind: codes, scales or adapters, beside float32 AdamW; what it reaches, what a step takes, and what it keeps in memory.

    python benchmarks/finetune.py                # quality for three seeds (an hour on two cores), then speed and memory
    python benchmarks/finetune.py --speed        # step times and memory alone, five minutes
    python benchmarks/finetune.py --quality --seeds 0 --only INT4

Quality: the 1 M parameter model of accuracy.py, trained on Python source, learns the C++ headers that come with torch: the same batches, schedule and rate for every way. A row's share is
its drop in held-out loss over float32's. Speed and memory: the 12 M model, 8 x 256 ids. Lasting memory is what there is between two steps: weights, gradients, optimizer state; peak
is the most that a step of 32 ids allocates beside it, in a process of its own.
"""

import copy
import multiprocessing
import statistics
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accuracy import FOLDER, LENGTH, peak_bytes, read_text, trained
from common import in_turn, random_ids, tiny_lm, two_parts
from torch import nn

from qtlm import QuantLinear, Trainer, quantize_model_ptq
from qtlm.data import Batches, Tokens
from qtlm.loss import compute_loss

KIND, WINDOWS = "small", 128
SETTINGS = dict(max_steps=300, batch_size=8, block_size=LENGTH, learning_rate=1e-3, lr_scheduler_type="cosine", min_lr_ratio=0.1, warmup_steps=20)
TUNE = {"enable_quantized_finetuning": True}


def other_text() -> tuple[Tokens, Tokens]:
    "The C++ headers of torch, three million characters of them, as the model's tokens; a tenth is held out."
    vocab = read_text(KIND)[0]
    file = FOLDER / "bpe-1024" / "headers.npy"
    if not file.exists():
        paths = sorted((Path(torch.__file__).parent / "include").rglob("*.h"))
        text = "\n".join(path.read_text(errors="ignore") for path in paths if "ATen" in path.parts or "c10" in path.parts)[:3_000_000]
        np.save(file, vocab.encode(text).numpy().astype("<u2"))
    return Tokens.from_file(file, vocab=vocab).split(0.1)


def loss_of(model: nn.Module, held_out: Tokens) -> float:
    "Mean loss on held-out windows."
    losses, model = [], model.eval()
    with torch.no_grad():
        for number, (inputs, targets) in enumerate(Batches.sequential(held_out, LENGTH, 8)):
            if number == WINDOWS // 8:
                break
            losses.append(compute_loss(model(inputs), targets).item())
    return statistics.mean(losses)


class LoRA(nn.Module):
    "A frozen layer and a product of two thin matrices beside it (Hu et al. 2021)."

    def __init__(self, layer: nn.Module, r: int = 8, alpha: int = 16):
        super().__init__()
        self.layer, self.scaling = layer, alpha / r
        self.a = nn.Parameter(torch.randn(r, layer.in_features) / layer.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(layer.out_features, r))

    def forward(self, x):
        return self.layer(x) + (x @ self.a.t() @ self.b.t()) * self.scaling


def with_lora(model: nn.Module, r: int = 8) -> nn.Module:
    "The quantized model, frozen, with adapters beside each linear layer of its blocks."
    for p in model.parameters():
        p.requires_grad_(False)
    for m in model.modules():
        if hasattr(m, "codes"):
            m.frozen = True
    for name, m in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantLinear) and n.endswith("_proj")]:
        model.set_submodule(name, LoRA(m, r))
    return model


def trainer_of(way: str, model: nn.Module, **settings) -> Trainer:
    "The trainer of one way to go on."
    torch.manual_seed(0)
    bits = 8 if "INT8" in way else 4
    if way == "float32":
        return Trainer(copy.deepcopy(model), **settings)
    model = quantize_model_ptq(model, bits=bits)
    if "LoRA" in way:
        return Trainer(with_lora(model), **settings)
    more = {"quantized_finetuning": "scales"} if "scales" in way else {}
    more |= {"gradients_in_backward": True, "max_grad_norm": None} if "in backward" in way else {}
    trainer = Trainer(model, **{**settings, **TUNE, **more})
    if "nearest" in way:
        trainer.optimizer.stochastic_rounding = False
    return trainer


WAYS = ("float32", "INT8", "INT4", "INT8, in backward", "INT4, in backward", "INT4, nearest in the step", "INT4, scales only", "INT4, LoRA")


def quality(seed: int, only: str) -> dict[str, dict]:
    "Losses of each way for one seed."
    train, held_out = other_text()
    model, rows = trained(KIND, seed), {}
    for way in WAYS:
        if way != "float32" and (only not in way or "in backward" in way):  # which is the same step, at another time
            continue
        trainer = trainer_of(way, model, **SETTINGS, seed=seed, train_data=train, progress=False, output_dir=None)
        before = loss_of(trainer.model, held_out)
        trainer.train()
        rows[way] = {"before": before, "after": loss_of(trainer.model, held_out)}
        if way == "float32":
            start, end = before, rows[way]["after"]
            for name, options in {f"then INT{bits} {rounding}": dict(bits=bits, rounding=rounding) for bits in (8, 4) for rounding in ("nearest", "mse")}.items():
                rows[name] = {"after": loss_of(quantize_model_ptq(trainer.model, **options), held_out)}
        rows[way]["share"] = (start - rows[way]["after"]) / (start - end)
        print(seed, way, rows[way], flush=True)
    return rows


def bytes_of(trainer: Trainer) -> dict[str, int]:
    "Weights, gradients and optimizer state between two steps."
    def size(tensors):
        seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor)}
        return sum(seen.values())

    model, optimizer = trainer.model, trainer.optimizer
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "weights": size([*model.state_dict().values()]),
        "gradients": size([p.grad for p in stepped if p.grad is not None]),
        "state": size([value for state in optimizer.state.values() for value in state.values()]),
    }


def memory(way: str, queue) -> None:
    "In a process of its own: what there is after two steps, and what the second allocated at most."
    torch.set_num_threads(1)
    model = tiny_lm()
    trainer = trainer_of(way, model, progress=False, batch_size=8, block_size=256)
    del model
    ids = random_ids(1, 33)  # few tokens: what a step holds for its weights, not for its activations
    trainer.training_step(ids)  # makes the optimizer's state
    peak = peak_bytes(lambda: trainer.training_step(ids))
    queue.put({**bytes_of(trainer), "peak": peak})


def memories() -> dict[str, dict]:
    "The memory of each way, and its share of float32's."
    rows, context = {}, multiprocessing.get_context("spawn")
    for way in WAYS:
        queue = context.Queue()
        process = context.Process(target=memory, args=(way, queue))
        process.start()
        rows[way] = queue.get()
        process.join()
    parameters = tiny_lm().num_parameters()
    for row in rows.values():
        row["lasting"] = row["weights"] + row["gradients"] + row["state"]
        row["share"] = row["lasting"] / (16 * parameters)  # float32 AdamW: weight, gradient and two moments, four bytes each
    return rows


def speed(rounds: int) -> dict[str, dict]:
    "Step times in turn."
    ids, tables = random_ids(8, 257), {}
    for dtype in ("fp32", "bf16"):
        model = tiny_lm()
        trainers = {way: trainer_of(way, model, dtype=dtype, progress=False, batch_size=8, block_size=256) for way in WAYS}
        rows = in_turn({way: partial(trainer.training_step, ids) for way, trainer in trainers.items()}, rounds)
        for row in rows.values():
            row["cost"] = 1 / row["speedup"]
        tables[f"step, {dtype}"] = rows
        print(dtype, {way: round(row["cost"], 3) for way, row in rows.items()}, flush=True)
    return tables


if __name__ == "__main__":
    two_parts(__doc__.splitlines()[0], "finetune", lambda options: {"speed": speed(options.rounds), "memory": memories()}, quality)
