# python -m pytest tests/test_loggers.py
"""Contracts of `qtlm.loggers`, with a real trainer: killed, resumed, failing, and without the packages."""
import json
import logging
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from qtlm import TinyLM, Trainer
from qtlm.config import ConfigError
from qtlm.loggers import LoggerError, TensorBoardLogger, TrackioLogger, WandbLogger, make_loggers

DATA = torch.randint(32, (600,), generator=torch.Generator().manual_seed(0))


def trainer(folder, *callbacks, **fields):
    "A run of eight steps that evaluates at every second and saves at every third."
    torch.manual_seed(0)
    model = TinyLM(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, block_size=8)
    settings = dict(max_steps=8, eval_steps=2, save_steps=3, batch_size=2, block_size=8, progress=False, output_dir=str(folder), learning_rate=1e-2)
    return Trainer(model, train_data=DATA[:500], eval_data=DATA[500:], callbacks=callbacks, **settings | fields)


class Killed(BaseException):
    "What no `except Exception` sees, like a kill."


def killed_at(step, monkeypatch):
    "Make a run end after a step without saving or telling anybody."
    def finish(*_): pass

    monkeypatch.setattr("qtlm.trainer._finish", finish)
    from qtlm.history import Callback

    class Kill(Callback):
        def on_step_end(self, trainer):
            if trainer.step == step: raise Killed

    return Kill()


def scalars(folder):
    "What TensorBoard's own reader finds: the steps and values of each name."
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    found = reader.EventAccumulator(str(folder))
    found.Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


@pytest.fixture
def service(monkeypatch):
    "Stand-ins of trackio and wandb, which keep what they get."
    fakes = {}
    for package in ("trackio", "wandb"):
        fakes[package] = module = ModuleType(package)
        module.runs, module.fails_at, module.said = {}, None, "* a greeting on stdout"

        def init(project, name, config, resume, id=None, dir=None, module=module):
            print(module.said)
            if module.fails_at == "init": raise RuntimeError("no account;\nlog in first")
            kept = module.runs.setdefault(id or name, [])

            def log(numbers, step):
                if module.fails_at and step >= module.fails_at: raise OSError("the server is gone")
                kept.append((step, numbers))

            return SimpleNamespace(log=log, finish=lambda: kept.append("finished"))

        module.init = init
        monkeypatch.setitem(sys.modules, package, module)
    return fakes


def steps_of(run, name):
    return [step for step, numbers in (entry for entry in run if entry != "finished") if name in numbers]


def test_tensorboard_has_what_the_history_has(tmp_path):
    pytest.importorskip("tensorboard")
    history = trainer(tmp_path, TensorBoardLogger()).train()
    found = scalars(tmp_path / "run" / "tensorboard")
    assert found["train/loss"] == [(i, pytest.approx(loss)) for i, loss in enumerate(history.losses, 1)]
    assert found["eval/loss"] == [(i, pytest.approx(loss)) for i, loss in zip((2, 4, 6, 8), history.eval_losses)]
    assert {"train/learning_rate", "train/grad_norm", "train/tokens", "train/tokens_per_second", "eval/perplexity"} <= set(found)
    lines = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == history.losses  # JSON lines always


