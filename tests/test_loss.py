# pytest tests/test_loss.py
"""The loss against torch's own, over shapes, dtypes, strides and options, on both of its paths; what it keeps; what it refuses."""
import math
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qtlm import loss as loss_module
from qtlm.loss import LossError, bits_per_byte, compute_loss, distillation_loss

EPS = torch.finfo(torch.float32).eps
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@contextmanager
def blocks_of(elements):
    "Send every call through the block path, with blocks of so many elements, and count the blocks' gradients."
    written, write = [], loss_module._block_gradient_

    def count(out, rows, *rest):
        written.append(len(rows))
        write(out, rows, *rest)

    with (
        mock.patch.object(loss_module, "_SMALL", 0),
        mock.patch.dict(loss_module._BLOCK, {"cpu": elements}),
        mock.patch.object(loss_module, "_BLOCK_ELSEWHERE", elements),
        mock.patch.object(loss_module, "_block_gradient_", count),
    ):
        yield written


@st.composite
def problems(draw):
    "Logits in some shape, dtype and stride order; targets of which some are ignored and one is not."
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=3))
    classes = draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = draw(st.sampled_from([1e-3, 1.0, 30.0])) * torch.randn(*shape, classes, generator=generator, dtype=torch.float64)
    x = x.to(draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])))
    match draw(st.sampled_from(["plain", "classes first", "shifted", "reversed dims"])):
        case "classes first":
            x = x.movedim(-1, 0).contiguous().movedim(0, -1)
        case "shifted":
            x = torch.stack([x, x], 0).repeat_interleave(2, -1)[0, ..., ::2]
        case "reversed dims":
            x = x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    ignore = draw(st.sampled_from([-100, -1, 0, classes - 1]))
    y = torch.randint(classes, shape, generator=generator)
    y = torch.where(torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.4])), ignore, y)
    if (y == ignore).all():
        y.view(-1)[0] = next((c for c in range(classes) if c != ignore), ignore)
    return x, y.to(draw(st.sampled_from([torch.int64, torch.int32, torch.int16]))), ignore


def reference(x, y, reduction, weight, **options):
    "Torch's loss and gradient in float64."
    leaf = x.detach().double().requires_grad_()
    loss = F.cross_entropy(leaf.reshape(-1, x.shape[-1]), y.reshape(-1).long(), reduction=reduction, **options)
    loss = loss.view(y.shape) if reduction == "none" else loss
    (loss * weight).sum().backward()
    return loss, leaf.grad


@settings(max_examples=300, deadline=None)
@given(problems(), st.sampled_from(["mean", "sum", "none"]), st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([None, 1, 10, 1000]))
def test_value_and_gradient_are_those_of_torch(problem, reduction, smoothing, elements):
    x, y, ignore = problem
    if (y == ignore).all() and reduction == "mean":
        return
    options = {"ignore_index": ignore, "label_smoothing": smoothing}
    weight = torch.linspace(-1, 2, y.numel()).view(y.shape).double() if reduction == "none" else torch.tensor(1.5).double()
    want, want_gradient = reference(x, y, reduction, weight, **options)

    leaf = x.detach().requires_grad_()
    with blocks_of(elements or 1 << 19) as written:
        if elements is None:
            loss_module._SMALL = 1 << 20
        loss = compute_loss(leaf, y, reduction=reduction, **options)
        (loss * weight.to(loss.dtype)).sum().backward()
    if elements is not None:
        assert sum(written) == y.numel() and all(n == 1 or n * x.shape[-1] <= elements for n in written)

    inside = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert loss.dtype == inside and loss.shape == want.shape and leaf.grad.dtype == x.dtype and leaf.grad.shape == x.shape
    size = x.double().abs().max().item() + math.log(x.shape[-1]) + 1
    terms = y.numel() if reduction == "sum" else 1
    assert (loss.double() - want).abs().max() <= 8 * torch.finfo(inside).eps * size * terms
    bound = 16 * torch.finfo(inside).eps * max(1.0, weight.abs().max().item()) + torch.finfo(x.dtype).eps * want_gradient.abs()
    assert ((leaf.grad.double() - want_gradient).abs() <= bound + torch.finfo(x.dtype).smallest_normal).all()
    assert leaf.grad[y == ignore].eq(0).all()


@pytest.mark.parametrize("elements", [1, 7, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_first_and_second_derivative(reduction, elements):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0, 1, -100], [3, 3, 2]])
    with blocks_of(elements):
        def f(x):
            return compute_loss(x, y, reduction=reduction, label_smoothing=0.2)

        assert torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("elements", [3, 1 << 19])
