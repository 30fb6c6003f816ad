# python -m pytest tests/test_book.py
"""The house rules of the book (`STYLE.md`), one test a rule and notebook, and the proof that each rule can fail.

The rules themselves are functions in `tests/book.py`. The notebooks run here once, in a copy of the tree, by `nbdev-test --save`.
"""
import ast
import configparser
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import book
import pytest
from book import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import cells as cells_tool  # noqa: E402
import readme as readme_tool  # noqa: E402

CHAPTERS = book.chapters()
BY_HAND = {"__init__.py", "__main__.py"}
SECONDS = 120  # the rule is 30 s on two free cores; a machine that others use as well gets four times that
each_notebook = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
each_module = pytest.mark.parametrize("path", sorted((ROOT / "qtlm").glob("*.py")), ids=lambda p: p.stem)


def check(violations):
    "Fail with one violation a line."
    assert not violations, "\n" + "\n".join(violations)


def tool(name):
    "Return the path of one of nbdev's commands, that of this interpreter first."
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name) or pytest.fail(f"{name} is not installed: pip install -e '.[dev]'")


def clean_environment(home):
    "Return the environment for nbdev: no IN_TEST (which silences exports), one thread, nobody's own settings."
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "MPLBACKEND", "PYTHONPATH")}
    return env | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "XDG_CONFIG_HOME": str(home), "IPYTHONDIR": str(home / "ipython")}


def files_of(folder):
    "Return `{relative path: text}` of a package's Python files."
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.py") if "__pycache__" not in p.parts}


# ---- 1: the package is what the notebooks export ----

