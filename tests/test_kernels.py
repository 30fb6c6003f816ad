# python -m pytest tests/test_kernels.py
"""Contracts of `qtlm.kernels`: packing is lossless, rounding is bounded, integer products are exact, compiled and eager agree."""
import math
import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qtlm import kernels
from qtlm.kernels import (
    KernelError,
    expand_groups,
    int4_linear,
    int8_linear,
    pack_int4,
    quantize_groups,
    quantize_rows,
    quantize_tensor,
    quantize_tokens,
    unpack_int4,
)

EPS = torch.finfo(torch.float32).eps
small = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)


def normal(seed, *shape):
    "Return normal numbers, rows of very different size among them."
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) * torch.exp(3 * torch.randn(*shape[:-1], 1, generator=g))


# ---- packing ----

@small
@given(seeds, st.integers(0, 5), st.integers(0, 90), st.integers(0, 9))
def test_unpacking_undoes_packing_for_any_layout(seed, rows, width, offset):
    "Strided, offset and empty inputs come back unchanged, whichever path they take."
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (rows, width + offset), generator=g)[:, offset:]
    packed = pack_int4(codes)
    assert packed.shape == (rows, (width + 1) // 2)
    assert torch.equal(unpack_int4(packed, width), codes.byte())
    buffer = torch.zeros(packed.numel() + offset, dtype=torch.uint8)
    buffer[offset:] = packed.flatten()  # as a slice of a larger buffer, at any offset
    assert torch.equal(unpack_int4(buffer[offset:].view(packed.shape), width), codes.byte())
    assert torch.equal(unpack_int4(packed.t().contiguous().t(), width), codes.byte())


def test_the_low_nibbles_are_the_first_half_of_the_row():
    "The layout on disk: it must not change."
    assert pack_int4(torch.arange(16)).tolist() == [i | (i + 8) << 4 for i in range(8)]
    assert pack_int4(torch.tensor([1, 2, 3])).tolist() == [1 | 3 << 4, 2]


def test_packing_does_not_write_into_its_input():
    codes = torch.full((2, 8), 5, dtype=torch.uint8)
    pack_int4(codes)
    assert (codes == 5).all()


@pytest.mark.parametrize("codes", [torch.tensor([16]), torch.tensor([-1]), torch.tensor([0.5])])
def test_packing_refuses_what_is_no_code(codes):
    with pytest.raises(KernelError, match="expected integers 0..15"):
        pack_int4(codes)


# ---- rounding ----

@small
@given(seeds, st.integers(1, 6), st.integers(1, 70), st.integers(2, 8))
def test_rows_are_rounded_to_the_nearest_code(seed, rows, width, bits):
    "The error is at most half a step plus one ulp; products are exact; the second time changes nothing."
    w = normal(seed, rows, width)
    codes, scale = quantize_rows(w, bits)
    limit = 2 ** (bits - 1) - 1
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and (codes.abs().amax(1) == limit).all()
    kept = codes * scale[:, None]
    assert torch.equal(kept.double(), codes.double() * scale.double()[:, None])
    assert ((w - kept).abs() <= scale[:, None] / 2 + EPS * w.abs()).all()
    assert all(map(torch.equal, quantize_rows(kept, bits), (codes, scale)))
    assert torch.equal(codes, torch.round(w.double() / scale.double()[:, None]).to(torch.int8))  # halves to even, as torch.round


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_other_float_types_round_like_their_float32(dtype):
    w = torch.randn(4, 30).to(dtype)
    assert all(map(torch.equal, quantize_rows(w), quantize_rows(w.float())))
    assert all(map(torch.equal, quantize_groups(w, 10), quantize_groups(w.float(), 10)))


def test_extreme_rows_have_a_usable_scale():
    w = torch.tensor([[0.0, 0.0], [1e-45, 0.0], [3.4e38, -3.4e38], [1e-38, 1e-39]])
    for _, scale, *_ in (quantize_rows(w), quantize_groups(w, 2)):
        assert scale.isfinite().all() and (scale > 0).all()
    assert not (quantize_rows(w)[0][0]).any()
    codes, scale, group_scale = quantize_groups(w, 2)
    kept = expand_groups(pack_int4(codes), group_scale, 2) * scale[:, None]
    assert kept.isfinite().all() and not kept[0].any()


@pytest.mark.parametrize("round_it", [quantize_rows, lambda w: quantize_groups(w, 4)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_channel(round_it, value):
    w = torch.randn(5, 8)
    w[3, 2] = value
    with pytest.raises(KernelError, match="channel 3: found NaN or infinity"):
        round_it(w)


@small
@given(seeds, st.integers(1, 5), st.integers(1, 5), st.integers(1, 40))
def test_groups_fit_int8_and_round_to_nearest_inside_the_cut(seed, rows, groups, size):
    w = normal(seed, rows, groups * size)
    codes, scale, byte = quantize_groups(w, size)
    assert codes.dtype == byte.dtype == torch.uint8 and byte.shape == (rows, groups) and codes.max() <= 15
    g, zero = (byte & 15).long() + 1, (byte >> 4).long()
    u = codes.unflatten(1, (groups, size)).long()
    steps = (u - zero[..., None]) * g[..., None]
    assert steps.min() >= -128 and steps.max() <= 127
    assert torch.equal(expand_groups(pack_int4(codes), byte, w.shape[1]).long(), steps.flatten(1))
    inside = (u > 0) & (u < 15) & (steps - g[..., None] >= -128) & (steps + g[..., None] <= 127)
    error = (w.unflatten(1, (groups, size)) - steps * scale[:, None, None]).abs()
    assert (error <= scale[:, None, None] * (g[..., None] / 2 + 256 * EPS))[inside].all()


def test_groups_are_rounded_alike_in_any_number_of_rows():
    "Rows are worked on in parts; the parts must not show."
    w = normal(0, 700, 512)
    whole = quantize_groups(w, 64)
    assert all(torch.equal(torch.cat(parts), t) for parts, t in zip(zip(*(quantize_groups(r, 64) for r in w.split(33))), whole))


@pytest.mark.parametrize("size", [16, 64, -1])
def test_groups_lie_on_the_covering_grid(size):
    "One grid a group, computed here again in plain Python; each code the nearest of sixteen that fit an int8."
    w = torch.distributions.StudentT(5.0).sample((3, 64))
    codes, scale, byte = quantize_groups(w, size)
    for i, row in enumerate((w / scale[:, None]).unflatten(1, (-1, 64 if size == -1 else size)).tolist()):
        for j, group in enumerate(row):
            low, high = min(0, *group), max(0, *group)
            g = max(1, math.ceil(torch.tensor((high - low) / 15).item()))
            zero = min(15, max(0, round(7.5 - (low + high) / (2 * g))))
            assert int(byte[i, j]) == zero * 16 + g - 1
            levels = {u: (u - zero) * g for u in range(16) if -128 <= (u - zero) * g <= 127}
            for v, u in zip(group, codes[i].view(len(row), -1)[j].tolist()):
                assert abs(levels[u] - v) <= min(abs(x - v) for x in levels.values()) + 1e-4


def test_a_covering_grid_is_nearly_as_good_as_float_scales():
    "Against min-max with float scales (16 bits a group more), on weights with heavy tails: within 1 dB."
    torch.manual_seed(0)
    w = torch.distributions.StudentT(5.0).sample((64, 256))
    codes, scale, byte = quantize_groups(w, 64)
    ours = (expand_groups(pack_int4(codes), byte, 256) * scale[:, None] - w).square().sum()
    v = w.unflatten(1, (-1, 64))
    low, high = v.amin(-1, keepdim=True), v.amax(-1, keepdim=True)
    s = (high - low) / 15
    plain = ((torch.round((v - low) / s) * s + low) - v).square().sum()
    assert ours <= plain * 10**0.1


@small
@given(seeds, st.integers(1, 5), st.integers(1, 12), st.sampled_from([4, 8, 12, 20, 64]))
def test_four_codes_at_a_time_expand_as_one_by_one(seed, rows, groups, size):
    "The path that compiled code takes; random bytes, so that codes outside int8 wrap around alike, too."
    g = torch.Generator().manual_seed(seed)
    width = groups * size
    packed = torch.randint(256, (rows, width // 2), generator=g).byte()
    byte = torch.randint(256, (rows, groups), generator=g).byte()
    if kernels._has_lanes(packed, byte, width):
        assert torch.equal(kernels._expand_lanes(packed, byte, width), expand_groups(packed, byte, width))
    else:
        assert groups % 2 and size % 8, "only groups that lie across the halves at odd places have no lanes"


# ---- tokens and products ----

@small
@given(seeds, st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_tokens_are_rounded_within_half_a_step(seed, width, dtype):
    x = normal(seed, 3, 4, width).to(dtype)
    q, s = quantize_tokens(x)
    assert q.dtype == torch.int8 and s.dtype == torch.float32 and s.shape == (3, 4, 1) and (q.abs().amax(-1) == 127).all()
    assert ((x.double() - q.double() * s.double()).abs() <= s * (0.5 + 2**-14)).all()


@small
@given(seeds, st.integers(0, 6), st.integers(1, 70), st.integers(1, 40), st.booleans())
def test_int8_linear_is_the_same_arithmetic_in_64_bit_integers(seed, tokens, width, out, with_bias):
    x, w = normal(seed, tokens, width), normal(seed + 1, out, width)
    codes, scale = quantize_rows(w)
    bias = w[:, 0].clone() if with_bias else None
    q, s = quantize_tokens(x)
    want = (q.long() @ codes.long().t()).float() * s * scale + (0 if bias is None else bias)
    assert torch.equal(int8_linear(x, codes, scale, bias), want)


@small
@given(seeds, st.integers(1, 4), st.integers(1, 20), st.integers(1, 40))
def test_int4_linear_is_int8_linear_after_unpacking(seed, groups, size, out):
    x, w = normal(seed, 5, groups * size), normal(seed + 1, out, groups * size)
    codes, scale, byte = quantize_groups(w, size)
    packed = pack_int4(codes)
    want = int8_linear(x, expand_groups(packed, byte, groups * size), scale)
    assert torch.equal(int4_linear(x, packed, scale, byte, size), want)


@small
@given(seeds, st.integers(0, 6), st.integers(1, 70), st.integers(1, 40), st.sampled_from([None, 0, -128, 127, 9]), st.sampled_from([8, 4]))
def test_static_layers_are_the_same_arithmetic_in_64_bit_integers(seed, tokens, width, out, zero, bits):
    "Values far outside the range are cut off; the zero point is taken out exactly; the same for 4 bits."
    x, w = normal(seed, tokens, width), normal(seed + 1, out, width)
    step, zero = torch.tensor(0.05), None if zero is None else torch.tensor(zero, dtype=torch.int32)
    q = quantize_tensor(x, step, zero)
    shifted = q.long() - (0 if zero is None else zero)
    assert torch.equal(q.double(), ((x * (1 / step)).round().double() + (0 if zero is None else zero)).clamp(-128, 127))
    given = {"input_scale": step, "input_zero_point": zero}
    if bits == 8:
        codes, scale = quantize_rows(w)
        got = int8_linear(x, codes, scale, **given)
    else:
        c4, scale, byte = quantize_groups(w, -1)
        codes, got = expand_groups(pack_int4(c4), byte, width), int4_linear(x, pack_int4(c4), scale, byte, -1, **given)
    assert torch.equal(got, (shifted @ codes.long().t()).float() * step * scale)


def test_static_sums_are_exact_where_they_are_largest():
    x = torch.full((2, 2**16), 1e9)
    for value, zero in ((-128, -128), (127, -128), (-128, 127)):
        codes = torch.full((3, 2**16), value, dtype=torch.int8)
        y = int8_linear(x * (1 if zero < 0 else -1), codes, torch.ones(3), input_scale=torch.tensor(1.0), input_zero_point=torch.tensor(zero, dtype=torch.int32))
        assert (y == float((255 if zero < 0 else -255) * value * 2**16)).all()


def test_a_static_token_that_is_not_finite_is_nan_and_alone():
    x = torch.randn(4, 16)
    x[1, 3], x[2, 0] = float("inf"), float("nan")
    y = int8_linear(x, *quantize_rows(torch.randn(8, 16)), input_scale=torch.tensor(0.1), input_zero_point=torch.tensor(3, dtype=torch.int32))
    assert y[1:3].isnan().all() and y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("zero", [None, torch.tensor(-7, dtype=torch.int32)])
def test_both_products_give_the_same_bits(zero, monkeypatch):
    "The path without a compiler, and the compiler's, whole and cut into blocks of columns."
    q, w = (torch.randint(-128, 128, (n, 72)).to(torch.int8) for n in (130, 300))
    args = q, w, torch.rand(130, 1), torch.rand(300), zero, torch.rand(300), torch.float32
    want = ((q.long() - (0 if zero is None else zero)) @ w.long().t()).float() * args[2] * args[3] + args[5]
    for block in (2**22, 9000, 1):
        monkeypatch.setattr(kernels, "_BLOCK", block)
        assert torch.equal(kernels._product_in_blocks(*args), want) and torch.equal(kernels._product_in_place(*args), want)
        assert torch.equal(kernels._product_in_blocks(q[:1], w, args[2][:1], *args[3:]), want[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_in_any_batch(dtype):
    w, x = torch.randn(48, 128), torch.randn(2, 37, 128).to(dtype)
    codes, scale = quantize_rows(w)
    c4, s4, b4 = quantize_groups(w, 32)
    for layer in (lambda x: int8_linear(x, codes, scale), lambda x: int4_linear(x, pack_int4(c4), s4, b4, 32)):
        y = layer(x)
        assert y.dtype == dtype and y.shape == (2, 37, 48)
        assert all(torch.equal(layer(x[i, j]), y[i, j]) for i in range(2) for j in range(37))
        assert torch.equal(layer(x[:, ::3]), y[:, ::3]) and layer(x[:, :0]).shape == (2, 0, 48)


@pytest.mark.parametrize("width, out", [(64, 32), (7, 5), (1, 3), (130, 1)])
def test_a_row_alone_is_the_row_among_513(width, out):
    "Bit for bit, wherever it stands: the matrix product takes other paths for one row and for many."
    x, w = normal(0, 513, width), normal(1, out, width)
    codes, scale = quantize_rows(w)
    c4, s4, b4 = quantize_groups(w, -1)
    for layer in (lambda x: int8_linear(x, codes, scale), lambda x: int4_linear(x, pack_int4(c4), s4, b4, -1)):
        y = layer(x)
        for i in (0, 1, 15, 16, 17, 255, 256, 511, 512):
            assert torch.equal(layer(x[i : i + 1])[0], y[i]) and torch.equal(layer(x[i]), y[i])
        assert torch.equal(layer(x.flip(0)), y.flip(0)) and torch.equal(layer(x.t().contiguous().t()), y)


def test_a_token_that_is_not_finite_is_nan_and_alone():
    x, w = torch.randn(4, 16), torch.randn(8, 16)
    x[1, 3], x[2, 0] = float("inf"), float("nan")
    y = int8_linear(x, *quantize_rows(w))
    assert y[1:3].isnan().all() and y[[0, 3]].isfinite().all()
    assert quantize_tokens(x)[1].isnan().flatten().tolist() == [False, True, True, False]


def test_gradients_are_those_of_the_dequantized_layer():
    x, w, bias = torch.randn(3, 5, 30, requires_grad=True), torch.randn(7, 30), torch.randn(7, requires_grad=True)
    codes, scale = quantize_rows(w)
    c4, s4, b4 = quantize_groups(w, 10)
    for y, kept in [(int8_linear(x, codes, scale, bias), codes * scale[:, None]),
                    (int4_linear(x, pack_int4(c4), s4, b4, 10, bias), expand_groups(pack_int4(c4), b4, 30) * s4[:, None])]:
        weights = torch.randn_like(y)
        got = torch.autograd.grad((y * weights).sum(), (x, bias))
        want = torch.autograd.grad((F.linear(x, kept, bias) * weights).sum(), (x, bias))
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(got, want))
    with torch.no_grad():
        assert not int8_linear(x, codes, scale, bias).requires_grad
    assert int8_linear(x.detach(), codes, scale).requires_grad is False


def test_gradients_reach_bfloat16_activations():
    x = torch.randn(3, 30, dtype=torch.bfloat16, requires_grad=True)
    int8_linear(x, *quantize_rows(torch.randn(7, 30)), torch.zeros(7, requires_grad=True)).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.any()


def test_shapes_that_do_not_fit_are_named():
    codes, scale = quantize_rows(torch.randn(4, 8))
    for x in (torch.randn(2, 7), torch.tensor(1.0), torch.ones(2, 8, dtype=torch.int64)):
        with pytest.raises(KernelError, match=r"codes \[4, 8\]"):
            int8_linear(x, codes, scale)
    with pytest.raises(KernelError, match="Split the layer"):
        int8_linear(torch.zeros(1, 2**16 + 8), torch.zeros(1, 2**16 + 8, dtype=torch.int8), torch.ones(1))
    with pytest.raises(KernelError, match="does not divide"):
        quantize_groups(torch.randn(4, 8), 3)


# ---- processors ----

def test_the_float_path_of_other_processors_is_exact_too(monkeypatch):
    "What a processor without VNNI runs, at the largest sums and beyond one part of 1024 columns."
    monkeypatch.setattr(kernels, "_EXACT", False)
    full = torch.full((3, 5000), 127, dtype=torch.int8)
    mixed = torch.randint(-128, 128, (6, 5000)).to(torch.int8)
    for a, b in [(full, full), (-full, full), (mixed, mixed), (mixed[:, :1], full[:, :1]), (mixed[:0], full)]:
        got = kernels._int_mm(a, b)
        assert got.dtype == torch.int32 and torch.equal(got.long(), a.long() @ b.long().t())


def test_the_product_is_exact_for_every_small_shape_and_layout():
    "torch._int_mm alone returns garbage for a single column, for expanded rows, and, with AMX, for one row whose stride is below its width."
    for rows in (0, 1, 2, 17):
        for width in (1, 2, 7, 8, 65):
            for out in (1, 2, 8, 19):
                a, w = torch.randint(-127, 128, (rows, width)).to(torch.int8), torch.randint(-128, 128, (out, width)).to(torch.int8)
                for x in (a, a.t().contiguous().t(), torch.stack([a, a], -1)[..., 0], a[:1].expand(rows, width) if rows else a):
                    for v in (w, w.t().contiguous().t()):
                        assert torch.equal(kernels._int_mm(x, v).long(), x.long() @ v.long().t()), (rows, width, out)
                a, w = (m[:1].as_strided((min(1, len(m)), width), (0, 1)) for m in (a, w))
                assert torch.equal(kernels._int_mm(a, w).long(), a.long() @ w.long().t()), (rows, width, out)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_one_token_is_the_same_compiled_and_not_however_it_lies():
    codes, scale = kernels.quantize_rows(torch.randn(24, 16, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(16, generator=torch.Generator().manual_seed(2))
    wanted, compiled = int8_linear(x, codes, scale), torch.compile(int8_linear, dynamic=False)
    for token in (x.as_strided((1, 16), (0, 1)), x.as_strided((1, 1, 16), (0, 0, 1)), x[:, None].t(), torch.stack([x, x])[::2]):
        for linear in (int8_linear, compiled):
            torch.testing.assert_close(linear(token, codes, scale).flatten(), wanted)


def test_a_processor_whose_product_saturates_is_found_out():
    "oneDNN held to AVX2 adds in 16 bits; the import must notice, and the product stay exact."
    code = ("import torch, qtlm.kernels as k; a = torch.full((9, 640), 127, dtype=torch.int8);"
            "print(bool((k._int_mm(a, a) == 640 * 127 * 127).all()), k._EXACT, bool((torch._int_mm(a, a.t()) == 640 * 127 * 127).all()))")
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    exact, noticed, torch_exact = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.split()
    assert exact == "True" and noticed == torch_exact


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_kernels_give_the_same_bits():
    "Both layers in one graph, with a token that is not finite among the others."
    x, w, bias = torch.randn(6, 64), torch.randn(24, 64), torch.randn(24)
    x[2, 3] = float("inf")
    codes, scale = quantize_rows(w)
    c4, s4, b4 = quantize_groups(w, 16)
    packed = pack_int4(c4)

    given = {"input_scale": torch.tensor(0.02), "input_zero_point": torch.tensor(5, dtype=torch.int32)}

    def all_ways(x):
        return [layer(x, *stored, bias, **how) for how in ({}, given) for layer, stored in ((int8_linear, (codes, scale)), (int4_linear, (packed, s4, b4, 16)))]

    compiled = torch.compile(all_ways, fullgraph=True)
    for tokens in (x, x[:1], x.bfloat16()):
        for ours, eager in zip(compiled(tokens), all_ways(tokens)):
            assert torch.equal(ours.isnan(), eager.isnan()) and torch.equal(ours.nan_to_num(), eager.nan_to_num())
    assert all(torch.equal(alone[0], among[0]) for alone, among in zip(compiled(x[:1]), compiled(x)))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_one_graph_serves_any_number_of_tokens(monkeypatch):
    "Compiled with open shapes, above and below the size at which products are cut into blocks."
    monkeypatch.setattr(kernels, "_BLOCK", 4096)
    c4, s4, b4 = quantize_groups(torch.randn(90, 64), 16)
    packed = pack_int4(c4)
    compiled = torch.compile(lambda x: int4_linear(x, packed, s4, b4, 16), fullgraph=True, dynamic=True)
    for tokens in (5, 40, 90, 200):
        x = torch.randn(tokens, 64)
        assert torch.equal(compiled(x), int4_linear(x, packed, s4, b4, 16))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("dynamic", [False, True])
def test_large_results_take_the_place_of_those_that_nobody_holds(dynamic, monkeypatch):
    "Compiled: the same bits, and a result that somebody still sees, if only a part of it, is never written over."
    monkeypatch.setattr(kernels, "_LARGE", range(4 * 40 * 90, 2**28))
    monkeypatch.setattr(kernels, "_BLOCK", 2048)
    codes, scale = quantize_rows(torch.randn(90, 64))
    given = {"input_scale": torch.tensor(0.02), "input_zero_point": torch.tensor(5, dtype=torch.int32)}
    for how, dtype in (({}, torch.float32), (given, torch.float32), ({}, torch.bfloat16)):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, how=how: int8_linear(x, codes, scale, **how), fullgraph=True, dynamic=dynamic)
        batches = [torch.randn(tokens, 64).to(dtype) for tokens in (80, 80, 80, 90, 30)]
        results = [compiled(x) for x in batches]
        part, at = results[0][3:5].t().clone(), results[0].data_ptr()
        seen = results[0][3:5].t()
        results[0] = None
        again = compiled(batches[1])
        assert again.data_ptr() != at and torch.equal(seen, part)
        for x, y in zip(batches[1:], results[1:]):
            assert torch.equal(y, int8_linear(x, codes, scale, **how))
        del seen
        assert compiled(batches[0]).data_ptr() == at


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
def test_cuda_gives_the_same_integers(tokens):
    x, w = torch.randn(tokens, 44), torch.randn(21, 44)
    codes, scale = quantize_rows(w)
    assert torch.allclose(int8_linear(x.cuda(), codes.cuda(), scale.cuda()).cpu(), int8_linear(x, codes, scale), rtol=1e-6)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_freed_memory_is_kept_for_the_next_pass():
    "Forward passes of a quantized model soon ask the system for hardly a new page; without the one line that says so to glibc, for tens of thousands each time."
    code = """
import resource, sys, torch
empty = torch.empty
if sys.argv[1] == "without":
    torch.empty = lambda *size, **more: empty(0) if size == (2**25 - 2**16,) else empty(*size, **more)
import qtlm.kernels
torch.empty = empty
from qtlm import TinyLM, quantize_model_ptq
model = quantize_model_ptq(TinyLM(vocab_size=512, hidden_size=384, num_hidden_layers=4, num_attention_heads=6, intermediate_size=1024), inplace=True)
ids, asked = torch.zeros(8, 256, dtype=torch.int64), []
with torch.no_grad():
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        model(ids)
        asked.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(asked[-4:]) // 4)
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    pages = lambda how: int(subprocess.run([sys.executable, "-c", code, how], env=env, capture_output=True, text=True, check=True).stdout)
    assert 5 * pages("with") < pages("without")
