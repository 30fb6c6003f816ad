"""What benchmarks/results holds, as tables and pictures. No figure of the site is typed by hand."""
import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
STYLES = {"light": {}, "dark": {"text.color": "#cfd0d0", "axes.edgecolor": "#9a9fa6", "axes.labelcolor": "#cfd0d0", "xtick.color": "#cfd0d0",
                                "ytick.color": "#cfd0d0", "grid.color": "#444", "legend.labelcolor": "#cfd0d0"}}  # fmt: skip
# Text as outlines, so that a picture looks the same everywhere; a fixed salt, so that its bytes are, too.
COMMON = {"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "legend.framealpha": 0, "svg.hashsalt": "qtlm",
          "axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.titlesize": 11}  # fmt: skip


def results(name: str) -> dict:
    "Return the stored results of a benchmark."
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]], rest: str = "--:") -> str:
    "Return a Markdown table; its first column is text and the others, unless `rest` says `:--`, are figures."
    lines = ["| " + " | ".join(row) + " |" for row in [head, [":--", *[rest] * (len(head) - 1)], *rows]]
    return "\n".join(lines)


def picture(name: str, alt: str, draw: Callable[[], object], folder: Path) -> str:
    "Draw a picture for light pages and one for dark ones; return both as MyST, of which the theme shows one."
    out = []
    for style, settings in STYLES.items():
        with plt.rc_context(COMMON | settings):
            draw()
            plt.savefig(folder / f"{name}-{style}.svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
            plt.close("all")
        out.append(f"```{{image}} figures/{name}-{style}.svg\n:alt: {alt}\n:class: only-{style} drawn\n```")
    return "\n\n".join(out)


# ---- the demo ----

def demo_table(report: dict) -> str:
    "Return the table of the demo's models."
    head = ["model", "bits per weight", "bytes on disk", "of float32", "held-out loss", "forward speed"]
    rows = []
    for name, row in report["models"].items():
        loss = f"{row['validation_loss']:.4f} ({row['loss_increase']:+.4f})"
        speed = f"{report['timings'][name]['ratio']:.2f}x"
        rows.append([name, f"{row['bits_per_weight']:.2f}", f"{row['bytes_on_disk']:,}", f"{row['bytes_ratio']:.3f}", loss, speed])
    return table(head, rows)


def demo_pictures(report: dict, folder: Path) -> list[str]:
    "Return the demo's own pictures: sizes, and what training with rounding did; of a report without that, where the weights' bits went."
    from qtlm import demo

    sizes = picture("demo-sizes", "Size on disk and loss of the float32, INT8 and INT4 models", lambda: demo._plot_sizes(report), folder)
    draw = demo._plot_training if "qat" in report else _draw_demo_losses
    return [sizes, picture("demo-training", "What rounding and training cost in loss", lambda: draw(report), folder)]


def _draw_demo_losses(report: dict) -> None:
    "Draw what rounding added to the loss, and how fast the small models are."
    names = [name for name in report["models"] if name != "float32"]
    added = [report["models"][name]["loss_increase"] for name in names]
    speeds = [report["timings"][name]["ratio"] for name in names]
    _, (left, right) = plt.subplots(1, 2, figsize=(6, 3), layout="constrained")
    colors = [f"C{i}" for i, _ in enumerate(names)]
    left.bar_label(left.bar(names, added, 0.6, color=colors), fmt="%+.4f")
    left.set(title="Loss added by rounding", ylabel="nats/byte")
    right.bar_label(right.bar(names, speeds, 0.6, color=colors), fmt="%.2fx")
    right.axhline(1, color="C7", lw=1, ls=":")
    right.set(title="Forward speed over float32", ylabel="ratio")
    for ax in (left, right):
        ax.margins(y=0.15)


# ---- any benchmark ----

def _span(row: dict) -> str:
    "Return the lowest and highest ratio of a row."
    return f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}"


def _error(row: dict) -> str:
    "Return a loss difference with its standard error."
    error = row.get("increase_error", row.get("error"))
    return f"{row['increase']:+.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _mega(key: str) -> Callable[[dict], str]:
    "Return a column of megabytes."
    return lambda row: f"{row[key] / 1e6:.1f}"


