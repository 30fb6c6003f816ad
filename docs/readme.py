"""README.md from nbs/index.ipynb, so that the first page is a notebook that was run.

    python docs/readme.py            # write README.md and its pictures, docs/readme_<cell id>.png
    python docs/readme.py --check    # exit with 1 and name the files that are not what the notebook gives
"""
import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made from nbs/index.ipynb by docs/readme.py: edit the notebook. -->"


def fence(text: str, language: str = "") -> str:
    "Return `text` as a code block whose fence is longer than any inside."
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.strip(chr(10))}\n{ticks}"


def relink(text: str) -> str:
    "Return prose whose relative links to notebooks and their pictures work from the repository's root."
    text = re.sub(r"(\]\()(?!https?:|/|#|\.\./)([^)\s]+)(\))", r"\1nbs/\2\3", text)
    return re.sub(r"(\]\()\.\./", r"\1", text)


def output_text(output: dict, name: str, pictures: dict[str, bytes]) -> str:
    "Return one output as markdown; a picture goes into `pictures` under its file name and is linked."
    join = lambda value: value if isinstance(value, str) else "".join(value)
    if output["output_type"] == "stream":
        return fence(join(output["text"]))
    data = output.get("data", {})
    if "image/png" in data:
        file = f"docs/readme_{name}.png" if f"docs/readme_{name}.png" not in pictures else f"docs/readme_{name}_{len(pictures)}.png"
        pictures[file] = base64.b64decode(join(data["image/png"]))
        return f"![{name}]({file})"
    if "text/markdown" in data:
        return join(data["text/markdown"]).strip()
    return fence(join(data["text/plain"])) if "text/plain" in data else ""


def render(nb: dict) -> dict[str, bytes]:
    "Return `{path: content}` of the README that notebook `nb` gives, and of its pictures."
    parts, pictures = [], {}
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        lines = source.splitlines()
        if cell["cell_type"] == "markdown":
            parts.append(relink(source))
        elif cell["cell_type"] == "code" and not any(re.match(r"#\s*\|\s*(hide|default_exp|export)", line) for line in lines):
            code = "\n".join(line for line in lines if not re.match(r"#\s*\|", line))
            if not any(re.match(r"#\s*\|\s*echo:\s*false", line) for line in lines):
                parts.append(fence(code, "python"))
            parts += [output_text(output, cell["id"], pictures) for output in cell["outputs"]]
    title, *rest = [part.strip() for part in parts if part.strip()]
    text = "\n\n".join([title, *rest, NOTE]) + "\n"
    return {"README.md": text.encode()} | pictures


def built() -> dict[str, bytes]:
    "Return what the committed index notebook gives."
    return render(json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8")))


def stale() -> list[str]:
    "Return the paths that differ from what the notebook gives; pictures that it no longer draws are among them."
    files = built()
    old = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("readme_*.png")} - files.keys()
    return sorted(old | {path for path, data in files.items() if not (ROOT / path).exists() or (ROOT / path).read_bytes() != data})


def write() -> None:
    "Write README.md and its pictures, and remove pictures that it no longer has."
    files = built()
    for path in stale():
        if path in files:
            (ROOT / path).write_bytes(files[path])
        else:
            (ROOT / path).unlink()


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            write()
        case ["--check"]:
            if wrong := stale():
                sys.exit(f"not what nbs/index.ipynb gives: {', '.join(wrong)}; run python docs/readme.py")
        case _:
            sys.exit(__doc__)
