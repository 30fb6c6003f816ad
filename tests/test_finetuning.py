# python -m pytest tests/test_finetuning.py
"""Quantized layers that get gradients: against autograd on float weights, through copies, moves, files, compilers and casts."""
import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qtlm.finetuning import disable_finetuning_, enable_finetuning_, trainable_tensors, zero_gradients_
from qtlm.kernels import quantize_tensor, quantize_tokens
from qtlm.layers import QuantEmbedding, QuantizationError, QuantLinear
from qtlm.model import TinyLM
from qtlm.quantization import dequantize_model, get_quantization_info, quantization_metadata, quantize_model_ptq

SCHEMES = [{"bits": 8}, {"bits": 4}, {"bits": 4, "group_size": -1}, {"bits": 8, "type": "static"}, {"bits": 4, "type": "static", "symmetric": False}]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: "-".join(map(str, s.values())))
each_kind = pytest.mark.parametrize("what", ["weights", "scales"])


def tiny(**changes):
    "A model with tied weights, from a seed."
    torch.manual_seed(0)
    shape = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, block_size=16)
    return TinyLM(**{**shape, **changes})


def ids(*shape, seed=0):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


def quantized(what="weights", bits=8, **changes):
    return enable_finetuning_(quantize_model_ptq(tiny(**changes), bits=bits), what)


def backward(model, x=None):
    "One backward pass; return gradients by name."
    zero_gradients_(model)
    x = ids(2, 9) if x is None else x
    F.cross_entropy(model(x[:, :-1]).float().flatten(0, 1), x[:, 1:].flatten()).backward()
    return {name: t.grad.clone() for name, t in trainable_tensors(model)}


def linear(scheme, bias=True, seed=0):
    "A quantized linear layer and inputs for it."
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 24, bias=bias))
    data = [torch.randn(40, 64) for _ in range(3)] if scheme.get("type") == "static" else None
    return quantize_model_ptq(model, calibration_data=data, **scheme), torch.randn(2, 5, 64)


def rounded(layer, x):
    "The inputs as the layer rounds them, by the public functions."
    if layer.input_scale is None:
        q, scale = quantize_tokens(x)
        return q.float() * scale
    zero = 0 if layer.input_zero_point is None else layer.input_zero_point
    return (quantize_tensor(x, layer.input_scale, layer.input_zero_point).float() - zero) * layer.input_scale


def close(a, b, tolerance=1e-5):
    return (a - b).norm() <= tolerance * b.norm()


@each_scheme
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_weights_are_those_of_float_weights(scheme, bias):
    model, x = linear(scheme, bias)
    plain = copy.deepcopy(model)
    enable_finetuning_(model)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer, w = model[0], model[0].dequantize().requires_grad_()
    b = layer.bias.detach().clone().requires_grad_() if bias else None
    y = model(x1)
    assert torch.equal(y, plain(x))
    upstream = torch.randn_like(y)
    y.backward(upstream)
    F.linear(x2 + (rounded(layer, x) - x).detach(), w, b).backward(upstream)
    assert close(x1.grad, x2.grad) and close(layer.stand_in.grad, w.grad)
    assert not bias or close(layer.bias.grad, b.grad)


@each_scheme
def test_gradients_of_scales_are_those_of_their_logarithms(scheme):
    model, x = linear(scheme)
    plain = copy.deepcopy(model)
    enable_finetuning_(model, "scales")
    layer = model[0]
    log, w = layer.scale.log().requires_grad_(), layer.dequantize() / layer.scale[:, None]
    y = model(x)
    assert torch.equal(y, plain(x))
    upstream = torch.randn_like(y)
    y.backward(upstream)
    F.linear(rounded(layer, x), w * log.exp()[:, None], layer.bias.detach()).backward(upstream)
    assert layer.stand_in.shape == (24,) and close(layer.stand_in.grad, log.grad, 1e-4)


