# python -m pytest tests/test_lora_vit.py
"""A vision transformer, quantized and adapted: what is replaced, what is refused, and the same through transformers, peft and bitsandbytes."""
import copy
import logging
import sys

import pytest
import torch
from torch import nn

from qtlm.account import get_quantization_info
from qtlm.adapters import load_adapter, save_adapter
from qtlm.base import frozen_tensors
from qtlm.blockwise import BlockwiseLinear
from qtlm.checkpoint import load_checkpoint, save_checkpoint
from qtlm.config import BackboneQuantizationConfig, ConfigError, ModelConfig, ViTConfig
from qtlm.layers import QuantizationError
from qtlm.lora import LoRAError, LoRALinear, apply_lora, get_nb_trainable_parameters
from qtlm.lora_vit import build_model, quantize_backbone
from qtlm.model import TinyLM
from qtlm.quantization import dequantize_model, quantization_metadata
from qtlm.resume import assert_resume_exact
from qtlm.storage import CheckpointMismatchError
from qtlm.trainer import Trainer
from qtlm.vit import ViT

SHAPE = ViTConfig(image_size=8, patch_size=4, num_channels=1, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, num_labels=5)
IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def vit(**fields):
    "A ViT with weights from a seed."
    return ViT(SHAPE, generator=torch.Generator().manual_seed(1), **fields)


def copied(model):
    "The tensors of a model as they are now."
    return {name: t.clone() for name, t in model.state_dict().items()}


def unchanged(model, before, kinds=(nn.Linear,)):
    "Whether a model is float, trainable and has the weights from `before`."
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(t, before[name]) for name, t in now.items()) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
def test_layers_are_those_of_from_linear(quant_type, double_quant, blocksize):
    "Codes and scales are BlockwiseLinear's, the head and all that is no linear layer keep their floats, and the account adds up."
    plain, model = vit(), vit()
    quantize_backbone(model, quant_type=quant_type, double_quant=double_quant, blocksize=blocksize)
    packed = {name: m for name, m in model.named_modules() if type(m) is BlockwiseLinear}
    assert len(packed) == 12 and type(model.classifier) is nn.Linear
    for name, layer in packed.items():
        other = BlockwiseLinear.from_linear(plain.get_submodule(name), quant_type, blocksize, double_quant)
        assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), other.state_dict().values(), strict=True))
    rows = {row.name: row for row in model.quantization_report.rows}
    assert {name for name, row in rows.items() if row.bits} == packed.keys()
    assert all(rows[name].bytes == sum(t.nbytes for t in layer.state_dict().values()) for name, layer in packed.items())
    float_names = {name for name, m in plain.named_modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))}
    assert rows.keys() == float_names and all(rows[name].reason for name in float_names - packed.keys())


@pytest.mark.parametrize("skip, left", [(["q_proj"], 10), (["layers.1"], 6), (["vit.layers.0.mlp.fc1"], 11), (["*.attention.*"], 4), (["q_proj", "fc?", "*.fc?"], 6)])
def test_skip_modules(skip, left):
    "Names, ends of names and globs; what is skipped is float and frozen."
    if skip == ["q_proj", "fc?", "*.fc?"]:  # a glob stands for whole names
        with pytest.raises(QuantizationError, match=r"skip_modules: 'fc\?' matches no module"):
            quantize_backbone(vit(), skip_modules=skip)
        skip = ["q_proj", "*.fc?"]
    model = quantize_backbone(vit(), skip_modules=skip)
    assert sum(type(m) is BlockwiseLinear for m in model.modules()) == left
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("options, says", [
    ({"skip_modules": ["decoder"]}, "skip_modules: 'decoder' matches no module; expected names or globs of modules, such as q_proj"),
    ({"skip_modules": ["vit"]}, "model: no linear layer can be quantized"),
    ({"quant_type": "nf8"}, "quant_type: the text 'nf8'; expected one of nf4, fp4, int4"),
    ({"blocksize": 48}, "blocksize: 48; expected one of 32, 64"),
    ({"quant_type": "int4", "backend": "bitsandbytes"}, "quant_type: int4 with backend = bitsandbytes"),
    ({"config": 7}, "config: found int; expected a BackboneQuantizationConfig"),
])
def test_refused_requests_change_nothing(options, says):
    "One line, and the model as it was."
    model = vit()
    before = copied(model)
    with pytest.raises((QuantizationError, ConfigError)) as caught:
        quantize_backbone(model, **options)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert unchanged(model, before) and not hasattr(model, "quantization_report")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_last_layer_that_fails_undoes_all(value):
    "Weights that are not finite are found in the last layer, and the first is still float."
    model = vit()
    model.vit.layers[1].mlp.fc2.weight.data[3, 3] = value
    before = copied(model)
    with pytest.raises(QuantizationError, match="vit.layers.1.mlp.fc2: found weights that hold NaN or infinity"):
        quantize_backbone(model)
    assert type(model.vit.layers[0].attention.q_proj) is nn.Linear and model.state_dict().keys() == before.keys()
    assert all(p.requires_grad for p in model.parameters())


