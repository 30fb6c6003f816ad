# python -m pytest tests/test_site.py
"""The documentation site as a reader meets it: built once, opened from the disk in a real browser, every page of it.

Needs the extra `[docs]` and a Chromium on the PATH, which `make test` installs where it may; skips, with the reason, where one is missing.
"""
import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from urllib.parse import unquote, urldefrag

import pytest
from book import ROOT

import qtlm

for module in ("myst_nb", "furo", "sphinx_design", "sphinx_copybutton"):
    pytest.importorskip(module, reason=f"the site is not built: {module} is missing, pip install -e '.[docs]'")
sys.path.insert(0, str(ROOT / "docs"))
import chapters as site_chapters  # noqa: E402
import promises as site_promises  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PHONE, DESKTOP = 390, 1280
# Run as root, in a container, on a machine without network: none of the browser's own errands.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]

# What a page tells of itself, in one question.
LOOK = """() => ({
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
    ids: [...document.querySelectorAll('[id]')].map(e => e.id),
    broken: [...document.images].filter(i => i.complete && !i.naturalWidth && i.offsetParent).map(i => i.src),
    unnamed: [...document.images].filter(i => !i.alt).map(i => i.src),
    width: document.documentElement.scrollWidth,
})"""


@dataclass
class Visit:
    "What was seen of a page."

    links: list = field(default_factory=list)
    ids: set = field(default_factory=set)
    images: list = field(default_factory=list)  # those that do not show, or have no alt text
    widths: dict = field(default_factory=dict)  # of the screen, to that of the page
    troubles: list = field(default_factory=list)  # on the console, exceptions, failed requests
    requests: set = field(default_factory=set)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder of the site, built by the command that `make docs` gives."
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, str(ROOT / "docs" / "build.py"), "--out", str(folder / "out"), "--work", str(folder / "work")]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "out"


@pytest.fixture(scope="module")
def pages(site):
    "All pages, as paths relative to the site."
    found = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    assert {"index.html", "quickstart.html", "methods.html", "chapters.html", "api.html", "benchmarks.html", "promises.html", "search.html"} <= set(found)
    return found


@pytest.fixture(scope="module")
def browser():
    "A headless Chromium."
    api = pytest.importorskip("playwright.sync_api", reason="no browser test: playwright is missing, pip install -e '.[dev]'")
    if CHROMIUM is None:
        pytest.skip("no browser test: there is no Chromium on the PATH; on Debian, apt-get install chromium")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def watch(page, visit):
    "Note in `visit` what goes wrong on a page, and what it asks for."
    page.on("console", lambda message: visit().troubles.append(f"console: {message.text}") if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: visit().troubles.append(f"exception: {error}"))
    page.on("requestfailed", lambda request: visit().troubles.append(f"failed: {request.url}"))
    page.on("request", lambda request: visit().requests.add(request.url))


@pytest.fixture(scope="module")
def visits(site, pages, browser):
    "Every page, opened from the disk on a wide screen and then narrowed to a phone's."
    seen, page = {}, browser.new_page(viewport={"width": DESKTOP, "height": 900})
    watch(page, lambda: seen[name])
    for name in pages:
        seen[name] = visit = Visit()
        page.set_viewport_size({"width": DESKTOP, "height": 900})
        page.goto((site / name).as_uri(), wait_until="load")
        wide = page.evaluate(LOOK)
        page.set_viewport_size({"width": PHONE, "height": 844})
        narrow = page.evaluate(LOOK)
        visit.links, visit.ids = wide["links"], set(wide["ids"])
        visit.images = [f"does not show: {src}" for src in wide["broken"] + narrow["broken"]] + [f"has no alt text: {src}" for src in wide["unnamed"]]
        visit.widths = {DESKTOP: wide["width"], PHONE: narrow["width"]}
    page.close()
    return seen


def text_of(site, name):
    "Return the words of a page, without markup."
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", (site / name).read_text(encoding="utf-8"))))


# ---- every page ----

def test_every_page_loads_without_an_error(visits):
    "Nothing on the console, no exception, no request that fails."
    wrong = {name: visit.troubles for name, visit in visits.items() if visit.troubles}
    assert not wrong and len(visits) >= len(site_chapters.chapters()) + 8


