"""`virtbus agent-id`: there before the first start; another machine's is not taken for its own."""

from __future__ import annotations

import os
import pwd
import uuid
from pathlib import Path

import pytest

from tests.agent.process import virtbus
from virtbus.agent.identity import is_of_another_machine, load_agent_id
from virtbus.spool import Spool, SpoolLimits, prepare_state_dir


def agent_id(folder: Path, *words: str) -> tuple[int, str, str]:
    done = virtbus("agent-id", "--state-dir", str(folder), *words)
    return done.returncode, done.stdout.strip(), done.stderr


def test_the_id_that_is_made_is_the_one_that_the_agent_finds(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    code, made, _ = agent_id(folder, "--create", "--user", pwd.getpwuid(os.geteuid()).pw_name)
    assert code == 0
    assert str(uuid.UUID(made)) == made
    assert agent_id(folder, "--create")[:2] == (0, made)
    assert agent_id(folder)[:2] == (0, made)
    assert load_agent_id(folder) == (made, None)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_without_one_it_says_how_to_make_it(tmp_path: Path) -> None:
    code, out, err = agent_id(tmp_path)
    assert (code, out) == (66, "")
    assert f"{tmp_path}/agent-id holds no id" in err
    assert "--create" in err
    assert not (tmp_path / "agent-id").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_root_makes_belongs_to_the_agents_user(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    assert agent_id(folder, "--create", "--user", "daemon")[0] == 0
    owner = pwd.getpwnam("daemon").pw_uid
    assert [path.stat().st_uid for path in (folder, folder / "agent-id")] == [owner, owner]
    # A folder that was there keeps its owner, and decides.
    (folder / "agent-id").unlink()
    assert agent_id(folder, "--create", "--user", "bin")[0] == 0
    assert (folder / "agent-id").stat().st_uid == owner


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_an_unknown_user_leaves_nothing_behind(tmp_path: Path) -> None:
    code, out, err = agent_id(tmp_path / "state", "--create", "--user", "nobody-knows")
    assert (code, out) == (78, "")
    assert "no user 'nobody-knows'" in err
    assert not (tmp_path / "state").exists()


def test_an_agent_that_is_refused_the_folder_leaves_its_id_alone(tmp_path: Path) -> None:
    other = tmp_path / "machine-id"
    other.write_text("00000000000000000000000000000001\n")
    state = tmp_path / "state"
    prepare_state_dir(state)
    theirs, _ = load_agent_id(state, machine_id_file=other)
    before = (state / "agent-id").read_text()
    if not is_of_another_machine(state):
        pytest.skip("this machine has no machine-id")
    words = ("--libvirt", "test:///default", "--bus", f"embedded://{tmp_path}/bus.db", "--http-listen", "")
    spool = Spool.open(state, limits=SpoolLimits(), agent_id=theirs)  # that machine's agent, on a shared disk
    try:
        refused = virtbus("run", *words, "--state-dir", str(state))
    finally:
        spool.close()
    assert refused.returncode != 0
    assert "stop it first" in refused.stderr
    assert (state / "agent-id").read_text() == before


def test_a_cloned_disks_id_is_refused_and_kept(tmp_path: Path) -> None:
    other = tmp_path / "machine-id"
    other.write_text("00000000000000000000000000000001\n")
    theirs, _ = load_agent_id(tmp_path, machine_id_file=other)
    before = (tmp_path / "agent-id").read_text()
    assert is_of_another_machine(tmp_path) is Path("/etc/machine-id").exists()
    if not is_of_another_machine(tmp_path):
        pytest.skip("this machine has no machine-id")
    code, out, err = agent_id(tmp_path, "--create")
    assert (code, out) == (78, "")
    assert "another machine" in err
    assert (tmp_path / "agent-id").read_text() == before
    assert agent_id(tmp_path)[1] == theirs
