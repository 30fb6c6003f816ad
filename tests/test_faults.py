# python -m pytest tests/test_faults.py            # the quick tier; with -m "slow or not slow" the long one, too
"""What a machine can do to a save: stop in the middle, lose power, fill up, refuse, be told to stop.

Each test counts what it really did and prints its seed where it fails: a fault test that injects nothing passes, too.
"""
import errno
import itertools
import mmap
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_checkpoint import Recorder, damage, fails, in_child, leftovers, net, trained

from qtlm import storage
from qtlm.checkpoint import (
    CheckpointCorruptedError,
    CheckpointError,
    CheckpointIncompleteError,
    CheckpointWriteError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from qtlm.config import TrainingConfig
from qtlm.data import ByteVocab
from qtlm.history import Callback
from qtlm.model import TinyLM
from qtlm.quantization import quantize_model_ptq
from qtlm.trainer import Trainer

warnings.filterwarnings("ignore", "This process", DeprecationWarning)  # newer Pythons warn of forks
OPERATIONS = ("mkdir", "open", "write", "fsync", "rename", "remove", "fsync_dir")
long = pytest.mark.slow


# ---- kill -9 ----

class Marking:
    "A disk that writes into shared memory what it is doing, so that whoever killed the process can see it."
    def __init__(self, shared): self.disk, self.shared = storage._Disk(), shared

    def __getattr__(self, name):
        def operation(*args):
            self.shared[0] = 1 + OPERATIONS.index(name)
            if name == "rename" and os.path.basename(args[1]).startswith("step-"): self.shared[1] = 1
            try: return getattr(self.disk, name)(*args)
            finally: self.shared[0] = 0
        return operation


def save_for_ever(run, shared, acknowledge):
    "Save step after step; write each one's number into the pipe when it is saved."
    storage._disk = Marking(shared)
    model, optimizer = trained()
    first = int(latest_checkpoint(run).name[5:]) + 1 if latest_checkpoint(run) else 1
    for step in itertools.count(first):
        shared[1] = 0
        save_checkpoint(model, optimizer, {"step": step}, ["a"], step, run, save_total_limit=2)
        os.write(acknowledge, step.to_bytes(8, "little"))


def acknowledged(pipe):
    "The last number in a pipe that nobody writes to any more, None where there is none."
    data = b"".join(iter(lambda: os.read(pipe, 1 << 16), b""))
    return int.from_bytes(data[-8:], "little") if data else None


def killed_saving(run, rng, shared, typical, aim):
    "Let a child save, kill it at a random time after its first save, and then `aim`: at the next moment after a commit (0), in the next operation of one kind (1 to 7), anywhere (None). Return the last step that it was told is saved."
    shared[:2] = b"\0\0"
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        save_for_ever(run, shared, writer)
    os.close(writer)
    first = int.from_bytes(os.read(reader, 8), "little")
    time.sleep(rng.uniform(0, 3 * typical))
    while aim is not None and not (shared[1] if aim == 0 else shared[0] == aim): pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    last = acknowledged(reader)
    os.close(reader)
    return first if last is None else last


@pytest.mark.parametrize("kills", [100, pytest.param(1000, marks=long)])
def test_killed_at_random_times(room, kills):
    "C1: nothing unloadable, no acknowledged step lost, the step never goes back; kills fell into every operation, and between the commit and its acknowledgement."
    seed, shared, run = 11, mmap.mmap(-1, 2), room / "run"
    rng, hit, between, commits, newest = random.Random(seed), Counter(), 0, 0, 0
    times = []
    for step in range(20):
        start = time.perf_counter()
        save_checkpoint(*trained(), {"step": step}, ["a"], step, room / "time", save_total_limit=2)
        times.append(time.perf_counter() - start)
    for number in range(kills):
        saved = killed_saving(run, rng, shared, min(times), 0 if number % 8 == 0 else rng.randrange(1, 8) if number % 2 else None)
        hit[("between", *OPERATIONS)[shared[0]]] += 1
        ckpt = load_checkpoint(run, net())
        assert ckpt.step >= saved > newest and ckpt.config["step"] == ckpt.step, f"seed {seed}, kill {number}: {ckpt.step} after {saved} was acknowledged"
        between += ckpt.step > saved or shared[1]
        commits += ckpt.step - newest
        newest = ckpt.step
    assert latest_checkpoint(run) and commits >= kills and between >= kills // 20, f"seed {seed}: {commits} commits, {between} between commit and acknowledgement"
    assert min(hit[name] for name in ("fsync", "fsync_dir", "write", "rename", "remove")) >= kills // 300 or not run.is_relative_to("/dev/shm"), f"seed {seed}: {hit}"
    print(f"seed {seed}: {kills} kills, {commits} commits, {between} after the commit, in operations {dict(hit)}")


def test_killed_between_the_step_and_its_hint(room, monkeypatch):
    "C5: a run that is always killed there makes progress each time: the hint is not what is believed."
    run = room / "run"
    save_checkpoint(*trained(), step=0, path=run)
    log = Recorder()
    monkeypatch.setattr(storage, "_disk", log)
    save_checkpoint(*trained(), step=1, path=run)
    monkeypatch.undo()
    at = len(log.log) - 4  # open, write, fsync, rename of the hint
    assert log.log[at - 2 :] == ["rename", "fsync_dir", "open", "write", "fsync", "rename"]
    for step in range(2, 52):
        def save(step=step):
            storage._disk = Recorder(at, lambda *_: os._exit(9))
            save_checkpoint(*trained(), step=int(latest_checkpoint(run).name[5:]) + 1, path=run)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert in_child(save) == 9 and load_checkpoint(run, net()).step == step
        assert (run / "latest").read_text() == "step-0000000001\n"


def test_ctrl_c_at_random_times(room):
    "C6: an interrupt by a timer, not at an operation: it comes through, and nothing unsound is left."
    seed, run, outcomes = 5, room / "run", Counter()
    rng, (model, optimizer) = random.Random(seed), trained()
    start = time.perf_counter()
    save_checkpoint(model, optimizer, step=0, path=run)
    typical, number = time.perf_counter() - start, 0

    def interrupt(*_): raise KeyboardInterrupt
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        while outcomes["interrupted"] < 40 and number < 1_000:
            outcome, number = None, number + 1
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, typical))
                try: save_checkpoint(model, optimizer, step=number, path=run, save_total_limit=2)
                finally: signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt: outcome = "interrupted"
            outcomes[outcome] += 1
            # A machine that is faster or slower by now than at the first save moves the aim.
            typical *= 1.1 if outcome else 0.9
            assert load_checkpoint(run, net()).step in (number, number - 1) or outcome, f"seed {seed}, {number}"
            save_checkpoint(model, optimizer, step=number, path=run, save_total_limit=2)
            assert leftovers(run) == [] and load_checkpoint(run, net()).step == number, f"seed {seed}, {number}"
    finally: signal.signal(signal.SIGALRM, before)
    assert outcomes["interrupted"] >= 40, f"seed {seed}: {outcomes}"


