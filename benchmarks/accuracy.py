"""What rounding costs a really trained model: qtlm's schemes beside torchao, optimum-quanto, hqq and bitsandbytes, whichever are installed.

    python benchmarks/accuracy.py --train      # once: three models of 12 M parameters, about half an hour each on one core; goes on where it was stopped
    python benchmarks/accuracy.py              # measures them (and trains those that are missing); `--seeds 0` takes one

Text: the Python standard library's source, 16 % of it held out. All rows of a model are measured in one process, on the same windows of held-out text; what a row costs
is the mean of its loss minus float32's over those windows, and its standard error is that of this paired difference. A row quantizes the linear layers of the blocks and
leaves embedding and head, which are one tied tensor, in float32; rows that end in "all" are qtlm's own default, which puts that tensor into 8 bits.

Bits per weight count, for those linear layers, every tensor that a quantized layer holds: codes, scales, zero points, tables. `bits_per_weight` takes the codes at their
nominal width, also where a library stores 4-bit codes in bytes, and leaves out zero points that are all zero; `bits_stored` takes all tensors as they lie in memory.
"""

import argparse
import copy
import gc
import importlib.metadata
import io
import json
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

FOLDER = Path(__file__).parents[1] / "checkpoints" / "accuracy"
HELD_OUT = 0.16
TRAINING = dict(
    max_steps=1000, batch_size=8, block_size=256, learning_rate=1.2e-3, lr_scheduler_type="cosine", warmup_steps=80, dtype="bf16",
    eval_steps=250, eval_batches=8, save_steps=100, save_total_limit=1, progress=False,
)  # fmt: skip
PEERS = {  # first word of a row: the package, and what is imported of it
    "torchao": ("torchao", "torchao.quantization"),
    "quanto": ("optimum-quanto", "optimum.quanto"),
    "hqq": ("hqq", "hqq.core.quantize"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
}
OBSERVERS = ("minmax", "moving_average", "percentile", "mse", "histogram")
ROUNDINGS = ("nearest", "mse", "hqq", "gptq")



def read_text() -> tuple[BPEVocab, Tokens, Tokens]:
    "The vocabulary, training ids and held-out ids; kept in files, so that another Python's library cannot change them."
    files = [FOLDER / name for name in ("vocab.json", "train.npy", "held-out.npy")]
    if not all(file.exists() for file in files):
        FOLDER.mkdir(parents=True, exist_ok=True)
        text = stdlib_text(None)
        vocab = BPEVocab.train(text, SHAPE["vocab_size"])
        vocab.save(files[0])
        for file, part in zip(files[1:], Tokens.from_text(text, vocab, cache_dir=False).split(HELD_OUT)):
            np.save(file, part.ids.numpy().astype("<u2"))
    vocab = load_vocab(files[0])
    return vocab, *(Tokens.from_file(file, vocab=vocab) for file in files[1:])


def train(seed: int) -> Path:
    "Train the model of this seed, or find it trained; its run directory."
    vocab, text, held_out = read_text()
    config = TRAINING | {"seed": seed, "output_dir": str(FOLDER), "run_name": f"seed-{seed}"}
    trainer = Trainer(tiny_lm(seed), config, train_data=text, eval_data=held_out, vocab=vocab)
    if not (trainer.run_dir / f"step-{TRAINING['max_steps']:010d}").exists():
        trainer.train(resume_from_checkpoint="auto")
        print(f"seed {seed}: {trainer.step} steps, held-out loss {trainer.evaluate()['loss']:.4f}", flush=True)
    return trainer.run_dir


def window_losses(model: nn.Module, ids: Tensor, batch_size: int = 16) -> Tensor:
    "Mean loss of each window `[windows]`, nats a token, for ids `[windows, T + 1]`."
    found = []
    with torch.no_grad():
        for part in ids.split(batch_size):
            logits = model(part[:, :-1]).float().transpose(1, 2)
            found.append(F.cross_entropy(logits, part[:, 1:], reduction="none").double().mean(1))
    return torch.cat(found)



def linears(model: nn.Module) -> dict[str, nn.Module]:
    "The linear layers of the blocks by name, quantized or not: those that all rows quantize."
    return {name: m for name, m in model.named_modules() if name.startswith("model.layers.") and name.endswith("_proj")}


def qtlm_rows(calibration: list) -> dict[str, Callable]:
    "qtlm's modes, observers and roundings. GPTQ and static ranges see the calibration batches, which are training text."

    def row(**options):
        data = calibration if options.get("type") == "static" or options.get("rounding") == "gptq" else None
        return lambda model: quantize_model_ptq(model, calibration_data=data, inplace=True, **{"quantize_embedding": False, **options})

    rows = {"qtlm INT8 dynamic": row(bits=8)}
    rows |= {f"qtlm INT8 static {observer}": row(bits=8, type="static", observer=observer) for observer in OBSERVERS}
    for size in (None, 32, -1):
        where = {None: "default", -1: "row"}.get(size, size)
        rows |= {f"qtlm INT4 {rounding} / {where}": row(bits=4, rounding=rounding, group_size=size) for rounding in ROUNDINGS}
    rows["qtlm INT4 static gptq / default"] = row(bits=4, type="static", rounding="gptq")
    rows["qtlm INT8 dynamic, all"] = row(bits=8, quantize_embedding=True)
    return rows | {f"qtlm INT4 {rounding} / default, all": row(bits=4, rounding=rounding, quantize_embedding=True) for rounding in ("mse", "gptq")}


def torchao(config: str, model: nn.Module, **options) -> nn.Module:
    from torchao import quantization as ao

    wrap = {"granularity": ao.PerGroup, "weight_granularity": ao.PerGroup, "mapping_type": lambda name: ao.MappingType[name.upper()]}
    config = getattr(ao, config)(**{key: wrap.get(key, lambda value: value)(value) for key, value in options.items()})
    ao.quantize_(model, config, filter_fn=lambda module, name: name in linears(model))
    return model


def quanto(model: nn.Module, weights: str) -> nn.Module:
    from optimum import quanto as oq

    oq.quantize(model, weights=getattr(oq, weights), include="model.layers.*_proj")
    oq.freeze(model)
    return model


def replace(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    "Put `make(layer)` in the place of each linear layer."
    for name, layer in linears(model).items():
        model.set_submodule(name, make(layer))
    return model


def hqq(model: nn.Module, **options) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, **options)
    return replace(model, lambda layer: HQQLinear(layer, config, compute_dtype=layer.weight.dtype, device="cpu"))


def bitsandbytes(kind: str, model: nn.Module, **options) -> nn.Module:
    import bitsandbytes as bnb

    def make(layer):
        new = getattr(bnb.nn, kind)(layer.in_features, layer.out_features, bias=False, **options)
        new.load_state_dict(layer.state_dict())
        return new.to("cpu")  # which is where it quantizes

    return replace(model, make)


def peer_rows() -> dict[str, Callable]:
    "The peers' schemes. A name that ends in bf16 wants a bf16 model, where scales and zero points take half the bits."
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
    return {name: make for name, make in rows.items() if name.split()[0] in there}


def versions() -> dict[str, str | dict]:
    "Versions of the peers, or why they are not there; they are imported here, before anything is timed."
    load = lambda package, module: importlib.import_module(module) and importlib.metadata.version(package)
    return {name: or_error(partial(load, *where)) for name, where in PEERS.items()}


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


def bits_of(model: nn.Module, weights: int, bits: int) -> tuple[float, float]:
    "Bits per weight of the linear layers: codes at `bits`, and as stored."
    nominal = stored = 0
    for layer in linears(model).values():
        codes, *others = sorted(tensors_in(layer).values(), key=lambda t: -t.numel() * t.element_size())
        n = sum(p.numel() * p.element_size() for p in others)
        stored += codes.numel() * codes.element_size() + n
        nominal += n - sum(p.numel() * p.element_size() for p in others if not p.any())
    return bits + 8 * nominal / weights, 8 * stored / weights


def bytes_on_disk(model: nn.Module) -> int:
    "Bytes of `torch.save(model.state_dict())`."
    torch.save(model.state_dict(), file := io.BytesIO())
    return file.tell()


def peak_bytes(call: Callable) -> int:
    "Most bytes that `call` held at one time beyond what there was before it: from the allocations that torch's profiler records."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    changes = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate((size for _, size in sorted(changes, key=lambda change: change[0])), initial=0))


