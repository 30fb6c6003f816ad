# python -m pytest tests/test_generation.py
"Contracts of qtlm.generation: the filters against plain Python, what `generate` promises for any module, and what it refuses."
import copy
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qtlm.batches import context_length, evaluation_mode
from qtlm.cache import KVCache
from qtlm.config import ModelConfig
from qtlm.data import ByteVocab
from qtlm.generation import generate, stream_generate
from qtlm.model import ModelInputError, TinyLM
from qtlm.quantization import quantize_model_ptq
from qtlm.sampling import next_token_probabilities, penalize_repetition, top_k_filter, top_p_filter

VOCAB = 50
scores = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tiny = TinyLM(ModelConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, block_size=8, dropout=0.5))
    for p in tiny.parameters():
        p.data.mul_(4)  # far from uniform, so that greedy choices differ from place to place
    return tiny


def ids(*shape, seed=0):
    "Return random token ids."
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


# ---- filters ----

@given(scores, st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_top_k_keeps_the_k_largest(row, k):
    "Exactly k stay, in place and unchanged; of equal ones the first."
    k = min(k, len(row))
    row = torch.tensor(row).tolist()
    best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    assert top_k_filter(torch.tensor(row), k).tolist() == [x if i in best else -math.inf for i, x in enumerate(row)]


@given(scores, st.floats(0.001, 1.0))
@settings(max_examples=200, deadline=None)
def test_top_p_is_the_smallest_set_that_reaches_p(row, p):
    "The kept mass reaches p, and would not without its least likely token."
    logits = torch.tensor(row)
    chances = logits.double().softmax(-1)
    kept = top_p_filter(logits, p) > -math.inf
    assert kept.any() and torch.equal(top_p_filter(logits, p)[kept], logits[kept])
    assert chances[kept].sum() >= p - 1e-12
    assert chances[kept].sum() - chances[kept].min() < p + 1e-12
    if not kept.all():
        assert chances[kept].min() >= chances[~kept].max()


def test_top_p_1_keeps_everything():
    "Even what is too unlikely to change a sum: rounding must not cut the tail."
    logits = torch.tensor([100.0, 0.0, -50.0])
    assert torch.equal(top_p_filter(logits, 1.0), logits)


def test_filters_work_row_by_row():
    "A batch of any shape is filtered as its rows are."
    logits = torch.randn(2, 3, VOCAB, generator=torch.Generator().manual_seed(0))
    for f, dial in ((top_k_filter, 5), (top_p_filter, 0.6)):
        whole = f(logits, dial)
        assert torch.equal(whole, torch.stack([torch.stack([f(row, dial) for row in rows]) for rows in logits]))


def test_filters_agree_with_transformers():
    "The same tokens stay as in transformers, where it is installed."
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(100, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    for k in (1, 7, VOCAB):
        assert torch.equal(top_k_filter(logits, k), logits_process.TopKLogitsWarper(k)(None, logits))
    for p in (0.1, 0.5, 0.9, 0.99):
        assert torch.equal(top_p_filter(logits, p), logits_process.TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dial", [{}, {"temperature": 0}, {"temperature": 1e-38}, {"temperature": 100.0}, {"top_k": 3}, {"top_p": 0.2}, {"top_k": 9, "top_p": 0.5}])
def test_probabilities_are_a_distribution(dtype, dial):
    "Finite, not negative, summing to 1, whatever the dials and the logits' dtype; large logits overflow nothing."
    logits = (torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(0)) * 1e4).to(dtype)
    odds = next_token_probabilities(logits, **dial)
    assert odds.dtype == torch.float32 and odds.isfinite().all() and odds.min() >= 0
    torch.testing.assert_close(odds.sum(-1), torch.ones(20))


def test_sampling_follows_the_distribution():
    "Frequencies over many texts lie within five standard deviations of the model's probabilities."
    class Fixed(nn.Module):
        def forward(self, x):
            return torch.arange(VOCAB).div(10).expand(*x.shape, VOCAB)

    n = 20_000
    drawn = generate(Fixed(), torch.zeros(n, 1, dtype=torch.int64), 1, seed=0, temperature=0.7, top_k=20)[:, 1]
    odds = next_token_probabilities(torch.arange(VOCAB).div(10), temperature=0.7, top_k=20)
    counts = torch.bincount(drawn, minlength=VOCAB)
    assert ((counts - n * odds).abs() <= 5 * (n * odds * (1 - odds)).sqrt()).all()


# ---- generate ----

@pytest.mark.parametrize("prompt_length", [1, 7, 8, 9, 30])
def test_greedy_is_the_argmax_of_the_window(model, prompt_length):
    "Each token is the likeliest after the last block_size tokens, for prompts below, at and beyond the window."
    prompt = ids(3, prompt_length)
    out = generate(model, prompt, 15, temperature=0)
    assert out.shape == (3, prompt_length + 15) and out.dtype == torch.int64 and torch.equal(out[:, :prompt_length], prompt)
    with evaluation_mode(model):
        for t in range(prompt_length, prompt_length + 15):
            assert torch.equal(out[:, t], model(out[:, max(0, t - 8):t])[:, -1].argmax(-1))


def test_top_1_is_greedy_at_any_temperature(model):
    "So is a top_p that the likeliest token reaches alone."
    best = generate(model, ids(2, 4), 20, temperature=0)
    assert len(set(best[0].tolist())) > 3, "the model must not be trivial"
    for dial in ({"top_k": 1, "temperature": 7.0}, {"top_p": 1e-9}, {"temperature": 1e-9}):
        assert torch.equal(generate(model, ids(2, 4), 20, seed=3, **dial), best)


def test_seeds(model):
    "The same seed gives the same tokens, other seeds others; nobody else's generator moves; a prompt stays as it was."
    prompt = ids(4)
    kept, before = prompt.clone(), torch.get_rng_state()
    assert torch.equal(generate(model, prompt, 30, seed=1), generate(model, prompt, 30, seed=1))
    assert len({tuple(generate(model, prompt, 30, seed=s).tolist()) for s in range(5)}) == 5
    assert not torch.equal(generate(model, prompt, 30), generate(model, prompt, 30))
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(prompt, kept)


def test_a_shared_generator_goes_on(model):
    "Two calls with one generator give what one call gives."
    whole = generate(model, ids(4), 20, seed=9)
    shared = torch.Generator().manual_seed(9)
    part = generate(model, ids(4), 8, generator=shared)
    assert torch.equal(generate(model, part, 12, generator=shared), whole)


def test_modes_come_back(model):
    "Dropout is off inside and each submodule's mode is restored, after an error too; the result is no inference tensor."
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.Linear)).eval()
    modes = [m.training for m in model.modules()]
    out = generate(model, ids(4), 5, seed=0)
    assert torch.equal(out, generate(model, ids(4), 5, seed=0)) and not out.is_inference()
    with pytest.raises(ModelInputError):
        generate(model, ids(4), 1, top_k=VOCAB + 1)
    assert [m.training for m in model.modules()] == modes and not frozen.training
    frozen.train()


