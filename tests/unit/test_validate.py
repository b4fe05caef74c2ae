"""`virtbus validate` tells everything that is wrong, streams, and ends with the right code."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests import golden
from virtbus import envelope
from virtbus.commands.schema import validate
from virtbus.errors import SchemaError

LINE = envelope.structured_json(*envelope.encode(golden.FULL, golden.stamp(1)))


def event(**changes: Any) -> dict[str, Any]:
    return {**json.loads(LINE), **changes}


def run(*files: str, stdin: bytes = b"", **options: Any) -> tuple[int, str]:
    out = io.StringIO()
    code = validate(files, out, stdin=io.BytesIO(stdin), **options)
    return code, out.getvalue()


def check(*events: object) -> tuple[int, str]:
    return run("-", stdin=b"\n".join(json.dumps(e).encode() for e in events))


@pytest.mark.parametrize("case", golden.cases(), ids=lambda case: case.name)
def test_what_we_send_is_valid(case: golden.Case) -> None:
    line = envelope.structured_json(*envelope.encode(case.event, case.stamp))
    assert run("-", stdin=line) == (0, "1 checked, 0 invalid\n")


def test_all_errors_of_an_event_are_told_at_once() -> None:
    bad = event(epoch="x", sequence=3)
    bad["data"]["host"]["name"] = None
    del bad["data"]["origin"]
    code, told = check(bad)
    assert code == 65
    assert told.splitlines() == [
        "-:1: /epoch: expected text that matches "
        '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$, found "x"',
        "-:1: /sequence: expected string, found 3",
        "-:1: /data/host/name: expected string, found null",
        "-:1: /data/origin: expected a value (null when unknown), found nothing",
        "1 checked, 1 invalid",
    ]


def test_json_format_gives_an_object_an_invalid_event_and_a_summary() -> None:
    out = io.StringIO()
    stdin = LINE + b"\n" + json.dumps(event(id="")).encode()
    assert validate(["-"], out, fmt="json", stdin=io.BytesIO(stdin)) == 65
    invalid, summary = map(json.loads, out.getvalue().splitlines())
    assert (invalid["file"], invalid["line"]) == ("-", 2)
    assert invalid["problems"][0]["pointer"] == "/id"
    assert set(invalid["problems"][0]) == {"pointer", "expected", "found", "message"}
    assert summary == {"summary": {"checked": 2, "invalid": 1, "unreadable": 0}}


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"specversion": "0.3"}, "/specversion"),
        ({"Foo": "x"}, "/Foo"),
        ({"tags": ["x"]}, "/tags"),
        ({"note": "a\nb"}, "/note"),
        ({"dataschema": "urn:virtbus:schema:io.virtbus.agent.gap.v1:1.0"}, "/dataschema"),
        ({"dataschema": "urn:virtbus:schema:io.virtbus.domain.io_error.v1:7.0"}, "/dataschema"),
        ({"data": None}, "/data"),
    ],
)
def test_a_wrong_envelope_is_told_with_its_place(changes: dict[str, Any], pointer: str) -> None:
    code, told = check(event(**changes))
    assert code == 65
    assert f"-:1: {pointer}: expected " in told


def test_a_later_minor_version_is_valid() -> None:
    later = event(dataschema="urn:virtbus:schema:io.virtbus.domain.io_error.v1:1.9", added="x")
    later["data"]["added"] = 1
    assert check(later)[0] == 0


def test_a_document_over_many_lines_is_one_event() -> None:
    assert run("-", stdin=json.dumps(event(), indent=2).encode()) == (0, "1 checked, 0 invalid\n")


def test_a_broken_line_does_not_stop_the_others() -> None:
    code, told = run("-", stdin=b'{"oops\n\n' + LINE + b"\n[]\n" + LINE)
    assert code == 65
    assert told.splitlines()[-1] == "4 checked, 2 invalid"
    assert "-:1: /: expected JSON" in told
    assert "-:4: /: expected object, found []" in told


@pytest.mark.parametrize(
    "raw", [b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}", b'{"a":"\\ud800"}', b"\xff\xfe"]
)
def test_what_no_parser_takes_is_told_and_no_crash(raw: bytes) -> None:
    code, told = run("-", stdin=raw + b"\n" + LINE)
    assert code == 65
    assert told.splitlines()[-1] == "2 checked, 1 invalid"


def test_data_of_a_named_schema_is_checked_without_an_envelope() -> None:
    data = json.dumps(event()["data"]).encode()
    assert run("-", stdin=data, schema_name=golden.FULL.TYPE)[0] == 0
    assert run("-", stdin=data, schema_name="urn:virtbus:schema:io.virtbus.agent.gap.v1:1.0")[0] == 65


def test_an_unknown_schema_is_an_error() -> None:
    with pytest.raises(SchemaError, match="no schema"):
        run("-", stdin=LINE, schema_name="nothing.like.it")


def test_a_file_that_can_not_be_read_ends_with_66_and_the_others_are_checked(tmp_path: Path) -> None:
    good = tmp_path / "good.jsonl"
    good.write_bytes(LINE)
    code, told = run(str(tmp_path / "missing"), str(tmp_path), str(good))
    assert code == 66
    assert f"can't read {tmp_path}/missing" in told
    assert "1 checked, 0 invalid" in told


def test_nothing_to_check_is_not_success() -> None:
    assert run("-", stdin=b"\n\n") == (65, "nothing to check: no event was found\n")


def test_a_line_without_end_is_refused_in_bounded_memory() -> None:
    class Endless(io.RawIOBase):
        left = 64 * 1024 * 1024

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            size = min(len(buffer), self.left)
            buffer[:size] = b"x" * size
            self.left -= size
            return size

    tracemalloc.start()
    code = validate(["-"], io.StringIO(), stdin=io.BufferedReader(Endless()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert code == 65
    assert peak < 16 * 1024 * 1024


def test_memory_stays_flat_over_many_events() -> None:
    def peak(lines: int) -> int:
        class Lines(io.RawIOBase):
            left = lines
            rest = b""

            def readable(self) -> bool:
                return True

            def readinto(self, buffer: Any) -> int:
                if not self.rest and self.left:
                    self.rest, self.left = LINE + b"\n", self.left - 1
                size = min(len(buffer), len(self.rest))
                buffer[:size], self.rest = self.rest[:size], self.rest[size:]
                return size

        tracemalloc.start()
        assert validate(["-"], io.StringIO(), stdin=io.BufferedReader(Lines())) == 0
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(10)
    assert peak(3000) < peak(100) + 64 * 1024
