# pytest tests/test_spec_training.py
"""The requirements on training, scenario by scenario; each test quotes the one it proves."""

import json
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qtlm import ModelConfig, TinyLM, Trainer, TrainingConfig, compute_loss, load_config

SHAPE = ModelConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, block_size=16)


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return TinyLM(SHAPE.replace(**changes))


def repeating(n=2000, period=7):
    "Tokens that repeat with a period: learnable in a few steps."
    return torch.arange(n) % period


@pytest.fixture
def quiet():
    return {"progress": False, "batch_size": 4, "block_size": 16}


def test_loss_computation_on_model_outputs():
    """Scenario: Loss computation on model outputs
    - **WHEN** `compute_loss()` receives logits of shape [B, 256, vocab_size] and targets of shape [B, 256]
    - **THEN** it computes cross-entropy loss for next-token prediction over all positions
    - **AND** returns a scalar loss value suitable for backward pass
    """
    logits = torch.randn(3, 256, 50, requires_grad=True)
    targets = torch.randint(50, (3, 256))
    loss = compute_loss(logits, targets)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.reshape(-1, 50), targets.reshape(-1)))
    loss.backward()
    assert logits.grad.shape == logits.shape and (logits.grad.abs().sum(-1) > 0).all()  # every position counts


def test_loss_correctness():
    """Scenario: Loss correctness
    - **WHEN** `compute_loss()` is called with known inputs
    - **THEN** the computed loss matches expected values (within numerical tolerance)
    - **AND** loss is differentiable for gradient computation
    """
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(7.0), 0.0]]], requires_grad=True)
    loss = compute_loss(logits, torch.tensor([[1, 1]]))
    expected = (-math.log(3 / 4) - math.log(1 / 8)) / 2
    assert abs(loss.item() - expected) < 1e-6
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[[1 / 4, -1 / 4], [7 / 8, -7 / 8]]]) / 2)