def test_a_module_that_keeps_what_it_computed_can_still_train():
    "Generation uses no inference mode: tables that a module caches on the way remain usable in training."
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.table = nn.Embedding(VOCAB, VOCAB), None

        def forward(self, x):
            if self.table is None:
                self.table = torch.ones(VOCAB) * 2
            return self.embedding(x) * self.table

    caching = Caching()
    generate(caching, [1], 2, seed=0)
    caching(ids(3)).sum().backward()
    assert caching.embedding.weight.grad is not None


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_models_generate(model, bits):
    "A quantized copy is a module like any other; greedy tokens are its own argmax."
    small = quantize_model_ptq(model, bits=bits).eval()
    out = generate(small, ids(2, 5), 6, temperature=0)
    with torch.no_grad():
        assert torch.equal(out[:, -1], small(out[:, -9:-1])[:, -1].argmax(-1))


def test_any_module(model):
    "Objects with .logits, dicts, tuples, modules without parameters or config."
    expected = generate(model, ids(2, 3), 5, temperature=0, block_size=4)

    class Wrapped(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.inner, self.wrap = model, wrap

        def forward(self, x):
            return self.wrap(self.inner(x))

    for wrap in (lambda x: SimpleNamespace(logits=x), lambda x: {"logits": x}, lambda x: (x, None), lambda x: x.double()):
        assert torch.equal(generate(Wrapped(wrap), ids(2, 3), 5, temperature=0, block_size=4), expected)


@pytest.mark.parametrize("name", ["block_size", "max_position_embeddings", "n_positions"])
def test_context_length_by_the_usual_names(name):
    "Configs of this package, of Llama and of GPT-2."
    module = nn.Identity()
    assert context_length(module) is None
    module.config = SimpleNamespace(**{name: 12})
    assert context_length(module) == 12


@pytest.mark.parametrize("prompt", ["ab", [97, 98], (97, 98), torch.tensor([97, 98])])
def test_prompts(prompt):
    "Text with a vocabulary, lists, tuples, tensors: the same ids come back, with new ones behind."
    tiny = TinyLM(ModelConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, block_size=8))
    out = generate(tiny, prompt, 3, seed=0, vocab=ByteVocab())
    assert out.shape == (5,) and out[:2].tolist() == [97, 98]
    assert torch.equal(out, generate(tiny, torch.tensor([97, 98]), 3, seed=0))
    nothing_new = generate(tiny, prompt, 0, vocab=ByteVocab())
    nothing_new += 1  # the result is the caller's own
    assert nothing_new.tolist() == [98, 99] and (isinstance(prompt, str) or list(prompt) == [97, 98])


