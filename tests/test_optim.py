# python -m pytest tests/test_optim.py
"""The optimizer of quantized weights: exact where nothing is asked, unbiased where something is, never out of range, resumed to the bit."""
import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qtlm.finetuning import disable_finetuning_, enable_finetuning_, trainable_tensors, zero_gradients_
from qtlm.kernels import unpack_int4
from qtlm.model import TinyLM
from qtlm.optim import OptimizerError, QuantizedAdamW, configure_optimizer
from qtlm.quantization import quantize_model_ptq
from qtlm.step import clip_gradients_

each_bits = pytest.mark.parametrize("bits", [8, 4])


def tiny(**changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, block_size=16)
    return TinyLM(**{**shape, **changes})


def ids(seed=0):
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(seed))


def quantized(bits=8, what="weights", **changes):
    return enable_finetuning_(quantize_model_ptq(tiny(**changes), bits=bits), what)


def backward(model, seed=0):
    zero_gradients_(model)
    x = ids(seed)
    loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    loss.backward()
    return loss.item()


def run(model, optimizer, steps, first=0):
    for n in range(first, first + steps):
        backward(model, n)
        optimizer.step()


def frozen_state(model, optimizer):
    "All tensors of a model and its optimizer, as copies, by name."
    tensors = {f"model {n}": t.clone() for n, t in model.state_dict().items()}
    for i, s in optimizer.state_dict()["state"].items():
        tensors |= {f"{i} {n}": t.clone() for n, t in s.items()}
    return tensors


def equal(a, b, but=()):
    "The names under which two sets of tensors differ."
    assert a.keys() == b.keys()
    return {n for n in a if not torch.equal(a[n], b[n]) and not any(word in n for word in but)} == set()


def one_layer(w, bits=8, group_size=None):
    "A model of one linear layer with these weights, rounded to nearest."
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight.data = w.clone()
    options = {"group_size": group_size} if bits == 4 else {}
    return enable_finetuning_(quantize_model_ptq(nn.Sequential(linear), bits=bits, rounding="nearest", **options))


def check_codes(layer):
    "Whether codes are in range, and scales positive and finite and as short as those of `quantize_rows`."
    s = layer.scale
    assert s.isfinite().all() and (s > 0).all() and not (s.view(torch.int32) & 0x7F).any()
    if layer.bits == 8:
        assert layer.codes.amin() >= -127
        return
    u = unpack_int4(layer.codes, layer.shape[1]).int().unflatten(1, (layer.group_scale.shape[1], -1))
    v = (u - (layer.group_scale >> 4).int()[..., None]) * ((layer.group_scale & 15).int() + 1)[..., None]
    assert v.amin() >= -128 and v.amax() <= 127