def test_complete_training_step(quiet):
    """Scenario: Complete training step
    - **WHEN** `Trainer.training_step()` is called with a batch of input data
    - **THEN** it performs: forward pass through the model, loss computation, backward pass (gradient computation), optimizer step (parameter update)
    - **AND** the step completes without errors
    """
    model, twin = tiny(), tiny()
    ids = repeating().reshape(-1, 20)[:4, :17]
    loss = Trainer(model, **quiet).training_step(ids)
    reference = F.cross_entropy(twin(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert loss == pytest.approx(reference.item(), rel=1e-6)
    reference.backward()
    nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    matrices, rest = [p for p in twin.parameters() if p.ndim > 1], [p for p in twin.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95)).step()
    for mine, theirs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_step_counter_increments(quiet):
    """Scenario: Step counter increments
    - **WHEN** `Trainer.training_step()` is called
    - **THEN** the step counter increments by one
    - **AND** the step number is tracked correctly across multiple steps
    """
    trainer = Trainer(tiny(), **quiet)
    for step in range(5):
        assert trainer.step == step
        trainer.training_step(repeating()[:17][None])
    assert trainer.step == 5 and [r["step"] for r in trainer.history.records] == [1, 2, 3, 4, 5]


def test_loss_logging(quiet, tmp_path, caplog):
    """Scenario: Loss logging
    - **WHEN** `Trainer.training_step()` completes
    - **THEN** the loss value is logged (e.g., printed or written to log file)
    - **AND** the logged loss corresponds to the computed loss for that step
    """
    trainer = Trainer(tiny(), **quiet)
    with caplog.at_level(logging.INFO, logger="qtlm"):
        loss = trainer.training_step(repeating()[:17][None])
    assert trainer.history.losses == [loss] and f"step 1 loss {loss:.6f}" in caplog.text

    kept = Trainer(tiny(), train_data=repeating(), max_steps=3, output_dir=tmp_path, **quiet)
    history = kept.train()
    lines = [json.loads(line) for line in (kept.run_dir / "history.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == history.losses and len(history.losses) == 3


def test_adamw_optimizer_setup():
    """Scenario: AdamW optimizer setup
    - **WHEN** `Trainer` is instantiated with a model
    - **THEN** AdamW optimizer is configured with: learning_rate=3e-4, weight_decay=0.1, betas=(0.9, 0.95)
    - **AND** optimizer state is tracked correctly
    """
    trainer = Trainer(tiny())
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    for group in trainer.optimizer.param_groups:
        assert group["lr"] == 3e-4 and tuple(group["betas"]) == (0.9, 0.95)
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert all(decays[id(p)] == (0.1 if p.ndim > 1 else 0.0) for p in trainer.model.parameters())
    trainer.training_step(repeating()[:17][None])
    assert {id(p) for p in trainer.optimizer.state} == {id(p) for p in trainer.model.parameters()}


def test_optimizer_updates_parameters(quiet):
    """Scenario: Optimizer updates parameters
    - **WHEN** `Trainer.training_step()` completes an optimizer step
    - **THEN** model parameters are updated according to computed gradients
    - **AND** optimizer state (momentum, etc.) is maintained correctly
    """
    model = tiny()
    trainer = Trainer(model, **quiet, weight_decay=0.0, max_grad_norm=None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = repeating()[:17][None]
    compute_loss(model(ids[:, :-1]), ids[:, 1:]).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    trainer.training_step(ids)
    for name, p in model.named_parameters():
        state = trainer.optimizer.state[p]
        torch.testing.assert_close(state["exp_avg"], 0.1 * gradients[name], atol=1e-9, rtol=1e-4)
        torch.testing.assert_close(state["exp_avg_sq"], 0.05 * gradients[name] ** 2, atol=1e-12, rtol=1e-3)
        assert float(state["step"]) == 1
        big = gradients[name].abs() > 1e-6  # AdamW's first step is the learning rate against the gradient's sign
        torch.testing.assert_close((before[name] - p)[big], 3e-4 * gradients[name].sign()[big], atol=5e-6, rtol=2e-2)


def test_config_loading(tmp_path, quiet):
    """Scenario: Config loading
    - **WHEN** training is initiated
    - **THEN** hyperparameters can be loaded from configuration file or passed as parameters
    - **AND** config includes learning rate, weight decay, betas, and other training parameters
    """
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-3\nweight_decay: 0.2\nbetas: [0.8, 0.9]\nmax_steps: 3\n")
    from_file = Trainer(tiny(), load_config(path))
    as_parameters = Trainer(tiny(), learning_rate=1e-3, weight_decay=0.2, betas=(0.8, 0.9), max_steps=3)
    for trainer in (from_file, as_parameters):
        group = trainer.optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (1e-3, 0.2, (0.8, 0.9))
        assert trainer.config.max_steps == 3


def test_config_documentation():
    """Scenario: Config documentation
    - **WHEN** config system is used
    - **THEN** all config parameters are documented
    - **AND** default values are clearly specified
    (and, from the specification of training with quantization:)
    - **AND** quantization config fields are documented with usage examples
    """
    fields = TrainingConfig.model_fields
    assert {"quantization_mode", "quantization_bits", "quantization_type", "enable_quantized_finetuning"} <= set(fields)
    schema = TrainingConfig.model_json_schema()["properties"]
    for name, field in fields.items():
        assert field.description and len(field.description) > 10, name
        assert not field.is_required(), f"{name} has no default"
        assert schema[name].get("examples"), f"{name} has no example"


def test_training_on_tiny_dataset(quiet):
    """Scenario: Training on tiny dataset
    - **WHEN** `Trainer` is used to train for a few steps on a tiny dataset
    - **THEN** training completes without errors
    - **AND** loss is computed and logged for each step
    - **AND** model parameters are updated
    """
    model = tiny()
    before = [p.detach().clone() for p in model.parameters()]
    history = Trainer(model, train_data=repeating(100), max_steps=5, **quiet).train()
    assert len(history.losses) == 5 and all(math.isfinite(loss) for loss in history.losses)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_loss_decreases_on_synthetic_data(quiet):
    """Scenario: Loss decreases on synthetic data
    - **WHEN** `Trainer` trains on simple synthetic data
    - **THEN** loss decreases over multiple steps (smoke test)
    - **AND** training demonstrates learning capability
    """
    history = Trainer(tiny(), train_data=repeating(), max_steps=120, learning_rate=1e-2, **quiet).train()
    assert history.losses[0] > 3.0  # log 32 is 3.47: it knows nothing
    assert sum(history.losses[-10:]) / 10 < 0.1  # and then nearly everything


# From the specification of training with quantization: what concerns configuration


def test_quantization_config_loading(tmp_path):
    """Scenario: Config loading
    - **AND** config includes quantization settings (mode, bits, type, fine-tuning flag)
    Scenario: Load quantization config from YAML
    - **WHEN** a YAML config file includes quantization settings
    - **THEN** quantization configuration is loaded and applied
    - **AND** missing quantization fields use defaults (quantization disabled)
    """
    path = tmp_path / "run.yaml"
    path.write_text("quantization_mode: ptq\nquantization_bits: 4\n")
    config = load_config(path)
    assert (config.quantization_mode, config.quantization_bits) == ("ptq", 4)
    assert (config.quantization_type, config.enable_quantized_finetuning) == ("dynamic", False)
    path.write_text("learning_rate: 1e-3\n")
    assert load_config(path).quantization_mode is None


def test_quantization_config_defaults(quiet):
    """Scenario: Quantization config defaults
    - **WHEN** TrainingConfig is created without quantization settings
    - **THEN** quantization is disabled by default (quantization_mode=None)
    - **AND** training proceeds with full-precision model
    - **AND** backward compatibility is maintained
    """
    config = TrainingConfig()
    assert config.quantization_mode is None and config.enable_quantized_finetuning is False
    model = tiny()
    Trainer(model, config.replace(**quiet, max_steps=2), train_data=repeating()).train()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not [b for b in model.state_dict().values() if b.dtype in (torch.int8, torch.uint8)]


@pytest.mark.parametrize("mode", ["ptq", "qat", None])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_configure_quantization_via_training_config(mode, bits, kind):
    """Scenario: Configure quantization via TrainingConfig
    - **WHEN** TrainingConfig is created with quantization settings
    - **THEN** quantization_mode can be set to "ptq", "qat", or None
    - **AND** quantization_bits can be set to 8 or 4
    - **AND** quantization_type can be set to "static" or "dynamic"
    - **AND** enable_quantized_finetuning can be enabled/disabled
    - **AND** default values disable quantization (backward compatible)
    """
    for finetuning in (True, False):
        settings = dict(quantization_mode=mode, quantization_bits=bits, quantization_type=kind, enable_quantized_finetuning=finetuning)
        config = TrainingConfig(**settings)
        assert {name: getattr(config, name) for name in settings} == settings
        assert TrainingConfig(**config.to_dict()) == config
    assert TrainingConfig().quantization_mode is None
