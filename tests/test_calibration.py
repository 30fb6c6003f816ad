# python -m pytest tests/test_calibration.py
"""Contracts of `qtlm.calibration` and of what quantization does with it: any data, any module, every layer reached or named, nothing left behind."""
import copy
import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qtlm import QuantizationError, TinyLM, calibrate, dequantize_model, get_quantization_info, quantize_model_ptq
from qtlm.config import ConfigError, QuantizationConfig
from qtlm.data import Batches, ByteVocab, Tokens
from qtlm.observers import MinMaxObserver
from qtlm.quantization import quantization_metadata, restore_quantization

OBSERVERS = ("minmax", "moving_average", "percentile", "mse", "histogram")
TEXT = "the quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture
def lm():
    torch.manual_seed(0)
    return TinyLM(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, block_size=32).eval()


def mlp(*widths):
    torch.manual_seed(0)
    layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


def hooks(model):
    return [h for m in model.modules() for h in (*m._forward_pre_hooks, *m._forward_hooks)]


# ---- data of every kind ----

def data_of_every_kind():
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(20, dtype=torch.int64)
    return {
        "a tensor": x, "a list of tensors": [x[:9], x[9:]], "a generator": (part for part in x.split(7)), "pairs": [(x, y)], "lists": [[x, y]],
        "a loader of singles": DataLoader(TensorDataset(x), batch_size=8), "a loader of pairs": DataLoader(TensorDataset(x, y), batch_size=8),
        "a dict": {"input": x}, "dicts": [{"input": x, "labels": y}], "a pair of a dict": [({"input": x}, y)],
    }  # fmt: skip


@pytest.mark.parametrize("kind", data_of_every_kind())
def test_all_kinds_of_data_give_the_same_ranges(kind):
    model = mlp(6, 8, 3)
    want = calibrate(model, [data_of_every_kind()["a tensor"]], observer="minmax").to_dict()
    got = calibrate(model, data_of_every_kind()[kind], observer="minmax").to_dict()
    assert {n: row["scale"] for n, row in got.items()} == {n: row["scale"] for n, row in want.items()} and set(got) == {"0", "2"}
    assert all(row["values"] == want[n]["values"] for n, row in got.items())  # and a wrong reading left nothing behind


def test_tokens_in_every_form(lm):
    tokens = Tokens.from_text(TEXT, ByteVocab(), cache_dir=False)
    ids = torch.tensor(np.asarray(tokens.ids if hasattr(tokens, "ids") else tokens[:]), dtype=torch.int64)
    stream = Batches(tokens, 32, 4)
    rows = torch.stack([ids[i : i + 33] for i in range(0, 330, 33)])  # one more than the model can read: it is a target
    for data in (tokens, ids, stream, [stream[0]], rows, [rows], rows[:, :-1], {"input_ids": rows[:, :-1], "labels": rows[:, :-1]}):
        seen = calibrate(lm, data)
        assert len(seen.observers) == 15 and quantize_model_ptq(lm, type="static", calibration_data=seen)(rows[:, :-1]).isfinite().all()
    assert calibrate(lm, stream, num_batches=3).layers["lm_head"].calls == 3 and calibrate(lm, stream).layers["lm_head"].calls == 32


def test_two_inputs_and_keyword_calls():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, y):
            return self.a(input=x) + self.b(y)

    seen = calibrate(Two(), [(torch.ones(2, 4), 2 * torch.ones(2, 4))], observer="minmax")
    assert [o.range()[1] for o in seen.observers.values()] == [1, 2]


# ---- what is left behind ----

def test_a_model_is_left_as_it_was(lm):
    lm.train()
    lm.model.norm.eval()
    before, modes, out = {n: t.clone() for n, t in lm.state_dict().items()}, [m.training for m in lm.modules()], torch.rand(3)
    generator = torch.get_rng_state()
    calibrate(lm, torch.zeros(2, 9, dtype=torch.int64), rounding="gptq")
    assert torch.equal(generator, torch.get_rng_state()) and out is not None
    assert modes == [m.training for m in lm.modules()] and not hooks(lm) and all(p.grad is None for p in lm.parameters())
    assert all(torch.equal(t, before[n]) for n, t in lm.state_dict().items())
    with pytest.raises(KeyboardInterrupt), calibrate(lm):
        raise KeyboardInterrupt
    assert not hooks(lm) and torch.backends.mha.get_fastpath_enabled()


