# pytest tests/test_model.py
"""TinyLM against transformers' Llama, and its laws: causality, count, initialisation, precision, what it refuses."""
import copy
import json
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qtlm.config import ConfigError, ModelConfig
from qtlm.model import Attention, ModelInputError, RMSNorm, TinyLM, apply_rope, count_parameters, rope_tables

SHAPES = {
    "multi-head, tied": {},
    "multi-head, untied": {"tie_word_embeddings": False},
    "grouped, tied": {"num_key_value_heads": 2},
    "grouped, untied": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "one key head, other constants": {"num_key_value_heads": 1, "rope_theta": 500.0, "rms_norm_eps": 1e-3, "intermediate_size": 24},
    "one block, narrow head": {"num_hidden_layers": 1, "num_attention_heads": 12, "num_key_value_heads": 4},
}


def small(seed=0, **changes):
    fields = {"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "block_size": 40, "initializer_range": 0.2}
    return TinyLM(**(fields | changes), generator=torch.Generator().manual_seed(seed))


def tokens(model, *shape, seed=0):
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def to_llama(model):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.to_llama_config()))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_same_names_shapes_and_logits_as_llama(shape):
    model = small(**shape)
    llama = to_llama(model)
    mine, theirs = model.state_dict(), llama.state_dict()
    assert {n: p.shape for n, p in mine.items()} == {n: p.shape for n, p in theirs.items()}
    assert list(dict(model.named_parameters())) == list(dict(llama.named_parameters()))
    llama.load_state_dict(mine, strict=True)
    ids = tokens(model, 2, 40)
    got, want = model(ids), llama(input_ids=ids).logits
    assert want.std() > 0.3                                         # the weights are large enough for the comparison to mean something
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()

    back = small(seed=1, **shape)
    back.load_state_dict(llama.state_dict(), strict=True)           # and the other way
    assert torch.equal(back(ids), got)


