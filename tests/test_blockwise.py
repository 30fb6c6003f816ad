"Blockwise 4-bit weights: the bytes of bitsandbytes, the laws of rounding, and the frozen layer in all that a model goes through."
import copy
import io
import logging
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from qtlm.blockwise import (
    FP4,
    INT4,
    NF4,
    BlockwiseLinear,
    BlockwiseState,
    _dynamic_map,
    _linear,
    _linear_backward,
    _nearest_codes,
    _quantize_absmax,
    dequantize_blockwise,
    quantize_blockwise,
)
from qtlm.layers import QuantizationError

SHAPES = [(1,), (2,), (63,), (64,), (65,), (4096,), (3, 5), (7, 93), (64, 64), (2, 3, 50), (300, 1000), (131, 1001), (5, 131_072), (1, 0x20001)]
SCHEMES = [{}, {"double_quant": True}, {"quant_type": "fp4", "blocksize": 128}, {"quant_type": "int4", "blocksize": 32, "double_quant": True}]


@pytest.fixture
def bnb():
    "bitsandbytes' functions, without its word about missing kernels."
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return pytest.importorskip("bitsandbytes.functional")


def assert_same_bytes(bnb, w, quant_type, blocksize, double=True):
    "Codes, absmax, the nested state and the weights that come back are bitsandbytes', byte for byte."
    codes, state = quantize_blockwise(w, quant_type, blocksize, double)
    theirs, expected = bnb.quantize_4bit(w, blocksize=blocksize, quant_type=quant_type, compress_statistics=double)
    assert codes.dtype == theirs.dtype and torch.equal(codes, theirs.flatten())
    assert state.absmax.dtype == expected.absmax.dtype and torch.equal(state.absmax, expected.absmax)
    if double:
        assert torch.equal(state.absmax_scale, expected.state2.absmax) and torch.equal(state.absmax_offset, expected.offset)
    if blocksize < 2048 and w.shape[-1] % 2 == 0:  # else bitsandbytes goes back through torch.compile, which takes long
        back = dequantize_blockwise(codes, state)
        assert back.dtype == w.dtype and torch.equal(back, bnb.dequantize_4bit(theirs, expected).view_as(w))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bytes_of_bitsandbytes_at_every_shape(bnb, shape, quant_type):
    "Odd sizes, short last blocks, many pieces, three dtypes."
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05).to(dtype)
        for double in (False, True):
            assert_same_bytes(bnb, w, quant_type, 64, double)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_bytes_of_bitsandbytes_at_every_blocksize(bnb, blocksize):
    "A short last block at each size."
    w = torch.randn(10, 1234, generator=torch.Generator().manual_seed(2))
    for quant_type in ("nf4", "fp4"):
        assert_same_bytes(bnb, w, quant_type, blocksize, False)
        assert_same_bytes(bnb, w, quant_type, blocksize, True)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("scale", [0.0, 1e-45, 3e-42, 1e-39, 1e-38, 1.2e-38, 1e-30, 1e30, 3e38, 3.4e38])
def test_bytes_of_bitsandbytes_at_extreme_magnitudes(bnb, quant_type, scale):
    "Zeros, numbers without an exponent of their own, the largest there are; in whole blocks and in a short one."
    w = (torch.rand(50, 70, generator=torch.Generator().manual_seed(3)) * 2 - 1) * scale
    w[3:7] = 0
    assert_same_bytes(bnb, w, quant_type, 64, False)
    assert_same_bytes(bnb, torch.cat([w.flatten(), torch.zeros(20)]), quant_type, 64, False)
    assert_same_bytes(bnb, torch.zeros(100), quant_type, 64, False)
    if scale > 1e38:
        with pytest.raises(QuantizationError, match="double_quant: found absmax whose sum overflows"):
            quantize_blockwise(w, quant_type, double_quant=True)
    elif scale == 0 or scale > 1e-37:
        assert_same_bytes(bnb, w, quant_type, 64, True)
    else:  # here bitsandbytes multiplies by infinity in its second step
        _, state = quantize_blockwise(w, quant_type, double_quant=True)
        assert ((state.scales() - quantize_blockwise(w, quant_type)[1].absmax).abs() < 1.1e-38).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bytes_of_bitsandbytes_at_the_boundaries(bnb, quant_type):
    "Every boundary between two values, and its neighbours among floats, under several absmax and in a short block."
    values = {"nf4": NF4, "fp4": FP4}[quant_type].sort().values
    edges = torch.cat([(values[:-1] + values[1:]) / 2, values, torch.tensor([0.0, -0.0])])
    near = torch.cat([edges, torch.nextafter(edges, torch.tensor(2.0)), torch.nextafter(edges, torch.tensor(-2.0))]).clamp(-1, 1)
    blocks = F.pad(near, (0, -len(near) % 63)).view(-1, 63)
    for amax in (1.0, 0.3, 7.7, 1e-3, 123.456):
        w = torch.cat([torch.full((len(blocks), 1), amax), blocks * amax], 1).flatten()
        assert_same_bytes(bnb, w, quant_type, 64, False)
        assert_same_bytes(bnb, w[:-2], quant_type, 64, False)
        for part in blocks:  # alone, they are a short block
            assert_same_bytes(bnb, torch.cat([torch.tensor([amax]), part[:61] * amax]), quant_type, 64, False)


