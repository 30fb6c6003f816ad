# python -m pytest tests/test_resume.py            # the quick tier; with -m "slow or not slow" the long one, too
"A resumed run is the run that was not interrupted: each kind of run at each of 60 steps, in other processes, ten times over; and what happens if any part of its state is left out."
import copy
import os
import random
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qtlm import assert_resume_exact, base, checkpoint, quantize_model_ptq
from qtlm.checkpoint import CheckpointError, CheckpointWarning, latest_checkpoint, load_checkpoint
from qtlm.history import Callback
from qtlm.model import TinyLM
from qtlm.step import learning_rate_factor
from qtlm.trainer import Trainer, resume_training

TEXT = torch.tensor(list(b"It was a dark and stormy night, and the brig tossed. " * 12))
SETTINGS = dict(max_steps=60, batch_size=2, block_size=16, learning_rate=1e-2, gradient_accumulation_steps=2, lr_scheduler_type="cosine", warmup_steps=9, eval_steps=7, eval_batches=2, early_stopping_patience=50, progress=False)


def maker(bits=None, tuned=False, **fields):
    "What makes a trainer of one kind: dropout, accumulation, a schedule, evaluations, early stopping."
    def make():
        model = TinyLM(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, block_size=16, dropout=0.2)
        model = quantize_model_ptq(model, bits=bits) if tuned else model
        return Trainer(model, train_data=TEXT[:500], eval_data=TEXT[500:], enable_quantized_finetuning=tuned, **SETTINGS | fields)
    return make


KINDS = {
    "float32": maker(),
    "bfloat16": maker(dtype="bf16"),
    "QAT INT8": maker(quantization_mode="qat", quantization_bits=8),
    "QAT INT4": maker(quantization_mode="qat", quantization_bits=4),
    "fine-tuning INT8": maker(8, tuned=True),
    "fine-tuning INT4": maker(4, tuned=True),
}
def beside(bits=None, **fields):
    "What makes a trainer of a few weights beside a frozen backbone, of which a checkpoint holds the digest alone."
    def make():
        model = TinyLM(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, block_size=16, dropout=0.2, generator=torch.Generator().manual_seed(4))
        model.requires_grad_(False)
        model = quantize_model_ptq(model, bits=bits) if bits else model
        for module in (model.model.norm, model.model.layers[0].input_layernorm): module.requires_grad_(True)
        return Trainer(model, train_data=TEXT[:500], eval_data=TEXT[500:], save_frozen=False, **SETTINGS | fields)
    return make


MORE = {
    "beside a frozen backbone": beside(),
    "beside a frozen INT4 backbone": beside(4),
    "QAT INT8 static": maker(quantization_mode="qat", quantization_type="static", freeze_observers_after=0.7, fake_quant_after_n_steps=10),
    "QAT INT4 learned scales": maker(quantization_mode="qat", quantization_bits=4, quantization_learned_scales=True),
    "scales of INT4": maker(4, tuned=True, quantized_finetuning="scales"),
    "INT8, gradients in backward": maker(8, tuned=True, gradients_in_backward=True, max_grad_norm=None, gradient_accumulation_steps=1),
}


@pytest.mark.parametrize("kind", ["float32", *(pytest.param(kind, marks=pytest.mark.slow) for kind in [*KINDS, *MORE] if kind != "float32")])
def test_every_step_of_every_kind(kind):
    "R1: interrupted after each of 60 steps, all later losses, learning rates, norms, evaluations, weights, moments and generators are the same bits."
    assert assert_resume_exact({**KINDS, **MORE}[kind]) == 60


@pytest.mark.parametrize("kind", [*KINDS, *MORE][1:])
def test_some_steps_of_every_kind(kind):
    "The same after six of the steps, other ones for each kind."
    assert assert_resume_exact({**KINDS, **MORE}[kind], at=range(1 + [*KINDS, *MORE].index(kind) % 10, 61, 10)) == 6


# ---- teeth ----

class Drawing(Callback):
    "Somebody who draws from the generators of Python, NumPy and torch, and remembers what came."
    def __init__(self): self.drawn, self.count = [0.0] * 3, 0
    def on_step_end(self, trainer): self.drawn, self.count = [random.random(), float(np.random.rand()), torch.rand(()).item()], self.count + 1
    def state_dict(self): return {"drawn": self.drawn, "count": self.count}
    def load_state_dict(self, state): self.drawn, self.count = state["drawn"], state["count"]


