# pytest tests/test_parallel.py
"""Several processes train one model as one process would: the same losses, one checkpoint, and no process left waiting."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qtlm import ModelConfig, NonFiniteLossError, TinyLM, Trainer, parallel, quantize_model_ptq
from qtlm.checkpoint import CheckpointWriteError, load_checkpoint, verify_checkpoint
from qtlm.history import Callback, read_jsonl
from qtlm.lora import apply_lora
from qtlm.model import ModelInputError
from qtlm.parallel import ParallelError

SHAPE = ModelConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, block_size=16)
IDS = torch.randint(32, (3000,), generator=torch.Generator().manual_seed(0))
SETTINGS = {"batch_size": 4, "max_steps": 8, "learning_rate": 3e-3, "progress": False, "device": "cpu"}


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return TinyLM(SHAPE.replace(**changes))


def child(work, rank, size, place, patience, environment, arguments):
    "Run in a forked process: meet the others, do the work, and leave what came of it in a file."
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)} | environment
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    value = error = None
    try:
        if not environment:
            dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=size, timeout=timedelta(seconds=patience))
        value = work(rank, *arguments)
    except BaseException as caught:
        expected = isinstance(caught, ParallelError | CheckpointWriteError | NonFiniteLossError | SystemExit)
        error = f"{type(caught).__name__}: {caught}" if expected else traceback.format_exc()
    Path(f"{place}.{rank}").write_bytes(pickle.dumps((value, error)))
    sys.stderr.flush()
    os._exit(0)


def share(room, work, *arguments, size=2, errors=False, patience=60, environment=None):
    "Let `size` processes do `work(rank, *arguments)`; return what each gave, or its error; None for one that was killed."
    import torch.distributed.fsdp  # noqa: F401  once, before the fork, and not in each process

    context, place = multiprocessing.get_context("fork"), room / f"meet-{time.monotonic_ns()}"
    processes = [context.Process(target=child, args=(work, rank, size, place, patience, environment or {}, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        process.kill()
    found = [Path(f"{place}.{rank}") for rank in range(size)]
    found = [pickle.loads(path.read_bytes()) if path.exists() else (None, None) for path in found]
    if not errors:
        assert [error for _, error in found] == [None] * size, "\n".join(str(error) for _, error in found)
    return [error if errors else value for value, error in found]


def losses_of(_, make, **more):
    "Return all numbers of a run that depend on the weights."
    trainer = make(**more)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        trainer.train()
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("eval_loss"), r.get("tokens")) for r in trainer.history.records]


def far(one, other):
    "Return the largest difference between two runs' numbers; steps and counts must be equal."
    assert [(a[0], a[4]) for a in one] == [(b[0], b[4]) for b in other] and [[x is None for x in a] for a in one] == [[x is None for x in b] for b in other]
    return max(abs(x - y) for a, b in zip(one, other) for x, y in zip(a[1:4], b[1:4]) if x is not None)


def float_run(**more):
    return Trainer(tiny(), train_data=IDS[:2500], eval_data=IDS[2500:], eval_steps=10, **SETTINGS | {"gradient_accumulation_steps": 2, "max_steps": 50} | more)


def ragged(**more):
    "Rows that count unequally many targets, batches of 1, 3 and 5 rows: not to be cut equally by anything."
    batches = []
    for rows in (3, 1, 5):
        inputs, targets = IDS[: rows * 16].reshape(rows, 16), IDS[1 : rows * 16 + 1].reshape(rows, 16).clone()
        targets[torch.rand(rows, 16, generator=torch.Generator().manual_seed(rows)) < 0.6] = -100
        batches.append((inputs, targets))
    return Trainer(tiny(), train_data=batches, eval_data=batches[1:2], eval_steps=3, **SETTINGS | more)


def qat(**more):
    return Trainer(tiny(), train_data=IDS[:2500], quantization_mode="qat", **SETTINGS | {"learning_rate": 1e-4} | more)


def static(**more):
    return qat(quantization_type="static", max_grad_norm=None, **more)


def learnt(**more):
    return qat(quantization_learned_scales=True, fake_quant_after_n_steps=2, **more)


def lora(**more):
    torch.manual_seed(0)
    return Trainer(apply_lora(tiny(), target_modules=["q_proj", "v_proj"]), train_data=IDS, **SETTINGS | more)


def lora_on_codes(**more):
    torch.manual_seed(0)
    return Trainer(apply_lora(quantize_model_ptq(tiny(), bits=4, group_size=16), target_modules=["q_proj"]), train_data=IDS, **SETTINGS | more)


def taught(**more):
    return Trainer(tiny(), teacher=tiny(1), train_data=IDS, distillation_weight=0.5, **SETTINGS | more)


def codes(**more):
    return Trainer(quantize_model_ptq(tiny()), train_data=IDS, enable_quantized_finetuning=True, **SETTINGS | {"learning_rate": 1e-4} | more)


def scales(**more):
    return codes(quantized_finetuning="scales", **more)


def named(**more):
    "A model of somebody else's, with keyword arguments and untied blocks."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    return Trainer(model, train_data=[(x, x[:, :3].argmax(-1))], label_smoothing=0.1, **SETTINGS | more)


RUNS = {"float": (float_run, 1e-5), "ragged": (ragged, 1e-5), "lora": (lora, 1e-5), "lora_on_codes": (lora_on_codes, 1e-5), "taught": (taught, 1e-5), "named": (named, 1e-5),
        "qat": (qat, 2e-4), "static": (static, 2e-4), "learnt": (learnt, 2e-4), "codes": (codes, 2e-3), "scales": (scales, 2e-4)}  # fmt: skip


def all_losses(rank, way):
    "Train every kind of model that a way to share knows."
    return {name: losses_of(rank, make, parallel=way) for name, (make, _) in RUNS.items() if way == "ddp" or name not in ("codes", "scales")}


@pytest.fixture(scope="module")
def alone():
    return {name: losses_of(0, make) for name, (make, _) in RUNS.items()}


@pytest.mark.parametrize("size, way", [(2, "ddp"), (2, "fsdp"), pytest.param(3, "ddp", marks=pytest.mark.slow), pytest.param(3, "fsdp", marks=pytest.mark.slow)])
def test_any_number_of_processes_computes_what_one_does(room, alone, size, way):
    for found in share(room, all_losses, way, size=size):
        assert len(found) == len(RUNS) - (0 if way == "ddp" else 2)
        for name, numbers in found.items():
            assert far(alone[name], numbers) < RUNS[name][1], name
    assert len(alone["float"]) == 55 and RUNS["float"][1] == 1e-5  # fifty steps and five evaluations


def saved_run(folder, name, way, stop=None, **more):
    trainer = Trainer(tiny(dropout=0.1), train_data=IDS[:2500], vocab={"of": "a test"}, output_dir=str(folder), run_name=name, parallel=way, **SETTINGS | more)
    trainer.callbacks.append(StopAt(stop)) if stop else None
    return trainer


class StopAt(Callback):
    def __init__(self, step, then=None):
        self.step, self.then = step, then

    def on_step_end(self, trainer):
        if trainer.step == self.step:
            self.then(trainer) if self.then else trainer.stop()


def weights(trainer):
    return {name: parallel._full(p.detach()).clone() for name, p in trainer.model.named_parameters()}


def stop_and_go(rank, folder):
    "With both ways: a whole run, one stopped halfway, and each one's first half taken up by both ways and on from one process's."
    found = {}
    for way in ("ddp", "fsdp"):
        whole, first = saved_run(folder, f"whole-{way}", way), saved_run(folder, way, way, stop=4)
        whole.train(), first.train()
        found["whole", way] = whole.history.losses, weights(whole)
        found["parts", way] = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in whole.model.parameters())
    for source in ("ddp", "fsdp", "single"):
        for way in ("ddp", "fsdp"):
            trainer = saved_run(folder, "unused", way)
            trainer.config = trainer.config.replace(output_dir=None)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                trainer.train(resume_from_checkpoint=folder / source / "step-0000000004")
            found[source, way] = trainer.history.losses, weights(trainer), [str(w.message) for w in told if "processes" in str(w.message)]
    return found


def test_a_run_is_resumed_on_another_number_of_processes_and_another_way(room):
    saved_run(room, "single", "ddp", stop=4, lr_scheduler_type="constant").train()
    first, second = share(room, stop_and_go, room)
    for way in ("ddp", "fsdp"):
        losses, tensors = first["whole", way]
        assert len(losses) == 8 and first[way, way][0] == losses == second[way, way][0]  # to the bit, dropout included
        assert all(torch.equal(first[way, way][1][name], t) for name, t in tensors.items())
        assert not first[way, way][2] and not second["single", way][2]
        assert first["single", way][2] == ["resume: processes 2 (saved: 1); the run goes on, but not to the last bit."]
    assert first["parts", "ddp"] == second["parts", "ddp"] == first["parts", "fsdp"] + second["parts", "fsdp"]
    assert first["ddp", "fsdp"][0] == pytest.approx(first["whole", "ddp"][0], abs=1e-5)
    assert first["fsdp", "ddp"][0] == pytest.approx(first["whole", "ddp"][0], abs=1e-5)
    for way in ("ddp", "fsdp"):  # and by one process
        report, loaded = verify_checkpoint(room / way / "step-0000000004"), load_checkpoint(room / way)
        assert report.ok and type(loaded.model) is TinyLM and loaded.step == 4 and loaded.vocab == {"of": "a test"}
        files, shards = set(verify_checkpoint(room / "single" / "step-0000000004").files), {f"shard-0000{n}-model-00001-of-00001.safetensors" for n in (1, 2)}
        assert set(report.files) == (files if way == "ddp" else files - {"model.pt"} | shards)
        alone = saved_run(room, way, "ddp")
        with pytest.warns(UserWarning, match="resume: processes 1 .saved: 2.; the run goes on"):
            alone.train(resume_from_checkpoint=True)
        assert alone.history.losses[:4] == first["whole", way][0][:4] and len(alone.history.losses) == 8
        assert [r["step"] for r in read_jsonl(room / way / "history.jsonl")] == list(range(1, 9))
        assert sorted(os.listdir(room / way)) == [".lock", "history.jsonl", "latest", "step-0000000004", "step-0000000008"]


def test_without_dropout_a_resumed_run_has_the_losses_of_one_process(room):
    whole = Trainer(tiny(), train_data=IDS[:2500], **SETTINGS).train().losses
    def halves(rank):
        for way in ("ddp", "fsdp"):
            Trainer(tiny(), train_data=IDS[:2500], output_dir=str(room), run_name=way, parallel=way, callbacks=[StopAt(4)], **SETTINGS).train()
    share(room, halves)
    for way in ("ddp", "fsdp"):
        with pytest.warns(UserWarning, match="processes 1"):
            again = Trainer(tiny(1), train_data=IDS[:2500], output_dir=str(room), run_name=way, **SETTINGS).train(resume_from_checkpoint=True).losses
        assert again == pytest.approx(whole, abs=1e-5)


class Picky(nn.Module):
    "Gives NaN for rows with a large number, or a NaN gradient, when told to."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.norm = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), nn.BatchNorm1d(4)

    def forward(self, x):
        y = self.net(self.norm(x))
        return torch.where(x[:, :1] > 50, torch.nan, y)


def accidents(rank):
    "What goes wrong on one process, or differs between them, is found by both."
    found, x, y = {}, torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2] * 2)
    bad = x.clone()
    bad[5] = 99.0  # among the second process's rows
    for way in ("ddp", "fsdp"):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trainer = Trainer(Picky(), train_data=[(x, y)], parallel=way, **SETTINGS)
        found[way, "warned"] = [str(w.message) for w in told if "batch norm" in str(w.message)]
        trainer.training_step((x, y))
        before, buffers = weights(trainer), {n: b.clone() for n, b in trainer.model.named_buffers()}
        with pytest.raises(NonFiniteLossError, match="step 2: loss is not finite") as caught:
            trainer.training_step((bad, y))
        found[way, "refused"] = str(caught.value)
        assert all(torch.equal(a, before[n]) for n, a in weights(trainer).items()) and all(torch.equal(b, buffers[n]) for n, b in trainer.model.named_buffers())
        found[way, "goes on"] = trainer.training_step((x, y))
        found[way, "buffers"] = [b.tolist() for b in trainer.model.buffers()]
        trainer = Trainer(tiny(), parallel=way, **SETTINGS)
        with pytest.raises(ModelInputError):  # in the middle of a forward pass
            trainer.training_step(torch.full((4, 9), 99))
        found[way, "goes on again"] = trainer.training_step(IDS[:36].reshape(4, 9))
    for name, make in {
        "unused": lambda: Trainer(nn.ModuleDict({"net": nn.Linear(4, 3), "spare": nn.Linear(2, 2)}), **SETTINGS),
        "model": lambda: Trainer(nn.Linear(4, 3 + rank), **SETTINGS),
        "data": lambda: Trainer(tiny(), train_data=IDS[rank:], **SETTINGS).train(),
        "scalar": lambda: Trainer(tiny(), quantization_mode="qat", quantization_type="static", quantization_learned_scales=True, train_data=IDS, parallel="fsdp", **SETTINGS),
        "codes": lambda: Trainer(quantize_model_ptq(tiny()), enable_quantized_finetuning=True, parallel="fsdp", **SETTINGS),
        "backward": lambda: Trainer(quantize_model_ptq(tiny()), enable_quantized_finetuning=True, gradients_in_backward=True, max_grad_norm=None, **SETTINGS),
    }.items():
        with pytest.raises(ParallelError) as caught:
            trainer = make()
            trainer.model.forward = lambda x, net=trainer.model: net["net"](x)
            trainer.training_step((x, y))
        found[name] = str(caught.value)
    return found


def test_accidents_on_one_process_are_found_by_all(room):
    first, second = share(room, accidents)
    assert first["ddp", "warned"] == ["norm: batch norm sees the rows of its own process only; the losses are not those of one process."]
    for name, told in {
        "unused": "spare.weight: got no gradient; expected one for each parameter with parallel: ddp.",
        "model": "model: not the same on all 2 processes; expected the same.",
        "data": "train_data: not the same on all 2 processes; expected the same.",
        "scalar": "parallel: fsdp cannot cut ",
        "codes": "enable_quantized_finetuning: set, with 2 processes and parallel: fsdp; expected floats",
        "backward": "gradients_in_backward: set, with 2 processes and parallel: ddp; expected gradients",
    }.items():
        assert first[name].startswith(told) and first[name] == second[name] and len(first[name]) < 300 and "\n" not in first[name]
    for way in ("ddp", "fsdp"):
        for name in ("refused", "goes on", "buffers", "goes on again"):
            assert first[way, name] == second[way, name]
        assert second[way, "warned"] == []


def ends(rank, folder, way):
    "Three ends: a signal that one process gets, saves that fail, and a process that is gone."
    found = {}
    term = StopAt(3, lambda trainer: rank == 1 and os.kill(os.getpid(), signal.SIGTERM))
    trainer = Trainer(tiny(), train_data=IDS, output_dir=str(folder), run_name=f"term-{way}", parallel=way, callbacks=[term], **SETTINGS)
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    found["signal"] = caught.value.code, trainer.step
    (folder / "file").touch() if rank == 0 else None
    warned = Trainer(tiny(), train_data=IDS, output_dir=str(folder / "file"), on_save_error="warn", parallel=way, **SETTINGS)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found["forgiven"] = [warned.save(), warned.save()]
        found["told"] = [str(w.message) for w in told if "not saved" in str(w.message)]
    with pytest.raises((CheckpointWriteError, ParallelError)) as caught:
        warned.save()
    found["third"] = f"{type(caught.value).__name__}: {caught.value}"
    gone = StopAt(5, lambda trainer: rank == 1 and os.kill(os.getpid(), signal.SIGKILL))
    trainer = Trainer(tiny(), train_data=IDS, output_dir=str(folder), run_name=f"gone-{way}", save_steps=2, parallel=way, callbacks=[gone], **SETTINGS)
    start = time.monotonic()
    (folder / f"found-{way}.{rank}").write_bytes(pickle.dumps(found))
    try:
        trainer.train()
    finally:
        (folder / f"waited-{way}").write_text(str(time.monotonic() - start))


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_no_end_leaves_a_process_waiting(room, way):
    errors = share(room, ends, room, way, errors=True)
    first, second = (pickle.loads((room / f"found-{way}.{rank}").read_bytes()) for rank in (0, 1))
    assert first["signal"] == second["signal"] == (143, 3) and os.path.isdir(room / f"term-{way}" / "step-0000000003")
    assert first["forgiven"] == second["forgiven"] == [None, None] and len(first["told"]) == 2
    assert first["third"].startswith("CheckpointWriteError: ") and second["third"] == "ParallelError: step 0: process 0 could not save, and says why."
    told = "ParallelError: process 0 of 2: another process is gone; expected all 2. Resume from the newest checkpoint; torchrun --max-restarts does it by itself."
    assert errors == [told, None] and float((room / f"waited-{way}").read_text()) < 30
    newest = {"ddp": 5, "fsdp": 4}[way]  # what process 0 has is whole, or it is not
    assert sorted(p.name for p in (room / f"gone-{way}").glob("step-*"))[-1] == f"step-{newest:010d}" and load_checkpoint(room / f"gone-{way}").step == newest


def test_a_process_that_hangs_is_given_up_on(room):
    def stuck(rank):
        trainer = Trainer(tiny(), train_data=IDS, callbacks=[StopAt(2, lambda trainer: time.sleep(8 * rank))], **SETTINGS)
        trainer.train()

    errors = share(room, stuck, errors=True, patience=3)
    assert errors[0].startswith("ParallelError: process 0 of 2: another process is silent for too long; expected all 2.")


def test_a_new_start_does_not_call_those_of_the_last(room, monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun keeps one over all starts
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    monkeypatch.setattr(parallel, "_PATIENCE", timedelta(seconds=15))

    def join(rank, attempt):
        world = parallel.join_world("cpu")
        return world.size, world.restarts, world.sum(rank)

    for attempt in range(5):  # one alone would find the dead only now and then
        assert share(room, join, attempt, environment=environment | {"TORCHELASTIC_RESTART_COUNT": str(attempt)}) == [(2, attempt, 1)] * 2


PROGRAM = textwrap.dedent(
    """
    import os, signal, sys, time, torch
    from qtlm import TinyLM, Trainer
    from qtlm.history import Callback

    class Accident(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 5 and trainer.world.rank == 1 and trainer.world.restarts == 0 and sys.argv[2] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if sys.argv[2] == "wait":
                time.sleep(0.02)

    torch.manual_seed(int(os.environ["RANK"]))
    model = TinyLM(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, block_size=16)
    ids = torch.arange(600) % 31
    steps = 8 if sys.argv[2] == "kill" else 10**6
    trainer = Trainer(model, train_data=ids, batch_size=4, max_steps=steps, save_steps=3 if sys.argv[2] == "kill" else None, output_dir=sys.argv[1], callbacks=[Accident()],
                      parallel=sys.argv[3], device="cpu")
    trainer.train()
    print(f"process {trainer.world.rank} restarts {trainer.world.restarts}\\n", end="", flush=True)
    """
)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]


def test_torchrun_starts_again_what_was_killed(room):
    (room / "program.py").write_text(PROGRAM)
    done = subprocess.run([*TORCHRUN, "program.py", "runs", "kill", "fsdp"], cwd=room, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["process 0 restarts 1", "process 1 restarts 1"]
    assert done.stderr.count("train: step 8/8") == 1  # progress: of one process
    records = read_jsonl(room / "runs" / "run" / "history.jsonl")
    assert [r["step"] for r in records] == list(range(1, 9)) and records[4]["loss"] > 0
    torch.manual_seed(0)
    whole = Trainer(TinyLM(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, block_size=16), train_data=torch.arange(600) % 31, batch_size=4, max_steps=8, progress=False).train()
    assert [r["loss"] for r in records] == pytest.approx(whole.losses, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_sigterm_to_torchrun_saves_once_and_stops(room, way):
    (room / "program.py").write_text(PROGRAM)
    running = subprocess.Popen([*TORCHRUN, "program.py", "runs", "wait", way], cwd=room, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while len(read_jsonl(room / "runs" / "run" / "history.jsonl")) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    out, told = running.communicate(timeout=120)
    steps = sorted((room / "runs" / "run").glob("step-*"))
    assert running.returncode and len(steps) == 1 and "ParallelError" not in told and "process" not in out
    records = read_jsonl(room / "runs" / "run" / "history.jsonl")
    assert load_checkpoint(steps[0]).step == records[-1]["step"] >= 3


@pytest.mark.slow
def test_the_command_trains_under_torchrun(room):
    (room / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 300)
    settings = ["text=text.txt", "max_steps=6", "batch_size=3", "block_size=32", "model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2", "eval_steps=3"]
    losses = {}
    for name, start in {"one": [sys.executable], "two": TORCHRUN}.items():
        done = subprocess.run([*start, "-m", "qtlm", "train", *settings, f"run_name={name}"], cwd=room, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        losses[name] = [r.get("loss", r.get("eval_loss")) for r in read_jsonl(room / "checkpoints" / name / "history.jsonl")]
        assert done.stdout.count(f"checkpoints/{name}: step 6, held-out loss") == 1, done.stdout
    assert len(losses["one"]) == 8 and losses["two"] == pytest.approx(losses["one"], abs=1e-5)