def test_own_hooks_stay():
    model, called = mlp(4, 4), []
    model[0].register_forward_pre_hook(lambda *a: called.append(1))
    calibrate(model, torch.ones(1, 4))
    assert len(hooks(model)) == 1 and called


def test_ranges_keep_no_graph_and_no_activations():
    model = mlp(64, 64)
    with calibrate(model, rounding="gptq") as seen:
        model(torch.randn(4096, 64))
    import pickle

    assert len(pickle.dumps(seen.observers["0"])) < 300_000  # of 4 bytes x 262,144 values


# ---- what is reached ----

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4) for _ in range(5)])

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("options", [dict(type="static"), dict(rounding="gptq"), dict(type="static", bits=4, rounding="gptq")])
@pytest.mark.parametrize("inplace", [False, True])
def test_layers_that_no_data_reach_are_named(options, inplace):
    model = Branch()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QuantizationError, match=r"never reached unused.0, unused.1, unused.2 and 2 more; .* skip_modules") as caught:
        quantize_model_ptq(model, calibration_data=[torch.ones(2, 4)], inplace=inplace, **options)
    assert len(str(caught.value)) <= 300 and type(model.used) is nn.Linear and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    done = quantize_model_ptq(model, calibration_data=[torch.ones(2, 4)], skip_modules=["unused"], **options)
    assert type(done.unused[0]) is nn.Linear and done(torch.ones(2, 4)).isfinite().all()
    with pytest.raises(QuantizationError, match="found no batches"):
        quantize_model_ptq(model, calibration_data=iter(()), inplace=inplace, **options)
    with pytest.raises(QuantizationError, match=r"found None with .*; expected batches"):
        quantize_model_ptq(model, inplace=inplace, **options)


def test_layers_inside_torch_s_fast_path_are_seen():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        seen = calibrate(encoder, [torch.randn(2, 5, 16)])
    assert set(seen.observers) == {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}


def test_bad_activations_name_the_layer():
    model = mlp(4, 4, 4)
    model[0].bias.data[0] = torch.inf
    for options in (dict(type="static"), dict(rounding="gptq")):
        with pytest.raises(QuantizationError, match="the input of 2: .*NaN"):
            quantize_model_ptq(model, calibration_data=[torch.ones(2, 4)], overrides={"2": options, "0": {"bits": 8}})


# ---- what comes of it ----

@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_static_models_compute_what_their_ranges_say(bits, symmetric, observer):
    model, x = mlp(24, 40, 10), torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
    quantized = quantize_model_ptq(model, bits=bits, type="static", observer=observer, symmetric=symmetric, calibration_data=[x])
    seen = calibrate(model, [x], observer=observer, symmetric=symmetric)
    h = x
    for name in ("0", "2"):
        layer, (scale, zero) = quantized.get_submodule(name), seen.observers[name].qparams()
        assert torch.equal(layer.input_scale, scale) and (symmetric or torch.equal(layer.input_zero_point, zero))
        fake = ((h / scale).round() + zero).clamp(-128, 127).sub(zero) * scale
        h = fake @ layer.dequantize().t() + layer.bias
        h = h.relu() if name == "0" else h
    assert (quantized(x) - h).norm() < 0.02 * h.norm()  # a value at the edge between two codes may fall on either side
    assert (quantized(x) - model(x)).norm() < (0.05 if bits == 8 else 0.3) * model(x).norm()