def test_same_gradients_as_llama():
    model = small(num_key_value_heads=2)
    llama = to_llama(model)
    llama.load_state_dict(model.state_dict())
    ids = tokens(model, 2, 16)
    for m in (model, llama):
        logits = m(ids)
        torch.nn.functional.cross_entropy(getattr(logits, "logits", logits)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = dict(llama.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)


def test_close_to_llama_in_bfloat16():
    model = small(num_key_value_heads=2)
    llama = to_llama(model).to(torch.bfloat16)
    llama.load_state_dict(model.state_dict())
    ids, exact = tokens(model, 4, 40), model(tokens(model, 4, 40))
    ours = (copy.deepcopy(model).to(torch.bfloat16)(ids) - exact).square().mean().sqrt()
    theirs = (llama(input_ids=ids).logits - exact).square().mean().sqrt()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = (model(ids) - exact).square().mean().sqrt()
    assert ours <= 1.25 * theirs and mixed <= theirs


def test_llama_config_is_json():
    fields = json.loads(json.dumps(small(block_size=17, rope_theta=123.0).to_llama_config()))
    assert fields["max_position_embeddings"] == 17 and fields["rope_theta"] == 123.0 and fields["model_type"] == "llama"


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_count_and_causality_for_any_shape(data):
    draw = data.draw
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    shape = {
        "vocab_size": draw(st.integers(2, 40)),
        "num_attention_heads": heads,
        "hidden_size": heads * draw(st.sampled_from([2, 4, 8])),
        "num_key_value_heads": draw(st.sampled_from([k for k in range(1, heads + 1) if heads % k == 0])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "intermediate_size": draw(st.integers(1, 40)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    model = small(**shape).eval()
    real = sum(p.numel() for p in model.parameters())
    assert real == model.num_parameters() == sum(count_parameters(model.config).values()) and all(n >= 0 for n in count_parameters(model.config).values())

    length = draw(st.integers(1, 40))
    at = draw(st.integers(0, length - 1))
    ids = tokens(model, 2, length, seed=draw(st.integers(0, 99)))
    other = ids.clone()
    other[:, at] = (other[:, at] + 1) % model.config.vocab_size
    before, after = model(ids), model(other)
    assert torch.equal(before[:, :at], after[:, :at]) and not torch.equal(before[:, at], after[:, at])
    torch.testing.assert_close(model(ids[:, : at + 1]), before[:, : at + 1], rtol=1e-4, atol=1e-4)     # a prefix stands alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causality_over_a_long_sequence(dtype):
    model = small(block_size=600, num_key_value_heads=3).to(dtype).eval()
    ids = tokens(model, 1, 600)
    before = model(ids)
    for at in (1, 63, 64, 65, 255, 256, 511, 512, 599):         # around the tile borders of fused attention
        other = ids.clone()
        other[0, at] = (other[0, at] + 1) % 61
        assert torch.equal(model(other)[:, :at], before[:, :at])


def test_batch_rows_do_not_mix():
    model = small().eval()
    ids = tokens(model, 3, 20)
    other = ids.clone()
    other[1] = (other[1] + 1) % 61
    assert torch.equal(model(ids)[[0, 2]], model(other)[[0, 2]])


def test_tied_weights_are_one_parameter():
    tied, untied = small(), small(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert untied.num_parameters() - tied.num_parameters() == 61 * 48
    for moved in (copy.deepcopy(tied), copy.deepcopy(tied).to(torch.bfloat16), copy.deepcopy(tied).to("meta").to_empty(device="cpu")):
        assert moved.lm_head.weight is moved.model.embed_tokens.weight


def test_initialisation_is_what_was_asked_for_and_seeded():
    a, b, c = small(seed=3), small(seed=3), small(seed=4)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    for layers in (1, 8):
        model = small(num_hidden_layers=layers, initializer_range=0.03)
        for name, p in model.named_parameters():
            if p.dim() == 1:
                assert p.eq(1).all()
                continue
            std = 0.03 / math.sqrt(2 * layers) if "o_proj" in name or "down_proj" in name else 0.03
            assert abs(p.std().item() / std - 1) < 5 / math.sqrt(2 * p.numel()), name


def test_rope_depends_on_distance_alone():
    cos, sin = rope_tables(16, 300, theta=1000.0)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (300, 16)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(2, 1, 300, 1, 16)
    scores = apply_rope(q, cos, sin)[0, :, 0] @ apply_rope(k, cos, sin)[0, :, 0].T
    bound = 300 * torch.finfo(torch.float32).eps * q[0, 0, 0].norm() * k[0, 0, 0].norm()
    for distance in (-299, -17, -1, 0, 1, 2, 50, 298):
        diagonal = scores.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() <= bound
    assert (scores.diagonal(1)[0] - scores.diagonal(2)[0]).abs() > 100 * bound      # and does depend on it


def test_tables_are_float32_unsaved_and_survive_moves():
    model = small()
    cos, sin = rope_tables(8, 40)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.rope_cos.dtype == torch.float32 and torch.equal(half.rope_cos, cos) and torch.equal(half.rope_sin, sin)
    assert not any("rope" in name for name in model.state_dict())
    with torch.device("meta"):
        hollow = small()
    assert torch.equal(hollow.to_empty(device="cpu").rope_sin, sin)


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 123.0])
def test_tables_are_those_of_llama_to_the_bit(theta):
    model = small(block_size=4000, rope_theta=theta)
    cos, sin = to_llama(model).model.rotary_emb(torch.zeros(1), torch.arange(4000)[None])
    assert torch.equal(model.rope_cos, cos[0]) and torch.equal(model.rope_sin[:, 4:], sin[0, :, 4:])
    assert torch.equal(model.rope_sin[:, :4], -sin[0, :, :4])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rms_norm_takes_its_mean_in_float32(scale):
    norm, x = RMSNorm(1000, eps=1e-5), scale * (1 + torch.randn(7, 1000)).bfloat16()
    norm.weight.data.uniform_(0.5, 2)
    half = copy.deepcopy(norm).bfloat16()
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * half.weight.double()
    assert ((half(x).double() - exact).abs() <= 2**-7 * exact.abs()).all()


def test_stream_stays_float32_under_autocast():
    model = small()
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens(model, 2, 8))
    assert seen == [torch.float32] * 3 and logits.dtype == torch.bfloat16
    logits.float().logsumexp(-1).sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_autocast_casts_each_normed_stream_once():
    class Casts(TorchDispatchMode):
        shapes = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
                self.shapes.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    model = small()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Casts() as seen:
        model(tokens(model, 2, 8))
    assert seen.shapes.count((2, 8, 48)) == 2 * 3 + 1               # the norms


def test_compiles_to_one_graph():
    model = small(num_key_value_heads=2, num_hidden_layers=1)
    ids = tokens(model, 2, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), model(ids))
    compiled(ids).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(ids), model(ids), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_attention_in_blocks_is_causal_and_the_same(dynamic):
    "Without gradients a compiler gets blocks of queries: the same logits, and nothing from the future."
    torch._dynamo.reset()                                                       # all models share the limit of programs for one code
    calls = []

    def backend(graph, inputs):
        count = sum("scaled_dot_product" in str(node.target) for node in graph.graph.nodes)
        return lambda *args: (calls.append(count), graph(*args))[1]

    model = small(num_key_value_heads=2, num_hidden_layers=2, block_size=600).eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for shape, blocks in (((2, 256), 4), ((2, 255), 1), ((1, 512), 4), ((2, 301), 1), ((1, 256), 1), ((1, 513), 1)):
        ids = tokens(model, *shape)
        with torch.no_grad():
            got, whole = compiled(ids), model(ids)
            assert calls.pop() == 2 * blocks, shape
            assert (got - whole).abs().max() <= 1e-5 * whole.abs().max()
            for at in (shape[1] // 4, shape[1] // 2 - 1, shape[1] - 1):         # around the borders of blocks
                other = ids.clone()
                other[:, at] = (other[:, at] + 1) % 61
                assert torch.equal(compiled(other)[:, :at], got[:, :at])
    ids = tokens(model, 2, 256)
    torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-5, atol=1e-5)
    assert calls.pop() == 2                                                     # with gradients it is one call a layer


def test_dropout_acts_in_training_alone():
    model, plain = small(dropout=0.3), small()
    ids = tokens(model, 2, 16)
    assert torch.equal(model.eval()(ids), plain(ids)) and not torch.equal(model.train()(ids), plain(ids))
    torch.manual_seed(5)
    once = model(ids)
    torch.manual_seed(5)
    assert torch.equal(once, model(ids))
    for name, p in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            p.data.zero_()                                          # with nothing from the blocks, the embedding is still dropped
    assert not torch.equal(model(ids), model.eval()(ids))


def test_learns_a_sequence_by_heart():
    model = small(initializer_range=0.02)
    ids = tokens(model, 1, 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 and torch.equal(model(ids)[0, :-1].argmax(-1), ids[0, 1:])


def test_attention_stands_alone():
    config = ModelConfig(hidden_size=12, num_attention_heads=3, num_key_value_heads=1, block_size=8)
    x = torch.randn(2, 5, 12)
    cos, sin = rope_tables(4, 8)
    attention = Attention(config)
    first = attention(x[:, :1], cos[:1], sin[:1])                   # one position sees itself: the value, whatever the query
    torch.testing.assert_close(first, attention.o_proj(attention.v_proj(x[:, :1]).repeat(1, 1, 3)))
    torch.testing.assert_close(attention(x, cos[:5], sin[:5])[:, :1], first)


@pytest.mark.parametrize("ids, told", [
    ([[1, 2]], "input_ids is list"),
    (None, "input_ids is NoneType"),
    (torch.zeros(2, 4), r"\[2, 4\] torch.float32"),
    (torch.zeros(2, 4, dtype=torch.bool), "torch.bool"),
    (torch.zeros(4).long(), r"\[4\] .*ids\[None\]"),
    (torch.zeros(1, 2, 4).long(), r"\[1, 2, 4\]"),
    (torch.tensor(3), r"\[\] torch.int64"),
    (torch.zeros(2, 0).long(), r"\[2, 0\] .*empty"),
    (torch.zeros(0, 2).long(), r"\[0, 2\] .*empty"),
    (torch.zeros(1, 41).long(), r"\[1, 41\] .*block_size 40"),
    (torch.full((1, 4), 61), "ids from 61 to 61; expected 0 to 60"),
    (torch.tensor([[3, -100]]), "ids from -100 to 3; expected 0 to 60"),
    (torch.zeros(1, 4, device="meta").long(), "on meta; .* on cpu"),
])
def test_mistakes_are_one_line_errors(ids, told):
    with pytest.raises(ModelInputError, match=told) as error:
        small()(ids)
    text = str(error.value)
    assert isinstance(error.value, ValueError) and text.startswith("TinyLM: ") and "expected" in text and "\n" not in text and len(text) <= 300


def test_integer_ids_of_either_width():
    model = small()
    ids = tokens(model, 2, 40)
    assert torch.equal(model(ids), model(ids.int()))


def test_configuration_at_the_door():
    config = ModelConfig(hidden_size=24, num_attention_heads=2)
    assert TinyLM(config).config == config and TinyLM(config, vocab_size=9).config.vocab_size == 9
    assert TinyLM(hidden_size=24, num_attention_heads=2).config == config
    with pytest.raises(ModelInputError, match="config is dict"):
        TinyLM({"hidden_size": 24})
    with pytest.raises(ConfigError):
        TinyLM(hiden_size=24)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_as_on_a_cpu():
    model = small(num_key_value_heads=2)
    ids = tokens(model, 2, 40)
    want = model(ids)
    moved = copy.deepcopy(model).cuda()
    torch.testing.assert_close(moved(ids.cuda()).cpu(), want, rtol=1e-3, atol=1e-3)
    with pytest.raises(ModelInputError, match="on cpu; .* on cuda:0"):
        moved(ids)
    with torch.autocast("cuda", torch.bfloat16):
        assert moved(ids.cuda()).dtype == torch.bfloat16


# ---- weights that come and go ----

def test_file_that_transformers_saved(tmp_path):
    "Its tied Llama leaves lm_head.weight out of the file."
    safetensors = pytest.importorskip("safetensors.torch")
    model = small(num_key_value_heads=2).eval()
    llama = to_llama(model)
    llama.load_state_dict(model.state_dict())
    llama.save_pretrained(tmp_path)
    weights = safetensors.load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    loaded, ids = small(seed=1, num_key_value_heads=2).eval(), tokens(model, 2, 9)
    names = set(weights)
    loaded.load_state_dict(weights)
    assert torch.equal(loaded(ids), model(ids)) and set(weights) == names     # the caller's dict is as it was


def test_untied_file_does_not_overwrite_a_tied_embedding():
    untied, model = small(tie_word_embeddings=False), small(seed=1)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ModelInputError, match="lm_head.weight differs from model.embed_tokens.weight; expected one") as caught:
        model.load_state_dict(untied.state_dict())
    assert len(str(caught.value)) <= 300
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_tied_file_in_an_untied_model():
    model, weights = small(tie_word_embeddings=False), small().state_dict()
    del weights["lm_head.weight"]
    with pytest.raises(RuntimeError, match="Missing key.*lm_head.weight"):
        model.load_state_dict(weights)
    assert model.load_state_dict(weights, strict=False).missing_keys == ["lm_head.weight"]      # asked for


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("head", [True, False])
def test_assigned_weights_stay_tied(place, head):
    model, ids = small().eval(), torch.arange(12).view(2, 6)
    weights = {name: p.clone() for name, p in model.state_dict().items() if head or name != "lm_head.weight"}
    with torch.device(place):
        other = small_on(place)
    other.load_state_dict(weights, assign=True)
    assert other.lm_head.weight is other.model.embed_tokens.weight and torch.equal(other.eval()(ids), model(ids))
    holder = torch.nn.Sequential(small(seed=4))        # as a part of another module, too
    holder.load_state_dict({f"0.{name}": p.clone() for name, p in weights.items()}, assign=True)
    assert holder[0].lm_head.weight is holder[0].model.embed_tokens.weight and torch.equal(holder.eval()(ids), model(ids))


def small_on(place):
    return TinyLM(small().config) if place == "meta" else small(seed=3)


def test_copies_load_into_themselves():
    "The hooks of a copy belong to the copy."
    model, ids = small().eval(), torch.arange(6)[None]
    other = pickle.loads(pickle.dumps(copy.deepcopy(small(seed=2)))).eval()
    other.load_state_dict({name: p for name, p in model.state_dict().items() if name != "lm_head.weight"}, assign=True)
    assert torch.equal(other(ids), model(ids)) and other.lm_head.weight is other.model.embed_tokens.weight


def test_float64_is_left_alone_by_autocast():
    model, ids = small().double(), torch.arange(6)[None]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids), small().double()(ids)) and model(ids).dtype == torch.float64


@pytest.mark.parametrize("ids, told", [
    ({"input_ids": torch.zeros(1, 2, dtype=torch.int64)}, "Pass its 'input_ids'."), (None, "input_ids is NoneType"),
    (torch.zeros(2, 3, dtype=torch.int64).to_sparse(), "ids.to_dense()"), (torch.zeros([1] * 60, dtype=torch.int64), "of 60 dimensions"),
])
def test_more_wrong_ids(ids, told):
    with pytest.raises(ModelInputError) as caught:
        small()(ids)
    assert told in str(caught.value) and len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize("generator", [7, "seed"])
def test_generator_is_a_generator(generator):
    with pytest.raises(ModelInputError, match="generator is .*; expected a torch.Generator"):
        TinyLM(hidden_size=24, generator=generator)
