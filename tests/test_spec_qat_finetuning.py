# pytest tests/test_spec_qat_finetuning.py
"""Training with quantization, scenario by scenario: with the rounding on, and on codes; each test quotes the scenario it proves."""

import copy
import io
import time

import pytest
import torch

from qtlm import (
    ConfigError,
    QuantizationError,
    TinyLM,
    Trainer,
    TrainingConfig,
    convert_qat,
    get_quantization_info,
    load_checkpoint,
    quantize_model_ptq,
    resume_training,
)  # fmt: skip
from qtlm.data import ByteVocab, Tokens

QUIET = dict(progress=False, output_dir=None, device="cpu", batch_size=8, block_size=32, max_steps=60, learning_rate=3e-3)
FIRST = Tokens.from_text("the quick brown fox jumps over the lazy dog. " * 80, ByteVocab(), cache_dir=False)
OTHER = Tokens.from_text("SPHINX OF BLACK QUARTZ, JUDGE MY VOW! 0123456789 " * 80, ByteVocab(), cache_dir=False)
BITS = pytest.mark.parametrize("bits", [8, 4])
KINDS = pytest.mark.parametrize("kind", ["dynamic", "static"])


def tiny():
    torch.manual_seed(0)
    return TinyLM(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, block_size=32)


@pytest.fixture(scope="module")
def trained():
    trainer = Trainer(tiny(), train_data=FIRST, **{**QUIET, "max_steps": 150})
    trainer.train()
    return trainer.model.eval()


def batch(tokens=FIRST):
    return torch.stack([tokens.ids[i : i + 33] for i in range(0, 8 * 20, 20)])


def loss(model, tokens=FIRST):
    return Trainer(copy.deepcopy(model), **{**QUIET, "enable_quantized_finetuning": is_quantized(model)}).evaluate([batch(tokens)])["loss"]


def is_quantized(model):
    return any(hasattr(m, "codes") for m in model.modules())


def file_size(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return len(file.getvalue())


def codes(model):
    return {name: t.clone() for name, t in model.state_dict().items() if name.endswith("codes")}


def changed(a, b):
    return [name for name in a if not torch.equal(a[name], b[name])]


def qat(bits=4, kind="dynamic", **more):
    return dict(quantization_mode="qat", quantization_bits=bits, quantization_type=kind, **more)


@BITS
@KINDS
def test_training_step_with_qat(bits, kind):
    """Scenario: Training step with QAT
    - **WHEN** `Trainer.training_step()` is called with QAT enabled
    - **THEN** forward pass simulates quantization
    - **AND** gradients are computed in full precision
    - **AND** model parameters are updated normally
    - **AND** quantization simulation affects forward pass only"""
    plain, aware = Trainer(tiny(), **QUIET), Trainer(tiny(), train_data=FIRST, **QUIET, **qat(bits, kind))
    seen = {}
    for name, p in aware.model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.__setitem__(name, p.grad.dtype))
    before = {name: p.detach().clone() for name, p in aware.model.named_parameters()}
    assert all(torch.equal(p, before[name]) for name, p in plain.model.named_parameters())  # preparing changed no weight
    losses = aware.training_step(batch()), plain.training_step(batch())
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.5)
    assert set(seen) == set(before) and set(seen.values()) == {torch.float32}
    assert all(p.dtype == torch.float32 and not torch.equal(p, before[name]) for name, p in aware.model.named_parameters())
    grid = aware.model.lm_head.weight.detach()[:, :8].unique().numel()
    assert grid == aware.model.lm_head.weight[:, :8].numel()  # floats, each its own: nothing was rounded in place


@BITS
def test_training_step_with_quantized_model_finetuning(bits, trained):
    """Scenario: Training step with quantized model fine-tuning
    - **WHEN** `Trainer.training_step()` is called on a quantized model with fine-tuning enabled
    - **THEN** forward pass uses quantized weights
    - **AND** gradients are computed correctly
    - **AND** optimizer updates quantized parameters appropriately
    - **AND** quantization is maintained after optimizer step"""
    model = quantize_model_ptq(trained, bits=bits)
    expected = loss(model, OTHER)
    before, info = codes(model), get_quantization_info(model)
    trainer = Trainer(model, **QUIET, enable_quantized_finetuning=True)
    assert trainer.training_step(batch(OTHER)) == pytest.approx(expected, abs=1e-6)  # the loss of the integer model itself
    after = get_quantization_info(trainer.model)
    assert set(changed(before, codes(trainer.model))) == set(before)
    assert (after.bits, after.bytes, after.layers.keys()) == (bits, info.bytes, info.layers.keys())
    assert loss(trainer.model, OTHER) < expected


