# python -m pytest tests/test_checkpoint.py
"""Checkpoints under faults: killed at every operation, errors of the system at every operation, damaged, hostile, and of the wrong kind.

All directories lie on a memory disk where there is one: what is tested is the order of operations, not the hardware.
"""
import errno
import io
import json
import os
import pickle
import random
import shutil
import struct
import sys
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from qtlm import storage
from qtlm.checkpoint import (
    CheckpointBusyError,
    CheckpointCorruptedError,
    CheckpointError,
    CheckpointIncompleteError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointUnsafeError,
    CheckpointVersionError,
    CheckpointWarning,
    CheckpointWriteError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from qtlm.config import ModelConfig, TrainingConfig
from qtlm.data import BPEVocab, ByteVocab
from qtlm.model import TinyLM
from qtlm.quantization import get_quantization_info, quantize_model_ptq

ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES", "EMFILE")
LEFTOVERS = (".tmp-", ".del-")
warnings.filterwarnings("ignore", "This process", DeprecationWarning)  # newer Pythons warn of forks


def net(value=0.5):
    "A small model, every weight of which says which one it is."
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    return model


def trained(value=0.5, kind=torch.optim.AdamW, **options):
    "A model and an optimizer that has made one step."
    model = net(value)
    optimizer = kind(model.parameters(), lr=1e-2, **options)
    model(torch.ones(2, 8)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def lm(**fields):
    "A tiny language model, always the same."
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, block_size=32) | fields
    return TinyLM(ModelConfig(**shape), generator=torch.Generator().manual_seed(0))


class Parts:
    "Something with a state, as a trainer is."
    def __init__(self, **state): self.state = state
    def state_dict(self): return dict(self.state)
    def load_state_dict(self, state): self.state = dict(state)


def bits(*things):
    "Everything in models, optimizers and trainers, as bytes."
    return [storage.to_pt({n: t for n, t in x.state_dict().items()}) for x in things]


def fails(use, *args, **kwargs):
    "The class of the error that `use` raises, None where it succeeds."
    try:
        use(*args, **kwargs)
    except Exception as e:
        return type(e)


def leftovers(run): return [p.name for p in run.iterdir() if p.name.startswith(LEFTOVERS) or ".old-" in p.name]


# ---- killed, and the system's errors ----

class Recorder:
    "A disk that notes each operation and can fail at one of them."
    def __init__(self, at=None, fault=None): self.disk, self.at, self.fault, self.log = storage._Disk(), at, fault, []

    def __getattr__(self, name):
        def operation(*args):
            self.log.append(name)
            if len(self.log) - 1 == self.at: self.fault(self.disk, name, args)
            return getattr(self.disk, name)(*args)
        return operation


def clean(disk, name, args): os._exit(9)


def torn(disk, name, args):
    if name == "write": disk.write(args[0], args[1][:len(args[1]) // 2])
    os._exit(9)


def in_child(work):
    "Run `work` in a child process and return its exit status."
    child = os.fork()
    if child: return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        torch.set_num_threads(1)
        work()
        os._exit(0)
    finally:
        os._exit(1)


def operations(monkeypatch, work):
    "How many operations `work` does."
    recorder = Recorder()
    monkeypatch.setattr(storage, "_disk", recorder)
    work()
    monkeypatch.undo()
    return len(recorder.log)


@pytest.mark.parametrize("fault", [clean, torn])
@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step again"])
def test_killed_at_every_operation(room, monkeypatch, fault, again):
    "C2: something sound is there after each, never older than what was acknowledged; the next save works and clears up."
    (old, old_optimizer), (new, new_optimizer) = trained(0.25), trained(0.5)
    step = 1 if again else 2

    def prepare(run): save_checkpoint(old, old_optimizer, {"v": 0}, ["a"], 1, run)
    def save(run): save_checkpoint(new, new_optimizer, {"v": 1}, ["a"], step, run, save_total_limit=1)
    prepare(room / "count")
    total = operations(monkeypatch, lambda: save(room / "count"))
    assert total > 30, "the save does too few operations for this test to mean anything"
    seen = Counter()
    for at in range(total):
        run = room / f"{at}"
        prepare(run)
        monkeypatch.setattr(storage, "_disk", Recorder(at, fault))
        assert in_child(lambda run=run: save(run)) == 9
        monkeypatch.undo()
        ckpt = load_checkpoint(run, net())
        seen[(ckpt.step, ckpt.config["v"])] += 1
        assert torch.equal(ckpt.model[0].weight, (new if ckpt.config["v"] else old)[0].weight)
        save_checkpoint(old, old_optimizer, {"v": 2}, ["a"], 3, run)
        assert load_checkpoint(run, net()).step == 3 and leftovers(run) == []
        shutil.rmtree(run)
    assert set(seen) == {(1, 0), (step, 1)} and seen.total() == total and seen[(step, 1)] >= 5


def test_an_error_of_the_system_at_every_operation(room, monkeypatch):
    "E1: a CheckpointWriteError with the errno, or after the commit a warning; the old checkpoint loads; nothing is left lying about."
    (old, old_optimizer), (new, new_optimizer) = trained(0.25), trained(0.5)
    run = room / "run"
    save_checkpoint(old, old_optimizer, step=1, path=run)
    total = operations(monkeypatch, lambda: save_checkpoint(new, new_optimizer, step=2, path=run, save_total_limit=1))
    outcomes = Counter()
    for name in ERRORS:
        for at in range(total):
            def fault(disk, operation, args, number=getattr(errno, name)): raise OSError(number, os.strerror(number))
            shutil.rmtree(run)
            save_checkpoint(old, old_optimizer, step=1, path=run)
            recorder = Recorder(at, fault)
            monkeypatch.setattr(storage, "_disk", recorder)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                kind = fails(save_checkpoint, new, new_optimizer, step=2, path=run, save_total_limit=1)
            monkeypatch.undo()
            outcomes[kind.__name__ if kind else "warned" if caught else "silent"] += 1
            after = recorder.log[at + 1:]
            if kind: assert not {"fsync", "write", "fsync_dir"} & set(after), f"{recorder.log[at]} failed, and then: {after}"
            assert load_checkpoint(run, net()).step in (1, 2)
            assert not [n for n in leftovers(run) if n.startswith(".tmp-")]
    assert set(outcomes) <= {"CheckpointWriteError", "warned", "silent"} and outcomes.total() == total * len(ERRORS) > 150
    assert outcomes["CheckpointWriteError"] > 100 and outcomes["warned"] >= 6 * 4
    assert outcomes["silent"] <= 6, "only the removal of a replaced directory may fail in silence: the next save removes it"


def test_write_errors_name_the_errno(room, monkeypatch):
    "ENOSPC in the middle, a disk without room before anything is written, a file where the run should be, a directory without permission."
    model = net()
    def full(disk, name, args): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(storage, "_disk", Recorder(8, full))
    with pytest.raises(CheckpointWriteError, match=r"step-0000000000: not saved: No space left on device \(ENOSPC\)") as e:
        save_checkpoint(model, path=room / "run")
    monkeypatch.undo()
    assert e.value.errno == errno.ENOSPC and e.value.step == 0 and leftovers(room / "run") == []
    monkeypatch.setattr(storage.os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 9, 0, 0, 9, 9, 9, 0, 255)))
    with pytest.raises(CheckpointWriteError, match="0.0 MB free; expected .* MB. Free some space"): save_checkpoint(model, path=room / "run")
    monkeypatch.undo()
    (room / "file").write_text("")
    with pytest.raises(CheckpointWriteError, match="ENOTDIR|EEXIST"): save_checkpoint(model, path=room / "file")
    with pytest.raises(CheckpointWriteError, match="ENAMETOOLONG"): save_checkpoint(model, path=room / ("x" * 300))


def test_interrupted_by_an_exception(room, monkeypatch):
    "Ctrl-C at each operation: it comes through, and nothing unsound is left."
    model, optimizer = trained()
    save_checkpoint(model, optimizer, step=1, path=room / "count")
    total = operations(monkeypatch, lambda: save_checkpoint(model, optimizer, step=2, path=room / "count"))
    assert total > 20
    for at in range(total):
        def interrupt(disk, name, args): raise KeyboardInterrupt
        run = room / str(at)
        save_checkpoint(model, optimizer, step=1, path=run)
        monkeypatch.setattr(storage, "_disk", Recorder(at, interrupt))
        assert fails_hard(lambda run=run: save_checkpoint(model, optimizer, step=2, path=run)) is KeyboardInterrupt
        monkeypatch.undo()
        assert load_checkpoint(run, net()).step in (1, 2)
        save_checkpoint(model, optimizer, step=3, path=run)
        assert leftovers(run) == []


def fails_hard(work):
    try: work()
    except BaseException as e: return type(e)


def test_every_file_is_certain_before_it_is_visible(room, monkeypatch):
    "C4: each file is synced after its last write, the directory after its files, then the rename, then the run."
    recorder = Recorder()
    monkeypatch.setattr(storage, "_disk", recorder)
    save_checkpoint(*trained(), {"a": 1}, ["a"], path=room / "run")
    monkeypatch.undo()
    files = 7  # model, optimizer, config, vocab, metadata, manifest, COMMITTED
    expected = ["mkdir", "fsync_dir", "open", "mkdir"] + ["open", "write", "fsync"] * files + ["fsync_dir", "rename", "fsync_dir"]
    assert recorder.log == expected + ["open", "write", "fsync", "rename"]  # the last line: the hint


def test_two_writers_and_a_reader(room):
    "F1: nothing mixed, nothing half."
    run, children = room / "run", []
    save_checkpoint(net(0.0), step=0, path=run)
    for who in (1, 2):
        child = os.fork()
        if not child:
            try:
                for i in range(12): save_checkpoint(net(who), config={"who": who}, step=1 + i, path=run)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    loads, status = 0, []
    while children:
        ckpt = load_checkpoint(run, net())
        assert ckpt.step == 0 or torch.equal(ckpt.model[0].weight, torch.full((16, 8), float(ckpt.config["who"])))
        loads += 1
        for child in list(children):
            if (done := os.waitpid(child, os.WNOHANG))[0]:
                children.remove(child)
                status.append(done[1])
    assert status == [0, 0] and loads > 3
    assert all(verify_checkpoint(path).ok for path in run.glob("step-*")) and leftovers(run) == []


def test_a_reader_while_steps_go(room):
    "F2: with one step kept, the step that a reader has found may be gone when it opens it: it looks again."
    save_checkpoint(net(0.0), step=0, path=room)
    child = os.fork()
    if not child:
        try:
            for step in range(1, 40): save_checkpoint(net(step), step=step, path=room, save_total_limit=1)
            os._exit(0)
        finally:
            os._exit(1)
    steps, done = [], (0, 0)
    while not done[0]:
        done = os.waitpid(child, os.WNOHANG)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            ckpt = load_checkpoint(room, net())
        assert ckpt.model[0].weight[0, 0] == ckpt.step
        steps.append(ckpt.step)
    assert done[1] == 0 and steps == sorted(steps) and len(set(steps)) > 3


def test_a_step_that_goes_while_it_is_read(room):
    "The same, at the very moment: the only step is replaced by another between the listing and the reading."
    save_checkpoint(net(), step=1, path=room)

    def use(path):
        if path.name.endswith("1"): save_checkpoint(net(), step=2, path=room, save_total_limit=1)
        return storage.read_step(path)
    assert storage.newest_sound(room, use).step == 2


def test_a_busy_run_says_who(room):
    save_checkpoint(net(), path=room)
    with storage._locked(room, 0), pytest.raises(CheckpointBusyError, match=f"process {os.getpid()}"):
        save_checkpoint(net(), step=1, path=room, timeout=0.0)


# ---- damaged ----

def damage(rng, files, other):
    "Change `files` ({name: bytes}) in one of ten ways and return the way."
    kind = rng.choice(["bit", "byte", "truncate", "append", "insert", "zero", "swap", "delete", "extra", "foreign"])
    name = rng.choice(sorted(files))
    data = bytearray(files[name])
    at = rng.randrange(len(data))
    if kind == "bit": data[at] ^= 1 << rng.randrange(8)
    if kind == "byte": data[at] ^= rng.randrange(1, 256)
    if kind == "truncate": del data[at:]
    if kind == "append": data += rng.randbytes(rng.randrange(1, 50))
    if kind == "insert": data[at:at] = rng.randbytes(1)
    if kind == "zero": data[at:at + 512] = bytes(len(data[at:at + 512]))
    if kind == "swap":
        half = len(data) // 2
        data = data[half:] + data[:half]
    if kind == "delete": del files[name]
    elif kind == "extra": files[rng.choice(["notes.txt", ".DS_Store", "model2.pt"])] = b"x"
    elif kind == "foreign" and name in other: files[name] = other[name]
    else: files[name] = bytes(data)
    return kind


def test_the_harness_sees_what_torch_does_not():
    "D6: the same flips in a bare file load in silence: the corruptions are real."
    buffer = io.BytesIO()
    torch.save({"w": torch.linspace(0, 1, 8192)}, buffer)
    good, silent = buffer.getvalue(), 0
    places = range(1, len(good), len(good) // 300)
    for i in places:
        try: silent += not torch.equal(torch.load(io.BytesIO(good[:i] + bytes([good[i] ^ 4]) + good[i + 1:]), weights_only=True)["w"],
                                       torch.linspace(0, 1, 8192))
        except Exception: pass
    assert silent > 0.9 * len(places)


@pytest.mark.parametrize("ways", [1, 2, 3])
def test_the_newest_sound_step_is_taken(room, ways):
    "D4: each one skipped is named with its reason; if none is left, one error lists all."
    for step in range(4): save_checkpoint(net(step), step=step, path=room)
    for step in range(4 - ways, 4): (room / f"step-{step:010d}/model.pt").write_bytes(b"?")
    with pytest.warns(CheckpointWarning) as caught: assert load_checkpoint(room, net()).step == 3 - ways
    assert [f"step-{3 - i:010d}/model.pt: corrupted: 1 bytes" in str(w.message) for i, w in enumerate(caught)] == [True] * ways
    with pytest.warns(CheckpointWarning): assert latest_checkpoint(room) == room / f"step-{3 - ways:010d}"
    for step in range(4): (room / f"step-{step:010d}/model.pt").unlink(missing_ok=True)
    with pytest.raises(CheckpointCorruptedError, match="4 steps, none sound .step-0000000003: model.pt .*step-0000000000: model.pt"):
        load_checkpoint(room, net())
    with pytest.raises(CheckpointCorruptedError): latest_checkpoint(room)  # not None: this is no fresh start


def test_hints_and_clocks_are_not_asked(room):
    "F3, F4: `latest` in every wrong way, and times of change in any order: the highest sound number."
    for step in (1, 2, 30): save_checkpoint(net(step), step=step, path=room)
    for i, step in enumerate((30, 1, 2)): os.utime(room / f"step-{step:010d}", (i * 10**9, i * 10**9))
    for text in (None, b"", b"step-0000000001\n", b"../x", b"step-9999999999", b"\xff\x00", b"step-0000000002"):
        (room / "latest").unlink(missing_ok=True)
        if text is not None: (room / "latest").write_bytes(text)
        assert load_checkpoint(room, net()).step == 30
    (room / "latest").unlink()
    (room / "latest").mkdir()
    with pytest.warns(CheckpointWarning, match="tidying up failed"): save_checkpoint(net(), step=31, path=room)
    assert latest_checkpoint(room).name == "step-0000000031" and leftovers(room) == []


@pytest.mark.parametrize("trials", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_retention_keeps_what_it_must(room, trials):
    "F5: over random runs: the newest k sound ones, the best, the one just saved; what is damaged is neither counted nor removed."
    seed = 1
    rng = random.Random(seed)
    for trial in range(trials):
        run, sound, best, damaged = room / str(trial), set(), None, set()
        for _ in range(rng.randrange(3, 9)):
            step, limit, is_best = rng.randrange(12), rng.choice([None, 0, 1, 2, 3]), rng.random() < 0.3
            save_checkpoint(net(), step=step, path=run, save_total_limit=limit, best=is_best)
            best = step if is_best else best
            sound, damaged = sound | {step}, damaged - {step}
            if limit: sound = {*sorted(sound)[-limit:], step} | ({best} & sound)
            if len(sound) > 1 and rng.random() < 0.3:
                victim = rng.choice(sorted(sound - {step}))
                (run / f"step-{victim:010d}/COMMITTED").unlink()
                sound, damaged = sound - {victim}, damaged | {victim}
            assert {int(p.name[5:]) for p in run.glob("step-*")} == sound | damaged, f"seed {seed}, trial {trial}"
        shutil.rmtree(run)


def test_the_error_says_what_the_file_looks_like(room):
    "Plain directories: a web page, a pointer, an empty file, half a file, a flipped bit (by the archive's own checksum)."
    (room / "plain").mkdir()
    path = room / "plain/model.pt"
    torch.save(net().state_dict(), path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(struct.pack("<f", 0.5) * 4)] ^= 1
    for data, said in ((b"<html>", "a web page"), (b"version https://git-lfs.github.com/spec/v1", "git-LFS"), (b"", "empty"),
                       (whole[:len(whole) // 2], "a damaged archive"), (bytes(flipped), "fails its CRC")):
        path.write_bytes(data)
        with pytest.raises(CheckpointCorruptedError, match=f"model.pt: corrupted: .*{said}"): load_checkpoint(room / "plain", net())


# ---- hostile ----

class Bomb:
    "Pickles as a call of anything."
    def __init__(self, *call): self.call = call
    def __reduce__(self): return self.call


def archive(program, root="archive", extra=(), **options):
    "A `.pt` file with the pickle `program` in it."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as z:
        for name, data in ((f"{root}/data.pkl", program), (f"{root}/byteorder", b"little"), (f"{root}/version", b"3\n"), *extra): z.writestr(name, data)
    return buffer.getvalue()


def payloads(canary):
    "Programs that would make the directory `canary`, by every opcode that can name or call something."
    mkdir, where = b"cposix\nmkdir\n", b"V" + str(canary).encode() + b"\n"
    yield from (pickle.dumps({"w": Bomb(os.mkdir, (str(canary),))}, protocol) for protocol in range(6))
    yield pickle.dumps(Bomb(eval, (f"__import__('os').mkdir({str(canary)!r})",)), 2)
    yield pickle.dumps(Bomb(exec, (f"import os; os.mkdir({str(canary)!r})",)), 2)
    yield pickle.dumps([[{"a": (Bomb(os.system, (f"mkdir {canary}",)),)}]], 2)
    yield pickle.dumps(Bomb(getattr, (os, "mkdir")) if False else Bomb(__import__, ("os",)), 2)
    yield b"\x80\x02" + mkdir + where + b"\x85R."  # GLOBAL, REDUCE
    yield b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93" + where + b"\x85R."  # STACK_GLOBAL
    yield b"(" + where + b"iposix\nmkdir\n."  # INST
    yield b"(" + mkdir + where + b"o."  # OBJ
    yield b"\x80\x02" + mkdir + where + b"\x85\x81."  # NEWOBJ
    yield b"\x80\x02" + mkdir + where + b"\x85}\x92."  # NEWOBJ_EX
    yield b"\x80\x02\x82\x01."  # EXT1
    yield b"\x80\x02\x83\x01\x00."  # EXT2
    yield b"Pposix\n."  # PERSID
    yield b"\x80\x02}" + b"\x8c\x01a" + mkdir + b"s."  # a function as a value
    yield b"\x80\x02ctorch.serialization\nload\n."  # torch's own names that torch would trust or not
    yield b"\x80\x02ctorch\nload\n" + where + b"\x85R."
    yield b"\x80\x02ccollections\nnamedtuple\n."
    yield b"\x80\x02cbuiltins\ngetattr\n."
    yield b"\x80\x02cnumpy._core.multiarray\n_reconstruct\n."
    yield b"\x80\x05\x95\x05\x00\x00\x00\x00\x00\x00\x00N."  # frames are not written by protocol 2
    yield b"\x80\x02" + b"\x8d" + struct.pack("<Q", 1) + b"a."  # BINUNICODE8
    yield b"\x80\x02\x97."  # NEXT_BUFFER


def test_no_program_runs(room):
    "S1: in every `.pt` file, sealed (as by an attacker) and plain: refused before torch is asked, and nothing happens."
    canary, count = room / "executed", Counter()
    step_dir = save_checkpoint(*trained(), path=room / "run", trainer=Parts(a=1))
    raw = storage.read_step(step_dir).files
    for i, program in enumerate(payloads(canary)):
        for name in ("model.pt", "optimizer.pt", "training_state.pt"):
            hostile = storage.publish_step(room / f"{i}-{name}", 0, raw | {name: archive(program)})
            count[fails(load_checkpoint, hostile, net())] += 1
            assert not verify_checkpoint(hostile).ok
        (room / "bare.pt").write_bytes(archive(program))
        count[fails(load_checkpoint, room / "bare.pt", net())] += 1
    assert set(count) == {CheckpointUnsafeError} and count.total() >= 4 * 28 and not canary.exists()


def test_other_files_that_run_programs(room):
    "Bare pickles, tar files, TorchScript, whole modules."
    class Old(nn.Module):
        def forward(self, x): return x
    legacy, script, module = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(net().state_dict(), legacy, _use_new_zipfile_serialization=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Old()), script)
    torch.save(net(), module)
    tar = bytearray(1024)
    tar[257:262] = b"ustar"
    for data in (legacy.getvalue(), script.getvalue(), module.getvalue(), bytes(tar), pickle.dumps({})):
        (room / "x.pt").write_bytes(data)
        with pytest.raises(CheckpointUnsafeError) as e: load_checkpoint(room / "x.pt", net())
        assert "weights_only" not in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) <= 300


def fillers():
    "Files that are small and would become large, deep or endless."
    def saved(value):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()
    deep, cycle, laughs = [], [], ["ha"]
    for _ in range(2000): deep = [deep]
    cycle.append(cycle)
    for _ in range(30): laughs = [laughs] * 10
    tensor = zipfile.ZipFile(io.BytesIO(saved({"w": torch.randn(1000)})))
    records = [(n, tensor.read(n)) for n in tensor.namelist()]
    squeezed, twice = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in records: z.writestr(name, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(twice, "w") as z:
            for name, data in records + records[-1:]: z.writestr(name, data)
    old = sys.getrecursionlimit()
    sys.setrecursionlimit(10**5)
    try: files = [saved(x) for x in (torch.zeros(1).expand(10**6, 10**6), {"a": deep}, {"a": cycle}, {"a": laughs})]
    finally: sys.setrecursionlimit(old)
    files += [squeezed.getvalue(), twice.getvalue(), archive(b"N.", root="a", extra=[("b/data/0", b"")]), archive(b"N.", root=""),
              archive(b"N.", extra=[("archive/constants.pkl", b"N.")]), archive(b"N.", extra=[("archive/../../x", b"")])]
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in records: z.writestr(name, bytes(1 << 28) if "data/" in name and name.endswith("/0") else data)
    return [*files, bomb.getvalue()]


def test_files_that_fill_the_memory(room):
    "S2: compression, tensors that show more than they hold, depth, cycles, references by the thousand, records twice or overlapping: refused for less than a second and 200 MB."
    files = fillers()
    assert len(files) == 11 and max(map(len, files)) < 1 << 20

    def refused(path):
        def status(key): return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)) / 1024
        before, start = status("VmRSS"), time.process_time()
        assert fails(load_checkpoint, path, net()) is CheckpointUnsafeError
        assert time.process_time() - start < 1 and status("VmHWM") - before < 200

    for i, data in enumerate(files):
        (room / "x.pt").write_bytes(data)
        if os.path.exists("/proc/self/status"): assert in_child(lambda: refused(room / "x.pt")) == 0, i
        assert fails(load_checkpoint, room / "x.pt", net()) is CheckpointUnsafeError, i


def test_what_is_not_a_file(room):
    "S3: links, pipes, sockets, directories in place of each file; unheard-of names in the manifest. Nothing outside is opened."
    import socket
    step_dir = save_checkpoint(net(), path=room / "run")
    (room / "outside").write_bytes((step_dir / "model.pt").read_bytes())
    def unix_socket(path):
        with socket.socket(socket.AF_UNIX) as s: s.bind(str(path))
    for name in sorted(os.listdir(step_dir)):
        data = (step_dir / name).read_bytes()
        for make in (os.mkfifo, os.mkdir, unix_socket, lambda p: os.symlink(room / "outside", p), lambda p: os.symlink("/dev/zero", p)):
            (step_dir / name).unlink()
            make(step_dir / name)
            assert fails(load_checkpoint, step_dir, net()) is CheckpointUnsafeError
            storage._disk.remove(step_dir / name)
            (step_dir / name).write_bytes(data)
    manifest = json.loads((step_dir / "manifest.json").read_bytes())
    for name in ("../outside", "/etc/passwd", "a\0b", "x" * 300, "C:\\x", "COM1", "MODEL.PT", "\u202ept.model", "", "."):
        forged = storage.to_json(manifest | {"files": manifest["files"] | {name: manifest["files"]["model.pt"]}})
        (step_dir / "manifest.json").write_bytes(forged)
        (step_dir / "COMMITTED").write_text(storage._sha256(forged) + "\n")
        with pytest.raises(CheckpointUnsafeError) as e: load_checkpoint(step_dir, net())
        assert str(e.value).isprintable()
    run = room / "linked"
    run.symlink_to(room / "run")  # the run itself may be reached through a link
    (step_dir / "manifest.json").write_bytes(storage.to_json(manifest))
    (step_dir / "COMMITTED").write_text(storage._sha256(storage.to_json(manifest)) + "\n")
    assert load_checkpoint(run, net()).step == 0


@pytest.mark.parametrize("version", [0, -1, 3, 99, "1", 1.0, True, None])
def test_versions(room, version):
    "V2: only the integer 1; a newer one is not skipped in favour of an older step."
    save_checkpoint(net(), step=1, path=room)
    step_dir = save_checkpoint(net(), step=2, path=room)
    forged = storage.to_json(json.loads((step_dir / "manifest.json").read_bytes()) | {"format_version": version})
    (step_dir / "manifest.json").write_bytes(forged)
    (step_dir / "COMMITTED").write_text(storage._sha256(forged) + "\n")
    for path in (step_dir, room):
        with pytest.raises(CheckpointVersionError, match="format_version .*expected 1 to 2"): load_checkpoint(path, net())


def test_old_torches_are_refused():
    "S7."
    for version in ("1.13.1", "2.5.1+cu124", "2.9.1"):
        with pytest.raises(CheckpointUnsafeError, match="CVE-2026-24747"): storage._require_torch(version)
    for version in ("2.10.0", "2.13.0+cpu", "3.0.0a0"): storage._require_torch(version)


def test_a_pinned_digest(room):
    "S4: the right one loads, another does not, a directory without a manifest cannot be pinned; nothing is parsed before."
    step_dir = save_checkpoint(net(), path=room)
    digest = verify_checkpoint(room).digest
    assert load_checkpoint(room, net(), expected_sha256=digest).digest == digest
    bad = storage.publish_step(room / "x", 0, storage.read_step(step_dir).files | {"model.pt": archive(b"\x80\x02cposix\nsystem\n.")})
    for path in (step_dir, bad, room / "x"):
        with pytest.raises(CheckpointUnsafeError, match="pinned"): load_checkpoint(path, net(), expected_sha256="f" * 64)
    for name in ("manifest.json", "COMMITTED"): (step_dir / name).unlink()
    with pytest.raises(CheckpointUnsafeError, match="pinned"): load_checkpoint(step_dir, net(), expected_sha256=digest)


# ---- what comes back ----

@pytest.mark.parametrize("weight_bits", [None, 8, 4])
def test_saving_what_was_loaded_gives_the_same_bytes(room, weight_bits):
    "R7: the digest is that of the state: weights, moments, config, vocabulary, training state, all of it."
    model = lm(vocab_size=270)
    if weight_bits: model, optimizer = quantize_model_ptq(model, bits=weight_bits), None
    else: optimizer = torch.optim.AdamW(model.parameters())
    if optimizer:
        model(torch.arange(8)[None]).sum().backward()
        optimizer.step()
    trainer = Parts(rng=torch.get_rng_state(), losses=[0.1, 1e-300, -0.0], names=["a", "".join("a")], nested={"k": (1, None, True)})
    vocab = BPEVocab.train("to be or not to be " * 20, 270)
    first = save_checkpoint(model, optimizer, TrainingConfig(seed=3), vocab, 5, room / "a", trainer=trainer, metrics={"loss": 0.25})
    second_optimizer, second_trainer = None, Parts()
    second = load_checkpoint(first).model
    if optimizer: second_optimizer = torch.optim.AdamW(second.parameters(), lr=9.0)
    ckpt = load_checkpoint(first, second, second_optimizer, trainer=second_trainer)
    assert ckpt.model is second and ckpt.optimizer is second_optimizer and ckpt.vocab == vocab and ckpt.config == TrainingConfig(seed=3)
    again = save_checkpoint(second, second_optimizer, ckpt.config, ckpt.vocab, ckpt.step, room / "b", trainer=second_trainer, metrics=ckpt.metadata["metrics"])
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}
    if weight_bits: assert get_quantization_info(second).bits == weight_bits and torch.equal(second(torch.arange(8)[None]), model(torch.arange(8)[None]))


def test_equal_states_give_equal_bytes():
    "Whether two equal strings are one object, two tensors views of one, is no part of a state."
    key, text = "".join(["exp_", "avg"]), "".join(["a ", "name"])
    base = torch.arange(1000.0)
    one = [{"exp_avg": "a name"}, {"exp_avg": "a name"}, base[:3], base[1:2]]
    two = [{key: text}, {"exp_avg": "a name"}, base[:3].clone(), torch.ones(1)]
    assert key is not one[0] and storage.to_pt(one) == storage.to_pt(two) and len(storage.to_pt(one)) < 2000


def test_loading_twice_and_reading_do_not_draw_random_numbers(room):
    save_checkpoint(lm(), path=room)
    before = torch.get_rng_state()
    load_checkpoint(room)
    assert torch.equal(before, torch.get_rng_state())


def test_sizes_on_disk(room):
    "INT8 takes at most 0.27 of the float32 file, INT4 at most 0.16."
    model = TinyLM(ModelConfig(), generator=torch.Generator().manual_seed(0))
    size = {}
    for weight_bits in (32, 8, 4):
        quantized = model if weight_bits == 32 else quantize_model_ptq(model, bits=weight_bits)
        size[weight_bits] = (save_checkpoint(quantized, path=room / str(weight_bits)) / "model.pt").stat().st_size
    assert size[8] <= 0.27 * size[32] and size[4] <= 0.16 * size[32], size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.bool, torch.int64,
                                   torch.complex64, torch.float8_e4m3fn, torch.uint16])