def test_no_request_leaves_the_machine(visits, site):
    "Every file that a page asks for is one of the site."
    inside = (site.as_uri() + "/", "data:")
    outside = {name: sorted(url for url in visit.requests if not url.startswith(inside)) for name, visit in visits.items()}
    assert not any(outside.values()), {name: urls for name, urls in outside.items() if urls}
    assert all(visit.requests for visit in visits.values())


def dead_links(root, links, ids):
    "Return the links inside `root` that lead to no page or no anchor; `links` and `ids` of each page by its name."
    dead = []
    for name, found in links.items():
        for link in found:
            address, anchor = urldefrag(link)
            if not address.startswith(root):
                continue
            target = unquote(address.removeprefix(root).partition("?")[0])
            if target.endswith(".html") and (target not in ids or (anchor and unquote(anchor) not in ids[target])):
                dead.append(f"{name}: {target}#{anchor}")
    return dead


def test_every_internal_link_leads_somewhere(visits, site):
    "To a page that exists, and to an anchor that is on it."
    links, ids = ({name: getattr(visit, what) for name, visit in visits.items()} for what in ("links", "ids"))
    assert dead_links(site.as_uri() + "/", links, ids) == []
    inside = [link for found in links.values() for link in found if link.startswith(site.as_uri()) and "#" in link]
    assert len(inside) > 1000
    files = {urldefrag(link)[0].partition("?")[0] for found in links.values() for link in found if link.startswith("file:")}
    assert not [link for link in files if not (site / unquote(link.removeprefix(site.as_uri() + "/"))).is_file()]


def test_a_dead_link_is_seen():
    "The proof that the test before can fail."
    ids = {"a.html": {"here"}, "b.html": set()}
    links = {"a.html": ["file:///s/b.html", "file:///s/b.html#gone", "file:///s/c.html", "https://example.org/x.html#y", "file:///s/a.html#here"]}
    assert dead_links("file:///s/", links, ids) == ["a.html: b.html#gone", "a.html: c.html#"]


def test_no_page_is_wider_than_the_screen(visits):
    "Wide code, tables and formulas scroll in themselves, on a phone too."
    assert [(name, visit.widths) for name, visit in visits.items() if any(page > screen for screen, page in visit.widths.items())] == []


def test_pictures_show_and_have_words_for_them(visits):
    "Each image is loaded, and has an alternative text."
    assert not (wrong := {name: visit.images for name, visit in visits.items() if visit.images}), wrong


# ---- search, themes, formulas ----

@pytest.fixture(params=["file", "server"])
def base(request, site):
    "The address of the site: on the disk, and served on this machine."
    if request.param == "file":
        yield site.as_uri() + "/"
        return
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_search_finds_a_name_and_leads_to_it(browser, base):
    "As typed into the box of the front page, without a server too."
    page, visit = browser.new_page(viewport={"width": DESKTOP, "height": 900}), Visit()
    watch(page, lambda: visit)
    page.goto(base + "index.html")
    page.fill("input[name=q]", "quantize_model_ptq")
    page.press("input[name=q]", "Enter")
    page.wait_for_selector("#search-results ul.search li a")
    results = page.locator("#search-results ul.search li a")
    page.wait_for_function("document.querySelector('.search-summary')?.textContent.match(/\\d+/)")
    first = results.first
    assert "quantize_model_ptq" in first.inner_text() and results.count() >= 3
    first.click()
    page.wait_for_load_state("load")
    assert re.search(r"/api\.html(\?.*)?#qtlm\.quantize_model_ptq$", page.url)
    assert page.locator("[id='qtlm.quantize_model_ptq']").is_visible()
    assert not visit.troubles and all(url.startswith((base, "data:")) for url in visit.requests)
    page.close()


