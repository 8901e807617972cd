"""The documents of this repository, and the commands and blocks that stand in them."""

import re
import shlex
from pathlib import Path

from helpers import ROOT

READMES = [ROOT / "README.md", ROOT / "README_zh.md"]
DOCS = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [
    *READMES,
    *DOCS,
    *(ROOT / folder / "README.md" for folder in ("data", "eval", "scripts")),
    *(ROOT / name for name in ("AGENTS.md", "CONTRIBUTING.md", "SECURITY.md")),
]
# What a reader runs from top to bottom: the README, then what it hands over to.
FIRST = [READMES[0], ROOT / "docs" / "commands.md", ROOT / "docs" / "serving.md"]
RUN_IN_ORDER = [*dict.fromkeys([*FIRST, *DOCS]), ROOT / "eval" / "README.md"]


def name_document(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def list_shell_lines(path: Path) -> list[str]:
    """The lines of a document's bash blocks, pipes included, continued lines joined."""
    joined = "".join(read_blocks(path.read_text(encoding="utf-8"), "bash")).replace("\\\n", " ")
    return [" ".join(line.split()) for line in joined.splitlines() if line.strip() and line[0] != "#"]


def list_bash_commands(path: Path) -> list[list[str]]:
    """The same, as words."""
    return [shlex.split(line, comments=True) for line in list_shell_lines(path)]


def read_commands(text: str) -> list[str]:
    """The python commands of a markdown or shell text, in blocks or indented, continued lines joined."""
    joined = text.replace("\\\n", " ")
    found = re.findall(r"^\s*(?:[^#\n]*\| )?(python (?:-m )?[\w./]+[^\n|]*)$", joined, flags=re.MULTILINE)
    return [" ".join(command.split(" #")[0].split()) for command in found]


def find_marked(text: str, name: str) -> str:
    return text[text.index(f"<!-- {name} -->") : text.index(f"<!-- /{name} -->")]
