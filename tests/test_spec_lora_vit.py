# python -m pytest tests/test_spec_lora_vit.py
"""The requirement of LoRA and quantization for vision transformers, scenario by scenario: each docstring is the scenario's own text."""
import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from qtlm.blockwise import BlockwiseLinear
from qtlm.checkpoint import load_checkpoint
from qtlm.config import ConfigError, ViTConfig, load_config
from qtlm.images import digits
from qtlm.lora import LoRALinear, get_nb_trainable_parameters
from qtlm.lora_vit import build_model, quantize_backbone
from qtlm.optim import configure_optimizer
from qtlm.resume import assert_resume_exact
from qtlm.storage import CheckpointMismatchError
from qtlm.trainer import Trainer
from qtlm.vit import ViT, accuracy

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "num_labels": 5}
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "backend": "manual"}
IMAGES = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(64) % 5
HEAD = {"classifier.weight", "classifier.bias"}


def batches():
    "Eight batches of pictures."
    return list(zip(IMAGES.split(8), LABELS.split(8)))


def base():
    "The backbone, the same at each call."
    return ViT(ViTConfig(**SHAPE), generator=torch.Generator().manual_seed(1))


def trainable(model):
    "The names of what is trained."
    return {name for name, p in model.named_parameters() if p.requires_grad}


def adapted(**quantization):
    "Backbone in 4 bits, adapters beside it."
    torch.manual_seed(2)
    return build_model(SHAPE | {"lora": LORA, "quantization": quantization}, base())


def trainer(quantized=True, **more):
    "A trainer as a new process would build it."
    model = adapted() if quantized else base()
    return Trainer(model, train_data=batches(), max_steps=6, learning_rate=1e-2, progress=False, **more)


