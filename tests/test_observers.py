# python -m pytest tests/test_observers.py
"""Contracts of `qtlm.observers`: ranges and grids are sane for every input, cuts are as good as brute force finds, state is bounded and safe."""
import copy
import itertools
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qtlm import observers
from qtlm.observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    Observer,
    ObserverError,
    PercentileObserver,
    make_observer,
)

NAMES = ["minmax", "moving_average", "percentile", "mse", "histogram"]
LEAST = {True: -127, False: -128}
each_kind = pytest.mark.parametrize(("name", "symmetric"), list(itertools.product(NAMES, [True, False])))
each_symmetry = pytest.mark.parametrize("symmetric", [True, False])


def gen(seed=0):
    "Return a generator."
    return torch.Generator().manual_seed(seed)


def watched(name, *batches, symmetric=False, **options):
    "Return an observer that has watched the batches."
    observer = make_observer(name, symmetric, **options)
    for batch in batches:
        observer(batch)
    return observer


def state(observer):
    "Return all that the observer knows, as plain values that can be compared."
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in vars(observer).items()}


def int8(x, scale, zero, symmetric):
    "Round to the grid and back, in float64."
    x, scale, zero = x.double(), scale.double(), zero.double()
    return (((x / scale).round() + zero).clamp(LEAST[symmetric], 127) - zero) * scale


def error(x, observer):
    "Squared error of `x` on the observer's grid."
    return (int8(x, *observer.qparams(), observer.symmetric) - x.double()).square().sum().item()


def tails(n=2**15):
    "Return activations of the kinds that models have, small enough for brute force."
    a, b = torch.randn(n, generator=gen(1)), torch.randn(n, generator=gen(2))
    return {
        "normal": a,
        "relu": F.relu(a),
        "negative": -F.relu(a),
        "gelu": F.gelu(3 * a),
        "swiglu": F.silu(2 * a) * 2 * b,
        "heavy": a * b.abs().clamp_min(0.02) ** -1,
        "log-normal": (1.5 * a).exp(),
        "one outlier": torch.cat([a, torch.tensor([300.0])]),
        "shifted": a + 20,
    }


# ---- every kind, any input ----

@given(
    name=st.sampled_from(NAMES), symmetric=st.booleans(), seed=st.integers(0, 2**31), shape=st.lists(st.integers(1, 40), max_size=3),
    size=st.integers(-44, 34), shift=st.sampled_from([0.0, -3.0, 3.0, 1e3]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
@settings(max_examples=80, deadline=None)
def test_any_activations_give_a_sane_grid(name, symmetric, seed, shape, size, shift, dtype):
    "low <= 0 <= high, a scale above 0 with a finite reciprocal, zero exactly representable, half a step of error inside the range."
    x = ((torch.randn(shape, generator=gen(seed), dtype=torch.float64) + shift) * 10.0**size).to(dtype)
    observer = watched(name, x, symmetric=symmetric)
    low, high = observer.range()
    scale, zero = observer.qparams()
    assert isinstance(low, float) and isinstance(high, float) and low <= 0 <= high and math.isfinite(high - low)
    assert scale.shape == zero.shape == () and scale.dtype == torch.float32 and zero.dtype == torch.int32
    assert 0 < scale and scale.isfinite() and (1 / scale).isfinite()
    assert zero == 0 if symmetric else -128 <= zero <= 127
    assert int8(torch.zeros(1), scale, zero, symmetric) == 0
    assert not symmetric or low == -high
    span = max(abs(low), abs(high)) / 127 if symmetric else (high - low) / 255
    assert scale.item() == pytest.approx(max(span, 2.0**-126) if high - low else 1.0, rel=1e-6)
    inside = torch.linspace(low, high, 999, dtype=torch.float64)
    assert (int8(inside, scale, zero, symmetric) - inside).abs().max() <= scale.item() * (0.5 + 2**-14)
    flat = x.float()
    extreme = max(-flat.min().item(), flat.max().item())
    slack = 1 + 1e-6
    assert -extreme * slack <= low and high <= extreme * slack  # never wider than what was seen
    assert observer.seen == x.numel()


@each_kind
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 5.0, 1e-45, -1e-45, 1e-38, 1e30, -1e30, 3.4e38])
def test_constants(name, symmetric, value):
    "A constant is covered, however large or small."
    observer = watched(name, torch.full((3, 5), value), symmetric=symmetric)
    scale, zero = observer.qparams()
    back = int8(torch.tensor(value), scale, zero, symmetric).item()
    nearly = scale.item() * 0.51 if name == "histogram" else abs(value) * 2**-20  # a histogram knows the value's bin
    assert abs(back - value) <= max(nearly, 2.0**-127)
    assert 0 < scale.item() < math.inf
    if value == 0:
        assert observer.range() == (0.0, 0.0) and scale == 1 and zero == 0
        assert math.copysign(1, observer.range()[0]) == math.copysign(1, observer.range()[1]) == 1