def test_every_dtype_and_shape(room, dtype):
    class Bag(nn.Module):
        def __init__(self, fill):
            super().__init__()
            base = (torch.arange(24).reshape(2, 3, 4) * fill).to(dtype)
            for name, t in (("scalar", base[0, 0, 0]), ("empty", base[:0]), ("view", base.transpose(0, 2)), ("part", base[1, :, ::2]), ("all", base)):
                self.register_buffer(name, t)
    a, b = Bag(1), Bag(0)
    load_checkpoint(save_checkpoint(a, path=room), b)
    for name, t in a.state_dict().items():
        assert b.state_dict()[name].dtype == dtype and t.shape == b.state_dict()[name].shape
        assert torch.equal(t.contiguous().view(torch.uint8) if t.ndim else t, b.state_dict()[name].contiguous().view(torch.uint8) if t.ndim else b.scalar)


def test_wrapped_models(room):
    "torch.compile (outside and inside) and data parallelism neither show in the file nor matter when it is read."
    model = net(0.25)
    plain = save_checkpoint(model, path=room / "plain")
    inside = net(0.25)
    inside[0] = torch.compile(inside[0])
    for i, wrapped in enumerate((torch.compile(model), nn.DataParallel(model), inside)):
        assert (save_checkpoint(wrapped, path=room / str(i)) / "model.pt").read_bytes() == (plain / "model.pt").read_bytes()
    target = torch.compile(net(0.75))
    assert load_checkpoint(plain, target).model is target and target._orig_mod[0].weight[0, 0] == 0.25
    inside = net(0.75)
    inside[2] = torch.compile(inside[2])
    assert load_checkpoint(plain, inside).model[2].weight[0, 0] == 0.25


