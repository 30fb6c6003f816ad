# python -m pytest tests/test_mutants.py -m slow
"""Are the tests of checkpoints and of resuming any good? Each fault here is put into a copy of the package, by hand, and the tests named beside it must go red."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
MUTANTS = [  # module, what is there, what is put there instead, tests that must see it
    ("storage", "        _disk.fsync(fd)\n    finally: os.close(fd)", "    finally: os.close(fd)", "certain_before_it_is_visible or power_goes"),
    ("storage", "        _disk.fsync_dir(fresh)\n", "", "certain_before_it_is_visible or power_goes"),
    ("storage", "        raise\n    _disk.fsync_dir(run)", "        raise", "certain_before_it_is_visible or power_goes"),
    ("storage", "        if os.path.lexists(final): _disk.rename(final, aside)\n        _disk.rename(fresh, final)", "        _disk.mkdir(final)\n        for file in files: _disk.rename(fresh / file, final / file)", "killed_at_every_operation or power_goes"),
    ("storage", "            if (found := _sha256(data)) != wanted: raise", "            if name != 'config.json' and (found := _sha256(data)) != wanted: raise", "test_every_byte or test_corruptions"),
    ("storage", "        if seal != f\"{digest}\\n\".encode(): raise", "        if False: raise", "test_every_byte or test_corruptions"),
    ("storage", "        if extra := set(os.listdir(fd)) - {*listed, \"manifest.json\", \"COMMITTED\"}:", "        if extra := set():", "test_corruptions"),
    ("storage", "    return [(step, path) for step, _, path in sorted(found, reverse=True)]", "    return [(step, path) for step, _, path in sorted(found, key=lambda f: -f[2].stat().st_mtime)]", "hints_and_clocks"),
    ("storage", "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", "busy or two_writers"),
    ("storage", "        if path.name not in keep:", "        if True:", "retention"),
    ("storage", "if entry.name.startswith((\".tmp-\", \".del-\")): _disk.remove(entry)", "if False: pass", "killed_at_every_operation"),
    ("storage", "os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd", "os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd", "what_is_not_a_file"),
    ("storage", "        if not stat.S_ISREG(info.st_mode): raise", "        if False: raise", "what_is_not_a_file"),
    ("storage", "if type(version) is not int or not 1 <= version <= _VERSION:", "if version != _VERSION and not isinstance(version, (bool, float)):", "test_versions"),
    ("storage", "        except CheckpointVersionError: raise\n", "", "test_versions"),
    ("checkpoint", "        if saved.shape != t.shape or saved.dtype != t.dtype:", "        if saved.shape != t.shape:", "integers_and_floats or first_misfit or failed_load or fit"),
    ("checkpoint", "            for t, old in tensors: t.copy_(old)", "            pass", "failed_load_changes_nothing"),
    ("checkpoint", "                optimizer.state[p][key] = value.to(now.device)", "                pass", "moments_keep"),
    ("checkpoint", "        for a, b in zip(sum(saved.get(\"param_names\", names), []), sum(names, [])):", "        for a, b in ():", "failed_load or optimizers or first_misfit"),
    ("checkpoint", "    _refuse_nonfinite(CheckpointWriteError, \"model\", model, live)\n", "", "cannot_be_saved"),
    ("checkpoint", "    if expected_sha256 not in (None, ckpt.digest):", "    if False:", "pinned"),
    ("trainer", "    trainer.step, trainer.tokens_seen = state[\"step\"], state[\"tokens_seen\"]", "    trainer.step = state[\"step\"]", "every_step_of_every_kind and float32"),
    ("trainer", "    set_rng_state_(state[\"rng\"])\n", "", "left_out"),
    ("trainer", "            callback.load_state_dict(remembered)", "            pass", "left_out"),
    ("trainer", "    _check_data(state[\"data\"], trainer._data_identity)\n", "", "other_data"),
    ("trainer", "        zero_gradients_(model)\n        _put_back_(buffers)\n", "        zero_gradients_(model)\n", "refused_step_leaves"),
    ("trainer", "    if signals.received:\n        signals.leave()", "    if False:\n        signals.leave()", "again_and_again and SIGTERM or signals_save"),
    ("optim", "        return super().state_dict() | {\"rounding\": {\"seed\": self._seed, \"generators\": _generator_states(self._generators)}}", "        return super().state_dict() | {\"rounding\": {\"seed\": self._seed, \"generators\": {}}}", "some_steps and INT8"),
    ("qat", "        module.register_buffer(name, value.to(device))", "        module.register_buffer(name, value.to(device), persistent=False)", "some_steps and static"),
]


def mutated(tmp_path, module, old, new):
    "A copy of the package and its tests with one fault in it."
    for folder in ("qtlm", "tests"): shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "checkpoints" / "golden", tmp_path / "checkpoints" / "golden", dirs_exist_ok=True) if (ROOT / "checkpoints" / "golden").exists() else None
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "qtlm" / f"{module}.py"
    text = path.read_text()
    assert text.count(old) == 1, f"{module}: {text.count(old)} places for {old!r}: the code has changed, bring this list up to date"
    path.write_text(text.replace(old, new))


def run(tmp_path, chosen):
    "Run the tests whose name fits, in the copy."
    files = ["tests/test_checkpoint.py", "tests/test_faults.py", "tests/test_resume.py", "tests/test_trainer.py", "tests/test_spec_checkpoint.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "-k", chosen, *files]
    return subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def test_without_a_fault_they_pass(tmp_path):
    mutated(tmp_path, "storage", "import errno\n", "import errno\n")
    done = run(tmp_path, "pinned or moments_keep or busy")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-2000:]
    where = subprocess.run([sys.executable, "-c", "import qtlm; print(qtlm.__file__)"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert where.stdout.startswith(str(tmp_path)), "the copy is what is tested"


@pytest.mark.parametrize(("module", "old", "new", "tests"), MUTANTS, ids=[f"{i}-{mutant[0]}" for i, mutant in enumerate(MUTANTS)])
def test_each_fault_is_found(tmp_path, module, old, new, tests):
    "I4: a guard taken out of the code makes a test go red."
    mutated(tmp_path, module, old, new)
    done = run(tmp_path, tests)
    assert done.returncode == 1 and " failed" in done.stdout, f"{module}: nobody sees that {old!r} became {new!r}\n{done.stdout[-1500:]}"
