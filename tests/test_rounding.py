# python -m pytest tests/test_rounding.py
"""Contracts of `qtlm.rounding`: every rounding makes buffers that the kernels take, within bounds, the same each time; GPTQ solves the problem that it says."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtlm import rounding
from qtlm.kernels import int4_linear, int8_linear, quantize_groups, quantize_rows, unpack_int4
from qtlm.rounding import Hessian, RoundingError, float_weights, round_weights

DATA_FREE = ("nearest", "mse", "hqq")
ALL = (*DATA_FREE, "gptq")
SCHEMES = ((8, None), (4, -1), (4, 8))
small = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)


def normal(seed, *shape):
    "Return normal numbers, rows of very different size among them."
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) * torch.exp(2 * torch.randn(*shape[:-1], 1, generator=g))


def inputs(seed, count, width):
    "Return inputs whose features go together, some of them always zero."
    g = torch.Generator().manual_seed(seed)
    mix, lit = torch.randn(width, width, generator=g) / width**0.5, torch.rand(width, generator=g) > 0.1
    return (torch.randn(count, width, generator=g) @ mix + torch.randn(count, 1, generator=g)) * lit


def row_errors(w, made):
    "Return the squared error of each row in float64."
    return (float_weights(**made, width=w.shape[1]).double() - w.double()).square().sum(1)


def output_error(w, made, hessian):
    "Return the squared error of the outputs on the inputs that `hessian` has seen."
    d = float_weights(**made, width=w.shape[1]).double() - w.double()
    return (d @ hessian.matrix.double() * d).sum()


def check_buffers(made, shape, bits, size):
    "Assert dtype, shape, layout and range of what a rounding returned."
    rows, width = shape
    assert list(made) == ["codes", "scale"] + ["group_scale"] * (bits == 4)
    assert all(t.is_contiguous() and not t.requires_grad for t in made.values())
    assert made["scale"].dtype == torch.float32 and made["scale"].shape == (rows,) and (made["scale"] > 0).all() and made["scale"].isfinite().all()
    assert not (made["scale"].view(torch.int32) & 0x7F).any(), "more than 17 significant bits"
    if bits == 8:
        assert made["codes"].dtype == torch.int8 and made["codes"].shape == shape and (made["codes"] >= -127).all()
        return
    size = width if size == -1 else size
    assert made["codes"].dtype == made["group_scale"].dtype == torch.uint8
    assert made["codes"].shape == (rows, (width + 1) // 2) and made["group_scale"].shape == (rows, width // size)
    g, zero = ((made["group_scale"] & 15).int() + 1).repeat_interleave(size, 1), (made["group_scale"] >> 4).int().repeat_interleave(size, 1)
    steps = (unpack_int4(made["codes"], width).int() - zero) * g
    assert steps.min() >= -128 and steps.max() <= 127, "products do not fit an int8"


# ---- properties of all roundings ----

@small
@given(seeds, st.integers(1, 6), st.integers(1, 40), st.sampled_from(ALL), st.sampled_from((8, 4)), st.data())
def test_any_shape_gives_buffers_in_range(seed, rows, width, name, bits, data):
    "Odd widths, one row, one column, every divisor as a group."
    size = None if bits == 8 else data.draw(st.sampled_from([-1, *(n for n in range(1, width + 1) if width % n == 0)]))
    w = normal(seed, rows, width)
    before, hessian = w.clone(), Hessian(width).add(inputs(seed, 3 * width, width))
    made = round_weights(w, bits, size, name, hessian)
    check_buffers(made, (rows, width), bits, size)
    assert torch.equal(w, before), "the weights were changed"
    again = round_weights(w, bits, size, name, hessian)
    assert all(map(torch.equal, made.values(), again.values())), "not deterministic"
    # no error is larger than the row's range: at worst a weight is off by what the grid cannot reach
    if name in ("nearest", "mse"):
        step = w.abs().amax(1) * (1 / 127 if bits == 8 else 2 / 15) * 1.01
        bound = width * step.double() ** 2
        assert (row_errors(w, made) <= bound).all()


@small
@given(seeds, st.integers(1, 8), st.sampled_from((8, 24, 63, 128)), st.sampled_from(SCHEMES))
def test_least_squares_is_never_worse_than_nearest_in_any_row(seed, rows, width, scheme):
    bits, size = scheme
    size = -1 if size and width % 8 else size
    g = torch.Generator().manual_seed(seed)
    w = normal(seed, rows, width) * torch.rand(rows, width, generator=g) ** -0.5  # heavy tails
    nearest, mse = (row_errors(w, round_weights(w, bits, size, name)) for name in ("nearest", "mse"))
    assert (mse <= nearest * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bits, size", SCHEMES)
@pytest.mark.parametrize("magnitude", (0.0, 1e-44, 1e-38, 1e-20, 1e-6, 1e6, 1e20, 1e37))
def test_all_magnitudes_and_constant_rows(name, bits, size, magnitude):
    "Zeros stay zeros; a row's size changes no code; nothing overflows."
    base = normal(3, 5, 24)
    base[1], base[2], base[3] = 0, 1, -0.5  # zeros, and constant rows
    w, hessian = base * magnitude / base.abs().amax(1, keepdim=True).clamp_min(1e-9), Hessian(24).add(inputs(3, 100, 24))
    made = round_weights(w, bits, size, name, hessian)
    check_buffers(made, (5, 24), bits, size)
    out = float_weights(**made, width=24)
    assert out.isfinite().all() and not out[w.abs().amax(1) == 0].any()
    if magnitude >= 1e-30 and name != "gptq":
        assert (out - w).abs().amax() <= magnitude * (0.02 if bits == 8 else 0.3)
    if 1e-15 < magnitude < 1e15:
        other = round_weights(w * 2.0**20, bits, size, name, hessian)
        some = w.any(1)
        assert torch.equal(made["codes"], other["codes"]) and torch.equal(made["scale"][some] * 2.0**20, other["scale"][some])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bits, size", SCHEMES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_other_dtypes_and_layouts_give_what_float32_gives(name, bits, size, dtype):
    w, hessian = normal(4, 9, 24).to(dtype), Hessian(24).add(inputs(4, 99, 24))
    want = round_weights(w.float(), bits, size, name, hessian)
    strided = torch.empty(24, 9, dtype=dtype).copy_(w.t()).t()
    for form in (w, strided, w.clone().requires_grad_()):
        made = round_weights(form, bits, size, name, hessian)
        check_buffers(made, (9, 24), bits, size)
        assert all(map(torch.equal, made.values(), want.values()))


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize("bits, size", SCHEMES)
def test_rows_do_not_influence_one_another(name, bits, size):
    "A layer of several chunks is rounded as one row after another would be."
    w = normal(5, 300, 1024)
    made = round_weights(w, bits, size, name)
    for i in (0, 255, 256, 299):
        alone = round_weights(w[i : i + 1], bits, size, name)
        assert all(torch.equal(t[i : i + 1], one) for t, one in zip(made.values(), alone.values()))


@pytest.mark.parametrize("bits, size", SCHEMES)
def test_gptq_in_chunks_of_rows_is_gptq(bits, size, monkeypatch):
    "Up to the order of float sums in a product, which may round a tie the other way."
    w, hessian = normal(5, 40, 96), Hessian(96).add(inputs(5, 400, 96))
    whole = round_weights(w, bits, size, "gptq", hessian)
    monkeypatch.setitem(rounding._CHUNK, True, 7 * 96)
    parts = round_weights(w, bits, size, "gptq", hessian)
    check_buffers(parts, (40, 96), bits, size)
    assert (parts["codes"] != whole["codes"]).float().mean() < 0.01
    assert torch.isclose(output_error(w, parts, hessian), output_error(w, whole, hessian), rtol=0.02)


@pytest.mark.parametrize("name", ALL)
def test_no_rows_is_no_error(name):
    made = round_weights(torch.empty(0, 16), 4, 8, name, torch.eye(16))
    assert made["codes"].shape == (0, 8) and made["scale"].shape == (0,) and made["group_scale"].shape == (0, 2)


def test_nearest_is_the_kernels_rounding():
    w = normal(6, 700, 768)
    made = round_weights(w, 8)
    assert all(map(torch.equal, made.values(), quantize_rows(w)))
    made, (codes, scale, group_scale) = round_weights(w, 4, 64), quantize_groups(w, 64)
    assert torch.equal(unpack_int4(made["codes"], 768), codes) and torch.equal(made["scale"], scale) and torch.equal(made["group_scale"], group_scale)


@pytest.mark.parametrize("name", ("nearest", "mse"))
def test_rounding_int8_again_changes_nothing(name):
    w = normal(7, 40, 96) * torch.rand(40, 96, generator=torch.Generator().manual_seed(7)) ** -0.5
    once = float_weights(**round_weights(w, 8, rounding=name))
    for again in ("nearest", "mse"):
        assert torch.equal(float_weights(**round_weights(once, 8, rounding=again)), once)


@pytest.mark.parametrize("bits, size", SCHEMES)
@pytest.mark.parametrize("name", ALL)
def test_float_weights_are_what_the_kernels_multiply_by(name, bits, size):
    "One-hot inputs read the weights out of the integer product, to float32's last bits."
    w, hessian = normal(8, 6, 24), Hessian(24).add(inputs(8, 99, 24))
    made = round_weights(w, bits, size, name, hessian)
    eye = torch.eye(24) * 127  # a token's scale is then exactly 1
    out = int8_linear(eye, **made) if bits == 8 else int4_linear(eye, **made, group_size=size)
    exact = float_weights(**made, width=24)
    assert torch.equal(exact.double(), exact.double().float().double()) and torch.equal(out.t(), exact * 127)


# ---- GPTQ ----

def direct_gptq(w, step, first, last, h, order):
    "Round column by column in float64, inverting what is left of `h` each time."
    w, k, left = w.double().clone(), torch.zeros(w.shape).double(), list(order)
    while left:
        j = left[0]
        c = torch.linalg.inv(h[left][:, left])
        k[:, j] = torch.minimum(torch.maximum(torch.round(w[:, j] / step[:, j]), first[:, j]), last[:, j])
        w[:, left] -= torch.outer((w[:, j] - k[:, j] * step[:, j]) / c[0, 0], c[0])
        left.pop(0)
    return k


@small
@given(seeds, st.sampled_from((12, 30)), st.sampled_from((None, 3, 6, -1)), st.sampled_from((1, 5, 128)))
def test_gptq_is_the_direct_solution(seed, width, size, block):
    w = normal(seed, 5, width).double()
    size = width if size == -1 else size
    grid = rounding._squares_grid(w.float(), size)
    order, h, upper = rounding._factor(Hessian(width).add(inputs(seed, 60, width)).matrix.double())
    spread = [t.double().repeat_interleave(size or width, 1) for t in (grid.g * grid.scale[:, None], grid.first, grid.last)]
    back = order.argsort()
    want = direct_gptq(w, *spread, h[back][:, back], order.tolist())
    assert torch.equal(rounding._feedback(w, grid, order, upper, block), want)


@small
@given(seeds, st.sampled_from(SCHEMES), st.sampled_from((1, 7, 128)))
def test_descent_never_raises_the_error_and_ends_where_no_single_code_can_improve(seed, scheme, block):
    size = {None: None, -1: 24, 8: 8}[scheme[1]]
    w = normal(seed, 4, 24)
    grid = rounding._squares_grid(w, size)
    order, h, upper = rounding._factor(Hessian(24).add(inputs(seed, 60, 24)).matrix.double())
    back = order.argsort()
    damped, w = h[back][:, back], w.double()

    def cost(k):
        d = rounding._weights(k.unflatten(1, (grid.g.shape[1], -1)), grid).double() - w
        return (d @ damped * d).sum(1)

    k = rounding._feedback(w, grid, order, upper)
    start = least = cost(k)
    for _ in range(60):
        k, before = rounding._descend(w, k, grid, order, h, block), k
        assert (cost(k) <= least * (1 + 1e-9)).all()
        least = cost(k)
        if torch.equal(k, before):
            break
    else:
        pytest.fail("no end to it")
    assert (least <= start * (1 + 1e-9)).all()
    first, last = (t.double().repeat_interleave(size or 24, 1) for t in (grid.first, grid.last))
    for j in range(24):
        for move in (-1, 1):
            other = k.clone()
            other[:, j] = torch.minimum(torch.maximum(k[:, j] + move, first[:, j]), last[:, j])
            assert (cost(other) >= least * (1 - 1e-9)).all()


@pytest.mark.parametrize("bits, size", SCHEMES)
def test_gptq_beats_all_others_on_what_the_layer_sees(bits, size):
    w, hessian = normal(9, 64, 96), Hessian(96).add(inputs(9, 2000, 96))
    errors = {name: output_error(w, round_weights(w, bits, size, name, hessian), hessian) for name in ALL}
    assert errors["gptq"] < 0.75 * min(errors[name] for name in DATA_FREE)
    fresh = Hessian(96).add(inputs(9, 4000, 96)[2000:])  # inputs of the same kind that it has not seen
    errors = {name: output_error(w, round_weights(w, bits, size, name, hessian), fresh) for name in ALL}
    assert errors["gptq"] < 0.8 * min(errors[name] for name in DATA_FREE)


def test_columns_that_matter_most_are_rounded_first():
    "Ties keep the order of the layer; the damped matrix is the Hessian in that order, its mean diagonal 1."
    matrix = torch.diag(torch.tensor([2.0, 0.0, 5.0, 2.0, 1.0]))
    order, h, upper = rounding._factor(matrix)
    assert order.tolist() == [2, 0, 3, 4, 1]
    assert torch.allclose(h, matrix[order][:, order] / 2 + 0.01 * torch.eye(5)) and torch.allclose(upper.t() @ upper @ h, torch.eye(5), atol=1e-5)


def test_gptq_takes_a_matrix_of_any_size_of_numbers():
    "Only the shape of the Hessian counts, not its unit; a Hessian and its matrix are the same."
    w, hessian = normal(10, 8, 32), Hessian(32).add(inputs(10, 500, 32))
    want = round_weights(w, 4, 8, "gptq", hessian)
    for matrix in (hessian.matrix, hessian.matrix * 2.0**60, hessian.matrix * 2.0**-60, hessian.matrix.double()):
        made = round_weights(w, 4, 8, "gptq", matrix)
        assert all(map(torch.equal, made.values(), want.values()))


@pytest.mark.parametrize("seen", (0, 1, 5))
def test_gptq_with_few_inputs_or_none_that_differ_from_zero(seen):
    "A Hessian without full rank is damped; without any signal GPTQ is rounding to the nearest code."
    w, x = normal(11, 8, 32), torch.zeros(7, 32)
    x[:seen] = inputs(11, seen, 32) if seen else 0
    made = round_weights(w, 4, 8, "gptq", Hessian(32).add(x))
    check_buffers(made, (8, 32), 4, 8)
    if not seen:
        mse = round_weights(w, 4, 8, "mse")
        assert row_errors(w, made).sum() <= 1.02 * row_errors(w, mse).sum()


# ---- the Hessian ----

@small
@given(seeds, st.integers(1, 12), st.lists(st.integers(0, 20), min_size=1, max_size=4))
def test_hessian_is_the_sum_over_all_inputs_however_they_come(seed, width, counts):
    x = torch.randn(sum(counts), width, generator=torch.Generator().manual_seed(seed))
    whole, parts, merged = Hessian(width).add(x), Hessian(width), Hessian(width)
    for part in x.split(counts):
        parts.add(part[None])
        merged.merge(Hessian(width).add(part))
    exact = x.double().t() @ x.double()
    for h in (whole, parts, merged):
        assert h.count == len(x) and h.matrix.dtype == torch.float32
        assert torch.allclose(h.matrix.double(), exact, rtol=1e-5, atol=1e-4)


def test_hessian_takes_any_float_dtype_and_more_rows_than_a_chunk():
    x = inputs(12, 9000, 6)
    exact = x.double().t() @ x.double()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        given = x.to(dtype).requires_grad_()
        h = Hessian(6).add(given)
        assert h.count == 9000 and not h.matrix.requires_grad
        assert torch.allclose(h.matrix.double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=20 if dtype == torch.bfloat16 else 1e-1)


@pytest.mark.parametrize("bad, message", [
    (torch.ones(3, 5), r"found torch.float32 \[3, 5\]; expected float inputs \[..., 4\]"), (torch.ones(3, 4).int(), "torch.int32"),
    (torch.tensor([[1, 2, float("nan"), 0]]), "NaN"), (torch.tensor([[1, float("-inf"), 0, 0]]), "infinity"), (torch.full((2, 4), 1e20), "overflow"),
    (torch.cat([torch.ones(5000, 4), torch.full((1, 4), float("nan"))]), "NaN"), ([1.0], "found list"), (torch.tensor(1.0), r"\[\]"),
])  # fmt: skip
def test_what_hessian_refuses_leaves_it_as_it_was(bad, message):
    h = Hessian(4).add(torch.eye(4))
    with pytest.raises(RoundingError, match=message):
        h.add(bad)
    assert h.count == 4 and torch.equal(h.matrix, torch.eye(4))
    with pytest.raises(RoundingError, match="found width 3; expected 4"):
        h.merge(Hessian(3))


# ---- requests that cannot be met ----

@pytest.mark.parametrize("request_, message", [
    (dict(w=torch.ones(4)), r"float matrix"), (dict(w=torch.ones(4, 8).int()), r"found torch.int32 \[4, 8\]"), (dict(w=torch.ones(4, 0)), "float matrix"),
    (dict(w="w"), "found str"), (dict(bits=2), "bits: found 2"), (dict(bits=8, group_size=4), "8 without groups"),
    (dict(bits=4, group_size=3), "group_size: 3 does not divide the width 8"), (dict(bits=4, group_size=0), "group_size: 0"),
    (dict(bits=4, group_size=-2), "group_size: -2"), (dict(bits=4, group_size=4.0), "group_size: 4.0"), (dict(rounding="up"), "rounding: found 'up'"),
    (dict(rounding="gptq"), "gptq: found no hessian; .*calibration data"), (dict(rounding="gptq", hessian=Hessian(8)), "has seen no inputs"),
    (dict(rounding="gptq", hessian=torch.eye(7)), r"hessian: found \[7, 7\]"), (dict(rounding="gptq", hessian=[1]), "hessian: found list"),
    (dict(rounding="gptq", hessian=torch.eye(8) / 0), "not finite"), (dict(rounding="gptq", hessian=torch.ones(8, 8) * 60 - torch.eye(8) * 50), "semidefinite"),
])  # fmt: skip
def test_a_request_that_cannot_be_met_says_why_in_one_line(request_, message):
    with pytest.raises(RoundingError, match=message) as error:
        round_weights(**{"w": torch.ones(4, 8), "bits": 8, **request_})
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bits, size", SCHEMES)
@pytest.mark.parametrize("bad", (float("nan"), float("inf"), float("-inf")))
def test_weights_that_are_not_finite_are_refused_by_the_channel_they_are_in(name, bits, size, bad):
    w = torch.ones(600, 512)
    w[590, 3] = bad
    with pytest.raises(RoundingError, match=r"channel 590: found NaN or infinity \(in 1 of 600 channels\)"):
        round_weights(w, bits, size, name, torch.eye(512))


# ---- HQQ ----

def test_hqq_lowers_the_sum_that_it_is_about():
    for bits, size in SCHEMES:
        w = torch.distributions.StudentT(3.0).sample((32, 128)) if bits else None
        lp = {name: (float_weights(**round_weights(w, bits, size, name), width=128) - w).abs().pow(0.7).sum(1) for name in ("nearest", "hqq")}
        assert (lp["hqq"] <= lp["nearest"] * (1 + 1e-5)).all() and lp["hqq"].sum() < lp["nearest"].sum()


def test_shrinkage_is_hqqs_own():
    hqq = pytest.importorskip("hqq.core.optimize")
    error = torch.linspace(-3, 3, 1001)
    for beta in (1.0, 10.0, 50.0):
        assert torch.allclose(rounding._shrink(error, beta, 0.7), hqq.shrink_lp_op(error, beta, 0.7), atol=1e-6)


def test_shrinkage_against_plain_python():
    for e in (-2.0, -0.3, -0.1, 0.0, 0.05, 0.2, 1.0, 7.0):
        want = 0.0 if e == 0 else (1 if e > 0 else -1) * max(abs(e) - abs(e) ** (0.7 - 1) / 10, 0)
        assert rounding._shrink(torch.tensor(e, dtype=torch.float64), 10.0, 0.7).item() == pytest.approx(want, abs=1e-12)


def test_hqq_is_as_good_as_the_library_in_fewer_bits():
    quantize = pytest.importorskip("hqq.core.quantize")
    w = torch.distributions.StudentT(5.0).sample((128, 256))
    packed, meta = quantize.Quantizer.quantize(w, nbits=4, group_size=64, axis=1, compute_dtype=torch.float32, device="cpu")
    theirs = (quantize.Quantizer.dequantize(packed, meta).float() - w).abs().pow(0.7).sum()
    ours = (float_weights(**round_weights(w, 4, 64, "hqq"), width=256) - w).abs().pow(0.7).sum()
    assert ours < 1.05 * theirs  # theirs: two 16-bit floats a group, ours: one byte