def test_ties(room):
    "Tied weights are stored once, come back tied, and do not go into a model that ties what the checkpoint does not."
    tied, untied = lm(), lm(tie_word_embeddings=False)
    step_dir = save_checkpoint(tied, path=room / "tied")
    assert len(storage.from_pt(step_dir, "model.pt", (step_dir / "model.pt").read_bytes())) == len(tied.state_dict()) - 1
    back = load_checkpoint(step_dir).model
    assert back.lm_head.weight is back.model["embed_tokens"].weight
    with torch.no_grad(): untied.lm_head.weight += 1
    with pytest.raises(CheckpointMismatchError, match="differ; expected equal ones"): load_checkpoint(save_checkpoint(untied, path=room / "untied"), lm())


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adagrad", "RMSprop", "Adafactor", "NAdam", "Adamax"])
def test_optimizers(room, kind):
    "Each of torch's goes on to the bit; its settings come with it."
    cls, options = getattr(torch.optim, kind), {"momentum": 0.9} if kind == "SGD" else {}
    (a, opt_a), (b, opt_b) = trained(0.5, cls, **options), trained(0.25, cls, **options)
    opt_a.param_groups[0]["lr"] = 0.125
    load_checkpoint(save_checkpoint(a, opt_a, path=room), b, opt_b)
    for model, optimizer in ((a, opt_a), (b, opt_b)):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
    assert bits(a, opt_a) == bits(b, opt_b) and opt_b.param_groups[0]["lr"] == 0.125


