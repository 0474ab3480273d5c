"""What a result was made from: a digest of its settings, the time, versions, and the source's commit."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from anysite import __version__

VERSIONED = ("torch", "monai", "lightning-fabric", "numpy", "nibabel", "scipy")


def fingerprint(content: Any) -> str:
    """Return a short digest of anything JSON-able, such as a configuration."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {"anysite": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in VERSIONED
    }


def commit() -> str:
    """Return the source checkout's commit, marked "+" where files differ from it, or "" outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--match", "-"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
