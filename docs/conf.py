"""Sphinx's settings. The site uses nothing that is not in it: no CDN, no fonts from elsewhere, a search that works from file://."""
import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

project, author, copyright = "qtlm", "The qtlm authors", "The qtlm authors"
html_title = "qtlm"
extensions = ["myst_nb", "sphinx_design", "sphinx_copybutton", "sphinx.ext.mathjax", "links"]

# The notebooks hold their outputs, and the tests that these are current. Only quickstart.md asks to be run.
nb_execution_mode = "off"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "text/markdown", 5)]  # before text/html: the theme knows how tables look
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_dmath_allow_digits = False  # "$5 and $6" is no formula
myst_heading_anchors = 3

python_maximum_signature_line_length = 60
add_module_names = False
toc_object_entries_show_parents = "hide"
html_theme = "furo"
html_theme_options = {"sidebar_hide_name": False, "navigation_with_keys": True}
html_static_path = [str(HERE / "pages" / "_static")]
html_favicon = str(HERE / "pages" / "_static" / "favicon.svg")
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_use_index = True
pygments_style, pygments_dark_style = "default", "github-dark"
copybutton_exclude = ".linenos, .gp, .go"

# MathJax as one file: SVG needs no fonts, and so nothing else is loaded. The package brings all of MathJax; its name is no identifier.
_mathjax = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax" / "tex-svg.js"
html_static_path.append(str(_mathjax))
mathjax_path = _mathjax.name
mathjax3_config = {"options": {"enableMenu": False}}