def test_tables_of_bitsandbytes(bnb):
    "The values and the 8-bit code."
    assert torch.equal(NF4, bnb.get_4bit_type("nf4", "cpu")) and torch.equal(FP4, bnb.get_4bit_type("fp4", "cpu"))
    assert torch.equal(_dynamic_map(), bnb.create_dynamic_map())


def test_absmax_codes_of_bitsandbytes(bnb):
    "The 8-bit codes of numbers at and beside every position's edge."
    edges = ((torch.arange(65536) - 0.5) / 65535 * 2 - 1).clamp(-1, 1)
    numbers = torch.cat([edges, torch.nextafter(edges, torch.tensor(2.0)), torch.randn(10_000) * 1e-3]).clamp(-1, 1)
    numbers = F.pad(numbers, (0, -len(numbers) % 254)).view(-1, 254)
    numbers = torch.cat([torch.ones(len(numbers), 1), -torch.ones(len(numbers), 1), numbers], 1).flatten()
    numbers = torch.cat([numbers, -numbers])  # their mean is 0
    codes, scale, offset = _quantize_absmax(numbers)
    expected, state = bnb.quantize_blockwise(numbers - offset, blocksize=256)
    assert torch.equal(codes, expected) and torch.equal(scale, state.absmax) and codes.unique().numel() > 240


@pytest.mark.parametrize("double", [False, True])
def test_layer_gives_what_linear4bit_gives(bnb, double):
    "Forward and backward of bitsandbytes' layer, to the bit."
    from bitsandbytes.nn import Linear4bit, Params4bit

    float_layer = nn.Linear(128, 96)
    theirs = Linear4bit(128, 96, quant_type="nf4", compress_statistics=double)
    theirs.weight = Params4bit(float_layer.weight.detach().clone(), requires_grad=False, quant_type="nf4", compress_statistics=double)
    theirs.bias = float_layer.bias
    theirs = theirs.to("cpu")
    ours = BlockwiseLinear.from_linear(float_layer, double_quant=double)
    results = []
    for module in (ours, theirs):
        x = torch.randn(5, 7, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = module(x)
        y.sin().sum().backward()
        results.append((y.detach(), x.grad))
    assert all(map(torch.equal, *results))


def test_codes_are_nearest_and_int4_is_plain_rounding():
    "INT4 codes are round(7 w / absmax) + 8, away from ties."
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(4))
    codes, state = quantize_blockwise(w, "int4")
    plain = (w / state.absmax[:, None] * 7).round() + 8
    assert torch.equal(torch.stack([codes >> 4, codes & 15], 1).view(64, 64), plain.to(torch.uint8))
    assert torch.equal(dequantize_blockwise(codes, state), INT4[plain.long()] * state.absmax[:, None])
    assert not (_nearest_codes(torch.linspace(-1, 1, 10_001), "int4") == 0).any()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_was_rounded_stays_as_it_is(shape, scheme):
    "Weights that come back round to themselves; with double quantization to the same codes while no absmax was lost."
    w = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    codes, state = quantize_blockwise(w, **scheme)
    back = dequantize_blockwise(codes, state)
    assert back.shape == w.shape and back.is_contiguous() and back.untyped_storage().nbytes() == 4 * w.numel()
    again, state_again = quantize_blockwise(back, **scheme | {"double_quant": False})
    assert torch.equal(dequantize_blockwise(again, state_again), back)
    assert scheme.get("quant_type") == "fp4" or torch.equal(again, codes) and (state.scales() > 0).all()