def test_moments_keep_their_dtype(room):
    "torch casts what it loads to the parameter's dtype; a float32 moment of a bfloat16 weight stays float32, to the bit."
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    optimizer, other = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    for state in optimizer.state.values(): state["exp_avg"] = state["exp_avg"].float() + 1.23456789
    load_checkpoint(save_checkpoint(model, optimizer, path=room), model, other)
    for p, state in optimizer.state.items():
        assert other.state[p]["exp_avg"].dtype == torch.float32 and torch.equal(other.state[p]["exp_avg"], state["exp_avg"])


def test_the_first_misfit_is_named(room):
    "By its name, dtype and shape, before anything is loaded."
    step_dir = save_checkpoint(net(), path=room)
    for model, said in ((nn.Sequential(nn.Linear(8, 15), nn.ReLU(), nn.Linear(15, 4)), r"0.weight is torch.float32 \[16, 8\]; expected .* \[15, 8\]"),
                        (net().double(), "0.weight is torch.float32 .*; expected torch.float64"), (nn.Linear(8, 16), "lacks weight, bias"),
                        (nn.Sequential(nn.Linear(8, 16)), "has besides 2.weight, 2.bias")):
        with pytest.raises(CheckpointMismatchError, match=said): load_checkpoint(step_dir, model)


