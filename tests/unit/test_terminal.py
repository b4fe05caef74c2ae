"""What others chose (a guest's name, a broker's words) moves no terminal's cursor, and forges no line."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
from click.testing import CliRunner

from virtbus import cli
from virtbus.commands import ask, consume, doctor, fleet
from virtbus.commands import spool as spool_command
from virtbus.errors import ConfigError
from virtbus.fleet import BackendHealth, Blame, FleetView
from virtbus.model import Check

EVIL = "db\x1b[2J\x9b1A\u202egnp.exe\rok\nINFO forged"


def is_tame(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n")) and "\nINFO forged" not in text


def test_status_shows_a_brokers_words_tamely():
    answer = {
        "agent_id": "a", "version": "1", "host": EVIL, "started_at": "now",
        "source": {"state": "connected", "since": "now"}, "bus": {"url": "amqp://h", "error": EVIL},
        "spool": {"pending": 0, "bytes": 0, "oldest_seconds": None, "parked_keys": 0, "dead": 0,
                  "committed_sequence": 0, "confirmed_sequence": 0},
        "incidents": {"open": 0}, "not_ready": [EVIL],
    }  # fmt: skip
    assert "gnp.exe" in ask.table(answer)
    assert is_tame(ask.table(answer))


def test_doctor_shows_them_tamely():
    text = doctor.lines(Check("bus", "failed", EVIL, EVIL), terminal=False, colour=False)
    assert "gnp.exe" in text
    assert is_tame(text)


def test_an_error_line_shows_them_tamely(capsys):
    cli._complain(f"amqp://h: {EVIL.partition(chr(10))[0]}")
    assert is_tame(capsys.readouterr().err)


@pytest.mark.parametrize("rows", [None, 20])
def test_the_fleets_table_shows_hosts_and_reasons_tamely(rows):
    backend = BackendHealth(
        EVIL, "nbd", Blame.BACKEND, f"guests of {EVIL}", False, 0.0, (EVIL,), 1, 1, 1.0, (EVIL,)
    )
    view = FleetView((), (backend,), 0, 1, 1.0, suspect_ourselves=False)
    lines = fleet.table(view, rows=rows, columns=100)
    assert any("gnp.exe" in line for line in lines)
    assert all(line.isprintable() for line in lines)


def test_events_on_a_terminal_are_the_same_json_without_control_characters():
    line = json.dumps({"name": EVIL + "größe \U000e0001"}, ensure_ascii=False)
    shown = consume.escaped(line)
    assert shown.isprintable()
    assert "größe" in shown
    assert json.loads(shown) == json.loads(line)


def test_the_fleets_file_is_never_written_through_a_link(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("kept")
    monkeypatch.setattr("virtbus.commands.fleet.os.getpid", lambda: 7)
    (tmp_path / ".fleet.json.7").symlink_to(tmp_path / "precious")
    fleet._write(tmp_path / "fleet.json", "{}")
    assert (tmp_path / "precious").read_text() == "kept"
    assert (tmp_path / "fleet.json").read_text() == "{}\n"
    (tmp_path / "folder").write_text("")
    with pytest.raises(ConfigError, match="can't be written"):
        fleet._write(tmp_path / "folder" / "fleet.json", "{}")


def test_the_spools_list_shows_a_dead_letters_reason_tamely(tmp_path, monkeypatch):
    entry = spool_command.Listed(
        position=1, id="i", epoch="e", sequence=1, key=EVIL, kind="opened", count=1, bytes=1,
        committed_at="now", age_seconds=1.0, attempts=0, state="dead", why="refused", error=EVIL,
    )  # fmt: skip
    monkeypatch.setattr(spool_command, "_entries", lambda db, dead, limit: [entry])
    monkeypatch.setattr(spool_command, "_reading", lambda folder: closing(_Database()))
    shown = CliRunner().invoke(spool_command.command, ["list", "--dead", "--state-dir", str(tmp_path)]).stdout
    assert "gnp.exe" in shown
    assert is_tame(shown)


class _Database:
    """Says that there is one row."""

    def execute(self, sql: str):
        return self

    def fetchone(self) -> tuple[int]:
        return (1,)

    def close(self) -> None:
        """Nothing to let go of."""