def test_weights_are_read_only():
    "Any layout; a parameter; nothing of the input changes."
    w = nn.Parameter(torch.randn(96, 64))
    before = w.detach().clone()
    codes, state = quantize_blockwise(w.t())
    assert torch.equal(codes, quantize_blockwise(w.detach().t().contiguous())[0]) and not state.absmax.requires_grad
    assert torch.equal(w, before) and w.grad is None
    assert torch.equal(dequantize_blockwise(codes, state, torch.float64), dequantize_blockwise(codes, state).double())
    assert torch.equal(quantize_blockwise(w.double())[0], quantize_blockwise(w)[0])


@pytest.mark.parametrize("w, message", [
    ([1.0], "found list"), (torch.arange(4), "torch.int64"), (torch.empty(0, 4), r"torch.float32 \[0, 4\]"), (torch.ones(2, device="meta"), "on meta"),
    (torch.tensor([1.0, float("nan")]), "block 0 of 1"), (torch.ones(200).index_fill(0, torch.tensor([130]), float("inf")), "block 2 of 4"),
    (torch.full((2,), 1e300, dtype=torch.float64), "overflow"), (torch.ones(4).to(torch.float8_e5m2), "16 bits or more"), (torch.ones(4, dtype=torch.complex64), "complex"),
], ids=str)  # fmt: skip
def test_weights_that_are_refused(w, message):
    "One line that says what was found."
    with pytest.raises(QuantizationError, match=message) as caught:
        quantize_blockwise(w)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("request_, message", [
    (dict(quant_type="NF4"), "found 'NF4'.*Did you mean nf4"), (dict(quant_type="int8"), "Did you mean int4"), (dict(quant_type=None), "found None; expected nf4, fp4 or int4"),
    (dict(quant_type=["nf4"]), "expected nf4"), (dict(blocksize=16), "found 16; expected one of 32"), (dict(blocksize=8192), "found 8192"), (dict(blocksize="64"), "found '64'"), (dict(blocksize=64.0), "found 64.0"),
])  # fmt: skip
def test_schemes_that_are_refused(request_, message):
    "By the function and by the layer."
    for make in (lambda: quantize_blockwise(torch.ones(64), **request_), lambda: BlockwiseLinear(8, 8, **request_), lambda: BlockwiseLinear.from_linear(nn.Linear(8, 8), **request_)):
        with pytest.raises(QuantizationError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)


