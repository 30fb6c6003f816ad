# python -m pytest tests/test_spec_checkpoint.py
"""The requirement, scenario by scenario: each docstring is the scenario's own text. What needs quantized fine-tuning is tested where that is."""
import json
import warnings

import pytest
import torch
from torch import nn

from qtlm.checkpoint import load_checkpoint, save_checkpoint
from qtlm.config import ModelConfig, TrainingConfig
from qtlm.data import ByteVocab
from qtlm.model import TinyLM
from qtlm.quantization import QuantLinear, get_quantization_info, quantize_model_ptq
from qtlm.storage import from_pt

CONFIG = TrainingConfig(learning_rate=1e-3, seed=7)


def build(seed=0):
    "A model and its optimizer."
    model = TinyLM(ModelConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, block_size=32, dropout=0.1),
                   generator=torch.Generator().manual_seed(seed))
    return model, torch.optim.AdamW(model.parameters(), lr=CONFIG.learning_rate)


def train(model, optimizer, first, last):
    "Steps `first` to `last`, with dropout; the losses."
    losses = []
    model.train()
    for step in range(first, last):
        batch = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(step))
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same(a, b):
    "Whether two states are equal, to the bit."
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def saved(tmp_path):
    "A run of five steps, saved: model, optimizer, directory."
    model, optimizer = build()
    train(model, optimizer, 0, 5)
    return model, optimizer, save_checkpoint(model, optimizer, CONFIG, ByteVocab(), 5, tmp_path / "checkpoints" / "run")


@pytest.fixture(params=[8, 4])
def saved_quantized(request, tmp_path):
    "A quantized model, saved: model, directory, bits."
    model = quantize_model_ptq(build()[0].eval(), bits=request.param)
    return model, save_checkpoint(model, None, CONFIG, ByteVocab(), 5, tmp_path / "checkpoints" / "integers"), request.param


def test_save_checkpoint_creates_files(saved, tmp_path, monkeypatch):
    """Scenario: Save checkpoint creates files
    WHEN `save_checkpoint()` is called with model, optimizer, config, vocab, and step
    THEN checkpoint files are created in the checkpoints directory
    AND model state_dict is saved in binary format (PyTorch format)
    AND optimizer state_dict is saved
    AND training config is saved in JSON-compatible format
    AND vocabulary is saved
    AND step counter is saved
    AND metadata file contains checkpoint information
    """
    model, optimizer, path = saved
    monkeypatch.chdir(tmp_path)
    assert save_checkpoint(model, optimizer, CONFIG, ByteVocab(), 5).relative_to("checkpoints").name == "step-0000000005"
    tensors = torch.load(path / "model.pt", weights_only=True)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in tensors.items())
    assert same(torch.load(path / "optimizer.pt", weights_only=True)["state_dict"], optimizer.state_dict())
    assert TrainingConfig(**json.loads((path / "config.json").read_text())) == CONFIG
    assert json.loads((path / "vocab.json").read_text()) == ByteVocab().to_dict()
    metadata = json.loads((path / "metadata.json").read_text())
    assert metadata["step"] == 5 and metadata["model_class"] == "TinyLM" and metadata["environment"]["torch"] == torch.__version__


def test_save_quantized_checkpoint(saved_quantized, saved):
    """Scenario: Save quantized checkpoint
    WHEN `save_checkpoint()` is called with a quantized model
    THEN quantization metadata is saved in `quantization_metadata.json`
    AND quantized model state_dict is saved
    AND quantization parameters (scales, zero-points) are included
    AND checkpoint metadata indicates quantization mode and bits
    AND checkpoint can be distinguished from full-precision checkpoints
    """
    model, path, bits = saved_quantized
    about = json.loads((path / "quantization_metadata.json").read_text())
    assert set(about["layers"]) == {name for name, m in model.named_modules() if hasattr(m, "codes")}
    tensors = torch.load(path / "model.pt", weights_only=True)
    for name, t in model.state_dict().items():
        if name in tensors: assert torch.equal(tensors[name], t) and tensors[name].dtype == t.dtype
    assert any(name.endswith(".codes") for name in tensors) and any(name.endswith(".scale") for name in tensors)
    metadata = json.loads((path / "metadata.json").read_text())
    assert (metadata["quantization_mode"], metadata["quantization_bits"]) == ("ptq", bits)
    plain = saved[2]
    assert not (plain / "quantization_metadata.json").exists()
    assert json.loads((plain / "metadata.json").read_text())["quantization_mode"] == "none"


def test_checkpoint_format(saved):
    """Scenario: Checkpoint format
    WHEN checkpoint is saved
    THEN checkpoint uses PyTorch format (torch.save) for binary weights
    AND metadata is stored in JSON format for human readability
    AND checkpoint files are organized in checkpoints/ directory
    AND checkpoint format version is included in metadata
    """
    path = saved[2]
    assert isinstance(torch.load(path / "model.pt", weights_only=True), dict)
    text = (path / "metadata.json").read_text()
    assert json.loads(text)["format_version"] == 1 and text.count("\n") > 10  # one fact a line
    assert path.parent.parent.name == "checkpoints" and (path.parent / "latest").read_text().strip() == path.name


