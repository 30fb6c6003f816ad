# python -m pytest tests/test_lora.py
"Adapters: against peft, both ways; every kind of layer beneath; refusals that change nothing; merging; runs that go on."
import copy
import json
import logging
import sys

import pytest
import torch
from torch import nn

from qtlm.adapters import MergeReport, load_adapter, merge_lora, save_adapter
from qtlm.blockwise import BlockwiseLinear
from qtlm.checkpoint import load_checkpoint, save_checkpoint
from qtlm.config import ConfigError, LoRAConfig
from qtlm.finetuning import enable_finetuning_, trainable_tensors
from qtlm.lora import LoRAError, LoRALinear, apply_lora, get_nb_trainable_parameters, print_trainable_parameters
from qtlm.model import TinyLM
from qtlm.qat import prepare_qat
from qtlm.quantization import get_quantization_info, quantize_model_ptq
from qtlm.resume import assert_resume_exact
from qtlm.trainer import Trainer

TEXT = torch.tensor(list(b"It was a dark and stormy night, and the brig tossed. " * 12))
IDS = TEXT[:16][None]
SETTINGS = dict(max_steps=6, batch_size=2, block_size=16, learning_rate=1e-2, progress=False)


def lm(**fields):
    return TinyLM(**{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "block_size": 16} | fields, generator=torch.Generator().manual_seed(0))


def vit():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = dict(image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3)
    return stir(transformers.ViTForImageClassification(transformers.ViTConfig(**config)).eval(), size=0.05)  # new biases are zeros


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return stir(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)).eval(), size=0.05)


def stir(model, seed=1, size=0.2):
    "Give all that is trained other numbers, so that no zero hides a mistake."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}, [p.requires_grad for p in model.parameters()], [type(m) for m in model.modules()]


def same(a, b):
    return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(torch.equal(t, b[0][name]) for name, t in a[0].items())