def test_configs_and_vocabularies_of_any_kind(room):
    import argparse
    from dataclasses import dataclass

    @dataclass
    class Settings:
        lr: float = 0.1
        betas: tuple = (0.9, 0.95)

    class Foreign:
        def to_dict(self): return {"n": 1}
    nested = {"a": (1, (2.5, None)), 3: "x", "inf": float("inf"), "__dict__": {"__tuple__": []}, "deep": [[{}]], "text": "\u00e9\ud800\n"}
    cases = [(TrainingConfig(betas=(0.8, 0.9)), ...), (ModelConfig(block_size=64), ...), (nested, nested), ([1, 2], [1, 2]), ({}, {}),
             (Settings(), {"lr": 0.1, "betas": (0.9, 0.95)}), (argparse.Namespace(x=1), {"x": 1}), (Foreign(), {"n": 1}), (None, None)]
    for i, (given, back) in enumerate(cases):
        found = load_checkpoint(save_checkpoint(net(), config=given, vocab=["a", "b"], path=room / str(i)), net()).config
        assert found == (given if back is ... else back) and type(found) is type(given if back is ... else back)
    for i, vocab in enumerate((["<pad>", "a"], {"a": 0, "b": 1}, {0: "a"}, {"stoi": {"a": 0}, "itos": {0: "a"}}, ByteVocab())):
        assert load_checkpoint(save_checkpoint(net(), vocab=vocab, path=room / f"v{i}"), net()).vocab == vocab
    for bad in ({"a": torch.float32}, {"a": {1, 2}}, {"f": print}, b"bytes"):
        with pytest.raises(CheckpointError, match="config.json: a .*; expected numbers"): save_checkpoint(net(), config=bad, path=room / "bad")
    assert not (room / "bad").exists()


