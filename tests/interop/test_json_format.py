"""Every event in structured mode fits the CloudEvents project's own JSON format schema, from its SDK."""

from __future__ import annotations

import json

from tests import golden
from tests.conftest import need
from tests.interop.receivers import JAVASCRIPT, run
from virtbus import envelope


def verdicts(lines: list[bytes]) -> list[str]:
    need(JAVASCRIPT.missing())
    told = run(["node", "json_format.mjs"], JAVASCRIPT.built(), timeout=60, stdin=b"\n".join(lines).decode())
    return told.splitlines()


def structured(case: golden.Case) -> bytes:
    return envelope.structured_json(*envelope.encode(case.event, case.stamp))


def test_every_golden_event_fits_the_cloudevents_json_format_schema() -> None:
    lines = [structured(case) for case in golden.cases()]
    assert verdicts(lines) == ["valid"] * len(lines)


def test_that_schema_does_refuse_what_is_no_event() -> None:
    event = json.loads(structured(golden.cases()[0]))
    without_id = {name: value for name, value in event.items() if name != "id"}
    bad_time = {**event, "time": "yesterday"}
    first, second = verdicts([json.dumps(bad).encode() for bad in (without_id, bad_time)])
    assert "id" in first
    assert "/time" in second