# ---- power ----

class Recording:
    "A disk that notes each operation in terms of files and directories, whatever they are called by then."
    def __init__(self, root):
        self.disk, self.events, self.files, self.opened = storage._Disk(), [], {str(root): 0}, {}

    def node(self, path, new=False):
        if new: self.files[str(path)] = len(self.files) + 1000 * (len(self.events) + 1)
        return self.files[str(path)]

    def entry(self, path): return self.files[str(Path(path).parent)], os.path.basename(path)

    def mkdir(self, path):
        self.disk.mkdir(path)
        self.events.append(("entries", [(*self.entry(path), self.node(path, new=True), "dir")]))

    def open(self, path, *flags):
        there = os.path.lexists(path)
        fd = self.disk.open(path, *flags)
        if not there: self.events.append(("entries", [(*self.entry(path), self.node(path, new=True), "file")]))
        self.opened[fd] = self.files[str(path)]
        return fd

    def write(self, fd, data):
        count = self.disk.write(fd, data)
        self.events.append(("write", self.opened[fd], bytes(data[:count])))
        return count

    def fsync(self, fd):
        self.disk.fsync(fd)
        self.events.append(("fsync", self.opened[fd]))

    def fsync_dir(self, path):
        self.disk.fsync_dir(path)
        self.events.append(("fsync_dir", self.files[str(path)]))

    def rename(self, old, new):
        self.disk.rename(old, new)
        moved = self.files.pop(str(old))
        for path in [path for path in self.files if path.startswith(f"{old}/")]: self.files[f"{new}{path[len(str(old)):]}"] = self.files.pop(path)
        self.files[str(new)] = moved
        self.events.append(("entries", [(*self.entry(old), None, None), (*self.entry(new), moved, "moved")]))

    def remove(self, path):
        inside = sorted(path.iterdir()) if path.is_dir() else []
        for child in inside: self.events.append(("entries", [(*self.entry(child), None, None)]))
        self.events.append(("entries", [(*self.entry(path), None, None)]))
        self.disk.remove(path)