def test_apply_lora_to_vit_model():
    """Scenario: Apply LoRA to ViT Model
    Given a ViT backbone model configuration with LoRA enabled
    When the model is built
    Then the system SHALL apply LoRA adapters to specified linear layers
    And only LoRA parameters SHALL be trainable during training
    """
    model = build_model(SHAPE | {"lora": LORA | {"target_modules": ["q_proj", "fc1"]}}, base())
    places = {name for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert places == {f"vit.layers.{i}.{name}" for i in (0, 1) for name in ("attention.q_proj", "mlp.fc1")}
    assert trainable(model) == {f"{place}.lora_{x}.weight" for place in places for x in "AB"} | HEAD  # the head: a task of its own has no answers in the backbone
    alone = build_model(SHAPE | {"lora": LORA | {"modules_to_save": []}}, base())
    assert trainable(alone) and all(".lora_" in name for name in trainable(alone))
    before = {name: p.detach().clone() for name, p in alone.named_parameters()}
    Trainer(alone, train_data=batches(), max_steps=2, learning_rate=1e-2, progress=False).train()
    moved = {name for name, p in alone.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable(alone)


def test_configure_lora_parameters():
    """Scenario: Configure LoRA Parameters
    Given a model configuration with LoRA settings
    When the model is initialized
    Then the system SHALL use the specified rank, alpha, and dropout parameters
    And SHALL target the specified modules for LoRA adaptation
    """
    config = SHAPE | {"lora": {"r": 3, "lora_alpha": 12, "lora_dropout": 0.25, "target_modules": ["query", "*.mlp.fc2"], "exclude_modules": ["layers.1"], "backend": "manual"}}
    adapters = {name: m for name, m in build_model(config).named_modules() if isinstance(m, LoRALinear)}
    assert adapters.keys() == {"vit.layers.0.attention.q_proj", "vit.layers.0.mlp.fc2"}
    for m in adapters.values():
        assert (m.r, m.lora_alpha, m.scaling, m.lora_dropout.p) == (3, 12.0, 4.0, 0.25)
        assert m.lora_A.weight.shape == (3, m.in_features) and m.lora_B.weight.shape == (m.out_features, 3)


def test_apply_int4_quantization():
    """Scenario: Apply INT4 Quantization
    Given a model configuration with quantization enabled
    When the model is built
    Then the system SHALL quantize linear layers to INT4 precision
    And SHALL skip specified modules from quantization
    """
    model, plain = build_model(SHAPE | {"quantization": {"quant_type": "int4", "skip_modules": ["o_proj"]}}, base()), base()
    for name, m in plain.named_modules():
        if isinstance(m, nn.Linear):
            new = model.get_submodule(name)
            if name == "classifier" or name.endswith("o_proj"):
                assert type(new) is nn.Linear and torch.equal(new.weight, m.weight)
            else:
                assert type(new) is BlockwiseLinear and new.quant_type == "int4" and new.codes.numel() == m.weight.numel() // 2
                values = {round(v.item(), 4) for v in (new.dequantize().view(-1, 64) / new.absmax[:, None]).unique() * 7}
                assert values <= set(range(-8, 8))
    assert trainable(model) == HEAD


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_manual_vs_hf_quantization(quant_type, tmp_path):
    """Scenario: Manual vs HF Quantization
    Given a quantization configuration
    When the model is quantized
    Then the system SHALL support both manual quantization and HuggingFace BitsAndBytesConfig
    And SHALL use the specified quantization type (nf4/fp4)
    """
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes"), pytest.importorskip("accelerate")
    saved = transformers.ViTForImageClassification(transformers.ViTConfig(**base().to_vit_config()))
    saved.load_state_dict(base().state_dict())
    saved.save_pretrained(tmp_path)
    section = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "fp32", "llm_int8_skip_modules": ["k_proj"]}
    manual, theirs = (build_model({"quantization": section | {"backend": backend}}, tmp_path) for backend in ("manual", "bitsandbytes"))
    how = theirs.config.quantization_config
    assert how.load_in_4bit and how.bnb_4bit_quant_type == quant_type and how.bnb_4bit_use_double_quant and how.bnb_4bit_compute_dtype == torch.float32
    layers = {name: m for name, m in manual.named_modules() if type(m) is BlockwiseLinear}
    assert len(layers) == 10 and {m.quant_type for m in layers.values()} == {quant_type}
    for name, m in layers.items():
        assert torch.equal(theirs.get_submodule(name).weight.data.flatten(), m.codes) and theirs.get_submodule(name).weight.quant_state.quant_type == quant_type
    assert type(theirs.vit.layers[0].attention.k_proj) is nn.Linear and trainable(manual) == trainable(theirs) == HEAD
    assert torch.allclose(manual.train()(IMAGES).logits, theirs.train()(IMAGES).logits, atol=1e-5)


def test_extended_model_configuration(tmp_path):
    """Scenario: Extended Model Configuration
    Given a YAML model configuration file
    When LoRA or quantization is enabled
    Then the configuration SHALL include lora and quantization sections
    And SHALL be backward compatible with existing configurations
    """
    example = ROOT / "examples" / "vit_qlora.yaml"
    config = load_config(example, kind=ViTConfig)
    assert config.lora.r == 8 and config.quantization.quant_type == "nf4" and config.quantization.double_quant
    model = build_model(example)
    assert sum(type(m) is BlockwiseLinear for m in model.modules()) == 12 and any("lora_" in name for name in trainable(model))
    old = tmp_path / "old.yaml"
    old.write_text("".join(f"{name}: {value}\n" for name, value in SHAPE.items()))
    plain, reference = (make(generator=torch.Generator().manual_seed(5)) for make in (lambda generator: build_model(old, generator=generator), lambda generator: ViT(ViTConfig(**SHAPE), generator=generator)))
    assert type(plain) is ViT and all(p.requires_grad for p in plain.parameters()) and torch.equal(plain(IMAGES), reference(IMAGES))
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), reference.state_dict().values(), strict=True))