def test_models_that_are_refused():
    "What has adapters, what is quantized already, what is no model, what has no weights yet."
    for model, says in ((apply_lora(vit(), target_modules=["q_proj"], backend="manual"), "has an adapter already"), (quantize_backbone(vit()), "no linear layer can be quantized"),
                        (7, "model: found int"), (vit().to("meta"), "found weights on meta")):  # fmt: skip
        with pytest.raises(QuantizationError, match=says):
            quantize_backbone(model)


def test_shared_weights_stay():
    "A language model with a tied head keeps both floats; a module in two places is replaced in both."
    model = quantize_backbone(TinyLM(ModelConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, block_size=32)))
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight and not model.lm_head.weight.requires_grad
    twice = nn.Linear(64, 64)
    both = quantize_backbone(nn.Sequential(twice, nn.ReLU(), twice))
    assert both[0] is both[2] and type(both[0]) is BlockwiseLinear
    tied = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    tied[0].weight = tied[2].weight
    quantize_backbone(tied)
    assert [type(m) for m in tied] == [nn.Linear, BlockwiseLinear, nn.Linear]
    assert {row.name: row.reason for row in tied.quantization_report.rows if row.reason} == {"0": "its weight is shared", "2": "its weight is shared"}


def test_what_is_trained_whole_stays_float():
    "modules_to_save are kept out of quantization, and are trained."
    model = build_model(SHAPE.replace(lora={"backend": "manual", "modules_to_save": ["classifier", "layers.1.mlp.fc2"]}, quantization={}), vit())
    assert type(model.vit.layers[1].mlp.fc2) is nn.Linear and type(model.vit.layers[0].mlp.fc2) is BlockwiseLinear
    assert model.vit.layers[1].mlp.fc2.weight.requires_grad and model.classifier.weight.requires_grad


def test_switched_off():
    "enabled: false changes nothing."
    model = vit()
    before = copied(model)
    assert quantize_backbone(model, enabled=False) is model and unchanged(model, before)


def test_compute_dtype():
    "That of the input unless one is named."
    assert quantize_backbone(vit()).vit.layers[0].mlp.fc1.compute_dtype is None
    named = quantize_backbone(vit(), BackboneQuantizationConfig(compute_dtype="bf16"))
    assert named.vit.layers[0].mlp.fc1.compute_dtype == torch.bfloat16 and named(IMAGES).dtype == torch.float32