def test_what_cannot_be_saved_is_named(room):
    class Extra(nn.Linear):
        def get_extra_state(self): return {"n": 1}
        def set_extra_state(self, state): pass
    with torch.device("meta"): empty = nn.Linear(2, 2)
    poisoned = net()
    with torch.no_grad(): poisoned[2].bias[1] = float("nan")
    for model, said in ((poisoned, "2.bias holds NaN"), (empty, "without data"), (Extra(2, 2), "_extra_state is a dict"), ({"w": 1}, "a dict to save")):
        with pytest.raises(CheckpointError, match=said): save_checkpoint(model, path=room / "run")
    for state in ({"x": {1}}, {"x": b"b"}, {("a",): 1}, {"x": object()}, {"x": torch.eye(2).to_sparse()}):
        with pytest.raises(CheckpointError, match="training_state.pt"): save_checkpoint(net(), path=room / "run", trainer=Parts(**{"s": state}))
    for step in (-1, 1.0, True, "1", None, 10**18):
        with pytest.raises(CheckpointError, match="expected an integer from 0"): save_checkpoint(net(), step=step, path=room / "run")
    for limit in (-1, "2", 1.5):
        with pytest.raises(CheckpointError, match="save_total_limit"): save_checkpoint(net(), save_total_limit=limit, path=room / "run")
    assert not (room / "run").exists()
    masked = net()
    masked.register_buffer("mask", torch.full((2, 2), float("-inf")))  # a mask may hold infinities
    assert load_checkpoint(save_checkpoint(masked, path=room), masked).step == 0


# ---- the wrong kind ----

