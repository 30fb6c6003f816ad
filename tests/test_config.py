# python -m pytest tests/test_config.py
"""Contracts of `qtlm.config`: what is accepted, what is refused and how, and that files say what configurations are."""
import copy
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtlm.config import (
    BackboneQuantizationConfig,
    Config,
    ConfigError,
    LoRAConfig,
    ModelConfig,
    QuantizationConfig,
    TrainingConfig,
    ViTConfig,
    load_config,
    save_config,
)

ROOT = Path(__file__).resolve().parent.parent
KINDS = [TrainingConfig, ModelConfig, QuantizationConfig, ViTConfig, LoRAConfig, BackboneQuantizationConfig]
FIELDS = [(kind, name) for kind in KINDS for name in kind.model_fields]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
each_field = pytest.mark.parametrize("kind, name", FIELDS, ids=[f"{kind.__name__}.{name}" for kind, name in FIELDS])
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def one_line(error):
    "Return the only line of an error, after checking that it is one."
    assert type(error) is ConfigError and error.problems == (str(error),)
    return well_formed(error)[0]


def well_formed(error):
    "Return the lines of an error, each short, printable and of the form `where: found; expected what.`"
    for line in error.problems:
        assert len(line) <= 300 and line.isprintable(), line
        assert "; expected " in line or line.endswith("..."), line
    assert 1 <= len(error.problems) <= 20
    return list(error.problems)


def refusal(call, *args, **kwargs):
    "Return the ConfigError that the call raises."
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return caught.value


# ---- the specs' scenarios ----

def test_config_loading(tmp_path):
    """WHEN training is initiated THEN hyperparameters can be loaded from configuration file or passed as parameters
    AND config includes learning rate, weight decay, betas, and other training parameters
    AND config includes quantization settings (mode, bits, type, fine-tuning flag)"""
    (tmp_path / "run.yaml").write_text("learning_rate: 1e-3\nweight_decay: 0.01\nbetas: [0.9, 0.99]\nquantization_mode: qat\nquantization_bits: 4\n"
                                       "quantization_type: static\nenable_quantized_finetuning: true\n")
    assert load_config(tmp_path / "run.yaml") == TrainingConfig(
        learning_rate=1e-3, weight_decay=0.01, betas=(0.9, 0.99), quantization_mode="qat", quantization_bits=4, quantization_type="static",
        enable_quantized_finetuning=True)


@each_field
def test_config_documentation(kind, name):
    """WHEN config system is used THEN all config parameters are documented AND default values are clearly specified
    AND quantization config fields are documented with usage examples"""
    [row] = kind.describe(name)
    info = kind.model_fields[name]
    assert len(row["meaning"]) > 8 and row["unit"] and row["range"] and row["default"] != "" and row["example"], row
    example, beside = info.examples[0], info.json_schema_extra["needs"]
    value = kind(**{name: example}, **beside).to_dict()[name]
    assert value == example or (isinstance(example, dict) and value.items() >= example.items())
    assert name == "backbone" or value != kind().to_dict()[name], "the example shows the default"


def test_quantization_config_defaults():
    """WHEN TrainingConfig is created without quantization settings THEN quantization is disabled by default (quantization_mode=None)
    AND training proceeds with full-precision model AND backward compatibility is maintained"""
    config = TrainingConfig()
    assert (config.quantization_mode, config.quantization_bits, config.quantization_type) == (None, 8, "dynamic")
    assert config.enable_quantized_finetuning is False and config.dtype == "fp32"
    assert (config.learning_rate, config.weight_decay, config.betas) == (3e-4, 0.1, (0.9, 0.95))


@pytest.mark.parametrize("mode", ["ptq", "qat", None])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("type", ["static", "dynamic"])
@pytest.mark.parametrize("tune", [True, False])
def test_configure_quantization_via_training_config(mode, bits, type, tune):
    """WHEN TrainingConfig is created with quantization settings THEN quantization_mode can be set to "ptq", "qat", or None
    AND quantization_bits can be set to 8 or 4 AND quantization_type can be set to "static" or "dynamic"
    AND enable_quantized_finetuning can be enabled/disabled AND default values disable quantization (backward compatible)"""
    config = TrainingConfig(quantization_mode=mode, quantization_bits=bits, quantization_type=type, enable_quantized_finetuning=tune)
    assert config.quantization() == QuantizationConfig(mode=mode or "ptq", bits=bits, type=type)


def test_load_quantization_config_from_yaml(tmp_path):
    """WHEN a YAML config file includes quantization settings THEN quantization configuration is loaded and applied
    AND missing quantization fields use defaults (quantization disabled)"""
    (tmp_path / "a.yaml").write_text("quantization_mode: ptq\nquantization_bits: 4\nquantization_group_size: 64\nquantization_skip_modules: [lm_head]\n")
    (tmp_path / "b.yaml").write_text("seed: 1\n")
    assert load_config(tmp_path / "a.yaml").quantization() == QuantizationConfig(bits=4, group_size=64, skip_modules=("lm_head",))
    assert load_config(tmp_path / "b.yaml").quantization_mode is None


def test_extended_model_configuration(tmp_path):
    """Given a YAML model configuration file When LoRA or quantization is enabled Then the configuration SHALL include lora and
    quantization sections And SHALL be backward compatible with existing configurations"""
    (tmp_path / "old.yaml").write_text("backbone: vit\nimage_size: 32\npatch_size: 4\nhidden_size: 48\nnum_attention_heads: 4\n")
    (tmp_path / "new.yaml").write_text((tmp_path / "old.yaml").read_text() + "lora:\n  r: 4\n  target_modules: [query]\nquantization:\n  quant_type: fp4\n")
    old, new = (load_config(tmp_path / name, kind=ViTConfig) for name in ("old.yaml", "new.yaml"))
    assert old.lora is None and old.quantization is None and new.replace(lora=None, quantization=None) == old
    assert new.lora == LoRAConfig(r=4, target_modules=["query"]) and new.quantization == BackboneQuantizationConfig(quant_type="fp4")


