"""The pages of the documentation, and what can be read from them: blocks, commands, links, anchors."""

from __future__ import annotations

import re
import shlex
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import typer.main

from anysite.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)$(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)
GROUP = typer.main.get_group(app)


@dataclass(frozen=True)
class Block:
    """A fenced block; without a language it holds commands to type, as `text` what is printed or lies in a folder."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        """Where it stands, for the names of tests."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[2], found[3].strip("\n"))
        for found in FENCE.finditer(text)
    ]


def find_blocks(language: str) -> list[Block]:
    """Return the blocks of a language on all pages."""
    return [block for page in PAGES for block in read_blocks(page) if block.language == language]


def without_blocks(page: Path) -> str:
    """Return a page's text without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def read_commands(block: Block) -> list[list[str]]:
    """Return the words of every command in a block, as a shell would read them."""
    lines = re.sub(r"\\\n\s*", " ", block.text).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def arguments_of(words: list[str]) -> list[str] | None:
    """Return what a command gives to anysite, the verb first; none where it calls another program."""
    if words[0] == "anysite":
        words = words[1:]
    elif words[0] == "torchrun":
        words = words[words.index("anysite") + 1 :]
    else:
        return None
    return words[: words.index(">")] if ">" in words else words


def parse(arguments: list[str]) -> dict[str, object]:
    """Return the values of a command's arguments and options, as the program itself reads them.

    Raises:
        Exception: the program would refuse them.
    """
    verb, *rest = arguments
    assert verb in GROUP.commands, f"no command {verb}"
    return GROUP.commands[verb].make_context(verb, rest).params


def read_anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as MkDocs and GitHub make them."""
    headings = re.findall(r"^#+ +(.+)$", without_blocks(page), flags=re.MULTILINE)
    anchors: set[str] = set()
    for heading in headings:
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        ascii_only = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        anchor = re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())
        assert anchor not in anchors, f"{page.name} has two headings {heading!r}"
        anchors.add(anchor)
    return anchors