def averaging():
    "A run of another kind: batches from a list, running averages in the model, a callback with a memory."
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.ReLU(), nn.Linear(8, 3))
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(5, 6, generator=g), torch.randint(3, (5,), generator=g)) for _ in range(4)]
    settings = dict(max_steps=12, learning_rate=1e-2, lr_scheduler_type="linear", eval_steps=3, early_stopping_patience=9, early_stopping_threshold=5.0, progress=False)
    return Trainer(model, train_data=data, eval_data=data[:1], callbacks=[Drawing()], **settings)


def short(kind): return lambda: kind_of(kind)
def kind_of(kind):
    trainer = {**KINDS, **MORE}[kind]()
    trainer.config = trainer.config.replace(max_steps=12)
    return trainer


def emptied(t): return torch.zeros_like(t) if t.dtype != torch.uint8 else torch.full_like(t, 0x77)


def tensor(name):
    def leave_out(ckpt):
        found = [n for n in ckpt._tensors if n.endswith(name)]
        assert found, name
        ckpt._tensors[found[0]] = emptied(ckpt._tensors[found[0]]) + (1 if name.endswith("scale") and "log" not in name and "group" not in name else 0)
    return leave_out


def moment(key, of=""):
    def leave_out(ckpt):
        states = ckpt.optimizer["state_dict"]["state"]
        names = dict(enumerate(sum(ckpt.optimizer["param_names"], [])))
        found = [i for i in states if key in states[i] and of in names[i]]
        assert found, key
        for i in found: states[i][key] = emptied(states[i][key])
    return leave_out


def part(key, value):
    def leave_out(ckpt):
        assert key in ckpt.training_state
        ckpt.training_state[key] = value(ckpt.training_state[key]) if callable(value) else value
    return leave_out


def fresh_callback(number, state):
    def leave_out(ckpt): ckpt.training_state["callbacks"][number][1] = state
    return leave_out


def other_generator(name):
    def change(rng):
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        from qtlm.batches import rng_state
        return {**rng, name: rng_state()[name]}
    return part("rng", change)


def no_rounding(ckpt): ckpt.optimizer["state_dict"]["rounding"]["generators"] = {}


PARTS = {
    "a weight": ("averaging", tensor("0.weight")),
    "a bias": ("averaging", tensor("3.bias")),
    "a running mean": ("averaging", tensor("running_mean")),
    "a running variance": ("averaging", tensor("running_var")),
    "how often it was averaged": ("averaging", tensor("num_batches_tracked")),
    "first moments": ("averaging", moment("exp_avg")),
    "second moments": ("averaging", moment("exp_avg_sq")),
    "the step of the optimizer": ("averaging", moment("step")),
    "the step of the run": ("averaging", part("step", 0)),
    "tokens seen": ("averaging", part("tokens_seen", 0)),
    "the history": ("averaging", part("history", {})),
    "early stopping": ("averaging", fresh_callback(0, {"best": float("inf"), "waited": 0})),
    "a callback's memory": ("averaging", fresh_callback(1, {"drawn": [0.0] * 3, "count": 0})),
    "Python's generator": ("averaging", other_generator("python")),
    "NumPy's generator": ("averaging", other_generator("numpy")),
    "torch's generator": ("averaging", other_generator("torch")),
    "extremes seen": ("QAT INT8 static", tensor("input_extremes")),
    "range of the inputs": ("QAT INT8 static", tensor("input_scale")),
    "learnt scales": ("QAT INT4 learned scales", tensor("log_scale")),
    "moments of learnt scales": ("QAT INT4 learned scales", moment("exp_avg", "log_scale")),
    "the grid that they stretch": ("QAT INT4 learned scales", tensor("q_proj.scale")),
    "codes": ("fine-tuning INT8", tensor("q_proj.codes")),
    "scales": ("fine-tuning INT8", tensor("q_proj.scale")),
    "scales of groups": ("fine-tuning INT4", tensor("q_proj.group_scale")),
    "scales of first moments": ("fine-tuning INT8", moment("exp_avg_scale")),
    "scales of second moments": ("fine-tuning INT8", moment("exp_avg_sq_scale")),
    "what rounding took": ("fine-tuning INT8", moment("residual")),
    "thresholds": ("fine-tuning INT4", moment("threshold")),
    "the generator that rounds": ("fine-tuning INT8", no_rounding),
}


