# pytest tests/test_parallel.py
"""Several processes train one model as one process would: the same losses, one checkpoint, and no process left waiting."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qtlm import ModelConfig, NonFiniteLossError, TinyLM, Trainer, parallel, quantize_model_ptq
from qtlm.checkpoint import CheckpointWriteError, load_checkpoint, verify_checkpoint
from qtlm.data import Tokens
from qtlm.history import Callback, read_jsonl
from qtlm.lora import apply_lora
from qtlm.parallel import ParallelError, World

SHAPE = ModelConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, block_size=16)
IDS = torch.randint(32, (3000,), generator=torch.Generator().manual_seed(0))
SETTINGS = {"batch_size": 4, "max_steps": 8, "learning_rate": 3e-3, "progress": False, "device": "cpu"}


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return TinyLM(SHAPE.replace(**changes))


def child(work, rank, size, place, arguments):
    "Run in a forked process: meet the others, do the work, and leave what came of it in a file."
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    value = error = None
    try:
        dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=size, timeout=timedelta(seconds=60))
        value = work(rank, *arguments)
    except BaseException as caught:
        expected = isinstance(caught, ParallelError | CheckpointWriteError | NonFiniteLossError | SystemExit)
        error = f"{type(caught).__name__}: {caught}" if expected else traceback.format_exc()
    Path(f"{place}.{rank}").write_bytes(pickle.dumps((value, error)))
    sys.stderr.flush()
    os._exit(0)


def share(room, work, *arguments, size=2, errors=False):
    "Let `size` processes do `work(rank, *arguments)`; return what each gave, or its error; None for one that was killed."
    import torch.distributed.fsdp  # noqa: F401  once, before the fork, and not in each process

    context, place = multiprocessing.get_context("fork"), room / f"meet-{time.monotonic_ns()}"
    processes = [context.Process(target=child, args=(work, rank, size, place, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        process.kill()
    found = [Path(f"{place}.{rank}") for rank in range(size)]
    found = [pickle.loads(path.read_bytes()) if path.exists() else (None, None) for path in found]
    if not errors:
        assert [error for _, error in found] == [None] * size, "\n".join(str(error) for _, error in found)
    return [error if errors else value for value, error in found]


def losses_of(_, make, **more):
    "Return all numbers of a run that depend on the weights."
    trainer = make(**more)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        trainer.train()
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("eval_loss"), r.get("tokens")) for r in trainer.history.records]


def far(one, other):
    "Return the largest difference between two runs' numbers; steps and counts must be equal."
    assert [(a[0], a[4]) for a in one] == [(b[0], b[4]) for b in other] and [[x is None for x in a] for a in one] == [[x is None for x in b] for b in other]
    return max(abs(x - y) for a, b in zip(one, other) for x, y in zip(a[1:4], b[1:4]) if x is not None)


def float_run(**more):
    return Trainer(tiny(), train_data=IDS[:2500], eval_data=IDS[2500:], eval_steps=4, **SETTINGS | {"gradient_accumulation_steps": 2} | more)


def ragged(**more):
    "Rows that count unequally many targets, batches of 1, 3 and 5 rows: not to be cut equally by anything."
    batches = []
    for rows in (3, 1, 5):
        inputs, targets = IDS[: rows * 16].reshape(rows, 16), IDS[1 : rows * 16 + 1].reshape(rows, 16).clone()
        targets[torch.rand(rows, 16, generator=torch.Generator().manual_seed(rows)) < 0.6] = -100
        batches.append((inputs, targets))
    return Trainer(tiny(), train_data=batches, eval_data=batches[1:2], eval_steps=3, **SETTINGS | more)


def qat(**more):
    return Trainer(tiny(), train_data=IDS[:2500], quantization_mode="qat", **SETTINGS | {"learning_rate": 1e-4} | more)


def static(**more):
    return qat(quantization_type="static", max_grad_norm=None, **more)


def learnt(**more):
    return qat(quantization_learned_scales=True, fake_quant_after_n_steps=2, **more)


def lora(**more):
    torch.manual_seed(0)
    return Trainer(apply_lora(tiny(), target_modules=["q_proj", "v_proj"]), train_data=IDS, **SETTINGS | more)


def lora_on_codes(**more):
    torch.manual_seed(0)
    return Trainer(apply_lora(quantize_model_ptq(tiny(), bits=4, group_size=16), target_modules=["q_proj"]), train_data=IDS, **SETTINGS | more)


def taught(**more):
    return Trainer(tiny(), teacher=tiny(1), train_data=IDS, distillation_weight=0.5, **SETTINGS | more)


def codes(**more):
    return Trainer(quantize_model_ptq(tiny()), train_data=IDS, enable_quantized_finetuning=True, **SETTINGS | {"learning_rate": 1e-4} | more)


def scales(**more):
    return codes(quantized_finetuning="scales", **more)


def named(**more):
    "A model of somebody else's, with keyword arguments and untied blocks."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    return Trainer(model, train_data=[(x, x[:, :3].argmax(-1))], label_smoothing=0.1, **SETTINGS | more)


RUNS = {"float": (float_run, 1e-5), "ragged": (ragged, 1e-5), "lora": (lora, 1e-5), "lora_on_codes": (lora_on_codes, 1e-5), "taught": (taught, 1e-5), "named": (named, 1e-5),
        "qat": (qat, 2e-4), "static": (static, 2e-4), "learnt": (learnt, 2e-4), "codes": (codes, 2e-3), "scales": (scales, 2e-4)}  # fmt: skip


def all_losses(rank, parallel):
    "Train every kind of model that `parallel` knows how to share."
    return {name: losses_of(rank, make, parallel=parallel) for name, (make, _) in RUNS.items() if parallel == "ddp" or name not in ("codes", "scales")}


@pytest.fixture(scope="module")
def alone():
    return {name: losses_of(0, make) for name, (make, _) in RUNS.items()}


@pytest.mark.parametrize("size, parallel", [(2, "ddp"), (2, "fsdp"), (3, "ddp"), (3, "fsdp")])
def test_any_number_of_processes_computes_what_one_does(room, alone, size, parallel):
    for found in share(room, all_losses, parallel, size=size):
        for name, numbers in found.items():
            assert far(alone[name], numbers) < RUNS[name][1], name
