# pytest tests/test_spec_quantization.py
"""The requirements on quantization, scenario by scenario; each test quotes the one it proves. Settings of TrainingConfig: test_spec_training.py."""

import copy
import io
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qtlm import ModelConfig, QuantizationConfig, TinyLM, TrainingConfig, dequantize_model, get_quantization_info, quantize_model_ptq
from qtlm.quantization import QuantizationError

BITS = pytest.mark.parametrize("bits", [8, 4])


def digits():
    "Handwritten digits 8 x 8: training inputs and labels, then those held out."
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    return x[:1400], y[:1400], x[1400:], y[1400:]


@pytest.fixture(scope="module")
def trained():
    "A classifier that is no model of ours, trained on the digits."
    x, y, *_ = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    return TinyLM(ModelConfig(vocab_size=64, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, block_size=32)).eval()


def accuracy(model):
    *_, x, y = digits()
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def file_size(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getbuffer().nbytes


def plain_bits(model):
    return {name: (t.dtype, t.clone()) for name, t in model.state_dict().items()}


def is_unchanged(model, before):
    state = model.state_dict()
    return state.keys() == before.keys() and all(t.dtype == before[n][0] and torch.equal(t, before[n][1]) for n, t in state.items())


def test_convert_fp32_model_to_int8(trained):
    """Scenario: Convert FP32 model to INT8
    - **WHEN** `quantize_model_ptq()` is called with a trained FP32 model and quantization config
    - **THEN** the model is converted to INT8 quantized format
    - **AND** quantization parameters (scales, zero-points) are computed and stored
    - **AND** the quantized model can be used for inference
    - **AND** model size is reduced (approximately 4x for INT8)
    """
    quantized = quantize_model_ptq(trained, QuantizationConfig(bits=8))
    state = quantized.state_dict()
    for name in ("0", "2", "4"):
        codes, scale, w = state[f"{name}.codes"], state[f"{name}.scale"], trained[int(name)].weight
        assert codes.dtype == torch.int8 and scale.shape == (len(codes),)  # symmetric: the zero point is 0 and takes no room
        assert ((codes * scale[:, None] - w).abs() <= scale[:, None] / 2 + 1e-6 * w.abs()).all()
    assert accuracy(trained) > 0.85 and abs(accuracy(quantized) - accuracy(trained)) <= 0.01
    assert 3.5 < file_size(trained) / file_size(quantized) < 4.1
    assert 3.7 < 4 * sum(p.numel() for p in trained.parameters()) / get_quantization_info(quantized).bytes <= 4


def test_convert_fp32_model_to_int4(trained):
    """Scenario: Convert FP32 model to INT4
    - **WHEN** `quantize_model_ptq()` is called with quantization_bits=4
    - **THEN** the model is converted to INT4 quantized format
    - **AND** model size is reduced (approximately 8x for INT4)
    - **AND** quantization parameters are computed and stored
    """
    quantized = quantize_model_ptq(trained, quantization_bits=4)
    state = quantized.state_dict()
    for name, width in (("0", 64), ("2", 256), ("4", 256)):
        codes, group_scale = state[f"{name}.codes"], state[f"{name}.group_scale"]
        assert codes.dtype == torch.uint8 and codes.shape[1] == width // 2  # two codes a byte
        assert state[f"{name}.scale"].dtype == torch.float32 and group_scale.shape == (len(codes), width // 64)  # integer scale and zero point
    assert abs(accuracy(quantized) - accuracy(trained)) <= 0.03
    assert 6.5 < 4 * sum(p.numel() for p in trained.parameters()) / get_quantization_info(quantized).bytes <= 8
    wide = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    assert 7.4 < file_size(wide) / file_size(quantize_model_ptq(wide, quantization_bits=4)) <= 8


@BITS
def test_static_quantization_mode(trained, bits):
    """Scenario: Static quantization mode
    - **WHEN** PTQ is performed with quantization_type="static"
    - **THEN** calibration data is used to compute quantization parameters
    - **AND** quantization parameters are fixed at inference time
    """
    x = digits()[0]
    for ask in ({"quantization_type": "static"}, {"config": QuantizationConfig(type="static")}, {"config": TrainingConfig(quantization_type="static")}):
        quantized = quantize_model_ptq(trained, calibration_data=x.split(100), quantization_bits=bits, **ask)
        info = get_quantization_info(quantized)
        assert (info.type, info.bits) == ("static", bits) and {row.type for row in info.layers.values()} == {"static"}
        assert abs(accuracy(quantized) - accuracy(trained)) <= (0.01 if bits == 8 else 0.03)
    wider = quantize_model_ptq(trained, type="static", bits=bits, observer="minmax", calibration_data=[3 * x])
    assert torch.isclose(wider[0].input_scale / quantize_model_ptq(trained, type="static", bits=bits, observer="minmax", calibration_data=[x])[0].input_scale,
                         torch.tensor(3.0))  # computed from the data
    fixed = {name: t.clone() for name, t in quantized.state_dict().items() if "input_" in name}
    assert len(fixed) == 6  # a scale and a zero point for each of three layers
    quantized(100 * x), quantized.train()(x)
    assert all(torch.equal(quantized.state_dict()[name], t) for name, t in fixed.items())  # and fixed
    large = torch.full((1, 64), 1e4)
    assert torch.equal(quantized[0](large), quantized[0](10 * large))  # beyond the range, all is clipped to its end
    assert not torch.equal(quantize_model_ptq(trained, bits=bits)[0](large), quantize_model_ptq(trained, bits=bits)[0](10 * large))  # dynamic: not


@BITS
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("data, match", [
    (None, "calibration_data: found None with type='static'; expected batches"), ([], "found no batches"), ("text", "found str"), (7, "found int"),
    ([None], "batch 0: found NoneType; it is no batch"), ([torch.randn(3, 9)], r"batch 0: found float32 \[3, 9\]; the model raised RuntimeError"),
    ([torch.randn(3, 64), "x"], "batch 1: found str"), ([torch.full((2, 64), torch.nan)], "the input of 0: .*found NaN"),
], ids=["none", "empty", "text", "number", "no batch", "wrong shape", "wrong second", "nan"])  # fmt: skip
def test_static_quantization_without_fitting_data_changes_nothing(trained, bits, inplace, data, match):
    model = copy.deepcopy(trained).train()
    before, modules = plain_bits(model), [id(m) for m in model.modules()]
    with pytest.raises(QuantizationError, match=match) as caught:
        quantize_model_ptq(model, type="static", bits=bits, calibration_data=data, inplace=inplace)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300
    assert is_unchanged(model, before) and [id(m) for m in model.modules()] == modules and model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@BITS
def test_dynamic_quantization_mode(trained, bits):
    """Scenario: Dynamic quantization mode
    - **WHEN** PTQ is performed with quantization_type="dynamic"
    - **THEN** quantization parameters are computed dynamically during inference
    - **AND** no calibration data is required
    """
    quantized = quantize_model_ptq(trained, quantization_type="dynamic", quantization_bits=bits)
    layer, x = quantized[0], digits()[0][:8]
    before = plain_bits(quantized)
    bare = torch.nn.Parameter(torch.zeros(256), requires_grad=False)
    layer.bias, bias = bare, layer.bias
    for factor in (2.0**-20, 1.0, 2.0**20):  # the activations' range is nowhere stored: any range is met as it comes
        assert torch.equal(layer(x * factor), layer(x) * factor)
    mixed = torch.cat([x[:1], x[1:] * 1e6])  # and it is each token's own
    assert torch.equal(layer(mixed)[0], layer(x)[0])
    layer.bias = bias
    assert is_unchanged(quantized, before) and not any("activation" in name for name in before)
    assert get_quantization_info(quantized).type == "dynamic"


@BITS
def test_convert_quantized_model_to_fp32(lm, trained, bits):
    """Scenario: Convert quantized model to FP32
    - **WHEN** `dequantize_model()` is called on a quantized model
    - **THEN** the model is converted back to full-precision FP32 format
    - **AND** all quantization parameters are removed
    - **AND** model can be used as a standard FP32 model
    """
    ids = torch.arange(60).reshape(2, 30)
    for model, batch in ((lm, ids), (trained, digits()[2])):
        quantized = quantize_model_ptq(model, bits=bits)
        plain = dequantize_model(quantized)
        assert {name: (t.dtype, t.shape) for name, t in plain.state_dict().items()} == {n: (t.dtype, t.shape) for n, t in model.state_dict().items()}
        assert {n: type(m) for n, m in plain.named_modules()} == {n: type(m) for n, m in model.named_modules()}
        assert get_quantization_info(plain).mode is None and not [m for m in plain.modules() if hasattr(m, "codes")]
        for name, module in quantized.named_modules():
            if hasattr(module, "codes"):  # what the integer model computed with, to the bit
                assert torch.equal(plain.get_submodule(name).weight, module.dequantize())
        out, want = plain(batch), quantized(batch)
        assert 0 < (out - want).norm() < 0.05 * want.norm()  # the activations' rounding is all that is gone
        out.square().mean().backward()  # and it trains
        assert all(p.grad is not None and p.dtype == torch.float32 for p in plain.parameters())
        torch.optim.SGD(plain.parameters(), 0.1).step()
        fresh = quantize_model_ptq(plain, bits=bits)
        assert fresh(batch).isfinite().all()


@BITS
def test_inspect_quantization_state(lm, bits):
    """Scenario: Inspect quantization state
    - **WHEN** `get_quantization_info()` is called on a model
    - **THEN** quantization configuration and statistics are returned
    - **AND** information includes quantization bits, mode, and affected layers
    """
    nothing = get_quantization_info(lm)
    assert (nothing.bits, nothing.mode, nothing.type, nothing.layers) == (None, None, None, {})
    info = get_quantization_info(quantize_model_ptq(lm, bits=bits, skip_modules=["*.down_proj"]))
    linears = {n for n, m in lm.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    skipped = {n for n in linears if n.endswith("down_proj")}
    assert (info.bits, info.mode, info.type) == (bits, "ptq", "dynamic")
    assert set(info.layers) == linears - skipped and set(info.left_alone) == skipped
    assert info.parameters == lm.num_parameters() and info.bytes < nothing.bytes and info.bits_per_weight == 8 * info.bytes / info.parameters
    row = info.layers["model.layers.0.mlp.up_proj"]
    assert (row.bits, row.shape, row.group_size) == (bits, tuple(lm.get_submodule(row.name).weight.shape), 64 if bits == 4 else None)
    assert row.bytes < row.bytes_before == 4 * row.parameters and row.sqnr > 15
    plain = json.loads(json.dumps(info.to_dict()))
    assert plain["bits"] == bits and plain["mode"] == "ptq" and set(plain["layers"]) == set(info.layers)
