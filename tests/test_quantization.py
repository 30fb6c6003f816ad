# python -m pytest tests/test_quantization.py
"""Contracts of `qtlm.quantization`: any module in, an integer model out, all of it accounted for; ties, moves, failures and the way back."""
import copy
import io
import json
import math
import pickle
import shutil
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from qtlm.config import ConfigError, QuantizationConfig, TrainingConfig
from qtlm.kernels import expand_groups, quantize_tokens
from qtlm.model import TinyLM
from qtlm.quantization import (
    QuantEmbedding,
    QuantizationError,
    QuantLinear,
    dequantize_model,
    get_quantization_info,
    quantization_metadata,
    quantize_model_ptq,
    restore_quantization,
)

SHAPE = dict(vocab_size=90, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=176, block_size=32)
IDS = torch.arange(60).reshape(3, 20)


@pytest.fixture
def lm():
    torch.manual_seed(0)
    return TinyLM(**SHAPE).eval()


def mlp(*widths):
    torch.manual_seed(0)
    layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def snapshot(model):
    "Return everything that a failure must leave alone: the tensors, bit for bit, and which module and parameter is where."
    state = {name: t.clone() for name, t in model.state_dict().items()}
    return state, {n: id(m) for n, m in model.named_modules()}, {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}, dict(vars(model))


def assert_unchanged(model, before):
    state, modules, parameters, own = snapshot(model)
    assert state.keys() == before[0].keys() and all(torch.equal(t.nan_to_num(), before[0][n].nan_to_num()) for n, t in state.items())
    assert (modules, parameters, own.keys()) == (before[1], before[2], before[3].keys())


def storages(model):
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}


# ---- quantize ----

@pytest.mark.parametrize("bits", [8, 4])
def test_a_copy_is_quantized_and_the_original_untouched(lm, bits):
    before, logits = snapshot(lm), lm(IDS)
    quantized = quantize_model_ptq(lm, bits=bits)
    assert_unchanged(lm, before)
    assert not storages(lm) & storages(quantized)
    assert not any(type(m) in (nn.Linear, nn.Embedding) for m in quantized.modules())
    out = quantized(IDS)
    assert out.dtype == torch.float32 and 0 < (out - logits).norm() / logits.norm() < (0.05 if bits == 8 else 0.3)


def test_a_copy_never_copies_the_float_weights(lm, monkeypatch):
    "Memory: what is replaced is not copied first."
    copied, deepcopy = [], nn.Parameter.__deepcopy__
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda p, memo: copied.append(p.dim()) or deepcopy(p, memo))
    quantize_model_ptq(lm)
    assert copied and set(copied) == {1}


@pytest.mark.parametrize("bits", [8, 4])
def test_in_place_is_the_same_as_on_a_copy(lm, bits):
    quantized = quantize_model_ptq(lm, bits=bits)
    biases = {n: id(p) for n, p in lm.named_parameters() if p.dim() == 1}
    assert quantize_model_ptq(lm, bits=bits, inplace=True) is lm
    assert torch.equal(lm(IDS), quantized(IDS)) and biases == {n: id(p) for n, p in lm.named_parameters()}


@pytest.mark.parametrize("bits, most", [(8, 0.26), (4, 0.15)])
def test_linear_weights_are_really_that_small(bits, most):
    "Bytes in memory and in the saved file, scales included."
    model = mlp(512, 1024, 512)
    quantized = quantize_model_ptq(model, bits=bits)
    sizes = []
    for m in (model, quantized):
        file = io.BytesIO()
        torch.save(m.state_dict(), file)
        sizes.append(file.getbuffer().nbytes)
    info = get_quantization_info(quantized)
    assert sizes[1] < most * sizes[0] and info.bytes < most * 4 * info.parameters
    assert info.bytes == sum(t.nbytes for t in quantized.state_dict().values())
    assert info.parameters == sum(p.numel() for p in model.parameters()) and quantized[0].codes.dtype == (torch.int8 if bits == 8 else torch.uint8)