def make_layer(scheme, bias=True, width=96, **options):
    "A frozen layer, and the float one with the same weights."
    torch.manual_seed(6)
    linear = nn.Linear(width, 40, bias)
    layer = BlockwiseLinear.from_linear(linear, **scheme, **options)
    linear.weight.data.copy_(layer.dequantize())
    return layer, linear.requires_grad_(False)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("width", [96, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_the_float_layer_of_its_weights(scheme, width, bias):
    "Outputs and gradients to the bit, in each float dtype; a bias that is trained gets its gradient too."
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        layer, linear = make_layer(scheme, bias, width)
        layer, linear = layer.to(dtype), linear.to(dtype)
        assert torch.equal(layer.weight, linear.weight) or dtype == torch.float64
        results = []
        for module in (layer, linear):
            x = torch.randn(2, 9, width, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
            if bias:
                module.bias = nn.Parameter(module.bias.detach().clone())
            y = module(x)
            y.sin().sum().backward()
            results.append((y.detach(), x.grad, *([module.bias.grad] if bias else [])))
        assert all(map(torch.equal, *results))


def test_gradient_is_the_derivative():
    "Against finite differences in float64."
    layer, _ = make_layer({}, width=33)
    assert torch.autograd.gradcheck(layer.double(), torch.randn(3, 33, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_operators_keep_the_rules_of_custom_operators(scheme):
    "Schema, fake results, autograd, under a compiler's tracer."
    layer, _ = make_layer(scheme)
    x = torch.randn(2, 3, 96, requires_grad=True)
    torch.library.opcheck(_linear, (x, layer.bias, *layer._scheme()))
    torch.library.opcheck(_linear_backward, (torch.randn(2, 3, 40), *layer._scheme()), test_utils=("test_schema", "test_faketensor"))


def kept_for_backward(module, x):
    "Return the bytes that autograd keeps beside the buffers and the input."
    kept, known = {}, {t.untyped_storage().data_ptr() for t in (x, *module.buffers(), *module.parameters())}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.untyped_storage().data_ptr(): t.nbytes}) or t, lambda t: t):
        y = module(x)
    y.sum().backward()
    return sum(size for pointer, size in kept.items() if pointer not in known)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("options", [{}, {"compute_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_only_buffers_are_kept_for_backward(scheme, options, autocast):
    "Neither input nor float weight nor anything made of them: from forward to backward autograd holds the layer's own buffers."
    layer, kept = make_layer(scheme, **options)[0], []
    x = torch.randn(5, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.float().sum().backward()
    assert x.grad.abs().sum() > 0 and set(kept) == {t.data_ptr() for t in layer.buffers()}


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler"))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_in_one_graph(backend):
    "torch.compile(fullgraph=True): the same outputs and gradients, and no float weight kept from forward to backward."
    torch._dynamo.reset()
    chain = nn.Sequential(*(make_layer(scheme)[0] for scheme in ({}, {"double_quant": True})))
    chain[1] = BlockwiseLinear.from_linear(nn.Linear(40, 40), double_quant=True, compute_dtype=torch.bfloat16)
    chain.requires_grad_(False)
    compiled, results = torch.compile(chain, fullgraph=True, backend=backend), []
    for module in (chain, compiled):
        x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = module(x)
        y.sin().sum().backward()
        results.append((y.detach(), x.grad))
        assert kept_for_backward(module, x) < 40 * 96  # bytes: less than one of each weight
    assert all(map(torch.equal, *results))


def test_a_recorded_product_would_keep_the_floats():
    "What the test above measures is there to be found: the plain way keeps a float weight."
    layer, linear = make_layer({})
    linear.forward = lambda x: F.linear(x, layer.dequantize())
    assert kept_for_backward(linear, torch.randn(5, 96, requires_grad=True)) == 4 * 40 * 96


def test_autocast_and_compute_dtype():
    "Autocast decides where no compute_dtype was given; the result has the dtype of what came in."
    layer, linear = make_layer({})
    x = torch.randn(5, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, linear(x))
        y.float().sum().backward()
        exact = make_layer({}, compute_dtype=torch.float32)[0]
        seen = x.detach().bfloat16()
        seen.requires_grad_()
        (result := exact(seen)).float().sin().sum().backward()  # in autocast's range, too
        seen_float = seen.detach().float().requires_grad_()
        with torch.autocast("cpu", enabled=False):
            F.linear(seen_float, linear.weight, linear.bias).bfloat16().float().sin().sum().backward()
        assert torch.equal(seen.grad, seen_float.grad.bfloat16())
        assert result.dtype == torch.bfloat16 and torch.equal(result, F.linear(seen.double(), linear.weight.double(), linear.bias.double()).bfloat16())
    assert x.grad.dtype == torch.float32
    half = make_layer({}, compute_dtype=torch.bfloat16)[0]
    assert half(x).dtype == torch.float32 and torch.equal(half(x), linear.bfloat16()(x.bfloat16()).float())
    with pytest.raises(QuantizationError, match="compute_dtype: found 'bfloat16'"):
        BlockwiseLinear(4, 4, compute_dtype="bfloat16")


def test_gradient_checkpointing():
    "Running forward twice changes nothing."
    layer, _ = make_layer({})
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
        run(x).sin().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_casts_copies_and_files_change_no_byte(scheme):
    "Model-wide casts, deepcopy, a state dict through a file, meta and back."
    layer, _ = make_layer(scheme)
    expected = {name: t.clone() for name, t in layer.state_dict().items()}
    for other in (copy.deepcopy(layer), nn.Sequential(copy.deepcopy(layer)).bfloat16().half().to(torch.float64).float()[0]):
        for name, t in other.named_buffers():
            assert t.dtype == expected[name].dtype and torch.equal(t, expected[name])
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    empty = BlockwiseLinear(96, 40, **scheme, device="meta")
    for fresh in (BlockwiseLinear(96, 40, **scheme), empty.to_empty(device="cpu")):
        assert not fresh.codes.any() or fresh is empty
        fresh.load_state_dict(state)
        x = torch.randn(3, 96)
        assert torch.equal(fresh(x), layer(x)) and all(torch.equal(t, expected[name]) for name, t in fresh.state_dict().items())
    moved = copy.deepcopy(layer).bfloat16()
    assert moved.weight.dtype == moved.bias.dtype == torch.bfloat16 and moved.dequantize().dtype == torch.float32
    with pytest.raises(RuntimeError, match="absmax"):
        BlockwiseLinear(96, 40, **scheme | {"double_quant": not scheme.get("double_quant")}).load_state_dict(state)


def test_a_cast_state_is_refused():
    "A file whose absmax was cast to bfloat16 would change all weights; it is refused."
    layer, _ = make_layer({})
    cast = {name: t.bfloat16() if t.is_floating_point() else t for name, t in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="absmax: found torch.bfloat16; expected torch.float32"):
        layer.load_state_dict(cast)


def test_tables_made_in_inference_mode_serve_training_too():
    "What is cached at a first call in inference mode, under another default dtype, is used by later ones."
    code = """
import torch
from torch import nn
from qtlm.blockwise import BlockwiseLinear
torch.manual_seed(0)
linear = nn.Linear(64, 32)
torch.set_default_dtype(torch.float64)
with torch.inference_mode(), torch.device("meta"):
    layer = BlockwiseLinear.from_linear(linear, double_quant=True)
    first = layer.dequantize().clone()
torch.set_default_dtype(torch.float32)
layer = BlockwiseLinear.from_linear(linear, double_quant=True)
x = torch.randn(3, 64, requires_grad=True)
layer(x).sum().backward()
assert torch.equal(layer.dequantize(), first) and first.dtype == torch.float32 and x.grad.abs().sum() > 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_empty_layer_stands_for_zeros():
    "Before anything is loaded."
    for scheme in SCHEMES:
        assert not BlockwiseLinear(33, 5, **scheme).dequantize().any()


def test_the_float_layer_stays_and_the_bias_is_the_same():
    "from_linear leaves the layer as it was; bias, mode and whether it is trained go along."
    linear = nn.Linear(64, 8).eval()
    linear.bias.requires_grad_(False)
    before = copy.deepcopy(linear.state_dict())
    layer = BlockwiseLinear.from_linear(linear)
    assert layer.bias is linear.bias and not layer.training and [name for name, p in layer.named_parameters()] == ["bias"]
    assert all(torch.equal(t, before[name]) for name, t in linear.state_dict().items())
    assert BlockwiseLinear.from_linear(nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)).weight.dtype == torch.bfloat16
    with pytest.raises(QuantizationError, match="NaN"):
        BlockwiseLinear.from_linear(nn.Linear(8, 8).requires_grad_(False).apply(lambda m: m.weight.fill_(float("nan"))))


@pytest.mark.parametrize("blocksize, double, bits", [(64, False, 4.5), (64, True, 4.126953125), (32, False, 5.0), (4096, False, 4.0078125)])
def test_bits_a_weight(blocksize, double, bits):
    "Lasting memory, in a file too."
    layer = BlockwiseLinear.from_linear(nn.Linear(1024, 512, bias=False), blocksize=blocksize, double_quant=double)
    bits_found = sum(8 * t.nbytes for t in layer.state_dict().values()) / (1024 * 512)
    assert bits <= bits_found <= bits + 32 / (1024 * 512)


def test_state_by_hand():
    "The state is plain data: made by hand, it turns bytes into weights."
    state = BlockwiseState(torch.tensor([2.0]), (3,), torch.float32, "nf4", 64)
    assert dequantize_blockwise(torch.tensor([0x0F, 0x70], dtype=torch.uint8), state).tolist() == [-2.0, 2.0, 0.0]