@pytest.mark.parametrize("text, message", [
    ("lora: {r: 0}", "lora.r: 0; expected an integer >= 1"), ("lora: {rank: 4, r: 8}", "lora.r: given twice"), ("lora: 8", "lora: 8; expected a mapping"),
    ("lora: {r: 2048}", "lora.r: 2048; expected at most 768"), ("quantization: {quant_type: int8}", "expected one of nf4, fp4, int4"),
    ("quantization: {blocksize: 100}", "blocksize: 100; expected one of 32, 64"), ("quantisation: {}", "Did you mean quantization?"),
    ("image_size: 30", "image_size: 30; expected a multiple of patch_size = 16"), ("hidden_size: 100", "a multiple of num_attention_heads = 12"),
    ("lora: {backend: natve}", "expected one of auto, manual, peft"), ("lora: {target_modules: [3]}", "target_modules[0]: 3; expected a list of names"),
    ("lora: {lora_dropout: 1}", "lora.lora_dropout: 1; expected a number >= 0 and < 1"),
])
def test_configuration_validation(tmp_path, text, message):
    """Given a model configuration with LoRA/quantization settings When the configuration is loaded Then the system SHALL validate
    required parameters And SHALL provide clear error messages for invalid configurations"""
    (tmp_path / "vit.yaml").write_text(text)
    line = one_line(refusal(load_config, tmp_path / "vit.yaml", kind=ViTConfig))
    assert message in line and "vit.yaml:1: " in line


# ---- bad files ----

BAD_FILES = {  # name of the file: (content, what the line must say after the path)
    "empty.yaml": (b"", ": an empty file"),
    "blank.json": (b" \n\t ", ": an empty file"),
    "comment.yaml": (b"# nothing yet\n", ": no settings; expected a mapping"),
    "large.yaml": (b"#" * (256 * 1024 + 1), ": more than 256 KiB"),
    "latin.yaml": ("text: é".encode("latin-1"), ": byte 6 is not UTF-8"),
    "utf16.json": ("{}".encode("utf-16"), "looks like UTF-16"),
    "nul.yaml": (b"text: a\0b", ": byte 7 is NUL"),
    "bell.yaml": (b"seed: 1\ntext: a\x07", ":2:8: the character U+0007"),
    "syntax.yaml": (b"seed: 1\nbetas: [0.9, 0.95\n", ":3:1: "),
    "tab.yaml": (b"model:\n\thidden_size: 64\n", ":2:1: "),
    "indent.yaml": (b"seed: 1\n  max_steps: 2\n", ":2:12: mapping values are not allowed"),
    "two.yaml": (b"seed: 1\n---\nseed: 2\n", ":2:1: a second document"),
    "cut.json": (b'{"seed": 1', ":1:11: Expecting ',' delimiter"),
    "comma.json": (b'{"seed": 1,}', ":1:"),
    "after.json": (b'{"seed": 1} {}', ":1:13: Extra data"),
    "yaml.json": (b"seed: 1", ":1:1: Expecting value; expected JSON"),
    "list.yaml": (b"- seed: 1\n", ": a list of 1; expected a mapping"),
    "scalar.yaml": (b"hello\n", ": the text 'hello'; expected a mapping"),
    "null.json": (b"null", ": no settings; expected a mapping"),
    "anchor.yaml": (b"seed: &s 1\n", ":1:7: the anchor &s"),
    "alias.yaml": (b"seed: *s\n", ":1:7: the alias *s"),
    "merge.yaml": (b"<<: {seed: 1}\n", ":1: <<: unknown"),
    "cycle.yaml": (b"&a [*a]", "the anchor &a"),
    "tag.yaml": (b"text: !!python/object/apply:os.system [ls]\n", ":1:7: the tag tag:yaml.org,2002:python/object/apply:os.system"),
    "local.yaml": (b"text: !env HOME\n", ":1:7: the tag !env"),
    "deep.yaml": (b"[" * 200_000, ":1:21: a nesting deeper than 20 levels"),
    "deep.json": (b"[" * 200_000, "a nesting deeper than 20 levels"),
    "deeper.yaml": (b"- " * 1000, ":1:41: a nesting deeper than 20 levels"),
    "wide.yaml": (b"betas: [" + b"1," * 100_000 + b"1]", "more than 4096 values"),
    "digits.yaml": (b"seed: " + b"9" * 5000, ":1:7: an integer of 5000 digits"),
    "digits.json": (b'{"seed": ' + b"9" * 5000 + b"}", ":1:10: an integer of 5000 digits"),
    "key.yaml": (b"1: a\n", ":1:1: the key 1; expected a name"),
    "keys.yaml": (b"? {a: 1}\n: 2\n", ":1:3: the key of several parts"),
    "twice.yaml": (b"seed: 1\nmax_steps: 2\nseed: 3\n", ":1: seed: given twice, at lines 1 and 3"),
    "twice.json": (b'{"model": {"n_layer": 1,\n"n_layer": 2}}', ":1: model.num_hidden_layers: given twice, at lines 1 and 2"),
    "names.yaml": (b"batch_size: 1\nper_device_train_batch_size: 1\n", ":2: batch_size: given twice, as batch_size and as per_device_train_batch_size"),
    "a.toml": (b"seed = 1", ": unknown suffix '.toml'; expected a .yaml, .yml or .json file"),
    "escape.yaml": (b'text: "\\U00110000"', ":1:"),
    "half.json": (b'{"text": "\\ud800"}', ":1: text: the text '\\ud800'; expected text without control characters"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_in_one_line(tmp_path, name):
    "Each names the file, and the place in it where there is one."
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    line = one_line(refusal(load_config, tmp_path / name))
    assert name + message in line or (not message.startswith(":") and name in line and message in line), line


def test_bomb_of_aliases_is_refused_before_it_is_built(tmp_path):
    "Three hundred bytes that stand for millions of values."
    (tmp_path / "bomb.yaml").write_text("a: &a [x,x,x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")))
    assert "the anchor &a" in one_line(refusal(load_config, tmp_path / "bomb.yaml"))


