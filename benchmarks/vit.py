"""A ViT-Base of 86 M parameters adapted in five ways, side by side: what stays in memory, what a step of training takes at most, and how long it takes.

    python benchmarks/vit.py                       # eight pictures a step, float32 and bf16 autocast; a quarter of an hour on two quiet cores
    python benchmarks/vit.py --memory              # one part alone; --speed: the other
    python benchmarks/vit.py --images 4 --rounds 3

The model is built from its configuration by `build_model`, its weights are random: neither time nor memory depends on them. All ways take the same pictures through `Trainer.training_step`
with AdamW. QLoRA is NF4 in blocks of 64 with double quantization under adapters of r = 8, beside queries and values; one row has them beside all linear layers.

Memory, in a fresh process for each way. Backbone: all bytes that are not trained, as a share of full fine-tuning's float32 weights. Peak: weights, gradients and optimizer state between two
steps, and the most that tensors take beside them during a step, from torch's profiler. Resident: the same as the system sees it, VmHWM of Linux during a step above what the process had after
a step of a tiny model; with MALLOC_MMAP_THRESHOLD_ at 1 MiB, since glibc otherwise leaves holes between tensors that live long and tensors that don't (without it: --holes).
Time: in turn, in one process; the processor's time of all threads is given too, since wall time on a shared machine is also other people's.
"""

import argparse
import ctypes
import gc
import json
import logging
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accuracy import peak_bytes
from common import RESULTS, machine
from torch import Tensor, nn

from qtlm import Trainer, ViTConfig, build_model

BASE = ViTConfig(num_labels=100)  # all else is ViT-Base's by default: 224 pixels in patches of 16, 12 layers of 768
TINY = ViTConfig(image_size=32, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, num_labels=100)
LORA = {"r": 8, "lora_alpha": 16, "backend": "manual"}
NF4 = {"quant_type": "nf4", "double_quant": True, "backend": "manual"}
WAYS = {
    "full fine-tuning": {},
    "LoRA on float32": {"lora": LORA},
    "QLoRA": {"lora": LORA, "quantization": NF4},
    "QLoRA, peft and bitsandbytes": {"lora": LORA | {"backend": "peft"}, "quantization": NF4 | {"backend": "bitsandbytes"}},
    "QLoRA, all linear layers": {"lora": LORA | {"target_modules": ["all-linear"]}, "quantization": NF4},
}
FULL, PEER = list(WAYS)[0], list(WAYS)[3]


def batch(config: ViTConfig, images: int) -> tuple[Tensor, Tensor]:
    "Random pictures and classes."
    generator = torch.Generator().manual_seed(0)
    size = config.image_size
    return torch.randn(images, config.num_channels, size, size, generator=generator), torch.randint(config.num_labels, (images,), generator=generator)


def trainer_of(way: str, dtype: str, config: ViTConfig = BASE) -> Trainer:
    "The trainer of one way."
    torch.manual_seed(0)
    return Trainer(build_model(config.replace(**WAYS[way])), dtype=dtype, learning_rate=1e-4, progress=False, output_dir=None)


def size(tensors) -> int:
    "Bytes of tensors, shared ones once."
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}.values())


def weights_of(model: nn.Module) -> list[Tensor]:
    "Parameters, buffers, and the scales that bitsandbytes keeps beside its codes."
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    nested = [t for state in states if state.nested for t in (state.offset, state.state2.absmax, state.state2.code)]
    return [*(p.data for p in model.parameters()), *model.buffers(), *(t for state in states for t in (state.absmax, state.code)), *nested]


def resident(key: str) -> int:
    "VmRSS or VmHWM of this process, in bytes."
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)) * 1024


def settle() -> None:
    "Give back to the system what nothing uses."
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def most_resident(step: Callable) -> int:
    "The most bytes that the process held while `step` ran."
    settle()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    step()
    return resident("VmHWM")