@each_kind
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}], ids=str)
def test_gradients_of_an_embedding_are_those_of_torch(what, bits, options):
    torch.manual_seed(0)
    model = quantize_model_ptq(nn.Sequential(nn.Embedding(12, 16, **options)), bits=bits, embedding_bits=bits)
    plain, x = copy.deepcopy(model), torch.randint(12, (3, 7))
    enable_finetuning_(model, what)
    y = model(x)
    assert torch.equal(y, plain(x))
    upstream = torch.randn_like(y)
    y.backward(upstream)
    log = model[0].scale.log().requires_grad_()
    w = plain[0].dequantize().requires_grad_()
    F.embedding(x, w, **options).backward(upstream)
    expected = w.grad if what == "weights" else (w.grad * w).sum(1)
    assert log.shape == expected.shape[:1] and close(model[0].stand_in.grad, expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_whole_model_has_the_gradients_of_its_float_twin_but_for_rounded_activations(bits):
    "Tied weights get the sum of both uses."
    model = quantized(bits=bits)
    float_twin = dequantize_model(model)
    mine, theirs = backward(model), backward(float_twin)
    assert mine.keys() == theirs.keys()
    assert all(close(mine[name], theirs[name], 0.1) for name in mine)


def test_only_what_is_asked_for_is_computed():
    model, x = linear({"bits": 8})
    enable_finetuning_(model)
    model[0].bias.requires_grad_(False)
    model(x).sum().backward()
    assert model[0].stand_in.grad is not None and model[0].bias.grad is None
    with torch.no_grad():
        assert not model(x).requires_grad
    with torch.inference_mode():
        model(x)


@each_kind
@pytest.mark.parametrize("bits", [8, 4])
def test_nothing_is_added_to_what_is_saved_or_counted(bits, what):
    plain = quantize_model_ptq(tiny(), bits=bits)
    model = enable_finetuning_(copy.deepcopy(plain), what)
    info, before = get_quantization_info(model), get_quantization_info(plain)
    assert (info.bytes, info.parameters, info.bits) == (before.bytes, before.parameters, before.bits)
    assert quantization_metadata(model) == quantization_metadata(plain)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    saved, expected = model.state_dict(), plain.state_dict()
    assert saved.keys() == expected.keys() and all(torch.equal(saved[k], expected[k]) for k in saved)
    assert all(t.untyped_storage().nbytes() == 4 for n, t in trainable_tensors(model) if not isinstance(t, nn.Parameter))
    assert all(isinstance(m, (QuantLinear, QuantEmbedding)) for m in model.modules() if hasattr(m, "codes"))
    torch.load(to_bytes(saved), weights_only=True)
    disable_finetuning_(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(model.modules(), plain.modules()))


def to_bytes(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@each_kind
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: torch.load(to_bytes(m), weights_only=False)],
                         ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_trained_on_its_own_and_tied_layers_stay_tied(copier, what):
    model = quantized(what)
    expected = backward(model)
    twin = copier(model)
    zero_gradients_(twin)
    mine, own = dict(trainable_tensors(model)), dict(trainable_tensors(twin))
    assert mine.keys() == own.keys() and not {id(t) for t in mine.values()} & {id(t) for t in own.values()}
    assert twin.lm_head.stand_in is twin.model.embed_tokens.stand_in
    got = backward(twin)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_move_keeps_ties_and_a_cast_keeps_stand_ins():
    model = quantized()
    before = dict(trainable_tensors(model))
    model.to("cpu").to(torch.bfloat16)
    assert all(t is before[n] for n, t in trainable_tensors(model)) and model.lm_head.stand_in.dtype == torch.float32
    assert all(g.isfinite().all() for g in backward(model).values())
    model.to("meta")
    assert model.lm_head.stand_in.is_meta and model.lm_head.stand_in is model.model.embed_tokens.stand_in


@pytest.mark.parametrize("bits", [8, 4])
def test_accumulated_gradients_are_those_of_the_whole(bits):
    model, x = quantized(bits=bits), ids(4, 9)
    whole = backward(model, x)
    zero_gradients_(model)
    for part in x.split(2):
        (F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()) / 2).backward()
    assert all(close(t.grad, whole[name]) for name, t in trainable_tensors(model))
    zero_gradients_(model)
    assert all(t.grad is None for _, t in trainable_tensors(model))