def test_what_is_no_file(tmp_path):
    "Missing, a folder, a pipe (which must not be waited for), no path at all."
    (tmp_path / "run.yaml").write_text("seed: 1")
    assert "not found" in (line := one_line(refusal(load_config, tmp_path / "rnu.yaml"))) and "Did you mean run.yaml?" in line
    assert "Its folder does not exist." in one_line(refusal(load_config, tmp_path / "no" / "run.yaml"))
    assert "is a directory" in one_line(refusal(load_config, tmp_path))
    assert "not found" in one_line(refusal(load_config, tmp_path / "run.yaml" / "run.yaml"))
    for path in ("a\0.yaml", "x" * 5000 + ".yaml", "", 5, b"run.yaml", ["run.yaml"]):
        one_line(refusal(load_config, path))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.yaml")
        assert "is not a regular file" in one_line(refusal(load_config, tmp_path / "pipe.yaml"))


def test_unreadable_file(tmp_path, monkeypatch):
    "Tests may run as root, who may read everything: the system's refusal is played."
    (tmp_path / "run.yaml").write_text("seed: 1")

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", refuse)
    assert "run.yaml: permission denied; expected" in one_line(refusal(load_config, str(tmp_path / "run.yaml")))


def test_byte_order_mark_and_both_line_ends_are_accepted(tmp_path):
    "As editors on Windows write them; lines are still counted."
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfseed: 1\r\nmax_steps: 5\r\n")
    (tmp_path / "b.json").write_bytes(b'\xef\xbb\xbf{"seed": 1,\r\n"max_steps": 5}')
    assert load_config(tmp_path / "a.yaml") == load_config(tmp_path / "b.json") == TrainingConfig(seed=1, max_steps=5)
    (tmp_path / "c.yml").write_bytes(b"seed: 1\r\n\r\nmax_steps: 0\r\n")
    assert "c.yml:3: max_steps: 0" in one_line(refusal(load_config, tmp_path / "c.yml"))


# ---- bad values ----