def recorded(room, monkeypatch):
    "The events of four saves, one of them of a step that is there already, and after which event which step was acknowledged."
    (room / "disk").mkdir()
    recording, acknowledgements, digests = Recording(room / "disk"), [], {}
    monkeypatch.setattr(storage, "_disk", recording)
    saves = [(1, 0.1, {}), (2, 0.2, {}), (2, 0.3, {}), (3, 0.4, {"save_total_limit": 1})]
    for step, value, options in saves:
        path = save_checkpoint(net(value), config={"value": value}, step=step, path=room / "disk" / "run", **options)
        digests.setdefault(step, set()).add(verify_checkpoint(path).digest)
        acknowledgements.append((len(recording.events), step))
    monkeypatch.undo()
    return recording.events, acknowledgements, digests


class Disk:
    "What may be on a disk after the power has gone: what was synced, and any part of the rest."

    def __init__(self, events):
        self.content, self.tables, self.pending_writes, self.pending_entries, self.kinds = {}, {0: {}}, {}, [], {0: "dir"}
        for event in events: getattr(self, event[0])(*event[1:])

    def entries(self, changes):
        for _, _, node, kind in changes:
            if kind == "dir": self.tables[node], self.kinds[node] = {}, "dir"
            if kind == "file": self.content[node], self.pending_writes[node], self.kinds[node] = b"", [], "file"
        self.pending_entries.append(changes)

    def write(self, node, data): self.pending_writes[node].append(data)

    def fsync(self, node):
        self.content[node] += b"".join(self.pending_writes[node])
        self.pending_writes[node] = []

    def fsync_dir(self, node):
        for changes in self.pending_entries:
            if changes[0][0] == node: self.apply(self.tables, changes)
        self.pending_entries = [changes for changes in self.pending_entries if changes[0][0] != node]

    def apply(self, tables, changes):
        for directory, name, node, _ in changes:
            if node is None: tables[directory].pop(name, None)
            else: tables[directory][name] = node

    def after(self, choices):
        "The tables and contents where the pending entry `i` was kept if `choices[i]`, and each unsynced file is whole, half or empty."
        tables = {node: dict(table) for node, table in self.tables.items()}
        for changes, kept in zip(self.pending_entries, choices):
            if kept: self.apply(tables, changes)
        unsynced = [node for node, waiting in self.pending_writes.items() if waiting]
        content = dict(self.content)
        for node, kept in zip(unsynced, choices[len(self.pending_entries):]):
            data = b"".join(self.pending_writes[node])
            content[node] += data[: len(data) * kept // 2]
        return tables, content

    def states(self, rng, limit):
        "All of them, or `limit` at random where there are more."
        unsynced = sum(bool(waiting) for waiting in self.pending_writes.values())
        ways = [range(2)] * len(self.pending_entries) + [range(3)] * unsynced
        total = 2 ** len(self.pending_entries) * 3**unsynced
        if total <= limit: yield from map(self.after, itertools.product(*ways))
        else:
            for _ in range(limit): yield self.after([rng.choice(way) for way in ways])


def lay_out(tables, content, node, path):
    "Write a directory as it would be found."
    path.mkdir()
    for name, child in tables[node].items():
        if child in tables: lay_out(tables, content, child, path / name)
        else: (path / name).write_bytes(content.get(child, b""))


def outcome(place, promised, digests):
    "What a run finds there: `sound`, or what is wrong with it."
    run = place / "run"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = storage.newest_sound(run, storage.read_step)
    except CheckpointError: return "unloadable" if promised else "sound"
    if found.digest not in digests.get(found.step, ()): return "silently wrong"
    return "lost" if found.step < promised else "sound"


def lost_power(room, events, acknowledgements, digests, rng, limit, stop=False):
    "Cut the power after each event, in every way: how often was which outcome?"
    outcomes, seen = Counter(), set()
    for at in range(1, len(events) + 1):
        promised = max((step for after, step in acknowledgements if after <= at), default=0)
        for tables, content in Disk(events[:at]).states(rng, limit):
            key = (promised, repr(sorted((n, sorted(t.items())) for n, t in tables.items() if t)), tuple(sorted((n, len(c)) for n, c in content.items())))
            if key in seen: continue
            seen.add(key)
            place = room / "after"
            lay_out(tables, content, 0, place)
            outcomes[outcome(place, promised, digests)] += 1
            shutil.rmtree(place)
            if stop and outcomes.keys() - {"sound"}: return outcomes
    return outcomes


def test_power_goes_at_any_moment(room, monkeypatch):
    "C3: after each operation, with any part of what was not synced: never unloadable once a save was acknowledged, no acknowledged step lost, nothing wrong in silence."
    seed = 3
    events, acknowledgements, digests = recorded(room, monkeypatch)
    outcomes = lost_power(room, events, acknowledgements, digests, random.Random(seed), 400)
    assert set(outcomes) == {"sound"} and outcomes["sound"] >= 3000, f"seed {seed}: {outcomes}"


def syncs(events):
    "Each kind of sync in a save, and the places of it in `events`."
    names, kinds = {}, {}
    for event in events:
        if event[0] == "entries":
            for _, name, node, _ in event[1]:
                if node is not None: names.setdefault(node, name)
    for at, event in enumerate(events):
        if event[0] in ("fsync", "fsync_dir"):
            name = names.get(event[1], "the directory of the run")
            name = "the directory of the step" if name.startswith(".tmp-") and event[0] == "fsync_dir" else name
            if not name.startswith(".tmp-"): kinds.setdefault(name, []).append(at)  # the hint's is for people
    return kinds


def test_each_sync_is_needed(room, monkeypatch):
    "C3: take any one of them out, and the model of the power finds a state that is not sound."
    seed = 4
    events, acknowledgements, digests = recorded(room, monkeypatch)
    kinds = syncs(events)
    assert set(kinds) == {"model.pt", "config.json", "metadata.json", "manifest.json", "COMMITTED", "the directory of the step", "run", "the directory of the run"}, set(kinds)
    found = {}
    for name, places in kinds.items():
        without = [("nothing",) if at in places else event for at, event in enumerate(events)]
        monkeypatch.setattr(Disk, "nothing", lambda self: None, raising=False)
        found[name] = lost_power(room, without, acknowledgements, digests, random.Random(seed), 60, stop=True)
    assert all(outcomes.keys() - {"sound"} for outcomes in found.values()), f"seed {seed}: {found}"


# ---- full, read-only ----

def as_another_user(work):
    "Run `work` in a child that is not root: root may do anything."
    def dropped():
        if os.getuid() == 0: os.setgid(65534), os.setuid(65534)
        work()
    return in_child(dropped)


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="a limit on the size of files exists on Unix only")
def test_a_file_may_not_grow(room):
    "E2 without mounting: the system refuses to write further; the error says so, the step before loads, nothing is left."
    run = room / "run"
    save_checkpoint(net(), step=1, path=run)

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        big = torch.nn.Linear(100, 100)
        with pytest.raises(CheckpointWriteError, match="EFBIG") as e: save_checkpoint(big, step=2, path=run)
        assert e.value.errno == errno.EFBIG and load_checkpoint(run, net()).step == 1 and leftovers(run) == []

    assert in_child(limited) == 0
    save_checkpoint(net(), step=2, path=run)
    assert latest_checkpoint(run).name == "step-0000000002"