def contrast(one, other):
    "Return the contrast of two CSS colours, as WCAG counts it."
    def luminance(color):
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index.html", "book/00_loss.html", "api.html"])
def test_text_is_readable_in_light_and_dark(browser, site, scheme, name):
    "The page follows the reader's setting; prose, links, code and comments in code stand out from what is behind them."
    page = browser.new_page(color_scheme=scheme)
    page.goto((site / name).as_uri())
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (contrast(background, "rgb(0, 0, 0)") < 2) == (scheme == "dark")
    for selector in ("article p", "article p a.reference:not(.sd-btn, .sd-stretched-link)", "article code, article .sig-name", "article h1"):
        colors = page.evaluate("selector => [...document.querySelectorAll(selector)].slice(0, 5).map(e => getComputedStyle(e).color)", selector)
        assert all(contrast(color, background) >= 4.5 for color in colors), selector
    code = page.evaluate("[...document.querySelectorAll('div.highlight pre span.c1')].slice(0, 1).map(e => [getComputedStyle(e).color, "
                         "getComputedStyle(e.closest('pre')).backgroundColor])")
    assert all(contrast(*colors) >= 4 for colors in code)
    page.close()


def test_formulas_are_drawn(browser, site):
    "By the MathJax that is part of the site, as pictures of their own."
    page = browser.new_page()
    page.goto((site / "methods.html").as_uri())
    page.wait_for_selector("mjx-container svg", state="attached")
    assert page.locator("mjx-container").count() >= 4 and "\\operatorname" not in page.locator("article").inner_text()
    page.close()


# ---- what is on the pages ----

def test_chapters_follow_each_other(site):
    "`Next` leads from each chapter to the one after it, in the order of the notebooks, and `previous` back."
    stems = [chapter.path.stem for chapter in site_chapters.chapters()]
    for before, after in zip(stems, stems[1:]):
        for name, rel, target in ((before, "next", after), (after, "prev", before)):
            assert re.search(rf'<link rel="{rel}"[^>]* href="{target}\.html"', (site / "book" / f"{name}.html").read_text(encoding="utf-8")), name
    assert len(stems) > 30