BAD_VALUES = [  # what stands in the file, what the line must say
    ("learning_rate: fast", "learning_rate: the text 'fast'; expected a number > 0 and <= 10."),
    ("learning_rate: '3e-4'", "learning_rate: the text '3e-4'; expected a number > 0 and <= 10. Write it without quotes."),
    ("learning_rate: true", "learning_rate: true; expected a number"),
    ("learning_rate: 0", "learning_rate: 0; expected a number > 0"),
    ("learning_rate: -1e-3", "learning_rate: -0.001; "),
    ("learning_rate: 10.5", "and <= 10."),
    ("learning_rate: .nan", "learning_rate: nan; expected a number > 0 and <= 10."),
    ("learning_rate: 1e999", "learning_rate: inf; "),
    ("learning_rate:", "learning_rate: null; expected a number > 0 and <= 10. Leave it out for the default, 0.0003."),
    ("learning_rate: [1]", "learning_rate: a list of 1; "),
    ("learning_rate: 1_0", "learning_rate: the text '1_0'; "),
    ("weight_decay: -0.1", "expected a number >= 0"),
    ("betas: [0.9]", "betas: a list of 1; expected a list of 2 numbers, each >= 0 and < 1."),
    ("betas: [0.9, 0.9, 0.9]", "betas: a list of 3; "),
    ("betas: [0.9, 1]", "betas[1]: 1; expected a list of 2 numbers"),
    ("betas: [true, 0.9]", "betas[0]: true; "),
    ("betas: 0.9", "betas: 0.9; "),
    ("eps: 0", "eps: 0; expected a number > 0"),
    ("max_grad_norm: 0", "max_grad_norm: 0; expected a number > 0 and <= 1000000000.0, or null."),
    ("batch_size: 0", "batch_size: 0; expected an integer >= 1"),
    ("batch_size: 3.0", "batch_size: 3.0; expected an integer >= 1 and <= 1048576. Write 3, without the point."),
    ("batch_size: 3.5", "batch_size: 3.5; expected an integer"),
    ("batch_size: '3'", "Write it without quotes."),
    ("batch_size: true", "batch_size: true; expected an integer"),
    ("batch_size: 99999999999999999999999", "batch_size: an integer of about 24 digits; "),
    ("max_steps: 0", "max_steps: 0; "),
    ("max_steps: 12:30:00", "max_steps: the text '12:30:00'; "),
    ("max_steps: 10\nwarmup_steps: 11", "warmup_steps: 11; expected at most max_steps = 10."),
    ("seed: -1", "seed: -1; expected an integer >= 0 and < 4294967296."),
    ("seed: 4294967296", "seed: 4294967296; "),
    ("seed: 2024-01-01", "seed: the text '2024-01-01'; "),
    ("label_smoothing: 1", "expected a number >= 0 and < 1"),
    ("compile: no", "compile: the text 'no'; expected true or false."),
    ("compile: 1", "compile: 1; expected true or false."),
    ("compile: 'true'", "Write it without quotes."),
    ("dtype: fp16", "dtype: the text 'fp16'; expected one of fp32, bf16."),
    ("lr_scheduler_type: cosin", "expected one of constant, cosine, linear, warmup_stable_decay. Did you mean cosine?"),
    ("device: gpu", "device: the text 'gpu'; expected text such as auto, cpu"),
    ("run_name: 2024", "run_name: 2024; "),
    ("run_name: ../other", "run_name: the text '../other'; "),
    ("run_name: /etc", "run_name: the text '/etc'; "),
    ("run_name: aux", "run_name: the text 'aux'; "),
    ("output_dir: ''", "output_dir: an empty text; "),
    ("text: \"a\\0b\"", "text: the text 'a\\x00b'; expected text without control characters, or null."),
    ("parallel: dpp", "parallel: the text 'dpp'; expected one of ddp, fsdp. Did you mean ddp?"),
    ("parallel:", "parallel: null; expected one of ddp, fsdp. Leave it out for the default, \"ddp\"."),
    ("report_to: [wanbd]", "report_to[0]: the text 'wanbd'; expected a list of tensorboard, trackio, wandb. Did you mean wandb?"),
    ("report_to: all", "report_to[0]: the text 'all'; expected a list of tensorboard, trackio, wandb."),
    ("save_steps: 0", "save_steps: 0; expected an integer >= 1 and <= 1000000000, or null."),
    ("save_total_limit: -1", "save_total_limit: -1; "),
    ("validation_fraction: 1", "validation_fraction: 1; expected a number >= 0 and < 1."),
    ("early_stopping_patience: 3", "early_stopping_patience: 3 without eval_steps; expected eval_steps too."),
    ("vocab: bpe", "vocab: bpe without vocab_size; "),
    ("vocab_size: 512", "vocab_size: 512 with vocab = byte; "),
    ("quantization_bits: 3", "quantization_bits: 3; expected one of 8, 4."),
    ("quantization_bits: 8.0", "Write 8, without the point."),
    ("quantization_bits: true", "quantization_bits: true; "),
    ("quantization_mode: ptk", "Did you mean ptq?"),
    ("quantization_mode: false", "quantization_mode: false; expected one of ptq, qat, or null."),
    ("quantization_group_size: 32", "quantization_group_size: 32 with quantization_bits = 8; expected null, or quantization_bits = 4."),
    ("quantization_group_size: 0\nquantization_bits: 4", "quantization_group_size: 0; expected an integer that is -1 or from 2 to 65536, or null."),
    ("quantization_skip_modules: lm_head", "quantization_skip_modules: the text 'lm_head'; expected a list of names or globs."),
    ("quantization_skip_modules: [1]", "quantization_skip_modules[0]: 1; "),
    ("model: 5", "model: 5; expected a mapping with the fields of ModelConfig, or null."),
    ("model: {hidden_size: 100}", "model.hidden_size: 100; expected a multiple of num_attention_heads = 6."),
    ("model: {hidden_size: 66}", "an even number of features a head"),
    ("model: {num_key_value_heads: 4}", "model.num_key_value_heads: 4; expected a divisor of num_attention_heads = 6."),
    ("model: {num_attention_heads: 0}", "model.num_attention_heads: 0; "),
    ("model: {dropout: 1}", "model.dropout: 1; expected a number >= 0 and < 1."),
    ("model: {hidden_size: 122880, num_hidden_layers: 1024}", "expected at most 2**40."),
    ("model: {block_size: 64}", "block_size: 256; expected at most model.block_size = 64."),
    ("lerning_rate: 1", "lerning_rate: unknown; expected a field of TrainingConfig. Did you mean learning_rate?"),
    ("model: {n_layer5: 1}", "model.n_layer5: unknown; expected a field of ModelConfig. Did you mean n_layer"),
    ("n_layer: 1", "n_layer: unknown; expected a field of TrainingConfig. Did you mean model.n_layer?"),
    ("warmup_ratio: 0.1", "Write warmup_steps"),
    ("bf16: true", "Write dtype: bf16."),
    ("target: os.system", "target: unknown; "),
]


@pytest.mark.parametrize("text, message", BAD_VALUES, ids=[text.replace("\n", " ") for text, _ in BAD_VALUES])
def test_bad_value_is_refused_in_one_line(tmp_path, text, message):
    "From YAML with the line of its key; from JSON and from a call the same words."
    (tmp_path / "run.yaml").write_text(text)
    line = one_line(refusal(load_config, tmp_path / "run.yaml"))
    where, _, rest = line.partition("run.yaml:")
    assert rest[:3] in ("1: ", "2: ") and message in rest, line
    tree = load_tree(tmp_path / "run.yaml")
    assert one_line(refusal(TrainingConfig, **tree)) == "TrainingConfig: " + rest[3:]
    assert one_line(refusal(load_config, tree)) == "TrainingConfig: " + rest[3:]
    (tmp_path / "run.json").write_text(json.dumps(tree))
    assert one_line(refusal(load_config, tmp_path / "run.json")).partition("run.json:1: ")[2] == rest[3:]


def load_tree(path):
    "Return the tree that the configuration's own reader finds in the file."
    from qtlm.config import _build, _decode, _yaml_events
    return _build(_yaml_events(_decode(path.read_bytes())))[0]


