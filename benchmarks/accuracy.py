"""What rounding costs really trained models: qtlm's schemes beside torchao, optimum-quanto, hqq and bitsandbytes, whichever are installed.

    python benchmarks/accuracy.py --train      # once; on one core half an hour for a large model, a quarter for a small one; goes on where it stopped
    python benchmarks/accuracy.py              # measures (and trains what is missing); `--models small --seeds 0` takes some, `--only gptq` some rows

Text: the Python standard library's source, 16 % of it held out. "large" is the 12 M model of the speed benchmarks; "small" has read far more tokens for its size, which is
what makes 4 bits cost more. All rows of a model see the same held-out windows: a row's increase is the mean over windows of its loss minus float32's, with the standard
error of that paired mean. A row quantizes the linear layers of the blocks; embedding and head, one tied tensor, stay float32, but for rows ending in "all": qtlm's default.

Bits per weight are those of the linear layers, from every tensor that a quantized layer holds: codes, scales, zero points, tables. `bits_per_weight` takes codes at their
nominal width, even where a library stores 4-bit codes in bytes, and leaves out zero points that are all zero; `bits_stored` takes all as it lies in memory.
"""

import argparse
import copy
import importlib.metadata
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import RESULTS, SHAPE, machine, tiny_lm
from torch import Tensor, nn

from qtlm import Trainer, load_checkpoint, quantize_model_ptq, save_checkpoint
from qtlm.data import Batches, BPEVocab, Tokens, load_vocab, stdlib_text

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler announces itself
FOLDER = Path(__file__).parents[1] / "checkpoints" / "accuracy"
LENGTH = SHAPE["block_size"]
SMALL = dict(vocab_size=1024, hidden_size=128, num_hidden_layers=4, num_attention_heads=2, intermediate_size=384)
MODELS = {  # windows: how many held-out ones are measured
    "large": dict(shape=SHAPE, max_steps=6000, batch_size=2, learning_rate=1.5e-3, warmup_steps=200, windows=64),
    "small": dict(shape=SHAPE | SMALL, max_steps=3000, learning_rate=2e-3, warmup_steps=150, windows=256),
}
PEERS = {"torchao": "torchao", "quanto": "optimum-quanto", "hqq": "hqq", "bitsandbytes": "bitsandbytes"}  # first word of a row: package
OBSERVERS = ("minmax", "moving_average", "percentile", "mse", "histogram")
ROUNDINGS = ("nearest", "mse", "hqq", "gptq")


def read_text(kind: str) -> tuple[BPEVocab, Tokens, Tokens]:
    "Vocabulary, training ids, held-out ids; kept in files, so that what was held out stays so under another Python, whose library differs."
    vocab_size = MODELS[kind]["shape"]["vocab_size"]
    files = [FOLDER / f"bpe-{vocab_size}" / name for name in ("vocab.json", "train.npy", "held-out.npy")]
    if not all(file.exists() for file in files):
        files[0].parent.mkdir(parents=True, exist_ok=True)
        text = stdlib_text(None)
        vocab = BPEVocab.train(text, vocab_size)
        vocab.save(files[0])
        for file, part in zip(files[1:], Tokens.from_text(text, vocab, cache_dir=False).split(0.16)):
            np.save(file, part.ids.numpy().astype("<u2"))
    vocab = load_vocab(files[0])
    return vocab, *(Tokens.from_file(file, vocab=vocab) for file in files[1:])