def test_stop_tokens(model):
    "A row ends at its first stop token and repeats it; the batch ends with its longest row; a stop in the prompt does not count."
    free = generate(model, ids(6, 4), 40, seed=2)
    stop = free[0, 10].item()
    out = generate(model, torch.cat([torch.full((6, 1), stop), ids(6, 4)], 1), 40, seed=2, stop_tokens=[stop])[:, 5:]
    ended = [row.index(stop) if stop in row else None for row in out.tolist()]
    for row, end in zip(out.tolist(), ended):
        assert end is None or set(row[end:]) == {stop}
    assert out.shape[1] == 40 if None in ended else out.shape[1] == max(ended) + 1
    single = generate(model, ids(4), 40, seed=2, stop_tokens=[stop])
    assert stop not in single[4:-1].tolist()


# ---- refused, in one line ----

@pytest.mark.parametrize("arguments, message", [
    ({"prompt": []}, "at least one int64 id"),
    ({"prompt": torch.zeros(0, dtype=torch.int64)}, "at least one int64 id"),
    ({"prompt": torch.zeros(2, 0, dtype=torch.int64)}, "at least one int64 id"),
    ({"prompt": torch.zeros(2)}, "dtype torch.float32"),
    ({"prompt": torch.zeros(2, dtype=torch.bool)}, "dtype torch.bool"),
    ({"prompt": torch.zeros(1, 1, 1, dtype=torch.int64)}, r"shape \[1, 1, 1\]"),
    ({"prompt": torch.tensor(3)}, r"shape \[\]"),
    ({"prompt": [1.5]}, "int64"),
    ({"prompt": [[1, 2], []]}, "at least one int64 id"),
    ({"prompt": [[1, 2], [VOCAB]]}, f"id {VOCAB}; expected 0 to {VOCAB - 1}"),
    ({"prompt": ["a", "b"]}, "vocab="),
    ({"prompt": [torch.zeros(1, 2, dtype=torch.int64)]}, "a prompt of the list has two dimensions"),
    ({"prompt": [[1, 2], [3]], "seed": [1, 2, 3]}, "seed has 3 numbers"),
    ({"seed": [1]}, "seed has 1 numbers; expected one for each prompt of a list"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
    ({"repetition_penalty": math.nan}, "repetition_penalty is nan"),
    ({"stride": 0}, "stride is 0"),
    ({"stride": 9}, "stride is 9; expected an integer from 1 to block_size 8"),
    ({"stride": True}, "stride is True"),
    ({"block_size": 9}, "block_size is 9; expected at most the model's 8"),
    ({"stop_strings": "x"}, "vocab is None; expected a vocabulary"),
    ({"stop_strings": "x", "vocab": 5}, "vocab is a int; expected a vocabulary"),
    ({"stop_strings": ["x", ""], "vocab": ByteVocab()}, "stop_strings is"),
    ({"stop_strings": 3, "vocab": ByteVocab()}, "stop_strings is '3'"),
    ({"cache": "yes"}, "cache is a str; expected True, False or a KVCache"),
    ({"cache": None}, "cache is a NoneType"),
    ({"prompt": None}, "expected ids"),
    ({"prompt": "text"}, "vocab="),
    ({"prompt": [VOCAB]}, f"id {VOCAB}; expected 0 to {VOCAB - 1}"),
    ({"prompt": [-1]}, "id -1"),
    ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    ({"max_new_tokens": 1.0}, "max_new_tokens is 1.0"),
    ({"max_new_tokens": True}, "max_new_tokens is True"),
    ({"max_new_tokens": None}, "max_new_tokens is None"),
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"temperature": math.inf}, "temperature is inf"),
    ({"temperature": "hot"}, "temperature is 'hot'"),
    ({"top_k": 0}, "top_k is 0"),
    ({"top_k": VOCAB + 1}, f"top_k is {VOCAB + 1}; expected at most the model's {VOCAB} tokens"),
    ({"top_k": 2.0}, "top_k is 2.0"),
    ({"top_p": 0}, "top_p is 0"),
    ({"top_p": 1.1}, "top_p is 1.1"),
    ({"top_p": math.nan}, "top_p is nan"),
    ({"block_size": 0}, "block_size is 0"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 1.5}, "seed is 1.5"),
    ({"seed": 1, "generator": torch.Generator()}, "both seed=1 and a generator"),
    ({"stop_tokens": ["."]}, "stop_tokens"),
    ({"stop_tokens": "."}, "stop_tokens"),
    ({"stop_tokens": 1.5}, "stop_tokens"),
    ({"model": lambda x: x}, "model is a function; expected a torch.nn.Module"),
])
def test_refused(model, arguments, message):
    "One class, one line, what was found and what was expected; the global generator does not move."
    before = torch.get_rng_state()
    with pytest.raises(ModelInputError, match=message) as caught:
        generate(**{"model": model, "prompt": [1], "max_new_tokens": 2} | arguments)
    assert "expected" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) <= 300
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_have_gone_bad(bad):
    "Logits that are not numbers are an error, not a crash of the sampler."
    broken = nn.Embedding(VOCAB, VOCAB)
    broken.weight.data[3, 4] = bad
    with pytest.raises(ModelInputError, match="not finite"):
        generate(broken, [3], 1, temperature=0)