def test_the_error_of_each_weight_is_within_half_a_step(lm):
    for bits in (8, 4):
        for name, m in quantize_model_ptq(lm, bits=bits).named_modules():
            if isinstance(m, QuantLinear):
                w = lm.get_submodule(name).weight
                step = m.scale[:, None].expand_as(w)
                if m.bits == 4:
                    g = ((m.group_scale & 15) + 1).float().repeat_interleave(w.shape[1] // m.group_scale.shape[1], 1)
                    zero = (m.group_scale >> 4).float().repeat_interleave(w.shape[1] // m.group_scale.shape[1], 1)
                    low, high = ((0 - zero) * g).clamp_min(-128) * step, ((15 - zero) * g).clamp_max(127) * step
                    step = step * g
                    inside = (w > low + step) & (w < high - step)
                else:
                    inside = torch.ones_like(w, dtype=torch.bool)
                assert inside.float().mean() > 0.5
                assert ((w - m.dequantize()).abs() <= step / 2 + 1e-6 * w.abs().max())[inside].all()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_integer_model_is_the_fake_quantized_one(bits):
    "Float products of the same rounded weights and activations differ by the order of float additions only, layer by layer."
    quantized = quantize_model_ptq(mlp(96, 130, 64), bits=bits)
    x = torch.randn(7, 96)
    for m in quantized:
        if isinstance(m, QuantLinear):
            q, s = quantize_tokens(x)
            w = (m.codes if bits == 8 else expand_groups(m.codes, m.group_scale, m.in_features)) * m.scale[:, None]
            fake, sums = F.linear(q * s, w, m.bias), F.linear((q * s).abs(), w.abs(), m.bias.abs())
            assert ((m(x) - fake).abs() <= (m.in_features + 4) * torch.finfo(torch.float32).eps * sums).all()
        x = m(x)


def test_tied_weights_stay_one_tensor(lm):
    quantized = quantize_model_ptq(lm, bits=4)
    pairs = lambda m: (m.lm_head, m.model["embed_tokens"])
    buffers = io.BytesIO()
    torch.save(quantized, buffers)
    buffers.seek(0)
    for m in (quantized, copy.deepcopy(quantized), copy.deepcopy(quantized).to(torch.float64).half(), pickle.loads(pickle.dumps(quantized)),
              torch.load(buffers, weights_only=False), copy.deepcopy(quantized).to("meta").to_empty(device="cpu")):  # fmt: skip
        head, embed = pairs(m)
        assert type(head) is QuantLinear and type(embed) is QuantEmbedding and head.bits == 8
        assert head.codes is embed.codes and head.scale is embed.scale and head.scale.dtype == torch.float32
    quantized.lm_head.codes.zero_()
    assert not quantized.model["embed_tokens"](IDS).any()


def test_parameters_over_the_same_memory_count_as_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(20, 16), "head": nn.Linear(16, 20, bias=False)})
    model["head"].weight = nn.Parameter(model["embed"].weight.data)
    quantized = quantize_model_ptq(model)
    assert quantized["head"].codes is quantized["embed"].codes and get_quantization_info(quantized).parameters == 320


def test_the_same_module_twice_stays_one_module():
    layer = nn.Linear(16, 16)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    model.also = [layer]  # a reference outside the tree
    for quantized in (quantize_model_ptq(model), dequantize_model(quantize_model_ptq(model))):
        assert quantized[0] is quantized[2] is quantized.also[0] is not layer
    assert get_quantization_info(quantize_model_ptq(model)).parameters == 16 * 17


def test_codes_survive_every_change_of_dtype(lm):
    quantized = quantize_model_ptq(lm, bits=4)
    before = {n: b.clone() for n, b in quantized.named_buffers() if n.endswith(("codes", "scale"))}
    for cast in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.float()):
        cast(quantized)
        assert all(torch.equal(dict(quantized.named_buffers())[n], b) and dict(quantized.named_buffers())[n].dtype == b.dtype for n, b in before.items())
        want = quantized.model["norm"].weight.dtype
        assert quantized.model["embed_tokens"](IDS).dtype == quantized.lm_head.weight.dtype == want


def test_a_bfloat16_model_computes_in_bfloat16_and_comes_back_as_float32(lm):
    lm.bfloat16()
    quantized = quantize_model_ptq(lm, bits=4)
    assert quantized(IDS).dtype == torch.bfloat16
    plain = dequantize_model(quantized)
    assert {p.dtype for p in plain.parameters()} == {torch.float32} and plain(IDS).dtype == torch.float32


@pytest.mark.parametrize("form", [
    QuantizationConfig(bits=4, group_size=32), TrainingConfig(quantization_bits=4, quantization_group_size=32, quantization_mode="ptq"),
    {"bits": 4, "group_size": 32}, {"quantization_bits": 4, "quantization_group_size": 32},
])  # fmt: skip
def test_every_form_of_configuration_says_the_same(form):
    model = mlp(64, 64)
    a, b = quantize_model_ptq(model, form), quantize_model_ptq(model, quantization_bits=4, group_size=32)
    assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values())) and a[0].group_size == 32
    assert quantize_model_ptq(model, form, bits=8, group_size=None)[0].bits == 8  # a field by name wins


