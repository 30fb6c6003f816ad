"""What the benchmarks share: one model shape, calls timed in turn, results as JSON.

Machines are shared and noisy, so nothing here reports an absolute time alone: all calls of one benchmark run in turn, A B C A B C ..., in one
process, and each is given as the median over rounds of its ratio to the first, within the same round.

Where there is a C++ compiler, the loops of chapter 03b are built first, and used in eager mode, too. QTLM_NATIVE=0 measures without them; a result says which it was.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qtlm import ModelConfig, NativeError, TinyLM, build_native

RESULTS = Path(__file__).parent / "results"
ROW_KEYS = ("seconds", "speedup", "speedup_low", "speedup_high")  # what `in_turn` gives; other figures of a row are printed as they are
# 12.2 M parameters: large enough that matrices dominate, small enough for two cores.
SHAPE = dict(
    vocab_size=4096, hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1024, block_size=256
)  # fmt: skip

LOOPS = False
with contextlib.suppress(NativeError):
    LOOPS = bool(build_native())


def tiny_lm(seed: int = 0, **changes) -> TinyLM:
    "The benchmark model, from a seed."
    torch.manual_seed(seed)
    return TinyLM(ModelConfig(**{**SHAPE, **changes}))


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    "Token ids; their values do not matter for speed."
    return torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def in_turn(calls: dict[str, Callable[[], object]], rounds: int = 10, warmup: int = 2) -> dict[str, dict[str, float]]:
    "Time `calls` in turn; give for each its median seconds and the median, lowest and highest ratio of the first one's time to its own."
    seconds = {name: [] for name in calls}
    for n in range(warmup + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if n >= warmup:
                seconds[name].append(time.perf_counter() - start)
    first = next(iter(seconds.values()))
    out = {}
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(first, own)]
        out[name] = {
            "seconds": statistics.median(own),
            "speedup": statistics.median(ratios),
            "speedup_low": min(ratios),
            "speedup_high": max(ratios),
        }
    return out


def machine() -> dict:
    "What the figures depend on."
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        models = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0] if models else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "loops": LOOPS,
    }


def two_parts(description: str, name: str, speed: Callable[[argparse.Namespace], dict], quality: Callable[[int, str], dict], *flags: str) -> None:
    "The command line of a benchmark of speed and quality: runs what is asked for, and keeps in results/NAME.json what is not measured anew."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="rows of quality whose name holds this")
    parser.add_argument("--rounds", type=int, default=8)
    for flag in ("--speed", "--quality", *flags):
        parser.add_argument(flag, action="store_true")
    options, path = parser.parse_args(), RESULTS / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    both = options.speed == options.quality
    write = lambda: path.write_text(json.dumps({**found, "machine": machine()}, indent=1) + "\n")
    if options.speed or both:
        found |= speed(options)
        write()
    for seed in options.seeds if options.quality or both else ():
        found.setdefault("quality", {}).setdefault(str(seed), {}).update(quality(seed, options.only))
        write()


def report(name: str, tables: dict[str, dict]) -> None:
    "Print the tables and write them, with the machine, to results/NAME.json."
    for title, rows in tables.items():
        print(f"\n{title}")
        for row, figures in rows.items():
            if "speedup" in figures:
                spread = f"({figures['speedup_low']:.2f} to {figures['speedup_high']:.2f})"
                print(f"  {row:44} {figures['speedup']:6.2f} x {spread:18} {figures['seconds'] * 1e3:9.1f} ms", end="")
            if "error" in figures:
                print(f"  {row:44} {figures['error']}", end="")
            print("".join(f"   {key} {value:,.0f}" for key, value in figures.items() if key not in (*ROW_KEYS, "error")))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), **tables}, indent=2) + "\n")