FULL = """
    import errno, shutil, sys, torch
    from pathlib import Path
    from qtlm.checkpoint import CheckpointWriteError, latest_checkpoint, load_checkpoint, save_checkpoint

    run, step = Path(sys.argv[1]) / "run", 0
    try:
        for step in range(1, 99): save_checkpoint(torch.nn.Linear(100, 100), step=step, path=run)
    except CheckpointWriteError as e: found = e
    assert step > 5 and found.errno == errno.ENOSPC, found
    assert latest_checkpoint(run).name == f"step-{step - 1:010d}", "the last one before the disk was full"
    assert not [p for p in run.iterdir() if p.name.startswith((".tmp-", ".del-"))], "nothing lies about"
    for old in (1, 2, 3): shutil.rmtree(run / f"step-{old:010d}")
    save_checkpoint(torch.nn.Linear(100, 100), step=step, path=run)
    print("steps", step, load_checkpoint(run, torch.nn.Linear(100, 100)).step)
"""


def test_a_disk_that_is_full(room):
    "E2: a disk of one megabyte, really mounted: ENOSPC, the newest step loads, and after some room was made saving goes on."
    (room / "full.py").write_text(textwrap.dedent(FULL))
    (room / "disk").mkdir()
    script = f"mount -t tmpfs -o size=1m none {room}/disk && exec {sys.executable} {room}/full.py {room}/disk"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", room / "disk"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a small disk; test_a_file_may_not_grow stands in")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("steps"), done.stderr


