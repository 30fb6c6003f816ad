# pytest tests/test_shards.py
"""A model that was cut over processes is saved by all of them, sealed like any other checkpoint, and read back by any number."""

import json
import os
import shutil
import signal
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_parallel import IDS, SETTINGS, Picky, StopAt, learnt, share, tiny, weights
from torch import nn

from qtlm import CheckpointError, Trainer, load_checkpoint, shards, verify_checkpoint
from qtlm.checkpoint import CheckpointCorruptedError, CheckpointMismatchError, CheckpointWriteError
from qtlm.inspection import inspect_checkpoint
from qtlm.lora import apply_lora
from qtlm.parallel import ParallelError, _full
from qtlm.shards import join_parts
from qtlm.storage import read_step


def narrow(seed=0):
    "Weights of which some have fewer rows than there are processes."
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def narrow_run(**more):
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    return Trainer(narrow(more.pop("seed", 0)), train_data=[(x, x[:, :2].argmax(-1))], **SETTINGS | more)


def float_run(**more):
    return Trainer(tiny(more.pop("seed", 0)), train_data=IDS[:2500], **SETTINGS | more)


def adapters(**more):
    torch.manual_seed(0)  # of a frozen base that is not saved: the same everywhere
    return Trainer(apply_lora(tiny(), target_modules=["q_proj", "v_proj"]), train_data=IDS, save_frozen=False, **SETTINGS | more)


def decided(**more):
    return learnt(quantization_type="dynamic", **more)


RUNS = {"float": float_run, "narrow": narrow_run, "adapters": adapters, "qat": decided}


def first_half(rank, folder):
    found = {}
    for name, make in RUNS.items():
        whole = make(parallel="fsdp").train().losses
        trainer = make(parallel="fsdp", output_dir=str(folder), run_name=name, callbacks=[StopAt(4)])
        trainer.train()
        moments = {p: {key: _full(t).clone() for key, t in trainer.optimizer.state[q].items()} for p, q in trainer.model.named_parameters() if q in trainer.optimizer.state}
        found[name] = whole, weights(trainer), moments
    return found


