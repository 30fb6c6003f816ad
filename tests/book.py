"""The house rules of the book, as functions from a notebook (a dict) to the list of what breaks them.

`tests/test_book.py` applies them to each notebook and shows that each can fail. A violation is one line: cell, what is wrong, what to do.
"""
import ast
import base64
import io
import json
import re
import statistics
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPORTS = {"export", "exports", "exporti"}
DIRECTIVES = EXPORTS | {"default_exp", "echo", "hide"}
ASSERTION_WINDOW = 5
MAX_LINES, MAX_MEDIAN, MAX_CLASS_LINES, MAX_RUN = 40, 10, 80, 3
MAX_CELLS, MAX_BYTES, MAX_PNG = 80, 300_000, 30_000
LAST = (10**6, "")  # index.ipynb stands after every chapter

_DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(\w+)\s*:?\s*(.*)$")
_IMPORT_IN_TEXT = re.compile(r"(?:^|[\n;\"'])\s*(?:from|import)\s+qtlm(?:\.(\w+))?")


# ---- reading a notebook ----

def read(path):
    "Return the notebook at `path`."
    return json.loads(Path(path).read_text(encoding="utf-8"))


def text_of(value):
    "Return notebook text, which is stored as a string or as a list of lines, as one string."
    return value if isinstance(value, str) else "".join(value)


def source(cell):
    "Return the cell's source as one string."
    return text_of(cell["source"])


def directives(cell):
    "Return the directives at the head of a code cell as `{name: rest of the line}`."
    found = {}
    if cell["cell_type"] == "code":
        for line in source(cell).splitlines():
            if match := _DIRECTIVE.match(line):
                found[match[1]] = match[2].strip()
            elif line.strip() and not line.lstrip().startswith("#"):
                break
    return found


def code_cells(nb):
    "Yield `(index, cell)` of each code cell."
    return ((i, cell) for i, cell in enumerate(nb["cells"]) if cell["cell_type"] == "code")


def is_exported(cell):
    "Tell whether nbdev writes the cell into the package."
    return bool(EXPORTS & directives(cell).keys())


def tree_of(cell):
    "Return the parsed cell, or None where it is not plain Python."
    try:
        return ast.parse(source(cell))
    except SyntaxError:
        return None


def body_of(cell):
    "Return the cell's statements; none where it does not parse."
    tree = tree_of(cell)
    return tree.body if tree else []


def is_import_cell(cell):
    "Tell whether the cell has nothing but imports (a TYPE_CHECKING block and strings count as such)."
    plain = (ast.Import, ast.ImportFrom)
    return bool(body_of(cell)) and all(
        isinstance(node, plain)
        or (isinstance(node, ast.If) and all(isinstance(inner, plain) for inner in node.body))
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in body_of(cell)
    )


def module_of(nb):
    "Return the module that the notebook exports to, or None."
    return next((args for _, cell in code_cells(nb) for name, args in directives(cell).items() if name == "default_exp"), None)


def number_of(name):
    "Return the place of a notebook file in reading order, `(number, letter)`; `index` is last."
    match = re.match(r"(\d+)([a-z]?)_", Path(name).name)
    return (int(match[1]), match[2]) if match else LAST


def chapters(folder=ROOT / "nbs"):
    "Return the notebooks' paths in reading order."
    return sorted((p for p in Path(folder).glob("*.ipynb") if p.name[0] not in "_."), key=lambda p: (number_of(p.name), p.name))


def module_numbers(folder=ROOT / "nbs"):
    "Return `{module: place in reading order}` of all notebooks."
    return {module_of(read(path)): number_of(path.name) for path in chapters(folder)}


# ---- rule 2: order, and plain Python ----