def test_a_failed_load_changes_nothing(room):
    "Q3: model, optimizer and trainer are, bit for bit, what they were: names, shapes, dtypes, schemes, groups, settings, refusals halfway."
    model, optimizer = trained(0.25)
    sound = save_checkpoint(model, optimizer, step=1, path=room / "sound", trainer=Parts(a=2))
    files = storage.read_step(sound).files
    state = storage.from_pt(sound, "model.pt", files["model.pt"])
    saved = storage.from_pt(sound, "optimizer.pt", files["optimizer.pt"])

    def forged(**parts):
        "The checkpoint with other content in some files, sealed anew."
        content = {n.replace("_", "."): storage.to_pt(v) for n, v in parts.items()}
        return storage.publish_step(room / f"f{len(list(room.iterdir()))}", 1, files | content)

    def with_optimizer(change):
        copy = storage.from_pt(sound, "optimizer.pt", files["optimizer.pt"])
        change(copy)
        return forged(optimizer_pt=copy)

    class Refuses(Parts):
        def load_state_dict(self, new): super().load_state_dict(new); raise ValueError("no") if new != {"a": 1} else None
    cases = [
        forged(model_pt={**state, "more": torch.zeros(1)}), forged(model_pt={n: state[n] for n in list(state)[1:]}),
        forged(model_pt=state | {"0.weight": state["0.weight"].T}), forged(model_pt=state | {"2.bias": state["2.bias"].half()}),
        forged(model_pt=state | {"2.bias": state["2.bias"].to(torch.int32)}), forged(model_pt=state | {"2.bias": state["2.bias"] * float("nan")}),
        forged(model_pt=[1]), forged(model_pt={"a": 1}), forged(optimizer_pt={}), forged(optimizer_pt={"state_dict": {"state": 3, "param_groups": [1]}}),
        with_optimizer(lambda s: s.update({"class": "SGD"})), with_optimizer(lambda s: s["param_names"][0].reverse()),
        with_optimizer(lambda s: s["state_dict"]["param_groups"][0].update(lr=float("nan"))),
        with_optimizer(lambda s: s["state_dict"]["state"][0].update(exp_avg=torch.zeros(3))),
        with_optimizer(lambda s: s["state_dict"]["param_groups"][0]["params"].pop()),
        with_optimizer(lambda s: s["state_dict"]["param_groups"].append(dict(s["state_dict"]["param_groups"][0], params=[]))),
        save_checkpoint(model, path=room / "no optimizer"), save_checkpoint(model, optimizer, path=room / "no trainer"),
        save_checkpoint(quantize_model_ptq(lm()), path=room / "other"), save_checkpoint(lm(), path=room / "other float"),
    ]
    kinds = Counter()
    for path in cases:
        mine, ours, trainer = *trained(0.75), Parts(a=1)
        before, groups = bits(mine, ours, trainer), ours.param_groups
        kinds[fails(load_checkpoint, path, mine, ours, trainer=trainer)] += 1
        assert bits(mine, ours, trainer) == before and ours.param_groups is groups, path
        assert ours.param_groups[0]["params"][0] is mine[0].weight
    mine, ours, trainer = *trained(0.75), Refuses(a=1)
    before = bits(mine, ours, trainer)
    with pytest.raises(CheckpointMismatchError, match="refused it .ValueError"): load_checkpoint(sound, mine, ours, trainer=trainer)
    assert bits(mine, ours, trainer) == before and saved["class"] == "AdamW"
    assert set(kinds) == {CheckpointMismatchError, CheckpointCorruptedError} and kinds.total() == len(cases) == 20
    assert load_checkpoint(sound, mine, ours, trainer=Parts()).step == 1


def test_a_failed_load_leaves_a_float_model_float(room):
    "Layers exchanged for integer ones come back, with their weights, when what follows fails."
    quantized = quantize_model_ptq(lm(), bits=4)
    step_dir = save_checkpoint(quantized, path=room / "q")
    files = storage.read_step(step_dir).files
    state = storage.from_pt(step_dir, "model.pt", files["model.pt"])
    name = next(n for n in state if n.endswith("q_proj.scale"))
    about = json.loads(files["quantization_metadata.json"])
    layer = name.removesuffix(".scale")

    def layers(**change): return {"quantization_metadata.json": storage.to_json(about | {"layers": about["layers"] | {layer: about["layers"][layer] | change}})}
    cases = [{"model.pt": storage.to_pt(state | {name: state[name] * factor})} for factor in (float("nan"), float("inf"), -1.0)]
    cases += [{"model.pt": storage.to_pt(state | {name: state[name][:-1]})}, {"model.pt": storage.to_pt(state | {name: state[name].double()})},
              {"model.pt": storage.to_pt({n: t for n, t in state.items() if n != name})}]
    cases += [layers(bits=8), layers(bits=3), layers(shape=[1, 1]), layers(kind="conv"), layers(group_size=7), layers(bits=None)]
    cases += [{"quantization_metadata.json": storage.to_json(x)} for x in ({}, [], {"layers": {}}, {"layers": {"a": 1}}, {"layers": {"no.such": about["layers"][layer]}})]
    kinds = Counter()
    for i, change in enumerate(cases):
        bad, model = storage.publish_step(room / f"c{i}", 0, files | change), lm()
        before, modules = bits(model), list(model.modules())
        kinds[fails(load_checkpoint, bad, model)] += 1
        assert bits(model) == before and list(model.modules()) == modules, change.keys()
        assert model.lm_head.weight is model.model["embed_tokens"].weight
        assert fails(load_checkpoint, bad) in (CheckpointMismatchError, CheckpointCorruptedError)
    assert set(kinds) == {CheckpointMismatchError, CheckpointCorruptedError} and kinds.total() == 17
    model = lm()
    assert load_checkpoint(step_dir, model).model is model and torch.equal(model(torch.arange(4)[None]), quantized(torch.arange(4)[None]))


def test_integers_and_floats_do_not_mix(room):
    "Full precision into a quantized model, another scheme into a quantized model, a quantized one into its like."
    model = lm()
    eight, four = quantize_model_ptq(model, bits=8), quantize_model_ptq(model, bits=4)
    paths = {n: save_checkpoint(m, path=room / n) for n, m in (("float", model), ("eight", eight), ("four", four))}
    before = bits(eight)
    with pytest.raises(CheckpointMismatchError, match="full-precision weights; expected .* quantized layers"): load_checkpoint(paths["float"], eight)
    with pytest.raises(CheckpointMismatchError, match="another quantization of"): load_checkpoint(paths["four"], eight)
    assert bits(eight) == before
    target = quantize_model_ptq(lm(), bits=8)
    with torch.no_grad(): target.model["embed_tokens"].scale.mul_(2)
    load_checkpoint(paths["eight"], target)
    assert bits(target) == before
    foreign = quantize_model_ptq(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), bits=8)
    blank = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    load_checkpoint(save_checkpoint(foreign, path=room / "foreign"), blank)
    assert torch.equal(blank(torch.ones(1, 64)), foreign(torch.ones(1, 64)))


def test_vocabulary_and_model(room):
    "A vocabulary with more tokens than the model has rows is refused when it is saved, and when it meets a smaller model."
    vocab = [str(i) for i in range(300)]
    with pytest.raises(CheckpointWriteError, match="a vocabulary of 300 tokens; expected at most 256"): save_checkpoint(lm(), vocab=vocab, path=room)
    step_dir = save_checkpoint(lm(vocab_size=300), vocab=vocab, path=room)
    with pytest.raises(CheckpointMismatchError, match="a vocabulary of 300 tokens; expected at most 256"): load_checkpoint(step_dir, lm())


