"""Pictures in columns that training and adaptation leave, for the page."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from PIL import Image


@dataclass(frozen=True)
class Preview:
    """A picture with the names of its columns, as a data address."""

    columns: tuple[str, ...]
    address: Markup


def read_preview(path: Path) -> Preview | None:
    """Read a picture that names its columns; none where it cannot be read."""
    try:
        with Image.open(path) as picture:
            columns = tuple(picture.info.get("columns", "").split(", "))
        content = path.read_bytes()
    except (OSError, SyntaxError, ValueError):
        return None
    address = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return Preview(columns, Markup.escape(address))