def imports_of(tree):
    "Yield `(module or '', names)` of each import of qtlm in the code: '' is the package itself."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((a.name.partition(".")[2], []) for a in node.names if a.name.split(".")[0] == "qtlm")
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "qtlm"):
            yield ("." if node.level else node.module.partition(".")[2]), [a.name for a in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if not isinstance(name, str):
                yield "?", []
            elif name.split(".")[0] == "qtlm":
                yield name.partition(".")[2], []


_GATHERED = {("native", "straight_through"), ("native", "moments")}  # C++ of later chapters, which is built into one library


def forward_imports(nb, number, numbers, allow_package=False):
    "Return the imports that break the order of reading, in exported cells and in lessons, code kept in strings included."
    found = []
    own = module_of(nb)
    for _, cell in code_cells(nb):
        tree = tree_of(cell)
        if tree is None:
            continue
        modules = list(imports_of(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                # A subprocess of a lesson may import the chapter's own module: the notebook's classes are not there.
                modules += [(m[1] or "", []) for m in _IMPORT_IN_TEXT.finditer(node.value) if m[1] != own]
        for module, names in modules:
            module = module.split(".")[0] if module != "." else module
            if module == ".":
                found.append(f"{cell['id']}: relative import; write `from qtlm.<module> import ...`")
            elif module == "?":
                found.append(f"{cell['id']}: import of a name that is computed; write it out")
            elif module == "":
                if not allow_package:
                    found.append(f"{cell['id']}: imports {', '.join(names) or 'the package'} from qtlm itself; name the chapter: `from qtlm.<module> import ...`")
            elif module not in numbers:
                found.append(f"{cell['id']}: imports qtlm.{module}, which no notebook exports")
            elif numbers[module] >= number and (own, module) not in _GATHERED:
                found.append(f"{cell['id']}: imports qtlm.{module} of chapter {numbers[module][0]}; only lower chapters may be used: move the lesson there")
    return found


def unplain_code(nb):
    "Return star imports, magics, `@patch`, assignments to foreign attributes, `nbdev_export()`, odd directives and raw cells."
    found = [f"{c['id']}: a raw cell can switch execution off; remove it" for c in nb["cells"] if c["cell_type"] == "raw"]
    for _, cell in code_cells(nb):
        where = cell["id"]
        for name in directives(cell).keys() - DIRECTIVES:
            found.append(f"{where}: directive `#| {name}` is not used in this book (known: {', '.join(sorted(DIRECTIVES))})")
        tree = tree_of(cell)
        if tree is None:
            found.append(f"{where}: not plain Python: a magic, a shell command, or a syntax error; write Python")
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
                found.append(f"{where}: star import from {node.module}; name what is used")
            for decorator in getattr(node, "decorator_list", []):
                target = decorator.func if isinstance(decorator, ast.Call) else decorator
                if isinstance(target, ast.Name) and target.id in ("patch", "patch_to", "patch_property"):
                    found.append(f"{where}: @{target.id} hides {node.name} from readers of the class; write it in the class")
            if isinstance(node, ast.Name) and node.id in ("nbdev_export", "get_ipython"):
                found.append(f"{where}: {node.id}() does not belong in a chapter; remove it")
        if is_exported(cell):
            for node in tree.body:
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                if any(isinstance(t, ast.Attribute) for t in targets):
                    found.append(f"{where}: assigns to an attribute of something else while importing (a monkey patch); don't")
    return found


# ---- rule 3: public names are documented and asserted ----

def public_definitions(nb):
    "Return `{name: (cell index, node)}` of what the notebook's exported cells add to `__all__`."
    found = {}
    for i, cell in code_cells(nb):
        if not {"export", "exports"} & directives(cell).keys():
            continue
        for node in body_of(cell):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names = [node.name]
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
            else:
                names = []
            found |= {name: (i, node) for name in names if not name.startswith("_")}
    return found


def comment_lines(text):
    "Return the numbers of the lines on which a comment stands (a directive is none), and of those that have nothing else."
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {t.start[0] for t in tokens if t.type == tokenize.COMMENT and not _DIRECTIVE.match(t.string)}
    return comments, {n for n in comments if text.splitlines()[n - 1].lstrip().startswith("#")}


def undocumented_parameters(node, comments, alone):
    "Return the parameters of a function that have no comment of their own (fastcore's docments: one parameter a line)."
    args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    args = [a for a in args if a is not None and a.arg not in ("self", "cls")]
    taken = [a.lineno for a in args] + ([node.returns.lineno] if node.returns else [])
    return [a.arg for a in args if not ((a.lineno in comments and taken.count(a.lineno) == 1) or a.lineno - 1 in alone)]


def undocumented_in(node, comments, alone, owner=""):
    "Return what is missing in one definition: docstring, comments of parameters, of fields, and the same in public methods."
    name = f"{owner}{node.name}"
    found = []
    if ast.get_docstring(node) is None and node.name != "__init__":
        found.append(f"{name} has no docstring")
    if not isinstance(node, ast.ClassDef):
        for arg in undocumented_parameters(node, comments, alone):
            found.append(f"{name}: parameter `{arg}` has no comment on a line of its own (`{arg}: type,  # meaning, unit, range`)")
        return found
    for inner in node.body:
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)) and (inner.name == "__init__" or not inner.name.startswith("_")):
            found += undocumented_in(inner, comments, alone, f"{name}.")
        elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name) and not inner.target.id.startswith("_"):
            lines = set(range(inner.lineno, inner.end_lineno + 1))
            texts = [n.value for n in ast.walk(inner.value or inner) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            described = isinstance(inner.value, ast.Call) and any(len(text.split()) > 2 for text in texts)  # Field(description="...") or a helper
            if not (lines & comments or inner.lineno - 1 in alone or described or inner.target.id == "model_config"):
                found.append(f"{name}: field `{inner.target.id}` has no comment and no description")
    return found


def is_overload(node):
    "Tell whether a method is a setter or an overload: it is documented where the name is first defined."
    return any("overload" in ast.dump(d) or "setter" in ast.dump(d) for d in getattr(node, "decorator_list", []))


def inherited_methods(nb, node):
    "Return the methods that bases of the class, defined in the same notebook, document already: `help` shows an override those."
    bases = {getattr(base, "id", "") for base in node.bases}
    found = set()
    for name, (_, base) in public_definitions(nb).items():
        if name in bases and isinstance(base, ast.ClassDef):
            found |= {inner.name for inner in base.body if isinstance(inner, ast.FunctionDef) and inner.name != "__init__"}
    return found


def undocumented(nb):
    "Return the public names without docstring, comment, or a comment for each parameter or field."
    found = []
    for name, (i, node) in public_definitions(nb).items():
        cell = nb["cells"][i]
        comments, alone = comment_lines(source(cell))
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            if not (comments & set(range(node.lineno, node.end_lineno + 1)) or node.lineno - 1 in alone):
                found.append(f"{cell['id']}: constant {name} has no comment; say why it is what it is, or start its name with _")
            continue
        if isinstance(node, ast.ClassDef):
            inherited = inherited_methods(nb, node)
            node.body = [inner for inner in node.body if not is_overload(inner) and getattr(inner, "name", "") not in inherited]
        found += [f"{cell['id']}: {text}" for text in undocumented_in(node, comments, alone)]
    return found


def assertions_in(tree):
    "Return the nodes that assert something: `assert` of what is not constant, `pytest.raises`, `test_*(...)`, `assert_*(...)`."
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant):
            found.append(node)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("raises", "warns") or name.startswith(("test_", "assert_")):
                found.append(node)
    return found