@each_kind
def test_one_sided_activations_use_all_codes(name, symmetric):
    "Nothing negative: an asymmetric range starts at 0 with zero point -128; nothing positive: it ends there with 127."
    relu = F.relu(torch.randn(5000, generator=gen()))
    up, down = watched(name, relu, symmetric=symmetric), watched(name, -relu, symmetric=symmetric)
    assert symmetric or (up.range()[0] == 0 and up.qparams()[1] == -128 and down.range()[1] == 0 and down.qparams()[1] == 127)
    assert up.range()[1] == -down.range()[0]


@each_kind
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_changes_nothing(name, symmetric, bad):
    "The observer knows the same before and after; also where nothing was seen yet."
    for observer in (make_observer(name, symmetric), watched(name, torch.randn(100, generator=gen()), symmetric=symmetric)):
        before = state(observer)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            with pytest.raises(ObserverError, match=r"found NaN or infinity in 1 of 3 activations; expected finite"):
                observer(torch.tensor([1e6, bad, 2.0], dtype=dtype))
        assert state(observer) == before


@each_kind
def test_what_is_no_float_tensor_is_refused(name, symmetric):
    "Integers (token ids!), complex numbers, booleans, lists."
    observer = make_observer(name, symmetric)
    for wrong, found in [(torch.tensor([1]), "int64"), (torch.tensor([True]), "bool"), (torch.tensor([1j]), "complex"), ([1.0], "list"), (None, "NoneType")]:
        with pytest.raises(ObserverError, match=f"{type(observer).__name__}: found .*{found}.*; expected a float tensor"):
            observer(wrong)
    with pytest.raises(ObserverError, match="expected finite"):
        observer(torch.tensor([1e300], dtype=torch.float64))  # too large for float32
    assert observer.seen == 0


@each_kind
def test_nothing_seen(name, symmetric):
    "A range cannot be asked for; an empty tensor is nothing."
    observer = watched(name, torch.zeros(0), torch.zeros(3, 0, 5), symmetric=symmetric)
    assert observer.seen == 0
    for ask in (observer.range, observer.qparams, observer.plot):
        with pytest.raises(ObserverError, match="found no activations; expected at least one. Run calibration data"):
            ask()
    observer(torch.ones(4))
    before = state(observer)
    observer(torch.zeros(0, 7))
    assert state(observer) == before


@each_kind
def test_same_data_same_bits(name, symmetric):
    "Two observers, a copy, and one that was pickled half way agree to the bit; a range asked for in between changes nothing."
    batches = list((torch.randn(20, 500, generator=gen()) ** 3).split(3))
    one, two = watched(name, *batches, symmetric=symmetric), make_observer(name, symmetric)
    for batch in batches:
        two = pickle.loads(pickle.dumps(two))
        two(batch)
        two.range()
    three = copy.deepcopy(one)
    assert one.range() == two.range() == three.range()
    assert state(one) == state(two) == state(three)
    three(torch.full((10,), 1e5))
    assert one.range() == two.range() and one.seen + 10 == three.seen  # a copy shares nothing