def or_error(call: Callable[[], object]):
    "What `call` returns, or the first line of what it raises."
    try:
        return call()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}



def measure_row(name: str, make: Callable, model: nn.Module, ids: Tensor, reference: Tensor) -> dict:
    "Quantize a copy of `model` and measure it."
    weights = sum(layer.weight.numel() for layer in linears(model).values())
    bits = {"float32": 32, "bf16": 16}.get(name, 4 if "4" in name.split("/")[0] else 8)
    twin = copy.deepcopy(model).to(torch.bfloat16 if name.endswith("bf16") else torch.float32)
    start = time.perf_counter()
    twin = make(twin)
    row = {"seconds_to_quantize": time.perf_counter() - start, "bits": bits}
    row["bits_per_weight"], row["bits_stored"] = bits_of(twin, weights, bits)  # before the first batch: some keep a float copy from then on
    row["bytes_on_disk"] = or_error(lambda: bytes_on_disk(twin))
    loss = window_losses(twin, ids)
    delta = loss - reference
    return row | {"loss": loss.mean().item(), "increase": delta.mean().item(), "increase_error": (delta.std() / len(delta) ** 0.5).item()}


def measure(seed: int, windows: int, only: str) -> dict:
    "All rows for one trained model."
    model = load_checkpoint(train(seed)).model.eval()
    _, text, held_out = read_text()
    length = TRAINING["block_size"]
    starts = torch.linspace(0, len(held_out) - length - 1, windows).long().tolist()  # spread over the whole text
    ids = torch.stack([held_out[s : s + length + 1] for s in starts])
    rows = {"float32": lambda model: model, "bf16": lambda model: model, **qtlm_rows(calibration_batches(text)), **peer_rows()}
    reference, results = window_losses(model, ids), {}
    print(f"seed {seed}: float32 {reference.mean():.4f} nats a token on {windows * length:,} tokens; then bits per weight, increase, seconds to quantize")
    for name, make in rows.items():
        if only in name:
            results[name] = row = or_error(lambda: measure_row(name, make, model, ids, reference))  # noqa: B023
            figures = "{bits_per_weight:6.2f} {increase:+8.4f} ± {increase_error:.4f} {seconds_to_quantize:6.1f}"
            print(f"  {name:40} {row.get('error') or figures.format(**row)}", flush=True)
            gc.collect()
    return results


