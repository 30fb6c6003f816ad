# pytest tests/test_vit.py
"""The vision transformer against transformers' own, to the bit where that can be; what it refuses; and all that the book does to models, done to it."""
import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtlm.account import get_quantization_info
from qtlm.checkpoint import load_checkpoint, save_checkpoint
from qtlm.config import ConfigError, ViTConfig
from qtlm.images import digits
from qtlm.model import ModelInputError
from qtlm.qat import convert_qat, prepare_qat
from qtlm.quantization import dequantize_model, quantize_model_ptq
from qtlm.resume import assert_resume_exact
from qtlm.trainer import Trainer
from qtlm.vit import Attention, Embeddings, Layer, PatchEmbeddings, ViT, accuracy

TINY = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "num_labels": 10}
SHAPES = {
    "digits": {},
    "colours, no bias for q, k, v": {"num_channels": 3, "qkv_bias": False},
    "one patch, one head": {"patch_size": 8, "num_attention_heads": 1, "num_labels": 2},
    "a head a feature, other eps": {"num_attention_heads": 24, "layer_norm_eps": 1e-2, "num_labels": 3},
    "larger": {"image_size": 32, "patch_size": 4, "num_channels": 3, "hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 384, "num_hidden_layers": 3},
    "dropout in both places": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3},
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def small(seed=0, **changes):
    return ViT(**(TINY | {"initializer_range": 0.2} | changes), generator=torch.Generator().manual_seed(seed))


def uneven(**changes):
    "A model none of whose norms and biases could be forgotten unseen."
    model, generator = small(**changes), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.normal_(1.0 if "layernorm" in name and name.endswith("weight") else 0.0, 0.2, generator=generator)
    return model


def pictures(model, count=5, seed=0):
    c = model.config
    return torch.rand(count, c.num_channels, c.image_size, c.image_size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def to_transformers(model):
    transformers = pytest.importorskip("transformers")
    other = transformers.ViTForImageClassification(transformers.ViTConfig(**model.to_vit_config())).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    return other


# ---- against transformers ----

@shapes
def test_same_names_and_the_same_logits_to_the_bit(shape):
    model = uneven(**shape).eval()
    other = to_transformers(model)
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in other.named_parameters()]
    x = pictures(model)
    want = other(pixel_values=x).logits
    assert torch.equal(model(x), want) and torch.equal(model(pixel_values=x), want) and want.std() > 0.3
    back = small(seed=1, **shape).eval()
    back.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(back(x), want)


def in_training(model, x, seed):
    torch.manual_seed(seed)
    out = model.train()(x)
    return getattr(out, "logits", out)


@shapes
def test_same_logits_and_gradients_in_training_with_dropout(shape):
    model = uneven(**shape)
    other, x = to_transformers(model), pictures(model)
    got, want = in_training(model, x, 3), in_training(other, x, 3)
    assert torch.equal(got, want)
    if "hidden_dropout_prob" in shape:
        assert not torch.equal(got, in_training(model, x, 4)) and not torch.equal(got, model.eval()(x))
    got.square().mean().backward(), want.square().mean().backward()
    theirs = dict(other.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, theirs[name].grad) and p.grad.ne(0).any(), name


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float64"])
def test_same_logits_in_other_precisions(how):
    model = uneven(num_channels=3).eval()
    other, x = to_transformers(model), pictures(model)
    if how != "autocast":
        model, other = (m.to(getattr(torch, how)) for m in (model, other))
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        got, want = model(x), other(x).logits
    assert torch.equal(got, want) and got.dtype == (torch.float64 if how == "float64" else torch.bfloat16)


def test_a_file_that_transformers_wrote(room):
    "It holds the names of version 4; a strict load takes them, and the caller's dict stays as it was."
    model = small()
    to_transformers(model).save_pretrained(room)
    from safetensors.torch import load_file

    saved = load_file(room / "model.safetensors")
    assert "vit.encoder.layer.1.attention.attention.query.weight" in saved and not any("q_proj" in name for name in saved)
    names, again = list(saved), small(seed=1)
    again.load_state_dict(saved, strict=True)
    assert list(saved) == names and torch.equal(again.eval()(pictures(model)), model.eval()(pictures(model)))
    inside = torch.nn.ModuleDict({"m": small(seed=2)})
    inside.load_state_dict({f"m.{name}": value for name, value in saved.items()}, strict=True)
    assert torch.equal(inside["m"].classifier.weight, model.classifier.weight)
    missing = {name: value for name, value in saved.items() if "0.intermediate.dense.bias" not in name}
    with pytest.raises(RuntimeError, match="Missing key.*vit.layers.0.mlp.fc1.bias"):
        small().load_state_dict(missing)
    config = json.loads((room / "config.json").read_text())
    assert all(config[name] == value for name, value in model.to_vit_config().items() if name in config) and {"hidden_size", "qkv_bias", "image_size"} <= config.keys()


def test_trained_side_by_side_with_transformers():
    "The same data, the same seeds: every loss and every weight of ten steps, to the bit."
    model = small(hidden_dropout_prob=0.1, initializer_range=0.02)
    other, (train, test) = to_transformers(model), digits()
    runs = [Trainer(m, train_data=train.batches(16), max_steps=10, learning_rate=1e-3, progress=False).train() for m in (model, other)]
    assert runs[0].losses == runs[1].losses
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    assert accuracy(model, test.images, test.labels) == accuracy(other, test.images, test.labels)


# ---- the model ----

def test_count_of_parameters():
    with torch.device("meta"):
        base = ViT(num_labels=1000)
    assert base.num_parameters() == sum(p.numel() for p in base.parameters()) == 86_567_656
    for shape in SHAPES.values():
        assert small(**shape).num_parameters() == sum(p.numel() for p in small(**shape).parameters())


def test_weights_are_a_function_of_the_generator():
    first, second, third = small(seed=3), small(seed=3), small(seed=4)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters()))
    assert all(not torch.equal(p, q) for p, q in zip(first.parameters(), third.parameters()) if p.dim() > 1)


