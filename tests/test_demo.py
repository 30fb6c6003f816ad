# python -m pytest tests/test_demo.py
"""The demo's five runs: what they leave behind, and that a demo that is killed in any of them ends as if it had not been."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from qtlm import ConfigError, DataError, TrainingConfig, load_checkpoint
from qtlm.account import get_quantization_info
from qtlm.demo import _table, other_text, run_demo

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "block_size": 32, "dropout": 0.1}
RUNS = ["float32", "further-float32", "further-qat", "finetune-float32", "finetune-int4"]
ROWS = ["float32", "INT8", "INT4", "INT4 QAT", "INT4 fine-tuned"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A folder with two texts."
    folder = tmp_path_factory.mktemp("demo")
    (folder / "text.txt").write_text("It was the best of times, it was the worst of times, it was the age of wisdom. " * 100)
    (folder / "other.txt").write_text("CALL ME ISHMAEL. SOME YEARS AGO, NEVER MIND HOW LONG PRECISELY. " * 100)
    return folder


def settings(folder, **fields):
    "Sixty steps of a tiny model, and ten in each further run, saved every second step."
    small = dict(model=SHAPE, block_size=32, batch_size=4, learning_rate=5e-3, lr_scheduler_type="cosine", max_steps=60, save_steps=20, progress=False)
    return TrainingConfig(text=str(folder / "text.txt"), **small | fields)


@pytest.fixture(scope="module")
def finished(here):
    "The report of a finished demo."
    return run_demo(settings(here), here / "whole", str(here / "other.txt"))


def untimed(report):
    "What may not differ from run to run."
    return {**report, "timings": None}


def test_rows_and_keys(here, finished):
    assert list(finished["models"]) == list(finished["timings"]) == ROWS
    assert json.loads((here / "whole" / "report.json").read_text()) == finished
    for name, row in finished["models"].items():
        file = next((here / "whole" / row["path"]).glob("step-*")) / "model.pt"
        assert row["bytes_on_disk"] == file.stat().st_size and len(row["sample"]) > 40 and finished["timings"][name]["tokens_per_second"] > 0
        assert row["loss_increase"] == pytest.approx(row["validation_loss"] - row["reference_loss"], abs=1e-6)
    assert {"steps", "learning_rate", "reference_loss", "rounded_afterwards", "qat"} == set(finished["qat"])
    assert {"steps", "learning_rate", "text", "held_out_tokens", "float32", "INT4"} == set(finished["finetuning"])
    assert finished["qat"]["steps"] == finished["finetuning"]["steps"] == 10


def test_trained_int4_models_are_as_small_as_the_rounded_one(here, finished):
    models = finished["models"]
    assert models["INT4 QAT"]["bytes_on_disk"] == models["INT4 fine-tuned"]["bytes_on_disk"] == models["INT4"]["bytes_on_disk"]
    assert models["INT4 QAT"]["bits_per_weight"] == models["INT4 fine-tuned"]["bits_per_weight"] == models["INT4"]["bits_per_weight"]
    codes = {name: load_checkpoint(here / "whole" / models[name]["path"]).model.state_dict() for name in ROWS[2:]}
    for name in ROWS[3:]:  # they were trained, and are no copies
        assert codes[name].keys() == codes["INT4"].keys()
        assert any(not torch.equal(value, codes["INT4"][key]) for key, value in codes[name].items() if key.endswith("codes"))
    assert get_quantization_info(load_checkpoint(here / "whole/models/INT4-QAT").model).mode == "qat"


def test_qat_counts_against_the_float_model_of_the_same_steps(here, finished):
    from qtlm import ByteVocab, Tokens, evaluate, load_text, quantize_model_ptq

    held_out = Tokens.from_text(load_text(here / "text.txt"), ByteVocab()).split(0.1)[1]
    longer = load_checkpoint(here / "whole" / "further-float32").model
    reference = evaluate(longer, held_out)["loss"]
    assert finished["qat"]["reference_loss"] == finished["models"]["INT4 QAT"]["reference_loss"] == pytest.approx(reference, abs=1e-6)
    assert reference != pytest.approx(finished["models"]["float32"]["validation_loss"], abs=1e-4)
    rounded = finished["qat"]["rounded_afterwards"]
    assert rounded["validation_loss"] == pytest.approx(evaluate(quantize_model_ptq(longer, bits=4), held_out)["loss"], abs=1e-6)
    assert rounded["loss_increase"] == pytest.approx(rounded["validation_loss"] - reference, abs=1e-6) and rounded["loss_increase_error"] > 0
    assert finished["qat"]["qat"]["validation_loss"] == finished["models"]["INT4 QAT"]["validation_loss"]


def test_fine_tuning_lowers_the_loss_on_the_other_text(here, finished):
    from qtlm import ByteVocab, Tokens, evaluate, load_text

    held_out = Tokens.from_text(load_text(here / "other.txt"), ByteVocab()).split(0.1)[1]
    tuned = finished["finetuning"]
    for name in ("float32", "INT4"):
        assert tuned[name]["loss_after"] < tuned[name]["loss_before"] - 0.05
        before = load_checkpoint(here / "whole" / "models" / name).model
        assert tuned[name]["loss_before"] == pytest.approx(evaluate(before, held_out)["loss"], abs=1e-6)
    tuned_model = load_checkpoint(here / "whole/models/INT4-fine-tuned").model
    assert tuned["INT4"]["loss_after"] == pytest.approx(evaluate(tuned_model, held_out)["loss"], abs=1e-6)
    assert "loss_rounded_afterwards" in tuned["float32"] and tuned["held_out_tokens"] == len(held_out) - 1


def test_both_runs_of_a_pair_take_the_same_steps_on_the_same_batches(here, finished):
    for one, other in (RUNS[1:3], RUNS[3:]):
        rows = [[json.loads(line) for line in (here / "whole" / run / "history.jsonl").read_text().splitlines()] for run in (one, other)]
        assert [r["learning_rate"] for r in rows[0]] == [r["learning_rate"] for r in rows[1]] and len(rows[0]) == 10
        configs = [load_checkpoint(here / "whole" / run) for run in (one, other)]
        assert configs[0].training_state["data"] == configs[1].training_state["data"]


def test_pictures_are_small_and_the_same_each_time(here, finished):
    again = run_demo(settings(here), here / "again", str(here / "other.txt"))
    assert untimed(again) == untimed(finished)
    for name in ("loss.png", "sizes.png", "training.png"):
        picture = (here / "whole" / name).read_bytes()
        assert picture == (here / "again" / name).read_bytes() and len(picture) <= 30_000 and picture.startswith(b"\x89PNG")


def test_the_table_shows_before_and_after(finished):
    head, *rows = _table(finished).splitlines()
    assert head.split()[:2] == ["model", "bits/weight"] and head.endswith("other text") and len(rows) == len(ROWS)
    losses = finished["finetuning"]["INT4"]
    assert rows[4].startswith("INT4 fine-tuned") and rows[4].endswith(f"{losses['loss_before']:.4f} -> {losses['loss_after']:.4f}")
    assert rows[3].startswith("INT4 QAT") and f"{finished['models']['INT4 QAT']['validation_loss']:.4f}" in rows[3]


DRIVER = """
import os, sys
import qtlm.trainer as trainer
from qtlm.cli import main
name, number, log = sys.argv[1], int(sys.argv[2]), sys.argv[3]
real = trainer._training_step
def step(run, batch):
    with open(log, "a") as file:
        print(run.config.run_name, run.step, file=file)
    if (run.config.run_name, run.step) == (name, number):
        os._exit(9)  # as SIGKILL: nothing is saved, nothing is told
    return real(run, batch)