PICTURES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(12)[None]
KINDS = {
    "vit": (vit, PICTURES, {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}),
    "vit rslora": (vit, PICTURES, {"target_modules": ["fc1", "q_proj"], "modules_to_save": ["classifier"], "use_rslora": True}),
    "vit dora": (vit, PICTURES, {"target_modules": ["q_proj", "fc2"], "modules_to_save": ["classifier"], "use_dora": True}),
    "vit dora rslora": (vit, PICTURES, {"target_modules": ["o_proj"], "modules_to_save": ["classifier", "vit.layernorm"], "use_dora": True, "use_rslora": True}),
    "gpt2": (gpt2, TOKENS, {"target_modules": ["c_attn", "mlp.c_proj"], "modules_to_save": ["ln_f"]}),
    "gpt2 dora": (gpt2, TOKENS, {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"], "use_dora": True}),
}


# ---- peft, both ways ----

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_peft_writes_and_qtlm_reads(kind, room):
    peft = pytest.importorskip("peft")
    make, inputs, fields = KINDS[kind]
    theirs = stir(peft.get_peft_model(make(), peft.LoraConfig(r=3, lora_alpha=5, **fields))).eval()
    theirs.save_pretrained(room)
    mine = load_adapter(make(), room).eval()
    assert torch.allclose(mine(inputs).logits, theirs(inputs).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mine(inputs).logits, make()(inputs).logits, rtol=1e-2, atol=1e-2)
    trained = sum(p.requires_grad for p in theirs.parameters())
    assert sum(p.requires_grad for p in mine.parameters()) == trained > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["manual", "peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_qtlm_writes_and_peft_reads(kind, backend, room):
    peft = pytest.importorskip("peft")
    make, inputs, fields = KINDS[kind]
    mine = stir(apply_lora(make(), r=3, lora_alpha=5, backend=backend, **fields)).eval()
    assert any(isinstance(m, LoRALinear) for m in mine.modules()) == (backend == "manual")
    save_adapter(mine, room)
    theirs = peft.PeftModel.from_pretrained(make(), room).eval()
    assert torch.allclose(mine(inputs).logits, theirs(inputs).logits, rtol=1e-5, atol=1e-5)
    again = load_adapter(make(), room).eval()
    assert torch.allclose(mine(inputs).logits, again(inputs).logits, rtol=1e-5, atol=1e-5)
    other = load_adapter(apply_lora(make(), r=3, lora_alpha=5, backend=backend, **fields), room).eval()  # into adapters that are there
    assert torch.equal(mine(inputs).logits, other(inputs).logits)
    merged = merge_lora(other)
    assert torch.allclose(merged(inputs).logits, mine(inputs).logits, rtol=1e-4, atol=1e-4)
    assert not hasattr(merged, "peft_config") and merged.state_dict().keys() == make().state_dict().keys() and [type(m) for m in merged.modules()] == [type(m) for m in make().modules()]


@pytest.mark.filterwarnings("ignore")
def test_the_same_seed_draws_what_peft_draws_and_names_mean_the_same():
    peft = pytest.importorskip("peft")
    for targets in (["q_proj", "mlp.fc1"], "all-linear", r".*\.1\..*(q_proj|fc2)"):
        torch.manual_seed(5)
        theirs = peft.get_peft_model(vit(), peft.LoraConfig(r=3, target_modules=targets, modules_to_save=["classifier"]))
        torch.manual_seed(5)
        mine = apply_lora(vit(), r=3, target_modules=targets, backend="manual")
        want = {n.replace("base_model.model.", "").replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
        have = {n: p for n, p in mine.named_parameters() if "lora_" in n}
        assert want.keys() == have.keys() and all(torch.equal(p, have[n]) for n, p in want.items())
        assert get_nb_trainable_parameters(mine)[0] == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.filterwarnings("ignore")
def test_dropout_is_peft_s_in_training(room):
    peft = pytest.importorskip("peft")
    for dora in (False, True):
        theirs = stir(peft.get_peft_model(vit(), peft.LoraConfig(r=3, lora_dropout=0.5, target_modules=["q_proj"], use_dora=dora))).train()
        theirs.save_pretrained(room)
        mine, outputs = load_adapter(vit(), room).train(), []
        for model in (mine, theirs):
            torch.manual_seed(7)
            outputs.append(model(PICTURES).logits)
        assert torch.allclose(*outputs, rtol=1e-5, atol=1e-5) and (outputs[0] - mine.eval()(PICTURES).logits).abs().max() > 1e-4


# ---- backends ----

def test_auto_says_whose_adapters_they_are(caplog, monkeypatch):
    pytest.importorskip("peft")
    request = {"target_modules": ["q_proj"], "r": 2}
    with caplog.at_level(logging.INFO, logger="qtlm"):
        by_peft, by_hand = apply_lora(lm(), **request), apply_lora(quantize_model_ptq(lm(), bits=4), **request)
        monkeypatch.setitem(sys.modules, "peft", None)
        alone = apply_lora(lm(), **request)
    assert [record.message for record in caplog.records] == [f"lora: adapters of {who} beside 2 layers, r = 2" for who in ("peft", "qtlm", "qtlm")]
    assert not any(isinstance(m, LoRALinear) for m in by_peft.modules())
    assert all(sum(isinstance(m, LoRALinear) for m in model.modules()) == 2 for model in (by_hand, alone))
    assert torch.equal(by_peft(IDS), lm()(IDS))


def test_peft_asked_for_and_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = lm()
    before = state(model)
    with pytest.raises(LoRAError, match=r"peft is not installed; expected it. Run `pip install qtlm\[vit\]`") as error:
        apply_lora(model, target_modules=["q_proj"], backend="peft")
    assert "\n" not in str(error.value) and same(state(model), before)
    with pytest.raises(ConfigError, match="backend: the text 'pfet'; expected one of auto, manual, peft"):
        apply_lora(model, backend="pfet")


@pytest.mark.filterwarnings("ignore")
def test_a_failure_in_peft_leaves_the_flags(monkeypatch):
    peft = pytest.importorskip("peft")
    model = lm()
    before = state(model)
    monkeypatch.setattr(peft, "inject_adapter_in_model", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        apply_lora(model, target_modules=["q_proj"], backend="peft")
    assert same(state(model), before)


# ---- refusals ----

@pytest.mark.parametrize("request_, message", [
    ({"target_modules": ["query"]}, "target_modules: 'query' matches no module; expected a linear layer: q_proj, k_proj"),
    ({"target_modules": ["q_proj", "qq"]}, "'qq' matches no module"),
    ({"target_modules": ["embed_tokens"]}, "names model.embed_tokens, Embedding, a kind that cannot have an adapter; expected a linear layer: q_proj"),
    ({"target_modules": ["*norm*"]}, "RMSNorm, a kind that cannot"),
    ({"target_modules": "q_proj"}, "write .'q_proj'."),
    ({"target_modules": "("}, "is no regular expression"),
    ({"target_modules": ["q_proj"], "exclude_modules": "("}, "is no regular expression"),
    ({"target_modules": ["q_proj"], "exclude_modules": ["z"]}, "exclude_modules: 'z' matches no module"),
    ({"target_modules": ["q_proj"], "exclude_modules": ["layers"]}, "no layer is left of 2"),
    ({"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}, "modules_to_save: 'classifier' matches no module; expected a module's name: model, lm_head"),
    ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head shares its weights with model.embed_tokens"),
    ({"target_modules": ["q_proj"], "modules_to_save": ["rope"]}, "matches no module"),
])
def test_a_request_that_cannot_be_met_changes_nothing(request_, message):
    model = lm()
    before = state(model)
    with pytest.raises(LoRAError, match=message) as error:
        apply_lora(model, **request_)
    assert "\n" not in str(error.value) and same(state(model), before)


def test_models_that_cannot_have_adapters():
    for model, message in [("text", "found str"), (apply_lora(lm(), target_modules=["q_proj"], backend="manual"), "has an adapter already"),
                           (prepare_qat(lm(), bits=8), "in quantization-aware training"), (torch.compile(lm()), "is compiled"),
                           (nn.Sequential(nn.ReLU()), "expected a linear layer: no linear layer")]:
        with pytest.raises(LoRAError, match=message):
            apply_lora(model, target_modules=["q_proj"])
    with pytest.raises(LoRAError, match="base_layer Embedding"):
        LoRALinear(nn.Embedding(2, 2))
    with pytest.raises(LoRAError, match="r=0"):
        LoRALinear(nn.Linear(2, 2), r=0)
    with pytest.raises(LoRAError, match="packed weights"):
        apply_lora(quantize_model_ptq(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), bits=8), target_modules=["0"], modules_to_save=["1"])


def test_a_peft_adapter_is_one_already():
    pytest.importorskip("peft")
    with pytest.raises(LoRAError, match="has an adapter already"):
        apply_lora(apply_lora(lm(), target_modules=["q_proj"], backend="peft"), target_modules=["k_proj"])


# ---- what is trained ----

@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"use_rslora": True, "lora_dropout": 0.2}])
def test_a_new_adapter_changes_nothing_and_only_it_is_trained(bits, more):
    model = lm() if bits is None else quantize_model_ptq(lm(), bits=bits)
    before = model(IDS)
    apply_lora(model, r=2, target_modules="all-linear", modules_to_save=["norm"], backend="manual", **more)
    assert torch.equal(model.eval()(IDS), before)
    learned = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learned == {n for n, _ in model.named_parameters() if ".lora_" in n or n == "model.norm.weight"}
    frozen = {n: t.clone() for n, t in model.state_dict().items() if n not in learned}
    trainer = Trainer(model, train_data=TEXT, **SETTINGS)
    assert {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    trainer.train()
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in frozen.items()) and len(frozen) > 15
    assert not torch.equal(model.eval()(IDS), before)


def test_a_model_whose_codes_were_trained_is_frozen():
    model = enable_finetuning_(quantize_model_ptq(lm(), bits=4))
    assert any(".lora_" not in name for name, _ in trainable_tensors(model))
    apply_lora(model, r=2, target_modules=["q_proj"])
    assert [name for name, _ in trainable_tensors(model) if ".lora_" not in name] == []


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_pass_through_integers(bits):
    torch.manual_seed(0)
    net = quantize_model_ptq(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8)), bits=bits)
    floats = nn.Sequential(*(nn.Linear(*m.shape[::-1]) for m in net))
    with torch.no_grad():
        for plain, m in zip(floats, net):
            plain.weight.copy_(m.dequantize())
            plain.bias.copy_(m.bias)
    x = torch.randn(6, 64)
    for model in (net, floats):
        torch.manual_seed(1)
        stir(apply_lora(model, r=2, target_modules=["0", "1", "2"], backend="manual"))(x).square().sum().backward()
    for a, b in zip(net, floats):
        for name in ("lora_A", "lora_B"):
            have, want = getattr(a, name).weight.grad, getattr(b, name).weight.grad
            assert (have - want).norm() < 0.05 * want.norm()  # activations are rounded to 8 bits on their way


def test_modules_that_read_weights_get_the_adapter_too():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = stir(apply_lora(nn.Sequential(layer), r=2, target_modules=["out_proj", "linear1"], modules_to_save=[], backend="manual"))
    x = torch.randn(2, 5, 16)
    slow = model.train()(x)
    slow.sum().backward()
    assert layer.self_attn.out_proj.lora_B.weight.grad.any()
    with torch.no_grad():
        fast = model.eval()(x)  # torch's fused path reads the weights
    merged = merge_lora(copy.deepcopy(model))(x)
    assert torch.allclose(slow, fast, atol=1e-5) and torch.allclose(slow, merged, atol=1e-5)


def test_counts_are_of_weights_not_of_bytes(capsys):
    counts = {get_nb_trainable_parameters(apply_lora(m, r=2, target_modules=["q_proj"], backend="manual")) for m in (lm(), *(quantize_model_ptq(lm(), bits=b) for b in (8, 4)))}
    (count,) = counts
    assert count.total == lm().num_parameters() + count.trainable and count.trainable == 2 * 2 * (32 + 32) and count.share == count.trainable / count.total

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 64, 32
            self.register_buffer("codes", torch.zeros(1024, dtype=torch.uint8))

    assert get_nb_trainable_parameters(nn.Sequential(Packed(), nn.Linear(2, 3))) == (9, 64 * 32 + 9, 9 / (64 * 32 + 9))
    print_trainable_parameters(nn.Linear(3, 5))
    assert capsys.readouterr().out == "trainable params: 20 || all params: 20 || trainable%: 100.0000\n"


@pytest.mark.parametrize("backend", ["manual", "peft"])
def test_bfloat16_beneath(backend):
    if backend == "peft": pytest.importorskip("peft")
    model = apply_lora(lm().bfloat16(), r=2, target_modules=["q_proj"], backend=backend)
    assert torch.equal(model(IDS), lm().bfloat16()(IDS)) and model(IDS).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_layer_in_two_places_has_one_adapter():
    shared = nn.Linear(4, 4)
    model = stir(apply_lora(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}), target_modules=["a"], backend="manual"))
    assert model["a"] is model["b"][0] and isinstance(model["a"], LoRALinear)
    want = model["a"].merged_weight().detach()
    merge_lora(model)
    assert model["a"] is model["b"][0] is shared and torch.equal(shared.weight, want)