def test_a_killed_run_that_is_resumed_writes_each_number_once(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    first = TensorBoardLogger()  # kept, so that nothing closes its file
    with monkeypatch.context() as patched, pytest.raises(Killed):
        trainer(tmp_path, first, killed_at(5, patched)).train()
    assert [step for step, _ in scalars(tmp_path / "run" / "tensorboard")["train/loss"]] == [1, 2, 3, 4, 5]  # flushed, though killed
    history = trainer(tmp_path, TensorBoardLogger()).train(resume_from_checkpoint=True)
    found = scalars(tmp_path / "run" / "tensorboard")
    assert found["train/loss"] == [(i, pytest.approx(loss)) for i, loss in enumerate(history.losses, 1)]
    assert [step for step, _ in found["eval/loss"]] == [2, 4, 6, 8]


def test_a_logger_that_comes_later_has_the_beginning_too(tmp_path):
    pytest.importorskip("tensorboard")
    trainer(tmp_path, max_steps=4).train()
    trainer(tmp_path, TensorBoardLogger()).train(resume_from_checkpoint=True)
    assert [step for step, _ in scalars(tmp_path / "run" / "tensorboard")["train/loss"]] == list(range(1, 9))


def test_a_new_run_in_an_old_place_makes_the_old_numbers_void(tmp_path):
    pytest.importorskip("tensorboard")
    for steps in (5, 3):
        trainer(tmp_path, TensorBoardLogger(tmp_path / "events"), max_steps=steps, output_dir=None, save_steps=None).train()
    assert [step for step, _ in scalars(tmp_path / "events")["train/loss"]] == [1, 2, 3]


@pytest.mark.parametrize("kind", [TrackioLogger, WandbLogger])
def test_a_service_gets_each_number_once(tmp_path, monkeypatch, service, capsys, kind):
    runs = service[kind._package].runs
    with monkeypatch.context() as patched, pytest.raises(Killed):
        trainer(tmp_path, kind(), killed_at(5, patched)).train()
    trainer(tmp_path, kind()).train(resume_from_checkpoint=True)
    [sent] = runs.values()
    assert steps_of(sent, "train/loss") == list(range(1, 9)) and steps_of(sent, "eval/loss") == [2, 4, 6, 8]
    assert sent.count("finished") == 1
    trainer(tmp_path, kind(), max_steps=10).train(resume_from_checkpoint=True)  # a finished run that is made longer
    assert steps_of(sent, "train/loss") == list(range(1, 11)) and len(runs) == 1
    assert capsys.readouterr().out == ""  # results go to stdout, greetings do not


@pytest.mark.parametrize("kind", [TrackioLogger, WandbLogger])
def test_a_run_that_goes_on_elsewhere_has_a_curve_of_its_own(tmp_path, service, kind):
    trainer(tmp_path, kind(), max_steps=6).train()
    trainer(tmp_path, kind(), run_name="fork").train(resume_from_checkpoint=tmp_path / "run")
    first, second = service[kind._package].runs.values()
    assert steps_of(first, "train/loss") == list(range(1, 7)) and steps_of(second, "train/loss") == list(range(1, 9))


def test_logging_steps_thins_steps_and_not_evaluations(tmp_path, service):
    trainer(tmp_path, WandbLogger(project="mine"), logging_steps=4).train()
    [sent] = service["wandb"].runs.values()
    assert steps_of(sent, "train/loss") == [4, 8] and steps_of(sent, "eval/loss") == [2, 4, 6, 8]


def test_a_logger_does_not_change_the_run(tmp_path, service):
    plain = trainer(tmp_path / "a").train()
    watched = trainer(tmp_path / "b", *make_loggers(["trackio", "wandb"])).train()
    assert plain.losses == watched.losses and plain.eval_losses == watched.eval_losses


def test_one_that_cannot_begin_ends_the_run_in_one_line(tmp_path, service):
    service["wandb"].fails_at = "init"
    with pytest.raises(LoggerError, match=r"^WandbLogger: no account; log in first; expected to begin\. Take it out of report_to") as caught:
        trainer(tmp_path, WandbLogger()).train()
    assert "\n" not in str(caught.value) and not list((tmp_path / "run").glob("step-*"))


def test_one_that_fails_later_is_told_of_once_and_the_run_goes_on(tmp_path, service):
    service["trackio"].fails_at = 3
    with pytest.warns(UserWarning, match="TrackioLogger: the server is gone; the run goes on without it") as told:
        history = trainer(tmp_path, TrackioLogger()).train()
    assert len(history) == 8 and len([w for w in told if "TrackioLogger" in str(w.message)]) == 1


@pytest.mark.parametrize("package, install", [("tensorboard", r"qtlm\[log\]"), ("trackio", "trackio"), ("wandb", "wandb")])
def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch, package, install):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"^report_to: {package} is not installed; expected it. Run `pip install {install}`") as caught:
        make_loggers([package])
    assert "\n" not in str(caught.value)


def test_nothing_is_imported_that_is_not_asked_for():
    code = "import sys, qtlm.loggers as l; l.make_loggers([]); print([m for m in ('tensorboard', 'trackio', 'wandb', 'torch.utils.tensorboard') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_project_comes_from_the_environment(monkeypatch, service):
    monkeypatch.setenv("WANDB_PROJECT", "from-there")
    assert WandbLogger().project == "from-there" and WandbLogger("given").project == "given" and TrackioLogger().project == "qtlm"


def test_a_configuration_asks_for_loggers(tmp_path, service):
    asked = trainer(tmp_path, report_to=["trackio", "wandb"], max_steps=4)
    assert [type(callback) for callback in asked.callbacks] == [TrackioLogger, WandbLogger]
    asked.train()
    trainer(tmp_path, report_to=["trackio", "wandb"]).train(resume_from_checkpoint="auto")
    for fake in service.values():
        [sent] = fake.runs.values()
        assert steps_of(sent, "train/loss") == list(range(1, 9))