def test_groups_adapt_to_the_width_and_the_account_says_to_what():
    model = mlp(64, 100, 97, 7, 3)
    info = get_quantization_info(quantize_model_ptq(model, bits=4))
    assert [row.group_size for row in info.layers.values()] == [64, 50, -1, -1]
    assert quantize_model_ptq(model, bits=4)(torch.randn(2, 64)).shape == (2, 3)
    assert all(m.group_size == -1 for m in quantize_model_ptq(model, bits=4, group_size=-1) if isinstance(m, QuantLinear))


def test_four_bit_embeddings_on_request():
    model = nn.Sequential(nn.Embedding(30, 48), nn.Linear(48, 30, bias=False))
    model[1].weight = model[0].weight
    quantized = quantize_model_ptq(model, embedding_bits=4)
    assert quantized[0].bits == quantized[1].bits == 4 and quantized[0].codes is quantized[1].codes
    ids = torch.tensor([[3, 29], [0, 3]])
    assert torch.equal(quantized[0](ids), F.embedding(ids, quantized[0].dequantize()))


class Keeper(nn.Module):
    "A model that refers to its layer in ways that the tree of modules does not show."

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 8)
        self.plain_list, self.method = [self.layer], self.layer.forward

    def forward(self, x):
        return self.plain_list[0](x) + self.layer(x) + self.method(x)


@pytest.mark.parametrize("bits", [8, 4])
def test_in_place_reaches_every_reference_to_a_layer(bits):
    "No float layer may go on computing in the dark."
    model, x = Keeper(), torch.randn(3, 16)
    copied, layer = quantize_model_ptq(model, bits=bits), model.layer
    assert quantize_model_ptq(model, bits=bits, inplace=True) is model
    assert model.layer is layer is model.plain_list[0] and type(layer) is QuantLinear and "weight" not in vars(layer)["_parameters"]
    layer.codes.zero_(), copied.layer.codes.zero_()
    for m in (model, copied):
        if bits == 8:
            assert torch.equal(m.plain_list[0](x), m.layer.bias.expand(3, 8))
        assert torch.equal(m.plain_list[0](x), m.layer(x)) and torch.allclose(m.method(x), m.layer(x), atol=0.05 * m.layer(x).abs().max().item())
    dequantize_model(model, inplace=True)
    assert model.layer is layer and type(layer) is nn.Linear and torch.equal(model.plain_list[0](x), layer(x))


def test_a_bare_layer_turns_in_place_and_back():
    for layer in (nn.Linear(6, 3), nn.Embedding(5, 4)):
        kind, old = type(layer), layer.weight.detach().clone()
        assert quantize_model_ptq(layer, inplace=True) is layer and type(layer) in (QuantLinear, QuantEmbedding)
        assert dequantize_model(layer, inplace=True) is layer and type(layer) is kind
        assert (layer.weight - old).abs().max() <= old.abs().max() / 127


def test_quantizing_inside_inference_mode_gives_tensors_that_train():
    model = mlp(16, 8, 4)
    with torch.inference_mode():
        quantized = quantize_model_ptq(model)
        plain = dequantize_model(quantized)
    x = torch.randn(2, 16, requires_grad=True)
    for m in (quantized, plain):
        m(x).sum().backward()
    assert not any(t.is_inference() for m in (quantized, plain) for t in (*m.parameters(), *m.buffers()))
    assert x.grad.abs().sum() > 0 and plain[0].weight.grad is not None


def test_ties_are_seen_after_a_load_that_assigns():
    "load_state_dict(assign=True) gives two tensor objects over one memory: still one matrix, in the account and on the way back."
    model = nn.ModuleDict({"embed": nn.Embedding(20, 16), "head": nn.Linear(16, 20, bias=False)})
    model["head"].weight = model["embed"].weight
    quantized, file = quantize_model_ptq(model), io.BytesIO()
    want = get_quantization_info(quantized).to_dict()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    quantized.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert quantized["head"].codes is not quantized["embed"].codes
    assert get_quantization_info(quantized).to_dict() == want and want["layers"]["head"]["tied_to"] == "embed"
    plain = dequantize_model(quantized)
    assert plain["head"].weight is plain["embed"].weight