def test_a_row_s_result_does_not_depend_on_its_batch():
    model, x = mlp(24, 40, 10), torch.randn(64, 24, generator=torch.Generator().manual_seed(1))
    for options in itertools.product((8, 4), (None, True, False)):
        bits, symmetric = options
        more = {} if symmetric is None else dict(type="static", symmetric=symmetric, calibration_data=[x])
        quantized = quantize_model_ptq(model, bits=bits, **more)
        whole = quantized(x)
        for size in (1, 2, 3, 7, 33):
            assert all(torch.equal(quantized(part), want) for part, want in zip(x.split(size), whole.split(size)))


def test_static_and_dynamic_layers_in_one_model(lm):
    ids = torch.arange(64).reshape(2, 32)
    quantized = quantize_model_ptq(lm, bits=4, overrides={"*.mlp": {"type": "static", "bits": 8, "symmetric": True}}, calibration_data=[ids])
    info = get_quantization_info(quantized)
    assert (info.type, info.bits) == ("mixed", "mixed") and info.layers["model.layers.0.mlp.up_proj"].scheme == "int8, nearest, static"
    assert info.layers["model.embed_tokens"].type is None and info.layers["lm_head"].type == "dynamic"
    rebuilt = restore_quantization(copy.deepcopy(lm), json.loads(json.dumps(quantization_metadata(quantized))))
    rebuilt.load_state_dict(quantized.state_dict())
    assert torch.equal(rebuilt(ids), quantized(ids)) and str(get_quantization_info(rebuilt)) == str(info)
    plain = dequantize_model(quantized)
    assert {n: t.shape for n, t in plain.state_dict().items()} == {n: t.shape for n, t in lm.state_dict().items()}


def test_tied_layers_have_ranges_of_their_own():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(100 * self.a(x).relu())

    for options in (dict(bits=8), dict(bits=4), dict(bits=4, rounding="gptq")):
        quantized = quantize_model_ptq(Tied(), type="static", calibration_data=[torch.randn(64, 8)], **options)
        assert quantized.a.codes is quantized.b.codes and quantized.b.input_scale > 5 * quantized.a.input_scale
        moved = copy.deepcopy(quantized).double().float()
        assert moved.a.codes is moved.b.codes and moved.a.input_scale is not moved.b.input_scale and moved.a.input_scale.dtype == torch.float32


def test_a_static_model_is_calibrated_anew_or_not_at_all():
    model = quantize_model_ptq(mlp(6, 8, 3), type="static", calibration_data=[torch.randn(9, 6)])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    calibrate(model, [10 * torch.randn(9, 6)])
    assert model[0].input_scale > 3 * before["0.input_scale"] and torch.equal(model[0].codes, before["0.codes"])
    model.load_state_dict(before)
    with pytest.raises(QuantizationError, match="never reached 0"), calibrate(model):
        model[2](torch.randn(3, 8))
    with pytest.raises(QuantizationError, match="the input of 2"), calibrate(model):
        model(torch.randn(3, 6)), model[2](torch.full((1, 8), torch.nan))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with pytest.raises(QuantizationError, match="is quantized dynamically"):
        calibrate(quantize_model_ptq(mlp(6, 8)), [torch.ones(1, 6)])


def test_a_calibration_must_have_seen_what_is_asked_for():
    model, x = mlp(6, 8, 3), torch.randn(9, 6)
    seen = calibrate(model, [x])
    for options, match in [(dict(rounding="gptq"), "0 was not watched"), (dict(type="static", rounding="gptq"), "0 was not watched")]:
        with pytest.raises(QuantizationError, match=match):
            quantize_model_ptq(model, bits=4, calibration_data=seen, **options)
    with pytest.raises(QuantizationError, match="was not watched"):
        quantize_model_ptq(nn.ModuleDict({"other": model}), type="static", calibration_data=seen)
    with calibrate(model) as nothing, pytest.raises(QuantizationError, match="model: is being watched"):
        quantize_model_ptq(model, type="static", calibration_data=nothing)
    with pytest.raises(QuantizationError, match="never reached 0, 2"):
        quantize_model_ptq(model, type="static", calibration_data=nothing)
    assert quantize_model_ptq(model, type="static", calibration_data=seen)[0].input_scale == seen.observers["0"].qparams()[0]
    for other in (dict(observer="minmax"), dict(symmetric=True), dict(observer="percentile", percentile=60.0)):
        with pytest.raises(QuantizationError, match="0 was not watched"):
            quantize_model_ptq(model, type="static", calibration_data=seen, **other)
    with pytest.raises(QuantizationError, match="0 was not watched"):
        quantize_model_ptq(mlp(7, 8, 3), type="static", calibration_data=seen)
    assert quantize_model_ptq(model, type="static", observer="histogram", symmetric=False, calibration_data=seen)[0].input_zero_point is not None


