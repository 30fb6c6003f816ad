"The loops in C++: the bits of torch's operators, and a library that is built whole, once, and only where it can be."
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtlm import TinyLM, Trainer, build_native, native, prepare_qat, quantize_model_ptq
from qtlm.blockwise import dequantize_blockwise, quantize_blockwise
from qtlm.cache import KVCache
from qtlm.config import ModelConfig
from qtlm.finetuning import enable_finetuning_
from qtlm.generation import generate
from qtlm.kernels import KernelError, int4_linear, int8_linear, pack_int4, quantize_groups, quantize_rows, quantize_tokens
from qtlm.native import NativeError, _few_rows, _has_loops, _is_loaded
from qtlm.optim import QuantizedAdamW
from qtlm.rounding import round_weights
from qtlm.straight_through import _int8_form, _Kept, _kept_edge, _State

HAVE = any(map(shutil.which, ("c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(not HAVE, reason="no C++ compiler")


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory):
    "The library, built in a cache of its own; a module without a compiler tests what happens then."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QTLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("QTLM_NATIVE", raising=False)
        forget()
        yield build_native() if HAVE else None
    forget()


def forget():
    "Let the next question be asked anew."
    for known in (native._place, native._is_loaded, native._can_build, native._load):
        known.cache_clear()


@pytest.fixture
def torch_only(monkeypatch):
    "A function that runs another without the loops."
    def run(function, *args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(native, "_has_loops", lambda x: False)
            for module in ("blockwise", "moments", "straight_through"):
                patch.setattr(f"qtlm.{module}._has_loops", lambda x: False)
            return function(*args, **options)
    return run


def alike(a, b):
    "Tell whether two tensors have the same bits; all NaN are one."
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def activations(rows, width, kind, seed):
    "Rows of every size of number, some of them not finite."
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    if kind == "wild":
        x = x * torch.logspace(-44, 37, rows * width).view(rows, width)
    if kind == "broken":
        x.view(-1)[seed % x.numel()] = (torch.inf, -torch.inf, torch.nan)[seed % 3]
    return x * 0 if kind == "zeros" else x


ROWS, WIDTHS = st.integers(1, 8), st.one_of(st.integers(1, 70), st.sampled_from((127, 128, 384, 1025)))
KINDS, DTYPES = st.sampled_from(("plain", "wild", "broken", "zeros")), st.sampled_from((torch.float32, torch.bfloat16, torch.float16))


@needs_compiler
@settings(max_examples=150, deadline=None)
@given(rows=ROWS, width=WIDTHS, columns=st.integers(1, 40), kind=KINDS, dtype=DTYPES, with_bias=st.booleans(), how=st.sampled_from(("dynamic", "static", "asymmetric")), seed=st.integers(0, 99))
def test_8_bits_are_the_bits_of_torch(rows, width, columns, kind, dtype, with_bias, how, seed):
    x = activations(rows, width, kind, seed).to(dtype)
    codes, scale = quantize_rows(torch.randn(columns, width, generator=torch.Generator().manual_seed(seed)))
    bias = torch.linspace(-1, 1, columns).to(dtype) if with_bias else None
    given = {} if how == "dynamic" else {"input_scale": torch.tensor(0.013), "input_zero_point": torch.tensor(-7, dtype=torch.int32) if how == "asymmetric" else None}
    assert _has_loops(x)
    fast = int8_linear(x, codes, scale, bias, **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_has_loops", lambda x: False)
        assert alike(fast, int8_linear(x, codes, scale, bias, **given))


@needs_compiler
@settings(max_examples=150, deadline=None)
@given(rows=ROWS, size=st.sampled_from((1, 2, 4, 5, 16, 32, 64)), groups=st.integers(1, 9), columns=st.integers(1, 30), kind=KINDS, dtype=DTYPES, zero=st.sampled_from((None, 5)), seed=st.integers(0, 99))
def test_4_bits_are_the_bits_of_torch(rows, size, groups, columns, kind, dtype, zero, seed):
    width = size * groups
    x = activations(rows, width, kind, seed).to(dtype)
    codes, scale, group_scale = quantize_groups(torch.randn(columns, width, generator=torch.Generator().manual_seed(seed)), size)
    given = {} if zero is None else {"input_scale": torch.tensor(0.02), "input_zero_point": torch.tensor(zero, dtype=torch.int32)}
    args = x, pack_int4(codes), scale, group_scale, size, torch.ones(columns)
    fast = int4_linear(*args, **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_has_loops", lambda x: False)
        assert alike(fast, int4_linear(*args, **given))


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 9000), kind=st.sampled_from(("nf4", "fp4", "int4")), blocksize=st.sampled_from((32, 64, 256)), dtype=DTYPES, double=st.booleans())
def test_look_ups_are_the_bits_of_torch(count, kind, blocksize, dtype, double):
    w = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    codes, state = quantize_blockwise(w, kind, blocksize, double_quant=double)
    fast = dequantize_blockwise(codes, state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qtlm.blockwise._has_loops", lambda x: False)
        assert torch.equal(fast, dequantize_blockwise(codes, state))


@needs_compiler
@settings(max_examples=100, deadline=None)
@given(rows=st.sampled_from((9, 30, 511, 512, 600)), width=st.integers(2, 90), columns=st.sampled_from((1, 7, 40, 513, 1025)), kind=KINDS, dtype=DTYPES, with_bias=st.booleans(), zero=st.sampled_from((None, 0, 5)), seed=st.integers(0, 99))
def test_many_rows_are_the_bits_of_torch(rows, width, columns, kind, dtype, with_bias, zero, seed):
    x = activations(rows, width, kind, seed).to(dtype)
    codes, scale = quantize_rows(torch.randn(columns, width, generator=torch.Generator().manual_seed(seed)))
    bias = torch.linspace(-1, 1, columns).to(dtype) if with_bias else None
    given = {} if zero is None else {"input_scale": torch.tensor(0.013), "input_zero_point": torch.tensor(zero, dtype=torch.int32) if zero else None}
    fast, rounded = int8_linear(x, codes, scale, bias, **given), quantize_tokens(x.view(-1, 1, width))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_has_loops", lambda x: False)
        assert alike(fast, int8_linear(x, codes, scale, bias, **given))
        plain = quantize_tokens(x.view(-1, 1, width))
    finite = plain[1].isfinite().expand(x.shape[0], 1, width)  # codes of other tokens mean nothing
    assert alike(rounded[1], plain[1]) and torch.equal(rounded[0][finite], plain[0][finite])


@needs_compiler
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 9), groups=st.integers(1, 5), size=st.sampled_from((2, 7, 16, 64)), reach=st.sampled_from((0.0, 0.1, 1.0, 8.0, 60.0)), keep=st.sampled_from((1.0, 0.99)), bits=st.sampled_from((8, 4)), seed=st.integers(0, 99))
def test_a_step_has_the_bits_of_torch(torch_only, rows, groups, size, reach, keep, bits, seed):
    "Four steps of a layer, in which grids are left, raised, halved and born."
    def steps():
        draws = torch.Generator().manual_seed(seed)
        w = torch.randn(rows, groups * size, generator=draws) * (torch.rand(rows, 1, generator=draws) > 0.2)
        linear = torch.nn.Linear(groups * size, rows, bias=False)
        linear.weight.data = w
        model = enable_finetuning_(quantize_model_ptq(torch.nn.Sequential(linear), bits=bits, **({"group_size": size} if bits == 4 else {})))
        optimizer = QuantizedAdamW(model, lr=reach * w.abs().amax().item() / 10 + 1e-4, weight_decay=(1 - keep) / (reach + 1), seed=seed)
        for _ in range(4):
            grad = torch.randn(w.shape, generator=draws) * (torch.rand(rows, 1, generator=draws) > 0.3)
            model[0].stand_in.grad = grad.contiguous()
            optimizer.step()
        return [*model.state_dict().values(), *optimizer.state[model[0].stand_in].values()]

    assert all(alike(a, b) for a, b in zip(steps(), torch_only(steps)))


@needs_compiler
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 9), groups=st.integers(1, 5), size=st.sampled_from((1, 2, 7, 16, 64)), kind=st.sampled_from(("plain", "zeros")), bits=st.sampled_from((8, 4)), learned=st.booleans(), seed=st.integers(0, 99))
def test_rounding_in_training_has_the_bits_of_torch(torch_only, rows, groups, size, kind, bits, learned, seed):
    w = activations(rows, groups * size, kind, seed)
    state = _State(bits, size if bits == 4 else None, "nearest", "Linear")
    start = round_weights(w, bits, size if bits == 4 else None, "mse")
    kept = _Kept(start["scale"], start.get("group_scale"), (torch.rand(rows, generator=torch.Generator().manual_seed(seed)) - 0.5).requires_grad_())

    def both():
        edge = w.clone().requires_grad_()
        kept.log_scale.grad = None
        _kept_edge(edge, state, kept).square().sum().backward()
        return [*_int8_form(w, state, kept if learned else None), edge.grad, kept.log_scale.grad]

    assert all(alike(a, b) for a, b in zip(both(), torch_only(both)))


