"""Fills in the templates of this room. What goes into HTML is escaped; Markdown is left as it is."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """The text of a file in `templates/` with these values."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("headfuse.reporting"),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["perplexity"] = perplexity
    return environment


def perplexity(nll: float) -> str:
    """exp(`nll`), unless it is too large to be useful or overflows a float."""
    return f"{math.exp(nll):.2f}" if nll < 20 else "above 10^8"