@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    "What `nbdev-export` makes of the notebooks alone, in an empty project."
    scratch = tmp_path_factory.mktemp("export")
    shutil.copytree(ROOT / "nbs", scratch / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", scratch)
    (scratch / "qtlm").mkdir()
    shutil.copy(ROOT / "qtlm/__init__.py", scratch / "qtlm")
    before = {p.name for p in (scratch / "nbs").iterdir()}
    done = subprocess.run([tool("nbdev-export")], cwd=scratch, env=clean_environment(scratch), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (scratch / "pyproject.toml").read_text() == (ROOT / "pyproject.toml").read_text(), "nbdev-export rewrote pyproject.toml"
    assert {p.name for p in (scratch / "nbs").iterdir()} == before, "nbdev-export wrote into nbs/; a module docstring has more than three lines"
    return files_of(scratch / "qtlm")


def test_each_module_has_a_notebook_and_each_notebook_its_module(exported):
    "A module whose notebook is gone stays in the package unseen by nbdev."
    committed = files_of(ROOT / "qtlm").keys()
    assert committed - exported.keys() <= BY_HAND, f"no notebook exports {sorted(committed - exported.keys() - BY_HAND)}; remove them"
    assert exported.keys() <= committed, f"run nbdev-export: missing {sorted(exported.keys() - committed)}"


@each_module
def test_the_package_is_what_the_notebooks_export(exported, path):
    "Each file of qtlm/ is, to the byte, what its notebook gives."
    if path.name not in exported:
        assert path.name in BY_HAND, f"no notebook exports {path.name}"
    else:
        assert path.read_text() == exported[path.name], f"{path.name} is not what its notebook exports: edit the notebook, then run nbdev-export"


@each_notebook
def test_notebook_is_clean(path):
    "`nbdev-clean` changes nothing: no execution counts, no kernel's metadata."
    from fastcore.nbio import dict2nb, nb2str
    from nbdev.clean import clean_nb

    text = path.read_text()
    nb = dict2nb(json.loads(text))
    clean_nb(nb, clean_ids=False)  # as pyproject.toml has it
    assert nb2str(nb) == text, f"run nbdev-clean --fname {path.relative_to(ROOT)}"


# ---- 2 to 6: one rule a test ----

@each_notebook
def test_imports_follow_the_order_of_reading(path):
    "Notebook k imports only modules of lower chapters."
    number, last_chapter = book.number_of(path.name), path.stem in ("index", "14_cli")
    check(book.forward_imports(book.read(path), number, book.module_numbers(), allow_package=last_chapter))


@each_notebook
def test_code_is_plain_python(path):
    "No star imports, magics, `@patch`, monkey patches, `nbdev_export()`."
    check(book.unplain_code(book.read(path)))


@each_notebook
def test_public_names_are_documented(path):
    "Each public name has a docstring, each parameter and field a comment."
    check(book.undocumented(book.read(path)))


@each_notebook
def test_public_names_are_asserted_near_their_definition(path):
    "Each public name is used by an assertion on the page, within five cells."
    check(book.unasserted(book.read(path)))


@each_notebook
def test_nothing_is_hidden(path):
    "No hidden assertion, and one hidden cell at most."
    check(book.hidden(book.read(path)))


@each_notebook
def test_sizes(path):
    "Short exported cells, short runs of them, small notebooks and pictures."
    check(book.too_long(book.read(path)))


@each_notebook
def test_outputs_tell_nothing_of_the_machine(path):
    "No paths, times, addresses, speeds, errors in stored outputs."
    check(book.unclean_outputs(book.read(path)))


@each_notebook
def test_form(path):
    "Title, headings alone, cells with names, a last paragraph that leads on."
    check(book.malformed(book.read(path), is_chapter=path.stem != "index"))


def test_chapters_have_numbers_of_their_own():
    "No two notebooks share a number, a module, or a page (the page is named after the module)."
    numbers, modules = [book.number_of(p.name) for p in CHAPTERS], [book.module_of(book.read(p)) for p in CHAPTERS]
    assert CHAPTERS, "nbs/ has no notebooks"
    assert len(set(numbers)) == len(numbers) and len(set(modules)) == len(modules), list(zip(numbers, modules))
    for path, module in zip(CHAPTERS, modules):
        assert path.stem == "index" or re.fullmatch(rf"\d\d[a-z]?_{module}", path.stem), f"{path.name} exports {module}: name them alike"


# ---- 6: stored outputs are those of the code ----

@dataclass
class Run:
    "What became of the notebooks in a copy of the tree."

    failed: set  # names of the notebooks in which a cell raised
    text: str  # what nbdev-test printed, tracebacks among it
    stored: dict  # file name to notebook, as committed
    fresh: dict  # file name to notebook, as run
    written: list  # files that were not there before


def tree_files(folder):
    "Return the files below a folder, without what Python and Jupyter cache."
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts) and p.is_file()}


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    "All notebooks, run once by nbdev-test in a copy of the tree."
    scratch = tmp_path_factory.mktemp("run") / "tree"
    skip = shutil.ignore_patterns(".git", ".venv*", "venv", "_docs", "_proc", "*.egg-info", "__pycache__", ".pytest_cache", ".hypothesis", ".ruff_cache",
                                  ".ipynb_checkpoints", "checkpoints", "runs", "build", "dist")
    shutil.copytree(ROOT, scratch, ignore=skip, symlinks=True)
    before, stored = tree_files(scratch), {p.name: book.read(p) for p in book.chapters(scratch / "nbs")}
    command = [tool("nbdev-test"), "--save", "--n-workers", str(min(2, os.cpu_count() or 1))]
    done = subprocess.run(command, cwd=scratch, env=clean_environment(scratch.parent), capture_output=True, text=True, timeout=1800)
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    listed = re.search(r"nbdev Tests Failed On The Following Notebooks:\n=+\n(.*)", text, re.S)
    failed = set(re.findall(r"\S+\.ipynb", listed[1])) if listed else set() if done.returncode == 0 else set(stored)
    fresh = {name: book.read(scratch / "nbs" / name) for name in stored}
    return Run(failed, text, stored, fresh, sorted(tree_files(scratch) - before))


@each_notebook
def test_notebook_runs(run, path):
    "Every cell of the notebook runs, so each of its assertions holds; it takes no longer than a reader waits."
    assert path.name not in run.failed, run.text[-6000:]
    seconds = sum(cell.get("metadata", {}).get("execution", {}).get("total", 0) for cell in run.fresh[path.name]["cells"])
    assert 0 < seconds <= SECONDS, f"{path.name} took {seconds:.0f} s; the rule is 30 s on two cores"


@each_notebook
def test_stored_outputs_are_those_of_the_code(run, path):
    "A new run prints and draws what the page shows."
    if path.name in run.failed:
        pytest.fail("the notebook does not run")
    stored, fresh = run.stored[path.name], run.fresh[path.name]
    check(book.differing_outputs(stored, fresh) + book.differing_pictures(stored, fresh))