def test_requests_are_checked_before_any_data_run():
    class Counting(nn.Sequential):
        runs = 0

        def forward(self, x):
            Counting.runs += 1
            return super().forward(x)

    model = Counting(nn.Linear(30, 4))
    for options in (dict(bits=4, group_size=7), dict(skip_modules=["none"]), dict(overrides={"none": {"bits": 4}}), dict(mode="qat")):
        with pytest.raises(QuantizationError):
            quantize_model_ptq(model, type="static", calibration_data=[torch.ones(1, 30)], **options)
    for options in (dict(observer="minmac"), dict(percentile=101), dict(percentile=20), dict(overrides={"0": {"mode": "qat"}}), dict(overrides=3)):
        with pytest.raises(ConfigError):
            quantize_model_ptq(model, type="static", calibration_data=[torch.ones(1, 30)], **options)
    assert Counting.runs == 0


def test_the_observer_is_the_one_that_was_asked_for():
    config = QuantizationConfig(type="static", observer="minmax", overrides={"2": {"observer": "percentile", "percentile": 99.0}})
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    seen = calibrate(mlp(6, 8, 3), [x], config)
    assert isinstance(seen.observers["0"], MinMaxObserver) and not isinstance(seen.observers["2"], MinMaxObserver)
    low, high = seen.observers["0"].range()
    assert (low, high) == (x.min(), x.max())


# ---- pictures and tables ----

def test_a_calibration_shows_itself(tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    seen = calibrate(mlp(6, 8, 8, 8, 8, 3), [torch.randn(99, 6)])
    axes = seen.plot()
    assert sum(bool(ax.get_xlabel() or ax.lines or ax.patches or ax.collections) for ax in axes.flat) == 5
    assert len(seen.plot("0").flat) == 3 and seen._repr_markdown_().count("\n") == 6 and json.dumps(seen.to_dict())
    with pytest.raises(QuantizationError, match="found no layer that was observed"), calibrate(mlp(6, 8)) as nothing:
        nothing.plot()


# ---- GPTQ, layer after layer ----

def others():
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=96)
    yield TinyLM(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, block_size=32)
    yield transformers.BertForSequenceClassification(transformers.BertConfig(**small, intermediate_size=64))
    yield transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, intermediate_size=64, tie_word_embeddings=False))
    yield transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=3, n_head=2, n_embd=32, vocab_size=96, n_positions=32, bos_token_id=0, eos_token_id=0))


@pytest.mark.parametrize("i", range(4))
def test_running_only_the_block_at_hand_changes_nothing(i, monkeypatch):
    torch.manual_seed(i)
    model = list(others())[i].eval()
    ids = torch.randint(96, (3, 4, 12), generator=torch.Generator().manual_seed(0))
    data = list(ids) if i == 0 else [{"input_ids": x} for x in ids]
    ask = dict(bits=4, rounding="gptq", calibration_data=data)
    from qtlm import quantization

    found, blocks = [], quantization._blocks
    monkeypatch.setattr(quantization, "_blocks", lambda *a: found.append(blocks(*a)) or found[-1])
    in_blocks = quantize_model_ptq(model, **ask)
    assert len(found[0]) == 3  # so these models are chains of blocks, and the streams were used
    monkeypatch.setattr(quantization, "_blocks", lambda *a: [])
    whole = quantize_model_ptq(model, **ask)
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in in_blocks.state_dict().items())
    one_pass = quantize_model_ptq(model, sequential=False, **ask)
    assert any(not torch.equal(t, one_pass.state_dict()[n]) for n, t in in_blocks.state_dict().items())
    assert not hooks(model) and not hooks(in_blocks)