# ---- runs ----

def maker(bits, backend="manual", **fields):
    def make():
        model = lm(num_hidden_layers=1)
        model = quantize_model_ptq(model, bits=bits) if bits else model
        apply_lora(model, r=2, lora_dropout=0.1, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"], backend=backend, **fields)
        return Trainer(model, train_data=TEXT, gradient_accumulation_steps=2, warmup_steps=2, **SETTINGS)
    return make


@pytest.mark.parametrize("make", [maker(None), maker(4), maker(8, use_dora=True)], ids=["float", "INT4", "INT8 DoRA"])
def test_a_resumed_run_is_exact(make):
    assert assert_resume_exact(make, at=[1, 4]) == 2


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_with_peft_is_exact():
    pytest.importorskip("peft")
    assert assert_resume_exact(maker(None, "peft"), at=[3]) == 1


@pytest.mark.parametrize("bits", [None, 4])
def test_checkpoints(bits, room):
    model = stir(maker(bits)().model)
    save_checkpoint(model, step=3, path=room)
    other = maker(bits)().model
    load_checkpoint(room, model=other)
    assert torch.equal(other.eval()(IDS), model.eval()(IDS))
    if bits:  # into the float model with adapters, which becomes the quantized one
        again = maker(None)().model
        load_checkpoint(room, model=again)
        assert torch.equal(again.eval()(IDS), model(IDS)) and get_quantization_info(again).layers.keys() == get_quantization_info(model).layers.keys()


# ---- files ----

@pytest.fixture
def saved(room):
    save_adapter(stir(apply_lora(lm(), r=2, target_modules=["q_proj"], modules_to_save=["norm"], backend="manual")), room)
    return room


def test_a_file_has_what_was_trained_and_leaves_nothing_beside_it(saved):
    from safetensors.torch import load_file
    names = load_file(saved / "adapter_model.safetensors").keys()
    prefix = "base_model.model.model."
    assert names == {prefix + "norm.weight"} | {f"{prefix}layers.{i}.self_attn.q_proj.lora_{x}.weight" for i in (0, 1) for x in "AB"}
    assert sorted(path.name for path in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.norm"] and config["r"] == 2 and config["lora_alpha"] == 16 and config["fan_in_fan_out"] is False


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: found no such file"),
    (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json: found Expecting"),
    (lambda f: change(f, peft_type="IA3"), "peft_type = IA3"),
    (lambda f: change(f, bias="all"), "bias = all"),
    (lambda f: change(f, rank_pattern={"q": 3}), "rank_pattern"),
    (lambda f: change(f, r="x"), "r: the text 'x'"),
    (lambda f: change(f, r=3), r"lora_A.weight is \(2, 32\); expected \(3, 32\)"),
    (lambda f: change(f, use_dora=True), "lora_magnitude_vector is nothing; expected"),
    (lambda f: change(f, modules_to_save=None), "found a tensor for model.norm.weight"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: not found"),
    (lambda f: ((f / "adapter_model.safetensors").rename(f / "adapter_model.bin")), "a pickle, which is never loaded"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b"12345678"), "damaged"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]), "damaged"),
    (lambda f: rewrite(f, lambda t: t | {"base_model.model.model.norm.weight": torch.full((32,), float("nan"))}), "NaN or infinity"),
    (lambda f: rewrite(f, lambda t: t | {"base_model.model.other.lora_A.weight": torch.zeros(2, 2)}), "found a tensor for other"),
    (lambda f: rewrite(f, lambda t: dict(list(t.items())[1:])), "is nothing; expected|found a tensor|nothing"),
    (lambda f: rewrite(f, lambda t: {}), "no adapter"),
])
def test_a_file_that_does_not_fit_changes_nothing(saved, damage, message):
    damage(saved)
    for model in (lm(), apply_lora(lm(), r=2, target_modules=["q_proj"], modules_to_save=["norm"], backend="manual")):
        before = state(model)
        with pytest.raises(LoRAError, match=message) as error:
            load_adapter(model, saved)
        assert "\n" not in str(error.value) and same(state(model), before)