def test_notebooks_leave_nothing_behind(run):
    "Lessons write into temporary folders, not into the tree."
    assert not run.written, f"running the notebooks wrote {run.written[:10]}; use tempfile.TemporaryDirectory"


# ---- 7: one README, one version, one table of names ----

def test_readme_is_what_the_index_gives():
    "README.md is made from nbs/index.ipynb."
    assert (ROOT / "nbs/index.ipynb").exists(), "nbs/index.ipynb is missing"
    assert readme_tool.stale() == [], "run python docs/readme.py"


def project():
    "Return pyproject.toml as a dict."
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        tomllib = pytest.importorskip("tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_settings_ini_mirrors_pyproject():
    "nbdev 3 reads pyproject.toml only; settings.ini is for tools that still read it, and must say the same."
    parser = configparser.ConfigParser(interpolation=None)
    assert parser.read(ROOT / "settings.ini"), "settings.ini is missing"
    settings, data = parser["DEFAULT"], project()
    meta, nbdev = data["project"], data["tool"]["nbdev"]
    expected = {
        "lib_name": meta["name"],
        "version": importlib.import_module("qtlm").__version__,
        "description": meta["description"],
        "license": re.sub(r"\.0$|[^a-z0-9]", "", meta["license"].lower()),  # nbdev's own key: apache2
        "min_python": meta["requires-python"].removeprefix(">="),
        "keywords": " ".join(meta["keywords"]),
        "author": meta["authors"][0]["name"],
        "requirements": " ".join(meta["dependencies"]),
        "console_scripts": " ".join(f"{k}={v}" for k, v in meta["scripts"].items()),
        **{key: nbdev[key] for key in ("nbs_path", "lib_path", "doc_path", "branch", "title") if key in nbdev},
    }
    if "dev_requirements" in settings:
        expected["dev_requirements"] = " ".join(meta["optional-dependencies"]["dev"])
    wrong = {k: (settings.get(k), v) for k, v in expected.items() if " ".join((settings.get(k) or "").split()) != v}
    assert not wrong, "settings.ini (found, expected): " + "; ".join(f"{k}: {v}" for k, v in wrong.items())


def test_the_version_is_one():
    "`qtlm.__version__` is the only place of the version; the package metadata takes it from there."
    data = project()
    assert "version" in data["project"]["dynamic"] and "version" not in data["project"]
    assert data["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "qtlm.__version__"}
    assert len(re.findall(r"^__version__ = ", (ROOT / "qtlm/__init__.py").read_text(), re.M)) == 1
    assert f"## {importlib.import_module('qtlm').__version__}" in (ROOT / "CHANGELOG.md").read_text(), "CHANGELOG.md has no section for this version"


def test_lazy_names_are_public_names_of_their_modules():
    "Each name that `qtlm` itself offers exists in the module that the table names, and is public there."
    qtlm = importlib.import_module("qtlm")
    table = getattr(qtlm, "_HOME", {})
    assert table, "qtlm/__init__.py has no table `_HOME` of names"
    for name, module in table.items():
        home = importlib.import_module(f"qtlm.{module.rpartition('.')[2]}")
        assert name in home.__all__, f"qtlm.{name}: not in the __all__ of {home.__name__}"
        assert getattr(qtlm, name) is getattr(home, name) and name in dir(qtlm)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = qtlm.no_such_name


def test_importing_the_package_does_not_import_torch():
    "`qtlm --help` must answer at once."
    code = "import sys, qtlm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, "import qtlm imports torch"


# ---- the package reads files that it does not trust ----

@each_module
def test_module_runs_nothing_that_it_reads(path):
    "No pickle, no eval, no shell, no loading with code inside (research/reliability.md, S5)."
    check(book.unsafe_calls(path.read_text()))


@pytest.mark.parametrize("folder", ["nbs", "qtlm", "tests", "docs", "benchmarks"])
def test_no_path_of_the_workplace(folder):
    "Sources name no folder of the machine on which they were written."
    workplace = re.compile("/" + r"work/(?:main|shared)|/" + r"root/|/" + "home/[a-z]")
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in (".ipynb", ".py", ".md", ".toml", ".json", ".txt", ".yaml", ".yml") and "__pycache__" not in path.parts:
            match = workplace.search(path.read_text(errors="replace"))
            assert not match, f"{path.relative_to(ROOT)} has {match[0]!r}"


# ---- the proof that each rule can fail ----

GOOD = '''
%%% title md
# Toy

> A chapter that breaks no rule.
%%% module
#| default_exp toy
%%% imports
#| export
from qtlm.loss import compute_loss
%%% heading md
## Doubling
%%% double
#| exports
def double(
    x: int,  # any integer
) -> int: # twice `x`
    "Return twice `x`."
    return x + x
%%% test-double
assert double(2) == 4
%%% next md
Next: halving, which can fail.
'''


def notebook(text=GOOD, **outputs):
    "Return a notebook from `%%%` text; `outputs` gives cells (with _ for -) their stored text."
    cells = []
    for cell in cells_tool.parse(text):
        new = {"id": cell["id"], "cell_type": "markdown" if cell["md"] else "code", "metadata": {}, "source": "\n".join(cell["lines"])}
        if not cell["md"]:
            printed = outputs.get(cell["id"].replace("-", "_"))
            new |= {"execution_count": None, "outputs": [{"output_type": "stream", "name": "stdout", "text": printed}] if printed else []}
        cells.append(new)
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def all_violations(nb):
    "Return the violations of all rules that need one notebook only."
    numbers = {"loss": (0, ""), "config": (1, ""), "toy": (2, ""), "model": (3, "")}
    return [*book.forward_imports(nb, (2, ""), numbers), *book.unplain_code(nb), *book.undocumented(nb), *book.unasserted(nb), *book.hidden(nb),
            *book.too_long(nb), *book.unclean_outputs(nb), *book.malformed(nb)]


def test_a_good_notebook_breaks_no_rule():
    "The rules accept what the style describes."
    assert all_violations(notebook(test_double="4 codes, error 0.25\n")) == []


def long_function(lines):
    "Return an exported function of so many lines, with its assertion."
    body = "\n".join("    y = 1" for _ in range(lines - 3))
    return f'#| exports\ndef long():\n    "Return 1."\n{body}\n    return y\n%%% test-long\nassert long() == 1\n'


BAD = {  # what is replaced in GOOD, by what, and what the message must say
    "forward import": ("from qtlm.loss import compute_loss", "from qtlm.model import TinyLM", "imports qtlm.model of chapter 3"),
    "own module": ("from qtlm.loss import compute_loss", "from qtlm.toy import double", "imports qtlm.toy of chapter 2"),
    "forward import in a lesson": ("assert double(2) == 4", "def f():\n    import qtlm.model\nassert double(2) == 4", "imports qtlm.model"),
    "import from the package": ("from qtlm.loss import compute_loss", "from qtlm import TinyLM", "imports TinyLM from qtlm itself"),
    "import in a subprocess": ("assert double(2) == 4", "code = 'import os; from qtlm.model import x'\nassert double(2) == 4", "imports qtlm.model"),
    "import by name": ("assert double(2) == 4", "import importlib\nm = importlib.import_module('qtlm.model')\nassert double(2) == 4", "imports qtlm.model"),
    "computed import": ("assert double(2) == 4", "import importlib\nm = importlib.import_module(str(1))\nassert double(2) == 4", "name that is computed"),
    "relative import": ("from qtlm.loss import compute_loss", "from .loss import compute_loss", "relative import"),
    "no such module": ("from qtlm.loss import compute_loss", "from qtlm.nothing import x", "no notebook exports"),
    "star import": ("import compute_loss", "import *", "star import"),
    "magic": ("assert double(2) == 4", "%timeit double(2)\nassert double(2) == 4", "not plain Python"),
    "shell": ("assert double(2) == 4", "!ls\nassert double(2) == 4", "not plain Python"),
    "patch": ("def double(", "@patch\ndef double(", "@patch hides double"),
    "monkey patch": ("#| exports\ndef", "#| exports\nint.twice = 1\ndef", "monkey patch"),
    "nbdev_export": ("assert double(2) == 4", "nbdev_export()\nassert double(2) == 4", "nbdev_export() does not belong"),
    "cell that is not run": ("%%% test-double\n", "%%% test-double\n#| eval: false\n", "directive `#| eval`"),
    "no docstring": ('    "Return twice `x`."\n', "", "double has no docstring"),
    "no comment": ("    x: int,  # any integer\n", "    x: int,\n", "parameter `x` has no comment"),
    "parameters on one line": ("    x: int,  # any integer\n", "    x: int, y: int,  # integers\n", "parameter `y` has no comment"),
    "method without docstring": ("%%% test-double\n", "class Two:\n    'Two.'\n    def get(self): return 2\n%%% test-double\nassert Two\n", "Two.get has no docstring"),
    "field without comment": ("%%% test-double\n", "class Two:\n    'Two.'\n    size: int = 2\n%%% test-double\nassert Two\n", "field `size`"),
    "constant without comment": ("def double(", "TWO = 2\ndef double(", "constant TWO has no comment"),
    "no assertion": ("assert double(2) == 4", "double(2)", "double is used by no assertion"),
    "assertion about another name": ("assert double(2) == 4", "assert compute_loss", "double is used by no assertion"),
    "empty assertion": ("assert double(2) == 4", "assert True, double(2)", "double is used by no assertion"),
    "assertion too far": ("%%% test-double\n", "".join(f"%%% more-{i} md\nMore.\n" for i in range(5)) + "%%% test-double\n", "double is used by no assertion"),
    "hidden assertion": ("%%% test-double\n", "%%% test-double\n#| hide\n", "assertion in a hidden cell"),
    "two hidden cells": ("%%% heading md", "%%% one\n#| hide\nx = 1\n%%% two\n#| hide\nx = 1\n%%% heading md", "second hidden cell"),
    "long cell": ("%%% next md", "%%% long\n" + long_function(41) + "%%% next md", "long: 41 lines; at most 40"),
    "high median": ("%%% next md", "%%% long\n" + long_function(30) + "%%% next md", "median exported cell has"),
    "run of exported cells": ("%%% test-double\n", "".join(f"%%% more-{i}\n#| exports\n_x = {i}\n" for i in range(3)) + "%%% test-double\n", "number 4 in a row"),
    "many cells": ("%%% next md", "".join(f"%%% more-{i} md\nMore.\n" for i in range(80)) + "%%% next md", "87 cells; at most 80"),
    "large": ("Next: halving", "Next: halving " * 30_000, "bytes; at most 300000"),
    "heading with prose": ("## Doubling", "## Doubling\n\nTwice.", "shares its cell with prose"),
    "hex id": ("%%% test-double", "%%% 0f3a9b1c", "says nothing"),
    "no subtitle": ("> A chapter", "A chapter", "the first cell must be prose"),
    "no module": ("#| default_exp toy", "#| export", "no `#| default_exp` cell"),
    "no last word": ("%%% next md\nNext: halving, which can fail.", "%%% next\nx = 1", "the last cell must be prose"),
    "empty cell": ("%%% heading md", "%%% nothing\n\n%%% heading md", "empty cell"),
}


@pytest.mark.parametrize("old, new, message", BAD.values(), ids=BAD)
def test_each_rule_can_fail(old, new, message):
    "One thing broken in the good notebook gives a violation that says so."
    assert GOOD.count(old) == 1
    found = all_violations(notebook(GOOD.replace(old, new)))
    assert any(message in text for text in found), found


@pytest.mark.parametrize("printed, message", [
    ("saved to /tmp/x/run", "a path of this machine"), ("/usr/lib/python3/site-packages/torch", "a path of this machine"), ("C:\\\\Users", "a path of this machine"),
    ("2024-05-01 10:33", "a time of day"), ("<object at 0x7f3a2b1c>", "a memory address"), ("120 it/s", "a speed or duration"),
])
def test_outputs_that_tell_of_the_machine_are_found(printed, message):
    "Paths, times, addresses and speeds."
    assert any(message in text for text in book.unclean_outputs(notebook(test_double=printed)))


def test_outputs_that_differ_are_found():
    "Other words, other numbers, other kinds of output; rounding is not a difference."
    stored = notebook(test_double="loss 2.50 of 256 codes\n")
    assert book.differing_outputs(stored, notebook(test_double="loss 2.503  of 256 codes\n")) == []
    for other in ("loss 2.80 of 256 codes\n", "lost 2.50 of 256 codes\n", "loss 2.50\n", None):
        assert book.differing_outputs(stored, notebook(test_double=other)), other
    assert book.differing_outputs(notebook(), notebook(test_double="new"))
    assert book.differing_outputs(notebook(test_double="nan"), notebook(test_double="1.0"))


def picture(*heights, size=(2, 1)):
    "Return a notebook with one drawn picture of bars."
    import base64
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    figure.subplots().bar(range(len(heights)), heights)
    figure.savefig(data := io.BytesIO(), format="png")
    nb = notebook()
    nb["cells"][5]["outputs"] = [{"output_type": "display_data", "metadata": {}, "data": {"image/png": base64.b64encode(data.getvalue()).decode()}}]
    return nb


def test_pictures_that_differ_are_found():
    "Another drawing, another size, a missing picture, a large one."
    assert book.differing_pictures(picture(1, 2), picture(1, 2)) == []
    assert book.differing_pictures(picture(1, 2), picture(5, 0.1))
    assert book.differing_pictures(picture(1, 2), picture(1, 2, size=(3, 1)))
    assert book.differing_pictures(picture(1, 2), notebook())
    assert book.too_long(picture(1, 2)) == []
    large = picture(1, 2)
    large["cells"][5]["outputs"][0]["data"]["image/png"] = "A" * 60_000
    assert any("picture of 45000 bytes" in text for text in book.too_long(large))


INDEX = '''
%%% title md
# Toy

> See [the model](03_model.ipynb), [its picture](images/a.png), [home](https://x.org), [below](#use), [the licence](../LICENSE).
%%% pictures
#| hide
import matplotlib
%%% sum
#| echo: true
print("```")
%%% end md
## Use
'''


def test_readme_rendering():
    "Links lead from the repository's root, hidden cells are left out, outputs are fenced, pictures become files."
    nb = notebook(INDEX, sum="```\n")
    nb["cells"][2]["outputs"] += picture(1, 2)["cells"][5]["outputs"]
    files = readme_tool.render(nb)
    assert list(files) == ["README.md", "docs/readme_sum.png"] and files["docs/readme_sum.png"].startswith(b"\x89PNG")
    assert files["README.md"].decode() == f'''# Toy

> See [the model](nbs/03_model.ipynb), [its picture](nbs/images/a.png), [home](https://x.org), [below](#use), [the licence](LICENSE).

````python
print("```")
````

````
```
````

![sum](docs/readme_sum.png)

## Use

{readme_tool.NOTE}
'''


def test_a_stale_readme_is_found(tmp_path, monkeypatch):
    "A README that is not what the index gives, and pictures that it no longer draws."
    monkeypatch.setattr(readme_tool, "ROOT", tmp_path)
    for folder in ("nbs", "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "nbs/index.ipynb").write_text(json.dumps(notebook(INDEX)))
    (tmp_path / "docs/readme_old.png").write_bytes(b"old")
    assert readme_tool.stale() == ["README.md", "docs/readme_old.png"]
    readme_tool.write()
    assert readme_tool.stale() == [] and not (tmp_path / "docs/readme_old.png").exists()
    (tmp_path / "README.md").write_text("by hand")
    assert readme_tool.stale() == ["README.md"]


@pytest.mark.parametrize("code", [
    "import pickle", "from pickle import loads", "pickle.load(f)", "torch.load(f)", "torch.load(f, weights_only=False)", "yaml.load(f)", "yaml.full_load(f)",
    "yaml.load(f, Loader=yaml.Loader)", "eval('1')", "exec(text)", "numpy.load(f, allow_pickle=True)", "archive.extractall()", "run('ls', shell=True)",
    "torch.load(f, weights_only=True, mmap=True)", "os.system('ls')",
])
def test_unsafe_calls_are_found(code):
    "Each way in which a file could run code."
    assert book.unsafe_calls(code)


def test_safe_calls_are_not_found():
    "What the package may do, `model.eval()` among it."
    code = "model.eval(); torch.load(f, weights_only=True); yaml.safe_load(f); yaml.load(f, Loader=_Loader); torch.compile(m); run(['ls'])"
    assert book.unsafe_calls(code) == []


def test_what_type_checkers_see_is_what_is_there():
    "The imports under TYPE_CHECKING in qtlm/__init__.py are those of its table of names."
    tree = ast.parse((ROOT / "qtlm/__init__.py").read_text())
    imports = {alias.asname: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level for alias in node.names}
    assert imports == importlib.import_module("qtlm")._HOME
