# python -m pytest tests/test_evaluation.py
"Contracts of qtlm.evaluation: one mean over tokens whatever the batches, comparisons that add up, and nothing left behind."
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qtlm.config import ModelConfig
from qtlm.data import Batches, ByteVocab, CharVocab, DataError, Tokens
from qtlm.evaluation import Comparison, ComparisonRow, EvaluationError, compare, evaluate
from qtlm.model import TinyLM
from qtlm.quantization import get_quantization_info, quantize_model_ptq

VOCAB = 40
SHAPE = ModelConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, block_size=16, dropout=0.5)


def make(seed=0):
    "Return a small model whose predictions are far from uniform."
    torch.manual_seed(seed)
    model = TinyLM(SHAPE)
    for p in model.parameters():
        p.data.mul_(4)
    return model


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(VOCAB, (301,), generator=torch.Generator().manual_seed(0))


def mean_loss(model, batches):
    "The definition: all the targets' losses in one list, in float64."
    training = model.training
    model.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(model(i).double().flatten(0, 1), t.flatten(), reduction="none") for i, t in batches]
    model.train(training)
    return torch.cat(losses).mean().item()


# ---- evaluate ----

@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 100])
@pytest.mark.parametrize("length", [2, 16, 17, 18, 33, 160, 301])
def test_loss_is_the_mean_over_all_targets(model, ids, length, batch_size):
    "Each token but the first counts once, for every batch size and ragged length."
    text = ids[:length]
    found = evaluate(model, text, batch_size=batch_size)
    expected = mean_loss(model, [(text[None, a:b], text[None, a + 1:b + 1]) for a in range(0, length - 1, 16) for b in [min(a + 16, length - 1)]])
    assert found["tokens"] == length - 1
    assert math.isclose(found["loss"], expected, rel_tol=1e-5)
    assert math.isclose(found["perplexity"], math.exp(found["loss"]))


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=5), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_uneven_batches(shapes, seed):
    "Batches of any sizes are weighted by their targets, ignored ones left out; the mean of the batches' means is another number."
    model, draws = make(), torch.Generator().manual_seed(seed)
    batches = [(torch.randint(VOCAB, s, generator=draws), torch.randint(VOCAB, s, generator=draws)) for s in shapes]
    batches[0][1][:, 0] = -100
    counted = sum(int((t != -100).sum()) for _, t in batches)
    if not counted:
        with pytest.raises(DataError):
            evaluate(model, batches)
        return
    model.eval()
    with torch.no_grad():
        total = sum(F.cross_entropy(model(i).double().flatten(0, 1), t.flatten(), reduction="sum").item() for i, t in batches)
    found = evaluate(model, batches)
    assert found["tokens"] == counted and math.isclose(found["loss"], total / counted, rel_tol=1e-5)


def test_the_forms_of_data(model, ids):
    "Tokens, a LongTensor, windows, pairs, whole rows, one-shot iterators, one batch alone: the same mean."
    expected = evaluate(model, ids)["loss"]
    windows = Batches.sequential(ids, 16, 4)
    rows = [torch.cat([i, t[:, -1:]], 1) for i, t in windows]
    for data in (Tokens(ids), windows, list(windows), iter(list(windows)), rows):
        assert math.isclose(evaluate(model, data)["loss"], expected, rel_tol=1e-6)
    alone = evaluate(model, [rows[0]])["loss"]
    inputs, targets = rows[0][:, :-1], rows[0][:, 1:]
    shifted = {"input_ids": inputs, "labels": torch.cat([inputs[:, :1], targets[:, :-1]], 1)}  # labels as transformers has them, last target unknown
    assert evaluate(model, rows[0])["loss"] == evaluate(model, (inputs, targets))["loss"] == alone
    assert evaluate(model, shifted)["tokens"] == evaluate(model, [shifted])["tokens"] == inputs[:, 1:].numel()


