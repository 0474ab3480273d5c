"""Filling in the templates of the pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from anysite.report import format as texts

HERE = Path(__file__).parent
FILTERS = (
    "points",
    "number",
    "interval",
    "count",
    "probability",
    "duration",
    "join",
    "metric_name",
    "metric_unit",
    "metric_value",
)


def render(name: str, **content: Any) -> str:
    """Return the page that a template makes of its content; all of it is escaped that is not markup already."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update({filter: getattr(texts, filter) for filter in FILTERS})
    return environment.get_template(name).render(**content)