def test_fields_and_config():
    assert ViT(ViTConfig(**TINY), num_labels=3).config == ViTConfig(**{**TINY, "num_labels": 3})
    with pytest.raises(ConfigError, match="image_size: 9; expected a multiple of patch_size = 2"):
        ViT(**(TINY | {"image_size": 9}))
    plain, adapted = small(), small(lora={"r": 4}, quantization={})
    assert list(plain.state_dict()) == list(adapted.state_dict()) and adapted.config.lora.r == 4
    assert plain.to_vit_config() == adapted.to_vit_config() and json.loads(json.dumps(plain.to_vit_config())) == plain.to_vit_config()


def test_parts_have_the_shapes_they_say():
    config = ViTConfig(**TINY)
    x = torch.randn(2, 1, 8, 8)
    assert PatchEmbeddings(config)(x).shape == (2, 16, 24) and Embeddings(config)(x).shape == (2, 17, 24)
    assert Attention(config)(torch.randn(2, 17, 24)).shape == Layer(config)(torch.randn(2, 17, 24)).shape == (2, 17, 24)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(backend):
    torch._dynamo.reset()
    model = small(num_hidden_layers=1).eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = pictures(model)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), model(x), rtol=0.05, atol=0.05)
    dropping = small(num_hidden_layers=1, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    noisy = torch.compile(dropping, fullgraph=True, backend=backend)
    assert not torch.equal(noisy(x), noisy(x))


def test_copies_and_a_model_without_memory():
    model, x = small().eval(), pictures(small())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))
        again.load_state_dict({"vit.encoder.layer.0.output.dense.bias": torch.ones(24)}, strict=False)
        assert again.vit.layers[0].mlp.fc2.bias.eq(1).all()
    with torch.device("meta"):
        hollow = ViT(**TINY)
    with pytest.raises(ModelInputError, match="on cpu; expected .* on meta"):
        hollow(x)
    hollow = hollow.to_empty(device="cpu").eval()
    hollow.load_state_dict(model.state_dict())
    assert torch.equal(hollow(x), model(x))


@given(shape=st.lists(st.integers(0, 9), min_size=0, max_size=6), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.complex64]))
@settings(deadline=None, max_examples=150)
def test_any_other_tensor_is_refused_in_one_line(shape, dtype):
    model, x = SMALL, torch.zeros(shape, dtype=dtype)
    if x.is_floating_point() and x.dim() == 4 and x.shape[1:] == (1, 8, 8) and len(x):
        assert model(x).shape == (len(x), 10)
        return
    with pytest.raises(ModelInputError) as caught:
        model(x)
    text = str(caught.value)
    assert "\n" not in text and str(shape) in text and "expected float pictures [B, 1, 8, 8] on cpu" in text


SMALL = small().eval()


@pytest.mark.parametrize("shape, dtype, told", [
    ((2, 3, 8, 8), torch.uint8, "Bytes become floats: pixel_values / 127.5 - 1."), ((3, 8, 8), torch.float32, "One picture is pixel_values[None]."),
    ((2, 8, 8, 3), torch.float32, "The channels come second: pixel_values.permute(0, 3, 1, 2)."), ((2, 1, 8, 8), torch.float32, "The model was built for other num_channels."),
    ((2, 3, 8, 10), torch.float32, "Resize it: torch.nn.functional.interpolate(pixel_values, 8)."), ((0, 3, 8, 8), torch.float32, "none is 0."),
])  # fmt: skip
def test_what_to_do_is_said_and_helps(shape, dtype, told):
    model, x = small(num_channels=3), torch.zeros(shape, dtype=dtype)
    with pytest.raises(ModelInputError) as caught:
        model(x)
    assert str(caught.value).endswith(told) and "expected float pictures [B, 3, 8, 8]" in str(caught.value)
    if told.count("pixel_values") and "built" not in told:
        assert model(eval(told.split(": ")[-1].split("is ")[-1].rstrip("."), {"pixel_values": x, "torch": torch})).shape[1] == 10