def test_a_directory_that_may_not_be_written(room):
    "E3: an error, never silent success; what is there can still be read."
    run = room / "run"
    save_checkpoint(net(), step=1, path=run)
    run.chmod(0o555)
    room.chmod(0o755)

    def refused():
        with pytest.raises(CheckpointWriteError, match="EACCES|EROFS"): save_checkpoint(net(), step=2, path=run)
        assert load_checkpoint(run, net()).step == 1

    assert as_another_user(refused) == 0
    run.chmod(0o755)
    assert [p.name for p in run.glob("step-*")] == ["step-0000000001"]


# ---- damage ----

def corrupted(room, seed, count):
    "Damage a checkpoint `count` times; return the errors that loading it raised, and how often each way was tried."
    rng, tried, outcomes = random.Random(seed), Counter(), Counter()
    step_dir = save_checkpoint(*trained(), TrainingConfig(), ByteVocab(), 7, room / "a")
    other_dir = save_checkpoint(*trained(0.25), TrainingConfig(seed=1), ByteVocab(), 7, room / "b", metrics={"loss": 1})
    good, other = ({p.name: p.read_bytes() for p in d.iterdir()} for d in (step_dir, other_dir))
    while tried.total() < count:
        files = dict(good)
        kind = damage(rng, files, other)
        if files == good: continue
        tried[kind] += 1
        for name in {*good, *files}:
            if name not in files: (step_dir / name).unlink()
            elif files[name] != good.get(name): (step_dir / name).write_bytes(files[name])
        start = time.perf_counter()
        outcomes[fails(load_checkpoint, step_dir, net())] += 1
        assert time.perf_counter() - start < 5, f"seed {seed}: {kind} took long"
        for name in files.keys() - good.keys(): (step_dir / name).unlink()
        for name in good:
            if files.get(name) != good[name]: (step_dir / name).write_bytes(good[name])
    assert load_checkpoint(step_dir, net()).step == 7
    return tried, outcomes


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=long)])
def test_corruptions(room, count):
    "D1: each one refused as corrupted or incomplete, none loaded, none with another error."
    tried, outcomes = corrupted(room, 0, count)
    assert set(outcomes) == {CheckpointCorruptedError, CheckpointIncompleteError} and outcomes.total() == count, f"seed 0: {outcomes}"
    assert len(tried) == 10 and min(tried.values()) > count // 20, f"seed 0: {tried}"