# A column, the keys that a row must have for it, and how it is written.
COLUMNS = [
    ("speed, times the first row's", ("speedup",), lambda row: f"{row['speedup']:.2f}"),
    ("in single rounds", ("speedup_low", "speedup_high"), _span),
    ("tokens/s", ("tokens_per_second",), lambda row: f"{row['tokens_per_second']:,.0f}"),
    ("seconds", ("file_bytes", "seconds"), lambda row: f"{row['seconds']:.2f}"),
    ("bits per weight", ("bits_per_weight",), lambda row: f"{row['bits_per_weight']:.2f}"),
    ("loss above float32's", ("increase",), _error),
    ("seeds: lowest to highest", ("lowest", "highest"), lambda row: f"{row['lowest']:+.4f} to {row['highest']:+.4f}"),
    ("rounded afterwards", ("afterwards",), lambda row: f"{row['afterwards']:+.4f}"),
    ("loss before", ("before",), lambda row: f"{row['before']:.3f}"),
    ("loss after", ("after",), lambda row: f"{row['after']:.3f}"),
    ("of float32's drop", ("before", "after", "share"), lambda row: f"{row['share']:.1%}"),
    ("weights, MB", ("weights",), _mega("weights")),
    ("optimizer, MB", ("state",), _mega("state")),
    ("lasting, MB", ("lasting",), _mega("lasting")),
    ("at most beside it, MB", ("peak",), _mega("peak")),
    ("at most, MB", ("peak_bytes",), _mega("peak_bytes")),
    ("file, MB", ("file_bytes",), _mega("file_bytes")),
    ("backbone, of float32", ("backbone_share",), lambda row: f"{row['backbone_share']:.3f}"),
    ("peak, of full", ("peak_share",), lambda row: f"{row['peak_share']:.2f}"),
    ("step, of full", ("processor_over_full",), lambda row: f"{row['processor_over_full']:.2f}"),
    ("step, of peft + bitsandbytes", ("processor_over_peer",), lambda row: f"{row['processor_over_peer']:.2f}"),
]


TITLES = {"qat": "Quantization-aware training", "finetune": "Fine-tuning", "vit": "Adapting a ViT in four bits"}


def rows_table(rows: dict[str, dict]) -> str:
    "Return named rows as a table with the columns that they have; empty where there are none."
    columns = [(title, keys, write) for title, keys, write in COLUMNS if any(row.keys() >= set(keys) for row in rows.values())]
    if not columns:
        return ""
    cells = [[name, *(write(row) if row.keys() >= set(keys) else "" for _, keys, write in columns)] for name, row in rows.items()]
    return table(["", *(title for title, *_ in columns)], cells)


def _tables(data: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    "Yield the path and the table of each group of rows in a result, outer groups first."
    groups = {name: value for name, value in data.items() if isinstance(value, dict)}
    flat = {name: value for name, value in groups.items() if not any(isinstance(v, dict) for v in value.values())}
    if path and flat and (text := rows_table(flat)):
        yield path, text
    for name, value in groups.items():
        if name not in ("machine", "spec", "peers") and (name not in flat or not path):
            yield from _tables(value, (*path, name))


def machine(data: dict) -> str:
    "Return one line on the machine of a result."
    found = data.get("machine")
    return f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads, {found['capability']}, torch {found['torch']}" if found else ""


def _purpose(name: str) -> str:
    "Return the first paragraph of the docstring of a benchmark's script."
    script = ROOT / "benchmarks" / f"{name}.py"
    text = (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) if script.exists() else "") or ""
    return " ".join(text.partition("\n\n")[0].split())


def _label(data: dict, path: tuple[str, ...]) -> str:
    "Say in words where a table stands in a result: models by their size, numbers as seeds."
    sizes = {key: f"{value['parameters'] / 1e6:.0f} M parameters" for key, value in data.items() if isinstance(value, dict) and "parameters" in value}
    return ", ".join(f"seed {part}" if part.isdigit() else sizes.get(part, part) for part in path)


def benchmark(name: str) -> str:
    "Return a section on one result: what was measured, where, and all its tables."
    data = results(name)
    parts = [f"## {TITLES.get(name, name.capitalize())}", _purpose(name), f"`python benchmarks/{name}.py`" + (f" on: {machine(data)}." if "machine" in data else ".")]
    for path, text in _tables(data):
        if path[-2:-1] == ("seeds",):
            continue  # the means stand for them
        is_open = ":open:\n" if text.count("\n") < 40 else ""
        parts += [f":::{{dropdown}} {_label(data, path)}\n{is_open}\n{text}\n:::"]
    return "\n\n".join(parts)


def benchmarks() -> list[str]:
    "Return the names of the results, the demo's aside."
    return sorted(path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json") if path.stem != "demo")


# ---- pictures of several results ----

LIBRARIES = {"qtlm": "C0", "torchao": "C1", "quanto": "C2", "hqq": "C3", "bitsandbytes": "C4"}


def draw_accuracy(data: dict) -> None:
    "Draw what four bits cost against what they take, library by library."
    fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for library, color in LIBRARIES.items():
        rows = [row for name, row in data["mean"].items() if name.startswith(library) and row["bits_per_weight"] < 6]
        x, y = [row["bits_per_weight"] for row in rows], [row["increase"] for row in rows]
        span = [[row["increase"] - row["lowest"] for row in rows], [row["highest"] - row["increase"] for row in rows]]
        ax.errorbar(x, y, span, fmt="o", color=color, ms=5, lw=1, alpha=0.85, label=library)
    ax.set(xlabel="bits per weight, scales included", ylabel="loss above float32's (nats/token)", ylim=(0, None))
    ax.set_title(f"Four bits, after training: {data['parameters'] / 1e6:.0f} M parameters, three seeds")
    ax.grid(alpha=0.4)
    ax.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False)