def second_half(rank, folder, way):
    found = {}
    for name, make in RUNS.items():
        trainer = make(parallel=way)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = trainer.train(resume_from_checkpoint=folder / name).losses
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "Runs of two processes and of three, stopped halfway."
    folders = {size: tmp_path_factory.mktemp(f"parts-{size}") for size in (2, 3)}
    return {size: (folder, share(folder, first_half, folder, size=size)[0]) for size, folder in folders.items()}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_parts_put_together_are_the_model_that_was_cut(saved, size, name):
    folder, found = saved[size]
    step, (_, tensors, moments) = read_step(folder / name / "step-0000000004"), found[name]
    assert len(step.shards) == size and "model.pt" not in step.files
    model = {"float": tiny, "narrow": narrow, "adapters": lambda: adapters().model, "qat": lambda: decided().model}[name]()
    checkpoint = load_checkpoint(folder / name, model=model)
    assert all(torch.equal(p, tensors[key]) for key, p in checkpoint.model.named_parameters())
    state, names = checkpoint.optimizer["state_dict"]["state"], sum(checkpoint.optimizer["param_names"], [])
    assert len(state) == len(moments) and all(torch.equal(t, moments[names[i]][key]) for i in state for key, t in state[i].items())
    assert set(state[0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert verify_checkpoint(step.path).ok and set(step.sizes) == set(verify_checkpoint(step.path).files)
    assert json.loads((step.path / "manifest.json").read_text())["format_version"] == 2


@pytest.mark.parametrize("size", [2, 3])
def test_they_are_read_by_any_number_of_processes(saved, size):
    folder, found = saved[size]
    for way, number in [("fsdp", size), ("fsdp", 5 - size), ("ddp", 5 - size)]:
        for name, losses in share(folder, second_half, folder, way, size=number)[0].items():
            assert losses == found[name][0] if number == size else losses == pytest.approx(found[name][0], abs=1e-5 if name != "qat" else 2e-4), (name, way, number)
    for name, make in RUNS.items():  # and by one
        trainer = make()
        with pytest.warns(UserWarning, match="processes 1"):
            losses = trainer.train(resume_from_checkpoint=folder / name).losses
        assert losses == pytest.approx(found[name][0], abs=1e-5 if name != "qat" else 2e-4)


def test_after_an_evaluation(room):
    "A forward pass without a backward pass leaves weights put together: saving and resuming know that."

    def work(rank):
        trainer = float_run(parallel="fsdp", eval_data=IDS[2500:], eval_steps=2, save_steps=2, output_dir=str(room), max_steps=4)
        trainer.train()
        tensors = weights(trainer)
        trainer.evaluate()
        trainer.save(room / "again")
        other = float_run(parallel="fsdp", eval_data=IDS[2500:], seed=1, max_steps=4)
        other.evaluate()
        other.train(resume_from_checkpoint=room / "again")
        assert all(torch.equal(p, tensors[name]) for name, p in weights(other).items()) and other.step == 4
        return tensors, trainer.history.losses, trainer.history.eval_losses

    tensors, losses, evaluated = share(room, work)[0]
    alone = float_run(eval_data=IDS[2500:], eval_steps=2, max_steps=4).train()
    assert losses == pytest.approx(alone.losses, abs=1e-5) and evaluated == pytest.approx(alone.eval_losses, abs=1e-5) and len(evaluated) >= 2
    for step in (room / "again", room / "run"):
        assert all(torch.equal(p, tensors[name]) for name, p in load_checkpoint(step).model.named_parameters())


def test_each_process_saves_its_share(saved):
    "No file holds much more than its share of weights and moments, and what tied weights share is in one of them once."
    for size, (folder, _) in saved.items():
        step = read_step(folder / "float" / "step-0000000004")
        total = sum(length for length, _ in step.shards.values())
        assert max(length for length, _ in step.shards.values()) < 1.3 * total / size
        assert sum(t.nbytes for t in join_parts(step).values()) == 3 * sum(p.nbytes for p in tiny().parameters())


def test_torch_reads_them_with_its_own_reader(saved):
    "The layout is that of `torch.distributed.checkpoint`'s safetensors; nothing of ours is needed to read it."
    for folder, _ in saved.values():
        step = read_step(folder / "float" / "step-0000000004")
        expected = join_parts(step)
        found = {name: torch.zeros_like(t) for name, t in expected.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(step.path))
        assert len(found) == 3 * len(list(tiny().parameters())) and all(torch.equal(t, expected[name]) for name, t in found.items())
        assert all(t.abs().sum() > 0 for t in found.values())


def test_what_reads_a_checkpoint_reads_this_one(saved, room):
    folder, found = saved[2]
    seen = inspect_checkpoint(folder / "float")
    assert {row["name"] for row in seen.tensors if row["file"] == "model.pt"} == set(tiny().state_dict()) and "shard-00001" in str(seen)
    again = room / "whole"
    loaded = load_checkpoint(folder / "float")
    from qtlm import save_checkpoint

    path = save_checkpoint(loaded.model, None, loaded.config, loaded.vocab, loaded.step, again)  # and it is whole again
    assert set(os.listdir(path)) == {"model.pt", "config.json", "metadata.json", "manifest.json", "COMMITTED"}
    assert all(torch.equal(p, found["float"][1][key]) for key, p in load_checkpoint(again).model.named_parameters())
    assert json.loads((path / "manifest.json").read_text())["format_version"] == 1


@pytest.mark.parametrize("fault", ["flip", "missing", "cut", "swapped", "more"])
def test_a_damaged_part_is_found(saved, room, fault):
    folder, _ = saved[2]
    shutil.copytree(folder / "float", room / "run")
    step = room / "run" / "step-0000000004"
    one, two = sorted(step.glob("shard-*"))
    content = bytearray(one.read_bytes())
    content[-5] ^= 4
    {"flip": lambda: one.write_bytes(content), "missing": one.unlink, "cut": lambda: one.write_bytes(content[:-9]), "swapped": lambda: (one.write_bytes(two.read_bytes())),
     "more": lambda: (step / "shard-00003-model-00001-of-00001.safetensors").write_bytes(content)}[fault]()  # fmt: skip
    for read in (lambda: load_checkpoint(step), lambda: load_checkpoint(step, hollow=tiny().to("meta"), model=tiny())):
        with pytest.raises(CheckpointError, match="shard-0000"):
            read()
    report = verify_checkpoint(step)
    assert not report.ok and "shard-0000" in str(report.error) and "\n" not in str(report.error)


def test_a_part_that_rots_between_two_looks_is_found(saved, room, monkeypatch):
    folder, _ = saved[2]
    shutil.copytree(folder / "float", room / "run")
    step = read_step(room / "run" / "step-0000000004")
    path = next(step.path.glob("shard-*"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointCorruptedError, match="SHA-256"):
        join_parts(step)


def test_a_process_that_is_gone_when_its_part_is_asked_for_leaves_no_half_step(saved, room):
    def work(rank):
        trainer = float_run(parallel="fsdp", output_dir=str(room), run_name="gone", save_steps=4, max_steps=6)
        trainer.callbacks.append(StopAt(5, lambda _: setattr(shards, "_wanted", die) if rank == 1 else None))
        trainer.train()

    def die(number=-1):
        os.kill(os.getpid(), signal.SIGKILL)

    errors = share(room, work, errors=True)
    assert errors[1] is None and errors[0].startswith("ParallelError: process 0 of 2: another process is gone; expected all 2.")
    assert sorted(os.listdir(room / "gone")) == [".lock", "history.jsonl", "latest", "step-0000000004"]
    assert load_checkpoint(room / "gone").step == 4


def test_both_are_told_of_a_mishap(saved, room):
    def work(rank):
        found = {}
        trainer = Trainer(Picky(), parallel="fsdp", output_dir=str(room), run_name="nan", **SETTINGS)
        if rank == 1:
            next(iter(trainer.model.parameters())).to_local().data.view(-1)[0] = torch.nan
        with pytest.raises(CheckpointWriteError) as caught:
            trainer.save()
        found["nan"] = str(caught.value)
        trainer = Trainer(tiny(hidden_size=32), train_data=IDS[:2500], parallel="fsdp", **SETTINGS)
        before = weights(trainer)
        with pytest.raises(CheckpointMismatchError) as caught:
            trainer.train(resume_from_checkpoint=saved[2][0] / "float")
        found["other"] = str(caught.value)
        assert all(torch.equal(p, before[name]) for name, p in weights(trainer).items()) and not trainer.optimizer.state and trainer.step == 0
        return found

    first, second = share(room, work)
    assert first == second
    assert first["nan"] == "model: not saved: net.0.weight holds NaN or infinity; expected finite weights. Go back to an earlier step."
    assert "does not fit: model.embed_tokens.weight is torch.float32 [32, 16]; expected torch.float32 [32, 32]" in first["other"]


def test_without_safetensors_each_says_what_to_install(saved, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match=r"saved in parts, and safetensors is not installed; expected it. Run `pip install qtlm\[parallel\]`."):
        load_checkpoint(saved[2][0] / "float")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    from qtlm.parallel import World, check_parallel

    with pytest.raises(ParallelError, match=r"parallel: fsdp: safetensors is not installed; expected it for checkpoints. Run `pip install qtlm\[parallel\]`."):
        check_parallel(tiny(), float_run(parallel="fsdp").config, World(0, 2))
