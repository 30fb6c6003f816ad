# python -m pytest tests/test_golden.py
"What an earlier version has saved loads for ever: a checkpoint of each kind, byte for byte the one in the repository, with the logits that it gave then."
import json
import warnings

import pytest
import torch
from golden import ADAPTED, GOLDEN, PARTS, QUANTIZED, TRAINING, fifty, given, ids, logits, model, vocabulary

from qtlm import get_quantization_info, inspect_checkpoint, load_checkpoint, verify_checkpoint
from qtlm.data import CharVocab
from qtlm.trainer import resume_training

KNOWN = json.loads((GOLDEN / "golden.json").read_text())


def expected(kind): return torch.tensor(KNOWN[kind]["logits"]).view(2, -1)


def test_every_kind_is_there():
    assert set(KNOWN) == {*TRAINING, *QUANTIZED, *ADAPTED} == {path.name for path in GOLDEN.iterdir() if path.is_dir()}
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 1_000_000


@pytest.mark.parametrize("kind", KNOWN)
def test_it_loads_and_computes_the_same(kind):
    "V1: from the directory alone (adapters: into a model that has such), without a warning, pinned by its digest."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_checkpoint(GOLDEN / kind, given(kind), expected_sha256=KNOWN[kind]["sha256"])
    assert torch.allclose(logits(found.model)[:, -1], expected(kind), atol=2e-5, rtol=0), (logits(found.model)[:, -1] - expected(kind)).abs().max()
    assert isinstance(found.vocab, CharVocab) and found.vocab.decode(found.vocab.encode("night")) == "night"
    assert verify_checkpoint(GOLDEN / kind).ok and inspect_checkpoint(GOLDEN / kind).step == found.step == (6 if kind in QUANTIZED else 3)
    assert (found.quantization is None) == (kind in ("float32", "bf16"))


def test_what_is_compared_would_show_another_model():
    "The tolerance tells the kinds apart: each one's logits are far from those of the untrained model, and of the float model."
    for kind in KNOWN:
        assert (logits(model())[:, -1] - expected(kind)).abs().max() > 1e-2
        if kind != "float32": assert kind == "bf16" or (expected("float32") - expected(kind)).abs().max() > 1e-4, kind


@pytest.mark.parametrize("kind", [*TRAINING, *ADAPTED])
def test_a_run_goes_on_from_it(kind):
    "A run of each kind is resumed from the repository and ends; its steps before are remembered."
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*another environment")
        run = resume_training(GOLDEN / kind, given(kind), train_data=ids()[:400], eval_data=ids()[400:])
    assert run.step == 3 and len(run.history.losses) == 3 and run.vocab.tokens == vocabulary().tokens
    run.train()
    assert run.step == 6 and all(loss < 4 for loss in run.history.losses)
    assert bool(get_quantization_info(run.model).layers) == (kind not in ("float32", "bf16"))


def test_what_two_processes_saved_in_parts():
    "Format 2: loads from the directory alone, pinned by its digest; computes the same; one process goes on from it."
    told = json.loads((PARTS / "golden.json").read_text())["parts"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_checkpoint(PARTS / "parts", expected_sha256=told["sha256"])
    assert torch.allclose(logits(found.model)[:, -1], torch.tensor(told["logits"]).view(2, -1), atol=2e-5, rtol=0)
    assert verify_checkpoint(PARTS / "parts").ok and found.step == 3 and found.vocab.decode(found.vocab.encode("night")) == "night"
    with pytest.warns(UserWarning, match="processes 1 .saved: 2."):
        run = resume_training(PARTS / "parts", train_data=ids()[:400], eval_data=ids()[400:])
    run.train()
    assert run.step == 6 and all(loss < 4 for loss in run.history.losses)


def test_fifty_losses():
    "R9: fifty steps give the losses that are stored; elsewhere than on the machine that made them within rounding, and how far apart is said."
    stored = json.loads((GOLDEN / "losses.json").read_text())
    expected = [float.fromhex(x) for x in stored["losses"]]
    found, environment = fifty()
    drift = max(abs(a - b) for a, b in zip(found, expected))
    differing = [name for name in environment if environment[name] != stored["environment"].get(name)]
    print(f"drift {drift:.2e}; other {', '.join(differing) or 'than then: nothing'}")
    assert len(found) == len(expected) == 50 and expected[-1] < expected[0] - 1
    assert drift < 0.02 and (differing or drift < 1e-4)  # processors of one name may still sum in another order