def test_load_checkpoint_restores_model_state(saved):
    """Scenario: Load checkpoint restores model state
    WHEN `load_checkpoint()` is called with a checkpoint path
    THEN model state_dict is loaded and restored to the model
    AND model parameters match the saved checkpoint exactly
    """
    model, _, path = saved
    target = build(seed=1)[0]
    assert not same(target.state_dict(), model.state_dict())
    for found in (load_checkpoint(path, target).model, load_checkpoint(path).model, load_checkpoint(path.parent).model):
        assert same(found.state_dict(), model.state_dict())
    assert same(target.state_dict(), model.state_dict())


def test_load_quantized_checkpoint(saved_quantized):
    """Scenario: Load quantized checkpoint
    WHEN `load_checkpoint()` is called with a quantized checkpoint path
    THEN quantization metadata is loaded from `quantization_metadata.json`
    AND quantized model state_dict is restored
    AND quantization parameters are restored
    AND model is restored in quantized format
    AND model can be used for inference or fine-tuning
    """
    model, path, bits = saved_quantized
    ids = torch.arange(32)[None]
    for ckpt in (load_checkpoint(path), load_checkpoint(path, build()[0].eval()), load_checkpoint(path, quantize_model_ptq(build(1)[0].eval(), bits=bits))):
        assert ckpt.quantization == json.loads((path / "quantization_metadata.json").read_text())
        assert same(ckpt.model.state_dict(), model.state_dict())
        assert isinstance(ckpt.model.get_submodule("model.layers.0.self_attn.q_proj"), QuantLinear)
        assert get_quantization_info(ckpt.model).bits == bits and torch.equal(ckpt.model(ids), model(ids))
        ckpt.model(ids).sum().backward()
        assert any(p.grad is not None for p in ckpt.model.parameters())


def test_load_checkpoint_restores_optimizer_state(saved):
    """Scenario: Load checkpoint restores optimizer state
    WHEN `load_checkpoint()` is called with a checkpoint path
    THEN optimizer state_dict is loaded and restored to the optimizer
    AND optimizer state (momentum, etc.) matches the saved checkpoint
    """
    _, optimizer, path = saved
    model, target = build(seed=1)
    ckpt = load_checkpoint(path, model, target)
    assert ckpt.optimizer is target and same(target.state_dict(), optimizer.state_dict())
    assert same(load_checkpoint(path).optimizer["state_dict"], optimizer.state_dict())  # without an optimizer: what was saved


def test_load_checkpoint_restores_training_state(saved):
    """Scenario: Load checkpoint restores training state
    WHEN `load_checkpoint()` is called with a checkpoint path
    THEN training config is loaded and restored
    AND vocabulary is loaded and restored
    AND step counter is loaded and restored
    AND all checkpoint data is returned in a structured format
    """
    ckpt = load_checkpoint(saved[2])
    assert ckpt.config == CONFIG and isinstance(ckpt.config, TrainingConfig)
    assert ckpt.vocab == ByteVocab() and ckpt.vocab.decode(ckpt.vocab.encode("text")) == "text"
    assert ckpt.step == 5 and ckpt.path == saved[2] and ckpt.metadata["step"] == 5
    assert all(hasattr(ckpt, name) for name in "model optimizer config vocab step metadata quantization training_state path digest".split())


def test_backward_compatibility_with_old_checkpoints(saved):
    """Scenario: Backward compatibility with old checkpoints
    WHEN `load_checkpoint()` is called with an old checkpoint (no quantization metadata)
    THEN checkpoint loads successfully as full-precision model
    AND no errors are raised due to missing quantization metadata
    AND model is restored in FP32 format
    """
    model, _, path = saved
    new = load_checkpoint(path)
    for name in ("manifest.json", "COMMITTED"): (path / name).unlink()  # from before checksums
    metadata = json.loads((path / "metadata.json").read_text())
    kept = {k: v for k, v in metadata.items() if not k.startswith("quantization")}
    (path / "metadata.json").write_text(json.dumps(kept))  # and from before quantization
    with pytest.warns(UserWarning, match="nothing vouches for its bytes"): old = load_checkpoint(path)
    (path / "metadata.json").unlink()  # and from before metadata
    with pytest.warns(UserWarning, match="nothing vouches for its bytes"): oldest = load_checkpoint(path, build(1)[0])
    for ckpt in (new, old, oldest):
        assert ckpt.quantization is None and get_quantization_info(ckpt.model).layers == {}
        assert {t.dtype for t in ckpt.model.state_dict().values()} == {torch.float32} and same(ckpt.model.state_dict(), model.state_dict())