def test_decibels_of_huge_and_tiny_rows_are_numbers():
    for size in (3e38, 1e-30, 1e-42):
        layer = nn.Linear(16, 4)
        layer.weight.data = torch.randn(4, 16).clamp(-1, 1) * size
        for bits in (8, 4):
            row = get_quantization_info(quantize_model_ptq(layer, bits=bits)).layers[""]
            assert math.isfinite(row.sqnr) and row.sqnr > (15 if size > 1e-38 else -1)  # below float32's normal numbers all rounds to 0


def test_functional_transforms_go_through():
    model, x = quantize_model_ptq(mlp(16, 8, 4)), torch.randn(5, 16)
    assert torch.equal(torch.func.vmap(model)(x), model(x))
    weights = (model[2].weight @ (model[0].weight * (model[0](x[0]) > 0)[:, None])).detach()
    assert torch.allclose(torch.func.jacrev(model)(x[0]), weights, atol=1e-5)


# ---- left alone ----

def test_layers_that_are_not_safe_to_replace_are_left_with_the_reason():
    class Odd(nn.Linear):
        pass

    model = nn.ModuleDict({
        "plain": nn.Linear(8, 8), "odd": Odd(8, 8), "conv": nn.Conv2d(1, 2, 3), "attend": nn.MultiheadAttention(8, 2), "bag": nn.EmbeddingBag(5, 8),
        "normed": parametrizations.weight_norm(nn.Linear(8, 8)), "pruned": prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5),
        "renorm": nn.Embedding(5, 8, max_norm=1.0), "patched": nn.Linear(8, 8), "none": nn.Embedding(0, 8),
    })  # fmt: skip
    model["patched"].forward = lambda x: x
    quantized = quantize_model_ptq(model)
    info = get_quantization_info(quantized)
    assert set(info.layers) == {"plain"}
    assert set(info.left_alone) == {
        "odd", "conv", "attend", "attend.out_proj", "bag", "normed.parametrizations.weight", "pruned", "renorm", "patched", "none"}  # fmt: skip
    assert "computed from other" in info.left_alone["pruned"].reason and "max_norm" in info.left_alone["renorm"].reason
    assert all(row.reason and row.bits is None and row.bytes == row.bytes_before for row in info.left_alone.values())
    assert info.parameters == sum(p.numel() for p in model.parameters())


def test_weights_that_are_no_plain_floats_are_left_to_their_owners():
    "Whole numbers, complex ones, sparse ones, and classes with rules of their own (as other quantizers put them into nn.Linear)."
    class Special(torch.Tensor):
        pass

    def layer(weight):
        linear = nn.Linear(4, 4)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear

    ones = torch.eye(4)
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "int": layer(ones.int()), "complex": layer(ones.to(torch.complex64)),
                           "sparse": layer(ones.to_sparse()), "eight": layer(ones.to(torch.float8_e4m3fn)), "special": layer(ones.as_subclass(Special))})  # fmt: skip
    info = get_quantization_info(quantize_model_ptq(model, inplace=True))  # deepcopy itself refuses sparse parameters
    assert set(info.layers) == {"plain"} and {row.reason for row in info.left_alone.values()} == {"its weight is not a plain float tensor"}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("bits, most", [(8, 0.03), (4, 0.2)])
def test_the_encoder_s_fast_path_computes_with_the_same_weights(nested, norm_first, bits, most):
    "In evaluation without gradients torch reads linear1.weight and linear2.weight and never calls the layers; masks and nested tensors too."
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    quantized, x = quantize_model_ptq(model, bits=bits), torch.randn(2, 5, 32)
    assert set(get_quantization_info(quantized).layers) == {f"layers.{i}.linear{k}" for i in (0, 1) for k in (1, 2)}
    padding, causal = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]), torch.ones(5, 5).triu(1).bool()
    for grad in (True, False):
        for masks in ({}, {"src_key_padding_mask": padding}, {"mask": causal}):
            with torch.set_grad_enabled(grad):
                a, b = quantized(x, **masks)[0], model(x, **masks)[0]
            assert (a - b).norm() < most * b.norm()


def test_attention_and_transformer_layers_still_compute():
    "Their fast path reads `linear.weight` and never calls the layer."
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 32)
    quantized = quantize_model_ptq(model)
    with torch.no_grad():
        assert (quantized(x) - model(x)).abs().max() < 0.1
    assert (quantized(x) - model(x)).abs().max() < 0.1