def change(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(folder, how):
    from safetensors.torch import load_file, save_file
    save_file(how(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")


def test_other_adapters_in_the_model(saved):
    for fields, message in [({"r": 3}, "lora_A.weight|r is 2; expected 3"), ({"lora_alpha": 1}, "lora_alpha is 16.0; expected 1.0"), ({"use_rslora": True}, "use_rslora is False; expected True"),
                            ({"target_modules": ["q_proj", "k_proj"]}, "target_modules is")]:
        model = apply_lora(lm(), **{"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"], "backend": "manual"} | fields)
        before = state(model)
        with pytest.raises(LoRAError, match=message):
            load_adapter(model, saved)
        assert same(state(model), before)
    by_hand = lm()
    by_hand.model.layers[0].self_attn.q_proj = LoRALinear(by_hand.model.layers[0].self_attn.q_proj, r=2)
    with pytest.raises(LoRAError, match="q_proj: has an adapter already"):
        load_adapter(by_hand, saved)
    with pytest.raises(LoRAError, match="found no adapter that apply_lora made"):
        save_adapter(lm(), saved)
    (saved / "file").write_text("")
    with pytest.raises(LoRAError, match="cannot be written"):
        save_adapter(apply_lora(lm(), target_modules=["q_proj"], backend="manual"), saved / "file" / "x")


def test_names_that_are_ends_of_other_names(room):
    def make():
        torch.manual_seed(0)
        return nn.ModuleDict({"q": nn.Linear(4, 4), "inner": nn.ModuleDict({"q": nn.Linear(4, 4)})})

    model = stir(apply_lora(make(), target_modules="q", modules_to_save=[], backend="manual"))
    save_adapter(model, room)
    other = load_adapter(make(), room)
    assert isinstance(other["q"], LoRALinear) and not isinstance(other["inner"]["q"], LoRALinear)
    assert torch.equal(other["q"].weight, model["q"].weight)
    pytest.importorskip("peft")
    by_peft = apply_lora(make(), target_modules="q", modules_to_save=[], backend="peft")
    assert type(by_peft["inner"]["q"]) is nn.Linear and type(by_peft["q"]) is not nn.Linear


# ---- merging ----

@pytest.mark.parametrize("bits", [8, 4])
def test_merging_nothing_into_integers_is_nothing(bits):
    model = quantize_model_ptq(lm(), bits=bits)
    before = state(model)[0]
    merged = merge_lora(apply_lora(model, target_modules="all-linear", use_dora=bits == 8, backend="manual"))
    assert merged is model and before.keys() == model.state_dict().keys()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.items()) and model.merge_report.max_error == 0


@pytest.mark.parametrize("rounding", ["nearest", "mse", "hqq"])
@pytest.mark.parametrize("bits", [8, 4])
def test_merging_into_integers_is_rounding_the_sum(bits, rounding):
    torch.manual_seed(0)
    model = quantize_model_ptq(nn.Sequential(nn.Linear(64, 32)), bits=bits, rounding=rounding)
    apply_lora(model, r=2, target_modules=["0"], backend="manual")
    with torch.no_grad():
        model[0].lora_B.weight[3:9].normal_()  # some rows only
    asked, base = model[0].merged_weight().detach(), model[0].base_layer
    before = {name: t.clone() for name, t in base.named_buffers()}
    batches = [(torch.randn(7, 64), torch.randint(32, (7,)))]
    merge_lora(model, batches)
    row, rows = model.merge_report.layers["0"], torch.zeros(32, dtype=torch.bool)
    rows[3:9] = True
    assert model[0] is base and all(torch.equal(t[~rows], before[name][~rows]) for name, t in base.named_buffers())
    assert row.max_error == (base.dequantize() - asked).abs().max() > 0 and 0 < row.lost < (0.03 if bits == 8 else 0.3)
    assert model.merge_report.loss_before != model.merge_report.loss_after
    assert (base.dequantize() - asked)[rows].square().sum() <= 1.02 * (quantize_model_ptq(linear(asked), bits=bits, rounding=rounding)[0].dequantize() - asked)[rows].square().sum()
    report = model.merge_report
    after = state(model)[0]
    assert merge_lora(model) is model and model.merge_report is report and all(torch.equal(t, model.state_dict()[n]) for n, t in after.items())


def test_merging_into_what_gptq_rounded():
    torch.manual_seed(0)
    model = quantize_model_ptq(nn.Sequential(nn.Linear(64, 32)), calibration_data=[torch.randn(99, 64)], bits=4, rounding="gptq")
    assert model[0].rounding == "gptq"
    merge_lora(stir(apply_lora(model, r=2, target_modules=["0"], modules_to_save=[])))
    assert 0 < model.merge_report.layers["0"].lost < 0.3


def linear(weight):
    net = nn.Sequential(nn.Linear(*weight.shape[::-1]))
    net[0].weight.data.copy_(weight)
    return net


def test_merging_is_refused_whole():
    tied = apply_lora(lm(), target_modules=["q_proj", "lm_head"], backend="manual")
    stir(tied)
    before = state(tied)
    with pytest.raises(LoRAError, match="lm_head: shares its weight with model.embed_tokens"):
        merge_lora(tied)
    assert same(state(tied), before)
    hot = stir(apply_lora(lm().half(), target_modules=["q_proj"], backend="manual"))
    with torch.no_grad():
        hot.model.layers[1].self_attn.q_proj.lora_B.weight.fill_(1e6)
    before = state(hot)
    with pytest.raises(LoRAError, match="layers.1.self_attn.q_proj: the merged weight is not finite in torch.float16"):
        merge_lora(hot)
    assert same(state(hot), before)
    with pytest.raises(LoRAError, match="found no adapter"):
        merge_lora(lm())


class Halved(nn.Module):
    "A packed layer of somebody else's: whole numbers, in steps of a half."

    def __init__(self, bits=16):
        super().__init__()
        self.in_features, self.out_features, self.frozen, self.bias = 8, 4, False, None
        self.register_buffer("codes", torch.arange(32).view(4, 8).to(torch.int16))

    def dequantize(self): return self.codes.float() / 2
    def requantize(self, weight): return {"codes": (weight * 2).round().to(torch.int16)}
    def forward(self, x): return x @ self.dequantize().t()


def test_packed_layers_of_others(room):
    model = apply_lora(nn.Sequential(Halved()), r=2, target_modules="all-linear", use_dora=True)
    x = torch.randn(3, 8)
    assert torch.equal(model(x), Halved()(x)) and model[0].base_layer.frozen
    stir(model)(x).sum().backward()
    assert model[0].lora_A.weight.grad.any() and get_nb_trainable_parameters(model).total == 32 + 2 * 12 + 4
    save_adapter(model, room)
    assert torch.equal(load_adapter(nn.Sequential(Halved()), room)(x), model(x))
    asked = model[0].merged_weight().detach()
    merge_lora(model)
    assert isinstance(model[0], Halved) and torch.equal(model[0].codes, (asked * 2).round().to(torch.int16))
    assert isinstance(model.merge_report, MergeReport) and 0 < model.merge_report.max_error <= 0.25 + 1e-5
    model[0].requantize = None
    del Halved.requantize
    again = apply_lora(model, target_modules=["0"])
    del vars(again[0].base_layer)["requantize"]
    with pytest.raises(LoRAError, match="0: Halved has no weights that can be written"):
        merge_lora(again)


@pytest.mark.parametrize("scheme", [{}, {"double_quant": True}, {"quant_type": "fp4"}, {"quant_type": "int4", "blocksize": 128}])
def test_a_four_bit_backbone(scheme, room):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(BlockwiseLinear.from_linear(nn.Linear(64, 32), **scheme), nn.ReLU(), BlockwiseLinear.from_linear(nn.Linear(32, 16), **scheme), nn.Linear(16, 3))

    model, x = make(), torch.randn(5, 64)
    before, buffers = model(x), {name: t.clone() for name, t in model.named_buffers()}
    apply_lora(model, r=2, target_modules="all-linear", exclude_modules=["3"], modules_to_save=["3"])
    assert torch.equal(model(x), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"3.weight", "3.bias", *(f"{i}.lora_{m}.weight" for i in "02" for m in "AB")}
    batch = (x, torch.tensor([0, 1, 2, 0, 1]))
    Trainer(model, train_data=[batch], max_steps=8, learning_rate=1e-2, progress=False).train()
    assert all(torch.equal(t, model.state_dict()[name.replace(".", ".base_layer.", 1)]) for name, t in buffers.items()) and len(buffers) >= 4
    save_adapter(model, room)
    assert torch.equal(load_adapter(make(), room).eval()(x), model.eval()(x))
    asked = [model[i].merged_weight().detach() for i in (0, 2)]
    report = merge_lora(model, [batch]).merge_report
    assert report.layers["0"].max_error == (model[0].dequantize() - asked[0]).abs().max() and report.loss_after != report.loss_before
    assert [row.kind for row in report.layers.values()] == [f"BlockwiseLinear {scheme.get('quant_type', 'nf4')}"] * 2
    fresh = make()
    merge_lora(apply_lora(fresh, r=2, target_modules=["0", "2"], modules_to_save=[]))
    assert all(torch.equal(t, buffers[name]) for name, t in fresh.named_buffers()) and fresh.merge_report.max_error == 0


def test_config_forms():
    config = LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=[], backend="manual")
    forms = [apply_lora(lm(), config), apply_lora(lm(), config.to_dict()), apply_lora(lm(), config, r=2), apply_lora(lm(), {"rank": 2, "target_modules": ["q_proj"], "backend": "manual"})]
    assert len({str(model) for model in forms}) == 1
    assert apply_lora(model := lm(), config, enabled=False) is model and not any(isinstance(m, LoRALinear) for m in model.modules())
    with pytest.raises(LoRAError, match="config: found int"):
        apply_lora(lm(), 3)
    with pytest.raises(ConfigError, match="Did you mean target_modules"):
        apply_lora(lm(), target_module=["q_proj"])
