# python -m pytest tests/test_cli.py
"""The command line: what a shell sees, as a subprocess where processes matter, else in this one, which spares importing torch each time."""

import contextlib
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from qtlm.cli import main

ROOT = Path(__file__).resolve().parent.parent

CONFIG = """
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, block_size: 32, dropout: 0.1}
block_size: 32
batch_size: 4
learning_rate: 5e-3
lr_scheduler_type: cosine
warmup_steps: 5
eval_steps: 7
save_steps: 10
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A folder with a text and a config."
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("It was the best of times, it was the worst of times, it was the age of wisdom. " * 100)
    (folder / "other.txt").write_text("CALL ME ISHMAEL. SOME YEARS AGO, NEVER MIND HOW LONG PRECISELY. " * 50)
    (folder / "run.yaml").write_text(CONFIG)
    return folder


def qtlm(folder, *arguments, environment=None, **options):
    "Run the command in `folder` and wait."
    environment = {**os.environ, "QTLM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", **(environment or {})}
    command = [sys.executable, "-m", "qtlm", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, **options)


def inside(folder, *arguments, environment=None):
    "Run the command in `folder` and in this process, and leave nothing behind."
    out, err, before = io.StringIO(), io.StringIO(), (os.getcwd(), signal.getsignal(signal.SIGTERM), warnings.showwarning)
    try:
        os.chdir(folder)
        with mock.patch.dict(os.environ, {"QTLM_CACHE": str(folder / "cache"), **(environment or {})}), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(argument) for argument in arguments])
    except SystemExit as exit:
        status = exit.code
    finally:
        os.chdir(before[0])
        signal.signal(signal.SIGTERM, before[1])
        warnings.showwarning = before[2]
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def demo(out, *more):
    return ["demo", "--text", "text.txt", "--config", "run.yaml", "--steps", "60", "--out", out, "--other", "other.txt", *more]


@pytest.fixture(scope="module")
def finished(here):
    "A finished demo."
    done = qtlm(here, *demo("whole"))
    assert done.returncode == 0, done.stderr
    return done


COMMANDS = ("demo", "train", "quantize", "finetune", "evaluate", "generate", "inspect", "verify", "completion")


def report(folder):
    "A report without its timings, which alone may differ from run to run."
    return {**json.loads((folder / "report.json").read_text()), "timings": None}


def test_demo_writes_what_it_promises(here, finished):
    assert {"report.json", "loss.png", "sizes.png", "training.png"} <= {path.name for path in (here / "whole").iterdir()}
    head, *rows = finished.stdout.splitlines()[:6]
    assert head.split() == "model bits/weight bytes on disk ratio val. loss bits/byte tokens/s ratio other text".split()
    assert [row.split("  ")[0] for row in rows] == ["float32", "INT8", "INT4", "INT4 QAT", "INT4 fine-tuned"] and "->" in rows[4]
    assert "rounded afterwards" in finished.stdout
    found = json.loads((here / "whole" / "report.json").read_text())
    for name, row in found["models"].items():
        assert row["path"] == f"models/{name.replace(' ', '-')}"
        file = next((here / "whole" / row["path"]).glob("step-*")) / "model.pt"
        assert row["bytes_on_disk"] == file.stat().st_size and len(row["sample"]) > 40
        assert f"{name} writes:" in finished.stdout and found["timings"][name]["tokens_per_second"] > 0
    assert found["models"]["float32"]["loss_increase"] == 0 and found["steps"] == 60
    further = ("further-float32: 10 steps", "further-qat: 10 steps", "finetune-float32: 10 steps", "finetune-int4: 10 steps", "train: step 10/10")
    for stage in ("train: step 60/60", "quantize, save, reload", *further, "evaluate", "generate"):
        assert stage in finished.stderr


def test_same_seed_same_report_to_the_bit(here, finished):
    assert qtlm(here, *demo("again")).returncode == 0
    assert report(here / "again") == report(here / "whole")
    for picture in ("loss.png", "sizes.png", "training.png"):
        assert (here / "again" / picture).read_bytes() == (here / "whole" / picture).read_bytes()
    assert qtlm(here, *demo("seed-1", "--seed", "1")).returncode == 0
    assert report(here / "seed-1") != report(here / "whole")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_demo_goes_on_and_ends_the_same(here, finished, number, code):
    out = here / f"stopped-{code}"
    environment = {**os.environ, "QTLM_CACHE": str(here / "cache"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "qtlm", *demo(out)], cwd=here, env=environment, stderr=subprocess.PIPE, text=True)
    history = out / "float32" / "history.jsonl"
    for _ in range(12_000):  # a busy machine takes its time to import torch
        if history.exists() and len(history.read_text().splitlines()) > 5:
            break
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=180)
    assert process.returncode == code and not (out / "report.json").exists()
    assert qtlm(here, *demo(out)).returncode == 0
    assert report(out) == report(here / "whole")


def test_a_finished_demo_only_measures_again(here, finished):
    before = sorted(path.name for path in (here / "whole" / "float32").glob("step-*"))
    again = qtlm(here, *demo("whole"))
    assert again.returncode == 0 and "train: step" not in again.stderr
    assert sorted(path.name for path in (here / "whole" / "float32").glob("step-*")) == before


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["trian"], "did you mean train?"),
        (["demo", "--text", "missing.txt"], "missing.txt"),
        (["demo", "--config", "missing.yaml"], "missing.yaml"),
        (["demo", "--config", "text.txt"], "text.txt"),
        (["demo", "--text", "tiny.txt"], "token"),
        (["demo", "--text", "binary.bin"], "UTF-8"),
        (["demo", "--text", "text.txt", "--other", "missing.txt"], "missing.txt"),
        (["demo", "--text", "text.txt", "--other", "tiny.txt"], "token"),
        (["demo", "--text", "text.txt", "--config", "aware.yaml"], "trains in float32 first"),
        (["demo", "--steps", "0"], "max_steps"),
        (["demo", "--text", "text.txt", "--config", "run.yaml", "--steps", "60", "--out", "whole", "--seed", "9"], "holds a run with seed"),
        (["train", "learning_rat=1e-3"], "learning_rate"),
        (["train", "run.yaml", "batch_size=0"], "batch_size"),
        (["quantize", "nowhere"], "nowhere"),
        (["quantize", "whole/float32", "--bits", "3"], "bits"),
        (["evaluate"], "no checkpoint named"),
        (["evaluate", "whole/float32", "--plot", "sizes.png"], "expected several checkpoints"),
        (["inspect", "whole/float32", "--plot", "nowhere/bytes.png"], "nowhere/bytes.png: no such file or directory"),
        (["finetune", "whole/float32"], "is not quantized; expected INT8 or INT4. Say --bits 4"),
        (["finetune", "whole/models/INT4", "--bits", "8"], "has 4 bits"),
        (["finetune", "whole/models/INT4", "learning_rat=1"], "Did you mean learning_rate?"),
        (["train", "a.yaml", "b.yaml"], "found 2 files"),
        (["train", "report_to=tensorbord"], "Did you mean tensorboard?"),
        (["completion", "fish"], "expected bash or zsh"),
        (["verify", "whole/float32", "--as-json"], "unrecognized arguments: --as-json"),
        (["generate", "nowhere"], "nowhere"),
        (["generate", "whole/float32", "--temperature", "-1"], "temperature"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(here, finished, arguments, says):
    (here / "tiny.txt").write_text("ab")
    (here / "aware.yaml").write_text(CONFIG + "quantization_mode: qat\n")
    (here / "binary.bin").write_bytes(b"\xff\xfe\x00\x81" * 100)
    done = inside(here, *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.count("\n") == 1 and says in done.stderr and len(done.stderr) <= 340, done.stderr


def test_the_other_commands_read_what_demo_wrote(here, finished):
    done = inside(here, "quantize", "whole/float32", "--bits", "4", "--out", "small")
    assert done.returncode == 0 and "bits per weight" in done.stdout
    done = inside(here, "evaluate", "whole/float32", "small", "whole/models/INT8", "whole/models/INT4-QAT", "whole/models/INT4-fine-tuned", "--json")
    found = json.loads(done.stdout)
    losses = [row["loss"] for row in found["models"].values()]
    assert found["reference"] == "whole/float32" and found["models"]["small"]["kl"] > 0 and found["pareto"] and set(found["pareto"]) <= set(found["models"])
    expected = report(here / "whole")["models"]
    assert losses == pytest.approx([expected[name]["validation_loss"] for name in ("float32", "INT4", "INT8", "INT4 QAT", "INT4 fine-tuned")], abs=1e-5)
    done = inside(here, "evaluate", "whole/finetune-int4", "whole/models/INT4-fine-tuned", "--json")  # its own text is the other one
    tuned = [row["loss"] for row in json.loads(done.stdout)["models"].values()]
    assert tuned == pytest.approx([report(here / "whole")["finetuning"]["INT4"]["loss_after"]] * 2, abs=1e-5)
    texts = [inside(here, "generate", "small", "--prompt", "It was", "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("It was")
    write = ["generate", "small", "--prompt", "It was", "--seed", "1"]
    assert inside(here, *write, "--stream").stdout == texts[0]
    stopped = inside(here, *write, "--stop", " ").stdout
    assert texts[0].startswith(stopped[:-1]) and len(stopped) < len(texts[0]) and stopped.endswith(" \n")


def test_train_from_a_file_with_settings(here):
    arguments = ["train", "run.yaml", "text=text.txt", "max_steps=20", "run_name=mine", "quantization_mode=ptq"]
    done = inside(here, *arguments)
    assert done.returncode == 0, done.stderr
    assert "checkpoints/mine: step 20, held-out loss" in done.stdout and "mine-int8" in done.stdout
    again = inside(here, *arguments)
    assert again.returncode == 2 and "holds a run" in again.stderr
    more = inside(here, *arguments[:3], "max_steps=25", "run_name=mine", "--resume")
    assert more.returncode == 0 and "step 25" in more.stdout


def test_help_is_there_for_everything_and_does_not_load_torch(here):
    assert "demo" in qtlm(here, "--help").stdout and inside(here, "--version").stdout.startswith("qtlm ")
    for command in COMMANDS:
        done = inside(here, command, "--help")
        assert done.returncode == 0 and done.stdout.startswith(f"usage: qtlm {command}") and "--json" in done.stdout
        summary, examples = done.stdout.split("\n\n")[1], done.stdout.split("examples:\n")[1].splitlines()
        assert len(summary.splitlines()) == 1 and all(f"qtlm {command}" in line for line in examples[:1]) and len(examples) >= 2
    code = "import sys; import qtlm.cli; qtlm.cli.main(['demo', '--help'])"
    watched = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, 'pydantic' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_importing_qtlm_imports_nothing_heavy():
    code = "import sys; import qtlm; print([m for m in ('torch', 'numpy', 'pydantic', 'matplotlib', 'fastcore') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# ---- for machines ----

@pytest.mark.parametrize(
    "arguments, finds",
    [
        (["train", "run.yaml", "text=text.txt", "max_steps=6", "run_name=json", "quantization_mode=ptq"], lambda d: d["step"] == 6 and d["held_out"]["loss"] > 0 and d["quantized"]["ratio"] < 1),
        (["quantize", "whole/float32", "--bits", "8", "--out", "eight"], lambda d: d["checkpoint"].startswith("eight/step-") and 8 < d["bits_per_weight"] < 10),
        (["finetune", "whole/models/INT4", "max_steps=3", "--out", "tuned"], lambda d: d["run"] == "tuned" and d["step"] == 3 and d["loss_before"] > 0),
        (["evaluate", "whole/float32"], lambda d: d["models"]["whole/float32"]["perplexity"] > 1),
        (["generate", "whole/float32", "--prompt", "It", "--max-new-tokens", "5"], lambda d: d["text"].startswith("It") and d["new_tokens"] == 5),
        (["generate", "whole/float32", "--prompt", "It", "--max-new-tokens", "5", "--stream"], lambda d: d["text"].startswith("It") and len(d["text"]) > 2),
        (["inspect", "whole/models/INT4"], lambda d: "INT4" in d["scheme"]),
        (["verify", "whole/models/INT4"], lambda d: [r["ok"] for r in d] == [True]),
        (demo("whole"), lambda d: d["models"]["INT4"]["sample"] and d["out"] == "whole"),
        (["train", "--print-config"], lambda d: d["learning_rate"] == 3e-4 and d["model"]["hidden_size"] == 192),
        (["completion", "bash"], lambda d: "complete -F _qtlm qtlm" in d["script"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_json_on_stdout_and_nothing_else(here, finished, arguments, finds):
    done = inside(here, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert finds(json.loads(done.stdout, parse_constant=pytest.fail))


def test_what_verify_finds_is_told_and_fails(here, finished):
    shutil.copytree(here / "whole" / "models" / "INT4", here / "broken")
    victim = next((here / "broken").glob("step-*")) / "model.pt"
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    done = inside(here, "verify", "broken", "--json")
    assert done.returncode == 2 and [r["ok"] for r in json.loads(done.stdout)] == [False] and "1 of 1 steps not sound" in done.stderr


# ---- fine-tuning ----

def test_finetune_keeps_the_model_quantized_and_resumes(here, finished):
    done = inside(here, "finetune", "whole/models/INT4", "text=other.txt", "max_steps=6", "save_steps=3", "learning_rate=2e-3", "--out", "letters", "--json")
    found = json.loads(done.stdout)
    assert found["held_out"]["loss"] < found["loss_before"] and found["checkpoint"] == "letters/step-0000000006"
    assert "layers INT4" in inside(here, "inspect", "letters").stdout
    settings = json.loads((here / "letters" / "step-0000000006" / "config.json").read_text())
    assert settings["enable_quantized_finetuning"] and settings["text"] == "other.txt" and settings["quantization_mode"] is None
    longer = inside(here, "finetune", "whole/models/INT4", "text=other.txt", "max_steps=8", "save_steps=3", "--out", "letters", "--resume")
    assert longer.returncode == 0 and "letters: step 8" in longer.stdout and "(before: " in longer.stdout
    again = inside(here, "finetune", "whole/models/INT4", "text=other.txt", "--out", "letters")
    assert again.returncode == 2 and "holds a run" in again.stderr


# ---- files of settings ----

def test_print_config_has_every_field_and_loads_back(here):
    from qtlm.config import ModelConfig, TrainingConfig, load_config

    done = inside(here, "train", "run.yaml", "max_steps=5", "text=text.txt", "--print-config")
    (here / "written.yaml").write_text(done.stdout)
    read = load_config(here / "written.yaml")
    assert read == load_config(here / "run.yaml", "max_steps=5", "text=text.txt", "output_dir=checkpoints")
    lines = done.stdout.splitlines()
    assert lines[0] == "# yaml-language-server: $schema=qtlm.schema.json"
    for prefix, kind in (("", TrainingConfig), ("  ", ModelConfig)):
        for row in kind.describe():
            [at] = [i for i, line in enumerate(lines) if line.startswith(f"{prefix}{row['field']}:")]
            above = at
            while lines[above - 1].startswith(f"{prefix}# "): above -= 1
            about = " ".join(line.strip()[2:] for line in lines[above:at])
            assert row["meaning"] in about and f"Range: {row['range']}." in about and f"Default: {row['default']}." in about
    runs = [inside(here, "train", name, "max_steps=5", "text=text.txt", f"run_name={name[:3]}", "--json") for name in ("run.yaml", "written.yaml")]
    assert len({json.loads(run.stdout)["loss"] for run in runs}) == 1  # the run that it describes


@pytest.mark.parametrize("file, example", [("qtlm.schema.json", "train.yaml"), ("vit.schema.json", "vit_qlora.yaml")])
def test_the_published_schema_is_current_and_the_examples_meet_it(here, file, example):
    done = inside(here, "train", ROOT / "examples" / example, "--print-schema")
    schema = json.loads(done.stdout)
    assert (ROOT / "examples" / file).read_text() == done.stdout, f"qtlm train examples/{example} --print-schema > examples/{file}"
    lines = (ROOT / "examples" / example).read_text().splitlines()
    assert lines[0] == f"# yaml-language-server: $schema={file}"
    validate = pytest.importorskip("jsonschema").Draft202012Validator
    validate.check_schema(schema)
    from qtlm.config import TrainingConfig, ViTConfig, load_config

    kind = TrainingConfig if example == "train.yaml" else ViTConfig
    tree = load_config(ROOT / "examples" / example, kind=kind).model_dump(mode="json", exclude_unset=True)
    assert not list(validate(schema).iter_errors(tree)) and not list(validate(schema).iter_errors(kind().to_dict()))
    assert list(validate(schema).iter_errors(tree | {"nonsense": 1}))
    if kind is TrainingConfig:
        assert not list(validate(schema).iter_errors({"lr": 1e-3, "report_to": "wandb", "betas": [0.9, 0.99]}))
        for wrong in ({"learning_rate": 0}, {"quantization_bits": 3}, {"model": {"dropout": 1}}, {"report_to": ["none"]}):
            assert list(validate(schema).iter_errors(wrong)), wrong


def test_the_example_of_a_text_trains(here):
    done = inside(here, "train", ROOT / "examples" / "train.yaml", "text=text.txt", "max_steps=2", "warmup_steps=0", "block_size=32", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["run"] == "checkpoints/tiny-int4", done.stderr


def test_the_example_of_a_vision_transformer_trains(here):
    pytest.importorskip("sklearn")
    arguments = ["train", ROOT / "examples" / "vit_qlora.yaml", "classes=0,1,2,3,4", "batch_size=16", "run_name=vit", "save_steps=2"]
    done = inside(here, *arguments, "max_steps=3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["step"] == 3 and found["run"] == "checkpoints/vit" and found["classes"] == list("01234") and 0 <= found["accuracy"] <= 1
    more = inside(here, *arguments, "max_steps=4", "--resume")
    assert more.returncode == 0 and more.stdout.startswith("checkpoints/vit: step 4, accuracy ")
    (here / "vit.yaml").write_text(inside(here, "train", ROOT / "examples" / "vit_qlora.yaml", "--print-config").stdout)
    same = inside(here, "train", "vit.yaml", *arguments[2:4], "run_name=vit-printed", "max_steps=3", "--json")
    assert json.loads(same.stdout)["loss"] == found["loss"], same.stderr
    wrong = inside(here, *arguments, "lora.rnk=3")
    assert (wrong.returncode, wrong.stdout) == (2, "") and wrong.stderr.count("\n") <= 2 and "lora" in wrong.stderr


# ---- shells ----

def completed(here, shell, line, tmp_path):
    "What a shell offers for a line; zsh's own functions are played."
    script = tmp_path / f"qtlm.{shell}"
    script.write_text(inside(here, "completion", shell).stdout)
    words = line.split(" ")
    if shell == "bash":
        quoted = " ".join(f"'{word}'" for word in words)
        code = f"source {script}; COMP_LINE='{line}'; COMP_POINT={len(line)}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _qtlm; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    else:
        played = "compdef() { : }; compset() { : }; _describe() { print -rl -- ${(P)2} }; _files() { print -l -- *(N) }; "
        played += "compadd() { while [[ $1 != -- ]]; do shift; done; shift; print -rl -- $@ }; "
        quoted = " ".join(f"'{word}'" for word in words)
        code = f"{played} source {script}; words=({quoted}); CURRENT={len(words)}; PREFIX='{words[-1]}'; _qtlm"
    return subprocess.run([shell, *(["-f"] if shell == "zsh" else ["--norc"]), "-c", code], cwd=here, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.parametrize("line, offers", [
    ("qtlm q", ["quantize"]), ("qtlm train learning", ["learning_rate="]), ("qtlm train dtype=", ["fp32", "bf16"]), ("qtlm train quantization_mode=q", ["qat"]),
    ("qtlm quantize --bits", ["--bits", "--bits-per-weight"]), ("qtlm train model.num_h", ["model.num_hidden_layers="]), ("qtlm train text=te", ["text.txt"]),
    ("qtlm evaluate whole/f", ["whole/float32/", "whole/further-float32/", "whole/further-qat/", "whole/finetune-float32/", "whole/finetune-int4/"]),
    ("qtlm completion z", ["zsh"]), ("qtlm nonsense x", []),
])
def test_completion_in_bash(here, finished, tmp_path, line, offers):
    if shutil.which("bash") is None:
        pytest.skip("bash is not here")
    assert sorted(filter(None, completed(here, "bash", line, tmp_path))) == sorted(offers)


def test_completion_in_zsh(here, tmp_path):
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not here")
    assert any(line.startswith("quantize:Shrink") for line in completed(here, "zsh", "qtlm q", tmp_path))
    offered = completed(here, "zsh", "qtlm train ", tmp_path)
    assert {"learning_rate=", "dtype=bf16", "--resume", "model.hidden_size=", "text.txt"} <= set(offered)
    assert set(completed(here, "zsh", "qtlm completion ", tmp_path)) >= {"bash", "zsh", "--help"} and "text.txt" not in completed(here, "zsh", "qtlm completion ", tmp_path)


def on_a_terminal(here, environment):
    "What stderr gets where it is a terminal."
    ours, theirs = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen([sys.executable, "-m", "qtlm", "trian"], cwd=here, env={**clean, "TERM": "xterm", **environment}, stderr=theirs)
    process.wait(timeout=60)
    os.close(theirs)
    said = os.read(ours, 4096).decode()
    os.close(ours)
    return said


def test_colours_on_a_terminal_unless_no_color(here):
    assert on_a_terminal(here, {}).startswith("\x1b[1;31mqtlm:\x1b[0m 'trian' is no command")
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert on_a_terminal(here, environment).startswith("qtlm: 'trian' is no command")
    assert "\x1b" not in qtlm(here, "trian").stderr


def test_of_several_processes_the_first_prints_and_a_restarted_one_resumes(here, finished):
    assert inside(here, "inspect", "whole/float32", environment={"RANK": "1"}).stdout == ""
    arguments = ["train", "run.yaml", "text=text.txt", "run_name=restarted"]
    assert inside(here, *arguments, "max_steps=5").returncode == 0
    assert "step 6" in inside(here, *arguments, "max_steps=6", environment={"TORCHELASTIC_RESTART_COUNT": "1"}).stdout
    assert inside(here, *arguments, "max_steps=7").returncode == 2
