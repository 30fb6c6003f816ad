# pytest tests/test_qat.py
"Quantization-aware training: prepare is convert, gradients of full precision, any module, nothing changed by a refusal."

import copy
import io
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qtlm import QuantizationError, TinyLM, get_quantization_info, quantize_model_ptq
from qtlm.config import ConfigError
from qtlm.loss import compute_loss
from qtlm.qat import convert_qat, fake_quantize, prepare_qat, restore_qat
from qtlm.quantization import quantization_metadata, restore_quantization
from qtlm.rounding import float_weights, round_weights


def lm(**fields):
    torch.manual_seed(0)
    return TinyLM(**{"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "block_size": 24} | fields)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 36), nn.ReLU(), nn.Linear(36, 36, bias=False), nn.GELU(), nn.Linear(36, 7))


def gpt2():
    transformers = pytest.importorskip("transformers", reason="extra [vit]")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=24)).eval()


IDS = torch.randint(0, 61, (3, 24), generator=torch.Generator().manual_seed(1))
X = torch.randn(9, 20, generator=torch.Generator().manual_seed(1))
MODELS = {"lm": (lm, IDS), "lm untied": (lambda: lm(tie_word_embeddings=False), IDS), "mlp": (mlp, X), "gpt2": (gpt2, IDS)}
SCHEMES = [dict(bits=bits, type=kind, symmetric=symmetric, group_size=size, learned_scales=learned)
           for bits, size in ((8, None), (4, None), (4, -1), (4, 4))
           for kind, symmetric in (("dynamic", False), ("static", False), ("static", True)) for learned in (False, True)]  # fmt: skip


def output(model, x):
    out = model(x)
    return getattr(out, "logits", out)


def step(model, x, times=2, rate=1e-2):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(times):
        output(model, x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_prepare_is_convert(kind, scheme):
    "Codes and scales that training computed with are those of the converted model, and the logits, bit for bit, before and after training."
    make, x = MODELS[kind]
    model = make()
    data = [x] if scheme["type"] == "static" else None
    prepared = prepare_qat(model, calibration_data=data, **scheme)
    for trained in (False, True):
        if trained:
            step(prepared.train(), x)
        prepared.eval()
        converted = convert_qat(prepared)
        with torch.no_grad():
            assert torch.equal(output(prepared, x), output(converted, x))
        for name, layer in prepared.named_modules():
            if "qat" in vars(layer):
                for key, value in layer.weight_buffers().items():
                    assert torch.equal(value, getattr(converted.get_submodule(name), key)), (name, key)
        if not trained:
            fields = {name: value for name, value in scheme.items() if name != "learned_scales"}
            rounding = {} if scheme["learned_scales"] else {"rounding": "nearest"}  # learnt scales begin with those of the best grid
            afterwards = quantize_model_ptq(model, calibration_data=data, **rounding, **fields)
            assert same(converted.state_dict(), afterwards.state_dict())
    assert get_quantization_info(converted).mode == "qat"


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("rounding", ["mse", "hqq", "gptq"])
def test_it_begins_where_rounding_after_training_ends(rounding, learned):
    "On a grid that is kept: the codes of quantize_model_ptq before training, codes on the same groups after it."
    model, data = lm(), [IDS]
    prepared = prepare_qat(model, calibration_data=data, bits=4, rounding=rounding, learned_scales=learned).eval()
    afterwards = quantize_model_ptq(model, calibration_data=data, bits=4, rounding=rounding)
    assert same(convert_qat(prepared).state_dict(), afterwards.state_dict())
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, prepared.get_parameter(name))]
    assert bool(moved) == (rounding == "gptq") and lm().state_dict().keys() == model.state_dict().keys() and same(lm().state_dict(), model.state_dict())
    step(prepared.train(), IDS, times=20)
    converted = convert_qat(prepared.eval())
    name = "model.layers.0.mlp.up_proj"
    same_scale = torch.equal(converted.get_submodule(name).scale, afterwards.get_submodule(name).scale)
    assert torch.equal(converted.get_submodule(name).group_scale, afterwards.get_submodule(name).group_scale) and same_scale != learned
    assert not torch.equal(converted.get_submodule(name).codes, afterwards.get_submodule(name).codes)
    assert get_quantization_info(converted).layers[name].rounding == rounding
    with torch.no_grad():
        assert torch.equal(prepared(IDS), converted(IDS))
    again = restore_qat(lm(), json.loads(json.dumps(quantization_metadata(prepared))))
    again.load_state_dict(prepared.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS), prepared(IDS))


