# python -m pytest tests/test_adapt.py
"""Runs on pictures from a file and settings: what they build, learn and keep, how they go on, and what they refuse."""
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from qtlm.adapt import Adapted, ImagesConfig, adapt_vit, is_vit_config, load_vit
from qtlm.blockwise import BlockwiseLinear
from qtlm.config import ConfigError, ViTConfig, save_config
from qtlm.data import DataError
from qtlm.history import Callback
from qtlm.images import digits
from qtlm.lora import LoRALinear, get_nb_trainable_parameters
from qtlm.storage import CheckpointMismatchError, CheckpointNotFoundError
from qtlm.trainer import Trainer
from qtlm.vit import ViT, accuracy

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
QLORA = {"lora": {"r": 4, "backend": "manual", "lora_dropout": 0.1}, "quantization": {"double_quant": True}}
pytestmark = pytest.mark.filterwarnings("ignore:adapt_vit. the backbone that is frozen is new")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A run that has learned 0 to 4."
    folder = tmp_path_factory.mktemp("runs")
    return adapt_vit(ViTConfig(**SHAPE), "classes=0,1,2,3,4", "max_steps=80", "batch_size=32", "learning_rate=2e-3", "progress=false", f"output_dir={folder}", "run_name=base")


def short(folder, *more):
    "Settings of a short run."
    return ("max_steps=4", "batch_size=8", "learning_rate=1e-2", "progress=false", f"output_dir={folder}", *more)


def same(a, b):
    "Whether two models have the same bytes."
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_file_and_settings(base, tmp_path):
    "The example as it lies in the repository, with settings of all three kinds; the one line says what came out."
    found = adapt_vit(ROOT / "examples" / "vit_qlora.yaml", "images=digits", "lora.backend=native", "lora.r=2", *short(tmp_path))
    assert isinstance(found, Adapted) and found.classes == tuple("0123456789") and found.run_dir == tmp_path / "run" and found.trainer.step == 4
    test = digits()[1]
    assert found.accuracy == accuracy(found.trainer.model, test.images, test.labels) and found.tested == len(test.labels)
    assert {m.r for m in found.trainer.model.modules() if isinstance(m, LoRALinear)} == {2} and sum(type(m) is BlockwiseLinear for m in found.trainer.model.modules()) == 12
    line = found.summary()
    assert line.startswith(f"{tmp_path / 'run'}: step 4, accuracy ") and "\n" not in line and f"{get_nb_trainable_parameters(found.trainer.model).trainable:,} of" in line
    assert base.accuracy > 0.9