INVALID = [  # what is written, and the section and key that the error must name
    ({"lora": {"r": 0}}, "lora.r"), ({"lora": {"r": -4}}, "lora.r"), ({"lora": {"r": 8.5}}, "lora.r"), ({"lora": {"r": "eight"}}, "lora.r"),
    ({"lora": {"r": 65}}, "lora.r"), ({"lora": {"lora_alpha": 0}}, "lora.lora_alpha"), ({"lora": {"lora_dropout": 1.0}}, "lora.lora_dropout"),
    ({"lora": {"lora_dropout": -0.1}}, "lora.lora_dropout"), ({"lora": {"target_modules": []}}, "lora.target_modules"),
    ({"lora": {"target_modules": "query"}}, "lora.target_modules"), ({"lora": {"target_modules": ["gate_proj"]}}, "lora.target_modules"),
    ({"lora": {"target_modules": ["layernorm_before"]}}, "lora.target_modules"), ({"lora": {"exclude_modules": ["layers.7"]}}, "lora.exclude_modules"),
    ({"lora": {"modules_to_save": ["tail"]}}, "lora.modules_to_save"), ({"lora": {"backend": "pfet"}}, "lora.backend"),
    ({"lora": {"backend": "peft"}, "quantization": {}}, "lora.backend"), ({"lora": {"rnak": 8}}, "lora.rnak"), ({"lora": 8}, "lora"),
    ({"quantization": {"quant_type": "nf5"}}, "quantization.quant_type"), ({"quantization": {"blocksize": 100}}, "quantization.blocksize"),
    ({"quantization": {"double_quant": "yes"}}, "quantization.double_quant"), ({"quantization": {"compute_dtype": "int8"}}, "quantization.compute_dtype"),
    ({"quantization": {"backend": "gptq"}}, "quantization.backend"), ({"quantization": {"quant_type": "int4", "backend": "bitsandbytes"}}, "quantization.quant_type"),
    ({"quantization": {"skip_modules": ["decoder"]}}, "quantization.skip_modules"), ({"quantization": {"quant_typ": "nf4"}}, "quantization.quant_typ"),
    ({"quantization": {"backend": "bitsandbytes", "bits": 4}}, "quantization.bits"),
]  # fmt: skip
HINTS = {"lora.rnak": "Did you mean rank?", "quantization.quant_typ": "Did you mean quant_type?", "lora.backend": "peft", "quantization.quant_type": "nf4"}


@pytest.mark.parametrize("sections, key", INVALID, ids=[str(i) for i in range(len(INVALID))])
def test_invalid_configurations(sections, key):
    "At least 25 of them: one line each, with section and key; a backbone given is not touched."
    model = vit()
    before = copied(model)
    with pytest.raises(ConfigError) as caught:
        build_model(SHAPE.to_dict() | sections, model)
    line = str(caught.value)
    assert f": {key}: " in line and "\n" not in line and ("expected" in line) and HINTS.get(key, "") in line
    assert len(line) <= 300 and unchanged(model, before) and len(INVALID) >= 25


def test_missing_packages(monkeypatch):
    "Asked for and missing: one line that names the extra."
    for package in ("bitsandbytes", "peft", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    for config, backbone, key in ((SHAPE.replace(quantization={"backend": "bitsandbytes"}), None, "quantization.backend: bitsandbytes"),
                                  (SHAPE.replace(lora={"backend": "peft"}), None, "lora.backend: peft"), (SHAPE, "some/model", "backbone: transformers")):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"{key} is not installed; expected .* Run `pip install qtlm\[vit\]`"):
            build_model(config, backbone)
    whole = build_model(SHAPE.replace(lora={}, quantization={}))
    assert sum(type(m) is LoRALinear for m in whole.modules()) == 4


def test_the_log_tells(caplog):
    "One line for the quantization, one for the adapters."
    with caplog.at_level(logging.INFO, "qtlm"):
        build_model(SHAPE.replace(lora={"backend": "manual"}, quantization={}))
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["quantization", "lora"]


@pytest.fixture
def transformers():
    "The library, where it is installed."
    return pytest.importorskip("transformers")


@pytest.fixture
def folder(transformers, tmp_path):
    "A ViT as transformers saves it, and the logits that it gives."
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**vit().to_vit_config()))
    model.load_state_dict(vit().state_dict())
    model.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_bitsandbytes_has_the_same_bytes():
    "Codes and absmax of its layers are those of ours, and so are the models' logits; its inference on some processors is in bfloat16, its training is not."
    pytest.importorskip("bitsandbytes")
    for quant_type in ("nf4", "fp4"):
        for blocksize in (32, 64):
            options = {"quant_type": quant_type, "blocksize": blocksize}
            ours, theirs = quantize_backbone(vit(), **options), quantize_backbone(vit(), backend="bitsandbytes", **options)
            for name, layer in ((name, m) for name, m in ours.named_modules() if type(m) is BlockwiseLinear):
                other = theirs.get_submodule(name)
                assert type(other).__name__ == "Linear4bit" and torch.equal(other.weight.data.flatten(), layer.codes)
                assert torch.equal(other.weight.quant_state.absmax, layer.absmax)
            assert torch.allclose(ours(IMAGES), theirs(IMAGES), atol=1e-5)
            assert [row.bytes for row in ours.quantization_report.rows] == [row.bytes for row in theirs.quantization_report.rows]
            assert {n for n, p in theirs.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}