def test_a_weight_that_others_read_is_not_replaced():
    class Reader(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.shared = weight

    linear = nn.Linear(8, 8)
    quantized = quantize_model_ptq(nn.ModuleDict({"linear": linear, "reader": Reader(linear.weight), "other": nn.Linear(8, 8)}))
    assert quantized["linear"].weight is quantized["reader"].shared
    assert "shares its weight with reader" in get_quantization_info(quantized).left_alone["linear"].reason


def test_a_model_that_reads_its_embedding_s_weight_still_computes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 16)

        def forward(self, ids):
            return F.linear(self.embed(ids), self.embed.weight)

    model = Model()
    ids = torch.arange(20)
    assert (quantize_model_ptq(model)(ids) - model(ids)).abs().max() < 0.3


def test_skip_modules_are_globs_over_names_and_cover_what_is_inside(lm):
    info = get_quantization_info(quantize_model_ptq(lm, skip_modules=["model.layers.0", "*.down_proj"]))
    skipped = {n for n in info.left_alone}
    assert skipped == {n for n, m in lm.named_modules() if type(m) is nn.Linear and (n.startswith("model.layers.0.") or n.endswith("down_proj"))}
    assert "skip_modules has '*.down_proj'" in info.left_alone["model.layers.1.mlp.down_proj"].reason
    info = get_quantization_info(quantize_model_ptq(lm, skip_modules=["lm_head"]))
    assert {"lm_head", "model.embed_tokens"} == set(info.left_alone)  # tied: both or none


# ---- failures ----