def test_an_id_that_the_model_cannot_look_up():
    "A model that does not say how large its vocabulary is: the embedding's IndexError becomes an error of this package."
    with pytest.raises(ModelInputError, match="cannot look up ids up to 77"):
        generate(nn.Embedding(VOCAB, VOCAB), [77], 1)


@pytest.mark.parametrize("change, match", [
    ({"temperature": 10**400}, "temperature is 1000"), ({"temperature": np.float32("inf")}, "temperature is .*inf"), ({"generator": 5}, "generator is a int; expected a torch.Generator"),
    ({"stop_tokens": [10**30]}, "stop_tokens"), ({"stop_tokens": -1}, "stop_tokens"), ({"stop_tokens": torch.tensor([0.5])}, "stop_tokens"),
])  # fmt: skip
def test_numbers_that_torch_would_stumble_over_are_refused_in_one_line(model, change, match):
    with pytest.raises(ModelInputError, match=match):
        generate(model, [1], 2, **change)


def test_numpy_s_numbers_are_numbers(model):
    a = generate(model, [1], np.int64(4), top_k=np.int32(3), top_p=np.float32(0.5), temperature=np.float64(2.0), seed=np.int64(3), stop_tokens=np.int64(49))
    assert torch.equal(a, generate(model, [1], 4, top_k=3, top_p=0.5, temperature=2.0, seed=3, stop_tokens=torch.tensor([49])))


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-46, 1e-40, 1e40, 1e300])
def test_any_temperature_that_a_float_holds_gives_odds(temperature):
    "float32 takes 1e-46 for 0 and 1e40 for infinity; 0/0 and inf/inf are no odds."
    odds = next_token_probabilities(torch.tensor([1.0, 3.0, -math.inf, 3.0, 2.0]), temperature=temperature)
    want = [0, 0.5, 0, 0.5, 0] if temperature < 1 else [0.25, 0.25, 0, 0.25, 0.25]
    assert odds.tolist() == want and odds.dtype == torch.float32


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_s_text_is_its_own_greedy_choice(model, bits):
    small = quantize_model_ptq(model, bits=bits)
    out = generate(small, ids(2, 3), 12, temperature=0)
    small.eval()
    assert all(torch.equal(out[:, t], small(out[:, max(0, t - 8) : t])[:, -1].argmax(-1)) for t in range(3, 15))