def test_what_bitsandbytes_unpacks_wrongly():
    "Rows that are no whole number of blocks, on a processor: refused, nothing changed. Where it is right one day, this test says so."
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    assert (functional.dequantize_4bit(*functional.quantize_4bit(w, quant_type="nf4")) - w).abs().max() > 1
    model = vit()
    before = copied(model)
    with pytest.raises(ConfigError, match="ViTConfig: quantization.backend: bitsandbytes unpacks vit.layers.0.attention.q_proj wrongly"):
        build_model(SHAPE.replace(quantization={"backend": "bitsandbytes", "blocksize": 128}), model)
    assert unchanged(model, before)


def test_double_quantization_of_bitsandbytes():
    "The second level too: 8-bit codes of the absmax."
    pytest.importorskip("bitsandbytes")
    ours, theirs = quantize_backbone(vit(), double_quant=True), quantize_backbone(vit(), backend="bitsandbytes", double_quant=True)
    for layer, other in zip(ours.vit.layers[0].mlp.children(), theirs.vit.layers[0].mlp.children(), strict=True):
        assert torch.equal(other.weight.quant_state.absmax, layer.absmax_codes) and torch.equal(other.weight.quant_state.state2.absmax, layer.absmax_scale)
    assert [row.bytes for row in ours.quantization_report.rows] == [row.bytes for row in theirs.quantization_report.rows]


def test_from_a_folder(folder):
    "What transformers has saved gives its own logits; more classes get a new head; a field that contradicts it is refused."
    model = build_model(ViTConfig(), folder)
    assert type(model).__name__ == "ViTForImageClassification" and torch.equal(model.eval()(IMAGES).logits, vit().eval()(IMAGES))
    assert build_model(ViTConfig(num_labels=9), folder)(IMAGES).logits.shape == (6, 9)
    with pytest.raises(ConfigError, match="ViTConfig: hidden_size: 48; expected 64, which the backbone given has. Leave it out."):
        build_model(ViTConfig(hidden_size=48), folder)


def test_from_a_configuration_of_transformers(transformers):
    "Its own configuration builds its own model, which is quantized and adapted like ours."
    torch.manual_seed(0)
    theirs = transformers.ViTConfig(**vit().to_vit_config())
    model = build_model(ViTConfig(lora={"backend": "manual", "r": 4}, quantization={}), theirs)
    assert type(model).__name__ == "ViTForImageClassification" and sum(type(m) is LoRALinear for m in model.modules()) == 4
    assert Trainer(model, train_data=[(IMAGES, LABELS)], max_steps=1, progress=False).train().losses[0] > 0


def test_other_kinds_are_refused(transformers, tmp_path, monkeypatch):
    "A model that is no ViT, and a folder that is not there."
    transformers.BertConfig(hidden_size=16).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="backbone: .* is of type bert; expected vit"):
        build_model(ViTConfig(), tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="backbone: .* cannot be read .* expected a folder or Hub id of a ViT") as caught:
        build_model(ViTConfig(), tmp_path / "empty")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", [None, {"backend": "bitsandbytes"}])
def test_damaged_weights_are_refused(folder, section):
    "A file that is cut short, and one that is not there."
    if section:
        pytest.importorskip("bitsandbytes"), pytest.importorskip("accelerate")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    for remove in (False, True):
        if remove:
            file.unlink()
        with pytest.raises(ConfigError, match="backbone: .* cannot be read .*; expected a folder or Hub id of a ViT") as caught:
            build_model(ViTConfig(quantization=section), folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["auto", "manual"])