def trained(kind: str, seed: int) -> nn.Module:
    "The model of this kind and seed, trained now where it has not been."
    spec = MODELS[kind]
    vocab, text, held_out = read_text(kind)
    settings = {name: spec[name] for name in ("max_steps", "learning_rate", "warmup_steps")} | {"output_dir": str(FOLDER), "run_name": f"{kind}-{seed}"}
    settings |= dict(seed=seed, dtype="bf16", batch_size=spec.get("batch_size", 8), lr_scheduler_type="cosine", block_size=LENGTH, save_steps=100, save_total_limit=1)
    settings |= dict(eval_steps=spec["max_steps"] // 4, eval_batches=8, progress=False)
    trainer = Trainer(tiny_lm(seed, **spec["shape"]), settings, train_data=text, eval_data=held_out, vocab=vocab)
    last = trainer.run_dir / f"step-{spec['max_steps']:010d}"
    if not last.exists():
        print(f"training {trainer.run_dir}", flush=True)
        trainer.train(resume_from_checkpoint="auto")
    return load_checkpoint(last).model.eval()


def calibration_batches(kind: str) -> list:
    "32,768 ids of training text."
    return [batch for batch, _ in zip(Batches(read_text(kind)[1], LENGTH, 8, seed=1), range(16))]


def linears(model: nn.Module) -> dict[str, nn.Module]:
    "The linear layers of the blocks by name, quantized or not: those that all rows quantize."
    return {name: m for name, m in model.named_modules() if name.startswith("model.layers.") and name.endswith("_proj")}


def qtlm_rows(calibration: list) -> dict[str, Callable]:
    "Name of a row -> what quantizes the model it is given. Static ranges and GPTQ see the calibration batches."

    def row(**options):
        data = calibration if options.get("type") == "static" or options.get("rounding") == "gptq" else None
        return lambda model: quantize_model_ptq(model, calibration_data=data, inplace=True, **{"quantize_embedding": False, **options})

    rows = {"qtlm INT8 dynamic": row(bits=8), "qtlm INT8 dynamic, all": row(bits=8, quantize_embedding=True)}
    rows |= {f"qtlm INT8 static {observer}": row(bits=8, type="static", observer=observer) for observer in OBSERVERS}
    for rounding in ROUNDINGS:
        for name, size in (("default", None), ("16", 16), ("32", 32), ("row", -1)):
            rows[f"qtlm INT4 {rounding} / {name}"] = row(bits=4, rounding=rounding, group_size=size)
        rows[f"qtlm INT4 {rounding} / default, all"] = row(bits=4, rounding=rounding, quantize_embedding=True)
    return rows | {"qtlm INT4 static gptq / default": row(bits=4, type="static", rounding="gptq")}


def torchao(config: str, model: nn.Module, **options) -> nn.Module:
    ao = importlib.import_module("torchao.quantization")
    wrap = {"granularity": ao.PerGroup, "weight_granularity": ao.PerGroup, "mapping_type": lambda name: ao.MappingType[name.upper()]}
    config = getattr(ao, config)(**{key: wrap.get(key, lambda value: value)(value) for key, value in options.items()})
    ao.quantize_(model, config, filter_fn=lambda module, name: name in linears(model))
    return model


def quanto(model: nn.Module, weights: str) -> nn.Module:
    quanto = importlib.import_module("optimum.quanto")
    quanto.quantize(model, weights=getattr(quanto, weights), include="model.layers.*_proj")
    quanto.freeze(model)
    return model


def hqq(model: nn.Module, **options) -> nn.Module:
    hqq = importlib.import_module("hqq.core.quantize")
    for name, layer in linears(model).items():
        config = hqq.BaseQuantizeConfig(nbits=4, **options)
        model.set_submodule(name, hqq.HQQLinear(layer, config, compute_dtype=layer.weight.dtype, device="cpu"))
    return model


def bitsandbytes(kind: str, model: nn.Module, **options) -> nn.Module:
    bnb = importlib.import_module("bitsandbytes")
    for name, layer in linears(model).items():
        new = getattr(bnb.nn, kind)(layer.in_features, layer.out_features, bias=False, **options)
        new.load_state_dict(layer.state_dict())
        model.set_submodule(name, new.to("cpu"))  # where it is put is where it quantizes
    return model


def versions() -> dict[str, str | dict]:
    "Versions of the peers, or why one is not there."
    return {name: or_error(partial(importlib.metadata.version, package)) for name, package in PEERS.items()}


def peer_rows() -> dict[str, Callable]:
    "The same for the peers. A name that ends in bf16 wants a bf16 model, where scales and zero points take half the bits."
    ao, bnb = partial(partial, torchao), partial(partial, bitsandbytes)
    rows = {
        "torchao INT8 dynamic": ao("Int8DynamicActivationInt8WeightConfig"),
        "torchao INT4, INT8 activations / 32": ao("Int8DynamicActivationIntxWeightConfig", weight_dtype=torch.int4, weight_granularity=32),
        "torchao INT4 tinygemm / 64": ao("Int4WeightOnlyConfig", group_size=64),
        "quanto qint8": partial(quanto, weights="qint8"),
        "bitsandbytes INT8": bnb("Linear8bitLt", has_fp16_weights=False),
        "bitsandbytes NF4 / 64": bnb("Linear4bit", quant_type="nf4", compress_statistics=False),
        "bitsandbytes NF4 double / 64": bnb("Linear4bit", quant_type="nf4", compress_statistics=True),
        "bitsandbytes FP4 / 64": bnb("Linear4bit", quant_type="fp4", compress_statistics=False),
        "quanto qint4 / 128": partial(quanto, weights="qint4"),
        "quanto qint4 / 128 bf16": partial(quanto, weights="qint4"),
    }
    variants = {"": {}, " asymmetric": {"mapping_type": "asymmetric"}, " hqq": {"intx_choose_qparams_algorithm": "hqq_scale_only"}}
    for size, dtype in ((64, ""), (32, " bf16"), (64, " bf16"), (128, " bf16")):
        rows[f"hqq 4 bits / {size}{dtype}"] = partial(hqq, group_size=size)
        for variant, options in variants.items():
            rows[f"torchao INT4{variant} / {size}{dtype}"] = ao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=size, **options)
    there = [name for name, version in versions().items() if isinstance(version, str)]
    for module in ("torchao.quantization", "optimum.quanto", "hqq.core.quantize", "bitsandbytes"):
        or_error(partial(importlib.import_module, module))  # now, so that no row's seconds have it in them
    return {name: make for name, make in rows.items() if name.split()[0] in there}