def place_of(layer, optimizer):
    "Where the weights are: what the codes stand for, and what is kept of each beside it; and the length of a code."
    length = layer.scale[:, None] if layer.bits == 8 else layer.scale[:, None] * ((layer.group_scale & 15).float() + 1).repeat_interleave(layer.shape[1] // layer.group_scale.shape[1], 1)
    return layer.dequantize() + optimizer.state[layer.stand_in]["residual"] / 128 * length, length


# ---- laws ----

@each_bits
def test_zero_gradients_without_decay_change_nothing(bits):
    model = quantized(bits)
    optimizer = QuantizedAdamW(model, weight_decay=0.0)
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        for _, t in trainable_tensors(model):
            t.grad = torch.zeros(t.shape)
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(value.any() for s in optimizer.state.values() for name, value in s.items() if name not in ("step", "threshold"))


@pytest.mark.parametrize("bits, size", [(8, None), (4, 16), (4, -1)])
def test_rows_without_gradients_are_not_disturbed_by_those_with(bits, size):
    torch.manual_seed(0)
    model = one_layer(torch.randn(16, 48), bits, size)
    optimizer, layer = QuantizedAdamW(model, lr=0.1, weight_decay=0.0), model[0]
    before = layer.dequantize()
    layer.stand_in.grad = torch.randn(16, 48)
    layer.stand_in.grad[::2] = 0
    optimizer.step()
    after = layer.dequantize()
    assert torch.equal(after[::2], before[::2]) and not torch.equal(after[1::2], before[1::2])


@each_bits
def test_weights_that_got_no_update_keep_their_values_while_their_row_is_not_regridded(bits):
    torch.manual_seed(0)
    model = one_layer(torch.randn(8, 64), bits, 32)
    layer, before = model[0], model[0].dequantize()
    optimizer = QuantizedAdamW(model, lr=1e-4, weight_decay=0.0)
    layer.stand_in.grad = torch.zeros(8, 64)
    layer.stand_in.grad[:, ::2] = before[:, ::2]  # towards zero: nothing overflows
    optimizer.step()
    assert torch.equal(layer.dequantize()[:, 1::2], before[:, 1::2])
    assert not optimizer.state[layer.stand_in]["residual"][:, 1::2].any()


@each_bits
def test_without_gradients_nothing_is_disturbed_wherever_weights_are(bits):
    "Also after a hundred steps, with residuals of all sizes: once the moments are gone, gradients of zero change no bit."
    torch.manual_seed(0)
    model = one_layer(torch.randn(32, 64), bits, 16)
    optimizer, layer = QuantizedAdamW(model, lr=3e-3, weight_decay=0.01), model[0]
    for _ in range(100):
        layer.stand_in.grad = torch.randn(32, 64)
        optimizer.step()
    state = optimizer.state[layer.stand_in]
    assert state["residual"].unique().numel() > 100
    for name in ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"):
        state[name].zero_()
    optimizer.param_groups[0]["weight_decay"], layer.stand_in.grad = 0.0, torch.zeros(32, 64)
    before = copy.deepcopy((layer.state_dict(), state))
    for _ in range(3):
        optimizer.step()
    assert all(torch.equal(value, before[0][name]) for name, value in layer.state_dict().items())
    assert all(torch.equal(value, before[1][name]) for name, value in state.items() if name != "step")


@pytest.mark.parametrize("lr", [1e-3, 0.05, 1.0])
@pytest.mark.parametrize("bits, size", [(8, None), (4, 16), (4, -1)])
def test_rounding_is_unbiased_also_where_scales_change(bits, size, lr):
    "The mean over seeds is the float step, within five standard errors of what rounding alone explains, and on average far closer."
    torch.manual_seed(1)
    start, grad = one_layer(torch.randn(8, 32), bits, size), torch.randn(8, 32)
    w = start[0].dequantize()
    target = w * (1 - lr * 0.1) - lr * grad / (grad.abs() + 1e-8)
    seeds, total, squares = 600, torch.zeros(8, 32, dtype=torch.float64), torch.zeros(8, 32, dtype=torch.float64)
    for seed in range(seeds):
        model = copy.deepcopy(start)
        model[0].stand_in.grad = grad.clone()
        QuantizedAdamW(model, lr=lr, weight_decay=0.1, seed=seed).step()
        check_codes(model[0])
        error = model[0].dequantize().double() - target
        total, squares = total + error, squares + error**2
    mean, deviation, step = total / seeds, (squares / seeds).sqrt(), error.abs().max()
    z = mean / (deviation / math.sqrt(seeds) + 2 * step / seeds)  # the last term: what happens so seldom that no seed may have seen it
    assert deviation.max() > 0 and z.abs().max() < 5 and abs(z.mean()) * math.sqrt(z.numel()) < 5


def test_scales_only_training_rounds_without_bias_and_changes_no_code():
    torch.manual_seed(0)
    model = enable_finetuning_(quantize_model_ptq(nn.Sequential(nn.Linear(16, 300, bias=False))), "scales")
    codes, before, lr = model[0].codes.clone(), model[0].scale.clone(), 1e-6  # an eighth of what 17 bits resolve
    model[0].stand_in.grad = torch.ones(300)
    mean = torch.zeros(300, dtype=torch.float64)
    for seed in range(100):
        model[0].scale.copy_(before)
        QuantizedAdamW(model, lr=lr, seed=seed).step()
        mean += (model[0].scale.double() / before.double() - 1) / 100
    assert torch.equal(model[0].codes, codes) and not torch.equal(model[0].scale, before)
    assert abs(mean.mean() / -lr - 1) < 0.1
    assert not (model[0].scale.view(torch.int32) & 0x7F).any()


@each_bits
def test_the_same_seed_gives_the_same_codes_and_another_seed_others(bits):
    ends = []
    for seed in (0, 0, 1):
        model = quantized(bits)
        torch.manual_seed(len(ends))  # the global generator has no say
        optimizer = configure_optimizer(model, 1e-2, seed=seed)
        run(model, optimizer, 3)
        ends.append(frozen_state(model, optimizer))
    assert equal(ends[0], ends[1]) and not equal(ends[0], ends[2])
    state = torch.get_rng_state()
    run(model, optimizer, 1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_to_nearest_learns_nothing(bits):
    ends = {}
    for stochastic in (True, False):
        model = quantized(bits, initializer_range=0.2)
        codes = {n: b.clone() for n, b in model.named_buffers() if n.endswith("codes")}
        optimizer = QuantizedAdamW(model, lr=5e-4, weight_decay=0.0, stochastic_rounding=stochastic)
        for p in model.parameters():
            p.requires_grad_(False)
        for _ in range(60):
            loss = backward(model)
            optimizer.step()
        moved = sum((b != codes[n]).sum().item() for n, b in model.named_buffers() if n.endswith("codes"))
        ends[stochastic] = loss, moved
    assert ends[True][0] < 1 < ends[False][0] and ends[True][1] > ends[False][1]


@each_bits
@pytest.mark.parametrize("lr", [1e-4, 1e-3])
def test_codes_follow_the_float_path_on_average_at_every_step(bits, lr):
    "The mean over seeds of a run's codes is the path that the gradients ask for, not only after its first step."
    torch.manual_seed(0)
    start = one_layer(torch.randn(8, 64), bits, 32)
    w, seeds = start[0].dequantize(), 200
    total, length = torch.zeros(6, 8, 64), None
    for seed in range(seeds):
        model = copy.deepcopy(start)
        optimizer = QuantizedAdamW(model, lr=lr, weight_decay=0.0, seed=seed)
        for n in range(60):
            model[0].stand_in.grad = w.sign()  # towards zero, by `lr` a step
            optimizer.step()
            if n % 10 == 9:
                total[n // 10] += model[0].dequantize() / seeds
    length = place_of(model[0], optimizer)[1].amax()
    inner = w.abs() > 0.2  # those that don't reach zero
    for n in range(6):
        error = (total[n] - (w - (10 * n + 10) * lr * w.sign()))[inner] / length
        assert abs(error.mean()) < 0.01 and error.abs().max() < 5 * 0.5 / seeds**0.5


@each_bits
def test_what_rounding_takes_away_is_kept(bits):
    "Errors do not add up: after many short steps each weight is where the float path is, and its code less than two codes away."
    torch.manual_seed(0)
    model = one_layer(torch.randn(64, 64), bits, 32)
    layer, w = model[0], model[0].dequantize()
    optimizer = QuantizedAdamW(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for n in range(1, 401):
        layer.stand_in.grad = w.sign()  # towards zero, by 0.001 a step, as constant gradients make it
        optimizer.step()
        if n in (40, 400):
            inner, (place, length) = w.abs() > 0.5, place_of(layer, optimizer)
            path = w - n * 1e-3 * w.sign()
            assert ((place - path) / length)[inner].std() < (0.2 if bits == 8 else 0.1)
            assert ((layer.dequantize() - path) / length)[inner].std() < 0.5
            assert ((layer.dequantize() - place) / length).abs().max() < 1


def test_states_without_residuals_are_taken(tmp_path):
    "As they were saved before there were any: the next step begins with none."
    model = quantized(4)
    optimizer = configure_optimizer(model, 1e-2)
    run(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        if state.pop("residual", None) is not None:
            del state["threshold"]
            state["lr"] = torch.zeros((), dtype=torch.float64)
    other = configure_optimizer(model, 1e-2)
    other.load_state_dict(saved)
    run(model, other, 2, first=2)
    assert all("residual" in other.state[t] for _, t in trainable_tensors(model) if t.dim() == 2)


# ---- ranges, for ever ----

@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from([8, 4]), rows=st.integers(1, 5), groups=st.integers(1, 3), size=st.sampled_from([2, 3, 8, 16]), lr=st.sampled_from([1e-6, 1e-3, 0.3, 10.0, 1e6]),
       spread=st.sampled_from([1e-30, 1e-6, 1.0, 1e10]), gradient=st.sampled_from([1e-30, 1e-8, 1.0, 1e15]), zeros=st.booleans(), seed=st.integers(0, 99))
def test_codes_and_scales_stay_in_range_whatever_comes(bits, rows, groups, size, lr, spread, gradient, zeros, seed):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, groups * size, generator=g) * spread
    if zeros:
        w[0] = 0
    model = one_layer(w, bits, size)
    optimizer = QuantizedAdamW(model, lr=lr, weight_decay=min(0.1, 1 / lr), seed=seed)
    for _ in range(8):
        model[0].stand_in.grad = torch.randn(rows, groups * size, generator=g) * gradient
        optimizer.step()
        check_codes(model[0])
    assert model[0].dequantize().isfinite().all()
    assert all(t.isfinite().all() for s in optimizer.state.values() for t in s.values())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_of_zeros_learns_at_the_size_of_its_steps(bits):
    "Its scale is 1, whatever its weights may become; a step of 0.001 must not become a weight of 1."
    model = one_layer(torch.zeros(4, 32), bits, 16)
    optimizer = QuantizedAdamW(model, lr=1e-3, weight_decay=0.0)
    for _ in range(20):
        model[0].stand_in.grad = torch.ones(4, 32)
        optimizer.step()
    assert torch.allclose(model[0].dequantize(), torch.full((4, 32), -0.02), rtol=0.05 if bits == 8 else 0.25)  # 4 bits: a code is a fifteenth of the range


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_sink_again_where_that_is_exact(bits):
    torch.manual_seed(0)
    model = one_layer(torch.randn(4, 32), bits, 16)
    layer, optimizer = model[0], QuantizedAdamW(model, lr=0.05, weight_decay=0.0)
    step = lambda: layer.scale.clone() if bits == 8 else (layer.scale[:, None] * ((layer.group_scale & 15) + 1)).clone()
    before = step()
    for _ in range(300):
        layer.stand_in.grad = layer.dequantize()
        optimizer.step()
    assert (step() <= before / 2).float().mean() > 0.5


@each_bits
def test_size_stays_and_the_file_is_no_larger(bits):
    model = quantized(bits)
    optimizer = configure_optimizer(model, 3e-2)
    before = {n: (b.dtype, b.shape, b.data_ptr()) for n, b in model.named_buffers()}
    run(model, optimizer, 40)
    assert {n: (b.dtype, b.shape, b.data_ptr()) for n, b in model.named_buffers()} == before
    for m in model.modules():
        if hasattr(m, "codes"):
            check_codes(m)


@pytest.mark.parametrize("bits, most", [(8, 0.30), (4, 0.25)])
def test_lasting_memory(bits, most):
    model = quantized(bits, vocab_size=500, hidden_size=128)
    optimizer = configure_optimizer(model, 1e-3)
    run(model, optimizer, 1)
    optimizer.zero_grad()
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values()
    held = sum(t.nbytes for t in tensors) + sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    assert held <= most * 16 * tiny(vocab_size=500, hidden_size=128).num_parameters()
    assert all(t.grad is None for _, t in trainable_tensors(model))


# ---- as AdamW ----

@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.5), (0.95, 0.8), (0.0, 0.0)])
def test_the_first_steps_follow_torch_within_rounding(betas):
    "On a grid fine enough to see it: 8-bit codes of a row whose largest weight is small beside the steps."
    torch.manual_seed(0)
    w = torch.zeros(4, 64)
    model, p = one_layer(w), nn.Parameter(w.clone())
    mine = QuantizedAdamW(model, lr=0.01, betas=betas, weight_decay=0.0)
    theirs = torch.optim.AdamW([p], lr=0.01, betas=betas, weight_decay=0.0)
    for _ in range(5):
        g = torch.randn(4, 64) * 1e-3
        model[0].stand_in.grad, p.grad = g, g.clone()
        mine.step()
        theirs.step()
    assert (model[0].dequantize() - p).norm() < 0.06 * p.norm()