def names_in(tree):
    "Return the names and attributes that the code reads."
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}


def unasserted(nb):
    "Return the public names that no assertion on the page uses within five cells of their definition."
    found = []
    for name, (i, _) in public_definitions(nb).items():
        for cell in nb["cells"][i + 1:i + 1 + ASSERTION_WINDOW]:
            tree = tree_of(cell) if cell["cell_type"] == "code" else None
            if tree and not is_exported(cell) and "hide" not in directives(cell) and assertions_in(tree) and name in names_in(tree):
                break
        else:
            found.append(f"{nb['cells'][i]['id']}: {name} is used by no assertion in the {ASSERTION_WINDOW} cells after it; assert a law there, or make it private")
    return found


# ---- rule 4: nothing is hidden ----

def hidden(nb):
    "Return hidden cells that assert, and hidden cells beyond the first."
    cells = [cell for _, cell in code_cells(nb) if "hide" in directives(cell)]
    found = [f"{c['id']}: an assertion in a hidden cell teaches nobody; show it" for c in cells if tree_of(c) and assertions_in(tree_of(c))]
    return found + [f"{c['id']}: a second hidden cell; one a notebook is the limit" for c in cells[1:]]


# ---- rule 5: sizes ----

def code_lines(cell):
    "Return how many lines of the cell are neither blank nor a directive."
    return sum(bool(line.strip()) and not _DIRECTIVE.match(line) for line in source(cell).splitlines())


def is_declaration(cell):
    "Tell whether the cell is nothing but classes that only declare fields."
    classes = body_of(cell)
    inside = [n for c in classes if isinstance(c, ast.ClassDef) for n in c.body]
    declares = all(isinstance(n, (ast.AnnAssign, ast.Assign)) or (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)) for n in inside)
    return bool(classes) and all(isinstance(c, ast.ClassDef) for c in classes) and declares