def test_configuration_validation(tmp_path):
    """Scenario: Configuration Validation
    Given a model configuration with LoRA/quantization settings
    When the configuration is loaded
    Then the system SHALL validate required parameters
    And SHALL provide clear error messages for invalid configurations
    """
    for text, says in {
        "lora:\n  target_modules: []\n": ":2: lora.target_modules: no module; expected at least one, or enabled: false",
        "lora:\n  r: -1\n": ":2: lora.r: -1; expected an integer >= 1",
        "quantization:\n  quant_type: nf5\n": ":2: quantization.quant_type: the text 'nf5'; expected one of nf4, fp4, int4.",
        "quantization:\n  quant_typ: nf4\n": ":2: quantization.quant_typ: unknown; expected a field of BackboneQuantizationConfig. Did you mean quant_type?",
    }.items():
        (tmp_path / "vit.yaml").write_text(text)
        with pytest.raises(ConfigError) as caught:
            build_model(tmp_path / "vit.yaml")
        assert says in str(caught.value) and "\n" not in str(caught.value)


def test_optimizer_parameter_filtering():
    """Scenario: Optimizer Parameter Filtering
    Given a quantized+LoRA model
    When the optimizer is configured
    Then only trainable parameters SHALL be included
    And quantized backbone parameters SHALL be excluded
    """
    model = adapted()
    stepped = {id(p) for group in configure_optimizer(model).param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in stepped}
    assert names == trainable(model) and len(stepped) == len(names) == 2 * 2 * 2 + 2
    assert not any("base_layer" in name for name in names)
    for m in (m for m in model.modules() if type(m) is BlockwiseLinear):
        assert not {id(t) for t in (*m.parameters(), *m.buffers())} & stepped


