"""The 3-D viewer that a page carries along: NiiVue, as `niivue/README.md` says."""

from __future__ import annotations

import base64
from dataclasses import dataclass

from anysite.report.template import HERE

FOLDER = HERE / "niivue"


@dataclass(frozen=True)
class Viewer:
    """NiiVue's version, its licence, and its script, gzipped in base64."""

    version: str
    licence: str
    script: str


def read_viewer() -> Viewer:
    """Return the viewer to put into a page."""
    return Viewer(
        version=(FOLDER / "VERSION").read_text(encoding="ascii").strip(),
        licence=(FOLDER / "LICENSE").read_text(encoding="utf-8").strip(),
        script=base64.b64encode((FOLDER / "niivue.umd.js.gz").read_bytes()).decode("ascii"),
    )