def test_layer_after_layer_is_closer_to_the_float_model():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(48, 48), nn.Tanh()) for _ in range(5))).eval()
    mix = torch.randn(48, 48) / 7
    x, fresh = torch.randn(2000, 48) @ mix, torch.randn(2000, 48) @ mix
    error = {}
    for name, options in {"nearest": {"rounding": "nearest"}, "alone": {"rounding": "gptq", "sequential": False}, "after": {"rounding": "gptq"}}.items():
        quantized = quantize_model_ptq(model, bits=4, calibration_data=x.split(500), **options)
        error[name] = (quantized(fresh) - model(fresh)).norm().item()
    assert error["after"] < 0.9 * error["alone"] < 0.9 * error["nearest"]
    seen = calibrate(model, x.split(500), bits=4, rounding="gptq")  # a calibration has no batches to run again: each layer alone
    by_hand = quantize_model_ptq(model, bits=4, rounding="gptq", calibration_data=seen)
    alone = quantize_model_ptq(model, bits=4, rounding="gptq", sequential=False, calibration_data=x.split(500))
    assert all(torch.equal(t, alone.state_dict()[n]) for n, t in by_hand.state_dict().items())


def test_a_model_that_fails_behind_integer_layers_is_put_back():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                if type(layer) is not nn.Linear:
                    raise RuntimeError("not with me")
                x = x + layer(x)  # no chain of blocks: the whole model is run
            return x

    for inplace in (False, True):
        model = Picky()
        before = {n: t.clone() for n, t in model.state_dict().items()}
        with pytest.raises(QuantizationError, match="behind integer layers .*not with me"):
            quantize_model_ptq(model, bits=4, rounding="gptq", calibration_data=[torch.randn(9, 8)], inplace=inplace)
        assert all(type(layer) is nn.Linear for layer in model.layers) and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        assert not hooks(model)


def test_layers_that_are_called_twice_or_only_by_some_batches():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.rare, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.twice(self.twice(x).relu())
            return self.last(self.rare(x) if len(x) > 5 else x)

    torch.manual_seed(0)
    data = [torch.randn(4, 8), torch.randn(6, 8), torch.randn(30, 8)]
    for sequential in (True, False):
        quantized = quantize_model_ptq(Odd(), bits=4, rounding="gptq", sequential=sequential, calibration_data=data)
        assert len(get_quantization_info(quantized).layers) == 3 and quantized(data[2]).isfinite().all()


# ---- no trace ----

def test_buffers_and_random_numbers_are_left_alone():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.register_buffer("n", torch.tensor(0))

        def forward(self, x):
            self.n += 1
            return self.fc(x)

    torch.manual_seed(3)
    loader = DataLoader(TensorDataset(torch.randn(16, 6)), batch_size=4, shuffle=True)
    for options in (dict(type="static"), dict(bits=4, rounding="gptq", type="static"), dict(rounding="gptq", sequential=False)):
        model, state = Counts(), torch.get_rng_state()
        quantized = quantize_model_ptq(model, calibration_data=loader, **options)
        assert model.n == quantized.n == 0 and torch.equal(torch.get_rng_state(), state)
        with pytest.raises(QuantizationError):
            quantize_model_ptq(model, calibration_data=[torch.ones(2, 6), "x"], inplace=True, **options)
        calibrate(model, loader)
        assert model.n == 0 and torch.equal(torch.get_rng_state(), state)