@pytest.mark.parametrize("scheme", [dict(bits=8), dict(bits=4), dict(bits=4, type="static")], ids=str)
def test_gradients_are_those_of_full_precision(scheme):
    "Those that torch derives from the same layer in floats: rounded weights and activations, straight through; cut off where a range ends."
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(20, 12)), X.clone().requires_grad_()
    prepared = prepare_qat(layer, calibration_data=[X / 2] if "type" in scheme else None, **scheme).eval()  # half the range: some values are cut off
    upstream = torch.randn(9, 12, generator=torch.Generator().manual_seed(2))
    prepared(x).backward(upstream)
    w, module = layer[0].weight, prepared[0]
    buffers = round_weights(w.detach(), module.qat.bits, module.qat.group_size)
    rounded_w = w + (float_weights(**buffers, width=20) - w).detach()
    if "type" in scheme:
        grid, zero = module.input_grid()
        q = ((X * (1 / grid)).round() + zero)
        inside, q = (X / grid >= -128 - zero) & (X / grid <= 127 - zero), q.clamp(-128, 127)
        rounded_x, other = (q - zero) * grid, X.clone().requires_grad_()
        rounded_x = torch.where(inside, other + (rounded_x - other).detach(), rounded_x)
        assert not inside.all()
    else:
        grid = X.abs().amax(1, keepdim=True) / 127
        other = X.clone().requires_grad_()
        rounded_x = other + ((X / grid).round() * grid - other).detach()
    F.linear(rounded_x, rounded_w, layer[0].bias).backward(upstream)
    for got, expected in ((x.grad, other.grad), (module.weight.grad, w.grad), (module.bias.grad, layer[0].bias.grad)):
        assert got.dtype == torch.float32 and torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", [dict(bits=8), dict(bits=4), dict(bits=4, group_size=-1), dict(bits=4, learned_scales=True), dict(bits=8, learned_scales=True)], ids=str)
def test_weights_larger_than_a_piece(scheme):
    "What is done piece by piece is done as a whole: codes, outputs, gradients."
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(512, 1300)), torch.randn(3, 512)
    prepared = prepare_qat(model, **scheme).eval()
    with torch.no_grad():
        assert torch.equal(prepared(x), convert_qat(prepared)(x))
    prepared(x).square().sum().backward()
    small = prepare_qat(nn.Sequential(nn.Linear(512, 100)), **scheme).eval()
    for start in range(0, 1300, 100):
        rows = slice(start, start + 100)
        for name, t in [*small[0].named_parameters(), *small[0].named_buffers()]:
            t.data.copy_(getattr(prepared[0], name).data[rows])
        small.zero_grad()
        small(x).square().sum().backward()
        for name, p in small[0].named_parameters():
            assert torch.allclose(p.grad, getattr(prepared[0], name).grad[rows], rtol=1e-5, atol=1e-6), name


def test_the_rounding_touches_the_forward_pass_alone():
    "Weights keep their values, and change by the optimizer's steps only; with the rounding switched off the model is the float model."
    model = lm()
    prepared = prepare_qat(model, bits=4)
    before = copy.deepcopy(prepared.state_dict())
    output(prepared.train(), IDS).square().mean().backward()
    assert same(prepared.state_dict(), before) and same(before, model.state_dict())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in prepared.parameters())
    with torch.no_grad():
        assert not torch.equal(prepared(IDS), model(IDS))
        for layer in prepared.modules():
            if "qat" in vars(layer):
                layer.qat.fake_quant = False
        assert torch.equal(prepared(IDS), model(IDS))