@pytest.mark.parametrize(("name", "symmetric"), list(itertools.product(["minmax", "percentile", "mse", "histogram"], [True, False])))
def test_batches_do_not_matter(name, symmetric):
    "However the values are split, the range is the same to the bit; where only counts are kept, in any order too."
    x = torch.randn(30_000, generator=gen()) * torch.exp(6 * torch.randn(30_000, generator=gen(1)))  # the window must move
    whole = watched(name, x, symmetric=symmetric)
    for size in (1013, 7000, 29_999):
        assert watched(name, *x.split(size), symmetric=symmetric).range() == whole.range()
    if name != "mse":
        assert watched(name, *x.sort()[0].split(999), symmetric=symmetric).range() == whole.range()


@each_kind
def test_types_shapes_and_layouts(name, symmetric):
    "The values count, not how they lie in memory."
    x = torch.randn(64, 48, generator=gen()).bfloat16()
    want = watched(name, x.float().flatten(), symmetric=symmetric).range()
    strided = torch.zeros(64, 96).bfloat16()
    strided[:, ::2] = x
    for same in (x, x.double(), x.float().requires_grad_() * 1, torch.nn.Parameter(x), x.view(4, 16, 48), strided[:, ::2]):
        assert watched(name, same, symmetric=symmetric).range() == want
    assert watched(name, torch.tensor(2.0), symmetric=symmetric).range()[1] == 2.0  # no dimension at all
    given_x = torch.randn(500, generator=gen())
    kept = given_x.clone()
    observer = watched(name, given_x, symmetric=symmetric)
    assert torch.equal(given_x, kept)
    was = observer.range()
    given_x.mul_(100)  # the observer holds no view of it
    observer(torch.zeros(1))
    assert name == "moving_average" or observer.range() == pytest.approx(was, rel=0.02)


@each_kind
def test_modes_of_the_caller(name, symmetric):
    "Inference mode, autocast, another default type or device: the same range, and tensors that can be used afterwards."
    x = torch.randn(4000, generator=gen()) ** 3
    want = watched(name, x, x + 1, symmetric=symmetric)
    with torch.inference_mode():
        inside = watched(name, x, symmetric=symmetric)
        assert not any(t.is_inference() for t in inside.qparams())
    inside(x + 1)
    assert inside.range() == want.range() and state(inside) == state(want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert watched(name, x, x + 1, symmetric=symmetric).range() == want.range()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        strange = watched(name, x, symmetric=symmetric)
        strange(torch.add(x, 1))
        strange = strange.range(), [(t.dtype, t.device.type) for t in strange.qparams()]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert strange == (want.range(), [(torch.float32, "cpu"), (torch.int32, "cpu")])
    before = torch.get_rng_state()
    watched(name, x, symmetric=symmetric).range()
    assert torch.equal(torch.get_rng_state(), before) and torch.is_grad_enabled()


@each_kind
def test_memory_is_bounded(name, symmetric):
    "What is kept does not grow with what was seen, even if values of all sizes are."
    observer, sizes = make_observer(name, symmetric), []
    for i in range(30):
        observer(torch.randn(20_000, generator=gen(i)) * torch.exp(20 * torch.randn(20_000, generator=gen(i + 100)).clamp(-4, 4)))
        sizes.append(len(pickle.dumps(observer)))
    assert max(sizes) < 2 * 2048 * 8 * (5 if name == "mse" else 1) + 3000
    assert observer.seen == 600_000 == observer._counts.sum()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@each_kind
def test_cuda(name, symmetric):
    "The device of the activations does not matter."
    x = torch.randn(64, 512, generator=gen()) ** 3
    assert watched(name, x.cuda(), symmetric=symmetric).range() == watched(name, x, symmetric=symmetric).range()
    assert all(t.device.type == "cpu" for t in watched(name, x.cuda()).qparams())


# ---- minmax and moving average, beside torch's ----

def torchs(kind, symmetric, **options):
    "Return torch's own observer of int8 activations."
    module = pytest.importorskip("torch.ao.quantization")
    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(module, kind)(dtype=torch.qint8, qscheme=scheme, quant_min=LEAST[symmetric], quant_max=127, **options)


@each_symmetry
@pytest.mark.parametrize("shift", [-30.0, -1.0, 0.0, 2.0, 30.0])
@pytest.mark.parametrize("kind", ["MinMaxObserver", "MovingAverageMinMaxObserver"])
def test_same_grid_as_torch(kind, shift, symmetric):
    "Scale within float32's rounding, zero point equal."
    ours = MinMaxObserver(symmetric) if kind == "MinMaxObserver" else MovingAverageObserver(symmetric)
    theirs = torchs(kind, symmetric)
    for batch in (torch.randn(40, 100, generator=gen()) + shift).split(4):
        ours(batch)
        theirs(batch)
    scale, zero = theirs.calculate_qparams()
    assert ours.qparams()[0].item() == pytest.approx(scale.item(), rel=1e-6) and ours.qparams()[1] == zero


def test_minmax_covers_all():
    "The range is that of the values, with 0."
    x = torch.randn(5, 77, generator=gen())
    assert watched("minmax", *x).range() == (x.min().item(), x.max().item())
    assert watched("minmax", *x, symmetric=True).range()[1] == x.abs().max()
    assert watched("minmax", x.abs() + 1).range()[0] == 0


def test_moving_average_of_batches():
    "The first batch is the start; each later one moves the average by its share."
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0]), torch.tensor([0.5, 10.0])]
    low, high = watched("moving_average", *batches).range()
    assert high == pytest.approx((2 * 0.99 + 1 * 0.01) * 0.99 + 10 * 0.01) and low == pytest.approx((-1 * 0.99 - 3 * 0.01) * 0.99 + 0.5 * 0.01)
    half = MovingAverageObserver(averaging_constant=0.5)
    for batch in batches:
        half(batch)
    assert half.range() == pytest.approx((-2 * 0.5 + 0.5 * 0.5, 1.5 * 0.5 + 10 * 0.5))
    for wrong in (0, -0.1, 1.1, math.nan):
        with pytest.raises(ObserverError, match="averaging_constant: found"):
            MovingAverageObserver(averaging_constant=wrong)