@needs_compiler
def test_second_derivatives_are_those_of_torch(torch_only):
    def penalty():
        torch.manual_seed(0)
        model = prepare_qat(torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16)), bits=4, group_size=16, rounding="mse")
        slopes = torch.autograd.grad(model(torch.randn(4, 32)).square().sum(), list(model.parameters()), create_graph=True)
        sum(slope.square().sum() for slope in slopes).backward()
        return [p.grad for p in model.parameters()]

    found = penalty()
    assert all(g.abs().sum() > 0 for g in found) and all(map(alike, found, torch_only(penalty)))


@needs_compiler
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_both(torch_only, bad):
    w = torch.ones(5, 32)
    w[3, 7] = bad
    for bits, size in ((8, None), (4, 8)):
        for run in (lambda f, *a: f(*a), torch_only):
            with pytest.raises(KernelError, match="channel 3: found NaN or infinity"):
                run(_int8_form, w, _State(bits, size, "nearest", "Linear"))


@needs_compiler
def test_rounding_to_bfloat16():
    "All exponents, and what lies on and beside the middle of two neighbours."
    bits = torch.arange(0, 2**16).view(-1, 1) * 2**16 + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    wanted = (bits - (bits >= 2**31) * 2**32).to(torch.int32).view(torch.float32).flatten()
    wanted = wanted[wanted.isfinite() & (wanted.abs() > 1e-37)]  # the sums are 0: what is rounded is the bias
    out, none = torch.empty(1, len(wanted), dtype=torch.bfloat16), torch.zeros(len(wanted), 4, dtype=torch.int8)
    torch.ops.qtlm.multiply_tokens(none[:1], none, torch.ones(1, 1), torch.ones(len(wanted)), wanted, None, out)
    assert torch.equal(out[0], wanted.bfloat16())
    scales = wanted[: len(wanted) // 2 * 2].view(-1, 2)[:, :1].expand(-1, 3).contiguous()  # the same by the way of codes
    torch.ops.qtlm.scale_codes(codes := torch.tensor([[1, -1, 3]], dtype=torch.int8).expand(len(scales), 3).contiguous(), scales[:, 0].contiguous(), rounded := torch.empty(scales.shape, dtype=torch.bfloat16))
    assert torch.equal(rounded, (codes * scales).bfloat16())


@needs_compiler
def test_they_are_really_asked(torch_only):
    x, (codes, scale) = torch.randn(1, 64), quantize_rows(torch.randn(8, 64))
    given = codes, scale, None, None, None, None
    assert _few_rows(x, *given) is not None and torch_only(_few_rows, x, *given) is None
    with torch.profiler.profile() as profile:
        int8_linear(x, codes, scale)
    assert "qtlm::int8_rows" in {event.key for event in profile.key_averages()}


@needs_compiler
@pytest.mark.parametrize("rows, dtype", [(9, torch.float32), (0, torch.float32), (1, torch.float64)])
def test_others_stay_with_torch(rows, dtype):
    codes, scale = quantize_rows(torch.randn(8, 64))
    assert _few_rows(torch.randn(rows, 64, dtype=dtype), codes, scale, None, None, None, None) is None


@needs_compiler
def test_layouts_of_all_kinds(torch_only):
    x, w = torch.randn(3, 200), torch.randn(40, 100)
    codes, scale = quantize_rows(w)
    wide, bias = torch.zeros(40, 230, dtype=torch.int8), torch.randn(80)
    wide[:, 30:130] = codes
    for rows in (x[:, ::2], x[:, 100:], x.t()[:100].t(), x[:1, :100].expand(4, 100), x[None, :, None, :100]):
        plain = torch_only(int8_linear, rows, codes, scale, bias[::2])
        assert torch.equal(int8_linear(rows, wide[:, 30:130], scale, bias[::2]), plain)


@needs_compiler
def test_gradients_and_functional_transforms(torch_only):
    codes, scale = quantize_rows(torch.randn(8, 32))
    def grad():
        x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        int8_linear(x, codes, scale).sum().backward()
        return x.grad
    assert torch.equal(grad(), torch_only(grad))
    x = torch.randn(4, 2, 32)
    assert torch.equal(torch.func.vmap(lambda rows: int8_linear(rows, codes, scale))(x), int8_linear(x, codes, scale))


@needs_compiler
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("way", ["QAT INT8", "QAT INT4, static", "fine-tuned INT4", "scales of INT8"])
def test_training_gives_the_same_bits(torch_only, way, dtype):
    def train():
        torch.manual_seed(0)
        model = TinyLM(ModelConfig(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, block_size=16))
        batches = [torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(n)) for n in range(3)]
        more = {}
        if "QAT" in way:
            static = {"type": "static", "symmetric": False, "calibration_data": batches} if "static" in way else {}
            model = prepare_qat(model, bits=int(way[7]), **static)
        else:
            model, more = quantize_model_ptq(model, bits=int(way[-1])), {"enable_quantized_finetuning": True, "quantized_finetuning": "scales" if "scales" in way else "weights"}
        trainer = Trainer(model, dtype=dtype, batch_size=4, block_size=16, progress=False, output_dir=None, **more)
        losses = [trainer.training_step(batch) for batch in batches]
        return losses, trainer.model.state_dict()

    (losses, state), (plain_losses, plain) = train(), torch_only(train)
    assert losses == plain_losses and all(torch.equal(state[name], plain[name]) for name in plain)