@pytest.mark.parametrize("name", PARTS)
def test_each_part_left_out_is_seen(name, monkeypatch):
    "R2: a checkpoint that lacks one part of the state gives another run, or is refused; the trial of R1 sees each."
    kind, leave_out = PARTS[name]
    make = averaging if kind == "averaging" else short(kind)
    parse, left_out = checkpoint._parse, []

    def lacking(raw, *others):
        ckpt = parse(raw, *others)
        leave_out(ckpt)
        left_out.append(name)
        return ckpt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert assert_resume_exact(make, at=[5]) == 1
        monkeypatch.setattr(checkpoint, "_parse", lacking)
        with pytest.raises((AssertionError, CheckpointError)) as e: assert_resume_exact(make, at=[5])
    assert left_out and ("resumed after step 5" in str(e.value) or isinstance(e.value, CheckpointError)), e.value


def test_left_in_evaluation_mode_is_not_a_danger():
    "A model that was evaluated, and handed over so, is trained with dropout all the same."
    def make():
        trainer = KINDS["float32"]()
        trainer.config = trainer.config.replace(max_steps=12)
        trainer.model.eval()
        return trainer
    assert assert_resume_exact(make, at=range(1, 12, 3)) == 4


def test_a_frozen_backbone_is_not_saved_and_is_recognized(tmp_path):
    "Checkpoints hold what is trained and a digest; beside another backbone they are refused, and nothing is changed."
    trainer, small = beside(4)(), {}
    for save_frozen in (True, False):
        trainer.config = trainer.config.replace(save_frozen=save_frozen)
        small[save_frozen] = (trainer.save(tmp_path / str(save_frozen)) / "model.pt").stat().st_size
    assert small[False] < 0.4 * small[True]
    trainer.config = trainer.config.replace(max_steps=9, output_dir=str(tmp_path / "kept"))
    trainer.train()
    again = resume_training(tmp_path / "kept" / "run", beside(4)().model, train_data=TEXT[:500])
    assert again.step == 9 and all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), trainer.model.state_dict().values()))
    stranger = beside(4)().model
    stranger.model.layers[0].mlp.up_proj.codes[0, 0] ^= 1
    before = copy.deepcopy(stranger.state_dict())
    with pytest.raises(CheckpointError, match="other frozen weights in the model given"): load_checkpoint(tmp_path / "kept" / "run", stranger)
    with pytest.raises(CheckpointError, match="no frozen weights, a digest only.* Pass model="): load_checkpoint(tmp_path / "kept" / "run")
    assert all(torch.equal(a, b) for a, b in zip(before.values(), stranger.state_dict().values()))
    assert "frozen" in checkpoint.load_checkpoint(tmp_path / "kept" / "run", beside(4)().model).metadata


# ---- again and again, elsewhere ----

def indexed(folder, stop=None):
    "A run over 24 samples in shuffled batches that an ordinary loader draws, and the numbers of the samples that it sees."
    numbers = torch.arange(24.0)
    data = TensorDataset(torch.stack([numbers, numbers.square() / 100], 1), torch.arange(24) % 3)
    model, seen = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.2), nn.Linear(8, 3)), []
    model.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0][:, 0].int().tolist()))

    class Stop(Callback):
        def on_step_end(self, trainer): trainer.stop() if trainer.step == stop else None
    settings = dict(max_steps=18, learning_rate=1e-3, progress=False, output_dir=str(folder))  # six batches an epoch
    return Trainer(model, train_data=DataLoader(data, batch_size=4, shuffle=True), callbacks=[Stop()], **settings), seen


def test_ten_resumes_in_a_chain(tmp_path):
    "R3: over three epochs, stopped ten times, several times in one epoch: no sample is repeated or missed, and the end is the same to the bit."
    torch.manual_seed(0)
    whole, expected = indexed(tmp_path / "whole")
    whole.save(tmp_path / "start")
    whole.train()
    assert sorted(expected[:24]) == sorted(expected[24:48]) == list(range(24)) and expected[:24] != expected[24:48]
    seen, source = [], tmp_path / "start"
    for number, stop in enumerate((1, 2, 3, 5, 7, 8, 11, 13, 15, 17, 18)):
        torch.manual_seed(100 + number)
        random.seed(number)
        trainer, own = indexed(tmp_path / "parts", stop)
        trainer.train(resume_from_checkpoint=source)
        source = True
        seen += own
        assert trainer.step == stop
    assert seen == expected and trainer.history.losses == whole.history.losses
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), whole.model.parameters()))