def test_learned_scales_learn():
    "One parameter a row, shared where the weight is; no decay of theirs; loss goes down with them alone."
    prepared = prepare_qat(lm(), bits=4, embedding_bits=4, learned_scales=True)
    names = [name for name, _ in prepared.named_parameters() if name.endswith("log_scale")]
    assert len(names) == 2 * 7 + 1 and prepared.lm_head.log_scale is prepared.model.embed_tokens.log_scale
    scales = [p for name, p in prepared.named_parameters() if name in names]
    assert all(p.ndim == 1 for p in scales)  # vectors: no optimizer of ours decays them
    optimizer, losses = torch.optim.SGD(scales, lr=30.0), []
    for _ in range(10):
        losses.append(compute_loss(prepared(IDS[:, :-1]), IDS[:, 1:]))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("bits", [8, 4])
def test_bf16_autocast(bits):
    "Results are bf16 as those of nn.Linear, gradients float32."
    prepared = prepare_qat(mlp(), bits=bits).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = prepared(X)
    y.float().square().mean().backward()
    plain = mlp()
    with torch.autocast("cpu", torch.bfloat16):
        z = plain(X)
    z.float().square().mean().backward()
    assert y.dtype == z.dtype == torch.bfloat16
    for p, q in zip(prepared.parameters(), plain.parameters()):
        assert p.grad.dtype == torch.float32 and F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.9


def test_bf16_models():
    prepared = prepare_qat(lm().bfloat16(), bits=4).eval()
    with torch.no_grad():
        assert torch.equal(prepared(IDS), convert_qat(prepared)(IDS)) and prepared(IDS).dtype == torch.bfloat16
    step(prepared, IDS)


def test_accumulation_adds_up():
    "Gradients of two halves of a batch add up to those of the whole."
    whole, halves = prepare_qat(lm(), bits=4).train(), prepare_qat(lm(), bits=4).train()
    whole(IDS[:2]).square().sum().backward()
    for row in (IDS[:1], IDS[1:2]):
        halves(row).square().sum().backward()
    for a, b in zip(whole.parameters(), halves.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-4 * a.grad.abs().max().item())


@pytest.mark.parametrize("scheme", [dict(bits=8), dict(bits=4), dict(bits=4, learned_scales=True), dict(bits=8, type="static")], ids=str)
def test_compiled(scheme):
    "A compiled step gives the gradients of an eager one, but for the order of float additions."
    torch._dynamo.reset()  # what other tests compiled counts towards its limit
    data = [IDS] if "type" in scheme else None
    eager, compiled = (prepare_qat(lm(), calibration_data=data, **scheme).train() for _ in range(2))
    losses = [compute_loss(m(IDS[:, :-1]), IDS[:, 1:]) for m in (eager, torch.compile(compiled, backend="aot_eager", fullgraph=True))]
    assert torch.allclose(*losses, rtol=1e-4)
    for loss in losses:
        loss.backward()
    for a, b in zip(eager.parameters(), compiled.parameters()):
        assert F.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0) > 0.99


def test_static_ranges_follow_and_freeze():
    model = mlp()
    prepared = prepare_qat(model, calibration_data=[X], type="static", observer="minmax").train()
    start = prepared[0].input_scale.item()
    for _ in range(200):
        prepared(3 * X)
    followed = prepared[0].input_scale.item()
    assert followed == pytest.approx(start * (1 + 2 * (1 - 0.99**200)), rel=1e-3)
    prepared[0].qat.observing = False
    prepared(9 * X)
    assert prepared[0].input_scale.item() == followed
    prepared.eval()[2].qat.observing = True
    before = prepared[2].input_scale.clone()
    prepared(9 * X)
    assert torch.equal(prepared[2].input_scale, before)  # evaluation looks at nothing


def test_inplace_and_copy():
    model = lm()
    before = copy.deepcopy(model.state_dict())
    prepared = prepare_qat(model, bits=4)
    assert type(model.lm_head) is nn.Linear and prepared is not model and same(before, model.state_dict())
    assert prepare_qat(model, bits=4, inplace=True) is model and isinstance(model.lm_head, nn.Linear) and type(model.lm_head) is not nn.Linear
    assert convert_qat(model) is not model and convert_qat(model, inplace=True) is model
    assert not [name for m in model.modules() for name in vars(m) if name == "qat"]


