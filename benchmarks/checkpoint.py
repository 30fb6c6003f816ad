"""What it costs to save and to load a run so that nothing can be lost: beside plain `torch.save` and `torch.load` of the same state.

    python benchmarks/checkpoint.py             # in a temporary directory; --folder puts it on a disk of your choice, --rounds takes more

The state: the 12 M model of the speed benchmarks, its AdamW moments, and what the trainer adds (147 MB). In turn: `torch.save` into a file; `save_checkpoint` with the waits for the
disk (fsync) left out, which is what its hashing, checks and manifest cost; `save_checkpoint` as it is. Then `torch.load`, `verify_checkpoint`, `load_checkpoint` into a model.
Peak is the most memory that saving takes beside the state, as a share of it.
"""

import argparse
import ctypes
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from common import in_turn, random_ids, report, tiny_lm

from qtlm import Trainer, load_checkpoint, save_checkpoint, verify_checkpoint
from qtlm.storage import _Disk


def most_memory(call: Callable) -> int:
    "Bytes that the process held at most while `call` ran, above what it held before; of Linux."
    status = lambda key: next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)) * 1024
    Path("/proc/self/clear_refs").write_text("5")  # begins to count anew
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def main(folder: Path, rounds: int) -> None:
    "Measure all of it in `folder`."
    trainer = Trainer(tiny_lm(), progress=False, batch_size=1, block_size=256)
    trainer.training_step(random_ids(1, 257))
    state = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict(), "trainer": trainer.state_dict()}
    numbers = iter(range(10**6))

    def plain(): torch.save(state, folder / "plain.pt")
    def safe(): save_checkpoint(trainer.model, trainer.optimizer, trainer.config, step=next(numbers), path=folder / "run", trainer=trainer, save_total_limit=1)

    def unsynced():
        with mock.patch.multiple(_Disk, fsync=lambda *_: None, fsync_dir=lambda *_: None): safe()

    ctypes.CDLL(None).malloc_trim(0)
    most = most_memory(safe)
    tables = {"saving": in_turn({"torch.save": plain, "save_checkpoint, fsyncs left out": unsynced, "save_checkpoint": safe}, rounds)}
    newest, other = next((folder / "run").glob("step-*")), tiny_lm(1)
    calls = {"torch.load": lambda: torch.load(folder / "plain.pt"), "verify_checkpoint": lambda: verify_checkpoint(newest), "load_checkpoint into a model": lambda: load_checkpoint(newest, other)}
    tables["loading"] = in_turn(calls, rounds)
    for rows in tables.values():
        for row in rows.values(): row["cost"] = 1 / row["speedup"]
    size = sum(path.stat().st_size for path in newest.iterdir())
    tables["saving"]["save_checkpoint"]["peak_percent"] = 100 * most / size
    tables["saving"]["save_checkpoint"]["megabytes"] = size / 1e6
    for rows in tables.values(): print({name: round(row["cost"], 2) for name, row in rows.items()})
    report("checkpoint", tables)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary directory")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=options.folder))
    try: main(place, options.rounds)
    finally: shutil.rmtree(place)