@needs_compiler
def test_what_is_exported_needs_no_library():
    model = quantize_model_ptq(torch.nn.Sequential(torch.nn.Linear(32, 16)))
    x = torch.randn(1, 32)
    program = torch.export.export(model, (x,))
    assert not any("qtlm" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), model(x))


@needs_compiler
def test_a_compiled_model_uses_them():
    model, seen = quantize_model_ptq(torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 8)), bits=4), []
    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=backend, fullgraph=True)(torch.ones(1, 64)), model(torch.ones(1, 64)))
    assert sum("int4_rows" in target for target in seen) == 2


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("bits, kept", [(8, None), (4, None), (8, 8)])
def test_compiled_writing_gives_the_same_text(bits, kept):
    torch.manual_seed(0)
    model = TinyLM(ModelConfig(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, block_size=32)).eval()
    for p in model.parameters():
        p.data.mul_(3)
    small = quantize_model_ptq(model, bits=bits)
    prompt = torch.randint(0, 61, (3, 4))
    caches = [KVCache(small, batch_size=3, compile=compiled, bits=kept) for compiled in (False, True)]
    texts = [generate(small, prompt, 20, temperature=0, cache=cache) for cache in caches]
    assert torch.equal(*texts)
    other = quantize_model_ptq(TinyLM(model.config).eval(), bits=bits)  # another model of the same shape: another program
    assert torch.equal(*(generate(other, prompt, 20, temperature=0, cache=KVCache(other, batch_size=3, compile=compiled, bits=kept)) for compiled in (False, True)))
    assert torch.equal(generate(small, prompt, 20, temperature=0, cache=caches[1]), texts[0])