def too_long(nb):
    "Return exported cells that are too long, runs of them, a median that is too high, and a notebook that is too large."
    found, big, lengths, run = [], [], [], 0
    for cell in nb["cells"]:
        if cell["cell_type"] == "code" and is_exported(cell):
            if is_import_cell(cell):
                continue
            lines = code_lines(cell)
            lengths.append(lines)
            if lines > MAX_LINES and not (is_declaration(cell) and lines <= MAX_CLASS_LINES):
                one_class = [type(n) for n in body_of(cell)] == [ast.ClassDef]
                big.append((cell["id"], lines, one_class and lines <= MAX_CLASS_LINES))
            run += 1
            if run == MAX_RUN + 1:
                found.append(f"{cell['id']}: exported cell number {run} in a row; put prose or a lesson between")
        else:
            run = 0
    if len(big) == 1 and big[0][2]:
        big = []  # the one class that the chapter is about
    found += [f"{name}: {lines} lines; at most {MAX_LINES} (one class a chapter: {MAX_CLASS_LINES}); split it" for name, lines, _ in big]
    if lengths and (median := statistics.median(lengths)) > MAX_MEDIAN:
        found.append(f"median exported cell has {median:g} lines; at most {MAX_MEDIAN}; split the longest: {sorted(lengths)[-5:]}")
    if len(nb["cells"]) > MAX_CELLS:
        found.append(f"{len(nb['cells'])} cells; at most {MAX_CELLS}")
    size = len(json.dumps(nb, indent=1, ensure_ascii=False).encode())
    if size > MAX_BYTES:
        found.append(f"{size} bytes; at most {MAX_BYTES}")
    for where, image in images_of(nb):
        if len(image) > MAX_PNG:
            found.append(f"{where}: picture of {len(image)} bytes; at most {MAX_PNG}: fewer points, smaller figure")
    return found


def images_of(nb):
    "Return `(cell id, PNG bytes)` of each stored picture."
    found = []
    for _, cell in code_cells(nb):
        for output in cell.get("outputs", []):
            if png := output.get("data", {}).get("image/png"):
                found.append((cell["id"], base64.b64decode(text_of(png))))
    return found


# ---- rule 6: outputs ----

_FORBIDDEN_OUTPUT = {
    "a path of this machine": re.compile(r"/(?:home|root|work|tmp|Users|var/folders)/|site-packages|\b[A-Z]:\\\\?\w"),
    "a time of day": re.compile(r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d|\b\d\d:\d\d:\d\d\b"),
    "a memory address": re.compile(r"0x[0-9a-fA-F]{6,}"),
    "a speed or duration": re.compile(r"\d\s?(?:it/s|s/it|tok(?:ens)?/s|ms\b|µs\b)"),
}


def texts_of(cell):
    "Return the cell's stored text outputs as `{kind: text}`; the pieces of one stream are joined."
    found = {}
    for output in cell.get("outputs", []):
        if output["output_type"] == "stream":
            found[output["name"]] = found.get(output["name"], "") + text_of(output["text"])
        elif output["output_type"] == "error":
            found["error"] = "\n".join(output.get("traceback", []))
        else:
            for mime, data in output.get("data", {}).items():
                if mime.startswith("text/"):
                    found[mime] = found.get(mime, "") + text_of(data)
    return found


def unclean_outputs(nb):
    "Return stored outputs that tell about the machine or the moment, errors, and what went to stderr."
    found = []
    for _, cell in code_cells(nb):
        for kind, text in texts_of(cell).items():
            if kind in ("error", "stderr"):
                found.append(f"{cell['id']}: stored {kind} output ({text.strip()[:80]!r}); assert it, or silence its cause")
            for what, pattern in _FORBIDDEN_OUTPUT.items():
                if match := pattern.search(text):
                    found.append(f"{cell['id']}: output has {what} ({match[0]!r}); print what does not change from run to run")
    return found


# ---- the form of a chapter ----

def malformed(nb, is_chapter=True):
    "Return what breaks the common form: title cell, headings alone, human ids, a closing paragraph."
    cells = nb["cells"]
    found = []
    first = source(cells[0]).splitlines() if cells else []
    if not (cells and cells[0]["cell_type"] == "markdown" and first[:1] and first[0].startswith("# ") and any(x.startswith("> ") for x in first)):
        found.append("the first cell must be prose: `# Title`, then a line `> what the chapter tells` (it becomes the module's docstring)")
    ids = [cell.get("id", "") for cell in cells]
    found += [f"{i}: this cell id is used twice" for i in sorted({i for i in ids if ids.count(i) > 1})]
    for cell in cells:
        name = cell.get("id", "")
        if not re.search("[a-z]", name) or re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){0,3}(-[0-9a-f]{12})?", name):
            found.append(f"cell id {name!r} says nothing; name the cell (`pack-int4`, `test-pack-int4`, `fig-pack-int4`)")
        lines = source(cell).strip().splitlines()
        if cell["cell_type"] == "markdown" and cell is not cells[0]:
            fenced = re.sub(r"```.*?```", "", source(cell), flags=re.S)
            headings = [x for x in fenced.splitlines() if re.match(r"#{1,6} ", x)]
            if headings and len(lines) > 1:
                found.append(f"{name}: heading {headings[0]!r} shares its cell with prose; give it a cell of its own")
        if not lines:
            found.append(f"{name}: empty cell; remove it")
    if is_chapter:
        if module_of(nb) is None:
            found.append("no `#| default_exp` cell")
        if not cells or cells[-1]["cell_type"] != "markdown" or source(cells[-1]).startswith("#"):
            found.append("the last cell must be prose: what the next chapter needs, and why")
    return found