def test_float_parameters_are_stepped_as_by_torch():
    torch.manual_seed(0)
    model = enable_finetuning_(quantize_model_ptq(tiny(), skip_modules=["*gate_proj"]))
    names = [n for n, _ in model.named_parameters()]
    twins = {n: nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    theirs = torch.optim.AdamW([{"params": [p for p in twins.values() if p.ndim >= 2]}, {"params": [p for p in twins.values() if p.ndim < 2], "weight_decay": 0.0}],
                               lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    mine = configure_optimizer(model, 1e-2, 0.1)
    for n in range(4):
        backward(model, n)
        for name, p in model.named_parameters():
            twins[name].grad = p.grad.clone()
        mine.step()
        theirs.step()
    assert len(names) == 4 and all(torch.equal(p, twins[n]) for n, p in model.named_parameters())


def test_groups_names_and_decay():
    model = quantized()
    decayed, kept = configure_optimizer(model, weight_decay=0.3).param_groups
    assert decayed["weight_decay"] == 0.3 and kept["weight_decay"] == 0.0
    assert all(t.ndim == 2 for t in decayed["params"]) and all(t.ndim == 1 for t in kept["params"])
    assert sorted(decayed["param_names"] + kept["param_names"]) == sorted(n for n, _ in trainable_tensors(model))
    scales, = configure_optimizer(quantized(what="scales"), weight_decay=0.3).param_groups
    assert scales["weight_decay"] == 0.0 and "model.embed_tokens.scale" in scales["param_names"]


def test_schedulers_set_the_rate():
    model = quantized()
    optimizer = configure_optimizer(model, 0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.0 if n == 0 else 1.0)
    before = model.lm_head.dequantize()
    run(model, optimizer, 1)
    assert torch.equal(model.lm_head.dequantize(), before)
    scheduler.step()
    run(model, optimizer, 1)
    assert not torch.equal(model.lm_head.dequantize(), before)


@each_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_learns(bits, dtype):
    model = quantized(bits).to(dtype)
    optimizer = configure_optimizer(model, 1e-2, 0.0)
    first = backward(model)
    for _ in range(40):
        backward(model)
        assert clip_gradients_(model, 1.0) > 0
        optimizer.step()
    assert backward(model) < first / 4


# ---- down and up again ----

@each_bits
@pytest.mark.parametrize("what", ["weights", "scales"])
def test_a_resumed_run_is_the_same_run(bits, what):
    model = quantized(bits, what)
    optimizer = configure_optimizer(model, 1e-2)
    run(model, optimizer, 2)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run(model, optimizer, 2, first=2)
    expected = frozen_state(model, optimizer)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = quantized(bits, what)
    other = configure_optimizer(again, 3e-4, seed=5)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert [g["lr"] for g in other.param_groups] == [1e-2, 1e-2][: len(other.param_groups)]
    run(again, other, 2, first=2)
    assert equal(frozen_state(again, other), expected)
    assert not equal(frozen_state(again, other), {n: t + 1 for n, t in expected.items()})


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_copy_goes_on_as_the_original_does(copier, in_backward):
    model = quantized()
    optimizer = configure_optimizer(model, 1e-2, gradients_in_backward=in_backward)
    run(model, optimizer, 1)
    twin, other = copier((model, optimizer))
    run(model, optimizer, 2, first=1)
    run(twin, other, 2, first=1)
    assert equal(frozen_state(model, optimizer), frozen_state(twin, other))


def test_a_saved_state_is_not_changed_by_what_follows():
    model = quantized()
    optimizer = configure_optimizer(model, 1e-2)
    run(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    kept = {(i, n): t.clone() for i, s in saved["state"].items() for n, t in s.items()}
    run(model, optimizer, 1)
    assert all(torch.equal(saved["state"][i][n], t) for (i, n), t in kept.items())


def test_states_of_others_are_refused_and_change_nothing():
    model = quantized()
    optimizer = configure_optimizer(model, 1e-2)
    run(model, optimizer, 1)
    before = frozen_state(model, optimizer)
    smaller = quantized(vocab_size=40)
    run_once = configure_optimizer(smaller, 1e-2)
    zero_gradients_(smaller)
    smaller(ids() % 40).square().sum().backward()
    run_once.step()
    float_model = tiny()
    broken = copy.deepcopy(optimizer.state_dict())
    next(s for s in broken["state"].values() if s["exp_avg"].dtype == torch.int8)["exp_avg_sq"] = torch.zeros(1)
    short, half = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    kept = next(s for s in short["state"].values() if "threshold" in s)
    kept["threshold"] = kept["threshold"][:3]
    del next(s for s in half["state"].values() if "threshold" in s)["threshold"]
    wrong = [short, half, torch.optim.AdamW(float_model.parameters()).state_dict(), run_once.state_dict(), configure_optimizer(quantized(num_hidden_layers=2)).state_dict(), {}, None, broken]
    for state in wrong:
        with pytest.raises(OptimizerError, match="load_state_dict: found"):
            optimizer.load_state_dict(state)
        assert equal(frozen_state(model, optimizer), before)


# ---- whole or not at all ----

@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e25])
@each_bits
def test_a_gradient_that_is_not_finite_changes_nothing(bits, value):
    model = quantized(bits)
    optimizer = configure_optimizer(model, 1e-2)
    run(model, optimizer, 1)
    before, generator = frozen_state(model, optimizer), optimizer.state_dict()["rounding"]["generators"]["cpu"].clone()
    backward(model)
    list(trainable_tensors(model))[-1][1].grad[0, 0] = value
    with pytest.raises(FloatingPointError, match="the gradient of model.layers.0.mlp.down_proj.weight is not finite"):
        optimizer.step()
    assert equal(frozen_state(model, optimizer), before)
    assert torch.equal(optimizer.state_dict()["rounding"]["generators"]["cpu"], generator)


def test_clipping_sees_and_names_stand_ins():
    model = quantized()
    backward(model)
    total = math.sqrt(sum(t.grad.square().sum().item() for _, t in trainable_tensors(model)))
    assert math.isclose(clip_gradients_(model, total / 2), total, rel_tol=1e-5)
    assert math.isclose(clip_gradients_(model, None), total / 2, rel_tol=1e-5)
    model.lm_head.stand_in.grad[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="the gradient of model.embed_tokens.weight"):
        clip_gradients_(model, 1.0)


def test_what_cannot_be_stepped_is_refused():
    plain = quantize_model_ptq(tiny())
    with pytest.raises(OptimizerError, match="model.embed_tokens is quantized.*Call enable_finetuning_"):
        configure_optimizer(plain)
    disable_finetuning_(model := quantized())
    with pytest.raises(OptimizerError, match="is quantized"):
        configure_optimizer(model)
    frozen = quantize_model_ptq(tiny().requires_grad_(False))
    frozen.model.norm.requires_grad_(True)
    assert type(configure_optimizer(frozen)) is torch.optim.AdamW
    sparse = enable_finetuning_(quantize_model_ptq(nn.Sequential(nn.Embedding(9, 16, sparse=True))))
    with pytest.raises(OptimizerError, match="0 makes sparse gradients"):
        configure_optimizer(sparse)
    for bad in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}, {"weight_decay": -0.1}, {"lr": math.nan}):
        with pytest.raises(OptimizerError, match=next(iter(bad))):
            QuantizedAdamW(quantized(), **bad)