# ---- the library ----

def python(code, **env):
    "Run Python in a process of its own."
    env = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)


REPORT = """
import torch
from qtlm import build_native, native
from qtlm.kernels import int8_linear, quantize_rows
torch.manual_seed(0)
y = int8_linear(torch.randn(1, 64), *quantize_rows(torch.randn(8, 64)))
try: place = build_native()
except native.NativeError as error: place = error
print(native._is_loaded(), y.sum().item(), place)
"""


@needs_compiler
def test_built_once_and_used_by_later_processes(tmp_path, library):
    first = python(REPORT, QTLM_CACHE=str(tmp_path))
    place = next(tmp_path.glob("native-*.so"))
    made = place.stat().st_mtime_ns
    assert place.name == library.name and [p.name for p in place.parent.iterdir()] == [place.name]  # no leftovers
    assert first.stdout == python(REPORT, QTLM_CACHE=str(tmp_path)).stdout and first.stdout.startswith("True")
    assert place.stat().st_mtime_ns == made


@needs_compiler
def test_nothing_is_built_unasked(tmp_path):
    done = python("import torch, qtlm\nqtlm.quantize_model_ptq(torch.nn.Linear(8, 8))(torch.ones(1, 8))", QTLM_CACHE=str(tmp_path))
    assert not done.returncode and not any(tmp_path.rglob("*.so"))