@pytest.mark.parametrize("options, match", [
    (dict(bits=4, group_size=48), r"does not divide .*q_proj \(width 64\).* and \d+ more; .*skip_modules"),
    (dict(skip_modules=["q_proj"]), r"'q_proj' matches no module; .* '\*\.q_proj'"),
    (dict(skip_modules=["*"]), "nothing to quantize"),
    (dict(type="static"), "type='static'; expected batches"),
    (dict(mode="qat"), "expected 'ptq'"),
    (dict(bits=5), "bits"), (dict(bitss=4), "bits"), (dict(config=7), "config: found int"),
])  # fmt: skip
@pytest.mark.parametrize("inplace", [False, True])
def test_a_request_that_cannot_be_met_changes_nothing(lm, options, match, inplace):
    before = snapshot(lm)
    with pytest.raises((QuantizationError, ConfigError), match=match) as caught:
        quantize_model_ptq(lm, inplace=inplace, **options)
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)
    assert_unchanged(lm, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_that_are_not_finite_are_named_and_nothing_changes(lm, bits, value):
    lm.model["layers"][1].mlp.up_proj.weight.data[5, 3] = value
    before = snapshot(lm)
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.up_proj: channel 5"):
        quantize_model_ptq(lm, bits=bits, inplace=True)
    assert_unchanged(lm, before)


def test_models_that_cannot_be_quantized_are_refused():
    for model, match in [
        (None, "found NoneType"), (nn.ReLU(), "nothing to quantize"), (nn.Conv2d(1, 1, 1), "Conv2d"), (nn.Sequential(nn.LazyLinear(3)), "Run one batch"),
        (nn.Linear(3, 3, device="meta"), "without values"), (torch.compile(mlp(4, 4)), "compile after"), (quantize_model_ptq(mlp(4, 4)), "already"),
    ]:  # fmt: skip
        with pytest.raises(QuantizationError, match=match):
            quantize_model_ptq(model)
    assert type(quantize_model_ptq(nn.Linear(3, 3))) is QuantLinear


@pytest.mark.parametrize("inplace", [False, True])
def test_a_compiled_part_of_a_model_is_refused(inplace):
    "Its graph holds on to the float layer: in place, it would go on computing with weights that the state dict no longer has."
    model = nn.ModuleDict({"fast": torch.compile(nn.Linear(4, 4), backend="eager"), "slow": nn.Linear(4, 4)})
    before = snapshot(model)
    with pytest.raises(QuantizationError, match="^fast: found a compiled OptimizedModule.*compile after"):
        quantize_model_ptq(model, inplace=inplace)
    assert_unchanged(model, before)
    assert set(get_quantization_info(model).left_alone) == {"fast._orig_mod", "slow"}  # looking is allowed


def test_a_model_that_cannot_be_copied_is_quantized_in_place():
    model = mlp(8, 8)
    model.lock = threading.Lock()
    before = snapshot(model)
    with pytest.raises(QuantizationError, match="inplace=True"):
        quantize_model_ptq(model)
    assert_unchanged(model, before)
    assert type(quantize_model_ptq(model, inplace=True)[0]) is QuantLinear


# ---- training on ----

def test_training_mode_hooks_and_gradients_are_kept(lm):
    seen = []
    lm.train()
    lm.model["layers"][0].mlp.up_proj.register_forward_hook(lambda m, x, y: seen.append(type(m)))
    lm.model["norm"].weight.requires_grad_(False)
    quantized = quantize_model_ptq(lm)
    assert quantized.training and quantized.lm_head.training and not quantized.model["norm"].weight.requires_grad
    quantized(IDS).sum().backward()
    assert seen == [QuantLinear]
    assert {n for n, p in quantized.named_parameters() if p.grad is None} == {"model.norm.weight"}


# ---- the account ----

def test_a_float_model_has_an_account_too(lm):
    info = get_quantization_info(lm)
    assert (info.mode, info.bits, info.type, info.layers, info.bits_per_weight) == (None, None, None, {}, 32.0)
    assert info.parameters == lm.num_parameters() and info.bytes == 4 * info.parameters
    assert len(info.left_alone) == sum(type(m) in (nn.Linear, nn.Embedding) for m in lm.modules())


@pytest.mark.parametrize("bits", [8, 4])
def test_the_account_adds_up(lm, bits):
    quantized = quantize_model_ptq(lm, bits=bits)
    info = get_quantization_info(quantized)
    assert (info.mode, info.bits, info.type) == ("ptq", bits, "dynamic") and info.parameters == lm.num_parameters()
    norms = sum(p.numel() for p in quantized.parameters())
    assert sum(r.parameters for r in info.layers.values()) + norms == info.parameters
    assert sum(r.bytes for r in info.layers.values()) + 4 * norms == info.bytes
    assert info.layers["lm_head"].tied_to == "model.embed_tokens" and info.layers["lm_head"].bytes == 0
    for name, row in info.layers.items():
        w, kept = lm.get_submodule(name).weight.detach(), quantized.get_submodule(name).dequantize()
        assert row.sqnr == pytest.approx(10 * math.log10(w.square().sum() / (w - kept).square().sum()), abs=1e-3)
        assert row.sqnr > (40 if row.bits == 8 else 18)
    assert json.loads(json.dumps(info.to_dict()))["bits"] == bits and json.dumps(info.report.to_dict())
    table = info._repr_markdown_()
    assert all(f"| {name} |" in table for name in info.layers) and str(info) == table


def test_mixed_bits_and_compiled_models_are_told(lm):
    mixed = quantize_model_ptq(mlp(64, 64, 64), bits=4)
    mixed[2] = quantize_model_ptq(nn.Linear(64, 64))
    assert get_quantization_info(mixed).bits == "mixed"
    assert get_quantization_info(torch.compile(mixed)).bytes == get_quantization_info(mixed).bytes
    with pytest.raises(QuantizationError, match="found dict"):
        get_quantization_info({})


def test_the_report_draws_itself(lm, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    left, right = get_quantization_info(quantize_model_ptq(lm, bits=4)).report.plot()
    assert "times smaller" in left.get_title() and "KiB" in left.get_xlabel() and "dB" in right.get_xlabel()
    matplotlib.pyplot.close("all")


# ---- back ----

@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inplace", [False, True])
def test_dequantized_models_are_ordinary_and_hold_what_was_computed_with(lm, bits, inplace):
    lm.model["layers"][0].mlp.up_proj.weight.requires_grad_(False)
    quantized = quantize_model_ptq(lm, bits=bits)
    kept = {n: m.dequantize() for n, m in quantized.named_modules() if isinstance(m, (QuantLinear, QuantEmbedding))}
    plain = dequantize_model(quantized, inplace=inplace)
    assert (plain is quantized) == inplace and str(plain) == str(lm) and list(plain.state_dict()) == list(lm.state_dict())
    assert {n: type(m) for n, m in plain.named_modules()} == {n: type(m) for n, m in lm.named_modules()}
    assert {n: set(vars(m)) for n, m in plain.named_modules()} == {n: set(vars(m)) for n, m in lm.named_modules()}
    assert all(torch.equal(plain.get_submodule(n).weight, w) for n, w in kept.items())
    assert plain.lm_head.weight is plain.model["embed_tokens"].weight
    assert {n: p.requires_grad for n, p in plain.named_parameters()} == {n: p.requires_grad for n, p in lm.named_parameters()}
    lm.load_state_dict(plain.state_dict())
    assert torch.equal(plain(IDS), lm(IDS)) and get_quantization_info(plain).bits is None


def test_int8_of_a_dequantized_model_gives_the_same_codes(lm):
    quantized = quantize_model_ptq(lm)
    again = quantize_model_ptq(dequantize_model(quantized))
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in quantized.state_dict().items())


def test_dequantize_keeps_what_the_layers_were_told():
    model = nn.Sequential(nn.Embedding(9, 8, padding_idx=2, sparse=True, scale_grad_by_freq=True), nn.Linear(8, 4, bias=False))
    model[1].note = "mine"
    plain = dequantize_model(quantize_model_ptq(model, bits=4))
    assert (plain[0].padding_idx, plain[0].sparse, plain[0].scale_grad_by_freq, plain[1].bias, plain[1].note) == (2, True, True, None, "mine")
    with pytest.raises(QuantizationError, match="found no quantized layer"):
        dequantize_model(model)


# ---- a description ----

@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_is_rebuilt_from_its_description_and_state(lm, bits):
    quantized = quantize_model_ptq(lm, bits=bits, skip_modules=["*.o_proj"])
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    rebuilt = TinyLM(**SHAPE).eval()
    assert restore_quantization(rebuilt, json.loads(json.dumps(quantization_metadata(quantized)))) is rebuilt
    rebuilt.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(rebuilt(IDS), quantized(IDS)) and rebuilt.lm_head.codes is rebuilt.model["embed_tokens"].codes
    assert get_quantization_info(rebuilt) == get_quantization_info(quantized)
    assert quantization_metadata(rebuilt) == quantization_metadata(quantized)


def test_a_float_model_s_description_restores_nothing(lm):
    description = quantization_metadata(lm)
    assert description["layers"] == {} and description["mode"] is None
    before = snapshot(lm)
    restore_quantization(lm, json.loads(json.dumps(description)))
    assert_unchanged(lm, before)


CHANGES = [
    ({"bits": 3}, "bits"), ({"bits": True}, "bits"), ({"bits": "4"}, "bits"), ({"type": "static"}, "type"), ({"kind": "embedding"}, "type"), ({"kind": "embedding", "type": None}, "found Linear"),
    ({"symmetric": True}, "symmetric"), ({"rounding": 3}, "rounding"), ({"kind": "conv1d"}, "found Linear"),
    ({"shape": [64, 63]}, "group_size|expected"), ({"shape": [64]}, "shape"), ({"shape": [64, -1]}, "shape"), ({"shape": [128, 64]}, "found Linear"),
    ({"group_size": 48}, "group_size"), ({"group_size": 0}, "group_size"), ({"group_size": None}, "group_size"), ({"bias": True}, "with a bias"),
    ({"bias": 1}, "bias"), ({"tied_to": "nothing"}, "tied_to"), ({"tied_to": "model.embed_tokens"}, "tied_to"), ({"sqnr": "high"}, "sqnr"), ({"x": 1}, "keys"),
]  # fmt: skip


@pytest.mark.parametrize("change, match", CHANGES, ids=str)
def test_a_wrong_entry_is_named_and_changes_nothing(lm, change, match):
    description = quantization_metadata(quantize_model_ptq(lm, bits=4))
    name = "model.layers.1.self_attn.q_proj"
    description["layers"][name].update(change)
    before = snapshot(lm)
    with pytest.raises(QuantizationError, match=match) as caught:
        restore_quantization(lm, description)
    assert str(caught.value).startswith(name) and len(str(caught.value)) <= 300
    assert_unchanged(lm, before)


def test_wrong_descriptions_are_refused(lm):
    good = quantization_metadata(quantize_model_ptq(lm, bits=4))
    untied = copy.deepcopy(good)
    untied["layers"]["lm_head"]["tied_to"] = None
    half = copy.deepcopy(good)
    del half["layers"]["lm_head"]
    unknown = copy.deepcopy(good)
    unknown["layers"]["elsewhere"] = dict(good["layers"]["model.layers.0.mlp.up_proj"])
    wrong = [None, [], {}, good | {"format_version": 2}, good | {"layers": []}, good | {"mode": "magic"}, good | {"mode": None}, untied, half, unknown]
    before = snapshot(lm)
    for description in wrong:
        with pytest.raises(QuantizationError):
            restore_quantization(lm, description)
        assert_unchanged(lm, before)
    with pytest.raises(QuantizationError, match="found no such layer"):
        restore_quantization(mlp(4, 4), good)


def test_state_of_another_scheme_is_refused_and_not_cast():
    a, b = quantize_model_ptq(mlp(8, 8)), mlp(8, 8)
    state = {n: t.float() if n.endswith("codes") else t for n, t in a.state_dict().items()}
    with pytest.raises(RuntimeError, match="0.codes: found torch.float32; expected torch.int8"):
        a.load_state_dict(state)
    with pytest.raises(RuntimeError):
        a.load_state_dict(b.state_dict())


# ---- models of others ----

def models_of_others():
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=96)
    yield transformers.BertForSequenceClassification(transformers.BertConfig(**small, intermediate_size=128)), 17
    yield transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, intermediate_size=176, tie_word_embeddings=True)), 16
    gpt2 = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=96, n_positions=32, bos_token_id=0, eos_token_id=0)
    yield transformers.GPT2LMHeadModel(gpt2), 11