def cells_with(directive):
    "Yield chapter and source of the code cells that have a directive, without their comments of that kind."
    for chapter in site_chapters.chapters():
        for cell in json.loads(chapter.path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and re.search(rf"^#\|\s*{directive}\s*$", source, re.M):
                yield chapter, re.sub(r"^#\|.*\n?", "", source, flags=re.M)


def test_hidden_cells_are_hidden(site):
    "`#| hide` and `#| export` keep the source off the page; no directive is left over."
    found = [*cells_with("hide"), *cells_with("export")]
    assert len(found) > 50
    for chapter, source in found:
        code = re.sub(r"\s+", " ", source).strip()
        assert code not in text_of(site, f"{chapter.page}.html"), f"{chapter.path.name}: {code[:100]}"
    assert not [chapter.path.name for chapter in site_chapters.chapters() if re.search(r"#\s?\|", text_of(site, f"{chapter.page}.html"))]


def test_exported_source_is_shown_and_marked(site):
    "`#| exports`: on the page, and told from lessons."
    shown = {}
    for chapter, source in cells_with("exports"):
        text = shown.setdefault(chapter, text_of(site, f"{chapter.page}.html"))
        assert re.sub(r"\s+", " ", source).strip() in text, f"{chapter.path.name}: {source[:100]}"
    assert len(shown) > 30 and all("tag_exported" in (site / f"{chapter.page}.html").read_text(encoding="utf-8") for chapter in shown)


def test_every_name_of_the_package_is_on_the_api_page(site):
    "With an anchor, its docstring, its parameters and a way to its chapter."
    page, text = (site / "api.html").read_text(encoding="utf-8"), text_of(site, "api.html")
    assert len(qtlm._HOME) > 70
    for name in qtlm._HOME:
        assert f'id="qtlm.{name}"' in page, name
        module = getattr(qtlm, name).__module__.removeprefix("qtlm.")
        chapter = next(chapter for chapter in site_chapters.chapters() if chapter.module == module)
        assert f'href="{chapter.page}.html"' in page
    for words in ("any module with nn.Linear", "model.hidden_size=384", "Step size of AdamW, at its peak", "Optimizer steps of the whole run"):
        assert words in text
    assert 'id="qtlm.Trainer.training_step"' in page and "overrides: Any" in text


def test_every_public_name_is_documented_in_its_chapter(site):
    "`show_doc` for each, where it is built; names that `qtlm` does not offer have their anchor there."
    import api

    count = 0
    for chapter in site_chapters.chapters():
        page = (site / f"{chapter.page}.html").read_text(encoding="utf-8")
        for name in api.public_names(chapter.module):
            count += 1
            assert f'id="{name.label}"' in page, f"{chapter.path.name}: {name.name}"
            assert name.is_home or f'id="{name.target}"' in page
    assert count > 150


def test_names_and_chapters_in_prose_are_links(site):
    "A name in backticks leads to its documentation, `chapter 04b` to the chapter."
    page = (site / "book" / "00_loss.html").read_text(encoding="utf-8")
    assert re.search(r'href="../api.html#qtlm.compute_loss"[^>]*><code[^>]*><span class="pre">compute_loss</span>', page)
    assert re.search(r'href="book/04b_rounding.html"><span[^>]*>Chapter 04b</span>', (site / "methods.html").read_text(encoding="utf-8"))


def test_front_page_has_the_demo(site):
    "Its figures are those of the stored report, its two pictures are there for light and dark."
    text, page = text_of(site, "index.html"), (site / "index.html").read_text(encoding="utf-8")
    for name, row in json.loads((ROOT / "benchmarks/results/demo.json").read_text())["models"].items():
        assert name in text and f"{row['bytes_on_disk']:,}" in text and f"{row['validation_loss']:.4f}" in text
    for name in ("demo-sizes", "demo-training"):
        assert all(f"{name}-{style}.svg" in page for style in ("light", "dark"))


def test_measured_figures_are_those_of_the_benchmarks(site):
    "A figure of each result is on the page of benchmarks; those of the methods are on theirs."
    results = {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("*.json")}
    text = text_of(site, "benchmarks.html")
    assert all(f"benchmarks/{name}.py" in text for name in results if name != "demo")
    assert f"{results['inference']['one token, no cache']['INT8, compiled']['speedup']:.2f}" in text
    gptq = results["accuracy"]["small"]["mean"]["qtlm INT4 gptq / default"]["increase"]
    assert f"{gptq:+.4f}" in text and f"{gptq:+.4f}" in text_of(site, "methods.html")


def test_every_scenario_is_promised_with_its_test(site):
    "And the tests that prove them exist."
    text, count = text_of(site, "promises.html"), 0
    for path in site_promises.files("test_spec_*.py"):
        for title, clauses, proof in site_promises.scenarios(path):
            count += 1
            assert clauses and re.sub(r"\s+", " ", title).replace("`", "") in text and proof.test in text
    assert count >= len(re.findall("Scenario: ", "".join(path.read_text() for path in site_promises.files("test_spec_*.py")))) >= 45


# ---- as a new user would ----

def code_of(page, language):
    "Return the code blocks of a page's source that begin with ```language."
    source = (ROOT / "docs" / "pages" / page).read_text(encoding="utf-8")
    return [re.sub(r"^:.*\n", "", block, flags=re.M) for block in re.findall(rf"^```{re.escape(language)}\n(.*?)^```", source, re.M | re.S)]


def test_the_code_of_the_quickstart_runs(site):
    "In order, as one program; what it leaves is small, and costs what the page says."
    names = {}
    for block in code_of("quickstart.md", "{code-cell} python"):
        exec(compile(block, "quickstart.md", "exec"), names)
    rows = {row.name: row for row in names["compare"](names["models"], [(names["x"], names["y"])], repeats=0).rows}
    assert names["get_quantization_info"](names["int4"]).bits_per_weight < 5
    assert rows["float32"].loss < 0.5 and rows["GPTQ"].loss < rows["first layer INT8"].loss < rows["INT4"].loss
    text = text_of(site, "quickstart.html")
    assert f"{names['get_quantization_info'](names['int4']).bytes:,}" in text and "same top-1" in text


def test_the_five_lines_of_the_front_page_run():
    "Whatever the model: here a convolution with a linear head."
    import torch
    from torch import nn

    (block,) = code_of("index.md", "python")
    assert len([line for line in block.splitlines() if line.strip()]) <= 5
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 8, 3), nn.Flatten(), nn.Linear(48, 5)).eval()
    names = {"model": model, "x": torch.rand(32, 2, 8), "y": torch.randint(5, (32,))}
    exec(compile(block, "index.md", "exec"), names)
    assert names["int4"](names["x"]).shape == (32, 5) and type(names["int8"][2]).__name__ == "QuantLinear"