def test_minus_infinity_gives_numbers_where_torch_does(elements):
    x = torch.randn(6, 5)
    x[:, 2] = -math.inf                                     # a class that is ruled out
    y = torch.tensor([0, 1, 3, 4, 2, -100])                 # but is the target of one row
    for smoothing in (0.0, 0.1):
        ours, torchs = x.clone().requires_grad_(), x.clone().requires_grad_()
        with blocks_of(elements):
            loss = compute_loss(ours, y, reduction="none", label_smoothing=smoothing)
            loss.sum().backward()
        want = F.cross_entropy(torchs, y, reduction="none", label_smoothing=smoothing)
        want.sum().backward()
        torch.testing.assert_close(loss, want)
        assert loss[4] == math.inf and loss.isnan().sum() == 0
        torch.testing.assert_close(ours.grad, torchs.grad)
        assert not ours.grad.isnan().any()


def test_nan_is_not_swallowed():
    x = torch.zeros(4, 5)
    x[1, 3] = math.nan
    y = torch.zeros(4, dtype=torch.int64)
    with blocks_of(5):
        assert compute_loss(x, y).isnan() and compute_loss(x, y, reduction="none").isnan().tolist() == [False, True, False, False]


def test_float32_inside():
    x = torch.zeros(1, 3, 1000)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for elements in (1, 1 << 19):
            with blocks_of(elements):
                assert abs(compute_loss(x.to(dtype), torch.zeros(1, 3).long()).item() - math.log(1000)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_the_gradient_and_one_block(dtype):
    class Largest(TorchDispatchMode):
        sizes = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.sizes += [t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, torch.Tensor)
                           and t.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr()]
            return out

    leaf = torch.zeros(4, 33, 32_000, dtype=dtype, requires_grad=True)
    y = torch.zeros(4, 32, dtype=torch.int64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), Largest() as seen:
        loss = compute_loss(leaf[:, :-1], y)                # the usual shift: not contiguous, and still not copied
        forward = max(seen.sizes)
        loss.backward()
    block = 4 * loss_module._BLOCK["cpu"]
    assert forward <= block < leaf.nbytes / 4
    large = {size for size in seen.sizes if size > block}
    assert large <= {leaf.nbytes, leaf[:, :-1].nbytes}      # the gradient of the slice, and of what was sliced
    storages = {t.untyped_storage().data_ptr() for t in kept if t.untyped_storage().nbytes() > block}
    assert storages == {leaf.untyped_storage().data_ptr()}


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph(reduction):
    x = torch.randn(2, 5, 7, dtype=torch.bfloat16)
    y = torch.tensor([[0, 1, 2, 3, -100], [6, 5, 4, 3, 2]])

    def f(x, y):
        return compute_loss(x, y, label_smoothing=0.1, reduction=reduction)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(compiled(a, y), f(b, y))
    compiled(a, y).sum().backward()
    f(b, y).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("elements", [20, 1 << 19])
def test_autocast_changes_nothing(device, elements):
    x, y = torch.randn(2, 5, 7, device=device), torch.randint(7, (2, 5), device=device)
    with blocks_of(elements):
        want = compute_loss(x, y)
        with torch.autocast(device, torch.bfloat16):
            leaf = x.clone().requires_grad_()
            loss = compute_loss(leaf, y)
        loss.backward()
    assert loss.dtype == torch.float32 and torch.equal(loss, want) and leaf.grad.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(x.flatten(0, 1), y.flatten()))


def test_functional_gradient():
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    with blocks_of(5):
        got = torch.func.grad(lambda x: compute_loss(x, y))(x)
    torch.testing.assert_close(got, (x.softmax(-1) - F.one_hot(y, 5)) / 4)


def call(**changes):
    return compute_loss(**({"logits": torch.zeros(2, 4, 7), "targets": torch.zeros(2, 4, dtype=torch.int64)} | changes))