def test_memory_efficient_training():
    """Scenario: Memory-Efficient Training
    Given a quantized+LoRA model configuration
    When training begins
    Then the system SHALL use reduced memory footprint
    And SHALL maintain training stability
    """
    taken = {}
    for quantized in (False, True):
        run = trainer(quantized)
        before = {name: t.clone() for name, t in run.model.state_dict().items() if "codes" in name or "absmax" in name}
        losses = [run.training_step(batch) for batch in batches() * 3]
        moments = [t for state in run.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        gradients = [torch.empty_like(p) for group in run.optimizer.param_groups for p in group["params"]]
        taken[quantized] = sum(t.nbytes for t in (*run.model.state_dict().values(), *moments, *gradients))
        assert all(loss == loss and loss < 3 for loss in losses) and sum(losses[-8:]) < sum(losses[:8])
        assert len(before) == 24 * quantized and all(torch.equal(t, run.model.state_dict()[name]) for name, t in before.items())
    assert taken[True] < 0.2 * taken[False]


def test_conditional_model_wrapping():
    """Scenario: Conditional Model Wrapping
    Given any model configuration
    When the model is built
    Then the system SHALL check for LoRA/quantization settings
    And SHALL apply appropriate wrappers before returning the model
    """
    for lora in (None, {"enabled": False}, LORA):
        for quantization in (None, {"enabled": False}, {}):
            model = build_model(SHAPE | {"lora": lora, "quantization": quantization})
            kinds = [type(m) for m in model.modules()]
            assert kinds.count(LoRALinear) == 4 * (lora is LORA) and kinds.count(BlockwiseLinear) == 12 * (quantization == {})
            assert (len(trainable(model)) == len(list(model.parameters()))) == (lora is not LORA and quantization != {})
    inside = adapted().vit.layers[0].attention.q_proj
    assert type(inside) is LoRALinear and type(inside.base_layer) is BlockwiseLinear  # quantized first, adapted after
    assert type(inside.lora_A) is nn.Linear and inside.lora_A.weight.dtype == torch.float32
    assert torch.equal(adapted().eval()(IMAGES), quantize_backbone(base()).eval()(IMAGES))  # new adapters change nothing


def test_checkpoints_of_what_was_trained(tmp_path):
    "Not in the text, but in the design: a checkpoint holds adapters and head and a digest of the base; the run resumes to the bit."
    run = trainer(save_frozen=False, output_dir=str(tmp_path))
    run.train()
    path = run.save()
    tensors = torch.load(path / "model.pt", weights_only=True)
    assert tensors.keys() == trainable(run.model)
    again = adapted()
    load_checkpoint(path, model=again)
    assert torch.equal(again.eval()(IMAGES), run.model.eval()(IMAGES))
    with pytest.raises(CheckpointMismatchError, match="another quantization of vit.layers.0"):
        load_checkpoint(path, model=adapted(quant_type="fp4"))
    with pytest.raises(CheckpointMismatchError, match="other frozen weights"):
        load_checkpoint(path, model=build_model(SHAPE | {"lora": LORA, "quantization": {}}))
    assert assert_resume_exact(lambda: trainer(save_frozen=False), at=[1, 4]) == 2


def test_a_backbone_is_adapted_in_place():
    "What is given is what comes back, and a copy of it is not touched."
    mine = base()
    kept = copy.deepcopy(mine)
    assert build_model(SHAPE | {"lora": LORA, "quantization": {}}, mine) is mine
    assert type(kept.vit.layers[0].attention.q_proj) is nn.Linear and all(p.requires_grad for p in kept.parameters())


def adapted_to_digits(seed, backend="manual", quantized=True):
    "Accuracy of a model that knows 0 to 4 and has learned 5 to 9, and how many parameters that took; by QLoRA, or by all its weights."
    shape = ViTConfig(**SHAPE | {"num_attention_heads": 4, "intermediate_size": 256})
    course = {"warmup_steps": 10, "lr_scheduler_type": "cosine", "progress": False, "seed": seed}
    (known, _), (new, test) = digits(range(5), 0.4, seed), digits(range(5, 10), 0.4, seed)
    model = ViT(shape, generator=torch.Generator().manual_seed(seed))
    Trainer(model, train_data=known.batches(32, seed), max_steps=150, learning_rate=2e-3, **course).train()
    if quantized:
        course |= {"learning_rate": 2e-2, "weight_decay": 0.0}
        lora = {"r": 8, "lora_dropout": 0.2, "backend": "manual" if backend == "manual" else "peft"}
        torch.manual_seed(seed)
        model = build_model(shape.replace(lora=lora, quantization={"quant_type": "nf4", "double_quant": True, "backend": backend}), model)
    Trainer(model, train_data=new.batches(32, seed), max_steps=300, **{"learning_rate": 1e-3} | course).train()
    return accuracy(model, test.images, test.labels), get_nb_trainable_parameters(model).trainable


@pytest.mark.slow
def test_digits_in_four_bits():
    "QLoRA (NF4, r = 8) within a point of full fine-tuning with at most 5 % of its trainable parameters; peft and bitsandbytes within a point of that. Means of four seeds."
    pytest.importorskip("sklearn")
    full, ours = ([adapted_to_digits(seed, quantized=q) for seed in range(4)] for q in (False, True))
    mean = lambda runs: sum(right for right, _ in runs) / len(runs)
    assert mean(full) > 0.955 and mean(ours) >= mean(full) - 0.01, (full, ours)
    assert ours[0][1] <= 0.05 * full[0][1]
    pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    theirs = [adapted_to_digits(seed, "bitsandbytes") for seed in range(4)]
    assert abs(mean(theirs) - mean(ours)) <= 0.01 and theirs[0][1] == ours[0][1], (theirs, ours)


def test_digits_in_four_bits_once():
    "One seed of it, within what one seed says."
    pytest.importorskip("sklearn")
    right, trained = adapted_to_digits(3)
    assert right > 0.94 and trained <= 0.05 * ViT(ViTConfig(**SHAPE | {"num_attention_heads": 4, "intermediate_size": 256})).num_parameters()