# ---- comparing two runs ----

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?")


def split_numbers(text):
    "Return the text with numbers masked and whitespace squeezed, and the numbers."
    numbers = [float(m[0].replace(",", "")) for m in _NUMBER.finditer(text)]
    return re.sub(r"[-\s]+", " ", _NUMBER.sub("#", text)).strip(), numbers


def differing_outputs(stored, fresh, relative=0.05, absolute=1e-2):
    "Return the cells whose stored text is not what a new run printed, up to rounding on another processor."
    found = []
    fresh_cells = {cell["id"]: cell for cell in fresh["cells"]}
    for _, cell in code_cells(stored):
        old, new = texts_of(cell), texts_of(fresh_cells[cell["id"]])
        advice = f"`python docs/cells.py run nbs/...` stores the outputs of cell {cell['id']} anew"
        if old.keys() != new.keys():
            found.append(f"{cell['id']}: stored {sorted(old)}, a new run gave {sorted(new)}; {advice}")
            continue
        # What a trained model writes may take another turn on another processor: ids `sample-*` compare the kind of output only, and the size of pictures.
        for kind in () if cell["id"].startswith("sample-") else old:
            (old_text, old_numbers), (new_text, new_numbers) = split_numbers(old[kind]), split_numbers(new[kind])
            if old_text != new_text:
                found.append(f"{cell['id']}: stored {old_text[:100]!r}, a new run gave {new_text[:100]!r}; {advice}")
            bad = [(a, b) for a, b in zip(old_numbers, new_numbers) if not abs(a - b) <= max(absolute, relative * abs(a))]
            if bad:
                found.append(f"{cell['id']}: stored {bad[0][0]:g}, a new run gave {bad[0][1]:g} ({len(bad)} such); {advice}")
    return found


def differing_pictures(stored, fresh, bound=0.06):
    "Return the cells whose stored picture is not what a new run drew: another count, size, or mean pixel."
    import numpy as np
    from matplotlib.image import imread

    found = []
    old, new = images_of(stored), images_of(fresh)
    if [name for name, _ in old] != [name for name, _ in new]:
        return [f"stored pictures in {[n for n, _ in old]}, a new run drew {[n for n, _ in new]}; run the notebook again"]
    for (name, before), (_, after) in zip(old, new):
        a, b = (imread(io.BytesIO(png))[..., :3] for png in (before, after))
        if any(abs(x - y) > 0.03 * x + 2 for x, y in zip(a.shape, b.shape)):
            found.append(f"{name}: stored picture is {a.shape[1]}x{a.shape[0]}, a new run drew {b.shape[1]}x{b.shape[0]}; run the notebook again")
            continue
        height, width = min(a.shape[0], b.shape[0]), min(a.shape[1], b.shape[1])
        if not name.startswith("sample-") and (difference := float(np.abs(a[:height, :width] - b[:height, :width]).mean())) > bound:
            found.append(f"{name}: stored picture differs from the new one by {difference:.3f} of full scale; run the notebook again")
    return found


# ---- the package: nothing that runs what it reads ----

def unsafe_calls(text):
    "Return the calls in a module's source by which data could run code or overrun memory (`torch.load` must say `weights_only=True`)."
    found = []
    tree = ast.parse(text)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"line {line}: imports {n}" for n in names if n.split(".")[0] in ("pickle", "dill", "cloudpickle", "shelve", "marshal")]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            found.append(f"line {line}: {called}(...)")
        if called in ("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all"):
            if not re.fullmatch(r"_\w*", keywords.get("Loader", ast.unparse(node.args[1]) if len(node.args) > 1 else "")):
                found.append(f"line {line}: {called}; only the chapter's own restricted loader (a private class)")
        if called.endswith(("pickle.load", "pickle.loads", ".extractall", ".unpack_archive")):
            found.append(f"line {line}: {called}(...)")
        if called == "torch.load" and keywords.get("weights_only") != "True":
            found.append(f"line {line}: torch.load without weights_only=True")
        for key, value in (("weights_only", "False"), ("allow_pickle", "True"), ("shell", "True"), ("mmap", "True")):
            if keywords.get(key) == value:
                found.append(f"line {line}: {called}({key}={value})")
    return found