# ---- percentile ----

@each_symmetry
@pytest.mark.parametrize("percentile", [100, 99.999, 99.99, 99.9, 99, 75])
@pytest.mark.parametrize("kind", ["normal", "swiglu", "heavy", "relu", "one outlier"])
def test_percentile_cuts_what_it_may(kind, percentile, symmetric):
    "At most the allowed number of values is outside, and a cut one bin (a 64th) further in would leave out more."
    x = tails()[kind]
    observer = watched("percentile", *x.split(5000), symmetric=symmetric, percentile=percentile)
    low, high = observer.range()
    ends = [(x.abs(), high)] if symmetric else [(x, high), (-x, -low)]
    allowed = int(len(x) * (100 - percentile) / 100 + 1e-6) // len(ends)
    for side, cut in ends:
        assert (side > cut).sum() <= allowed
        assert cut == 0 or (side >= cut / (1 + 1 / 64)).sum() > allowed
    assert percentile < 100 or error(x, observer) == error(x, watched("minmax", x, symmetric=symmetric))


@each_symmetry
def test_percentile_of_few_and_of_sparse_values(symmetric):
    "Fewer values than the percentage resolves: nothing is cut. Nearly all are 0: what is not, survives."
    x = torch.randn(5000, generator=gen())
    assert watched("percentile", x, symmetric=symmetric).range() == watched("minmax", x, symmetric=symmetric).range()
    sparse = torch.zeros(500_000).index_fill(0, torch.arange(10), 7.0)
    assert watched("percentile", sparse, symmetric=symmetric).range()[1] == 7.0


@pytest.mark.parametrize("wrong", [0, -1, 100.1, math.nan, "99", None])
def test_percentile_out_of_range(wrong):
    "A percentage is above 0 and at most 100."
    for make in (lambda: PercentileObserver(percentile=wrong), lambda: make_observer("percentile", percentile=wrong)):
        with pytest.raises(ObserverError, match="percentile: found .*; expected a percentage above 0 and at most 100"):
            make()


# ---- least squared error ----