# ---- what is kept ----

@pytest.fixture(scope="module")
def models(model):
    return {"float": model, "INT8": quantize_model_ptq(model, bits=8), "INT4": quantize_model_ptq(model, bits=4)}


HOW = [{"temperature": 0}, {"seed": 1}, {"seed": 2, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3}]


@pytest.mark.parametrize("kind", ["float", "INT8", "INT4"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_a_cache_changes_no_token(models, kind, how, stride):
    "Below, at and beyond block_size, greedy and by chance."
    for length in (2, 9):
        cached, anew = (generate(models[kind], ids(3, length), 12, stride=stride, cache=cache, **how) for cache in (True, False))
        assert torch.equal(cached, anew)


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_the_window_begins_where_the_rule_says(model, stride):
    out = generate(model, ids(2, 5), 25, temperature=0, stride=stride)
    with evaluation_mode(model):
        for t in range(5, 30):
            start = min(s for s in range(0, t, stride) if t - s <= 8)
            assert torch.equal(out[:, t], model(out[:, start:t])[:, -1].argmax(-1))


def test_a_cache_saves_reading(model):
    "One token is read for each that is written; without a cache, all of them."
    read = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, args, out: read.append(args[0].shape[1]))
    generate(model, ids(3), 5, seed=0)
    generate(model, ids(3), 5, seed=0, cache=False)
    generate(model, ids(3), 9, seed=0, stride=4)
    hook.remove()
    assert read == [3, 1, 1, 1, 1] + [3, 4, 5, 6, 7] + [3, 1, 1, 1, 1, 1, 5, 1, 1]


@pytest.mark.parametrize("kind, cache", [("float", True), ("float", False), ("INT8", True), ("INT4", True)])
@pytest.mark.parametrize("how", HOW)
def test_a_list_of_prompts_is_each_prompt_alone(models, kind, how, cache):
    "Lengths below and beyond the window; each ends at its own stop."
    prompts = [ids(n, seed=n).tolist() for n in (2, 11, 2, 8)]
    for more in ({}, {"stop_tokens": [3, 7, 11, 30], "stride": 5}):
        texts = generate(models[kind], prompts, 10, cache=cache, **how, **more)
        alone = [generate(models[kind], prompt, 10, cache=cache, **how, **more) for prompt in prompts]
        assert all(torch.equal(a, b) for a, b in zip(texts, alone, strict=True))


def test_forms_of_a_list():
    tiny = TinyLM(ModelConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, block_size=8))
    want = [generate(tiny, text, 4, seed=3, vocab=ByteVocab()) for text in ("ab", "cde")]
    for prompts in (["ab", "cde"], ("ab", "cde"), [[97, 98], [99, 100, 101]], [torch.tensor([97, 98]), "cde"]):
        got = generate(tiny, prompts, 4, seed=3, vocab=ByteVocab())
        assert isinstance(got, list) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert [len(p) for p in generate(tiny, ["ab", "cde"], 0, vocab=ByteVocab())] == [2, 3]
    assert isinstance(generate(tiny, [[1, 2], [3, 4]], 4), torch.Tensor)  # a rectangle, as ever
    shared = torch.Generator().manual_seed(1)
    assert len(generate(tiny, ["ab", "cde"], 4, generator=shared, vocab=ByteVocab())) == 2
    seeded = generate(tiny, ["ab", "ab", "ab"], 9, seed=[1, 2, 1], vocab=ByteVocab())
    assert torch.equal(seeded[0], seeded[2]) and not torch.equal(seeded[0], seeded[1])


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_cache_gives_the_model_s_logits(dtype, bound, kv_heads):
    tiny = TinyLM(ModelConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads, block_size=24))
    tiny, text = tiny.to(dtype).eval(), ids(2, 24)
    with torch.no_grad():
        whole = tiny(text)
    cache = KVCache(tiny, batch_size=2)
    for part in text.split([1, 6, 1, 1, 15], 1):
        logits = cache.extend(part)
        assert logits.dtype == dtype and (logits - whole[:, cache.lengths[0] - 1]).abs().max() <= bound * whole.abs().max()
    assert cache.lengths == [24, 24] and not logits.requires_grad


