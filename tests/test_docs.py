"""The documentation as far as a machine can read it: generated pages, links, commands, words."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer.main

from anysite import config
from anysite.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    sys.path.insert(0, str(ROOT / "docs"))
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page", ["commands.md", "settings.md", "methods.md", "corruptions.md", "evidence.md"]
)
def test_generated_pages_are_up_to_date(generate: ModuleType, page: str) -> None:
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert written == generate.PAGES[page](), "run make docs"


def test_the_readme_table_holds_what_the_rows_say(generate: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == generate.write_readme_table(readme), "run make docs"
    assert readme.count("| baseline |") == 0
    assert len(re.findall(r"\[\d+\.\d, \d+\.\d\], n = \d+", readme)) >= 5


def test_the_tables_on_judging_hold_what_the_rows_say(generate: ModuleType) -> None:
    text = (ROOT / "docs" / "judging.md").read_text(encoding="utf-8")
    assert text == generate.write_judging_tables(text), "run make docs"


def test_the_tables_on_robustness_hold_what_the_rows_say(generate: ModuleType) -> None:
    text = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    assert text == generate.write_robustness_tables(text), "run make docs"


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "methods").glob("*.md")), ids=lambda p: p.stem)
def test_tables_of_method_pages_hold_what_the_rows_say(generate: ModuleType, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == generate.write_method_table(page.stem, text), "run make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_the_docs_exist(page: Path) -> None:
    group = typer.main.get_group(app)
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```$(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))
    for line in re.findall(r"^anysite ([a-z]+.*)$", blocks, flags=re.MULTILINE):
        verb = line.split()[0]
        assert verb in group.commands, line
        known = {option for p in group.commands[verb].params for option in (*p.opts, *p.secondary_opts)} | {
            "--help"
        }
        for option in re.findall(r"(?<=\s)--[a-z-]+", line.partition("#")[0]):
            assert option in known, f"{line}: {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_settings_in_the_docs_exist(page: Path) -> None:
    names = set(config.setting_names())
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"--set ([a-z_]+(?:\.[a-z_]+)+)=", text):
        free = name.startswith(("network.", "objectives.", "pretrain.objectives."))
        assert free or name in names, name


def test_the_docs_list_is_complete() -> None:
    listed = re.findall(r": (\S+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    present = {str(p.relative_to(ROOT / "docs")) for p in PAGES if p.parent != ROOT}
    assert set(listed) == present