def draw_speed(rows: dict[str, dict]) -> None:
    "Draw the speed of a forward pass, everything compiled."
    names = [name.removesuffix(", compiled") for name in rows if name.endswith(", compiled")]
    names.sort(key=lambda name: rows[f"{name}, compiled"]["speedup"])
    found = [rows[f"{name}, compiled"] for name in names]
    speeds = [row["speedup"] for row in found]
    span = [[row["speedup"] - row["speedup_low"] for row in found], [row["speedup_high"] - row["speedup"] for row in found]]
    ours = [name.startswith("INT") for name in names]
    fig, ax = plt.subplots(figsize=(7, 3.9), layout="constrained")
    ax.barh(names, speeds, 0.7, xerr=span, color=["C0" if own else "C7" for own in ours], error_kw={"elinewidth": 1, "ecolor": "C7"})
    ax.axvline(1, color="C3", lw=1, ls=":")
    ax.set(xlabel="times as fast as float32, not compiled", title="Forward pass, 8 x 256 tokens, compiled (blue: qtlm)")


# ---- which method ----

# What the page on methods compares: what to write, the row of accuracy.json, the bits that inference.json timed.
METHODS = [
    ("INT8, dynamic (the default)", "quantize_model_ptq(model)", "qtlm INT8 dynamic", "INT8"),
    ("INT8, static", 'quantize_model_ptq(model, type="static", calibration_data=data)', "qtlm INT8 static histogram", None),
    ("INT4, nearest code", 'quantize_model_ptq(model, bits=4, rounding="nearest")', "qtlm INT4 nearest / default", "INT4"),
    ("INT4, searched scales (default)", "quantize_model_ptq(model, bits=4)", "qtlm INT4 mse / default", "INT4"),
    ("INT4, HQQ", 'quantize_model_ptq(model, bits=4, rounding="hqq")', "qtlm INT4 hqq / default", "INT4"),
    ("INT4, GPTQ", 'quantize_model_ptq(model, bits=4, rounding="gptq", calibration_data=data)', "qtlm INT4 gptq / default", "INT4"),
]


def methods_table() -> str:
    "Return what each way of rounding after training costs and gives, for two sizes of model."
    accuracy, speed = results("accuracy"), results("inference")["8 x 256 tokens"]
    small, large = accuracy["small"], accuracy["large"]
    sizes = [f"{model['parameters'] / 1e6:.0f} M" for model in (small, large)]
    rows = []
    for name, _, key, timed in METHODS:
        losses = [f"{model['mean'][key]['increase']:+.4f}" for model in (small, large)]
        speeds = [f"{speed[f'{timed}, {how}']['speedup']:.2f}x" if timed else "" for how in ("eager", "compiled")]
        bits = large["mean"][key]["bits_per_weight"]
        rows.append([name, f"{bits:.2f}", f"{32 / bits:.1f}x", *losses, *speeds])
    return table(["method", "bits per weight", "smaller", *(f"loss added, {size}" for size in sizes), "speed", "compiled"], rows)


def calls_table() -> str:
    "Return how each of them is written."
    return table(["method", "call"], [[name, f"`{call}`"] for name, call, *_ in METHODS], ":--")


def training_table() -> str:
    "Return what training with the rounding switched on won back, mean and range over seeds."
    quality = results("qat")["quality"]
    names = [name for name in quality["0"] if "afterwards" in quality["0"][name] and sum(name in rows for rows in quality.values()) > 1]
    rows = []
    for name in names:
        found = [rows[name] for rows in quality.values() if name in rows]
        mean = {key: sum(row[key] for row in found) / len(found) for key in ("increase", "afterwards")}
        rows.append([name, f"{mean['afterwards']:+.4f}", f"{mean['increase']:+.4f}", str(len(found))])
    return table(["trained with the rounding", "loss added, rounded afterwards", "loss added, trained so", "seeds"], rows)


def finetuning_table() -> str:
    "Return what learning another text cost and gave, by what is trained."
    data = results("finetune")
    quality, memory, speed = data["quality"]["0"], data["memory"], data["speed"]["step, fp32"]
    rows = []
    for name in ("float32", "INT8", "INT4", "INT4, LoRA", "INT4, scales only"):
        share = f"{quality[name]['share']:.1%}"
        rows.append([name, share, f"{memory[name]['lasting'] / 1e6:.0f}", f"{speed[name]['speedup']:.2f}x"])
    return table(["what is trained", "of float32's drop in loss", "memory that stays, MB", "speed of a step"], rows)