def test_each_kept_number_in_eight_bits_moves_by_half_a_step(model):
    "The bound that the chapter states, on what is really kept."
    caches = [KVCache(model.eval(), bits=bits) for bits in (None, 8)]
    for cache in caches:
        cache.extend(ids(1, 8))
    exact, kept = (cache._stores[0].read(slice(0, 8)) for cache in caches)  # the first layer: the same keys and values went in
    half = exact.abs().amax(-1, keepdim=True) / 254
    assert ((kept - exact).abs() <= half * (1 + 2**-20)).all() and not torch.equal(kept, exact)
    assert caches[1].nbytes == caches[0].nbytes * (16 + 4) // (16 * 4)
    out = generate(model, ids(1, 4), 30, temperature=0, stride=4, cache=caches[1])
    assert torch.equal(out, generate(model, ids(1, 4), 30, temperature=0, stride=4, cache=KVCache(model, bits=8, max_length=8)))


def test_a_shorter_cache_is_a_shorter_window(model):
    assert torch.equal(generate(model, ids(4), 20, seed=1, cache=KVCache(model, max_length=5)), generate(model, ids(4), 20, seed=1, block_size=5))


@pytest.mark.parametrize("make", ["hook", "layer hook", "forward", "lora", "qat", "static", "subclass"])
def test_changed_models_write_what_they_would_without_a_cache(model, make):
    import copy

    from qtlm.lora import apply_lora
    from qtlm.qat import prepare_qat

    changed = copy.deepcopy(model).eval()
    if make == "hook":
        changed.model.layers[1].self_attn.register_forward_hook(lambda module, args, out: out * 2)
    if make == "layer hook":
        changed.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: -out)
    if make == "forward":
        mlp = changed.model.layers[0].mlp
        mlp.forward = lambda x, old=mlp.forward: old(x) * 3
    if make == "lora":
        changed = apply_lora(changed, r=2, backend="manual", target_modules=["q_proj", "v_proj", "up_proj"])
        for name, p in changed.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p)
    if make == "qat":
        changed = prepare_qat(changed, bits=8)
    if make == "static":
        changed = quantize_model_ptq(changed, bits=8, quantization_type="static", calibration_data=[ids(4, 8)])
    if make == "subclass":
        class Louder(TinyLM):
            def forward(self, input_ids):
                return super().forward(input_ids).flip(-1)

        changed.__class__ = Louder
    before = {name: value.clone() for name, value in changed.state_dict().items()}
    out = generate(changed, ids(2, 3), 12, temperature=0)
    assert torch.equal(out, generate(changed, ids(2, 3), 12, temperature=0, cache=False))
    assert not torch.equal(out, generate(model, ids(2, 3), 12, temperature=0)) or make in ("qat", "static")
    assert all(torch.equal(value, before[name]) for name, value in changed.state_dict().items())


def test_a_cache_of_a_model_that_has_gone_elsewhere(model):
    moved = copy.deepcopy(model)
    cache = KVCache(moved)
    cache.extend(ids(1, 3))
    moved.bfloat16()
    with pytest.raises(ModelInputError, match=r"the model has gone to torch.bfloat16 on cpu; expected torch.float32 on cpu. Make a new cache."):
        cache.extend(ids(1, 1))
    assert cache.lengths == [3]
    moved.float()
    cache.extend(ids(1, 1))


def test_autocast_and_a_cache(model):
    with torch.autocast("cpu", torch.bfloat16):
        out = generate(model, ids(2, 3), 10, temperature=0)
    assert out.shape == (2, 13)


COMPILER = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def check_compiled(model, **cache):
    "A cache that compiles writes what one that doesn't writes; a second run and another state of torch included."
    cache = KVCache(model, batch_size=2, compile=True, **cache)
    for _ in range(2):
        assert torch.equal(generate(model, ids(2, 3), 9, temperature=0, cache=cache), generate(model, ids(2, 3), 9, temperature=0))
    return cache