def test_every_byte(room):
    "D2, D3: each byte of the small files and every 97th of the large ones; each length that a small file, and 200 that a large one can be cut to."
    step_dir = save_checkpoint(*trained(), TrainingConfig(), ByteVocab(), 7, room / "a")
    tried = Counter()
    for path in sorted(step_dir.iterdir()):
        good, large = path.read_bytes(), path.suffix == ".pt"
        places = range(0, len(good), 97 if large else 1)
        flipped = (good[:i] + bytes([good[i] ^ (1 << i % 8)]) + good[i + 1 :] for i in places)
        cut = (good[:i] for i in (range(0, len(good), max(1, len(good) // 200)) if large else range(len(good))))
        for bad in itertools.chain(flipped, cut):
            path.write_bytes(bad)
            assert fails(storage.read_step, step_dir) in (CheckpointCorruptedError, CheckpointIncompleteError), (path.name, len(bad))
            tried[path.suffix] += 1
        path.write_bytes(good)
    assert load_checkpoint(step_dir, net()).step == 7 and tried[".pt"] > 400 and tried[".json"] > 2000, tried


@long
def test_damage_that_is_sealed_again(room):
    "S6: files changed by somebody who also writes a fitting manifest: a CheckpointError, or a model that can be used; nothing else, and not for long."
    seed = 8
    rng, outcomes = random.Random(seed), Counter()
    step_dir = save_checkpoint(*trained(), TrainingConfig(), ByteVocab(), 7, room / "a")
    good = {p.name: p.read_bytes() for p in step_dir.iterdir() if p.name not in ("manifest.json", "COMMITTED")}
    for _ in range(3000):
        files = dict(good)
        name = rng.choice([*files])
        data = bytearray(files[name])
        for _ in range(rng.choice([1, 1, 2, 8])): data[rng.randrange(len(data))] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
        for file, content in storage._seal(7, {**files, name: bytes(data)}).items(): (step_dir / file).write_bytes(content)
        error = fails(load_checkpoint, step_dir, net())
        assert error is None or issubclass(error, CheckpointError), f"seed {seed}: {name}, {error}"
        outcomes[error and error.__name__] += 1
    assert outcomes.total() == 3000 and len(outcomes) >= 3, outcomes


# ---- a run that is stopped ----

TEXT = torch.tensor(list(b"It was a dark and stormy night, and the brig tossed. " * 12))


def small_run(folder, **fields):
    "A trainer of a run that evaluates and saves on its way."
    model = TinyLM(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, block_size=16, dropout=0.1)
    settings = dict(max_steps=200, batch_size=4, block_size=16, learning_rate=1e-2, eval_steps=7, save_steps=5, save_total_limit=2, output_dir=str(folder), progress=False)
    return Trainer(model, train_data=TEXT[:500], eval_data=TEXT[500:], **settings | fields)


def result(trainer):
    "What a run ends with, as bytes."
    return [storage.to_pt(part.state_dict()) for part in (trainer.model, trainer.optimizer)] + [trainer.history.losses, trainer.history.eval_losses]


class Watched(Callback):
    "Notes in shared memory that the run has begun, its step, and whether it steps (1), evaluates (2) or saves (3)."

    def __init__(self, shared):
        from qtlm import trainer

        self.shared = shared
        for name, phase in (("_evaluate", 2), ("_save", 3)): setattr(trainer, name, self.noting(getattr(trainer, name), phase))

    def noting(self, function, phase):
        def noted(*args):
            self.shared[8] = phase
            try: return function(*args)
            finally: self.shared[8] = 1
        return noted

    def on_train_begin(self, trainer): self.on_step_end(trainer)

    def on_step_end(self, trainer):
        self.shared[:8] = trainer.step.to_bytes(8, "little")
        self.shared[8] = max(1, self.shared[8])


def in_new_process(room, shared, **fields):
    "Start the run, or resume it where it stands, in a child that exits as a program would; return its process id."
    child = os.fork()
    if child: return child
    code = 99
    try:
        torch.set_num_threads(1)
        trainer = small_run(room / "stopped", **fields)
        trainer.callbacks.append(Watched(shared))
        trainer.train(resume_from_checkpoint="auto" if latest_checkpoint(trainer.run_dir) else room / "start")
        code = 0
    except SystemExit as e: code = e.code
    finally: os._exit(code)


def stopped_once(child, shared, how, wait):
    "Stop a run some time after its beginning: what it was doing, its step then and in the end, and its exit status."
    while not shared[8] and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None: time.sleep(0.001)
    time.sleep(wait)
    os.kill(child, signal.SIGSTOP)  # it holds still while we look
    phase, at = shared[8], int.from_bytes(shared[:8], "little")
    os.kill(child, how)
    os.kill(child, signal.SIGCONT)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return phase, at, int.from_bytes(shared[:8], "little"), code


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize(("stops", "steps"), [(6, 300), pytest.param(30, 1200, marks=long)])
def test_a_run_that_is_stopped_again_and_again(room, how, stops, steps):
    "G1, C7: told to stop, a run saves the step that it is at and exits with 143; killed, it loses what came after its last save. It ends as the run that nobody stopped, to the bit."
    seed, shared, doing = 31, mmap.mmap(-1, 16), Counter()
    rng, whole = random.Random(seed), small_run(room / "whole", max_steps=steps)
    whole.save(room / "start")
    start = time.perf_counter()
    whole.train()
    typical = (time.perf_counter() - start) / steps
    run = room / "stopped" / "run"
    while doing.total() < stops:
        before = latest_checkpoint(run)
        shared[:] = bytes(16)
        phase, at, last, code = stopped_once(in_new_process(room, shared, max_steps=steps), shared, how, rng.uniform(0, 40 * typical))
        assert code, f"seed {seed}: the run was done after {doing.total()} of {stops} stops"
        doing[phase] += 1
        newest = int(latest_checkpoint(run).name[5:]) if latest_checkpoint(run) else 0
        if how == signal.SIGTERM: assert code == 143 and newest == last <= at + 1, f"seed {seed}: status {code}, saved {newest}, stopped at {at}, went on to {last}"
        else: assert code == -signal.SIGKILL and newest >= (int(before.name[5:]) if before else 0) and newest >= at - 5, f"seed {seed}: {newest} of {at}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = small_run(room / "stopped", max_steps=steps)
        done.train(resume_from_checkpoint=True)
    assert done.step == steps and result(done) == result(whole), f"seed {seed}"
    if stops >= 30: assert min(doing[phase] for phase in (1, 2, 3)) >= 1, f"seed {seed}: {doing}"


# ---- quantized content that is sealed and wrong ----

LAYER = "model.layers.0.self_attn.q_proj"


def in_model(name, change):
    def forge(files, path):
        state = storage.from_pt(path, "model.pt", files["model.pt"])
        state[f"{LAYER}.{name}"] = change(state[f"{LAYER}.{name}"])
        return {"model.pt": storage.to_pt(state)}
    return forge


def in_layer(**fields):
    def forge(files, path):
        metadata = storage.from_json(path, "", files["quantization_metadata.json"])
        metadata["layers"][LAYER] |= fields
        return {"quantization_metadata.json": storage.to_json(metadata)}
    return forge


def in_metadata(change):
    def forge(files, path):
        metadata = storage.from_json(path, "", files["quantization_metadata.json"])
        change(metadata)
        return {"quantization_metadata.json": storage.to_json(metadata)}
    return forge


def at(value, place=0):
    def change(t):
        t = t.clone()
        t.view(-1)[place] = value
        return t
    return change


WRONG = {
    "scale NaN": in_model("scale", at(float("nan"))),
    "scale infinite": in_model("scale", at(float("inf"))),
    "scale negative": in_model("scale", at(-0.1)),
    "scale of another shape": in_model("scale", lambda t: t[:-1]),
    "scale float64": in_model("scale", lambda t: t.double()),
    "scale an integer": in_model("scale", lambda t: t.int()),
    "codes float": in_model("codes", lambda t: t.float()),
    "codes int8": in_model("codes", lambda t: t.view(torch.int8)),
    "codes unpacked": in_model("codes", lambda t: torch.cat([t, t], 1)),
    "codes of another height": in_model("codes", lambda t: t[:-1]),
    "group scales float": in_model("group_scale", lambda t: t.float()),
    "group scales too few": in_model("group_scale", lambda t: t[:-1]),
    "bits 3": in_layer(bits=3),
    "bits 16": in_layer(bits=16),
    "bits a string": in_layer(bits="4"),
    "bits 8 for codes of 4": in_layer(bits=8),
    "groups that do not divide": in_layer(group_size=7),
    "groups of zero": in_layer(group_size=0),
    "groups negative": in_layer(group_size=-3),
    "another shape": in_layer(shape=[16, 32]),
    "a shape that is none": in_layer(shape="16x16"),
    "a kind that there is not": in_layer(kind="convolution"),
    "a type that there is not": in_layer(type="sometimes"),
    "a layer that is not there": in_metadata(lambda m: m["layers"].update({"model.layers.9.nowhere": m["layers"][LAYER]})),
    "a layer left out": in_metadata(lambda m: m["layers"].pop(LAYER)),
    "layers a list": in_metadata(lambda m: m.update(layers=[1, 2])),
    "no layers": in_metadata(lambda m: m.update(layers={})),
    "another version": in_metadata(lambda m: m.update(format_version=99)),
    "a mode that there is not": in_metadata(lambda m: m.update(mode="guess")),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_quantization_is_refused(room, what):
    "Q1, Q3: sealed as if all were well, and refused with a CheckpointError; the model that it was meant for, float or quantized, is the same to the bit."
    def lm(): return TinyLM(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, block_size=16, generator=torch.Generator().manual_seed(1))
    sound = save_checkpoint(quantize_model_ptq(lm(), bits=4), step=1, path=room / "sound")
    files = storage.read_step(sound).files
    wrong = storage.publish_step(room / "wrong", 1, files | WRONG[what](files, sound))
    for given in (None, lm(), quantize_model_ptq(lm(), bits=4)):
        before = given and storage.to_pt(dict(given.state_dict()))
        kinds = given and [type(module) for module in given.modules()]
        with pytest.raises(CheckpointError) as e: load_checkpoint(wrong, given)
        assert "\n" not in str(e.value) and len(str(e.value)) <= 300 and "Traceback" not in str(e.value)
        assert given is None or (storage.to_pt(dict(given.state_dict())) == before and [type(module) for module in given.modules()] == kinds)
    assert load_checkpoint(sound, lm()).step == 1