def or_error(call: Callable[[], object]):
    "What `call` returns, or the first line of what it raises."
    try:
        return call()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}


def tensors_in(thing) -> dict[int, Tensor]:
    "All plain tensors inside a layer, by address: tensor subclasses and quantization states are opened."
    own, parts = {}, []
    if hasattr(thing, "__tensor_flatten__"):
        parts = [getattr(thing, name) for name in thing.__tensor_flatten__()[0]]
    elif isinstance(thing, Tensor):
        own = {thing.data_ptr(): thing.detach()} if thing.numel() else {}
        parts = [getattr(thing, name, None) for name in ("quant_state", "CB", "SCB")]  # bitsandbytes
    elif isinstance(thing, nn.Module) or type(thing).__name__ in ("QuantState", "MatmulLtState"):
        parts = list(vars(thing).values())
    elif isinstance(thing, (dict, list, tuple)):
        parts = list(thing.values()) if isinstance(thing, dict) else thing
    for part in parts:
        own |= tensors_in(part)
    return own


def bits_of(model: nn.Module, weights: int, bits: int) -> dict[str, float]:
    "Bits per weight of the linear layers: codes at `bits`, and as stored."
    codes, others = [], {}
    for layer in linears(model).values():
        first, *more = sorted(tensors_in(layer).values(), key=lambda t: -t.nbytes)
        codes.append(first)
        others |= {t.data_ptr(): t for t in more}  # tables that layers share count once
    stored = sum(t.nbytes for t in (*codes, *others.values()))
    return {"bits_per_weight": bits + 8 * sum(t.nbytes for t in others.values() if t.any()) / weights, "bits_stored": 8 * stored / weights}


def bytes_on_disk(model: nn.Module) -> int:
    "Bytes of `torch.save(model.state_dict())`."
    torch.save(model.state_dict(), file := io.BytesIO())
    return file.tell()


def window_losses(model: nn.Module, ids: Tensor) -> Tensor:
    "Mean loss of each window `[windows]`, nats a token, for ids `[windows, T + 1]`."
    with torch.no_grad():
        parts = ((model(part[:, :-1]).float().transpose(1, 2), part[:, 1:]) for part in ids.split(16))
        return torch.cat([F.cross_entropy(*part, reduction="none").double().mean(1) for part in parts])


def measure_row(name: str, make: Callable, model: nn.Module, ids: Tensor, reference: Tensor) -> dict:
    "Quantize a copy of `model` and measure it."
    weights = sum(layer.weight.numel() for layer in linears(model).values())
    bits = {"float32": 32, "bf16": 16}.get(name, 4 if "4" in name.split("/")[0] else 8)
    twin = copy.deepcopy(model).to(torch.bfloat16 if name.endswith("bf16") else torch.float32)
    start = time.perf_counter()
    twin = make(twin)
    row = {"seconds_to_quantize": time.perf_counter() - start, "bits": bits, "bytes_on_disk": or_error(lambda: bytes_on_disk(twin))}
    row |= bits_of(twin, weights, bits)  # before the first batch, which may leave prepared copies
    loss = window_losses(twin, ids)
    delta = loss - reference
    return row | {"loss": loss.mean().item(), "increase": delta.mean().item(), "increase_error": (delta.std() / len(delta) ** 0.5).item()}