def test_older_and_plainer_things(room):
    "A directory without a manifest, a bare file of torch's or of safetensors': loaded, with one warning; damaged or claiming integers: refused."
    from safetensors.torch import save_file
    model, optimizer = trained(0.25)
    bare = room / "old"
    bare.mkdir()
    torch.save(model.state_dict(), bare / "model.pt")
    torch.save(optimizer.state_dict(), bare / "optimizer.pt")
    (bare / "config.json").write_text('{"lr": 0.1}')
    (bare / "metadata.json").write_text('{"step": 42}')
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "step": 42}, room / "wrapped.pt")
    save_file(model.state_dict(), room / "x.safetensors")
    stripped = save_checkpoint(model, optimizer, {"lr": 0.1}, step=42, path=room / "new")
    for name in ("manifest.json", "COMMITTED"): (stripped / name).unlink()
    for path in (bare, stripped, room / "wrapped.pt", room / "x.safetensors"):
        target, whole = net(), path.suffix != ".safetensors"
        other = torch.optim.AdamW(target.parameters())
        with pytest.warns(CheckpointWarning, match="nothing vouches for its bytes") as caught:
            ckpt = load_checkpoint(path, target, other if whole else None)
        assert len(caught) == 1 and bits(target) == bits(model) and ckpt.digest is None and ckpt.quantization is None
        assert ckpt.step == (42 if whole else 0) and ckpt.config == ({"lr": 0.1} if path.is_dir() else None)
        assert not whole or bits(other) == bits(optimizer)
    report = verify_checkpoint(bare)
    assert not report.ok and isinstance(report.error, CheckpointIncompleteError)
    (bare / "metadata.json").write_text('{"step": 42, "quantization_mode": "ptq"}')
    with pytest.raises(CheckpointIncompleteError, match="missing quantization information"): load_checkpoint(bare, net())
    (stripped / "optimizer.pt").unlink()  # named in its metadata: not the directory that was written
    with pytest.raises(CheckpointIncompleteError, match="optimizer.pt"): load_checkpoint(stripped, net())
    (room / "x.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointCorruptedError): load_checkpoint(room / "x.safetensors", net())
    old = room / "run/step-0000000009"  # in a run, what is sealed comes first
    old.mkdir(parents=True)
    torch.save(model.state_dict(), old / "model.pt")
    save_checkpoint(net(), step=3, path=room / "run")
    assert load_checkpoint(room / "run", net()).step == 3


def test_one_half_of_the_seal_is_no_seal(room):
    for name in ("manifest.json", "COMMITTED"):
        step_dir = save_checkpoint(net(), path=room / name)
        (step_dir / name).unlink()
        with pytest.raises(CheckpointIncompleteError, match=name): load_checkpoint(step_dir, net())


def test_a_step_under_another_number(room):
    "A directory copied under the number of another step is not that step; under another kind of name it is itself."
    step_dir = save_checkpoint(net(), step=5, path=room)
    shutil.copytree(step_dir, room / "step-0000000009")
    shutil.copytree(step_dir, room / "golden")
    assert fails(load_checkpoint, room / "step-0000000009", net()) is CheckpointCorruptedError
    assert load_checkpoint(room / "golden", net()).step == 5


def test_paths(room, monkeypatch):
    "F6: relative, with a tilde, spaces, other alphabets, as text; absent ones are FileNotFoundErrors that say so."
    monkeypatch.chdir(room)
    monkeypatch.setenv("HOME", str(room))
    for path in ("checkpoints", "a b/\u00fc/\u6587", "~/home", room / "x" / "y", "trailing/"):
        step_dir = save_checkpoint(net(), step=1, path=path)
        assert load_checkpoint(path, net()).path == step_dir == latest_checkpoint(path)
    assert save_checkpoint(net()).parent == Path("checkpoints")
    for path in ("nowhere", "nowhere/step-0000000001", "nul\0", room, "~nobody-of-this-name/x", "x.pt"):
        with pytest.raises(FileNotFoundError, match="checkpoint missing") as e: load_checkpoint(path, net())
        assert isinstance(e.value, CheckpointNotFoundError)
        assert latest_checkpoint(path) is None
    for path in (None, 3):
        with pytest.raises(CheckpointNotFoundError, match="no path"): load_checkpoint(path, net())
    (room / "unfinished/.tmp-1").mkdir(parents=True)
    with pytest.raises(CheckpointIncompleteError, match="only an unfinished save"): load_checkpoint(room / "unfinished", net())
    assert latest_checkpoint(room / "unfinished") is None


def test_no_descriptor_is_left_open(room):
    "F7: after saves and loads that succeed and that fail."
    step_dir = save_checkpoint(net(), path=room / "run")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else pytest.skip("no /proc")
    for _ in range(20):
        save_checkpoint(net(), path=room / "run")
        load_checkpoint(step_dir, net())
        fails(load_checkpoint, step_dir, nn.Linear(1, 1))
        fails(load_checkpoint, room / "none")
        fails(save_checkpoint, net(), path="/proc/nowhere")
    assert len(os.listdir("/proc/self/fd")) == before


def test_messages_are_one_short_line(room):
    "Every error met in this file's ways of failing: a class of ours, one line, at most 300 characters, path and file as attributes."
    step_dir = save_checkpoint(*trained(), path=room / ("long " * 30))
    for name in sorted(os.listdir(step_dir)):
        data = (step_dir / name).read_bytes()
        for change in (lambda p: p.unlink(), lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"\n<x>")):
            change(step_dir / name)
            with pytest.raises(CheckpointError) as e: load_checkpoint(step_dir, net())
            assert len(str(e.value)) <= 300 and str(e.value).isprintable() and e.value.path == step_dir and e.value.found
            (step_dir / name).write_bytes(data)
    assert pickle.loads(pickle.dumps(e.value)).args == e.value.args


def test_layers_of_bitsandbytes_come_back(room):
    "Packed weights are saved as plain bytes with their scales, or as a digest, and come back into a model that has such layers."
    bnb = pytest.importorskip("bitsandbytes")

    def model(seed):
        layer = bnb.nn.Linear4bit(64, 64, bias=False)
        layer.load_state_dict({"weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))})
        return nn.Sequential(layer.to("cpu").requires_grad_(False), nn.Linear(64, 2)).train()

    x = torch.randn(2, 64)
    one, two = model(1), model(2)
    load_checkpoint(save_checkpoint(one, path=room / "run"), model=two)
    assert torch.equal(two(x), one(x)) and not torch.equal(model(2)[0](x), one[0](x))
    path = save_checkpoint(one, path=room / "digest", save_frozen=False)
    load_checkpoint(path, model=model(1))
    with pytest.raises(CheckpointMismatchError, match="other frozen weights"): load_checkpoint(path, model=model(2))
