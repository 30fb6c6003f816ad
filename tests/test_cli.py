# python -m pytest tests/test_cli.py
"""The command line, as a subprocess: what a shell sees."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

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


def qtlm(folder, *arguments, **options):
    "Run the command in `folder` and wait."
    environment = {**os.environ, "QTLM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qtlm", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, **options)


def demo(out, *more):
    return ["demo", "--text", "text.txt", "--config", "run.yaml", "--steps", "60", "--out", out, "--other", "other.txt", *more]


@pytest.fixture(scope="module")
def finished(here):
    "A finished demo."
    done = qtlm(here, *demo("whole"))
    assert done.returncode == 0, done.stderr
    return done


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
        (["generate", "nowhere"], "nowhere"),
        (["generate", "whole/float32", "--temperature", "-1"], "temperature"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(here, finished, arguments, says):
    (here / "tiny.txt").write_text("ab")
    (here / "aware.yaml").write_text(CONFIG + "quantization_mode: qat\n")
    (here / "binary.bin").write_bytes(b"\xff\xfe\x00\x81" * 100)
    done = qtlm(here, *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.count("\n") == 1 and says in done.stderr and len(done.stderr) <= 340, done.stderr


def test_the_other_commands_read_what_demo_wrote(here, finished):
    done = qtlm(here, "quantize", "whole/float32", "--bits", "4", "--out", "small")
    assert done.returncode == 0 and "bits per weight" in done.stdout
    done = qtlm(here, "evaluate", "whole/float32", "small", "whole/models/INT8", "whole/models/INT4-QAT", "whole/models/INT4-fine-tuned", "--as-json")
    losses = [row["loss"] for row in json.loads(done.stdout).values()]
    expected = report(here / "whole")["models"]
    assert losses == pytest.approx([expected[name]["validation_loss"] for name in ("float32", "INT4", "INT8", "INT4 QAT", "INT4 fine-tuned")], abs=1e-5)
    done = qtlm(here, "evaluate", "whole/finetune-int4", "whole/models/INT4-fine-tuned", "--as-json")  # its own text is the other one
    tuned = [row["loss"] for row in json.loads(done.stdout).values()]
    assert tuned == pytest.approx([report(here / "whole")["finetuning"]["INT4"]["loss_after"]] * 2, abs=1e-5)
    texts = [qtlm(here, "generate", "small", "--prompt", "It was", "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("It was")


def test_train_from_a_file_with_settings(here):
    arguments = ["train", "run.yaml", "text=text.txt", "max_steps=20", "run_name=mine", "quantization_mode=ptq"]
    done = qtlm(here, *arguments)
    assert done.returncode == 0, done.stderr
    assert "checkpoints/mine: step 20, held-out loss" in done.stdout and "mine-int8" in done.stdout
    again = qtlm(here, *arguments)
    assert again.returncode == 2 and "holds a run" in again.stderr
    more = qtlm(here, *arguments[:3], "max_steps=25", "run_name=mine", "--resume")
    assert more.returncode == 0 and "step 25" in more.stdout


def test_help_is_there_for_everything_and_does_not_load_torch(here):
    assert "demo" in qtlm(here, "--help").stdout and qtlm(here, "--version").stdout.startswith("qtlm ")
    for command in ("demo", "train", "quantize", "evaluate", "generate"):
        done = qtlm(here, command, "--help")
        assert done.returncode == 0 and done.stdout.startswith(f"usage: qtlm {command}") and "Example:" in done.stdout
    code = "import sys; import qtlm.cli; qtlm.cli.main(['demo', '--help'])"
    watched = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, 'pydantic' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_importing_qtlm_imports_nothing_heavy():
    code = "import sys; import qtlm; print([m for m in ('torch', 'numpy', 'pydantic', 'matplotlib', 'fastcore') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
