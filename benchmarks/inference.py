"""Forward speed of qtlm's INT8 and INT4 beside float32, bf16 and the libraries that are installed (extra `[bench]`), eager and compiled, in one run.

    python benchmarks/inference.py           # about eight minutes on two cores; compiling needs a C++ compiler

A single token is timed as decoding meets it: the same model many times in a row, so that its weights are where the last call left them.
What a library cannot do on this machine stands in the table as the first line of its error; so does one whose logits are not the model's.
(torchao 0.18, compiled, at one token on a processor with AMX: it gives `torch._int_mm` a row of stride 0, and gets back memory that nobody wrote.)
"""

import argparse
import copy
import importlib.util
import logging
import shutil
import time
from collections.abc import Callable

import torch
from common import in_turn, random_ids, report, tiny_lm
from torch import nn

from qtlm import quantize_model_ptq

CALLS = {"8 x 256 tokens": (random_ids(8, 256), 1), "one token, no cache": (random_ids(1, 1), 20)}  # what goes in, how often in a row
WRONG = 0.5  # logits that differ by such a share from float32's are not those of the model: there is no time to compare
WRAPPED = ("float32", "INT8", "INT4", "torchao int8 dynamic", "torchao int4 in bf16")  # compiled with what calls the kernels in C++, too
SLOW = 5  # a model that takes so many times float32's time is timed once, not in every round


def replace_linears(model: nn.Module, new: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    "A copy of `model` with `new(layer)` in place of each linear layer."
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, new(child))
    return model


def torchao(model: nn.Module, kind: str) -> nn.Module:
    "torchao: int8 weights with dynamic int8 activations, or int4 weights for the CPU (bf16 only)."
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    if kind == "int8":
        config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)  # the others are to run as they are
    else:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=64, set_inductor_config=False)
    model = copy.deepcopy(model)
    quantize_(model, config)
    return model


def quanto(model: nn.Module, kind: str) -> nn.Module:
    "optimum-quanto: weights only, activations stay float."
    from optimum.quanto import freeze, qint4, qint8, quantize

    model = copy.deepcopy(model)
    quantize(model, weights={"qint8": qint8, "qint4": qint4}[kind])
    freeze(model)
    return model


def hqq(model: nn.Module, bits: int) -> nn.Module:
    "hqq: weights only, groups of 64."
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config, dtype = BaseQuantizeConfig(nbits=bits, group_size=64), next(model.parameters()).dtype
    return replace_linears(model, lambda layer: HQQLinear(layer, config, compute_dtype=dtype, device="cpu"))


def bitsandbytes(model: nn.Module, kind: str) -> nn.Module:
    "bitsandbytes: NF4 weights, or LLM.int8()."
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each layer that it casts

    def new(layer: nn.Linear) -> nn.Module:
        size, weight = (layer.in_features, layer.out_features), layer.weight.detach().clone()
        if kind == "NF4":
            made = bnb.nn.Linear4bit(*size, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
            made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        else:
            made = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
            made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        return made.to("cpu")

    return replace_linears(model, new)


def builders(model: nn.Module) -> dict[str, Callable[[], nn.Module]]:
    "What is compared, by name; made when called, because a library may fail at that already."
    bf16 = copy.deepcopy(model).bfloat16()
    found = {
        "float32": lambda: model,
        "bf16": lambda: bf16,
        "INT8": lambda: quantize_model_ptq(model, bits=8),
        "INT4": lambda: quantize_model_ptq(model, bits=4),
        "INT8 in bf16": lambda: quantize_model_ptq(bf16, bits=8),
        "INT4 in bf16": lambda: quantize_model_ptq(bf16, bits=4),
    }
    peers = {
        "torchao": {
            "torchao int8 dynamic": lambda: torchao(model, "int8"),
            "torchao int8 dynamic in bf16": lambda: torchao(bf16, "int8"),
            "torchao int4 in bf16": lambda: torchao(bf16, "int4"),
        },
        "optimum.quanto": {"optimum-quanto qint8": lambda: quanto(model, "qint8"), "optimum-quanto qint4": lambda: quanto(model, "qint4")},
        "hqq": {"hqq 4 bits": lambda: hqq(model, 4)},
        "bitsandbytes": {"bitsandbytes NF4 in bf16": lambda: bitsandbytes(bf16, "NF4"), "bitsandbytes int8": lambda: bitsandbytes(model, "int8")},
    }
    for package, made in peers.items():
        if importlib.util.find_spec(package.split(".")[0]) and importlib.util.find_spec(package):
            found |= made
    return found


def benchmark_model() -> tuple[nn.Module, str]:
    "The 12 M model as accuracy.py has trained it, or where it has not, with random weights: the time is the same."
    from accuracy import FOLDER, trained

    there = (FOLDER / "large-0").exists()
    return (trained("large", 0) if there else tiny_lm().eval()), "trained" if there else "random"


def first_line(error: Exception) -> str:
    "The error's kind and what its first line says."
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]