def measure(kind: str, seed: int, only: str) -> dict[str, dict]:
    "All rows for one trained model."
    model, held_out = trained(kind, seed), read_text(kind)[2]
    starts = torch.linspace(0, len(held_out) - LENGTH - 1, MODELS[kind]["windows"]).long().tolist()  # spread over the whole text
    ids = torch.stack([held_out[s : s + LENGTH + 1] for s in starts])
    rows = {"float32": lambda model: model, "bf16": lambda model: model, **qtlm_rows(calibration_batches(kind)), **peer_rows()}
    reference, results = window_losses(model, ids), {}
    print(f"{kind} {seed}: bits per weight, loss increase in nats over {reference.mean():.4f}, seconds to quantize")
    for name in (name for name in rows if only in name):
        results[name] = row = or_error(partial(measure_row, name, rows[name], model, ids, reference))
        figures = "{bits_per_weight:6.2f} {increase:+8.4f} ± {increase_error:.4f} {seconds_to_quantize:6.1f}"
        print(f"  {name:40} {row.get('error') or figures.format(**row)}", flush=True)
    return results


def peak_bytes(call: Callable) -> int:
    "Most bytes that `call` held at one time, of those that it allocated: from torch's profiler."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    changes = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate((size for _, size in sorted(changes, key=lambda change: change[0])), initial=0))


def cost(model: nn.Module, data: list, bits: int, rounding: str) -> dict[str, float]:
    "Seconds of quantizing all weights in place, most bytes on the way (of model and all), bytes then, the file's; 32 bits: of the float model."
    data = data if rounding == "gptq" else None
    call = lambda model: quantize_model_ptq(model, bits=bits, rounding=rounding, calibration_data=data, inplace=True) if bits < 32 else model
    peak = peak_bytes(lambda: call(copy.deepcopy(model)))  # the copy too, so that what is freed of it counts
    twin, start = copy.deepcopy(model), time.perf_counter()
    call(twin)
    seconds, kept = time.perf_counter() - start, sum(t.nbytes for t in tensors_in(twin).values())
    with tempfile.TemporaryDirectory() as folder:
        size = (save_checkpoint(twin, path=folder) / "model.pt").stat().st_size
    return {"seconds": seconds, "peak_bytes": peak, "model_bytes": kept, "file_bytes": size}


def summarize(seeds: dict[str, dict]) -> dict[str, dict]:
    "For each row that all seeds have: the mean of its increase over them, that mean's standard error on these windows, lowest and highest seed."
    out = {}
    for name in set.intersection(*({name for name in rows if "increase" in rows[name]} for rows in seeds.values())):
        increases, errors = ([rows[name][key] for rows in seeds.values()] for key in ("increase", "increase_error"))
        out[name] = {"bits_per_weight": max(rows[name]["bits_per_weight"] for rows in seeds.values()), "increase": statistics.mean(increases)}
        out[name] |= {"increase_error": sum(e * e for e in errors) ** 0.5 / len(errors), "lowest": min(increases), "highest": max(increases)}
    return dict(sorted(out.items(), key=lambda item: (-item[1]["bits_per_weight"], item[1]["increase"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="results of other seeds in the file stay")
    parser.add_argument("--train", action="store_true", help="train, measure nothing")
    parser.add_argument("--only", default="", help="rows whose name has this; the others in the file stay")
    options = parser.parse_args()
    file = RESULTS / "accuracy.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for kind, seed in ((kind, seed) for kind in options.models for seed in options.seeds):
        model = trained(kind, seed)
        if options.train:
            continue
        here = results.setdefault(kind, {})
        if here.get("spec") != MODELS[kind]:  # measured on other models: start afresh
            here |= {"spec": MODELS[kind], "parameters": sum(p.numel() for p in model.parameters()), "seeds": {}, "cost": {}}
        here["seeds"][str(seed)] = here["seeds"].get(str(seed), {}) | measure(kind, seed, options.only)
        here["mean"] = summarize(here["seeds"])
        if not options.only:
            schemes, data = [(32, "nearest"), (8, "nearest"), (8, "mse"), *((4, rounding) for rounding in ROUNDINGS)], calibration_batches(kind)
            here["cost"] = {"float32" if bits == 32 else f"INT{bits} {rounding}": or_error(partial(cost, model, data, bits, rounding)) for bits, rounding in schemes}
            print(*(f"  {name:14} {row}" for name, row in here["cost"].items()), sep="\n")
        file.write_text(json.dumps({**results, "machine": machine(), "peers": versions()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