@pytest.mark.parametrize("changes, told", [
    ({"targets": torch.zeros(2, 3).long()}, r"logits \[2, 4, 7\] .* targets \[2, 3\].*expected \[..., V\] against \[...\].*Shift"),
    ({"targets": torch.zeros(8).long()}, r"\[2, 4, 7\] .* \[8\].*reshape"),
    ({"logits": torch.zeros(2, 7, 4)}, r"\[2, 7, 4\] .* \[2, 4\].*classes come last"),
    ({"logits": torch.zeros(2, 4, 0)}, r"\[2, 4, 0\]"),
    ({"logits": torch.tensor(1.0), "targets": torch.tensor(0)}, r"logits \[\]"),
    ({"targets": torch.zeros(2, 4)}, r"targets \[2, 4\] is torch.float32"),
    ({"targets": torch.zeros(2, 4, dtype=torch.bool)}, "torch.bool"),
    ({"logits": torch.zeros(2, 4, 7).long()}, r"logits \[2, 4, 7\] is torch.int64"),
    ({"logits": torch.zeros(2, 4, 7).cfloat()}, "torch.complex64"),
    ({"logits": [[0.0]]}, "logits is list"),
    ({"logits": type("Output", (), {"logits": None})()}, "logits is Output; .* Pass its .logits"),
    ({"targets": None}, "targets is NoneType"),
    ({"logits": torch.zeros(2, 4, 7, device="meta")}, "on meta .* on cpu"),
    ({"targets": torch.tensor([[0, 1, 2, 3], [4, 5, 7, 8]])}, r"target 7 at \[1, 2\] of targets \[2, 4\] \(2 such\); expected 0 to 6"),
    ({"targets": torch.tensor([[0, -1, -100, 3], [4, 5, 6, 6]])}, r"target -1 at \[0, 1\].*ignore_index -100"),
    ({"targets": torch.full((2, 4), -100), "ignore_index": -1}, r"target -100 at \[0, 0\].*ignore_index -1"),
    ({"targets": torch.full((2, 4), -100)}, r"no target of \[2, 4\] counts"),
    ({"logits": torch.zeros(0, 7), "targets": torch.zeros(0).long()}, r"no target of \[0\] counts"),
    ({"reduction": "average"}, "reduction is 'average'"),
    ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
    ({"label_smoothing": math.nan}, "label_smoothing is nan"),
])
@pytest.mark.parametrize("elements", [7, None])
def test_mistakes_are_one_line_errors(changes, told, elements):
    with pytest.raises(LossError, match=told) as error:
        if elements:
            with blocks_of(elements):
                call(**changes)
        else:
            call(**changes)
    text = str(error.value)
    assert text.startswith("compute_loss: ") and "expected" in text and "\n" not in text and len(text) <= 300


def test_nothing_counts_but_a_sum_was_asked_for():
    for elements in (7, 1 << 19):
        with blocks_of(elements):
            leaf = torch.zeros(2, 4, 7, requires_grad=True)
            loss = call(logits=leaf, targets=torch.full((2, 4), -100), reduction="sum")
            loss.backward()
            assert loss == 0 and leaf.grad.eq(0).all()
            assert call(logits=torch.zeros(0, 7), targets=torch.zeros(0).long(), reduction="sum") == 0


def test_bits_per_byte():
    assert math.isclose(bits_per_byte(math.log(2), 8, 1), 8)
    assert math.isclose(bits_per_byte(torch.tensor(2.0), 300, 1000), 0.6 / math.log(2), rel_tol=1e-6)
    for tokens, size in ((-1, 5), (5, 0), (5, -5)):
        with pytest.raises(LossError, match="bits_per_byte"):
            bits_per_byte(1.0, tokens, size)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.sampled_from([0.3, 1.0, 5.0]),
       st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.integers(0, 2**32))