DAMAGE = """
from qtlm import native
whole = open({library!r}, "rb").read()
for damaged in (b"", b"not a library", whole[:5000], whole[:-1], whole[:9000] + b"?" + whole[9001:]):
    native._place().write_bytes(damaged)
    native._is_loaded.cache_clear()
    print(native._is_loaded())
native.build_native()
print(native._is_loaded())
"""


@needs_compiler
def test_a_broken_library_is_left_alone_and_made_anew(tmp_path, library):
    done = python(DAMAGE.format(library=str(library)), QTLM_CACHE=str(tmp_path))
    assert done.stdout == "False\n" * 5 + "True\n", done.stderr
    assert python("from qtlm import native; print(native._is_loaded())", QTLM_CACHE=str(tmp_path)).stdout == "True\n"


@pytest.mark.parametrize(
    "env, said",
    [
        ({"QTLM_NATIVE": "0"}, "native: found QTLM_NATIVE=0 in the environment; expected another value, or none."),
        ({"PATH": "/nowhere", "CXX": None}, "native: found none of c++, g++, clang++; expected a C++ compiler. Everything works without, only slower."),
        ({"CXX": "false"}, "native: false failed (). Everything works without, only slower."),
        ({"QTLM_CACHE": "/dev/null"}, "native: can't build the loops ([Errno 17] File exists: '/dev/null'"),
        ({"QTLM_CACHE": "~nobody-of-that-name/x"}, "native: can't build the loops (Could not determine home directory.). Everything works without, only slower."),
    ],
    ids=["off", "no compiler", "a compiler that fails", "no place", "no home"],
)
def test_where_it_cannot_be_built_one_line_says_so_and_all_goes_on(tmp_path, env, said):
    done = python(REPORT, **{"QTLM_CACHE": str(tmp_path), **env})
    loaded, value, line = done.stdout.split(" ", 2)
    assert not done.returncode and loaded == "False" and line.startswith(said) and len(line.splitlines()) == 1
    torch.manual_seed(0)
    assert float(value) == int8_linear(torch.randn(1, 64), *quantize_rows(torch.randn(8, 64))).sum().item()


@needs_compiler
@pytest.mark.slow
def test_processes_that_build_at_once(tmp_path):
    results = []
    threads = [threading.Thread(target=lambda: results.append(python(REPORT, QTLM_CACHE=str(tmp_path)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({done.stdout for done in results}) == 1 and results[0].stdout.startswith("True")
    assert len(list(tmp_path.iterdir())) == 1


def test_another_torch_or_processor_has_another_library(monkeypatch):
    names = {native._place().name}
    for target, value in ((torch, "__version__"), (native, "_SOURCE")):
        with monkeypatch.context() as patch:
            patch.setattr(target, value, "another")
            native._place.cache_clear()
            names.add(native._place().name)
    with monkeypatch.context() as patch:
        patch.setattr(native, "_processor", lambda: "another")
        native._place.cache_clear()
        names.add(native._place().name)
    native._place.cache_clear()
    assert len(names) == 4


def test_tensors_of_other_devices_stay_with_torch():
    assert not _has_loops(torch.empty(1, 8, device="meta"))
    assert Path(native.__file__).name == "native.py" and isinstance(NativeError("x"), RuntimeError) and _is_loaded() == HAVE