def test_bits_per_byte(model):
    "Counted in the bytes that the vocabulary says; unknown for bare ids; 8 for a model that knows nothing of bytes."
    class Uniform(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.size = size

        def forward(self, x):
            return torch.zeros(*x.shape, self.size)

    text = "naïve façade, " * 20
    of_bytes = evaluate(Uniform(256), Tokens.from_text(text, ByteVocab(), cache_dir=False))
    assert math.isclose(of_bytes["bits_per_byte"], 8, rel_tol=1e-6) and of_bytes["tokens"] == len(text.encode()) - 1
    letters = sorted(set(text))
    of_letters = evaluate(Uniform(len(letters)), Tokens.from_text(text, CharVocab(letters), cache_dir=False))
    bits = math.log2(len(letters)) * (len(text) - 1) / (len(text.encode()) - 1)
    assert math.isclose(of_letters["bits_per_byte"], bits, rel_tol=1e-6)
    assert evaluate(Uniform(VOCAB), torch.zeros(9, dtype=torch.int64))["bits_per_byte"] is None


def test_nothing_is_left_behind(model, ids):
    "Modes, gradients, generators, weights; also after an error in the middle."
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = model, 0

        def forward(self, x):
            self.calls += 1
            return self.inner(x) if self.calls < 2 else 1 / 0

    model.train()
    model.lm_head.eval()
    modes, weights, before = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert evaluate(model, ids)["loss"] == evaluate(model, ids)["loss"]
    with pytest.raises(ZeroDivisionError):
        evaluate(Breaks(), ids, batch_size=2, block_size=16)
    with pytest.raises(ZeroDivisionError):
        compare({"a": model, "b": Breaks()}, ids, batch_size=2)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    model.train()


def test_a_loss_too_large_for_exp():
    "Perplexity overflows to infinity, not into an OverflowError."
    class Wrong(nn.Module):
        def forward(self, x):
            return F.one_hot(x, VOCAB).float() * 1e4

    found = evaluate(Wrong(), torch.arange(10))
    assert math.isclose(found["loss"], 1e4, rel_tol=1e-3) and found["perplexity"] == math.inf


@pytest.mark.parametrize("data, error, message", [
    ([], DataError, "no target counts; expected one"),
    (iter(()), DataError, "no target counts"),
    ([(torch.zeros(1, 3, dtype=torch.int64), torch.full((1, 3), -100))], DataError, "no target counts"),
    (Batches(torch.zeros(99, dtype=torch.int64), 8, 2), DataError, "have no end; expected data that has one. Use Batches.sequential"),
    (torch.zeros(1, dtype=torch.int64), DataError, "1 tokens"),
    (torch.zeros(9), DataError, "float32"),
    ([torch.zeros(3, dtype=torch.int64)], DataError, "expected"),
    (3, DataError, "data is a int; expected"),
    (None, DataError, "data is a NoneType; expected"),
])
def test_data_that_cannot_be_evaluated(model, data, error, message):
    "One line that says what was expected."
    for call in (lambda: evaluate(model, data), lambda: compare({"a": model}, data)):
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


def test_a_model_that_is_none():
    "Not a module."
    with pytest.raises(EvaluationError, match="model is a str; expected a torch.nn.Module"):
        evaluate("model.pt", torch.zeros(9, dtype=torch.int64))


# ---- compare ----

def test_a_model_against_itself(model, ids):
    "No difference, no divergence, all favourites equal, exactly."
    for row in compare({"a": model, "b": model}, ids, repeats=0).rows:
        assert (row.delta_loss, row.delta_error, row.kl, row.agreement, row.ratio) == (0, 0, 0, 1, 1)


def test_comparison_adds_up(model, ids):
    "Losses are those of `evaluate`, the difference and its error those of the single tokens, divergence and agreement those of torch."
    other = make(1)
    first, second = compare({"a": model, "b": other}, ids, repeats=0, batch_size=3).rows
    for row, m in ((first, model), (second, other)):
        single = evaluate(m, ids)
        assert math.isclose(row.loss, single["loss"], rel_tol=1e-6) and math.isclose(row.perplexity, single["perplexity"], rel_tol=1e-5)
    logits = []
    for m in (model, other):
        m.eval()
        with torch.no_grad():
            logits.append(torch.cat([m(i).flatten(0, 1) for i, _ in Batches.sequential(ids, 16, 1)]).double())
    losses = [F.cross_entropy(x, ids[1:], reduction="none") for x in logits]
    difference = losses[1] - losses[0]
    assert math.isclose(second.delta_loss, difference.mean().item(), rel_tol=1e-5)
    assert math.isclose(second.delta_error, (difference.std() / math.sqrt(len(difference))).item(), rel_tol=1e-5)
    kl = F.kl_div(logits[1].log_softmax(-1), logits[0].log_softmax(-1), log_target=True, reduction="batchmean")
    assert math.isclose(second.kl, kl.item(), rel_tol=1e-4)
    assert math.isclose(second.agreement, (logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean().item())
    assert 0 < second.agreement < 1


def test_the_reference_may_be_any(model, ids):
    "Against the other one the differences change their sign."
    models = {"a": model, "b": make(1)}
    forth, back = compare(models, ids, repeats=0), compare(models, ids, reference="b", repeats=0)
    assert forth.rows[1].delta_loss == -back.rows[0].delta_loss and back.reference == "b"
    assert forth.rows[1].agreement == back.rows[0].agreement and back.rows[1].kl == 0


def test_quantized_models(model, ids):
    "Sizes are what get_quantization_info counts; INT8 stays nearer to the original than INT4."
    models = {"float": model, "int8": quantize_model_ptq(model, bits=8), "int4": quantize_model_ptq(model, bits=4)}
    rows = {row.name: row for row in compare(models, ids, repeats=0).rows}
    for name, m in models.items():
        info = get_quantization_info(m)
        assert (rows[name].bytes, rows[name].parameters, rows[name].bits_per_weight) == (info.bytes, info.parameters, info.bits_per_weight)
    assert rows["float"].bytes == sum(p.numel() * 4 for p in model.parameters())
    assert 1 == rows["float"].ratio < rows["int8"].ratio < rows["int4"].ratio
    assert 0 < rows["int8"].kl < rows["int4"].kl


def test_a_distribution_with_zeros():
    "What a model rules out costs nothing where the reference rules it out too, and is infinite where it does not."
    class Fixed(nn.Module):
        def __init__(self, *p):
            super().__init__()
            self.register_buffer("p", torch.tensor(p))

        def forward(self, x):
            return self.p.log().expand(*x.shape, 3)

    zero, full = Fixed(0.5, 0.5, 0.0), Fixed(0.25, 0.5, 0.25)
    rows = compare({"zero": zero, "full": full}, torch.tensor([0, 1, 0, 1]), repeats=0).rows
    assert math.isclose(rows[1].kl, 0.5 * math.log(2), rel_tol=1e-6)
    assert compare({"full": full, "zero": zero}, torch.tensor([0, 1, 0, 1]), repeats=0).rows[1].kl == math.inf


def test_timing(model, ids):
    "Measured when asked, within its range; not at all with repeats=0."
    timed = compare({"a": model, "b": model}, ids, repeats=3, timed_batches=1)
    for row in timed.rows:
        low, high = row.tokens_per_second_range
        assert 0 < low <= row.tokens_per_second <= high
    assert "tokens/s" in timed.to_markdown() and "tokens/s" not in timed.to_markdown(timing=False)
    untimed = compare({"a": model}, ids, repeats=0)
    assert untimed.rows[0].tokens_per_second is None and "tokens/s" not in untimed.to_markdown()


def test_one_shot_data_is_read_once(model, ids):
    "An iterator serves all models and the clock."
    result = compare({"a": model, "b": make(1)}, iter(list(Batches.sequential(ids, 16, 4))), repeats=1)
    assert result.tokens == len(ids) - 1 and result.rows[1].tokens_per_second > 0


def test_the_table(model, ids):
    "A rectangle with a line for each model; unknown columns left out; names with a bar do not break it."
    result = compare({"a": model, "b|c": make(1)}, ids, repeats=0)
    assert isinstance(result, Comparison) and result._repr_markdown_() == str(result) == result.to_markdown()
    lines = result.to_markdown().splitlines()
    assert len(lines) == 4 and len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "bits/byte" not in lines[0] and "b\\|c" in lines[3]
    text = Tokens(ids.clamp(max=VOCAB - 1), vocab=CharVocab([chr(97 + i) for i in range(VOCAB)]))
    assert "bits/byte" in compare({"a": model}, text, repeats=0).to_markdown()


def test_plain_values(model, ids):
    "to_dict survives JSON."
    result = compare({"a": model, "b": make(1)}, ids, repeats=1)
    read = json.loads(json.dumps(result.to_dict()))
    assert read["reference"] == "a" and read["tokens"] == 300 and list(read["models"]) == ["a", "b"]
    assert read["models"]["b"]["kl"] == result.rows[1].kl


def test_the_plot(model, ids):
    "Each model is a named point at its size and loss; the axes are named with units."
    import matplotlib

    matplotlib.use("Agg")
    result = compare({"float": model, "int4": quantize_model_ptq(model, bits=4)}, ids, repeats=0)
    ax = result.plot()
    assert [t.get_text().strip() for t in ax.texts] == ["float", "int4"] and "MB" in ax.get_xlabel() and "nats" in ax.get_ylabel()
    points = [line.get_xydata()[0].tolist() for line in ax.lines if line.get_marker() == "o"]
    assert points == [[row.bytes / 1e6, row.loss] for row in result.rows]
    [front] = [line.get_xydata().tolist() for line in ax.lines if line.get_label() == "Pareto front"]
    assert front == [[row.bytes / 1e6, row.loss] for row in result.pareto()]
    assert result.plot(ax) is ax and "times smaller" in ax.get_title()
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("models, options, message", [
    ({}, {}, "expected a dict from names to modules"),
    (None, {}, "models is NoneType"),
    ([1], {}, "models is list"),
    ({"a": "model.pt"}, {}, "'a': str"),
    ({"a": nn.Identity()}, {"reference": "c"}, "reference is 'c'; expected one of 'a'"),
    ({"a": nn.Embedding(VOCAB, 5), "b": nn.Embedding(VOCAB, 6)}, {}, r"'b' gives logits \[.*, 6\]; expected \[.*, 5\] as from 'a'"),
    ({"a": nn.Embedding(VOCAB, VOCAB)}, {"repeats": -1}, "repeats is -1"),
    ({"a": nn.Embedding(VOCAB, VOCAB)}, {"timed_batches": 0}, "timed_batches is 0"),
])
def test_models_that_cannot_be_compared(ids, models, options, message):
    "One line that says what was expected."
    with pytest.raises(EvaluationError, match=message) as caught:
        compare(models, ids.clamp(max=4), **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


def test_models_of_different_windows(ids):
    "The window is the shortest that any of the models can read."
    short, long = nn.Embedding(VOCAB, VOCAB), nn.Embedding(VOCAB, VOCAB)
    seen = []
    short.config, long.config = SimpleNamespace(block_size=5), SimpleNamespace(block_size=50)
    long.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    compare({"long": long, "short": short}, ids, repeats=0)
    assert max(seen) == 5


@pytest.mark.parametrize("block_size", [0, -1, "8", 2.5, True])
def test_a_window_that_is_no_length_is_refused(model, ids, block_size):
    "0 is not None: it must not silently become the model's own length."
    for measure in (evaluate, lambda m, *a, **k: compare({"m": m}, *a, repeats=0, **k)):
        with pytest.raises(DataError, match="block_size is .*; expected a whole number"):
            measure(model, ids, block_size=block_size)


def test_a_broken_model_s_figures_are_not_numbers(model, ids):
    broken = make()
    broken.model["norm"].weight.data.fill_(float("nan"))
    figures = evaluate(broken, ids)
    assert math.isnan(figures["loss"]) and math.isnan(figures["perplexity"])
    row = compare({"good": model, "broken": broken}, ids, repeats=0).rows[1]
    assert all(map(math.isnan, (row.loss, row.delta_loss, row.delta_error, row.perplexity, row.kl)))


def test_names_must_be_text_and_stay_in_their_cell(model, ids):
    with pytest.raises(EvaluationError, match="names to modules"):
        compare({1: model}, ids, repeats=0)
    with pytest.raises(EvaluationError, match="repeats is True"):
        compare({"m": model}, ids, repeats=True)
    table = compare({"a|b\n  c": model}, ids, repeats=0).to_markdown()
    assert len(table.splitlines()) == 3 and r"| a\|b c |" in table


def test_models_with_windows_of_different_length_are_held_to_the_shortest(model, ids):
    torch.manual_seed(1)
    longer = TinyLM(SHAPE, block_size=24)
    both = compare({"long": longer, "short": model}, ids, repeats=0)
    for row, m in zip(both.rows, (longer, model)):
        assert row.loss == pytest.approx(evaluate(m, ids, block_size=16)["loss"], rel=1e-6)
    batches = list(Batches.sequential(Tokens(ids), 16, 7))  # the last one is ragged
    again = compare({"long": longer, "short": model}, (batch for batch in batches), repeats=1)
    assert [r.loss for r in again.rows] == pytest.approx([r.loss for r in both.rows], rel=1e-6) and again.tokens == 300
    assert again.rows[0].tokens_per_second > 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.one_of(st.integers(0, 6).map(float), st.just(math.nan))), max_size=8))