def test_a_prepared_model_is_saved_copied_and_described():
    prepared = prepare_qat(lm(), calibration_data=[IDS], bits=4, type="static", learned_scales=True)
    step(prepared, IDS)
    file = io.BytesIO()
    torch.save(prepared.state_dict(), file)
    file.seek(0)
    metadata = json.loads(json.dumps(quantization_metadata(prepared)))
    again = restore_qat(lm(), metadata)
    again.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS), prepared.eval()(IDS)) and torch.equal(copy.deepcopy(prepared)(IDS), prepared(IDS))
    info = get_quantization_info(prepared)
    assert (info.mode, info.bits, info.type) == ("qat", 4, "static") and info.bytes > 4 * lm().num_parameters()  # floats still
    with pytest.raises(QuantizationError, match="describe a model in quantization-aware training"):
        restore_quantization(lm(), metadata)


def test_skips_and_overrides():
    prepared = prepare_qat(lm(), bits=4, skip_modules=["lm_head"], overrides={"*.layers.0.*": {"bits": 8}})
    rows = get_quantization_info(prepared)
    assert rows.layers["model.layers.0.mlp.up_proj"].bits == 8 and rows.layers["model.layers.1.mlp.up_proj"].bits == 4
    assert set(rows.left_alone) == {"lm_head", "model.embed_tokens"} and "skip_modules" in rows.left_alone["lm_head"].reason
    assert get_quantization_info(convert_qat(prepared)).left_alone.keys() == rows.left_alone.keys()


@pytest.mark.parametrize("fields, error, match", [
    (dict(bits=3), ConfigError, "bits"),
    (dict(type="static"), QuantizationError, "calibration_data: found None"),
    (dict(bits=4, rounding="gptq"), QuantizationError, "calibration_data: found None with rounding='gptq'"),
    (dict(bits=4, group_size=7), QuantizationError, "does not divide"),
    (dict(skip_modules=["nothing"]), QuantizationError, "matches no module"),
])  # fmt: skip
def test_a_refusal_changes_nothing(fields, error, match):
    model = lm()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(error, match=match) as caught:
        prepare_qat(model, inplace=True, **fields)
    assert same(before, model.state_dict()) and kinds == [type(m) for m in model.modules()]
    assert "\n" not in str(caught.value)


def test_what_is_not_float_is_refused():
    prepared, quantized = prepare_qat(lm()), quantize_model_ptq(lm())
    for call, match in ((lambda: prepare_qat(prepared), "is prepared already"), (lambda: prepare_qat(quantized), "is quantized already"),
                        (lambda: quantize_model_ptq(prepared), "convert_qat"), (lambda: convert_qat(lm()), "found no layer"),
                        (lambda: convert_qat(quantized), "found no layer"), (lambda: prepare_qat(3), "found int")):  # fmt: skip
        with pytest.raises(QuantizationError, match=match):
            call()


def test_fake_quantize_of_any_rounding():
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for bits, size, rounding in ((8, None, "mse"), (4, 16, "hqq"), (4, None, "nearest"), (4, -1, "nearest")):
        got = fake_quantize(w, bits, size, rounding)
        assert torch.equal(got, float_weights(**round_weights(w.detach(), bits, (size or -1) if bits == 4 else None, rounding), width=32))
        assert torch.equal(torch.autograd.grad(got.sum(), w)[0], torch.ones_like(w))


def test_an_encoder_of_torch_does_not_pass_its_layers_by():
    "torch's fast path computes with the weights itself; in a prepared model it is closed."
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()
    x = torch.randn(2, 5, 16)
    prepared = prepare_qat(encoder, bits=4).eval()
    with torch.no_grad():
        assert not torch.equal(prepared(x), encoder(x)) and torch.equal(prepared(x), convert_qat(prepared)(x))


def test_a_model_that_cannot_be_stepped_is_not_turned():
    "The trainer refuses it before it prepares it: its layers are still those of torch."
    from qtlm.optim import OptimizerError
    from qtlm.trainer import Trainer

    for model in (nn.Sequential(nn.Embedding(8, 32, sparse=True), nn.Linear(32, 8)), nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)).requires_grad_(False)):
        kinds = [type(module) for module in model]
        with pytest.raises(OptimizerError):
            Trainer(model, quantization_mode="qat", progress=False)
        assert [type(module) for module in model] == kinds