def test_the_example_without_a_backbone_says_so(tmp_path):
    "A frozen backbone of random weights is worth a line; one that is trained is not."
    with pytest.warns(UserWarning, match="adapt_vit: the backbone that is frozen is new, its weights are random; expected backbone_folder="):
        adapt_vit(ViTConfig(**SHAPE, **QLORA), *short(tmp_path, "max_steps=1"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt_vit(ViTConfig(**SHAPE), *short(tmp_path, "max_steps=1", "run_name=plain"))


@pytest.mark.parametrize("save_frozen", ["true", "false"])
def test_a_run_on_a_run(base, save_frozen, tmp_path):
    "The backbone's shape need not be given; its codes are those of the trained weights; the run becomes a model again by itself."
    config = ViTConfig(**QLORA)
    found = adapt_vit(config, "classes=[5,6,7,8,9]", f"backbone_folder={base.run_dir}", f"save_frozen={save_frozen}", *short(tmp_path, "max_steps=120", "batch_size=32", "learning_rate=2e-2"))
    assert found.accuracy > 0.8 and found.trainer.model.config.hidden_size == 64
    want = BlockwiseLinear.from_linear(base.trainer.model.vit.layers[0].mlp.fc1, double_quant=True)
    assert torch.equal(found.trainer.model.vit.layers[0].mlp.fc1.codes, want.codes)
    if save_frozen == "true":
        assert same(load_vit(base.run_dir)[0], base.trainer.model)
    model, classes = load_vit(found.run_dir)
    assert classes == tuple("56789") and same(model, found.trainer.model) and not model.training
    size = (found.run_dir / "step-0000000120" / "model.pt").stat().st_size
    assert (size < 40_000) == (save_frozen == "false")


def test_a_head_for_the_same_classes_stays(base, tmp_path):
    "Other classes, or another order of them, get a new head."
    for classes, kept in (("0,1,2,3,4", True), ("4,3,2,1,0", False), ("0,1", False)):
        found = adapt_vit(ViTConfig(**QLORA), f"classes={classes}", f"backbone_folder={base.run_dir}", *short(tmp_path, "max_steps=1", "learning_rate=1e-9", f"run_name=c{classes.replace(',', '')}"))
        assert torch.allclose(found.trainer.model.classifier.weight.mean(), base.trainer.model.classifier.weight.mean(), atol=1e-7) == kept
        assert found.trainer.model.config.num_labels == len(found.classes)


class Cut(Callback):
    "Ends a run as if its machine had failed."
    def on_step_end(self, trainer):
        if trainer.step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("backend", ["manual", "bitsandbytes"])
@pytest.mark.parametrize("save_frozen", ["true", "false"])
def test_resume_is_exact(backend, save_frozen, base, tmp_path, monkeypatch):
    "A run that was cut off after its third step, evaluations and dropout included, is the run that was not; by qtlm alone, and by peft and bitsandbytes."
    if backend == "bitsandbytes":
        pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    config = ViTConfig(lora={"r": 4, "lora_dropout": 0.1, "backend": "manual" if backend == "manual" else "peft"}, quantization={"backend": backend, "double_quant": True})
    settings = short(tmp_path, "max_steps=5", "save_steps=2", "eval_steps=1", "classes=5,6,7", f"backbone_folder={base.run_dir}", f"save_frozen={save_frozen}")
    whole = adapt_vit(config, *settings)
    original = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", lambda self, *args, **more: original(self, *args, callbacks=[Cut()], **more))
    with pytest.raises(KeyboardInterrupt):
        adapt_vit(config, *settings, "run_name=cut")
    monkeypatch.undo()
    torch.manual_seed(99)
    again = adapt_vit(config, *settings, "run_name=cut", resume=True)
    assert again.trainer.history.losses == whole.trainer.history.losses and len(whole.trainer.history.losses) == 5
    assert again.accuracy == whole.accuracy and same(again.trainer.model, whole.trainer.model)
    assert same(load_vit(again.run_dir)[0], whole.trainer.model)


def test_resume_compares(base, tmp_path):
    "Settings that leave no trace in the shapes of weights are compared with what the run wrote down; pictures too."
    config = ViTConfig(**QLORA)
    settings = short(tmp_path, f"backbone_folder={base.run_dir}", "classes=5,6,7")
    adapt_vit(config, *settings)
    for change, says in (("lora.lora_alpha=3", "lora="), ("seed=4", "seed=0, here 4"), ("classes=7,6,5", "classes="), ("quantization.quant_type=fp4", "quantization=")):
        with pytest.raises(ConfigError, match=f"resume: .*run was made with {says}.*; expected the same") as caught:
            adapt_vit(config, *settings, change, "max_steps=9", resume=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointMismatchError, match="train_data"):
        adapt_vit(config, *settings, "test_fraction=0.5", "max_steps=9", resume=True)
    longer = adapt_vit(config, *settings, "max_steps=6", resume=True)
    assert longer.trainer.step == 6 and len(longer.trainer.history.losses) == 6
    fresh = adapt_vit(config, *settings, "run_name=fresh", "max_steps=1", resume="auto")
    assert fresh.trainer.step == 1
    with pytest.raises(CheckpointNotFoundError) as caught:
        adapt_vit(config, *settings, "run_name=none", resume=True)
    assert "\n" not in str(caught.value)


def test_who_made_the_adapters_is_written_down(base, tmp_path):
    "`auto` means one library here and another there; the run says which it was."
    import importlib.util

    config, settings = ViTConfig(lora={"r": 4}), ("classes=5,6", f"backbone_folder={base.run_dir}")
    for quantized in (False, True):
        found = adapt_vit(config.replace(quantization={} if quantized else None), *settings, *short(tmp_path, f"run_name=run{quantized}", "max_steps=1"))
        expected = "peft" if importlib.util.find_spec("peft") and not quantized else "manual"
        assert found.trainer.vocab["vit"]["lora"] == {"r": 4, "backend": expected}
        assert same(load_vit(found.run_dir)[0], found.trainer.model)


def test_torchs_generator_is_left_alone(tmp_path):
    "Weights come from the run's own seed: what was drawn before does not matter, and what is drawn after is what would have been drawn."
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = adapt_vit(ViTConfig(**SHAPE), *short(tmp_path, "max_steps=1", "run_name=one"))
    assert torch.equal(torch.rand(3), expected)
    two = adapt_vit(ViTConfig(**SHAPE), *short(tmp_path, "max_steps=1", "run_name=two"))
    other = adapt_vit(ViTConfig(**SHAPE), *short(tmp_path, "max_steps=1", "run_name=other", "seed=1"))
    assert same(one.trainer.model, two.trainer.model) and not same(one.trainer.model, other.trainer.model)


@pytest.fixture
def photos(tmp_path):
    "A folder of coloured pictures of two kinds: bright above, and bright below."
    from PIL import Image

    random = np.random.default_rng(0)
    for name, part in (("above", slice(0, 6)), ("below", slice(6, 12))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(24):
            pixels = random.integers(0, 100, (12, 12, 3), dtype=np.uint8)
            pixels[part] += 120
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_a_folder_of_pictures(photos, tmp_path):
    "Any folder, at the model's size and channels."
    shape = SHAPE | {"num_channels": 3}
    found = adapt_vit(ViTConfig(**shape), f"images={photos}", *short(tmp_path, "max_steps=30", "learning_rate=3e-3"))
    assert found.classes == ("above", "below") and found.tested == 12 and found.accuracy > 0.9
    assert load_vit(found.run_dir)[1] == ("above", "below")
    (photos / "below" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="0.png"):
        adapt_vit(ViTConfig(**shape), f"images={photos}", *short(tmp_path, "run_name=two"))
    with pytest.raises(DataError, match="image_folder: .*nowhere.*not found"):
        adapt_vit(ViTConfig(**shape), f"images={tmp_path / 'nowhere'}", *short(tmp_path, "run_name=three"))


def test_on_what_transformers_has_saved(tmp_path):
    "A folder of transformers' ViT, in colours and of another size: its weights are packed, its shape is taken over; loaded again without the folder."
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**ViT(ViTConfig(**SHAPE | {"num_channels": 3, "image_size": 12}, num_labels=7)).to_vit_config()))
    theirs.save_pretrained(tmp_path / "theirs")
    kinds = [{}] + [{"backend": "bitsandbytes"}] * (pytest.importorskip("bitsandbytes") is not None)
    for i, section in enumerate(kinds):
        found = adapt_vit(ViTConfig(lora={"r": 4, "backend": "manual"}, quantization=section), "classes=1,2,3", f"backbone_folder={tmp_path / 'theirs'}", *short(tmp_path, f"run_name=run{i}"))
        model = found.trainer.model
        assert type(model).__name__ == "ViTForImageClassification" and model.config.num_labels == 3
        want = BlockwiseLinear.from_linear(theirs.vit.layers[1].mlp.fc2)
        packed = model.vit.layers[1].mlp.fc2
        assert torch.equal(packed.codes if i == 0 else packed.weight.data.flatten(), want.codes)
        again = adapt_vit(ViTConfig(lora={"r": 4, "backend": "manual"}, quantization=section), "classes=1,2,3", f"backbone_folder={tmp_path / 'theirs'}", *short(tmp_path, f"run_name=run{i}", "max_steps=5"), resume=True)
        assert again.trainer.step == 5
        shutil.move(tmp_path / "theirs", tmp_path / "away")
        loaded = load_vit(again.run_dir)[0]
        images = torch.nn.functional.interpolate(digits([1, 2, 3])[1].images[:9], (12, 12), mode="bilinear").expand(-1, 3, -1, -1)
        assert torch.allclose(loaded(images), again.trainer.model.eval()(images).logits, atol=1e-5)
        shutil.move(tmp_path / "away", tmp_path / "theirs")


@pytest.mark.parametrize("settings, says", [
    (("images=",), "images"),
    (("classes=3,nine",), "classes"),
    (("classes=3,3",), "classes"),
    (("test_fraction=0",), "ImagesConfig|test_fraction"),
    (("learning_rate=fast",), "learning_rate: the text 'fast'"),
    (("lora.rank=0",), "lora.r"),
    (("lora.target_modules=gate",), "ViTConfig: lora.target_modules: 'gate' matches no module"),
    (("num_labels=3",), "ViTConfig: num_labels: 3; expected 10, the classes of the pictures"),
    (("backbone_folder=/nowhere/at/all",), "backbone: .*nowhere.* cannot be read|transformers is not installed"),
    (("imges=x",), "imges: unknown; .* Did you mean images"),
    (("max_steps",), "max_steps"),
    (("=3",), "=3: unknown"),
])
def test_refused(settings, says, tmp_path):
    "One line each; nothing is written."
    with pytest.raises(ValueError, match=says) as caught:
        adapt_vit(ViTConfig(**SHAPE, lora={"backend": "manual"}), *short(tmp_path / "runs"), *settings)
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


def test_runs_of_others_are_no_backbones(base, tmp_path):
    "A run of another kind, and one whose backbone is packed already."
    Trainer(ViT(ViTConfig(**SHAPE, num_labels=10)), train_data=digits()[0].batches(4), max_steps=1, output_dir=str(tmp_path), run_name="other", progress=False).train()
    with pytest.raises(CheckpointMismatchError, match="no configuration of a ViT; expected a run of adapt_vit"):
        load_vit(tmp_path / "other")
    adapt_vit(ViTConfig(**QLORA), f"backbone_folder={base.run_dir}", *short(tmp_path, "run_name=packed", "max_steps=1"))
    with pytest.raises(ConfigError, match="backbone_folder: .*packed has adapters or 4-bit layers; expected the run of a float model") as caught:
        adapt_vit(ViTConfig(**QLORA), f"backbone_folder={tmp_path / 'packed'}", *short(tmp_path, "run_name=twice"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="hidden_size: 32; expected 64, which the backbone given has"):
        adapt_vit(ViTConfig(hidden_size=32, num_attention_heads=4), f"backbone_folder={base.run_dir}", *short(tmp_path, "run_name=three"))


def test_what_a_checkpoint_says_is_checked(base, tmp_path):
    "A description that was changed is an error of ours, whatever it says."
    step = next(base.run_dir.glob("step-*"))
    for i, change in enumerate(({"vit": {"hidden_size": -1}}, {"vit": {"image_size": 8, "evil": 1}}, {"vit": SHAPE | {"hidden_size": 128, "num_labels": 5}})):
        copy = tmp_path / str(i) / step.name
        shutil.copytree(step, copy)
        (copy / "manifest.json").unlink(), (copy / "COMMITTED").unlink()  # nothing vouches for its bytes
        (copy / "vocab.json").write_text(json.dumps(json.loads((copy / "vocab.json").read_text()) | change))
        with pytest.raises(ValueError if i < 2 else CheckpointMismatchError) as caught:
            load_vit(copy)
        assert type(caught.value).__module__.startswith("qtlm")


def test_which_files_are_for_pictures(tmp_path):
    "Every configuration of a ViT that qtlm writes, and none of a training."
    from qtlm.config import ModelConfig, TrainingConfig

    for i, (config, told) in enumerate(((ViTConfig(), True), (ViTConfig(**SHAPE, **QLORA), True), (TrainingConfig(), False), (TrainingConfig(model=ModelConfig()), False))):
        for suffix in ("yaml", "json"):
            assert is_vit_config(save_config(config, tmp_path / f"{i}.{suffix}")) is told
    assert is_vit_config(ROOT / "examples" / "vit_qlora.yaml") and not is_vit_config(tmp_path) and not is_vit_config(tmp_path / "none.yaml") and not is_vit_config("")
    (tmp_path / "text.txt").write_text("image_size: 8")
    assert not is_vit_config(tmp_path / "text.txt")


def test_classes_in_any_form():
    "Numbers, names, a list or names between commas; what is none of these is refused in one line."
    assert {ImagesConfig(classes=form).classes for form in ([1, 2], ["1", "2"], "1,2", ("1", 2), " 1 , 2")} == {("1", "2")}
    for wrong in (3.5, {"a": 1}, [1.5], [""]):
        with pytest.raises(ConfigError, match="classes"):
            ImagesConfig(classes=wrong)