# ---- gradients in backward ----

@each_bits
@pytest.mark.parametrize("what", ["weights", "scales"])
def test_stepping_in_backward_is_stepping_after_it(bits, what):
    "Codes are rounded in another order, so with other random numbers; with rounding to nearest both are the same."
    ends = []
    for in_backward in (False, True):
        model = quantized(bits, what)
        optimizer = QuantizedAdamW(model, 1e-2, gradients_in_backward=in_backward, stochastic_rounding=False)
        backward(model)
        assert all((t.grad is None) == in_backward for _, t in trainable_tensors(model))
        optimizer.step()
        ends.append({n: t.clone() for n, t in model.state_dict().items()})
    assert equal(*ends)


def test_one_gradient_at_a_time():
    model, alive, most = quantized(), set(), 0
    optimizer = configure_optimizer(model, 1e-2, gradients_in_backward=True)
    step = optimizer._step_one

    def counted(group, p):
        nonlocal most
        most = max(most, sum(t.grad is not None for _, t in trainable_tensors(model)))
        alive.add(id(p))
        step(group, p)

    optimizer._step_one = counted
    run(model, optimizer, 2)
    assert most == 1 and len(alive) == len(trainable_tensors(model))


def test_a_second_backward_before_the_step_is_refused():
    model = quantized()
    optimizer = configure_optimizer(model, gradients_in_backward=True)
    backward(model)
    with pytest.raises(OptimizerError, match="expected one backward pass a step"):
        backward(model)
    optimizer.step()
    backward(model)


def test_a_bad_gradient_in_backward_does_not_reach_its_tensor():
    model = quantized()
    configure_optimizer(model, gradients_in_backward=True)
    before = model.model.layers[0].mlp.down_proj.codes.clone()
    with pytest.raises(FloatingPointError, match="is not finite"):
        (model(ids()).sum() * math.inf).backward()
    assert torch.equal(model.model.layers[0].mlp.down_proj.codes, before)


def test_float_models_can_be_stepped_in_backward_as_well():
    ends = []
    for in_backward in (False, True):
        model = tiny()
        optimizer = configure_optimizer(model, 1e-2, gradients_in_backward=in_backward)
        run(model, optimizer, 3)
        ends.append(model.state_dict())
    assert type(optimizer) is QuantizedAdamW and equal(*ends)