trainer._training_step = step
sys.exit(main(sys.argv[4:]))
"""


def test_a_demo_killed_in_any_run_goes_on_and_ends_the_same(here, finished, tmp_path):
    arguments = ["demo", "--config", "run.json", "--out", str(tmp_path / "out"), "--other", str(here / "other.txt")]
    (tmp_path / "run.json").write_text(json.dumps(settings(here).to_dict()))
    kills = [("further-float32", 5), ("further-qat", 7), ("finetune-float32", 0), ("finetune-int4", 5), ("nowhere", 0)]
    steps = []
    for name, number in kills:
        log = tmp_path / f"{name}.log"
        command = [sys.executable, "-c", DRIVER, name, str(number), str(log), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
        assert done.returncode == (0 if name == "nowhere" else 9), done.stderr
        assert (tmp_path / "out" / "report.json").exists() == (name == "nowhere")
        steps.append([(run, int(step)) for run, step in map(str.split, log.read_text().splitlines())])
    assert [taken[0] for taken in steps] == [("float32", 0), ("further-float32", 4), ("further-qat", 6), ("finetune-float32", 0), ("finetune-int4", 4)]
    for run, taken in zip(RUNS[1:], steps[1:]):  # what was finished is not trained again
        assert {name for name, _ in taken} <= set(RUNS[RUNS.index(run):])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert untimed(report) == untimed(finished)


def test_a_finished_demo_trains_nothing(here, finished, monkeypatch):
    def step(*_):
        raise AssertionError("a step was taken")

    monkeypatch.setattr("qtlm.trainer._training_step", step)
    assert untimed(run_demo(settings(here), here / "whole", str(here / "other.txt"))) == untimed(finished)


def test_without_another_text_its_rows_are_left_out(here, finished, tmp_path, monkeypatch):
    monkeypatch.setattr("qtlm.demo.other_text", lambda source: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = run_demo(settings(here), tmp_path)
    assert [str(w.message) for w in caught if "fine-tune" in str(w.message)] and "\n" not in str(caught[0].message)
    assert list(report["models"]) == ROWS[:4] and "finetuning" not in report and "other text" not in _table(report)
    assert untimed(report)["models"] == {name: finished["models"][name] for name in ROWS[:4]}
    assert not list(tmp_path.glob("finetune*")) and (tmp_path / "training.png").stat().st_size <= 30_000


def test_the_default_other_text_is_torch_s_headers():
    place = other_text()
    assert place is None or (Path(place).is_relative_to(Path(torch.__file__).parent) and any(Path(place).glob("*.h")))
    assert other_text("mine.txt") == "mine.txt"


@pytest.mark.parametrize(
    "fields, other, error, says",
    [
        ({"quantization_mode": "qat"}, "other.txt", ConfigError, "trains in float32 first"),
        ({"enable_quantized_finetuning": True}, "other.txt", ConfigError, "trains in float32 first"),
        ({}, "missing.txt", DataError, "missing.txt"),
        ({}, "tiny.txt", DataError, "block_size"),
    ],
)
def test_a_mistake_is_told_before_any_step(here, tmp_path, fields, other, error, says):
    (here / "tiny.txt").write_text("twenty letters or so")
    with pytest.raises(error, match=says) as caught:
        run_demo(settings(here, **fields), tmp_path / "out", str(here / other))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_what_the_file_says_of_quantization_does_not_part_the_pair(here, tmp_path):
    fields = dict(quantization_mode="ptq", quantization_bits=4, quantization_group_size=8, quantization_type="static", early_stopping_patience=50, eval_steps=30)
    report = run_demo(settings(here, max_steps=12, **fields), tmp_path, str(here / "other.txt"))
    models = report["models"]
    assert models["INT4 QAT"]["bytes_on_disk"] == models["INT4"]["bytes_on_disk"]


def test_another_text_in_the_same_place_is_refused(here, finished):
    with pytest.raises(ConfigError, match="holds a run with text="):
        run_demo(settings(here), here / "whole", str(here / "text.txt"))


def test_a_context_longer_than_the_default_is_remembered(here, tmp_path):
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "block_size": 300}
    config = TrainingConfig(text=str(here / "text.txt"), model=shape, batch_size=2, max_steps=2, progress=False)
    for _ in range(2):
        assert run_demo(config, tmp_path, str(here / "other.txt"))["config"]["block_size"] == 300