def memory(way: str, dtype: str, images: int, queue) -> None:
    "In a process of its own: the memory of one way."
    logging.disable(logging.WARNING)
    trainer_of(way, dtype, TINY).training_step(batch(TINY, 1))  # all libraries are loaded and have what they keep for themselves
    settle()
    before = resident("VmRSS")
    data, trainer = batch(BASE, images), trainer_of(way, dtype)
    step = lambda: trainer.training_step(data)
    step()  # makes the optimizer's state
    held = most_resident(step) - before
    weights, stepped = weights_of(trainer.model), [p for group in trainer.optimizer.param_groups for p in group["params"]]
    trained = {p.data_ptr() for p in stepped}
    lasting = [*weights, *(p.grad for p in stepped), *(value for state in trainer.optimizer.state.values() for value in state.values())]
    queue.put({
        "trained_parameters": sum(p.numel() for p in stepped),
        "backbone": size(t for t in weights if t.data_ptr() not in trained),
        "weights": size(weights),
        "lasting": size(lasting),
        "peak_bytes": size(lasting) + peak_bytes(step),
        "resident": held,
    })  # fmt: skip


def memories(dtype: str, images: int) -> dict[str, dict]:
    "The memory of each way, and its shares of full fine-tuning's."
    rows, context = {}, multiprocessing.get_context("spawn")
    for way in WAYS:
        queue = context.Queue()
        process = context.Process(target=memory, args=(way, dtype, images, queue))
        process.start()
        rows[way] = queue.get()
        process.join()
        full = rows[FULL]
        rows[way] |= {"backbone_share": rows[way]["backbone"] / full["weights"]} | {f"{key}_share": rows[way][name] / full[name] for key, name in {"lasting": "lasting", "peak": "peak_bytes", "resident": "resident"}.items()}
        print(f"{dtype} {way:30}", *(f"{key} {value:.3f}" for key, value in rows[way].items() if key.endswith("share")), flush=True)
    return rows


def seconds(steps: dict[str, Callable], rounds: int) -> dict[str, dict[str, list[float]]]:
    "Time steps in turn, after one round that does not count: seconds of the wall clock, and of the processor."
    taken = {name: {"wall": [], "processor": []} for name in steps}
    for n in range(1 + rounds):
        for name, step in steps.items():
            wall, processor = time.perf_counter(), time.process_time()
            step()
            if n:
                taken[name]["wall"].append(time.perf_counter() - wall)
                taken[name]["processor"].append(time.process_time() - processor)
    return taken


def speed(dtype: str, images: int, rounds: int) -> dict[str, dict]:
    "The time of a step in each way, over full fine-tuning's and over the peers', as medians over rounds of the ratio within a round."
    data, rows = batch(BASE, images), {}
    trainers = {way: trainer_of(way, dtype) for way in WAYS}
    taken = seconds({way: lambda trainer=trainer: trainer.training_step(data) for way, trainer in trainers.items()}, rounds)
    for way, own in taken.items():
        row = rows[way] = {f"{clock}_seconds": statistics.median(values) for clock, values in own.items()}
        for name, other in {"full": FULL, "peer": PEER}.items():
            for clock, values in own.items():
                ratios = sorted(a / b for a, b in zip(values, taken[other][clock]))
                row |= {f"{clock}_over_{name}": statistics.median(ratios), f"{clock}_over_{name}_range": [ratios[0], ratios[-1]]}
        print(f"{dtype} {way:30}", *(f"{key} {value:.3f}" for key, value in row.items() if isinstance(value, float)), flush=True)
    return rows


def main(options: argparse.Namespace) -> None:
    "Measure what is asked for, and keep in results/vit.json what is not measured anew."
    if not options.holes:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # read by glibc when a process starts: for those that measure memory, not for this one
    path = RESULTS / "vit.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    both = options.memory == options.speed
    for dtype in options.dtypes:
        if options.speed or both:
            found[f"step, {dtype}"] = speed(dtype, options.images, options.rounds)
        if options.memory or both:
            found[f"memory, {dtype}"] = memories(dtype, options.images)
        path.write_text(json.dumps(found | {"images": options.images, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8, help="pictures in a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--holes", action="store_true", help="leave glibc as it is")
    logging.disable(logging.WARNING)
    main(parser.parse_args())
