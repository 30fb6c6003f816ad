"""Forward speed: float32, bf16 and qtlm's INT8 and INT4, eager and compiled, in one run; torchao and optimum-quanto where they are installed.

    python benchmarks/inference.py           # about four minutes on two cores; compiling needs a C++ compiler
"""

import argparse
import copy
import importlib.util
import shutil

import torch
from common import in_turn, random_ids, report, tiny_lm

from qtlm import quantize_model_ptq


def peers(model) -> dict[str, torch.nn.Module]:
    "INT8 with dynamic activations from the libraries that are installed."
    found = {}
    if importlib.util.find_spec("torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        other = copy.deepcopy(model)
        quantize_(other, Int8DynamicActivationInt8WeightConfig())
        found["torchao INT8 dynamic"] = other
    if importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.quanto"):
        from optimum.quanto import freeze, qint8, quantize

        other = copy.deepcopy(model)
        quantize(other, weights=qint8)
        freeze(other)
        found["optimum-quanto qint8"] = other
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    model = tiny_lm().eval()
    eager = {
        "float32": model,
        "bf16": copy.deepcopy(model).bfloat16(),
        "INT8": quantize_model_ptq(model, bits=8),
        "INT4": quantize_model_ptq(model, bits=4),
        **peers(model),
    }
    models = {f"{name}, eager": m for name, m in eager.items()}
    if not options.no_compile and (shutil.which("g++") or shutil.which("clang++")):
        models |= {f"{name}, compiled": torch.compile(m) for name, m in eager.items()}
    tables = {}
    with torch.no_grad():
        for title, ids in (("8 x 256 tokens", random_ids(8, 256)), ("one token, no cache", random_ids(1, 1))):
            torch._dynamo.reset()
            rows = in_turn({name: (lambda m=m, x=ids: m(x)) for name, m in models.items()}, options.rounds, warmup=3)
            for row in rows.values():
                row["tokens_per_second"] = ids.numel() / row["seconds"]
            tables[title] = rows
    report("inference", tables)


if __name__ == "__main__":
    main()
