"""How the documentation is built: `make docs`. Nothing is fetched unless DOCS_ONLINE is set."""

from __future__ import annotations

import inspect
import os
import tomllib
from importlib import import_module
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import strank

_PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()
_URLS = tomllib.loads(_PYPROJECT)["project"]["urls"]

project = "strank"
author = "The strank developers"
copyright = f"2026, {author}"
version = release = strank.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates"]
default_role = "py:obj"

html_theme = "sphinx_book_theme"
html_title = "strank"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_theme_options = {
    "max_navbar_depth": 1,
    "navbar_persistent": [],
    "repository_url": _URLS["Repository"],
    "show_toc_level": 2,
    "use_download_button": False,
    "use_repository_button": True,
}
html_context = {"default_mode": "auto"}
html_copy_source = html_show_sourcelink = False
# Browsers draw MathML by themselves; MathJax would come from another server.
html_math_renderer = "mathml"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
nb_execution_in_temp = True
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_merge_streams = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = True
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "all"
autodoc_member_order = "bysource"
# scikit-learn writes these, with links into pages of its own.
_REQUESTS = "set_fit_request, set_predict_request, set_score_request"
autodoc_default_options = {"members": True, "exclude-members": _REQUESTS}
# Only names of our own must lead somewhere: those of others do so where their lists can be fetched.
# Beside these, parts of public classes that are nobody's to make.
_PARTS = r"cohort\.(folds|panel\.choose_panel)|slides\.pixels\.Pixels|io\.hest_bench\.TaskSample"
nitpick_ignore_regex = [("py:.*", r"(?!strank\b).*"), ("py:.*", rf"strank\.({_PARTS})|.* \| None")]
intersphinx_mapping = {
    "anndata": ("https://anndata.readthedocs.io/en/stable", None),
    "numpy": ("https://numpy.org/doc/stable", None),
    "pandas": ("https://pandas.pydata.org/docs", None),
    "python": ("https://docs.python.org/3", None),
    "sklearn": ("https://scikit-learn.org/stable", None),
    "torch": ("https://docs.pytorch.org/docs/stable", None),
}
if not os.environ.get("DOCS_ONLINE"):
    intersphinx_mapping = {}

# A public name is documented, and linked to, where it is handed on and not where it is written.
for home in ("strank", *(f"strank.{name}" for name in strank.__all__)):
    try:
        module = import_module(home)
    except ModuleNotFoundError:
        continue
    for name in getattr(module, "__all__", ()):
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            thing.__module__ = home


def _within_the_site(app: Sphinx, page: str, source: list[str]) -> None:
    """Lead links to files of the repository, which work there, to the pages that include them."""
    for name in ("CONTRIBUTING", "SECURITY"):
        source[0] = source[0].replace(f"](../{name}.md", f"](/{name.lower()}.md")


def _formula(self: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    self.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Tell Sphinx."""
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))
    app.connect("source-read", _within_the_site)