PROGRAM = """
    import os, random, sys
    sys.path.insert(0, sys.argv[3])
    import torch
    torch.set_num_threads(1)
    import test_resume as T
    random.seed(int(sys.argv[2])); torch.manual_seed(int(sys.argv[2])); torch.rand(int(sys.argv[2]))
    trainer = T.KINDS[sys.argv[4]]()
    trainer.config = trainer.config.replace(output_dir=sys.argv[1], run_name="parts")

    class Stop(T.Callback):
        def on_step_end(self, t): t.stop() if t.step == int(sys.argv[5]) else None
    trainer.callbacks.append(Stop())
    trainer.train(resume_from_checkpoint=os.path.join(sys.argv[1], "start") if int(sys.argv[5]) == 20 else True)
"""


@pytest.mark.parametrize("kind", ["float32", pytest.param("QAT INT4", marks=pytest.mark.slow), pytest.param("fine-tuning INT4", marks=pytest.mark.slow)])
def test_new_processes(tmp_path, kind):
    "R4: each part in a process of its own, with other hashes of strings, another directory, other random numbers drawn before."
    whole = KINDS[kind]()
    whole.save(tmp_path / "start")
    whole.train()
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    for number, stop in enumerate((20, 41, 60)):
        place = tmp_path / f"cwd-{number}"
        place.mkdir()
        arguments = [str(tmp_path), str(number + 3), os.path.dirname(os.path.abspath(__file__)), kind, str(stop)]
        environment = {**os.environ, "PYTHONHASHSEED": str(number + 7), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, str(tmp_path / "program.py"), *arguments], cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    model = TinyLM(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, block_size=16, dropout=0.2)
    last = resume_training(tmp_path / "parts", model, train_data=TEXT[:500], eval_data=TEXT[500:])
    assert last.history.losses == whole.history.losses and last.step == 60
    assert all(torch.equal(a, b) for a, b in zip(last.model.state_dict().values(), whole.model.state_dict().values()))


@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_saving_and_evaluating_change_nothing(tmp_path, kind):
    "R5: with a save and an evaluation at each step the run is the one without any."
    torch.manual_seed(0)
    plain = {**KINDS, **MORE}[kind]()
    busy = {**KINDS, **MORE}[kind]()
    busy.model.load_state_dict(copy.deepcopy(plain.model.state_dict()))
    plain.config = plain.config.replace(max_steps=12, eval_steps=None, early_stopping_patience=None)
    busy.config = busy.config.replace(max_steps=12, eval_steps=1, save_steps=1, output_dir=str(tmp_path))
    plain.train(), busy.train()
    assert len(busy.history.eval_losses) == 12 and len([*(tmp_path / "run").glob("step-*")]) >= 1 and latest_checkpoint(tmp_path / "run").name == "step-0000000012"
    assert plain.history.losses == busy.history.losses
    assert all(torch.equal(a, b) for a, b in zip(plain.model.state_dict().values(), busy.model.state_dict().values()))


def test_another_environment_is_named(tmp_path, monkeypatch):
    "R6: each difference in one warning; the same environment gives none."
    trainer = averaging()
    trainer.config = trainer.config.replace(output_dir=str(tmp_path), max_steps=4)
    trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        averaging().train(resume_from_checkpoint=tmp_path / "run")
    before = base._environment
    monkeypatch.setattr(base, "_environment", lambda model: before(model) | {"torch": "9.9", "device": "cuda:0", "instructions": "ABACUS", "threads": 77})
    with pytest.warns(CheckpointWarning) as caught: averaging().train(resume_from_checkpoint=tmp_path / "run")
    text = next(str(w.message) for w in caught if "another environment" in str(w.message))
    assert all(f"{name} {value} (saved: " in text for name, value in {"torch": "9.9", "device": "cuda:0", "instructions": "ABACUS", "threads": 77}.items()), text
    assert "python" not in text and "\n" not in text


def test_the_schedule_is_part_of_the_run():
    "A learning rate follows from the number of the step: nothing to save, nothing to forget."
    trainer = KINDS["float32"]()
    trainer.config = trainer.config.replace(max_steps=20)
    trainer.train()
    c = trainer.config
    shape = (c.lr_scheduler_type, c.max_steps, c.warmup_steps, c.min_lr_ratio, c.decay_ratio)
    assert [r["learning_rate"] for r in trainer.history.records if "loss" in r] == [c.learning_rate * learning_rate_factor(i, *shape) for i in range(20)]