def test_all_problems_of_a_file_are_told_at_once(tmp_path):
    "In the order of the file, overrides last; a wrong field does not hide a broken rule among the others."
    (tmp_path / "run.yaml").write_text("seed: -1\nseed: 2\nmax_steps: 10\nwarmup_steps: 20\nmodel:\n  hidden_size: 100\n  nope: 1\nbetas: 3\n")
    lines = well_formed(refusal(load_config, tmp_path / "run.yaml", "eps=-1", "run_name=a/b", "dtype"))
    assert [line.partition("run.yaml:")[2].partition(":")[0] for line in lines[:6]] == ["1", "1", "4", "6", "7", "8"]
    assert sorted(line.split(":")[0] for line in lines[6:]) == ["override 'dtype'", "override 'eps=-1'", "override 'run_name=a/b'"]


def test_a_rule_about_a_wrong_field_says_nothing():
    "One mistake, one line: max_steps is wrong, and so nothing is said about a warm-up that would not fit."
    assert "max_steps: 0;" in one_line(refusal(TrainingConfig, max_steps=0, warmup_steps=20_000))
    assert "warmup_steps: -1;" in one_line(refusal(TrainingConfig, warmup_steps=-1, max_steps=5))
    assert len(well_formed(refusal(TrainingConfig, seed=-1, warmup_steps=20_000))) == 2


def test_describing_an_unknown_field_is_an_error():
    "With the nearest name; other libraries' names are understood."
    assert "Did you mean learning_rate?" in one_line(refusal(TrainingConfig.describe, "learning_rat"))
    assert [row["field"] for row in TrainingConfig.describe("torch_compile", "seed")] == ["seed", "compile"]


def test_a_long_list_of_problems_is_cut_at_twenty(tmp_path):
    "The last line tells how many more there were."
    (tmp_path / "run.yaml").write_text("".join(f"key{i}: 1\n" for i in range(50)))
    lines = well_formed(refusal(load_config, tmp_path / "run.yaml"))
    assert len(lines) == 20 and lines[-1].endswith("(and 30 more)") and "run.yaml:20: " in lines[-1]
    assert len(well_formed(refusal(TrainingConfig, **{f"key{i}": 1 for i in range(21)}))) == 20


VALUES = [None, True, 0, -1, 3.0, math.nan, 1e400, 10**5000, "3", "x\0", "", [], [1], [[1]], {}, {1: 2}, {"": 1}, object(), b"x", set(), (0.1,), "\ud800", 1j]


@each_field
def test_no_value_gets_past_or_raises_anything_else(kind, name):
    "Whatever is given, there is a valid configuration that its own dictionary gives again, or a ConfigError."
    refused = 0
    for value in VALUES:
        try:
            config = kind(**{name: value})
        except ConfigError as error:
            refused += bool(well_formed(error))
        else:
            assert kind(**config.to_dict()) == config and hash(kind(**config.to_dict())) == hash(config)
    assert refused >= len(VALUES) - 10


# ---- what is accepted ----

def test_scalars_mean_what_yaml_1_2_says(tmp_path):
    "3e-4 is a number, no is a word, 010 is ten."
    (tmp_path / "run.yaml").write_text("learning_rate: 3e-4\neps: 1E-9\nwarmup_steps: 010\nseed: 0xff\nrun_name: no\noutput_dir: 2024-01-01\nmax_steps: +500\n"
                                       "max_grad_norm: ~\ncompile: True\ntext: off\n")
    assert load_config(tmp_path / "run.yaml") == TrainingConfig(
        learning_rate=3e-4, eps=1e-9, warmup_steps=10, seed=255, run_name="no", output_dir="2024-01-01", max_steps=500, max_grad_norm=None, compile=True, text="off")


@pytest.mark.parametrize("override, expected", [
    ("learning_rate=1e-3", {"learning_rate": 1e-3}), ("model.hidden_size=384", {"model": ModelConfig(hidden_size=384)}), ("betas=[0.9,0.99]", {"betas": (0.9, 0.99)}),
    ("quantization_mode=null", {}), ("text=*.py", {"text": "*.py"}), ("text=C: #1", {"text": "C: #1"}), ("text=a=b", {"text": "a=b"}), ("run_name='2024'", {"run_name": "2024"}),
    ("model={n_layer: 2}", {"model": ModelConfig(num_hidden_layers=2)}), (" seed = 7 ", {"seed": 7}), ("per_device_train_batch_size=4", {"batch_size": 4}),
    ("quantization_skip_modules=[lm_head, '*.0']", {"quantization_skip_modules": ("lm_head", "*.0")}),
])
def test_override(override, expected):
    "Dotted keys, core scalars, flow collections, other libraries' names."
    assert load_config(None, override) == TrainingConfig(**expected)


@pytest.mark.parametrize("override, message", [
    ("seed", "no value; expected key=value"), ("seed=", "no value"), ("=3", "no name"), ("seed.x=1", "seed: a mapping; expected an integer"), ("a.b=1", "a: unknown"),
    ("model.hidden=1", "model.hidden: unknown; expected a field of ModelConfig. Did you mean"), ("betas=[0.9", "1:5: "), ("betas=[*a]", "the alias *a"),
    ("betas=[0.9, 0.9] 1", "1:12: "), ("seed=" + "1" * 5000, "an integer of 5000 digits"), ("max_steps=0", "max_steps: 0; "), ("compile=yes", "the text 'yes'"),
    ("warmup_steps=2000", "expected at most max_steps = 1000"), ("model.block_size=64", "block_size: 256; expected at most model.block_size = 64"),
])
def test_bad_override_is_named(override, message):
    "The line begins with the override, cut where it is long."
    line = one_line(refusal(load_config, None, override))
    assert line.startswith(f"override '{override[:30]}") and message in line