def test_loaded_in_4_bits_by_transformers(folder, backend):
    "BitsAndBytesConfig packs while it reads: the bytes are ours, the head is float and trained, and adapters learn beside it."
    pytest.importorskip("bitsandbytes"), pytest.importorskip("accelerate")
    if backend == "auto":
        pytest.importorskip("peft")
    sections = {"lora": {"backend": backend, "r": 4}, "quantization": {"backend": "bitsandbytes", "double_quant": True, "skip_modules": ["*.0.mlp.fc1"]}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(ViTConfig(**sections), folder)
    ours = quantize_backbone(vit(), double_quant=True, skip_modules=["*.0.mlp.fc1"])
    assert model.is_loaded_in_4bit and model.quantization_method == "bitsandbytes"
    assert torch.allclose(model.train()(IMAGES).logits, ours.train()(IMAGES), atol=1e-5)
    packed = {name.replace(".base_layer", ""): m for name, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert packed.keys() == {name for name, m in ours.named_modules() if type(m) is BlockwiseLinear} and len(packed) == 11
    codes = {name: m.weight.data.clone() for name, m in packed.items()}
    assert all(torch.equal(c.flatten(), ours.get_submodule(name).codes) for name, c in codes.items())
    losses = Trainer(model, train_data=[(IMAGES, LABELS)] * 8, max_steps=8, learning_rate=2e-2, progress=False).train().losses
    assert losses[-1] < losses[0] and all(torch.equal(m.weight.data, codes[name]) for name, m in packed.items())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in trained) and len(trained) == 8 + 2


def test_what_is_trained_whole_is_not_packed_by_transformers(folder):
    "modules_to_save are kept out of BitsAndBytesConfig's way, too."
    pytest.importorskip("bitsandbytes"), pytest.importorskip("accelerate")
    lora = {"backend": "manual", "modules_to_save": ["classifier", "layers.1.mlp.fc2"]}
    model = build_model(ViTConfig(lora=lora, quantization={"backend": "bitsandbytes"}), folder)
    assert type(model.vit.layers[1].mlp.fc2) is nn.Linear and model.vit.layers[1].mlp.fc2.weight.requires_grad
    assert type(model.vit.layers[0].mlp.fc2).__name__ == "Linear4bit"


def test_a_pattern_is_checked_before_loading(folder):
    "The way through BitsAndBytesConfig says the same of a pattern that names nothing."
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match="ViTConfig: quantization.skip_modules: 'tail' matches no module"):
        build_model(ViTConfig(quantization={"backend": "bitsandbytes", "skip_modules": ["tail"]}), folder)


@pytest.mark.parametrize("backend", ["manual", "peft"])
def test_adapters_beside_bitsandbytes_are_saved(backend, tmp_path):
    "What was learned beside its layers goes through peft's files into a model built anew."
    pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    section = {"backend": "bitsandbytes"}
    model = build_model(SHAPE.replace(lora={"backend": backend, "r": 4}, quantization=section), vit())
    Trainer(model, train_data=[(IMAGES, LABELS)] * 4, max_steps=4, learning_rate=2e-2, progress=False).train()
    save_adapter(model, tmp_path)
    again, fresh = load_adapter(build_model(SHAPE.replace(quantization=section), vit()), tmp_path), build_model(SHAPE.replace(quantization=section), vit())
    assert torch.allclose(again.train()(IMAGES), model.train()(IMAGES), atol=1e-5) and (fresh.train()(IMAGES) - model(IMAGES)).abs().max() > 0.01


def beside(lora="peft", seed=1, **quantization):
    "A backbone packed by bitsandbytes with adapters beside it, as a new process would build it."
    pytest.importorskip("bitsandbytes")
    if lora == "peft":
        pytest.importorskip("peft")
    torch.manual_seed(2)
    start = ViT(SHAPE, generator=torch.Generator().manual_seed(seed))
    return build_model(SHAPE.replace(lora={"backend": lora, "r": 4, "lora_dropout": 0.1}, quantization={"backend": "bitsandbytes"} | quantization), start)


def said(model):
    "What a model says of the pictures, in evaluation mode."
    with torch.no_grad():
        return model.eval()(IMAGES)


@pytest.mark.parametrize("save_frozen", [True, False])
@pytest.mark.parametrize("lora", ["peft", "manual"])
@pytest.mark.parametrize("scheme", [{"double_quant": True}, {"quant_type": "fp4", "blocksize": 32}])
def test_layers_of_bitsandbytes_in_checkpoints(scheme, lora, save_frozen, room):
    "Packed bytes, scales and adapters come back, as plain tensors, into a model built the same way; a whole checkpoint even over another backbone."
    model = beside(lora, **scheme)
    Trainer(model, train_data=[(IMAGES, LABELS)] * 2, max_steps=2, learning_rate=2e-2, progress=False).train()
    path = save_checkpoint(model, None, None, None, 2, room, save_frozen=save_frozen)
    tensors = torch.load(path / "model.pt", weights_only=True)
    assert any(name.endswith("weight.absmax") for name in tensors) == save_frozen and {type(t) for t in tensors.values()} == {torch.Tensor}
    again = beside(lora, seed=7 if save_frozen else 1, **scheme)
    assert not torch.equal(said(again), said(model))
    load_checkpoint(path, model=again)
    assert torch.equal(said(again), said(model))
    for name, t in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], t), name
    for other, says in ((beside(lora, **scheme | {"quant_type": "fp4" if len(scheme) == 1 else "nf4"}), "another quantization of"), (beside(lora, seed=7, **scheme), "other frozen weights")):
        before = {name: t.clone() for name, t in other.state_dict().items()}
        if save_frozen and "other" in says[:5]:
            continue
        with pytest.raises(CheckpointMismatchError, match=says):
            load_checkpoint(path, model=other)
        assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


