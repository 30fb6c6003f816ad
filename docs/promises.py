"""What is promised and which test proves it, read from the tests themselves: docstrings that quote a scenario, and one-line ones."""
import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent.parent / "tests"


class Proof(NamedTuple):
    "A test and what its docstring says."

    file: str
    test: str
    text: str


def proofs(path: Path) -> Iterator[Proof]:
    "Yield the tests of a file, in its order, that say what they prove."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and (text := ast.get_docstring(node)):
            yield Proof(path.name, node.name, text)


def subject(path: Path) -> str:
    "Return the first paragraph of a file's docstring."
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stem.removeprefix("test_")
    return " ".join(text.partition("\n\n")[0].split())


def files(pattern: str) -> list[Path]:
    "Return the test files whose names match."
    return sorted(TESTS.glob(pattern))


def scenarios(path: Path) -> Iterator[tuple[str, str, Proof]]:
    "Yield title, clauses and proof of each scenario that a file's tests quote."
    for proof in proofs(path):
        for title, clauses in re.findall(r"^Scenario: (.+)\n((?:(?!Scenario:).*\n?)*)", proof.text, re.M):
            yield title, clauses.strip(), proof


def bullets(clauses: str) -> str:
    "Return the clauses of a scenario as a list, WHEN, THEN and AND in bold."
    lines = [re.sub(r"^- ", "", line).replace("**", "") for line in clauses.splitlines() if line.strip()]
    return "\n".join("- " + re.sub(r"^(GIVEN|WHEN|THEN|AND)\b", r"**\1**", line) for line in lines)


def dropdown(title: str, body: str) -> str:
    "Return a MyST block that opens at a click."
    return f"::::{{dropdown}} {title}\n{body}\n::::\n"


def requirements() -> str:
    "Return one section a file of scenarios, each scenario with the test that proves it."
    parts = []
    for path in files("test_spec_*.py"):
        title = path.stem.removeprefix("test_spec_").replace("_", " ").replace("lora vit", "LoRA and ViT").replace("qat finetuning", "QAT and fine-tuning")
        parts.append(f"### {title[0].upper()}{title[1:]}\n")
        for name, clauses, proof in scenarios(path):
            parts.append(dropdown(name, f"{bullets(clauses)}\n\nProved by `{proof.test}` in `tests/{proof.file}`."))
    return "\n".join(parts)


def laws() -> str:
    "Return what the other tests hold, file by file."
    parts = []
    for path in files("test_[!s]*.py") + files("test_s[!p]*.py"):
        found = list(proofs(path))
        if found:
            lines = [f"`{proof.test}`\n: {' '.join(proof.text.partition(chr(10) * 2)[0].split())}\n" for proof in found]
            parts.append(dropdown(f"{path.stem.removeprefix('test_').replace('_', ' ')} ({len(found)})", "\n".join([subject(path), "", *lines])))
    return "\n".join(parts)


def counts() -> dict[str, int]:
    "Return how many scenarios, tests and test files there are."
    all_files = files("test_*.py")
    tests = sum(len(re.findall(r"^def test_", path.read_text(encoding="utf-8"), re.M)) for path in all_files)
    return {"scenarios": sum(len(list(scenarios(path))) for path in files("test_spec_*.py")), "tests": tests, "files": len(all_files)}
