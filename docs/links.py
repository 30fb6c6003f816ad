"""A small Sphinx extension: names in backticks lead to their documentation, and `chapter 04b` to the chapter."""
import re

import api
import chapters
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

CHAPTER = re.compile(r"\b([Cc]hapters? )(\d\d[a-z]?)\b")


def _link_name(literal: nodes.literal, full: str) -> None:
    "Put a reference to the object `full` around a name in backticks."
    link = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=full, refexplicit=True, refwarn=True)
    literal.replace_self(link)
    link += literal


def _link_chapters(text: nodes.Text, docname: str, pages: dict[str, str]) -> None:
    "Turn each `chapter 04b` in a text into a link, where there is such a chapter and it is another one."
    new, end = [], 0
    for match in CHAPTER.finditer(text):
        if pages.get(match[2], docname) != docname:
            link = addnodes.pending_xref("", refdomain="std", reftype="doc", reftarget="/" + pages[match[2]], refexplicit=True, refwarn=True)
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
    names, pages = api.link_targets(), {chapter.number: chapter.page for chapter in chapters.chapters()}
    for literal in list(doctree.findall(nodes.literal)):
        full = names.get(re.sub(r"\((\.\.\.|…)?\)$", "", literal.astext()))
        if full and not _in_link_or_title(literal):
            _link_name(literal, full)
    for text in list(doctree.findall(nodes.Text)):
        if not isinstance(text.parent, (nodes.literal, nodes.literal_block)) and not _in_link_or_title(text):
            _link_chapters(text, app.env.docname, pages)


def setup(app: Sphinx) -> dict:
    "Called by Sphinx."
    app.connect("doctree-read", _link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