def test_resume_continues_step_count(saved, tmp_path):
    """Scenario: Resume continues step count
    WHEN training is resumed from a checkpoint
    THEN step counter continues from the saved step number
    AND subsequent steps increment correctly from the resumed step
    """
    model, optimizer = build(1)
    ckpt = load_checkpoint(saved[2], model, optimizer)
    assert ckpt.step == 5
    for step in range(ckpt.step + 1, 8):
        train(model, optimizer, step - 1, step)
        assert load_checkpoint(save_checkpoint(model, optimizer, CONFIG, step=step, path=saved[2].parent)).step == step
    assert {int(s["step"]) for s in optimizer.state.values()} == {7} and load_checkpoint(saved[2].parent).step == 7


def test_resume_produces_identical_loss_progression(tmp_path):
    """Scenario: Resume produces identical loss progression
    WHEN training is interrupted, checkpointed, and resumed
    THEN loss values after resume match loss values from uninterrupted training (within numerical tolerance)
    AND model parameters after resume match parameters from uninterrupted training (within numerical tolerance)
    AND training behavior is identical to uninterrupted training
    """
    straight, straight_optimizer = build()
    losses = train(straight, straight_optimizer, 0, 12)
    for stop in range(12):  # at every step; and no tolerance is needed
        model, optimizer = build()
        train(model, optimizer, 0, stop)
        path = save_checkpoint(model, optimizer, CONFIG, step=stop, path=tmp_path / str(stop))
        resumed, resumed_optimizer = build(seed=1)
        first = load_checkpoint(path, resumed, resumed_optimizer).step
        assert train(resumed, resumed_optimizer, first, 12) == losses[stop:]
        assert same(resumed.state_dict(), straight.state_dict()) and same(resumed_optimizer.state_dict(), straight_optimizer.state_dict())


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_resume_restores_complete_state(saved, tmp_path, bits):
    """Scenario: Resume restores complete state
    WHEN training is resumed from a checkpoint
    THEN model is restored to saved state
    AND optimizer is restored to saved state
    AND training configuration matches saved configuration
    AND vocabulary matches saved vocabulary
    AND step counter matches saved step
    AND quantization state is restored if present
    """
    model, optimizer, path = saved
    if bits:
        model = quantize_model_ptq(model.eval(), bits=bits)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.arange(16)[None]).sum().backward()
        optimizer.step()
        path = save_checkpoint(model, optimizer, CONFIG, ByteVocab(), 5, tmp_path / "q")
    target = load_checkpoint(path).model
    ckpt = load_checkpoint(path, target, torch.optim.AdamW(target.parameters()))
    assert same(ckpt.model.state_dict(), model.state_dict()) and same(ckpt.optimizer.state_dict(), optimizer.state_dict())
    assert (ckpt.config, ckpt.vocab, ckpt.step) == (CONFIG, ByteVocab(), 5)
    assert get_quantization_info(ckpt.model).bits == bits and (ckpt.quantization is None) == (bits is None)


def test_missing_checkpoint_file(tmp_path):
    """Scenario: Missing checkpoint file
    WHEN `load_checkpoint()` is called with a non-existent checkpoint path
    THEN an appropriate error is raised (e.g., FileNotFoundError)
    AND error message clearly indicates the checkpoint file is missing
    """
    for path in (tmp_path / "none", str(tmp_path / "none" / "step-0000000001"), tmp_path / "none.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match="checkpoint missing"): load_checkpoint(path)


def test_corrupted_checkpoint_file(saved):
    """Scenario: Corrupted checkpoint file
    WHEN `load_checkpoint()` is called with a corrupted checkpoint file
    THEN an appropriate error is raised (e.g., RuntimeError or ValueError)
    AND error message clearly indicates the checkpoint file is corrupted or invalid
    """
    path = saved[2]
    for name in ("model.pt", "optimizer.pt", "config.json", "vocab.json", "metadata.json", "manifest.json", "COMMITTED"):
        data = (path / name).read_bytes()
        for damaged in (b"", data[:len(data) // 2], bytes([data[0] ^ 1]) + data[1:], data + b"\n", b"not a checkpoint"):
            (path / name).write_bytes(damaged)
            with pytest.raises(RuntimeError, match="corrupted"): load_checkpoint(path)
        (path / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(path).step == 5


def test_missing_quantization_metadata(saved_quantized):
    """Scenario: Missing quantization metadata
    WHEN `load_checkpoint()` is called on a checkpoint that claims to be quantized but lacks quantization metadata
    THEN an appropriate error is raised with clear message
    AND error message indicates missing quantization information
    """
    path = saved_quantized[1]
    (path / "quantization_metadata.json").unlink()
    with pytest.raises(RuntimeError, match="missing quantization information"): load_checkpoint(path)
    for name in ("manifest.json", "COMMITTED"): (path / name).unlink()  # the same from before checksums
    with pytest.raises(RuntimeError, match="missing quantization information"): load_checkpoint(path)
    assert from_pt(path, "model.pt", (path / "model.pt").read_bytes())  # the integers are there; what they mean is not
