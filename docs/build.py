"""The documentation site: pages, notebooks and what is generated go into _proc/site, Sphinx makes _docs of them.

    python docs/build.py                    # _docs/index.html, which opens from the disk; nothing is fetched
    python docs/build.py --out DIR --work DIR
"""
import argparse
import os
import shutil
from pathlib import Path

import api
import chapters
import jinja2
import measured
import promises
from sphinx.cmd.build import main as sphinx_build

ROOT = Path(__file__).resolve().parent.parent
PAGES = Path(__file__).resolve().parent / "pages"
# The parts of the book, each from its first chapter on.
PARTS = {"00": "A model and its text", "04": "Making it small", "05b": "Training while it is small", "07a": "Runs that survive", "09b": "Using and adapting"}


def put(path: Path, text: str) -> None:
    "Write a source file, unless it is so already: Sphinx reads again only what has changed."
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def parts() -> dict[str, list[chapters.Chapter]]:
    "Return the chapters part by part."
    out = {title: [] for title in PARTS.values()}
    for chapter in chapters.chapters():
        out[next(title for first, title in reversed(PARTS.items()) if chapter.number >= first)].append(chapter)
    return out


def context(source: Path) -> dict:
    "Return what the pages may name."
    report = measured.results("demo")
    figures = source / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    rows = measured.results("inference")["8 x 256 tokens"]
    return {
        "api": api,
        "chapters": {chapter.module: chapter for chapter in chapters.chapters()},
        "measured": measured,
        "parts": parts(),
        "promises": promises,
        "report": report,
        "demo_pictures": measured.demo_pictures(report, figures),
        "accuracy_picture": measured.picture("accuracy", "Loss added by four bits against bits per weight, five libraries",
                                             lambda: measured.draw_accuracy(measured.results("accuracy")["small"]), figures),
        "speed_picture": measured.picture("speed", "Forward speed of quantized models over float32", lambda: measured.draw_speed(rows), figures),
    }  # fmt: skip


def write_sources(source: Path) -> None:
    "Write everything that Sphinx reads."
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(PAGES), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    names = context(source)
    for page in sorted(PAGES.glob("*.md")):
        put(source / page.name, environment.get_template(page.name).render(names))
    put(source / "changelog.md", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    for chapter in chapters.chapters():
        put(source / f"{chapter.page}.ipynb", chapters.process(chapter))


def build(out: Path, work: Path) -> None:
    "Build the site in `work` and put it at `out`, whole; raise `SystemExit` where Sphinx finds anything wrong."
    source, html = work / "source", work / "html"
    write_sources(source)
    # quickstart.md runs in a kernel with nobody's own settings, which does not warn that it listens on this machine only. One thread: the thread
    # count changes a float sum's last bits, and two of them wait for each other on a busy machine.
    os.environ |= {"IPYTHONDIR": str(work / "ipython"), "JUPYTER_PREFER_ENV_PATH": "1", "OMP_NUM_THREADS": "1"}
    put(work / "ipython" / "profile_default" / "ipython_kernel_config.json", '{"IPKernelApp": {"log_level": 40}}')
    options = ["-b", "html", "-W", "--keep-going", "-q", "-j", "auto", "-c", str(PAGES.parent), "-d", str(work / "doctrees")]
    if status := sphinx_build([*options, str(source), str(html)]):
        raise SystemExit(status)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(html, out, ignore=shutil.ignore_patterns(".buildinfo", "objects.inv", "_sources"))


def main() -> None:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="where the site goes")
    parser.add_argument("--work", type=Path, default=ROOT / "_proc" / "site", help="where it is built; what is unchanged there is not built again")
    args = parser.parse_args()
    build(args.out, args.work)


if __name__ == "__main__":
    main()
