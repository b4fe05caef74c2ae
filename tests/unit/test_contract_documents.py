"""The AsyncAPI document and the field tables are made from the schemas, and the copies in docs are fresh."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from docs import generate
from virtbus import schema
from virtbus.cli import main
from virtbus.envelope import ROUTING_WORDS
from virtbus.errors import SchemaError

DOCS = Path(__file__).parents[2] / "docs"


def virtbus(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What the command line says and ends with, in this process: another one costs a third of a second."""
    with CliRunner().isolation() as (out, err, _), pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert isinstance(ended.value.code, int)
    said = (stream.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(arguments, ended.value.code, *said)


@pytest.mark.parametrize("name", ["asyncapi.json", "events.md", "configuration.md"])
def test_what_is_generated_is_fresh(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    assert generate.documents()[name] == text, "run `python docs/generate.py`"


def test_the_events_page_shows_every_generated_block() -> None:
    page = (DOCS / "events.md").read_text(encoding="utf-8")
    assert [name for name in generate.blocks() if f"<!-- generated: {name} -->" not in page] == []


def test_a_stale_table_is_renewed_and_the_text_around_it_kept() -> None:
    renewed = generate.renewed("before\n<!-- generated: types -->\nstale\n<!-- end -->\nafter\n")
    assert renewed.startswith("before\n")
    assert renewed.endswith("after\n")
    assert "stale" not in renewed
    assert "io.virtbus.agent.gap.v1" in renewed


def test_a_marker_of_no_block_is_an_error() -> None:
    with pytest.raises(SchemaError, match="no generated block 'nonsense'"):
        generate.renewed("<!-- generated: nonsense -->\n<!-- end -->")


def test_every_event_type_is_a_message_of_both_channels() -> None:
    document = generate.asyncapi_document()
    for channel in ("amqp", "kafka"):
        assert set(document["channels"][channel]["messages"]) == {*ROUTING_WORDS.values(), "structured"}


def test_every_reference_of_the_asyncapi_document_leads_somewhere() -> None:
    document = generate.asyncapi_document()
    text = json.dumps(document)
    for reference in set(re.findall(r'"\$ref": "#/([^"]+)"', text)):
        node = document
        for part in reference.split("/"):
            node = node[part]


# --------------------------------------------------------------------------------------- the command line


def test_schema_list_names_every_schema() -> None:
    told = virtbus("schema", "list")
    assert told.returncode == 0
    assert [line.split()[0] for line in told.stdout.splitlines()] == [e.id for e in schema.entries()]


def test_schema_show_prints_the_file_byte_for_byte() -> None:
    entry = schema.latest("io.virtbus.agent.gap.v1")
    assert virtbus("schema", "show", entry.type).stdout.encode() == schema.text(entry.id)
    assert virtbus("schema", "show", entry.id).stdout.encode() == schema.text(entry.id)


def test_schema_show_of_what_is_not_there_ends_with_65() -> None:
    told = virtbus("schema", "show", "urn:virtbus:schema:io.virtbus.agent.gap.v1:1.77")
    assert told.returncode == 65
    assert "no schema" in told.stderr


def gate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "schemas/check.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=DOCS.parent, timeout=60)


def test_an_export_passes_the_gate_until_a_file_changes(tmp_path: Path) -> None:
    assert virtbus("schema", "export", str(tmp_path)).returncode == 0
    assert gate(str(tmp_path), "--released", str(tmp_path)).returncode == 0
    (tmp_path / "envelope" / "1.0.json").write_text("{}")
    told = gate(str(tmp_path))
    assert told.returncode == 65
    assert "envelope/1.0.json" in told.stdout


def test_the_gate_of_no_folder_ends_with_66() -> None:
    assert gate("/nowhere").returncode == 66


def test_the_package_carries_every_schema() -> None:
    """A new type is named in pyproject.toml, for the gate beside the schemas stays out of the package."""
    told = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    included = told["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    wanted = ["schemas/index.json", *(f"schemas/{entry.type}" for entry in schema.entries())]
    assert included == {name: f"virtbus/_{name}" for name in wanted}


def test_validate_ends_with_the_documented_codes(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(schema.load(schema.ENVELOPE)["examples"][0]))
    bad.write_text("{}")
    assert [virtbus("validate", str(file)).returncode for file in (good, bad, tmp_path / "none")] == [
        0,
        65,
        66,
    ]
