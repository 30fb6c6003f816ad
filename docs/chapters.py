"""The notebooks as pages: nbdev's own processors honour the directives, and what those leave to Quarto is told to MyST-NB.

Nothing is executed: a page shows the outputs that the notebook stores, and the tests see to it that they are those of its code.
"""
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import api
from fastcore.nbio import nb2str, read_nb
from nbdev import processors as nbdev
from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Chapter:
    "What a notebook's name and first cells say of it."

    path: Path
    number: str  # `04b`
    module: str  # `rounding`
    title: str
    subtitle: str

    @property
    def page(self) -> str:
        "The page's name, without suffix."
        return f"book/{self.path.stem}"


def _read(path: Path) -> Chapter:
    "Read the head of one chapter."
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    title, subtitle = re.match(r"# (.+)\n\n> (.+)", cells[0]).groups()
    module = next(match[1] for cell in cells if (match := re.search(r"^#\| default_exp (\S+)", cell, re.M)))
    return Chapter(path, path.stem.partition("_")[0], module, title, subtitle)


@functools.cache
def chapters() -> tuple[Chapter, ...]:
    "Return all chapters in the order of reading."
    return tuple(_read(path) for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")))


def _document(module: str, cell) -> None:
    "Turn a `show_doc(name)` cell, which nbdev puts after each public definition, into the name's documentation."
    match = re.fullmatch(r"show_doc\((\w+)\)", cell.source) if cell.cell_type == "code" else None
    if match and (name := next((n for n in api.public_names(module) if n.name == match[1]), None)):
        cell.cell_type = "markdown"
        cell.source = f"({name.label})=\n{api.show_doc(name, whole=False, index=not name.is_home)}"
    elif match:
        cell.source = None  # defined in an exported cell, but not in __all__


def _mark(chapter: Chapter, cell) -> None:
    "Say below the title which chapter this is, and of what it is the source."
    if cell.cell_type == "markdown":
        mark = f"# {chapter.title}\n\n:::{{div}} mark\nChapter {chapter.number}, the source of `qtlm.{chapter.module}`\n:::\n"
        cell.source = re.sub(rf"\A# {re.escape(chapter.title)}\n", lambda _: mark, cell.source)


def _relink(cell) -> None:
    "Let links to the index notebook, which is the repository's README, lead to the front page."
    if cell.cell_type == "markdown":
        cell.source = cell.source.replace("](index.ipynb)", "](../index.md)")


def _tags(cell) -> None:
    "Say to MyST-NB what the directives `echo`, `output`, `include` and `code-fold` say to Quarto; mark what is exported."
    if cell.cell_type != "code":
        return
    said = {name: str(value).strip() for name, value in cell.directives_.items()}
    asked = {("echo:", "false"): "remove-input", ("output:", "false"): "remove-output", ("include:", "false"): "remove-cell", ("code-fold:", "true"): "hide-input"}
    tags = [tag for (name, value), tag in asked.items() if said.get(name) == value] + (["exported"] if "exports" in said else [])
    cell.metadata = {"tags": tags, "mystnb": {"image": {"alt": f"picture: {cell.id.removeprefix('fig-')}"}}}
    cell.source = re.sub(r"^#\s*\|.*\n?", "", cell.source, flags=re.M)


def process(chapter: Chapter) -> str:
    "Return the notebook as the site shows it, as JSON."
    nb = read_nb(chapter.path)
    document, mark = functools.partial(_document, chapter.module), functools.partial(_mark, chapter)
    steps = [nbdev.populate_language, nbdev.add_show_docs, nbdev.strip_ansi, nbdev.hide_line, nbdev.filter_stream_, nbdev.rm_header_dash, document,
             nbdev.rm_export, nbdev.hide_, nbdev.mv_exports, nbdev.strip_hidden_metadata, mark, _relink, _tags]  # fmt: skip
    NBProcessor(nb=nb, procs=steps, rm_directives="quarto").process()
    nb.metadata["language_info"] = {"name": "python", "pygments_lexer": "python"}
    return nb2str(nb)