@COMPILER
def test_compiled_single_tokens(models):
    model = models["INT8"]
    cache = check_compiled(model)
    assert len(cache._single.programs) == 1
    with torch.autocast("cpu", torch.bfloat16):  # another program, and the first one is not forgotten
        assert generate(model, ids(2, 3), 5, temperature=0, cache=cache).shape == (2, 8)
    cache.reset()
    last = cache.extend(ids(2, 3)), cache.extend(ids(2, 1).to(torch.int32)), cache.extend(ids(4, 1)[::2])
    plain = KVCache(model, batch_size=2)
    expected = plain.extend(ids(2, 3)), plain.extend(ids(2, 1)), plain.extend(ids(4, 1)[::2])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(last, expected)) and len(cache._single.programs) == 2
    other = KVCache(model, batch_size=2, compile=True)  # each has its own block
    other.extend(ids(2, 5, seed=9))
    other.extend(ids(2, 1, seed=8))
    assert torch.allclose(cache.extend(ids(2, 1)), plain.extend(ids(2, 1)), atol=1e-5)


def test_a_cache_compiles_nothing_where_torch_is_told_not_to(models):
    with torch.compiler.set_stance("force_eager"):
        assert list(check_compiled(models["INT8"])._single.programs.values()) == [None]


@COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "INT4", "bf16", "8 bits"])
def test_compiled_single_tokens_of_every_kind(models, kind):
    made = {"float": models["float"], "INT4": models["INT4"], "bf16": copy.deepcopy(models["float"]).bfloat16(), "8 bits": models["INT8"]}[kind]
    check_compiled(made, bits=8 if kind == "8 bits" else None)


# ---- transformers' models ----

def their(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCAB, bos_token_id=None, eos_token_id=None)
    if kind == "llama":
        config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12, **shape)
        made = transformers.LlamaForCausalLM(config)
    else:
        made = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=12, **shape))
    for p in made.parameters():
        p.data.mul_(3)
    return made.eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_models_of_transformers_keep_their_own_past(kind):
    theirs = their(kind)
    reference = theirs.generate(ids(2, 4), max_new_tokens=8, do_sample=False, pad_token_id=0)
    read = []
    hook = theirs.get_input_embeddings().register_forward_hook(lambda module, args, out: read.append(args[0].shape[1]))
    assert torch.equal(generate(theirs, ids(2, 4), 8, temperature=0), reference)
    hook.remove()
    assert read == [4] + [1] * 7
    for how in (*HOW, {"seed": 0, "stride": 5}):
        assert torch.equal(generate(theirs, ids(2, 4), 20, **how), generate(theirs, ids(2, 4), 20, cache=False, **how))
    prompts = [ids(n, seed=n) for n in (3, 7, 3)]
    for text, prompt in zip(generate(theirs, prompts, 14, seed=3), prompts):
        assert torch.equal(text, generate(theirs, prompt, 14, seed=3))


def test_repetition_penalty_is_transformers_s():
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    logits, text = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(0)) * 3, ids(20, 9)
    seen = torch.zeros(20, VOCAB, dtype=torch.bool).scatter_(1, text, True)
    for penalty in (0.5, 1.0, 1.7):
        assert torch.equal(penalize_repetition(logits, seen, penalty), logits_process.RepetitionPenaltyLogitsProcessor(penalty)(text, logits))
    theirs = their("llama")
    reference = theirs.generate(ids(2, 4), max_new_tokens=8, do_sample=False, pad_token_id=0, repetition_penalty=1.5)
    assert torch.equal(generate(theirs, ids(2, 4), 8, temperature=0, repetition_penalty=1.5), reference)
    assert not torch.equal(reference, generate(theirs, ids(2, 4), 8, temperature=0))


def test_repetition_penalty_where_more_can_be_read_than_written():
    "An embedding with more rows than the head has."
    model = nn.Sequential(nn.Embedding(VOCAB + 14, 16), nn.Linear(16, VOCAB))
    assert generate(model, [VOCAB + 13, 2], 5, seed=0, repetition_penalty=1.5).shape == (7,)


# ---- ends and streams ----

@pytest.fixture(scope="module")
def bytes_model():
    torch.manual_seed(0)
    return TinyLM(ModelConfig(vocab_size=256, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, block_size=16))


