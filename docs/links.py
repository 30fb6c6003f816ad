"""A small Sphinx extension: names in backticks lead to their documentation, and `chapter 04b` to the chapter."""
import re

import api
import chapters
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

CHAPTER = re.compile(r"\b([Cc]hapters? )(\d\d[a-z]?)\b")


def _reference(full: str) -> addnodes.pending_xref:
    "Return a reference to a public name by its dotted name, or to a page by its path from the root."
    kind = {"refdomain": "std", "reftype": "doc"} if full.startswith("/") else {"refdomain": "py", "reftype": "obj"}
    return addnodes.pending_xref("", reftarget=full, refexplicit=True, refwarn=True, **kind)


def _link_name(literal: nodes.literal, full: str) -> None:
    "Put a reference around a name in backticks."
    link = _reference(full)
    literal.replace_self(link)
    link += literal


def _link_chapters(text: nodes.Text, pages: dict[str, str]) -> None:
    "Turn each `chapter 04b` in a text into a link, where there is such a chapter."
    new, end = [], 0
    for match in CHAPTER.finditer(text):
        if match[2] in pages:
            link = _reference(pages[match[2]])
            link += nodes.inline("", match[0])
            new += [nodes.Text(text[end : match.start()]), link]
            end = match.end()
    if new:
        text.parent.replace(text, [*new, nodes.Text(text[end:])])


def _in_link_or_title(node: nodes.Node) -> bool:
    "Whether a node is part of a link, a heading or a signature."
    while node := node.parent:
        if isinstance(node, (nodes.reference, nodes.title, addnodes.pending_xref, addnodes.desc_signature)):
            return True
    return False


def _link(app: Sphinx, doctree: nodes.document) -> None:
    "Link the names and chapters that a page mentions."
    found = [chapter for chapter in chapters.chapters() if chapter.page != app.env.docname]
    names = api.link_targets() | {f"qtlm.{chapter.module}": f"/{chapter.page}" for chapter in found}
    pages = {chapter.number: f"/{chapter.page}" for chapter in found}
    for literal in list(doctree.findall(nodes.literal)):
        full = names.get(re.sub(r"\((\.\.\.|…)?\)$", "", literal.astext()))
        if full and not _in_link_or_title(literal):
            _link_name(literal, full)
    for text in list(doctree.findall(nodes.Text)):
        if not isinstance(text.parent, (nodes.literal, nodes.literal_block)) and not _in_link_or_title(text):
            _link_chapters(text, pages)


def setup(app: Sphinx) -> dict:
    "Called by Sphinx."
    app.connect("doctree-read", _link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