@pytest.mark.parametrize("wrong", [None, [[0.0]], {"pixel_values": torch.zeros(1, 1, 8, 8)}, "a.png", torch.nested.nested_tensor([torch.zeros(1, 8, 8)])])
def test_what_is_no_tensor_is_refused(wrong):
    with pytest.raises(ModelInputError, match="ViT: pixel_values .*; expected float pictures"):
        SMALL(wrong)


# ---- accuracy ----

def test_accuracy_counts_and_leaves_no_trace():
    model, (_, test) = small(hidden_dropout_prob=0.5).train(), digits()
    model.vit.layers[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    found = accuracy(model, test.images, test.labels, 100)
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    by_hand = copy.deepcopy(model).eval()(test.images).argmax(1)
    assert found == sum(by_hand == test.labels).item() / 449 == accuracy(model, test.images, test.labels, 1000)
    assert accuracy(model, test.images, by_hand) == 1.0 and accuracy(model, test.images, (by_hand + 1) % 10) == 0.0
    with pytest.raises(ValueError, match="accuracy: labels .*; expected torch.int64"):
        accuracy(model, test.images, test.labels.int())


# ---- what the book does to models ----

@pytest.fixture(scope="module")
def taught():
    "A model that reads digits well enough for losses to show."
    train, test = digits()
    model = ViT(**(TINY | {"hidden_size": 72, "intermediate_size": 144}), generator=torch.Generator().manual_seed(0))
    Trainer(model, train_data=train.batches(32), max_steps=200, learning_rate=2e-3, warmup_steps=20, lr_scheduler_type="cosine", progress=False).train()
    reached = accuracy(model, test.images, test.labels)
    assert reached > 0.85
    return model.eval(), train, test, reached


@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 4}, {"bits": 8, "type": "static"}, {"bits": 4, "rounding": "gptq"}, {"bits": 4, "group_size": -1}], ids=str)
def test_post_training_quantization(taught, settings):
    model, train, test, reached = taught
    data = [x for x, _ in list(train)[:2]] if {"type", "rounding"} & settings.keys() else None
    before = copy.deepcopy(model.state_dict())
    quantized = quantize_model_ptq(model, calibration_data=data, **settings)
    info = get_quantization_info(quantized)
    assert len(info.layers) == 2 * 6 + 1 and {layer.bits for layer in info.layers.values()} == {settings["bits"]}
    assert info.left_alone["vit.embeddings.patch_embeddings.projection"].reason.startswith("Conv2d is not")
    assert accuracy(quantized, test.images, test.labels) > reached - (0.01 if settings["bits"] == 8 else 0.04)
    assert quantized.num_parameters() == model.num_parameters() and info.bytes < (0.32 if settings["bits"] == 8 else 0.2) * 4 * model.num_parameters()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(dequantize_model(quantized).state_dict()) == list(before)


def test_prepared_and_converted_agree(taught):
    model, train, test, reached = taught
    prepared = prepare_qat(model, bits=4).eval()
    converted = convert_qat(prepared)
    assert torch.equal(prepared(test.images), converted(test.images)) and accuracy(converted, test.images, test.labels) > reached - 0.04


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_saved_and_loaded(taught, room, bits):
    model, _, test, _ = taught
    model = quantize_model_ptq(model, bits=bits) if bits else model
    save_checkpoint(model, step=1, path=room / "run")
    again = load_checkpoint(room / "run", model=ViT(model.config)).model.eval()
    assert torch.equal(again(test.images), model(test.images))


@pytest.mark.parametrize("fields", [{}, {"dtype": "bf16"}, {"quantization_mode": "qat", "quantization_bits": 4}, {"enable_quantized_finetuning": True}], ids=str)
def test_resume_is_exact(fields):
    train, test = digits()

    def started():
        model = small(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        model = quantize_model_ptq(model, bits=8) if "enable_quantized_finetuning" in fields else model
        return Trainer(model, train_data=train.batches(8, seed=1), eval_data=test, eval_steps=2, max_steps=4, gradient_accumulation_steps=2, warmup_steps=2, progress=False, **fields)

    assert assert_resume_exact(started) == 4


def test_learns_new_classes_with_a_new_head():
    "The labels of `digits(classes)` are places, so a head of five answers fits."
    (low, _), (high, test) = digits(range(5)), digits(range(5, 10))
    model = ViT(**(TINY | {"hidden_size": 72, "num_labels": 5}), generator=torch.Generator().manual_seed(0))
    settings = {"max_steps": 100, "learning_rate": 2e-3, "warmup_steps": 10, "progress": False}
    Trainer(model, train_data=low.batches(32), **settings).train()
    before = accuracy(model, test.images, test.labels)
    Trainer(model, train_data=high.batches(32), **settings).train()
    assert before < 0.5 and accuracy(model, test.images, test.labels) > 0.75