def test_override_replaces_what_the_file_says(tmp_path):
    "Also where the file uses another name; the last of two counts; the mapping given is not changed."
    (tmp_path / "run.yaml").write_text("per_device_train_batch_size: 2\nmodel:\n  n_layer: 2\n  n_embd: 96\n")
    config = load_config(tmp_path / "run.yaml", "batch_size=4", "batch_size=8", "model.num_hidden_layers=3")
    assert config == TrainingConfig(batch_size=8, model=ModelConfig(num_hidden_layers=3, hidden_size=96))
    assert load_config(tmp_path / "run.yaml", "model=null").model is None
    tree = {"model": {"n_layer": 2}}
    assert load_config(tree, "model.n_layer=3").model.num_hidden_layers == 3 and tree == {"model": {"n_layer": 2}}


ALIASES = [(kind, name, alias) for kind, name in FIELDS for alias in kind.model_fields[name].json_schema_extra["aliases"]]


@pytest.mark.parametrize("kind, name, alias", ALIASES, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_names_of_other_libraries(kind, name, alias):
    "Understood everywhere a field is named; both names together are a contradiction; no name means two things."
    info = kind.model_fields[name]
    example, beside = info.examples[0], info.json_schema_extra["needs"]
    assert alias not in kind.model_fields
    assert kind(**{alias: example}, **beside) == kind(**{name: example}, **beside) == kind(**beside).replace(**{alias: example})
    assert f"{name}: given twice, as {name} and as {alias}" in one_line(refusal(kind, **{name: example, alias: example}, **beside))
    assert [owner for owner, field, other in ALIASES if owner is kind and other == alias] == [kind]


# ---- configurations are values ----

@each_kind
def test_a_configuration_is_a_value(kind):
    "Equal by value, hashable, copyable, picklable, frozen."
    config = kind()
    for same in (kind(), kind(**config.to_dict()), config.replace(), copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same == config and hash(same) == hash(config) and len({same, config}) == 1
    name = next(iter(kind.model_fields))
    assert "frozen" in one_line(refusal(setattr, config, name, 1)) and config == kind()
    assert isinstance(config, Config) and json.loads(json.dumps(config.to_dict(), allow_nan=False)) == config.to_dict()


def test_paths_may_be_path_objects():
    "They are kept as text, so that the configuration stays JSON."
    config = TrainingConfig(output_dir=Path("runs") / "a", text=Path("book.txt"))
    assert config.to_dict()["output_dir"] == os.path.join("runs", "a") and config == TrainingConfig(**config.to_dict())


def test_replace_checks_again_and_derives_anew():
    "What was given stays, what followed from it follows the new value; the original is untouched."
    model = ModelConfig(hidden_size=96)
    wider = model.replace(hidden_size=384, num_attention_heads=12)
    assert (wider.intermediate_size, wider.num_key_value_heads) == (1024, 12) and model == ModelConfig(hidden_size=96)
    assert ModelConfig(intermediate_size=64).replace(hidden_size=384).intermediate_size == 64
    assert ModelConfig(intermediate_size=None) == ModelConfig() and ModelConfig().replace(intermediate_size=None) == ModelConfig()
    assert "given twice" in one_line(refusal(model.replace, hidden_size=96, n_embd=96))
    assert "expected a multiple of" in one_line(refusal(model.replace, hidden_size=97))
    assert "expected a multiple of" in one_line(refusal(model.__replace__, hidden_size=97))  # what copy.replace calls from Python 3.13 on


def test_parameter_count_is_that_of_the_model():
    "The formula against the built model, tied and untied, with fewer key heads."
    model = pytest.importorskip("qtlm.model")
    for fields in ({}, {"tie_word_embeddings": False}, {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 100, "num_hidden_layers": 2}):
        config = ModelConfig(vocab_size=50, hidden_size=48, num_attention_heads=4).replace(**fields)
        assert config.num_parameters() == sum(p.numel() for p in model.TinyLM(config).parameters())


@each_kind
def test_schema_and_tables_come_from_the_fields(kind):
    "The schema that editors use has every field, its limits and its example; the tables have every field."
    schema = kind.json_schema()
    names = {alias: name for name, info in kind.model_fields.items() for alias in [name, *info.json_schema_extra["aliases"]]}
    assert list(schema["properties"]) == list(names) and schema["additionalProperties"] is False
    for name, part in schema["properties"].items():
        own = schema["properties"][names[name]]
        assert part["examples"] and "Unit: " in part["description"] and {**part, "description": ""} == {**own, "description": ""}
    json.dumps(schema)
    assert [row["field"] for row in kind.describe()] == list(kind.model_fields)
    for shown in (kind()._repr_markdown_(), repr(kind.describe())):
        assert shown.count("\n") == len(kind.model_fields) + 1 and all(f"| {name} |" in shown for name in kind.model_fields)


def test_schema_has_the_limits():
    "As numbers, in the words of JSON Schema."
    properties = TrainingConfig.json_schema()["properties"]
    assert properties["learning_rate"]["exclusiveMinimum"] == 0 and properties["learning_rate"]["maximum"] == 10
    assert properties["quantization_bits"]["enum"] == [8, 4] and properties["learning_rate"]["default"] == 3e-4


# ---- files say what configurations are ----

@each_kind
@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml", ".JSON"])
def test_saved_file_loads_equal(tmp_path, kind, suffix):
    "Defaults and all examples; the YAML means the same to any YAML reader."
    examples = {name: info.examples[0] for name, info in kind.model_fields.items() if kind not in (ModelConfig, ViTConfig) or name in ("dropout", "num_labels")}
    for name in ("quantization_bits", "gradients_in_backward"):  # they need others, which the examples contradict
        examples.pop(name, None)
    for config in (kind(), kind(**examples, **({"quantization_bits": 4} if kind is TrainingConfig else {}))):
        path = save_config(config, tmp_path / f"saved{suffix}")
        assert load_config(path, kind=kind) == config and path == tmp_path / f"saved{suffix}"
        assert (json.loads if suffix.lower() == ".json" else yaml.safe_load)(path.read_text()) == config.to_dict()
        assert all(f"{name}" in path.read_text() for name in kind.model_fields)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


numbers = {
    "learning_rate": st.floats(0, 10, exclude_min=True), "weight_decay": st.floats(0, 10), "eps": st.floats(0, 1, exclude_min=True), "seed": st.integers(0, 2**32 - 1),
    "betas": st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)), "ignore_index": st.integers(-2**31, 2**31 - 1),
    "max_grad_norm": st.none() | st.floats(0, 1e9, exclude_min=True), "quantization_mode": st.sampled_from([None, "ptq", "qat"]), "compile": st.booleans(),
    "model": st.none() | st.builds(ModelConfig, num_hidden_layers=st.integers(1, 1024), rope_theta=st.floats(1, 1e9)),
}


