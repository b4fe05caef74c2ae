"""AsyncAPI's own parser takes our document."""

from __future__ import annotations

from tests.conftest import need
from tests.interop.receivers import HERE, JAVASCRIPT, run

DOCUMENT = HERE.parents[1] / "docs" / "asyncapi.json"


def test_the_asyncapi_parser_finds_no_fault_in_the_document() -> None:
    need(JAVASCRIPT.missing())
    told = run(["node", "asyncapi.mjs", str(DOCUMENT)], JAVASCRIPT.built(), timeout=60)
    assert told.startswith("AsyncAPI 3.0.0, ")