def test_inference_mode_everywhere():
    model = mlp(6, 8, 3)
    with torch.inference_mode():
        x = torch.randn(20, 6)
        with calibrate(model) as seen:
            model(x)
        assert len(seen.observers) == 2
        inside = quantize_model_ptq(model, bits=4, rounding="gptq", type="static", calibration_data=[x])
    for options in (dict(type="static"), dict(bits=4, rounding="gptq"), dict(bits=4, rounding="gptq", sequential=False)):
        assert quantize_model_ptq(model, calibration_data=[x], **options)(x).isfinite().all()
    assert inside(x.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("data", [[torch.empty(0, 6)], [torch.empty(3, 6, device="meta")]], ids=["empty", "meta"])
def test_data_without_values_are_refused(data):
    with pytest.raises(QuantizationError, match="calibration_data: "):
        quantize_model_ptq(mlp(6, 8, 3), type="static", calibration_data=data)


def test_encoders_compute_with_integers_in_every_mode():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    h = torch.randn(4, 9, 16)
    padding = torch.arange(9) >= torch.tensor([9, 5, 7, 3])[:, None]
    for options in (dict(), dict(bits=4), dict(type="static", calibration_data=[h])):
        quantized = quantize_model_ptq(encoder, **options)
        called = []
        for m in quantized.modules():
            if hasattr(m, "codes"):
                m.register_forward_hook(lambda *a, called=called: called.append(1))
        with_grad = quantized(h)
        with torch.no_grad():
            assert (quantized(h) - with_grad).norm() < 0.01 * with_grad.norm() and len(called) == 8  # attention has a fast path of its own
            masked = quantized(h, src_key_padding_mask=padding)
            want = encoder(h, src_key_padding_mask=padding)
            assert (masked - want)[~padding].norm() < 0.4 * want[~padding].norm()
        back = dequantize_model(quantized)
        assert [vars(m).keys() for m in back.modules()] == [vars(m).keys() for m in encoder.modules()]
        assert back.use_nested_tensor == encoder.use_nested_tensor and back.layers[0].activation_relu_or_gelu == 1


def test_overrides_win_in_their_order():
    model = mlp(16, 32, 8)
    bits = lambda overrides: [row.bits for row in get_quantization_info(quantize_model_ptq(model, bits=4, overrides=overrides)).layers.values()]
    assert bits({"*": {"bits": 4}, "0": {"quantization_bits": 8}}) == [8, 4] and bits({"0": {"bits": 8}, "*": {"nbits": 4}}) == [4, 4]
    assert bits({"0": {"bits": 8}, "*": {"group_size": 8}}) == [8, 4]
    tied = nn.ModuleDict({"e": nn.Embedding(8, 16), "o": nn.Linear(16, 8, bias=False)})
    tied["o"].weight = tied["e"].weight
    for overrides, want in [({"o": {"bits": 4}, "e": {"bits": 8}}, 8), ({"e": {"bits": 8}, "o": {"bits": 4}}, 4)]:
        assert get_quantization_info(quantize_model_ptq(tied, overrides=overrides)).layers["e"].bits == want
    with pytest.raises(ConfigError, match="given twice"):
        quantize_model_ptq(model, overrides={"0": {"bits": 4, "nbits": 8}})


def test_layers_too_wide_for_32_bits_are_left_alone():
    model = nn.Sequential(nn.Linear(2**16 + 1, 2), nn.Linear(2, 2))
    quantized = quantize_model_ptq(model)
    assert "more than 65,536 inputs" in get_quantization_info(quantized).left_alone["0"].reason and quantized(torch.ones(1, 2**16 + 1)).isfinite().all()


def test_yaml_keeps_overrides(tmp_path):
    from qtlm.config import load_config, save_config

    config = QuantizationConfig(bits=4, overrides={"*": {"group_size": 8}, "*.fc1": {"bits": 8}, "[ab]*": {"type": "static"}, "0": {"rounding": "hqq"}, "null": {"bits": 8}})
    for name in ("a.yaml", "a.json"):
        save_config(config, tmp_path / name)
        assert load_config(tmp_path / name, kind=QuantizationConfig) == config
    both = load_config(None, "overrides.a={bits: 4}", "overrides.b={bits: 8}", kind=QuantizationConfig)
    assert both.overrides == {"a": {"bits": 4}, "b": {"bits": 8}}
    assert config != config.replace(overrides=dict(reversed(config.overrides.items())))