def test_the_pareto_front_is_what_nobody_beats(points):
    "Word by word: no other is as small with less loss, or smaller with as little; of equals one stands for all."
    rows = [replace(ROW, name=str(i), bytes=size, loss=loss) for i, (size, loss) in enumerate(points)]
    beats = lambda a, b: a.bytes <= b.bytes and a.loss <= b.loss and (a.bytes, a.loss) != (b.bytes, b.loss)
    fair = {(b.bytes, b.loss) for b in rows if not math.isnan(b.loss) and not any(beats(a, b) for a in rows)}
    front = Comparison(tuple(rows), "0", 1).pareto()
    assert [(r.bytes, r.loss) for r in front] == sorted(fair)


ROW = ComparisonRow("a", 1.0, 0.0, 0.0, math.e, None, 1.0, 0.0, 8, 8, 8.0, 1.0, None, None)


def test_html_and_json(model, ids):
    "The cells of the Markdown table, escaped for a page; all figures, with null for what is no number."
    broken = make()
    broken.model["norm"].weight.data.fill_(float("nan"))
    result = compare({"a": model, "<b>|c": broken}, ids, repeats=1)
    page = result._repr_html_()
    assert page.count("<tr>") == 3 and "&lt;b&gt;|c" in page and "<b>" not in page and page == result.to_html()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert cells[:len(cells) // 2] == [cell.strip() for cell in result.to_markdown().splitlines()[2].strip("|").split("|")]
    read = json.loads(result.to_json(), parse_constant=pytest.fail)
    assert read["models"]["<b>|c"]["loss"] is None and read["models"]["a"]["loss"] == result.rows[0].loss and read["pareto"] == ["a"]
    assert len(read["models"]["a"]["tokens_per_second_range"]) == 2 and "\n" not in result.to_json(indent=None)