def test_enable_qat_via_config():
    """Scenario: Enable QAT via config
    - **WHEN** TrainingConfig has quantization_mode="qat"
    - **THEN** Trainer enables quantization simulation during training
    - **AND** forward passes simulate quantization effects
    - **AND** backward passes use full-precision gradients"""
    model = tiny()
    with torch.no_grad():
        plain = model(batch()[:, :-1])
        trainer = Trainer(model, TrainingConfig(**QUIET, **qat()))
        assert trainer.model is model and get_quantization_info(model).mode == "qat"
        assert not torch.equal(model(batch()[:, :-1]), plain)
    model(batch()[:, :-1]).square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("options", [dict(bits=8), dict(bits=4), dict(bits=4, group_size=-1), dict(bits=8, type="static"), dict(bits=4, learned_scales=True)], ids=str)
def test_qat_training_workflow(options, trained):
    """Scenario: QAT training workflow / QAT produces quantizable model
    - **WHEN** `Trainer` is used with quantization_mode="qat"
    - **THEN** training completes with quantization simulation enabled
    - **AND** model learns quantization-aware representations
    - **AND** trained model can be quantized with minimal accuracy loss
    - **AND** quantization parameters are optimized during training"""
    fields = {f"quantization_{name}": value for name, value in options.items()}
    trainer = Trainer(copy.deepcopy(trained), train_data=FIRST, **QUIET, quantization_mode="qat", **fields)
    scales = {name: layer.weight_buffers()["scale"] for name, layer in trainer.model.named_modules() if "qat" in vars(layer)}
    history = trainer.train()
    assert len(history.losses) == 60
    simulated = trainer.evaluate([batch()])["loss"]
    converted = trainer.convert_qat()
    assert loss(converted) == pytest.approx(simulated, abs=1e-6)  # quantized for good, it loses nothing more
    assert loss(converted) < loss(trained) + 0.02
    assert all(not torch.equal(scales[name], converted.get_submodule(name).scale) for name in scales)
    assert get_quantization_info(converted).mode == "qat" and file_size(converted) < 0.5 * file_size(trained)


@BITS
def test_fine_tuning_workflow(bits, trained, tmp_path):
    """Scenario: Quantized model fine-tuning workflow / Fine-tune quantized model via Trainer
    - **WHEN** `Trainer` is used to fine-tune a quantized model
    - **THEN** training proceeds with quantized weights
    - **AND** loss decreases over fine-tuning steps
    - **AND** quantization is maintained throughout fine-tuning
    - **AND** fine-tuned model can be saved and loaded
    - **AND** model can be saved and resumed from checkpoints"""
    settings = {**QUIET, "output_dir": str(tmp_path), "save_steps": 20, "enable_quantized_finetuning": True}
    trainer = Trainer(quantize_model_ptq(trained, bits=bits), train_data=OTHER, **settings)
    history = trainer.train()
    assert history.losses[-1] < 0.5 * history.losses[0]
    saved = load_checkpoint(tmp_path / "run")
    assert saved.quantization["layers"] and not changed(codes(saved.model), codes(trainer.model))
    again = resume_training(tmp_path / "run" / "step-0000000020", train_data=OTHER, output_dir=str(tmp_path / "again"))
    again.train()
    assert again.history.losses == history.losses and not changed(codes(again.model), codes(trainer.model))  # to the bit


@BITS
def test_fine_tuning_preserves_quantization(bits, trained):
    """Scenario: Fine-tuning preserves quantization (benefits)
    - **WHEN** a quantized model is fine-tuned for multiple steps
    - **THEN** model size remains reduced (quantization maintained)
    - **AND** inference speed benefits are preserved
    - **AND** quantization parameters are updated appropriately
    - **AND** fine-tuning improves model performance on target task"""
    model = quantize_model_ptq(trained, bits=bits)
    size, before, start = file_size(model), {name: t.clone() for name, t in model.state_dict().items()}, loss(model, OTHER)
    Trainer(model, train_data=OTHER, **QUIET, enable_quantized_finetuning=True).train()
    assert file_size(model) == size and loss(model, OTHER) < 0.5 * start
    after = model.state_dict()
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {name: (t.dtype, t.shape) for name, t in after.items()}
    scales = [name for name in after if name.endswith(".scale")]
    assert all(after[name].isfinite().all() and (after[name] > 0).all() for name in scales) and changed({n: before[n] for n in scales}, after)
    model.eval()
    plain = load_state(quantize_model_ptq(trained, bits=bits), after)  # what runs is what a quantized model runs
    with torch.no_grad():
        assert torch.equal(model(batch()[:, :-1]), plain(batch()[:, :-1]))


def load_state(model, state):
    model.load_state_dict(state)
    return model.eval()


def test_a_model_and_a_request_that_do_not_fit(trained):
    """Issue: `Trainer` on a quantized model without `enable_quantized_finetuning`: a clear error that says what to set. With it but nothing quantized: likewise."""
    quantized = quantize_model_ptq(trained)
    for model, fields, match in ((quantized, {}, "expected enable_quantized_finetuning=True"), (tiny(), dict(enable_quantized_finetuning=True), "none of its layers is quantized"),
                                 (quantized, qat(), "enable_quantized_finetuning=True"), (tiny(), qat(kind="static"), "train_data")):  # fmt: skip
        kinds = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=match) as caught:
            Trainer(model, **QUIET, **fields)
        assert "\n" not in str(caught.value) and kinds == [type(m) for m in model.modules()]