@each_kind
@pytest.mark.parametrize("bits", [8, 4])
def test_bf16_autocast_casts_as_a_linear_layer_does(bits, what):
    model, x = linear({"bits": bits})
    enable_finetuning_(model, what)
    float_layer = dequantize_model(model)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, theirs = model(x), float_layer(x)
        with torch.no_grad():
            assert model(x).dtype == torch.bfloat16
    assert y.dtype == theirs.dtype == torch.bfloat16
    y.float().square().sum().backward()
    theirs.float().square().sum().backward()
    expected = float_layer.weight.grad if what == "weights" else (float_layer.weight.grad * float_layer.weight).sum(1)
    assert model[0].stand_in.grad.dtype == torch.float32 and close(model[0].stand_in.grad, expected, 0.1)


@each_kind
@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_that_reads_weight_is_trained_too(bits, what):
    torch.manual_seed(0)
    embedding = nn.Embedding(20, 16)
    model = enable_finetuning_(quantize_model_ptq(nn.Sequential(embedding), bits=bits), what)
    h = torch.randn(5, 16)
    (h @ model[0].weight.t()).square().sum().backward()
    w = model[0].dequantize().requires_grad_()
    (h @ w.t()).square().sum().backward()
    assert close(model[0].stand_in.grad, w.grad if what == "weights" else (w.grad * w).sum(1))
    assert torch.equal(model[0].weight, model[0].dequantize())


def test_compiled_models_have_the_same_gradients():
    model = quantized(bits=4)
    expected = backward(model)
    compiled, x = torch.compile(model, backend="aot_eager"), ids(2, 9)
    zero_gradients_(model)
    F.cross_entropy(compiled(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
    assert all(close(t.grad, expected[name], 1e-4) for name, t in trainable_tensors(model))


def test_frozen_layers_stay_as_they_are():
    model = tiny(tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    model = enable_finetuning_(quantize_model_ptq(model))
    assert type(model.lm_head) is QuantLinear and "lm_head.weight" not in dict(trainable_tensors(model))
    assert "model.embed_tokens.weight" in backward(model)


def test_switching_twice_keeps_the_stand_ins_and_switching_kinds_replaces_them():
    model = quantized()
    before = dict(trainable_tensors(model))
    assert all(t is before[n] for n, t in trainable_tensors(enable_finetuning_(model)))
    enable_finetuning_(model, "scales")
    assert model.lm_head.stand_in.shape == (50,) and model.lm_head.stand_in is model.model.embed_tokens.stand_in
    assert "model.embed_tokens.scale" in dict(trainable_tensors(model))


def test_float_models_list_their_parameters():
    model = tiny()
    model.model.norm.requires_grad_(False)
    assert [n for n, _ in trainable_tensors(model)] == [n for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("make, what, match", [
    (tiny, "weights", "no layer is quantized; expected one to train. Use quantize_model_ptq"),
    (lambda: quantize_model_ptq(tiny().requires_grad_(False)), "weights", "all 9 quantized layers are frozen"),
    (lambda: quantize_model_ptq(tiny()), "codes", "found what='codes'"),
    (lambda: 3, "weights", "found int"),
    (lambda: torch.compile(quantize_model_ptq(tiny())), "weights", "compiled"),
], ids=["float", "frozen", "what", "int", "compiled"])
def test_what_cannot_be_trained_is_refused_and_left_alone(make, what, match):
    model = make()
    kinds = [type(m) for m in model.modules()] if isinstance(model, nn.Module) else None
    with pytest.raises(QuantizationError, match=match) as caught:
        enable_finetuning_(model, what)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300
    assert kinds is None or kinds == [type(m) for m in model.modules()]