@quick
@given(st.fixed_dictionaries({}, optional=numbers), st.sampled_from(["json", "yaml"]))
def test_every_bit_of_a_number_survives(tmp_path, fields, suffix):
    "Any valid values, through a file and back."
    config = TrainingConfig(**fields)
    assert load_config(save_config(config, tmp_path / f"c.{suffix}")) == config
    assert yaml.safe_load(config.to_yaml()) == yaml.safe_load(config.to_yaml(commented=False)) == config.to_dict()


@quick
@given(st.lists(st.text(min_size=1), min_size=1, max_size=3), st.sampled_from(["json", "yaml"]))
def test_any_text_survives_or_is_refused(tmp_path, texts, suffix):
    "Any characters: a configuration that can be built can be written and read."
    try:
        config = TrainingConfig(text=texts[0], quantization_skip_modules=texts)
    except ConfigError as error:
        well_formed(error)
        assert any(not char.isprintable() for text in texts for char in text)
    else:
        assert load_config(save_config(config, tmp_path / f"c.{suffix}")) == config


PIECES = ["[", "]", "{", "}", ":", "-", "?", "!", "&a ", "*a", "%YAML 1.2\n", "---\n", "...\n", "|\n", "> \n", "\t", "'", '"', "\\U00110000", "\\ud800", "#", "\n", " ", "é",
          "\ufeff", "\x85", "\u2028", "\x07", "1e999", "~", "<<: ", "\r", "😀", ",", "seed", ": ", "model", "betas", "0.9", "null", "true", "10"]


@quick
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), st.sampled_from(["json", "yaml"]))
def test_any_file_gives_a_configuration_or_a_config_error(tmp_path, text, suffix):
    "Nothing else, ever, and never a line that a terminal cannot show."
    (tmp_path / f"f.{suffix}").write_bytes(text.encode())
    try:
        assert isinstance(load_config(tmp_path / f"f.{suffix}"), TrainingConfig)
    except ConfigError as error:
        well_formed(error)


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    "Each call to the system fails once: the old file stays, nothing else is left, and the error is one line."
    path = save_config(TrainingConfig(seed=1), tmp_path / "run.json")
    before, faults = path.read_bytes(), 0
    for name in ("fsync", "replace"):
        def fail(*args):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            line = one_line(refusal(save_config, TrainingConfig(seed=2), path))
        faults += "run.json: no space left on device; expected a file that can be written." in line
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["run.json"]
    assert faults == 2
    assert load_config(save_config(TrainingConfig(seed=2), path)).seed == 2


def test_save_refuses_what_load_would_not_read(tmp_path):
    "An unknown suffix, a folder in the way, a file where a folder should be."
    assert "unknown suffix '.toml'" in one_line(refusal(save_config, TrainingConfig(), tmp_path / "a.toml"))
    assert "unknown suffix ''" in one_line(refusal(save_config, TrainingConfig(), tmp_path / "a"))
    (tmp_path / "b.json").mkdir()
    assert "is a directory" in one_line(refusal(save_config, TrainingConfig(), tmp_path / "b.json"))
    save_config(TrainingConfig(), tmp_path / "new" / "c.json")
    one_line(refusal(save_config, TrainingConfig(), tmp_path / "new" / "c.json" / "d.json"))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["b.json", "c.json", "new"]


def test_import_is_light():
    "The command line answers before torch, numpy and matplotlib are there."
    code = "import sys, qtlm.config; sys.exit(bool({'torch', 'numpy', 'matplotlib', 'fastcore'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- what programs and tired people give ----

