"""Documents and messages use the field's terms: each word below has one, and `make check` fails on the word.

Docstrings and comments are not looked at yet: they follow where they are edited.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What we don't write → what the field says.
TERMS = {
    r"mend(s|ed|ing)?": "fix, repair",
    r"(begin|begins|begun|start|starts|started) (all )?anew": "start again, reconnect",
    r"anew": "again",
    r"g(i|a)ves? way|given way|giving way": "is evicted, is dropped",
    r"(?<!there )(is|are|was|were) no(?= (?!(longer|more|less|other|way|one|such)\b)[a-z])": "is not a",
    r"put(s|ting)? aside": "dead-letter, quarantine",
    r"ends? with (0|[1-9]\d?)(?=\b)": "exits with",
    r"guilty": "offending",
    r"mak(e|es|ing) known|made known": "report, declare",
    r"tell(s|ing)? of|told of": "report",
    r"ill health|is ill": "unhealthy",
    r"whither|whence|thereof|therein|wherein|hereby": "plain words",
    r"ha(s|d|ve) not (yet )?come back to itself": "recovered",
    r"needs must|nought|naught|forthwith": "plain words",
    r"it is well again|(is|are) well again": "has recovered",
    r"orderly word": "clean shutdown",
    r"for want of": "without",
    r"stranger's": "third party's",
}
WRONG = re.compile("|".join(rf"\b(?:{pattern})\b" for pattern in TERMS), re.IGNORECASE)
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")),
         ROOT / "charts/virtbus/README.md", ROOT / "charts/virtbus/values.yaml",
         ROOT / "charts/virtbus/files/alerts.yaml", ROOT / "charts/virtbus/templates/NOTES.txt"]  # fmt: skip
MODULES = sorted((ROOT / "virtbus").rglob("*.py"))


def found(text: str) -> list[str]:
    """The wrong words of a text, without what is code or an address in it."""
    plain = re.sub(r"```.*?```|`[^`\n]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
    return [match[0] for match in WRONG.finditer(re.sub(r"\s+", " ", plain))]


def messages(module: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string in a module that is not a docstring; a line of the log is its class's."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any("Event" in ast.unparse(base) for base in node.bases):
            yield node.lineno, (ast.get_docstring(node) or "").partition("\n")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


@pytest.mark.parametrize("text", ["mended anew", "the host\nis no node", "it gave way", "ends with 77"])
def test_the_list_finds_what_it_is_for(text: str) -> None:
    assert found(text)


def test_code_and_what_only_looks_alike_is_left_alone() -> None:
    assert not found("there is no longer a `mend` flag; it is no more than a recommendation ([x](mend.md))")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_uses_the_fields_terms(page: Path) -> None:
    assert found(page.read_text(encoding="utf-8")) == []


def test_every_message_uses_the_fields_terms() -> None:
    wrong = [
        f"{module.relative_to(ROOT)}:{line}: {words}"
        for module in MODULES
        for line, text in messages(module)
        if (words := found(text))
    ]
    assert wrong == []
