"""One vocabulary: no word leaves that its schema does not list, and none is spelled out a second time."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import virtbus
from virtbus import schema, words
from virtbus.envelope import encoding
from virtbus.words import Action, GapReason, Origin, Platform, Word

PACKAGE = Path(virtbus.__file__).parent
OPEN_SETS = Word.__subclasses__()
# Words that no other part of the program could mean: a second spelling of one is a second truth.
UNMISTAKABLE = {
    member.value
    for cls in (GapReason, words.ResolutionCause, words.EvidenceVerdict, words.DiskError, words.SourceState)
    for member in cls
} | {Platform.OPENSTACK.value, words.EvidenceCheck.DISK_ERRORS.value, words.EvidenceCheck.BLOCK_INFO.value}
# The same letters with another meaning: the name of a wait, an extra of ours, what `virtbus watch` prints.
OTHER_MEANINGS = {
    ("virtbus/bus/subscription.py", "dead_letter"),
    ("virtbus/plugins.py", "openstack"),
    ("virtbus/commands/watch.py", "resumed"),
    ("virtbus/commands/watch.py", "migrated"),
}


def spelled_out(path: Path) -> set[str]:
    """Every string of a module that is a word of the vocabulary."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


@pytest.mark.parametrize("cls", OPEN_SETS, ids=lambda cls: cls.__name__)
def test_a_word_of_a_later_version_is_read_as_it_stands(cls: type[Word]) -> None:
    later = cls("brand_new")
    assert (later, later.value, str(later), later.is_known) == ("brand_new",) * 3 + (False,)
    assert isinstance(later, cls)
    assert later not in list(cls)
    assert all(cls(member.value) is member and member.is_known for member in cls)


@pytest.mark.parametrize("nonsense", [None, 3, [], {}])
def test_what_is_not_text_is_not_a_word(nonsense: object) -> None:
    with pytest.raises(ValueError, match="is not a valid Origin"):
        Origin(nonsense)


def test_no_module_spells_a_word_of_the_vocabulary_out() -> None:
    found = {
        (str(path.relative_to(PACKAGE.parent)), word)
        for path in PACKAGE.rglob("*.py")
        if path.name != "words.py"
        for word in spelled_out(path) & UNMISTAKABLE
    }
    assert found <= OTHER_MEANINGS


def test_the_severities_that_are_sent_are_those_of_the_envelope() -> None:
    sent = {*encoding._SEVERITIES.values(), encoding._INFO, encoding._WARN, encoding._DEBUG}
    listed = schema.load(schema.ENVELOPE)["properties"]["severitytext"]["x-known-values"]
    assert {text for text, _ in sent} == set(listed) == {member.value for member in words.Severity}


def test_a_code_that_nobody_knows_is_the_word_unknown() -> None:
    assert [Action.from_code(code) for code in (0, 1, 2, 9)] == ["none", "pause", "report", "unknown"]
