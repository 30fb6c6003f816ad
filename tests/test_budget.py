# python -m pytest tests/test_budget.py
"""Contracts of `qtlm.budget`: what a layer costs is what quantizing it alone costs; budgets are kept; the model is never changed."""
import json

import pytest
import torch
from torch import nn

from qtlm import QuantizationError, TinyLM, get_quantization_info, mixed_precision, quantize_model_ptq, sensitivity
from qtlm.batches import mean_loss

CPU = torch.device("cpu")


@pytest.fixture
def lm():
    torch.manual_seed(0)
    return TinyLM(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, block_size=16)


@pytest.fixture
def batches():
    ids = torch.randint(64, (6, 4, 17), generator=torch.Generator().manual_seed(0))
    return list(ids)


@pytest.mark.parametrize("options", [dict(), dict(bits=8), dict(rounding="gptq"), dict(type="static"), dict(group_size=16, skip_modules=["*.mlp"])], ids=str)
def test_each_price_is_that_of_quantizing_the_layer_alone(lm, batches, options):
    before = {n: t.clone() for n, t in lm.state_dict().items()}
    prices = sensitivity(lm, batches, **options)
    assert lm.training and all(torch.equal(t, before[n]) for n, t in lm.state_dict().items()) and type(lm.lm_head) is nn.Linear
    assert prices.float_loss == mean_loss(lm, batches, CPU)[0] and prices.targets == 6 * 4 * 16
    names = [row.name for row in prices.rows]
    assert len(names) == (9 if "skip_modules" in options else 15) and len(set(names)) == len(names)
    for row in prices.rows[::5]:
        skip = [*options.get("skip_modules", ()), *(n for n in names if n != row.name)]
        alone = quantize_model_ptq(lm, **{"bits": 4, "embedding_bits": 4} | options | {"skip_modules": skip}, calibration_data=batches)
        assert [r.name for r in get_quantization_info(alone).layers.values() if not r.tied_to] == [row.name]
        assert mean_loss(alone, batches, CPU)[0] == row.loss and row.divergence > 0


def test_a_layer_that_hurts_is_found(lm, batches):
    "One outlier in a row makes the rest of its row coarse."
    name = "model.layers.1.mlp.down_proj"
    before = {row.name: row for row in sensitivity(lm, batches, group_size=-1).rows}[name]
    lm.model.layers[1].mlp.down_proj.weight.data[:, 3] *= 300
    after = {row.name: row for row in sensitivity(lm, batches, group_size=-1).rows}[name]
    assert after.divergence > 10 * before.divergence and after.sqnr > before.sqnr  # while decibels say that all is well
    assert mixed_precision(lm, batches, 5.5).overrides[name] in ({"bits": 8}, {"bits": 4, "group_size": 16})


def test_budgets_are_kept_and_used(lm, batches):
    least = get_quantization_info(quantize_model_ptq(lm, bits=4, embedding_bits=4)).bits_per_weight
    last = None
    for bits in (least, least + 0.3, 6.0, 32.0):
        config = mixed_precision(lm, batches, bits)
        info = get_quantization_info(quantize_model_ptq(lm, config))
        assert least - 1e-9 <= info.bits_per_weight <= bits + 1e-9 and (last is None or info.bits_per_weight > last)
        last = info.bits_per_weight
    assert last == get_quantization_info(quantize_model_ptq(lm, bits=8)).bits_per_weight  # all that there is to buy
    assert config.overrides["lm_head"] == {"bits": 8} if "lm_head" in config.overrides else config.overrides["model.embed_tokens"] == {"bits": 8}


@pytest.mark.parametrize("bits", [0, -1, 3.9, float("nan"), float("inf"), "5", None, True])
def test_budgets_that_cannot_be_kept_are_refused_before_any_data_run(lm, bits):
    with pytest.raises(QuantizationError, match="bits_per_weight: found .*; expected at least 4"):
        mixed_precision(lm, None, bits)


def test_classifiers_of_others():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    prices = sensitivity(model, [(x, y)])
    assert {row.name for row in prices.rows} == {"0", "2"} and prices.targets == len(y) and json.dumps(prices.to_dict())
    info = get_quantization_info(quantize_model_ptq(model, mixed_precision(model, [(x, y)], 7.0)))
    assert info.bits_per_weight <= 7.0


@pytest.mark.parametrize("data, match", [([], "found no batches|no target"), ([3], "batches: .*int"), (None, "batches: found NoneType"), ([torch.randn(2, 3)], "batches: ")], ids=["empty", "number", "none", "no targets"])
def test_data_without_targets_are_refused(lm, data, match):
    with pytest.raises(QuantizationError, match=match) as caught:
        sensitivity(lm, data)
    assert "\n" not in str(caught.value)


def test_a_failing_model_is_put_back():
    class Picky(nn.Sequential):
        def forward(self, x):
            if type(self[0]) is not nn.Linear:
                raise RuntimeError("no")
            return super().forward(x)

    model = Picky(nn.Linear(8, 4))
    with pytest.raises(QuantizationError, match="batches: the model raised RuntimeError: no"):
        sensitivity(model, [(torch.randn(2, 8), torch.zeros(2, dtype=torch.int64))])
    assert type(model[0]) is nn.Linear


def test_the_picture(lm, batches, tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    assert len(sensitivity(lm, batches).plot(5).patches) == 5


def test_what_was_asked_of_layers_stays(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.ModuleDict({"a[0]": nn.Linear(128, 8)})["a[0]"])
    model.add_module("b[1]", nn.Linear(8, 8))
    data = [(torch.randn(64, 64), torch.randint(8, (64,)))]
    for asked, bits in [({"0": {"bits": 4}}, 7.5), ({"0": {"symmetric": True}}, 8.0), ({"*": {"group_size": 8}}, 7.5), ({"2": {"bits": 8}}, 8.2)]:
        for kind in ("dynamic", "static"):
            config = mixed_precision(model, data, bits, type=kind, overrides=asked)
            quantized = quantize_model_ptq(model, config, data)
            info = get_quantization_info(quantized)
            assert info.bits_per_weight <= bits and info.type == kind
            for name, fields in asked.items():
                row = info.layers[name] if name != "*" else info.layers["0"]
                assert all(getattr(row, field) == value for field, value in fields.items() if field != "symmetric" or kind == "static")
    alone = nn.Linear(64, 8)
    assert get_quantization_info(quantize_model_ptq(alone, mixed_precision(alone, data, 9.0))).bits_per_weight <= 9


def test_data_that_are_not_finite_are_refused(lm):
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(QuantizationError, match="batches: .*(not finite|NaN|nan)"):
        sensitivity(model, [(torch.full((2, 8), torch.nan), torch.zeros(2, dtype=torch.int64))])
    for wrong in (-1, 0, 1.5, "a", True):
        with pytest.raises(QuantizationError, match="num_batches: found"):
            sensitivity(model, [(torch.ones(2, 8), torch.zeros(2, dtype=torch.int64))], num_batches=wrong)
