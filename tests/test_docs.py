"""The documentation as far as a machine can read it: generated pages, links, names, the site."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from anysite import config, registry
from anysite.plan import Plan
from pages import DOCS, GROUP, PAGES, ROOT, read_anchors, read_blocks, without_blocks

GENERATED = ("commands.md", "settings.md", "methods.md", "corruptions.md", "evidence.md")
OTHER_OPTIONS = {"--ml"}  # of TotalSegmentator


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def options_of(command: Any) -> set[str]:
    return {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}


def settings_of(kind: str, name: str) -> dict[str, str]:
    return registry.describe(kind, name).settings


def test_pages_and_tables_hold_what_code_and_rows_say() -> None:
    """In a process of its own: checking the types of every row takes several times as long as the tables."""
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "", "run make docs"


def test_the_readme_has_a_table_with_intervals() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("| baseline |") == 0
    assert len(re.findall(r"\[\d+\.\d, \d+\.\d\], n = \d+", readme)) >= 5


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if page.is_relative_to(DOCS):
            assert linked.is_relative_to(DOCS), f"{target} lies outside the site"
        if anchor:
            assert anchor in read_anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_within_sentences_exist(page: Path) -> None:
    """Those of whole blocks are parsed in `test_docs_code.py`."""
    options = {verb: options_of(command) for verb, command in GROUP.commands.items()}
    known = set().union(*options.values())
    for span in re.findall(r"`([^`\n]+)`", without_blocks(page)):
        command = re.match(r"anysite ([a-z]+)\b", span)
        if command:
            assert command[1] in options, span
        if command or span.startswith("--"):
            for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", span):
                assert option in (options[command[1]] if command else known | OTHER_OPTIONS), span
        for script in re.findall(r"python (\S+\.py)", span):
            assert (ROOT / script).is_file(), span


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_within_sentences_exist(page: Path) -> None:
    names = set(config.setting_names())
    groups = {".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 1)}
    for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?==[^`]*`|`)", without_blocks(page)):
        group, *rest = name.split(".")
        if group == "network":
            assert rest[0] == "name" or any(
                rest[0] in settings_of("network", n) for n in registry.NETWORKS
            ), name
        elif group == "objectives":
            assert rest[0] in registry.OBJECTIVES, name
            assert not rest[1:] or rest[1] in settings_of("objective", rest[0]), name
        elif group in config.Config.model_fields and rest[-1] not in ("json", "py", "safetensors"):
            assert name in names | groups or hasattr(Plan, rest[0]), name


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, table in registry.TABLES.items() for n in table])
def test_every_method_is_described_with_its_source(kind: str, name: str) -> None:
    """On a page that people wrote; the list of all methods is generated."""
    (source, *_) = re.findall(r"https://[^\s,;]+[^\s,;.]", registry.describe(kind, name).headline)
    pages = [path for path in DOCS.rglob("*.md") if path.name not in GENERATED]
    texts = {path.stem: path.read_text(encoding="utf-8") for path in pages}
    named = [text for stem, text in texts.items() if stem == name or f"`{name}`" in text]
    assert any(source in text for text in named), source


def test_every_calibration_and_preset_is_described() -> None:
    calibration = (DOCS / "prediction.md").read_text(encoding="utf-8").split("## Calibration")[1]
    for kind in typing.get_args(config.CalibrationSettings.model_fields["kind"].annotation):
        assert kind in {"auto", "global"} or f"`{kind}`" in calibration or f"={kind}`" in calibration, kind
    assert "https://arxiv.org/abs/1706.04599" in calibration
    pages = [path for path in PAGES if path.name not in GENERATED]
    texts = "".join(path.read_text(encoding="utf-8") for path in pages)
    for preset in config.preset_names():
        assert re.search(rf"\b{preset}\b", texts), preset


def test_the_navigation_names_every_page_once() -> None:
    listed = re.findall(
        r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    order = ["start", "tutorial", "data", "training", "test_time", "judging", "benchmark", "methods/networks",
             "commands", "design"]  # fmt: skip
    places = [listed.index(f"{page}.md") for page in order]
    assert places == sorted(places)


def test_the_first_page_leads_to_every_page() -> None:
    links = set(re.findall(r"\]\(([^)#]+\.md)", (DOCS / "index.md").read_text(encoding="utf-8")))
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert pages - links == {"index.md", "methods/spectral.md"}  # which the page on detectors leads to


def test_the_design_names_every_module() -> None:
    tree = next(block.text for block in read_blocks(DOCS / "design.md") if block.language == "text")
    source = ROOT / "src" / "anysite"
    for path in source.iterdir():
        if path.suffix == ".py" and not path.name.startswith("__"):
            assert path.name in tree, path.name
        if (path / "__init__.py").is_file() and path.name != "presets":
            assert f"{path.name}/" in tree, path.name


def test_the_site_builds_strictly_and_loads_nothing_from_the_network(tmp_path: Path) -> None:
    mkdocs = shutil.which("mkdocs")
    if mkdocs is None:
        pytest.skip("mkdocs is not installed")
    command = [mkdocs, "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": ""}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    for path in (tmp_path / "site").rglob("*.html"):
        page = path.read_text(encoding="utf-8")
        loaded = re.findall(
            r"<(?:script|link|img|iframe|source|video)\b[^>]*?\b(?:src|href)=[\"']?([^\"'\s>]+)", page
        )
        assert loaded
        assert not [target for target in loaded if target.startswith(("http:", "https:", "//"))], path.name
        # The theme's script fetches Mermaid and the repository's facts where a page asks for them.
        assert "mermaid" not in page, path.name
        assert 'data-md-component="source"' not in page, path.name
    for path in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), (
            path.name
        )