def test_a_load_that_fails_leaves_the_scales(room):
    "The optimizer does not fit: weights and scales are those from before."
    model = beside("manual", double_quant=True)
    wrong = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad][:2])
    path = save_checkpoint(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]), None, None, 1, room)
    other = beside("manual", seed=7, double_quant=True)
    before, logits = {name: t.clone() for name, t in other.state_dict().items()}, said(other)
    with pytest.raises(CheckpointMismatchError):
        load_checkpoint(path, model=other, optimizer=wrong)

    class Refusing:
        def state_dict(self): return {}
        def load_state_dict(self, state): raise KeyError("no")
    path = save_checkpoint(model, None, None, None, 2, room, trainer=Refusing())
    with pytest.raises(CheckpointMismatchError, match="refused it"):
        load_checkpoint(path, model=other, trainer=Refusing())
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items()) and torch.equal(said(other), logits)


@pytest.mark.parametrize("save_frozen", [True, False])
def test_resume_beside_bitsandbytes_is_exact(save_frozen):
    "QLoRA by peft and bitsandbytes, interrupted, with evaluations between the steps: the same run to the bit."
    def started(**more):
        data = list(zip(IMAGES.split(2), LABELS.split(2)))
        return Trainer(beside(double_quant=True), train_data=data, eval_data=data[:1], eval_steps=1, max_steps=4, learning_rate=1e-2, progress=False, save_frozen=save_frozen, **more)
    assert assert_resume_exact(started, at=[1, 3]) == 2


def test_evaluation_leaves_the_bytes_of_bitsandbytes():
    "On processors with bfloat16 its layers would pack themselves anew in evaluation, with rounded scales."
    model = beside("manual", double_quant=True)
    before = {name: t.clone() for name, t in frozen_tensors(model).items()}
    said(model)
    assert any(name.endswith("nested_absmax") for name in before) and all(torch.equal(t, before[name]) for name, t in frozen_tensors(model).items())


def test_the_account_is_the_same_for_both_backends():
    "Rows, bytes, parameters and the trainable share; peft's wrappers do not count twice."
    pytest.importorskip("bitsandbytes")
    ours = build_model(SHAPE.replace(lora={"backend": "manual"}, quantization={"double_quant": True}), vit())
    plain = get_quantization_info(quantize_backbone(vit(), double_quant=True))
    assert (plain.mode, plain.bits, plain.type) == ("ptq", 4, None) and plain.parameters == vit().num_parameters()
    assert {row.scheme for row in plain.layers.values()} == {"nf4 / 64, double"} and all(15 < row.sqnr < 25 for row in plain.layers.values())
    info, count = get_quantization_info(ours), get_nb_trainable_parameters(ours)
    assert info.parameters == count.total == vit().num_parameters() + 2 * 2 * 2 * 8 * 64 and len(info.layers) == 12 and str(info).startswith("**NF4**")
    assert info.bytes == sum(t.nbytes for t in ours.state_dict().values())
    for lora in ("manual", "peft"):
        if lora == "peft":
            pytest.importorskip("peft")
        theirs = build_model(SHAPE.replace(lora={"backend": lora}, quantization={"double_quant": True, "backend": "bitsandbytes"}), vit())
        other = get_quantization_info(theirs)
        assert get_nb_trainable_parameters(theirs) == count
        assert lora == "peft" or (other.bytes, other.parameters) == (info.bytes, info.parameters)  # peft keeps the head that it copied: its bytes are there
        assert [(row.scheme, row.bytes, row.parameters) for row in other.layers.values()] == [(row.scheme, row.bytes, row.parameters) for row in info.layers.values()]
        assert all("Linear4bit" not in row.kind for row in other.left_alone.values())


