"""Writes the pages and tables that come from code and from rows of results, and names those it changed."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import typer
import typer.core
from adaptation_tables import write_adaptation_glance, write_adaptation_tables
from calibration_tables import write_calibration_tables
from evidence_page import describe_evidence, write_method_table, write_readme_table
from judging_tables import write_judging_glance, write_judging_tables
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from robustness_tables import write_robustness_tables

from anysite import config, registry
from anysite.cli import app
from anysite.corrupt import CORRUPTIONS
from anysite.settings import MethodSettings, Settings

DOCS = Path(__file__).parent


def describe_commands() -> str:
    """Return the page of every command with its arguments and options."""
    group = typer.main.get_group(app)
    lines = ["# Commands", "", "Written by `make docs` from the code.", ""]
    lines += [
        "Exit codes: 0 done; 1 done, but cases failed or were rejected; 2 misuse; 3 interrupted, state saved; "
        "70 a defect of anysite; "
        "130 interrupted.",
        "",
    ]
    for name, command in group.commands.items():
        lines += [f"## anysite {name}", "", (command.help or "").strip(), ""]
        lines += ["| argument or option | what it is | default |", "|---|---|---|"]
        for parameter in command.params:
            if parameter.name == "help":
                continue
            meaning = getattr(parameter, "help", None) or ""
            lines.append(f"| `{_name_of(parameter)}` | {meaning} | {_default_of(parameter)} |")
        lines.append("")
    return "\n".join(lines)


def describe_settings() -> str:
    """Return the page of every setting with its type, default and meaning."""
    lines = [
        "# Settings", "", "Written by `make docs` from the code.", "",
        "Any of these may stand in a TOML file given as `--preset FILE.toml` or be changed by `--set name=value`.",
        "The default holds where neither says otherwise. `anysite train` starts from the preset `robust`, which",
        "changes `augment`, `train.sampling` (`domain`) and `plan.normalisation` (`local`); a file given as `--preset`",
        "stands in its place.",
        "The settings of networks, objectives, detectors and adapters are on the page of [methods](methods.md).", "",
        "| setting | type | default | meaning |", "|---|---|---|---|",
    ]  # fmt: skip
    return "\n".join(lines + _rows(config.Config, "")) + "\n"


def describe_methods() -> str:
    """Return the page of every registered method with its source and settings."""
    lines = [
        "# Methods",
        "",
        "Written by `make docs` from the first line and constructor of each method's file.",
        "",
    ]
    for kind, names in registry.TABLES.items():
        lines += [f"## {kind.capitalize()}s", "", "| name | what it is | settings |", "|---|---|---|"]
        for name in names:
            method = registry.describe(kind, name)
            settings = ", ".join(f"`{key}={value}`" for key, value in method.settings.items())
            lines.append(f"| `{name}` | {method.headline} | {settings} |")
        lines.append("")
    lines += ["## Presets", "", ", ".join(f"`{name}`" for name in config.preset_names()), ""]
    return "\n".join(lines)


def describe_corruptions() -> str:
    """Return the page of every corruption with its strengths."""
    lines = [
        "# Corruptions", "", "Written by `make docs` from the code; [robustness](robustness.md) says what for.",
        "",
        "| name | family | what happens, and what the numbers are | severity 1 to 5 |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, corruption in CORRUPTIONS.items():
        strengths = ", ".join(f"{strength:g}" for strength in corruption.strengths)
        lines.append(f"| `{name}` | {corruption.family} | {corruption.meaning} | {strengths} |")
    return "\n".join(lines) + "\n"


PAGES = {
    "corruptions.md": describe_corruptions,
    "commands.md": describe_commands,
    "settings.md": describe_settings,
    "methods.md": describe_methods,
    "evidence.md": describe_evidence,
}


def _rows(model: type[BaseModel], prefix: str) -> list[str]:
    rows: list[str] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            rows += _rows(annotation, f"{prefix}{name}.")
            continue
        default = field.default if field.default is not PydanticUndefined else field.default_factory()  # pyright: ignore
        if isinstance(default, MethodSettings):
            name, default = f"{name}.name", default.name
        rows.append(f"| `{prefix}{name}` | {_type_of(field)} | `{default}` | {field.description or ''} |")
    return rows


def _type_of(field: Any) -> str:
    text = (
        getattr(field.annotation, "__name__", None)
        if isinstance(field.annotation, type)
        else str(field.annotation)
    )
    text = str(text).replace("typing.", "").replace("Literal", "").replace("anysite.config.", "")
    return text.replace("|", "or").replace("NoneType", "none").replace("None", "none")


def _name_of(parameter: Any) -> str:
    if isinstance(parameter, typer.core.TyperArgument):
        return parameter.metavar or (parameter.name or "").upper()
    return " / ".join([*parameter.opts, *parameter.secondary_opts])


def _default_of(parameter: Any) -> str:
    if parameter.required:
        return "required"
    return "" if parameter.default in (None, False, "") else f"`{parameter.default}`"


def render() -> dict[Path, str]:
    """Return every page that is written from code or rows, whole or in part, as it should be."""
    pages = {DOCS / name: write() for name, write in PAGES.items()}
    parts = {
        DOCS.parent / "README.md": write_readme_table,
        DOCS / "judging.md": write_judging_glance,
        DOCS / "judging_results.md": write_judging_tables,
        DOCS / "robustness.md": write_robustness_tables,
        DOCS / "prediction.md": write_calibration_tables,
        DOCS / "test_time.md": write_adaptation_glance,
        DOCS / "adaptation_results.md": write_adaptation_tables,
    }
    for method in sorted((DOCS / "methods").glob("*.md")):
        parts[method] = partial(write_method_table, method.stem)
    return pages | {page: write(page.read_text(encoding="utf-8")) for page, write in parts.items()}


def main() -> None:
    """Write every page that is out of date, or name it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; name pages that are out of date")
    check = parser.parse_args().check
    for page, text in render().items():
        if page.is_file() and page.read_text(encoding="utf-8") == text:
            continue
        typer.echo(page.relative_to(DOCS.parent).as_posix())
        if not check:
            page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