def calibration_batches(text: Tokens) -> list:
    "32,768 ids of training text."
    batches = Batches(text, TRAINING["block_size"], 8, seed=1)
    return [batches[i] for i in range(16)]


def measure_cost(seed: int) -> dict:
    "Seconds and memory of quantizing in place, all weights, and the size of qtlm's own files."
    model, text = load_checkpoint(train(seed)).model.eval(), read_text()[1]
    sizes = [4 * p.numel() for p in model.parameters()]
    with tempfile.TemporaryDirectory() as folder:

        def file_bytes(model: nn.Module) -> int:
            return (save_checkpoint(model, path=Path(folder)) / "model.pt").stat().st_size

        def cost(bits: int, rounding: str) -> dict:
            data = calibration_batches(text) if rounding == "gptq" else None
            twin, call = copy.deepcopy(model), partial(quantize_model_ptq, bits=bits, rounding=rounding, calibration_data=data, inplace=True)
            peak, twin = peak_bytes(partial(call, twin)), copy.deepcopy(model)
            start = time.perf_counter()
            call(twin)
            seconds, size = time.perf_counter() - start, file_bytes(twin)
            kept = sum(t.numel() * t.element_size() for t in tensors_in(twin).values())
            return {"seconds": seconds, "peak_bytes": peak, "model_bytes": kept, "file_bytes": size, "file_ratio": size / before}

        before = file_bytes(model)
        schemes = [(8, "nearest"), (8, "mse"), *((4, rounding) for rounding in ROUNDINGS)]
        rows = {f"INT{bits} {rounding}": or_error(lambda: cost(bits, rounding)) for bits, rounding in schemes}  # noqa: B023
    return {"float32": {"model_bytes": sum(sizes), "largest_layer_bytes": max(sizes), "file_bytes": before}, **rows}


def summarize(models: dict[str, dict]) -> dict[str, dict]:
    "For each row that all models have: the mean of its increase over them, and the standard error of that mean on these windows."
    out = {}
    for name in next(iter(models.values())):
        rows = [rows[name] for rows in models.values() if "increase" in rows.get(name, {})]
        if len(rows) == len(models):
            increases, errors = [row["increase"] for row in rows], [row["increase_error"] for row in rows]
            out[name] = {"bits_per_weight": rows[0]["bits_per_weight"], "increase": statistics.mean(increases), "lowest": min(increases)}
            out[name] |= {"highest": max(increases), "increase_error": sum(e * e for e in errors) ** 0.5 / len(errors)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which models; results of others in the file stay")
    parser.add_argument("--train", action="store_true", help="train, measure nothing")
    parser.add_argument("--windows", type=int, default=256, help="held-out windows of 256 tokens")
    parser.add_argument("--only", default="", help="rows whose name has this; the others in the file stay")
    options = parser.parse_args()
    if options.train:
        return print(*(train(seed) for seed in options.seeds), sep="\n")
    file = RESULTS / "accuracy.json"
    settings = {"model": SHAPE, "training": TRAINING, "held_out_tokens": options.windows * TRAINING["block_size"]}
    old = json.loads(file.read_text()) if file.exists() else {}
    models = old.get("models", {}) if all(old.get(key) == json.loads(json.dumps(value)) for key, value in settings.items()) else {}
    for seed in options.seeds:
        models[f"seed {seed}"] = models.get(f"seed {seed}", {}) | measure(seed, options.windows, options.only)
        cost = measure_cost(seed) if not options.only else old.get("cost", {})
        results = {"machine": machine(), "peers": versions(), **settings, "models": models, "mean": summarize(models), "cost": cost}
        file.write_text(json.dumps(results, indent=2) + "\n")
    print(*(f"  {name:28} {row}" for name, row in cost.items()), sep="\n")


if __name__ == "__main__":
    main()
