# pytest tests/test_trainer.py
"""Contracts of the trainer: any module, any batch, any accident."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qtlm import ModelConfig, NonFiniteLossError, TinyLM, Trainer, TrainingConfig, load_checkpoint
from qtlm.checkpoint import CheckpointError, CheckpointMismatchError, latest_checkpoint
from qtlm.config import ConfigError
from qtlm.data import Batches, DataError, Tokens
from qtlm.trainer import Callback, History, resume_training

SHAPE = ModelConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, block_size=16)
QUIET = {"progress": False, "batch_size": 4}
IDS = torch.randint(32, (3000,), generator=torch.Generator().manual_seed(0))


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return TinyLM(SHAPE.replace(**changes))


class Wrapped(nn.Module):
    "A model of somebody else's that returns its logits in some way."

    def __init__(self, wrap):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.wrap = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), wrap

    def forward(self, x):
        return self.wrap(self.net(x))


@pytest.mark.parametrize(
    "wrap", [lambda y: y, lambda y: SimpleNamespace(logits=y), lambda y: {"logits": y}, lambda y: (y, None)],
    ids=["tensor", "object", "dict", "tuple"],
)  # fmt: skip
def test_any_module_learns_from_a_data_loader(wrap):
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(-1)), batch_size=16)
    history = Trainer(Wrapped(wrap), train_data=loader, max_steps=60, learning_rate=3e-2, progress=False).train()
    assert len(history) == 60 and history.losses[-1] < 0.5 * history.losses[0]


def test_transformers_causal_model_gets_its_own_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = transformers.GPT2LMHeadModel(config)
    batch = {"input_ids": IDS[:32].reshape(2, 16), "labels": IDS[:32].reshape(2, 16), "attention_mask": torch.ones(2, 16).long()}
    expected = model(**batch).loss.item()
    assert Trainer(model, **QUIET).training_step(batch) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_accumulation_equals_one_big_batch(pieces):
    batch = (IDS[:96].reshape(6, 16), torch.where(torch.rand(6, 16) < 0.6, -100, IDS[1:97].reshape(6, 16)))
    whole, parts = Trainer(tiny(), **QUIET), Trainer(tiny(), **QUIET, gradient_accumulation_steps=pieces)
    assert whole.training_step(batch) == pytest.approx(parts.training_step(batch), rel=1e-5)
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


def test_list_of_batches_is_cycled_and_accumulated():
    rows = [IDS[i * 17 : (i + 1) * 17][None] for i in range(5)]
    small = Trainer(tiny(), train_data=rows, max_steps=3, gradient_accumulation_steps=2, **QUIET)
    small.train()
    big = Trainer(tiny(), train_data=[torch.cat([rows[(2 * s + j) % 5] for j in range(2)]) for s in range(3)], max_steps=3, **QUIET)
    big.train()
    assert small.history.losses == pytest.approx(big.history.losses, rel=1e-5)


@pytest.mark.parametrize("bad", [None, "text", 3, {"a": 1}, torch.zeros(5, 5), torch.rand(100), []])
def test_bad_training_data_is_one_line(bad):
    with pytest.raises((DataError, ValueError)) as caught:
        Trainer(tiny(), train_data=bad, max_steps=2, **QUIET).train()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_generator_that_runs_dry_ends_the_run():
    batches = (IDS[i * 17 : (i + 1) * 17][None] for i in range(3))
    with pytest.warns(UserWarning, match="ran out after 3 of 10 steps"):
        assert len(Trainer(tiny(), train_data=batches, max_steps=10, **QUIET).train()) == 3


class Poison(nn.Module):
    "Identity whose output or gradient becomes NaN at one call."

    def __init__(self, at, where):
        super().__init__()
        self.at, self.where, self.calls = at, where, 0
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.calls += 1
        y = x * self.scale
        if self.calls == self.at:
            if self.where == "loss":
                return y * math.nan
            y.register_hook(lambda g: g * math.nan)
        return y


@pytest.mark.parametrize("where, named", [("loss", "loss"), ("gradient", "the gradient of")])
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_number_that_is_not_finite_never_reaches_the_weights(where, named, pieces):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), Poison(2 * pieces, where), nn.Linear(8, 3))
    trainer = Trainer(model, gradient_accumulation_steps=pieces, **QUIET)
    batch = (torch.randn(8, 4), torch.randint(3, (8,)))
    trainer.training_step(batch)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    moments = {i: {k: v.clone() for k, v in s.items()} for i, s in trainer.optimizer.state_dict()["state"].items()}
    with pytest.raises(NonFiniteLossError, match=f"step 2: {named}.*weights are those of step 1"):
        trainer.training_step(batch)
    assert trainer.step == 1 and len(trainer.history) == 1
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    for i, state in trainer.optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, moments[i][k]) for k, v in state.items())
    assert all(p.grad is None for p in model.parameters())
    trainer.training_step(batch)  # and the run goes on
    assert trainer.step == 2


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "warmup_stable_decay"])
def test_learning_rate_follows_the_schedule(kind):
    trainer = Trainer(
        tiny(), train_data=IDS, max_steps=20, warmup_steps=4, lr_scheduler_type=kind, min_lr_ratio=0.1, learning_rate=1e-3, **QUIET
    )  # fmt: skip
    rates = [r["learning_rate"] for r in trainer.train().records]
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3]) and max(rates) == pytest.approx(1e-3)
    low = {"constant": 1e-3, "cosine": 1.1e-4, "linear": 1.6e-4, "warmup_stable_decay": 3.3e-4}[kind]
    assert rates[-1] == pytest.approx(low, rel=0.06)


def test_bf16_stays_near_float32_and_keeps_float32_weights():
    runs = {}
    for dtype in ("fp32", "bf16"):
        runs[dtype] = Trainer(tiny(), train_data=IDS, max_steps=10, dtype=dtype, **QUIET)
        runs[dtype].train()
    assert all(p.dtype == torch.float32 for p in runs["bf16"].model.parameters())
    assert runs["bf16"].history.losses != runs["fp32"].history.losses
    assert runs["bf16"].history.losses == pytest.approx(runs["fp32"].history.losses, abs=0.02)


def test_evaluation_and_saving_do_not_change_training(tmp_path):
    plain = Trainer(tiny(dropout=0.2), train_data=IDS, max_steps=9, **QUIET)
    busy = Trainer(
        tiny(dropout=0.2), train_data=IDS, eval_data=IDS[:200], eval_steps=2, save_steps=2, output_dir=str(tmp_path), max_steps=9, **QUIET
    )  # fmt: skip
    assert plain.train().losses == busy.train().losses
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), busy.model.parameters()))


def test_early_stopping_stops_and_is_resumed(tmp_path):
    settings = dict(
        eval_steps=1, early_stopping_patience=3, early_stopping_threshold=100.0, max_steps=50, output_dir=str(tmp_path), **QUIET
    )  # the first evaluation is the best for ever, so the fourth stops the run
    trainer = Trainer(tiny(), train_data=IDS, eval_data=IDS[:100], **settings)
    trainer.train()
    assert trainer.step == 4
    again = Trainer(tiny(1), train_data=IDS, eval_data=IDS[:100], **settings)
    again.train(resume_from_checkpoint=True)
    assert again.step == 4


class Events(Callback):
    def __init__(self):
        self.seen = []

    def on_train_begin(self, trainer):
        self.seen.append("begin")

    def on_step_end(self, trainer):
        self.seen.append(trainer.step)

    def on_evaluate(self, trainer, metrics):
        self.seen.append(sorted(metrics))

    def on_save(self, trainer, path):
        self.seen.append(Path(path).name)

    def on_train_end(self, trainer):
        self.seen.append("end")


def test_callbacks_are_called_in_order(tmp_path):
    events = Events()
    Trainer(
        tiny(), train_data=IDS, eval_data=IDS[:100], callbacks=[events], max_steps=2, eval_steps=2, save_steps=1, output_dir=str(tmp_path), **QUIET
    ).train()  # fmt: skip
    metrics = ["bits_per_byte", "loss", "perplexity"]
    assert events.seen == ["begin", 1, "step-0000000001", 2, metrics, "step-0000000002", "end"]


def run(folder, init=0, **more):
    settings = {**QUIET, "max_steps": 12, "lr_scheduler_type": "cosine", "output_dir": str(folder), "save_steps": 1, **more}
    return Trainer(tiny(init, dropout=0.1), train_data=IDS, eval_data=IDS[:100], eval_steps=5, **settings)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_at_every_step_is_the_same_run(tmp_path, dtype):
    whole = run(tmp_path / "whole", dtype=dtype, gradient_accumulation_steps=2)
    whole.train()
    states = {k: v.clone() for k, v in whole.model.state_dict().items()}
    for step in range(1, 12):
        part = run(tmp_path / f"from{step}", init=step, dtype=dtype, gradient_accumulation_steps=2)
        torch.rand(step)  # junk draws must not matter
        part.train(resume_from_checkpoint=whole.run_dir / f"step-{step:010d}")
        assert part.history.losses == whole.history.losses and part.history.eval_losses == whole.history.eval_losses, step
        assert all(torch.equal(v, states[k]) for k, v in part.model.state_dict().items()), step
        moments = zip(part.optimizer.state_dict()["state"].values(), whole.optimizer.state_dict()["state"].values())
        assert all(torch.equal(a[k], b[k]) for a, b in moments for k in a), step


def test_resume_auto_and_true(tmp_path):
    with pytest.raises(FileNotFoundError):
        run(tmp_path).train(resume_from_checkpoint=True)
    first = run(tmp_path, max_steps=5, lr_scheduler_type="constant")
    first.train(resume_from_checkpoint="auto")
    second = run(tmp_path, max_steps=7, lr_scheduler_type="constant")
    second.train(resume_from_checkpoint="auto")
    assert second.step == 7 and second.history.losses[:5] == first.history.losses
    with pytest.raises(CheckpointError, match="holds a run"):
        run(tmp_path).train()


@pytest.mark.parametrize("change", [{"seed": 5}, {"batch_size": 8}, {"block_size": 8}])
def test_resume_with_other_data_is_refused(tmp_path, change):
    run(tmp_path, max_steps=3).train()
    other = run(tmp_path, **change)
    before = {k: v.clone() for k, v in other.model.state_dict().items()}
    with pytest.raises(CheckpointMismatchError, match=f"train_data: .*{next(iter(change))}"):
        other.train(resume_from_checkpoint=True)
    assert all(torch.equal(v, before[k]) for k, v in other.model.state_dict().items()) and other.step == 0


def test_resume_training_needs_only_the_directory(tmp_path):
    first = run(tmp_path, max_steps=12)
    first.train()
    second = resume_training(first.run_dir / "step-0000000004", train_data=IDS, eval_data=IDS[:100], output_dir=str(tmp_path / "b"))
    assert second.step == 4 and second.train().losses == first.history.losses


PROGRAM = textwrap.dedent(
    """
    import sys, time, torch
    from qtlm import ModelConfig, TinyLM, Trainer
    from qtlm.trainer import Callback
    class Slow(Callback):
        def on_step_end(self, trainer):
            print(trainer.step, flush=True)
            time.sleep(0.02)
    torch.manual_seed(int(sys.argv[2]))
    model = TinyLM(ModelConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, block_size=16, dropout=0.1))
    ids = torch.randint(32, (3000,), generator=torch.Generator().manual_seed(0))
    trainer = Trainer(model, train_data=ids, eval_data=ids[:500], eval_steps=3, max_steps=40, batch_size=4, output_dir=sys.argv[1], progress=False,
                      callbacks=[Slow()])
    trainer.train(resume_from_checkpoint="auto")
    print([x.hex() for x in trainer.history.losses])
    """
)


def start(folder, seed):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_signals_save_and_a_new_process_goes_on(tmp_path):
    whole, _ = start(tmp_path / "whole", 3).communicate()
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        folder = tmp_path / str(code)
        process = start(folder, 3)
        while process.stdout.readline().strip() != "7":
            pass
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code and err == ""
        step = int(latest_checkpoint(folder / "run").name.removeprefix("step-"))
        assert 7 <= step < 40
        out, err = start(folder, 99).communicate(timeout=60)
        assert out.splitlines()[-1] == whole.splitlines()[-1] and out.splitlines()[0] == str(step + 1), err


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    Trainer(tiny(), train_data=IDS, max_steps=1, **QUIET).train()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_failing_save_follows_the_policy(tmp_path, monkeypatch):
    from qtlm import trainer as module
    from qtlm.checkpoint import CheckpointWriteError

    real, failures = module.save_checkpoint, []

    def full(*args, **kwargs):
        if len(failures) < 2:
            failures.append(1)
            raise CheckpointWriteError("disk: full")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "save_checkpoint", full)
    with pytest.warns(UserWarning, match="not saved .*training goes on"):
        warned = run(tmp_path / "warn", max_steps=4, on_save_error="warn")
        warned.train()
    assert warned.step == 4 and latest_checkpoint(warned.run_dir).name == "step-0000000004"
    failures.clear()
    with pytest.raises(CheckpointWriteError):
        run(tmp_path / "raise", max_steps=4).train()
    monkeypatch.setattr(module, "save_checkpoint", lambda *a, **k: (_ for _ in ()).throw(CheckpointWriteError("disk: full")))
    with pytest.raises(CheckpointWriteError), pytest.warns(UserWarning):
        run(tmp_path / "third", max_steps=9, on_save_error="warn").train()


def test_the_door_is_shut_to_nonsense():
    from qtlm import QuantizationError, quantize_model_ptq

    for bad in (dict(learning_rate=-1), dict(max_stepz=3), dict(device="cuda:77"), dict(dtype="fp8")):
        with pytest.raises(ConfigError) as caught:
            Trainer(tiny(), **bad)
        assert next(iter(bad)) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        Trainer(tiny(), config=3)
    with pytest.raises(ValueError, match="nn.Module"):
        Trainer("model")
    with pytest.raises(QuantizationError, match="quantized"):
        Trainer(quantize_model_ptq(tiny()))
    with pytest.raises(QuantizationError):
        Trainer(tiny(), enable_quantized_finetuning=True)


def test_nothing_is_written_unless_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(tiny(), train_data=IDS, eval_data=IDS[:100], eval_steps=1, max_steps=3, **QUIET)
    trainer.train()
    assert os.listdir(tmp_path) == []
    path = trainer.save()
    assert path == Path("checkpoints/run/step-0000000003") and load_checkpoint(path).step == 3


def test_progress_is_plain_in_a_log_file(capsys):
    Trainer(tiny(), train_data=IDS, max_steps=20, batch_size=4).train()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 10 and lines[-1].startswith("train: step 20/20, loss ") and "tokens/s" in lines[-1]


def test_batches_can_be_given(tmp_path):
    batches = Batches(Tokens(IDS), 16, 4, seed=0)
    a, b = Trainer(tiny(), train_data=batches, max_steps=3, **QUIET), Trainer(tiny(), train_data=IDS, max_steps=3, **QUIET)
    assert a.train().losses == b.train().losses


def test_compiled_training_matches_eager():
    import shutil

    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler, and there is none")
    eager = Trainer(tiny(), train_data=IDS, max_steps=3, **QUIET).train()
    compiled = Trainer(tiny(), train_data=IDS, max_steps=3, compile=True, **QUIET)
    assert compiled.train().losses == pytest.approx(eager.losses, rel=1e-4)
    assert list(compiled.model.state_dict()) == list(tiny().state_dict())


def test_history_plot_and_repr():
    history = History([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}])
    figure = history.plot()
    assert figure.axes[0].get_xlabel() == "step" and len(figure.axes[0].lines) == 3
    assert repr(history) == "History(2 steps, loss 2.000 to 1.000)"
    assert History().plot() is not None


def test_evaluate_counts_every_target_once():
    trainer = Trainer(tiny(), eval_data=Tokens(IDS[:333]), **QUIET)
    with torch.no_grad():
        losses = []
        for begin in range(0, 332, 16):
            ids = IDS[begin : begin + 17][: 333 - begin]
            losses.append(F.cross_entropy(trainer.model(ids[None, :-1])[0], ids[1:], reduction="sum"))
    assert trainer.evaluate()["loss"] == pytest.approx(sum(losses).item() / 332, rel=1e-5)


def test_same_seed_same_everything():
    first, second = (Trainer(tiny(dropout=0.1), TrainingConfig(max_steps=5, **QUIET), train_data=IDS) for _ in range(2))
    first.train()
    torch.manual_seed(123)
    time.sleep(0)
    second.train()
    assert first.history.losses == second.history.losses


# What an attack on the first version found


class Shaky(torch.utils.data.Dataset):
    "A data set that draws from three generators."

    def __len__(self):
        return 24

    def __getitem__(self, i):
        import random

        import numpy as np

        return torch.randn(6) * random.random() + np.random.rand(), torch.tensor(i % 3)


def shaky(folder, **more):
    torch.manual_seed(0)
    loader = DataLoader(Shaky(), batch_size=8, shuffle=True)
    settings = {"max_steps": 9, "save_steps": 1, "output_dir": str(folder), "eval_steps": 2, "progress": False, **more}
    return Trainer(Wrapped(lambda y: y), train_data=loader, eval_data=loader, **settings)


def test_a_loader_that_shuffles_and_augments_is_resumed_to_the_bit(tmp_path):
    import random

    whole = shaky(tmp_path / "a").train()
    random.seed(5)
    torch.rand(3)
    again = shaky(tmp_path / "b")
    assert again.train().losses == whole.losses and again.history.eval_losses == whole.eval_losses
    for step in (1, 2, 3, 4, 7):
        part = shaky(tmp_path / f"from{step}")
        part.train(resume_from_checkpoint=again.run_dir / f"step-{step:010d}")
        assert part.history.losses == whole.losses and part.history.eval_losses == whole.eval_losses, step


def test_evaluate_moves_no_generator():
    import random

    import numpy as np

    trainer = Trainer(Wrapped(lambda y: y), progress=False)
    loader = DataLoader(Shaky(), batch_size=8, shuffle=True)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = trainer.evaluate(loader)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert trainer.evaluate(loader) == first


class Averager(nn.Module):
    "Buffers that a forward pass writes in place and by assignment."

    def __init__(self):
        super().__init__()
        self.net = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        self.count = self.count + 1
        return self.net(x)


def test_a_refused_step_leaves_every_buffer():
    torch.manual_seed(0)
    trainer = Trainer(Averager(), **QUIET)
    good = torch.randn(8, 4), torch.randint(3, (8,))
    trainer.training_step(good)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(NonFiniteLossError):
        trainer.training_step((good[0] * math.nan, good[1]))
    with pytest.raises(ValueError):
        trainer.training_step((good[0], good[1] + 3))
    after = trainer.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items()) and int(after["count"]) == 1


def test_gradients_left_in_the_model_are_not_part_of_a_step():
    batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    clean, dirty = Trainer(Wrapped(lambda y: y), **QUIET), Trainer(Wrapped(lambda y: y), **QUIET)
    (dirty.model(batch[0]).sum() * 5).backward()
    clean.training_step(batch)
    dirty.training_step(batch)
    assert clean.history.records[0]["grad_norm"] == dirty.history.records[0]["grad_norm"]
    assert all(torch.equal(a, b) for a, b in zip(clean.model.parameters(), dirty.model.parameters()))


def test_settings_given_at_resume_count(tmp_path):
    run(tmp_path, max_steps=3).train()
    more = resume_training(tmp_path / "run", train_data=IDS, weight_decay=0.0, betas=(0.5, 0.6), eps=1e-6)
    assert {(g["weight_decay"], tuple(g["betas"]), g["eps"]) for g in more.optimizer.param_groups} == {(0.0, (0.5, 0.6), 1e-6)}
    same = resume_training(tmp_path / "run", train_data=IDS)
    assert sorted(g["weight_decay"] for g in same.optimizer.param_groups) == [0.0, 0.1]


def test_a_run_inside_an_except_block_is_saved(tmp_path):
    try:
        raise KeyError
    except KeyError:
        trainer = Trainer(tiny(), train_data=IDS, max_steps=2, output_dir=tmp_path, **QUIET)
        trainer.train()
    assert latest_checkpoint(trainer.run_dir).name == "step-0000000002"


def test_an_error_in_the_middle_of_a_kept_run_loses_no_step(tmp_path):
    class Fail(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 3:
                raise ZeroDivisionError

        def on_train_end(self, trainer):
            raise KeyError("a second error must not hide the first")

    trainer = Trainer(tiny(), train_data=IDS, max_steps=9, output_dir=tmp_path, callbacks=[Fail()], **QUIET)
    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match="KeyError after ZeroDivisionError"):
        trainer.train()
    assert latest_checkpoint(trainer.run_dir).name == "step-0000000003"


def test_two_runs_do_not_mix_in_one_directory(tmp_path):
    run(tmp_path / "a", max_steps=6).train()
    with pytest.raises(CheckpointError, match="expected none after step 3"):
        run(tmp_path / "a").train(resume_from_checkpoint=tmp_path / "a" / "run" / "step-0000000003")
    run(tmp_path / "b", max_steps=8).train()
    with pytest.raises(CheckpointError, match="holds a run, step-0000000008"):
        run(tmp_path / "b").train(resume_from_checkpoint=tmp_path / "a" / "run")


@pytest.mark.parametrize("bad", [5, "text", (x for x in [1]), Batches(Tokens(IDS), 16, 4)])
def test_evaluation_data_are_looked_at_before_the_first_step(bad):
    trainer = Trainer(tiny(), train_data=IDS, eval_data=bad, eval_steps=5, max_steps=9, **QUIET)
    with pytest.raises(DataError, match="eval_data"):
        trainer.train()
    assert trainer.step == 0


def test_short_held_out_text_is_enough():
    trainer = Trainer(tiny(), train_data=IDS, eval_data=IDS[:5], eval_steps=1, max_steps=1, **QUIET)
    assert len(trainer.train().eval_losses) == 1


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("bad", [None, "hello", 3, {"input_ids": IDS[:16][None], "labels": [1, 2]}, torch.rand(4, 5)])
def test_a_batch_of_the_wrong_kind_is_one_line(bad, pieces):
    trainer = Trainer(tiny(), gradient_accumulation_steps=pieces, **QUIET)
    with pytest.raises(DataError, match="batch: .*expected") as caught:
        trainer.training_step(bad)
    assert "\n" not in str(caught.value) and trainer.step == 0


def test_switches_in_a_dict_go_with_every_piece():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    batch = {"input_ids": IDS[:64].reshape(4, 16), "labels": IDS[:64].reshape(4, 16), "use_cache": False}
    expected = model(**batch).loss.item()
    assert Trainer(model, gradient_accumulation_steps=2, **QUIET).training_step(batch) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForTokenClassification"])
def test_labels_of_models_that_are_not_causal_are_not_shifted(kind):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=5,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = getattr(transformers, kind)(config)
    batch = {"input_ids": IDS[:32].reshape(2, 16), "labels": IDS[:32].reshape(2, 16) % 5}
    expected = model(**batch).loss.item()
    trainer = Trainer(model, **QUIET)
    assert trainer.evaluate([batch])["loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.training_step(batch) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [Callback, lambda trainer: None, 3])
def test_callbacks_are_checked(bad):
    for given in (bad, [bad]):
        with pytest.raises(ConfigError, match="callbacks: .*; expected a list of Callback objects"):
            Trainer(tiny(), callbacks=given)


def test_other_data_of_any_kind_is_refused(tmp_path):
    rows = [IDS[i * 17 : (i + 1) * 17][None] for i in range(5)]
    settings = {"max_steps": 3, "output_dir": tmp_path, **QUIET}
    Trainer(tiny(), train_data=rows, **settings).train()
    for data, more in ((rows[:4], {}), (IDS, {}), (rows, {"seed": 4}), (rows, {"gradient_accumulation_steps": 2})):
        with pytest.raises(CheckpointMismatchError, match="train_data"):
            Trainer(tiny(), train_data=data, **{**settings, "max_steps": 5, **more}).train(resume_from_checkpoint=True)


def test_history_holds_what_a_resume_gives_back(tmp_path):
    import json

    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    data = [(x, x[:, :3].argmax(-1))]

    def start(folder, **more):
        return Trainer(Wrapped(lambda y: y), train_data=data, eval_data=data, eval_steps=2, output_dir=folder, progress=False, **more)

    whole = start(tmp_path / "a", max_steps=6)
    whole.train()
    start(tmp_path / "b", max_steps=3).train()
    start(tmp_path / "b", max_steps=6).train(resume_from_checkpoint=True)
    lines = [[json.loads(line) for line in (tmp_path / f / "run" / "history.jsonl").read_text().splitlines()] for f in "ab"]
    for records in lines:
        for record in records:
            record.pop("tokens_per_second", None)
    # The shorter run evaluated once more, after its own last step.
    assert [r for r in lines[1] if not (r["step"] == 3 and "eval_loss" in r)] == lines[0]


def test_a_note_in_the_history_stays_out_of_the_checkpoint(tmp_path):
    class Note(Callback):
        def on_step_end(self, trainer):
            trainer.history.records[-1]["note"] = "hello"
            trainer.history.log(step=trainer.step, extra=torch.tensor(2.5), wild=math.inf)

    trainer = Trainer(tiny(), train_data=IDS, max_steps=2, callbacks=[Note()], output_dir=tmp_path, **QUIET)
    trainer.train()
    state = load_checkpoint(trainer.run_dir, model=tiny()).training_state["history"]
    assert "note" not in state and state["extra"].tolist().count(2.5) == 2
    assert '"wild": null' in (trainer.run_dir / "history.jsonl").read_text()


def test_interrupted_twice_without_a_place(tmp_path):
    program = PROGRAM.replace("output_dir=sys.argv[1], ", "").replace("torch.manual_seed(int", "import os; os.chdir(sys.argv[1]); torch.manual_seed(int")
    reached = []
    for wait in ("3", None):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), "0"], stdout=subprocess.PIPE, text=True)
        first = process.stdout.readline().strip()
        while wait and process.stdout.readline().strip() != wait:
            pass
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 143
        reached.append((int(first), int(latest_checkpoint(tmp_path / "checkpoints" / "run").name.removeprefix("step-"))))
    assert reached[1][0] == reached[0][1] + 1 and reached[1][1] > reached[0][1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["run"]


def test_raw_errors_are_ours():
    from qtlm.model import ModelInputError
    from qtlm.optim import OptimizerError

    with pytest.raises(OptimizerError, match="none of 4 parameters"):
        Trainer(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False))
    with pytest.raises(OptimizerError, match="sparse"):
        Trainer(nn.Sequential(nn.Embedding(4, 4, sparse=True), nn.Linear(4, 4)))

    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)

        def forward(self, x):
            return self.net(x).detach()

    with pytest.raises(ModelInputError, match="no trainable parameter"):
        Trainer(Detached(), **QUIET).training_step((torch.randn(2, 4), torch.tensor([0, 1])))
    with pytest.raises(ConfigError, match="resume_from_checkpoint: 5"):
        Trainer(tiny(), train_data=IDS, max_steps=1, **QUIET).train(resume_from_checkpoint=5)
    trainer = Trainer(tiny(), **QUIET)
    with pytest.raises(CheckpointMismatchError, match="no callbacks, data"):
        trainer.load_state_dict({"step": 4, "tokens_seen": 3, "history": {}, "rng": {}})
    assert trainer.step == 0


def test_a_model_of_transformers_says_its_context():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    history = Trainer(transformers.GPT2LMHeadModel(config), train_data=IDS, max_steps=1, **QUIET).train()
    assert history.records[0]["tokens"] == 4 * 32


def test_a_short_evaluation_is_spread_over_the_text():
    half = torch.cat([torch.zeros(160, dtype=torch.long), torch.full((160,), 7)])
    trainer = Trainer(tiny(), eval_data=half, eval_batches=2, progress=False, batch_size=1)
    zeros, sevens = trainer.evaluate(half[:17])["loss"], trainer.evaluate(half[-17:])["loss"]
    assert trainer.evaluate()["loss"] == pytest.approx((zeros + sevens) / 2, abs=1e-5) and abs(zeros - sevens) > 0.01


def test_a_loader_of_unknown_length_trains():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            for i in range(6):
                yield torch.full((6,), float(i)), torch.tensor(i % 3)

    history = Trainer(Wrapped(lambda y: y), train_data=DataLoader(Stream(), batch_size=2), max_steps=5, progress=False).train()
    assert len(history) == 5