def brute_force(x, symmetric, per_octave=8, octaves=11):
    "Return the least squared error over a dense set of ranges, both ends on their own; sorted values and sums make it quick enough."
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    t = torch.cat([2.0 ** -(torch.arange(per_octave * octaves) / per_octave), torch.zeros(1)]).double()
    if symmetric:
        t = 2.0 ** -(torch.arange(0, 400) / 60).double()
        lows, highs = -max(-low, high) * t, max(-low, high) * t
    else:
        lows, highs = (ends.flatten() for ends in torch.meshgrid((low * t).unique(), (high * t).unique(), indexing="ij"))
    wide = highs > lows
    best = math.inf
    for a, b in zip(lows[wide].split(64), highs[wide].split(64)):
        scale = torch.maximum(-a, b) / 127 if symmetric else (b - a) / 255
        zero = torch.zeros_like(a) if symmetric else (-128 - a / scale).round().clamp(-128, 127)
        back = (((x / scale[:, None]).round() + zero[:, None]).clamp(LEAST[symmetric], 127) - zero[:, None]) * scale[:, None]
        best = min(best, (back - x).square().sum(1).min().item())
    return best


@each_symmetry
@pytest.mark.parametrize("kind", list(tails(2)))
def test_least_error_is_that_of_brute_force(kind, symmetric):
    "Both searches find a range whose error, on all values, is at most 2 or 3 % above the best of thousands."
    x = tails(2**11)[kind]
    best = brute_force(x.double(), symmetric)
    for name, most in (("mse", 1.02), ("histogram", 1.03)):
        assert error(x, watched(name, *x.split(700), symmetric=symmetric)) <= most * best, name


@each_symmetry
@pytest.mark.parametrize("kind", list(tails(2)))
def test_least_error_is_never_above_the_other_observers(kind, symmetric):
    "mse and histogram, on what they watched."
    x = tails(2**15)[kind]
    others = min(error(x, watched(name, *x.split(9999), symmetric=symmetric)) for name in NAMES[:3])
    for name in ("mse", "histogram"):
        assert error(x, watched(name, *x.split(9999), symmetric=symmetric)) <= 1.01 * others, name


@each_symmetry
@pytest.mark.parametrize("kind", list(tails(2)))
def test_histogram_is_at_least_as_good_as_torchs(kind, symmetric):
    "torch's HistogramObserver minimizes the same error over bins of equal width."
    x = tails(2**14)[kind]
    theirs = torchs("HistogramObserver", symmetric)
    for batch in x.split(2**12):
        theirs(batch)
    scale, zero = theirs.calculate_qparams()
    other = (int8(x, scale[0], zero[0], symmetric) - x.double()).square().sum().item()
    assert error(x, watched("histogram", *x.split(2**12), symmetric=symmetric)) <= 1.01 * other


def test_an_outlier_does_not_spoil_the_cut():
    "A value a million times too large to matter moves the range by what it is worth; the percentile does not move at all."
    x = torch.randn(200_000, generator=gen())
    spoiled = torch.cat([x, torch.tensor([1e6])])
    assert watched("minmax", spoiled).range()[1] == 1e6
    assert watched("percentile", spoiled, symmetric=True).range()[1] == pytest.approx(watched("percentile", x, symmetric=True).range()[1], rel=1 / 64)
    mild = torch.cat([x, torch.tensor([8.0])])
    assert watched("histogram", mild).range()[1] < 6 and watched("mse", mild).range()[1] < 6


def test_search_looks_far():
    "A range hundreds of times narrower than what was seen is found, also a lopsided one."
    for low, high in [(-1.0, 1.0), (-0.3, 3.0), (-7.0, 0.5)]:
        octaves = lambda s, z, low=low, high=high: ((128 + z) * s / -low).log2().abs() + ((127 - z) * s / high).log2().abs()
        assert observers._search(octaves, -3000.0, 1500.0, False) == pytest.approx((low, high), rel=0.03)


def test_mse_knows_values_that_repeat():
    "Nine of ten values are equal: the measured error knows a grid that meets them, the expected one does not."
    gains = []
    for equal in (0.3, 0.5, 0.7, 0.9, 1.1):
        x = torch.where(torch.rand(2**14, generator=gen()) < 0.9, equal, torch.randn(2**14, generator=gen(1)))
        gains.append(math.log10(error(x, watched("histogram", x)) / error(x, watched("mse", x))))
    assert sum(gains) / len(gains) > 0.05