def test_stop_strings(bytes_model):
    "A text ends with the token that completes a string, wherever it would have gone; the prompt does not count."
    vocab = ByteVocab()
    free = vocab.decode(generate(bytes_model, "abcab", 80, seed=0, vocab=vocab)[5:], errors="replace")
    raw = bytes(generate(bytes_model, "abcab", 80, seed=0, vocab=vocab)[5:].tolist())
    at = next(n for n in range(40, 80) if raw[n] < 128 and raw[n - 1] < 128)  # two letters that follow each other
    string = raw[at - 1 : at + 1].decode()
    assert string in free
    out = bytes(generate(bytes_model, "abcab", 80, seed=0, vocab=vocab, stop_strings=["abc", string, "cab"])[5:].tolist())
    assert out == raw[: raw.index(string.encode()) + 2]


def test_stop_strings_across_the_tokens_of_bpe():
    pytest.importorskip("tokenizers")
    from qtlm.data import BPEVocab

    vocab = BPEVocab.train("the cat sat on the mat. " * 20, 280)

    class Recites(nn.Module):  # whatever the prompt, it goes on with the text
        def forward(self, x):
            script = vocab.encode("the cat sat on the mat. " * 9)
            return nn.functional.one_hot(script[torch.arange(1, x.shape[1] + 1)], len(vocab)).float().expand(len(x), -1, -1)

    first = vocab.encode("the cat sat on the mat. " * 9)[:1]
    text = vocab.decode(generate(Recites(), first, 60, temperature=0, stop_strings="t sat o", vocab=vocab))
    assert "t sat o" in text and text.count("sat") == 1 and len(text) < 24
    assert "".join(stream_generate(Recites(), first, 60, temperature=0, stop_strings="t sat o", vocab=vocab)) == text[len(vocab.decode(first)) :]


@pytest.mark.parametrize("seed", range(5))
def test_a_stream_is_what_generate_appends(bytes_model, seed):
    "Random bytes are mostly half characters: pieces are whole ones, never empty, and join to the decoded text."
    vocab = ByteVocab()
    out = generate(bytes_model, "ab", 60, seed=seed, vocab=vocab)[2:]
    assert list(stream_generate(bytes_model, [97, 98], 60, seed=seed)) == out.tolist()
    pieces = list(stream_generate(bytes_model, "ab", 60, seed=seed, vocab=vocab))
    assert "".join(pieces) == vocab.decode(out) and all(pieces)


def test_a_stream_leaves_the_model_as_it_was_between_tokens(bytes_model):
    bytes_model.train()
    stream = stream_generate(bytes_model, [1, 2], 5, seed=0)
    for n, token in enumerate(stream):
        assert bytes_model.training and torch.is_grad_enabled() and isinstance(token, int)
        if n == 2:
            stream.close()
    assert n == 2
    for wrong, told in (({"topk": 1}, "topk"), ({"temperature": -1}, "temperature is -1"), ({"prompt": [[1], [2]]}, "several prompts")):
        with pytest.raises(ModelInputError, match=told) as caught:  # at once, not at the first token
            stream_generate(**{"model": bytes_model, "prompt": [1], "max_new_tokens": 2} | wrong)
        assert "\n" not in str(caught.value)


def test_a_stream_ends_with_half_a_character():
    "What no byte will complete any more comes out as U+FFFD, as in the decoded text."
    class Recites(nn.Module):
        def forward(self, x):
            script = torch.tensor(list("a\u20ac\u20ac".encode()))
            return nn.functional.one_hot(script[1 : x.shape[1] + 1], 256).float().expand(len(x), -1, -1)

    for n, text in ((3, ["\u20ac"]), (5, ["\u20ac", "\ufffd"]), (2, ["\ufffd"]), (6, ["\u20ac", "\u20ac"]), (0, [])):
        assert list(stream_generate(Recites(), "a", n, temperature=0, vocab=ByteVocab())) == text
        assert ByteVocab().decode(generate(Recites(), "a", n, temperature=0, vocab=ByteVocab())[1:]) == "".join(text)


def test_a_stream_draws_without_dropout(model):
    model.train()
    for cache in (True, False):
        assert list(stream_generate(model, ids(3), 12, seed=4, cache=cache)) == generate(model, ids(3), 12, seed=4, cache=cache)[3:].tolist()
    assert model.training
