"""A notebook as plain text and back, so that a chapter is edited in any editor and reviewed as text.

    python docs/cells.py dump nbs/00_loss.ipynb > loss.txt     # cells behind lines `%%% id` (code) or `%%% id md` (prose)
    python docs/cells.py load loss.txt nbs/00_loss.ipynb       # outputs of cells whose source is unchanged stay
    python docs/cells.py run nbs/00_loss.ipynb                 # export, execute, store the outputs, clean
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

RULE = re.compile(r"^%%% ([A-Za-z0-9_-]{1,64})( md)?$")
ROOT = Path(__file__).resolve().parent.parent


def dump(path: Path) -> str:
    "Return the notebook at `path` as text, one `%%%` line before each cell."
    out = []
    for cell in json.loads(path.read_text())["cells"]:
        kind = " md" if cell["cell_type"] == "markdown" else ""
        out.append(f"%%% {cell['id']}{kind}\n{''.join(cell['source'])}\n")
    return "".join(out)


def parse(text: str) -> list[dict]:
    "Split `text` at its `%%%` lines into notebook cells; ids must be unique."
    cells, seen = [], set()
    for line in text.splitlines():
        if match := RULE.match(line):
            if match[1] in seen:
                raise SystemExit(f"cell id {match[1]!r} is used twice")
            seen.add(match[1])
            cells.append({"id": match[1], "md": bool(match[2]), "lines": []})
        elif cells:
            cells[-1]["lines"].append(line)
        elif line.strip():
            raise SystemExit(f"text before the first %%% line: {line!r}")
    return cells


def load(text: str, path: Path) -> None:
    "Write the cells in `text` as the notebook `path`, keeping stored outputs of cells whose code did not change."
    old = {}
    if path.exists():
        old = {c["id"]: c for c in json.loads(path.read_text())["cells"]}
    cells = []
    for cell in parse(text):
        source = "\n".join(cell["lines"]).strip("\n").splitlines(keepends=True)
        new = {"cell_type": "markdown" if cell["md"] else "code", "id": cell["id"], "metadata": {}, "source": source}
        if not cell["md"]:
            before = old.get(cell["id"], {})
            new |= {"execution_count": None, "outputs": before.get("outputs", []) if before.get("source") == source else []}
        cells.append(new)
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    notebook = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def run(paths: list[Path]) -> int:
    "Export each notebook, execute it and store its outputs, clean it; return the first exit status that is not 0."
    # One thread: outputs are compared with the stored ones, and the thread count changes a float sum's last bits.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    for path in paths:
        test = ["nbdev-test", str(path), "--save", "--n-workers", "0", "--do-print"]
        for command in (["nbdev-export", "--path", str(path)], test, ["nbdev-clean", "--fname", str(path)]):
            if status := subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], cwd=ROOT, env=env).returncode:
                return status
    return 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["dump", path]:
            sys.stdout.write(dump(Path(path)))
        case ["load", text, path]:
            load(Path(text).read_text(), Path(path))
        case ["run", *paths] if paths:
            sys.exit(run([Path(p).resolve() for p in paths]))
        case _:
            sys.exit(__doc__)
