"""Documents, messages, docstrings and comments use the field's terms: `make check` fails on other words."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# "One counter a device" is read twice; "two events a second" is not.
_RATES = (
    r"one( (?!(of|at|in|for|to|by|that|which|and)\b)[a-z]+){0,2}|so many|counters?|stamps?|case|transaction"
    r"|checksum|observations|rows|microsecond|thread"
)
_UNITS = (
    "batch|broker|call|check|command|connection|consumer|daemon|device|disk|domain|event|group|guest|host|image|"
    "incident|key|lane|line|member|message|node|page|partition|pod|reason|request|row|socket|type|user|volume"
)
# What we don't write → what the field says.
TERMS = {
    r"mend(s|ed|ing)?": "fix, repair",
    r"(begin|begins|begun|start|starts|started) (all )?anew": "start again, reconnect",
    r"anew": "again",
    r"g(i|a)ves? way|given way|giving way": "is evicted, is dropped",
    r"(?<!there )(is|are|was|were) no(?= (?!(longer|more|less|other|way|one|such)\b)[a-z])": "is not a",
    r"(put|set)(s|ting)? ((it|them) )?aside": "dead-letter, move away",
    r"ends? with (0|[1-9]\d?)(?=\b)": "exits with",
    r"guilty": "offending",
    r"mak(e|es|ing) known|made known": "report, declare",
    r"tell(s|ing)? of": "report",
    r"told(?! (apart|to|from|which|how)\b)|tells(?! [^.;]{0,30}\b(apart|from)\b)": "reported, says, shows",
    rf"({_RATES}) an? (\(|({_UNITS})\b(?!'))": "per",
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


def written(module: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string in a module, its docstrings among them, and of every block of comments."""
    source = module.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    begun, ended, words = 0, 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != ended + 1:
                yield begun, " ".join(words)
                begun, words = token.start[0], []
            ended = token.start[0]
            words.append(token.string.lstrip("# "))
    yield begun, " ".join(words)


@pytest.mark.parametrize(
    "text",
    ["mended anew", "the host\nis no node", "it gave way", "ends with 77", "an error is told by its event",
     "set it aside", "libvirt tells why", "one counter a (device, reason)", "a stamp an event",
     "at most one unconfirmed record a key"],
)  # fmt: skip
def test_the_list_finds_what_it_is_for(text: str) -> None:
    assert found(text)


@pytest.mark.parametrize(
    "text",
    ["can't be told apart", "a mark tells it from an operator's", "is told which it missed",
     "at most once a second", "4,000 errors a second", "the order a key keeps", "which record a message is"],
)  # fmt: skip
def test_what_an_engineer_writes_is_left_alone(text: str) -> None:
    assert not found(text)


def test_docstrings_and_comments_are_looked_at(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""Told\nby us."""\n\nX = 1  # one row\n# a host\n\n# given\n# way\n')
    assert [(line, words) for line, text in written(module) if (words := found(text))] == [
        (1, ["Told"]),
        (4, ["one row a host"]),
        (7, ["given way"]),
    ]


def test_code_and_what_only_looks_alike_is_left_alone() -> None:
    assert not found("there is no longer a `mend` flag; it is no more than a recommendation ([x](mend.md))")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_uses_the_fields_terms(page: Path) -> None:
    assert found(page.read_text(encoding="utf-8")) == []


def test_every_message_docstring_and_comment_uses_the_fields_terms() -> None:
    wrong = [
        f"{module.relative_to(ROOT)}:{line}: {words}"
        for module in MODULES
        for line, text in written(module)
        if (words := found(text))
    ]
    assert wrong == []
