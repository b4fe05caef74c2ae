"""Where a FIFO, a socket, a folder or a dead link stands in a state file's place, nothing is opened."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.spool_kit import open_spool
from virtbus import statefiles
from virtbus.agent.identity import load_agent_id, read_agent_id, was_tied
from virtbus.bus.embedded.log import Log
from virtbus.errors import BusDenied, ConfigError, SpoolCorrupt, SpoolFull, StateUnavailable
from virtbus.integrations.store import ActionStore
from virtbus.marks import Marks
from virtbus.spool import files, opening


def a_socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)  # the address of a socket is at most 107 bytes long
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


KINDS: dict[str, Callable[[Path], None]] = {
    "a FIFO": os.mkfifo,
    "a socket": a_socket,
    "a directory": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/null"),
    "a symbolic link that leads nowhere": lambda path: path.symlink_to("gone"),
}
BESIDE = ("", "-wal", "-shm", "-journal")


def test_a_link_into_a_folder_that_we_may_not_enter_is_reported_by_who_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file may be whole: an operator who is asked to move the link away would lose it."""
    (tmp_path / "spool.db").symlink_to(tmp_path / "private" / "spool.db")

    def denied(self: Path, **_: object) -> os.stat_result:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", denied)
    statefiles.check(tmp_path / "spool.db")


@pytest.fixture(params=KINDS)
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """Puts one odd thing at a name in the folder → the line's words that say so."""

    def put(name: str) -> str:
        KINDS[request.param](tmp_path / name)
        return f"{name} is {request.param}"

    return put


def unchanged(folder: Path) -> list[tuple[str, int]]:
    return sorted((each.name, each.lstat().st_mode) for each in folder.iterdir())


@pytest.mark.parametrize(
    "name", ["lock", "spool.db.suspect", "spool.db.probe", *(f"spool.db{end}" for end in BESIDE)]
)
def test_the_spool_is_not_opened(odd: Callable[[str], str], tmp_path: Path, name: str) -> None:
    told, before = odd(name), unchanged(tmp_path)
    with pytest.raises(SpoolFull, match="not a regular file: move it away") as raised:
        open_spool(tmp_path)
    assert told in str(raised.value)
    assert raised.value.exit_code == 74
    assert unchanged(tmp_path) == before


def test_the_agents_id_is_not_read(odd: Callable[[str], str], tmp_path: Path) -> None:
    told = odd("agent-id")
    with pytest.raises(SpoolFull) as raised:
        load_agent_id(tmp_path)
    assert told in str(raised.value)
    assert (read_agent_id(tmp_path), was_tied(tmp_path)) == (None, False)


@pytest.mark.parametrize("name", ["lock", *(f"spool.db{end}" for end in BESIDE)])
def test_whoever_only_looks_does_not_wait_either(
    odd: Callable[[str], str], tmp_path: Path, name: str
) -> None:
    with files.new_database(tmp_path / "spool.db"):
        pass
    (tmp_path / name).unlink(missing_ok=True)
    told = odd(name)
    if name == "lock":
        assert files.read_holder(tmp_path) == files.Holder()
        return
    with pytest.raises(statefiles.NotRegular) as raised:
        files.connect_to_read(tmp_path / "spool.db")
    assert told in str(raised.value)


@pytest.mark.parametrize("name", ["seen.db.lock", *(f"seen.db{end}" for end in BESIDE)])
def test_a_dedupe_file_is_refused(odd: Callable[[str], str], tmp_path: Path, name: str) -> None:
    told, before = odd(name), unchanged(tmp_path)
    with pytest.raises(ConfigError) as raised:
        Marks(tmp_path / "seen.db", "scope", 10)
    assert told in str(raised.value)
    assert unchanged(tmp_path) == before


@pytest.mark.parametrize("name", ["exec.lock", *(f"exec.db{end}" for end in BESIDE)])
def test_a_reactors_store_is_refused(odd: Callable[[str], str], tmp_path: Path, name: str) -> None:
    told, before = odd(name), unchanged(tmp_path)
    with pytest.raises(StateUnavailable) as raised:
        ActionStore(tmp_path / "exec.db")
    assert told in str(raised.value)
    assert raised.value.exit_code == 74
    assert unchanged(tmp_path) == before


@pytest.mark.parametrize("name", ["bus.db.lock", *(f"bus.db{end}" for end in BESIDE)])
def test_an_embedded_bus_is_refused(odd: Callable[[str], str], tmp_path: Path, name: str) -> None:
    told, before = odd(name), unchanged(tmp_path)
    with pytest.raises(BusDenied) as raised:
        Log(tmp_path / "bus.db")
    assert told in str(raised.value)
    assert unchanged(tmp_path) == before


def test_a_link_to_a_regular_file_is_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    statefiles.check(tmp_path / "file", tmp_path / "link", tmp_path / "absent")


def test_damage_that_outlives_a_new_file_is_reported_as_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*arguments: object, **more: object) -> None:
        raise files.Damaged("seen")

    monkeypatch.setattr(opening, "_begin", damaged)
    with pytest.raises(SpoolCorrupt, match=r"spool\.db can't be used \(seen\)"):
        open_spool(tmp_path)