def test_mse_keeps_eight_values_of_each_bin():
    "The first eight, real ones, and all of those in bins with fewer."
    x = torch.randn(20_000, generator=gen()) ** 3
    observer = watched("mse", *x.split(777))
    kept = observer._kept
    assert torch.isin(kept, x).all()
    held, seen = (torch.bincount(observers._bin_of(v), minlength=2**15).view(2, -1)[:, observer._start + 1 :] for v in (kept, x))
    assert torch.equal(held, seen.clamp_max(8))


@pytest.mark.parametrize("symmetric", [True, False])
def test_expected_error_is_that_of_values_spread_evenly(symmetric):
    "The closed form agrees with a fine sum, inside the range and outside, for grids of any width and zero point."
    counts, edges = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([0.0, 0.1, 0.35, 1.0, 6.0], dtype=torch.float64)
    counts[0], counts[1] = torch.tensor([5, 0, 30, 0]), torch.tensor([7, 40, 0, 2])
    expected = observers._expected_error(counts, edges, LEAST[symmetric])
    for low, high in [(-1.0, 6.0), (-0.01, 0.02), (-50.0, 50.0), (0.0, 3.0), (-2.0, 0.0)]:
        scale, zero = observers._grid(torch.tensor([low]).double(), torch.tensor([high]).double(), symmetric)
        total = 0.0
        for sign, row in zip((-1, 1), counts):
            for a, b, n in zip(edges, edges[1:], row):
                x = sign * (a + (b - a) * (torch.arange(100_000).double() + 0.5) / 100_000)
                total += n * (int8(x, scale[0], zero[0], symmetric) - x).square().mean()
        assert expected(scale, zero).item() == pytest.approx(total.item(), rel=1e-4)


# ---- names, pictures ----

def test_make_observer():
    "Five names; anything else is an error with the nearest one."
    kinds = [MinMaxObserver, MovingAverageObserver, PercentileObserver, MSEObserver, HistogramObserver]
    for name, kind in zip(NAMES, kinds):
        assert type(make_observer(name)) is kind and isinstance(make_observer(name), Observer)
        assert make_observer(name).symmetric is False and make_observer(name, symmetric=True).symmetric is True
    assert make_observer("percentile").percentile == 99.99 and make_observer("percentile", percentile=99.5).percentile == 99.5
    for wrong, near in [("hist", "histogram"), ("MinMax", "minmax"), ("moving-average", "moving_average"), ("mean", "m"), (None, ""), ("", "")]:
        with pytest.raises(ObserverError, match=f"observer: found .*; expected minmax, moving_average, percentile, mse, histogram. Did you mean '{near}") as caught:
            make_observer(wrong)
        assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)
    assert issubclass(ObserverError, ValueError)


@each_kind
def test_plot_shows_the_values_and_the_cut(name, symmetric):
    "All values are in the bars, and the lines stand at the cut; on the axes that were given."
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg", force=True)
    import matplotlib.pyplot as plt

    for x in (torch.randn(3000, generator=gen()) ** 3, torch.ones(5), torch.zeros(4), -torch.rand(100, generator=gen()), torch.tensor([1e30, -1e-30])):
        observer = watched(name, x, symmetric=symmetric)
        fig, ax = plt.subplots()
        assert observer.plot(ax) is ax
        bars = ax.patches[0].get_data()
        assert bars.values.sum() == pytest.approx(len(x)) and bars.edges[0] <= x.min() and bars.edges[-1] >= x.max() * (1 - 1e-6)
        assert tuple(line.get_xdata()[0] for line in ax.lines) == observer.range()
        if len(x) == 4:  # once is enough: it is slow
            fig.canvas.draw()
        assert ax.get_xlabel() and ax.get_ylabel() and ax.get_title()
        plt.close(fig)
    assert "nothing is cut off" in watched("minmax", torch.randn(50, generator=gen())).plot().get_title()
    plt.close("all")