def test_a_run_with_qat_is_resumed_to_the_bit(trained, tmp_path):
    """Issue: works with checkpoints; rounding begins and ranges freeze where they would have."""
    settings = {**QUIET, **qat(kind="static", fake_quant_after_n_steps=10, freeze_observers_after=0.5), "max_steps": 40, "save_steps": 10, "quantization_learned_scales": False}
    whole = Trainer(copy.deepcopy(trained), train_data=OTHER, **{**settings, "output_dir": str(tmp_path / "whole")})
    whole.train()
    for start in (10, 20, 30):
        again = resume_training(tmp_path / "whole" / "run" / f"step-{start:010d}", train_data=OTHER, output_dir=str(tmp_path / f"again-{start}"))
        again.train()
        assert again.history.losses == whole.history.losses
        state, other = whole.model.state_dict(), again.model.state_dict()
        assert state.keys() == other.keys() and not changed(state, other)
    ids = batch()[:, :-1]
    with torch.no_grad():
        assert torch.equal(convert_qat(again.model.eval())(ids), whole.convert_qat().eval()(ids))


@pytest.mark.parametrize("fields", [qat(8), qat(4), dict(enable_quantized_finetuning=True)], ids=["qat8", "qat4", "finetuning"])
@pytest.mark.parametrize("more", [dict(dtype="bf16"), dict(gradient_accumulation_steps=4), dict(dtype="bf16", gradient_accumulation_steps=2)], ids=str)
def test_works_with(fields, more, trained):
    """Issue: works with bf16 autocast, gradient accumulation, tied weights."""
    model = quantize_model_ptq(trained, bits=4) if "enable_quantized_finetuning" in fields else copy.deepcopy(trained)
    history = Trainer(model, train_data=OTHER, **{**QUIET, "max_steps": 30}, **fields, **more).train()
    assert history.losses[-1] < 0.7 * history.losses[0]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_thousand_steps(bits, trained):
    """Issue: after 1,000 fine-tuning steps codes are still in range, scales positive and finite, the file no larger than before."""
    model = quantize_model_ptq(trained, bits=bits)
    size = file_size(model)
    start = time.perf_counter()
    Trainer(model, train_data=OTHER, **{**QUIET, "max_steps": 1000, "batch_size": 2, "learning_rate": 1e-2}, enable_quantized_finetuning=True).train()
    assert time.perf_counter() - start < 600 and file_size(model) == size
    for layer in (m for m in model.modules() if hasattr(m, "codes")):
        weights = layer.dequantize()
        assert weights.isfinite().all() and layer.scale.isfinite().all() and (layer.scale > 0).all()
        assert layer.codes.dtype == (torch.int8 if layer.bits == 8 else torch.uint8) and (layer.bits == 4 or layer.codes.min() >= -127)
        assert (weights / layer.scale[:, None]).abs().max() <= 128


def test_gradients_in_backward(trained):
    """Issue: gradients applied during backward, so that no more than one layer's gradient lives at a time."""
    with pytest.raises(ConfigError, match="max_grad_norm"):
        TrainingConfig(gradients_in_backward=True)
    model = quantize_model_ptq(trained, bits=4)
    settings = {**QUIET, "max_grad_norm": None, "enable_quantized_finetuning": True}
    together = Trainer(copy.deepcopy(model), train_data=OTHER, **settings).train()
    one_by_one = Trainer(model, train_data=OTHER, **settings, gradients_in_backward=True).train()
    assert one_by_one.losses[0] == together.losses[0] and one_by_one.losses[-1] < 0.5 * one_by_one.losses[0]


def test_scales_only(trained):
    """Issue: scales-only training."""
    model = quantize_model_ptq(trained, bits=4)
    before = codes(model)
    history = Trainer(model, train_data=OTHER, **QUIET, enable_quantized_finetuning=True, quantized_finetuning="scales").train()
    assert not changed(before, codes(model)) and history.losses[-1] < 0.9 * history.losses[0]


def test_what_is_refused_is_named():
    with pytest.raises(QuantizationError, match="one of them"):
        Trainer(tiny(), **QUIET, **qat(), enable_quantized_finetuning=True)


def test_distillation(trained):
    """Issue: distillation from the float model (`distillation_loss`) as an option."""
    with pytest.raises(ValueError, match="teacher NoneType; expected another nn.Module"):
        Trainer(copy.deepcopy(trained), **QUIET, **qat(), distillation_weight=1.0)
    teacher = copy.deepcopy(trained).train()
    trainer = Trainer(copy.deepcopy(trained), train_data=FIRST, teacher=teacher, **{**QUIET, "learning_rate": 3e-4}, **qat(4, quantization_group_size=-1), distillation_weight=1.0)
    history = trainer.train()
    assert max(history.losses[-10:]) < history.losses[0] < 0.1  # a divergence, not a loss in nats a token
    assert teacher.training and all(torch.equal(a, b) for a, b in zip(teacher.parameters(), trained.parameters()))
