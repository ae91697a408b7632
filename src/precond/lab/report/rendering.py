"""Templates made into self-contained pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render_template(name: str, **context: Any) -> str:
    """A page with styles inside and nothing loaded from elsewhere; all text of the context is escaped, an unknown name an error."""
    environment = Environment(
        loader=PackageLoader("precond.lab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    return environment.get_template(name).render(style=Markup(style), **context)