@pytest.mark.parametrize("options", [{"quant_type": "int4"}, {"quant_type": "fp4", "double_quant": True}, {"backend": "bitsandbytes"}])
def test_back_to_floats(options):
    "dequantize_model gives plain layers with the weights that the codes stood for, no trace left, and what was frozen still is."
    if options.get("backend"):
        pytest.importorskip("bitsandbytes")
    model = quantize_backbone(vit(), **options)
    plain = dequantize_model(model)
    assert type(plain.vit.layers[0].mlp.fc1) is nn.Linear and list(plain.state_dict()) == list(vit().state_dict()) and str(plain) == str(vit())
    assert vars(plain.vit.layers[0].mlp.fc1).keys() == vars(nn.Linear(1, 1)).keys() and not hasattr(plain, "quantization_report")
    assert torch.allclose(said(plain), said(model), atol=1e-5) and get_quantization_info(plain).mode is None
    assert {n for n, p in plain.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}
    if not options.get("backend"):
        assert torch.equal(plain.vit.layers[0].mlp.fc1.weight, model.vit.layers[0].mlp.fc1.dequantize())


@pytest.mark.parametrize("options", [{}, {"quant_type": "fp4", "blocksize": 32, "compute_dtype": "bf16"}, {"quant_type": "int4", "double_quant": True, "skip_modules": ["q_proj"]}])
def test_checkpoints_rebuild_four_bit_layers(options, room):
    "From the description beside it a checkpoint goes into the float model; into layers of another kind it does not, though all shapes fit."
    model = quantize_backbone(vit(), **options)
    path = save_checkpoint(model, None, None, None, 1, room)
    again = ViT(SHAPE)
    load_checkpoint(path, model=again)
    assert torch.equal(said(again), said(model)) and quantization_metadata(again) == quantization_metadata(model)
    for change in ({"quant_type": "nf4" if "quant_type" in options else "fp4"}, {"compute_dtype": "fp16"}):
        other = quantize_backbone(vit(), **options | change)
        assert {n: t.shape for n, t in other.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
        with pytest.raises(CheckpointMismatchError, match="another quantization of vit.layers.0.attention"):
            load_checkpoint(path, model=other)


def test_a_checkpoint_of_bitsandbytes_needs_its_layers(room):
    "Into a float model it does not go, and the error says what to do."
    model = beside("manual")
    path = save_checkpoint(quantize_backbone(vit(), backend="bitsandbytes"), None, None, None, 1, room)
    with pytest.raises(CheckpointMismatchError, match=r"is a layer of bitsandbytes; .* Build it with quantize_backbone\(model, backend='bitsandbytes'\)") as caught:
        load_checkpoint(path, model=vit())
    assert "\n" not in str(caught.value) and any("base_layer" in name for name in model.state_dict())


def test_targets_as_one_text(tmp_path):
    "all-linear, a glob, a regular expression for whole names, from a file; the default by current names, what was asked for as it is."
    for text, count in (("all-linear", 12), (r"vit\.layers\.0\..*_proj", 4), ("'*.fc1'", 2), ("[query, key]", 4)):
        (tmp_path / "vit.yaml").write_text(f"image_size: 8\npatch_size: 4\nnum_channels: 1\nhidden_size: 64\nnum_hidden_layers: 2\nnum_attention_heads: 2\nintermediate_size: 128\nlora: {{backend: manual, target_modules: {text}}}\n")
        assert sum(type(m) is LoRALinear for m in build_model(tmp_path / "vit.yaml").modules()) == count, text
    assert sum(type(m) is LoRALinear for m in apply_lora(vit(), backend="manual").modules()) == 4
    with pytest.raises(LoRAError, match="'query' matches no module"):
        apply_lora(vit(), backend="manual", target_modules=["query", "value"])
    with pytest.raises(ConfigError, match="lora.target_modules: 'gate' matches no module"):
        build_model(SHAPE.replace(lora={"target_modules": "gate"}))


def test_a_copy_is_a_model_of_its_own():
    "deepcopy takes codes and adapters along."
    model = build_model(SHAPE.replace(lora={"backend": "manual"}, quantization={}))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IMAGES), model(IMAGES)) and twin.vit.layers[0].mlp.fc1.codes.data_ptr() != model.vit.layers[0].mlp.fc1.codes.data_ptr()