def test_transformers_models_quantize_compute_and_come_back():
    for model, layers in models_of_others():
        model.eval()
        ids = torch.arange(3, 21).reshape(2, 9)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
            for bits, most in ((8, 0.05), (4, 0.35)):
                quantized = quantize_model_ptq(model, bits=bits)
                assert len(get_quantization_info(quantized).layers) == layers
                out = quantized(input_ids=ids).logits
                assert (out - logits).norm() < most * logits.norm()
                assert (dequantize_model(quantized)(input_ids=ids).logits - out).norm() < 0.05 * out.norm()
                rebuilt = restore_quantization(copy.deepcopy(model), quantization_metadata(quantized))
                rebuilt.load_state_dict(quantized.state_dict())
                assert torch.equal(rebuilt(input_ids=ids).logits, out)


def test_conv1d_is_quantized_and_comes_back_as_itself():
    "GPT-2's blocks are made of Conv1D, which keeps its weight as [in, out]."
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.arange(30).reshape(2, 15)
    for options in (dict(), dict(type="static", calibration_data=[ids]), dict(rounding="gptq", calibration_data=[{"input_ids": ids, "labels": ids}])):
        quantized = quantize_model_ptq(model, bits=4, **options)
        info = get_quantization_info(quantized)
        row = info.layers["transformer.h.0.attn.c_attn"]
        assert (row.kind, row.shape, row.bits) == ("Conv1D", (96, 32), 4) and not info.left_alone
        assert info.parameters == sum(p.numel() for p in model.parameters())
        layer = quantized.transformer.h[0].attn.c_attn
        assert layer.weight.shape == model.transformer.h[0].attn.c_attn.weight.shape == (32, 96)
        back = dequantize_model(quantized)
        assert str(back) == str(model) and torch.equal(back.transformer.h[0].attn.c_attn.weight, layer.weight)
        assert {n: t.shape for n, t in back.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
        assert back.transformer.h[0].attn.c_attn.weight.is_contiguous()
        rebuilt = restore_quantization(copy.deepcopy(model), json.loads(json.dumps(quantization_metadata(quantized))))
        rebuilt.load_state_dict(quantized.state_dict())
        assert torch.equal(rebuilt(input_ids=ids).logits, quantized(input_ids=ids).logits)


def test_images_and_encoder_decoders():
    "A vision transformer (patches by convolution) and T5 (one embedding under three names)."
    transformers = pytest.importorskip("transformers")
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=8, num_labels=10))  # fmt: skip
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(
        d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2, vocab_size=99, decoder_start_token_id=0))  # fmt: skip
    ids = torch.arange(18).reshape(2, 9)
    for model, batch in [(vit.eval(), {"pixel_values": torch.randn(2, 3, 32, 32)}), (t5.eval(), {"input_ids": ids, "decoder_input_ids": ids})]:
        for bits, most in ((8, 0.05), (4, 0.35)):
            quantized = quantize_model_ptq(model, bits=bits)
            assert quantized.dtype == torch.float32 and quantized.device.type == "cpu"
            with torch.no_grad():
                out, want = quantized(**batch).logits, model(**batch).logits
                assert (out - want).norm() < most * want.norm()
                assert (dequantize_model(quantized)(**batch).logits - out).norm() < 0.05 * out.norm()


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_is_one_graph_and_gives_the_same_logits(lm):
    for bits in (8, 4):
        quantized = quantize_model_ptq(lm, bits=bits)
        with torch.no_grad():
            assert torch.allclose(torch.compile(quantized, fullgraph=True)(IDS), quantized(IDS), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_layer_compiled_by_its_own_method_does_not_go_on_as_float(inplace):
    "layer.compile() leaves the compiled float layer in an attribute; carried over, it would be what is called."
    model, x = mlp(16, 8), torch.randn(3, 16)
    model[0].compile(backend="eager")
    plain = model(x).clone()
    quantized = quantize_model_ptq(model, inplace=inplace)
    assert torch.equal(quantized(x), quantized[0].forward(x)) and not torch.equal(quantized(x), plain)