def test_distillation_is_the_divergence(batch, length, classes, temperature, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, batch, length, classes, generator=generator).to(dtype)
    mask = torch.rand(batch, length, generator=generator) < 0.3
    mask.view(-1)[0] = False
    student.requires_grad_()
    loss = distillation_loss(student, teacher, temperature, ignore_mask=mask)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    p, q = ((x[~mask].double() / temperature).softmax(-1) for x in (teacher, student))
    torch.testing.assert_close(loss.double(), temperature**2 * (p * (p / q).log()).sum(-1).mean(), rtol=1e-4, atol=1e-5)
    loss.backward()
    want = torch.zeros_like(student, dtype=torch.float64)
    want[~mask] = temperature * (q - p).detach() / len(p)
    torch.testing.assert_close(student.grad.double(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)


def test_distillation_where_classes_are_ruled_out():
    student, teacher = torch.randn(2, 3, 5)
    student[:, 1] = teacher[:, 1] = -math.inf
    student.requires_grad_()
    loss = distillation_loss(student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    torch.testing.assert_close(loss.detach(), distillation_loss(student.detach()[:, [0, 2, 3, 4]], teacher[:, [0, 2, 3, 4]]))
    assert distillation_loss(student, torch.zeros(3, 5)) == math.inf      # the teacher allows what the student rules out


@pytest.mark.parametrize("changes, told", [
    ({"teacher_logits": torch.zeros(2, 3)}, r"student \[2, 4\] .* teacher \[2, 3\]"),
    ({"teacher_logits": torch.zeros(2, 4).long()}, "teacher .* torch.int64"),
    ({"student_logits": torch.zeros(0, 4), "teacher_logits": torch.zeros(0, 4)}, "not empty"),
    ({"temperature": 0}, "temperature is 0"),
    ({"temperature": math.inf}, "temperature is inf"),
    ({"ignore_mask": torch.zeros(2)}, "ignore_mask .* torch.float32"),
    ({"ignore_mask": torch.zeros(3, dtype=torch.bool)}, r"ignore_mask \[3\]"),
    ({"ignore_mask": torch.ones(2, dtype=torch.bool)}, "leaves no position"),
])
def test_distillation_mistakes(changes, told):
    with pytest.raises(LossError, match=told):
        distillation_loss(**({"student_logits": torch.zeros(2, 4), "teacher_logits": torch.zeros(2, 4)} | changes))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_as_on_a_cpu(dtype):
    x, y = torch.randn(64, 40_000).to(dtype), torch.randint(40_000, (64,))
    results = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        loss = compute_loss(leaf, y.to(device), label_smoothing=0.1)
        loss.backward()
        results.append((loss.cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


# ---- arguments of other types ----

@pytest.mark.parametrize("options, told", [
    ({"label_smoothing": "0.1"}, "label_smoothing is '0.1'"), ({"label_smoothing": None}, "label_smoothing is None"),
    ({"ignore_index": None}, "ignore_index is None"), ({"ignore_index": "x"}, "ignore_index is 'x'"), ({"ignore_index": -1.0}, "ignore_index is -1.0"),
    ({"reduction": None}, "reduction is None"), ({"reduction": ["mean"]}, "reduction is"), ({"reduction": "x" * 1000}, "reduction is"),
    ({"logits": torch.zeros(2, 7).to_sparse()}, "logits is torch.sparse_coo; expected a dense Tensor"),
    ({"logits": torch.zeros([1] * 60)}, "56 more dimensions"), ({"targets": torch.zeros([1] * 60, dtype=torch.int64)}, "56 more dimensions"),
    ({"targets": torch.zeros([1] * 60, dtype=torch.int64), "logits": torch.zeros([1] * 61)[..., :0]}, "more dimensions"),
    ({"targets": torch.full([1] * 60, 7), "logits": torch.zeros([1] * 61)}, "target 7 at"),
])
def test_any_mistake_is_one_line(options, told):
    with pytest.raises(LossError) as caught:
        compute_loss(**({"logits": torch.zeros(2, 7), "targets": torch.zeros(2, dtype=torch.int64)} | options))
    assert told in str(caught.value) and len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


def test_no_hint_where_there_is_nothing_to_reshape():
    with pytest.raises(LossError) as caught:
        compute_loss(torch.zeros(()), torch.tensor(0))
    assert "reshape" not in str(caught.value)


def test_shapes_without_values():
    "On the meta device there is nothing to look at, and the shapes are still right."
    logits, targets = torch.zeros(2, 3, 7, device="meta"), torch.zeros(2, 3, dtype=torch.int64, device="meta")
    assert compute_loss(logits, targets).shape == () and compute_loss(logits, targets, reduction="none").shape == (2, 3)


@pytest.mark.parametrize("arguments", [("a", 1, 1), (None, 1, 1), (torch.zeros(3), 1, 1), (1.0, None, 1), (1.0, 1, "1"), (1.0, "1", 1), (1.0, 1, None)])
def test_bits_per_byte_takes_numbers(arguments):
    with pytest.raises(LossError, match="^bits_per_byte: .*; expected ") as caught:
        bits_per_byte(*arguments)
    assert len(str(caught.value)) <= 300


@pytest.mark.filterwarnings("error")
def test_bits_per_byte_of_a_loss_with_a_graph():
    loss = compute_loss(torch.zeros(4, 2, requires_grad=True), torch.zeros(4, dtype=torch.int64))
    assert bits_per_byte(loss, 4, 4) == pytest.approx(1)


@pytest.mark.parametrize("arguments, told", [
    (([0.0], torch.zeros(2, 7)), "student_logits is list"), ((torch.zeros(2, 7), None), "teacher_logits is NoneType"),
    ((torch.zeros(2, 7), torch.zeros(2, 7), "1"), "temperature is '1'"), ((torch.zeros(2, 7), torch.zeros(2, 7), None), "temperature is None"),
    ((torch.zeros(2, 7), torch.zeros(2, 7, device="meta")), "expected one device"),
])
def test_distillation_mistakes_are_one_line(arguments, told):
    with pytest.raises(LossError, match=told) as caught:
        distillation_loss(*arguments)
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


def test_distillation_mask_is_a_tensor():
    with pytest.raises(LossError, match="ignore_mask is list; expected a Tensor"):
        distillation_loss(torch.zeros(2, 7), torch.zeros(2, 7), ignore_mask=[True, False])
