"""Sphinx configuration. Nothing is fetched: no intersphinx, no remote scripts."""

from __future__ import annotations

import re
import warnings
from importlib import metadata
from pathlib import Path

import matplotlib
from sphinx import addnodes

project = "precond"
author = "The precond authors"
copyright = "2026, The precond authors"
version = release = metadata.version("precond")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_title = f"precond {version}"
html_extra_path = ["evidence.html"]  # made by precond verify

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False
python_use_unqualified_type_names = True
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]  # functions in sphinx_gallery_conf


def _style(gallery_conf, example) -> None:
    """Pictures without a background, in colors that are seen on white and on black."""
    matplotlib.rc_file(Path(__file__).with_name("matplotlibrc"))


sphinx_gallery_conf = {
    "reset_modules": ("matplotlib", _style),
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "abort_on_example_error": True,
    "download_all_examples": False,
}
warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")

_ROW = re.compile(r"^\s*\|.*\|\s*$")
_RULE = re.compile(r"^\s*\|[\s:|-]+\|\s*$")


def _cells(row: str) -> list[str]:
    """The cells of a Markdown row; bars inside ``literals`` and escaped bars do not separate."""
    parts = re.split(r"(``.*?``)", row.strip()[1:-1])
    guarded = "".join(p.replace("|", "\0") if p.startswith("``") else p.replace(r"\|", "\0") for p in parts)
    return [cell.strip().replace("\0", "|") for cell in guarded.split("|")]


def _escaped(text: str) -> str:
    """Bars as they are: |g| is an absolute value and no substitution."""
    return "".join(p if p.startswith("``") else p.replace("|", r"\|") for p in re.split(r"(``.*?``)", text))


def _docstring_to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings hold Markdown tables and absolute values; reStructuredText wants list-tables and escaped bars."""
    out: list[str] = []
    position = 0
    in_doctest = False
    while position < len(lines):
        line = lines[position]
        in_doctest = line.lstrip().startswith(">>>") or (in_doctest and bool(line.strip()))
        if _ROW.match(line) and position + 1 < len(lines) and _RULE.match(lines[position + 1]):
            indent = line[: len(line) - len(line.lstrip())]
            rows = [_cells(line)]
            position += 2
            while position < len(lines) and _ROW.match(lines[position]):
                rows.append(_cells(lines[position]))
                position += 1
            out += ["", f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
            for row in rows:
                for k, cell in enumerate(row):
                    out.append(f"{indent}   {'*' if k == 0 else ' '} - {_escaped(cell)}")
            out.append("")
            continue
        out.append(line if in_doctest else _escaped(line))
        position += 1
    lines[:] = out


_PAGES = {"CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}


def _links_from_the_root(app, doctree) -> None:
    """README, CONTRIBUTING and CHANGELOG are included by pages, and link from where they are."""
    for link in doctree.findall(addnodes.pending_xref):
        target = link["reftarget"]
        page = _PAGES.get(target) or (re.match(r"docs/(.+)\.md$", target) or [None, None])[1]
        if link["reftype"] == "myst" and page:
            link["refdomain"], link["reftarget"], link["reftargetid"] = "doc", page, None


def _told_in_the_docstring(app, what, name, obj, skip, options) -> bool | None:
    """Fields of named tuples are described with the class."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app) -> None:
    app.connect("autodoc-skip-member", _told_in_the_docstring)
    app.connect("doctree-read", _links_from_the_root)
    # Before napoleon, whose priority is 500.
    app.connect("autodoc-process-docstring", _docstring_to_rst, priority=400)