@pytest.mark.parametrize("name, given, plain", [
    ("max_steps", np.int64(5), 5), ("batch_size", np.uint8(4), 4), ("compile", np.True_, True), ("quantization_bits", np.int32(4), 4),
    ("betas", np.array([0.5, 0.75]), (0.5, 0.75)), ("ignore_index", np.array(-1), -1), ("learning_rate", np.float64(0.5), 0.5),
])
def test_numpy_values_are_plain_ones(name, given, plain):
    "They become Python's own, so that what is saved and hashed is the same; a range holds for them too."
    config = TrainingConfig(**{name: given})
    assert config == TrainingConfig(**{name: plain}) and hash(config) == hash(TrainingConfig(**{name: plain}))
    assert type(getattr(config, name)) is type(plain) and json.dumps(config.to_dict())
    assert config == load_config({name: given}) and config == TrainingConfig().replace(**{name: given})


def test_numpy_values_are_checked():
    assert "max_steps: -5; expected an integer >= 1" in one_line(refusal(TrainingConfig, max_steps=np.int64(-5)))
    assert "max_steps: true; expected an integer" in one_line(refusal(TrainingConfig, max_steps=np.True_))
    assert "model.hidden_size: 25; expected a multiple" in one_line(refusal(TrainingConfig, model={"hidden_size": np.int64(25)}))


@pytest.mark.parametrize("override, hint", [
    ("quantization_mode=PTQ", "Did you mean ptq?"), ("betas=0.9,0.95", "Write [0.9,0.95], in brackets."), ("quantization_skip_modules=lm_head", "Write [lm_head], in brackets."),
    ("dtype=bfloat16", "Did you mean bf16?"),
])
def test_hint_for_a_likely_slip(override, hint):
    line = one_line(refusal(load_config, None, override))
    assert line.endswith(hint), line
    if "brackets" in hint:
        assert load_config(None, override.replace("=", "=[") + "]")


def test_attributes_cannot_be_deleted():
    config = TrainingConfig(seed=3)
    assert "seed: a deletion; expected a frozen configuration" in one_line(refusal(delattr, config, "seed"))
    assert config.seed == 3


@pytest.mark.parametrize("text", ["%YAML 1.1\n---\nwarmup_steps: 010\n", "%TAG ! tag:x,2000:\n---\nseed: 1\n"])
def test_directive_is_refused(tmp_path, text):
    "It announces rules of another YAML than the one that is read."
    (tmp_path / "run.yaml").write_text(text)
    assert "run.yaml:1:1: a directive" in one_line(refusal(load_config, tmp_path / "run.yaml"))
    (tmp_path / "run.yaml").write_text("%YAML 1.2\n---\nseed: 1\n")
    assert load_config(tmp_path / "run.yaml") == TrainingConfig(seed=1)


def test_unclosed_quote_is_shown_where_it_was_opened(tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 1\nrun_name: 'abc\nmax_steps: 3\n")
    assert "that began at line 2; expected YAML" in one_line(refusal(load_config, tmp_path / "run.yaml"))


def test_link_to_nowhere_is_told(tmp_path):
    (tmp_path / "run.yaml").symlink_to(tmp_path / "gone.yaml")
    assert "not found; " in (line := one_line(refusal(load_config, tmp_path / "run.yaml"))) and line.endswith("leads to no file.")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert save_config(TrainingConfig(seed=5), "~/run.yaml") == tmp_path / "run.yaml"
    assert load_config("~/run.yaml").seed == 5


@pytest.mark.parametrize("kind", [dict, "TrainingConfig", TrainingConfig(), None, int])
def test_kind_is_a_class_of_configurations(kind):
    assert "load_config: kind: " in one_line(refusal(load_config, None, kind=kind))


def test_arguments_of_save_config(tmp_path):
    for config, path, told in [({"seed": 1}, tmp_path / "a.json", "config: a mapping"), (None, tmp_path / "a.yaml", "config: null"),
                               (TrainingConfig(), None, "path: null"), (TrainingConfig(), 3, "path: 3"),
                               (tmp_path / "a.json", TrainingConfig(), "config: a value of type")]:
        assert f"save_config: {told}" in one_line(refusal(save_config, config, path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [3, None, ""])
def test_describe_takes_names(name):
    assert "unknown; expected a field of TrainingConfig" in one_line(refusal(TrainingConfig.describe, name))


def test_empty_path_is_no_folder():
    assert "load_config: an empty text; expected a path" in one_line(refusal(load_config, ""))


# ---- fields that came later ----

def test_a_config_saved_before_these_fields_existed_still_loads(tmp_path):
    "What they mean then is what was done then."
    later = ("parallel", "report_to")
    old = {name: value for name, value in TrainingConfig(seed=3).to_dict().items() if name not in later}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert len(old) == len(TrainingConfig.model_fields) - len(later)
    assert load_config(tmp_path / "config.json") == TrainingConfig(seed=3, parallel="ddp", report_to=[])


@pytest.mark.parametrize("text, taken", [
    ("all-linear", ("all-linear",)), ("'*.query'", ("*.query",)), (r"'.*\.[01]\.query'", r".*\.[01]\.query"), ("[query, '*.key']", ("query", "*.key"))])
def test_target_modules_as_in_peft(tmp_path, text, taken):
    "A list of names and globs, or one text; both load again as they are."
    (tmp_path / "vit.yaml").write_text(f"lora:\n  target_modules: {text}\n  exclude_modules: {text}\n")
    config = load_config(tmp_path / "vit.yaml", kind=ViTConfig)
    assert config.lora.target_modules == config.lora.exclude_modules == taken
    for name in ("again.yaml", "again.json"):
        assert load_config(save_config(config, tmp_path / name), kind=ViTConfig) == config


def test_two_words_for_what_is_our_own():
    "native is manual, for adapters and for 4 bits."
    assert LoRAConfig(backend="native") == LoRAConfig(backend="manual") and BackboneQuantizationConfig(backend="native").backend == "manual"
