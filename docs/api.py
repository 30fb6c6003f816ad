"""Public names as Sphinx' Python domain takes them: signatures as the source has them, docments as parameters.

A name has one page where links to it lead. For the names of `qtlm` itself that is the API page; for the others it is their chapter.
"""
import ast
import dataclasses
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from fastcore.docments import docments

import qtlm


@dataclass(frozen=True)
class Name:
    "A public function or class of a chapter's module."

    module: str  # without the package: `quantization`
    name: str
    object: Any

    @property
    def is_home(self) -> bool:
        "Whether `qtlm` itself offers it."
        return self.name in qtlm._HOME and getattr(qtlm, self.name) is self.object

    @property
    def target(self) -> str:
        "The dotted name that links lead to."
        return f"qtlm.{self.name}" if self.is_home else f"qtlm.{self.module}.{self.name}"

    @property
    def label(self) -> str:
        "The anchor of the name in its chapter."
        # Anchors know neither capitals nor underscores: there is a Sensitivity and a sensitivity, and `f_` is `f` in place.
        kind = "class" if inspect.isclass(self.object) else "in-place" if self.name.endswith("_") else "function"
        return f"{kind}-{self.module}-{self.name.strip('_')}".replace("_", "-").lower()

    @property
    def summary(self) -> str:
        "The first line of the docstring."
        return docstring(self.object).partition("\n")[0]


@cache
def public_names(module: str) -> tuple[Name, ...]:
    "Return the functions and classes in a module's `__all__` that are its own, as they stand there."
    home = importlib.import_module(f"qtlm.{module}")
    found = [Name(module, name, getattr(home, name)) for name in home.__all__]
    return tuple(n for n in found if (inspect.isclass(n.object) or inspect.isfunction(n.object)) and n.object.__module__ == home.__name__)


def docstring(thing: Any) -> str:
    "Return a thing's own docstring, without indentation; not one that it inherits."
    return inspect.cleandoc(vars(thing).get("__doc__") or "" if inspect.isclass(thing) else thing.__doc__ or "")


def _tree(thing: Any) -> ast.AST:
    "Return the definition of a class or function, parsed."
    return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]


def _own(cls: type) -> list[type]:
    "Return the class and its bases, as far as they are ours."
    return [base for base in cls.__mro__ if base.__module__.startswith("qtlm.")]


def _function_signature(function: Any, bound: bool) -> str:
    "Return `(parameters) -> type` of a function; of a method without its first parameter."
    node = _tree(inspect.unwrap(function))
    arguments = node.args
    if bound:
        (arguments.posonlyargs or arguments.args).pop(0)
    return f"({ast.unparse(arguments)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def _dataclass_signature(cls: type) -> str:
    "Return `(field: type = default, ...)` of a dataclass."
    lines = {n.target.id: n for base in reversed(_own(cls)) for n in _tree(base).body if isinstance(n, ast.AnnAssign)}
    nodes = [lines[field.name] for field in dataclasses.fields(cls) if field.init]
    plain = [f"{ast.unparse(n.target)}: {ast.unparse(n.annotation)}" for n in nodes]
    defaults = [f" = {ast.unparse(n.value) if isinstance(n.value, ast.Constant) else '...'}" if n.value else "" for n in nodes]
    return f"({', '.join(map(''.join, zip(plain, defaults)))})"


def signature(thing: Any) -> str:
    "Return what stands behind the name of a function or class; nothing where a class takes what its foreign base takes."
    if not inspect.isclass(thing):
        return _function_signature(thing, bound=False)
    if hasattr(thing, "model_fields"):
        return "(**fields)"
    if dataclasses.is_dataclass(thing):
        return _dataclass_signature(thing)
    makers = [vars(base)["__init__"] for base in _own(thing) if "__init__" in vars(base)]
    return _function_signature(makers[0], bound=True) if makers else ""


def _config_fields(cls: type) -> Iterator[str]:
    "Yield one line a field of a configuration: its meaning, unit, range and default."
    for name, field in cls.model_fields.items():
        extra = field.json_schema_extra or {}
        more = [str(extra[key]) for key in ("unit", "range") if extra.get(key)]
        yield f":param {name}: {field.description} ({'; '.join(more)}). Default `{field.default!r}`"


def _parameters(thing: Any) -> Iterator[str]:
    "Yield the field list of a function's or class's docments."
    if inspect.isclass(thing) and hasattr(thing, "model_fields"):
        yield from _config_fields(thing)
        return
    comments = {name: " ".join(text.split()) for name, text in docments(thing).items() if text}
    # Where `def f(self):  # what comes back` has no type to return, fastcore takes the comment for that of `self`.
    returned = comments.pop("return", None) or comments.pop("self", None)
    yield from (f":param {name}: {text}" for name, text in comments.items())
    if returned:
        yield f":returns: {returned}"


def _methods(cls: type) -> Iterator[tuple[str, str, Any]]:
    "Yield directive, name and function of each public, documented method and property that the class itself defines."
    kinds = {classmethod: "py:classmethod", staticmethod: "py:staticmethod", property: "py:property"}
    for name, member in vars(cls).items():
        function = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            yield kinds.get(type(member), "py:method"), name, member


def _directive(kind: str, head: str, options: list[str], body: list[str], fence: str) -> str:
    "Return a MyST directive; its options and its body are lines."
    return "\n".join([f"{fence}{{{kind}}} {head}", *options, "", *body, fence])


def _method(kind: str, name: str, member: Any, options: list[str]) -> str:
    "Return one method of a class as a directive."
    function = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
    head = name if kind == "py:property" else name + _function_signature(function, bound=kind != "py:staticmethod")
    options = options + ([":classmethod:"] if kind == "py:classmethod" else [":staticmethod:"] if kind == "py:staticmethod" else [])
    kind = "py:property" if kind == "py:property" else "py:method"
    return _directive(kind, head, options, [docstring(function), "", *_parameters(function)], "`" * 6)


def show_doc(name: Name, *, whole: bool, index: bool) -> str:
    "Return a name's documentation in MyST: signature, docstring, parameters, and (`whole`) the methods; `index`: links lead here."
    thing, options = name.object, [] if index else [":no-index:"]
    kind = "py:function" if not inspect.isclass(thing) else "py:exception" if issubclass(thing, Exception) else "py:class"
    body = [docstring(thing), "", *_parameters(thing)]
    if whole and inspect.isclass(thing):
        body += ["", *(text + "\n" for text in (_method(*found, options) for found in _methods(thing)))]
    more = [f":canonical: qtlm.{name.module}.{name.name}"] if index and name.is_home else []
    return _directive(kind, f"{name.target}{signature(thing)}", options + more, body, "`" * 8)


@cache
def link_targets() -> dict[str, str]:
    "Return `{as prose writes it: dotted name}` of all public names and methods; what two modules call alike counts only with its module."
    targets, twice = {}, set()
    for module in qtlm._MODULES:
        for name in public_names(module):
            methods = [f".{method}" for _, method, _ in _methods(name.object)] if inspect.isclass(name.object) and name.is_home else []
            for tail in ("", *methods):
                short, full = f"{name.name}{tail}", f"{name.target}{tail}"
                if short in targets and not name.is_home:
                    twice.add(short)
                targets |= {short: full, f"{module}.{short}": full, f"qtlm.{module}.{short}": full, full: full}
    return {text: full for text, full in targets.items() if text not in twice or full == f"qtlm.{text}"}