def build(makers: dict[str, Callable[[], nn.Module]], compiled: bool) -> tuple[dict[str, nn.Module], dict[str, str]]:
    "Make all models, and a compiled twin of each; return them and the errors of those that could not be made."
    models, errors = {}, {}
    for name, make in makers.items():
        try:
            models[f"{name}, eager"] = make().eval()
        except Exception as error:
            errors[f"{name}, eager"] = first_line(error)
    if compiled:
        models |= {name.replace(", eager", ", compiled"): torch.compile(m) for name, m in list(models.items())}
    return models, errors


def wrapped(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    "Models compiled so that C++ calls their kernels, not Python: where a kernel takes microseconds, that is a good part of the time."
    there = {name: models[f"{name}, eager"] for name in WRAPPED if f"{name}, eager" in models}
    return {f"{name}, compiled, C++ wrapper": torch.compile(model, options={"cpp_wrapper": True}) for name, model in there.items()}


def time_all(models: dict[str, nn.Module], ids: torch.Tensor, times: int, rounds: int) -> dict[str, dict]:
    "Time `times` calls in a row of each model, in turn; a row a model: figures, or what went wrong."
    calls, rows, unit, wanted = {}, {}, None, None
    for name, model in models.items():
        def call(model=model):  # fmt: skip
            for _ in range(times):
                model(ids)

        try:
            logits = model(ids).float()  # compiles
            wanted = logits if wanted is None else wanted
            distance = ((logits - wanted).norm() / wanted.norm()).item()
            if not distance < WRONG:
                raise ArithmeticError(f"wrong logits, {distance:.2g} of their size away from float32's")
            call()
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
        except Exception as error:
            rows[name] = {"error": first_line(error)}
            continue
        unit = unit or seconds
        if seconds > SLOW * unit:
            rows[name] = {"seconds": seconds, "speedup": unit / seconds, "speedup_low": unit / seconds, "speedup_high": unit / seconds}
        else:
            calls[name] = call
    rows |= in_turn(calls, rounds, warmup=1)
    for row in rows.values():
        if "seconds" in row:
            row["seconds"] /= times
            row["tokens_per_second"] = ids.numel() / row["seconds"]
    return {name: rows[name] for name in models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--only", default="", help="comma-separated beginnings of names; float32 is always there")
    options = parser.parse_args()
    model, weights = benchmark_model()
    makers = {n: m for n, m in builders(model).items() if n == "float32" or n.startswith(tuple(options.only.split(",")))}
    torch._dynamo.config.recompile_limit = 64  # one process holds many compiled models; they share TinyLM's code
    tables = {}
    with torch.no_grad():
        compiles = not options.no_compile and bool(shutil.which("g++") or shutil.which("clang++"))
        models, errors = build(makers, compiles)
        for title, (ids, times) in CALLS.items():
            torch._dynamo.reset()
            if compiles and ids.numel() == 1:
                models |= wrapped(models)
            tables[title] = time_all(models, ids, times, options.rounds) | {name: {"error": text} for name, text in errors.items()}
    print(f"{weights} weights")
    report("inference", tables)


if __name__ == "__main__":
    main()
