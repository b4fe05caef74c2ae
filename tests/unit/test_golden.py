"""What goes on the wire does not change by accident, and what an older minor version sent is still read."""

from __future__ import annotations

import json

import pytest

from tests import golden
from virtbus import envelope, schema
from virtbus.model import Binding, Message


@pytest.mark.parametrize("case", golden.cases(), ids=lambda case: case.name)
def test_an_event_goes_out_byte_for_byte_as_it_was_released(case: golden.Case) -> None:
    file = golden.place(case)
    assert file.exists(), "a new minor version or case: write its golden file with `python -m tests.golden`"
    assert golden.wire(case) == file.read_text(encoding="utf-8")


def test_every_type_has_golden_events() -> None:
    types = {case.event.TYPE for case in golden.cases()}
    assert types == set(envelope.ROUTING_WORDS)


@pytest.mark.parametrize(
    "file", sorted(golden.GOLDEN.glob("*/*/*.json")), ids=lambda file: f"{file.parts[-3]}-{file.stem}"
)
def test_every_event_ever_released_is_still_read(file: golden.Path) -> None:
    released = json.loads(file.read_text(encoding="utf-8"))
    structured = envelope.decode_structured(released["structured"].encode())
    binary = envelope.decode(
        Message(
            binding=Binding.AMQP,
            headers=released["amqp_headers"],
            content_type=released["amqp_content_type"],
            body=released["body"].encode(),
            key=None,
            redelivered=False,
            user_id=None,
            position="golden",
        )
    )
    assert binary == structured
    assert envelope.to_event(structured) is not None
    version = file.parent.name
    assert schema.validate(f"{schema.PREFIX}{file.parts[-3]}:{version}", structured.data) == []


def test_the_recorded_event_on_the_events_page_is_a_golden_one() -> None:
    page = (golden.DATA.parents[1] / "docs" / "events.md").read_text(encoding="utf-8")
    shown = page.partition("## A recorded event")[2].partition("```json\n")[2].partition("```")[0]
    file = golden.GOLDEN / golden.FULL.TYPE / "1.0" / "trixie-stop-enospc-0.json"
    assert json.loads(shown) == json.loads(json.loads(file.read_text(encoding="utf-8"))["structured"])


def test_accepting_golden_events_never_touches_one_that_is_there(
    tmp_path: golden.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "GOLDEN", tmp_path)
    changed = golden.place(golden.cases()[0])
    changed.parent.mkdir(parents=True)
    changed.write_text("as released")
    written = golden.accept()
    assert changed.read_text() == "as released"
    assert len(written) == len(golden.cases()) - 1
