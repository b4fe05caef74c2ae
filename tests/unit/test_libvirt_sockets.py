"""A host without libvirt, and a folder of sockets that was removed under a container's mount."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.conftest import need
from virtbus.commands.run import _libvirt_absent
from virtbus.config import Config
from virtbus.sources.sockets import has_socket, serves, socket_folder, was_removed


@pytest.mark.parametrize(
    ("uri", "folder"),
    [
        ("qemu:///system", "/run/libvirt"),
        ("qemu+unix:///system?socket=/x/libvirt-sock-ro", "/x"),
        ("qemu+tls://host/system", None),
        ("qemu:///session", None),
        ("test:///default", None),
    ],
)
def test_the_folder_is_the_one_that_the_uri_means(uri, folder):
    assert socket_folder(uri) == (None if folder is None else Path(folder))


@pytest.mark.parametrize(
    ("uri", "path", "same"),
    [
        ("qemu:///system", "/run/libvirt/libvirt-sock-ro", True),
        ("qemu:///system", "/run/libvirt/virtqemud-sock", True),
        ("qemu:///system", "/run/libvirt/virtlxcd-sock", False),
        ("qemu:///system", "/run/other/virtqemud-sock", False),
        ("qemu:///system?socket=/x/a-sock-ro", "/x/a-sock", True),
        ("qemu:///system?socket=/x/a-sock", "/x/b-sock", False),
        ("qemu+tls://host/system", "/run/libvirt/virtqemud-sock", False),
        ("qemu+unix:///session?socket=/x/virtqemud-sock", "/x/virtqemud-sock", True),
        ("qemu:///session", "/nowhere/libvirt/virtqemud-sock", os.geteuid() != 0),
        ("qemu:///session", "/run/libvirt/libvirt-sock", os.geteuid() == 0),
    ],
)
def test_a_socket_is_that_of_the_daemon_which_the_uri_names(uri, path, same, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")
    assert serves(uri, Path(path)) is same


def test_a_socket_is_the_uris_by_whatever_name(tmp_path):
    path = tmp_path / "virtqemud-sock-ro"
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
    (tmp_path / "other").hardlink_to(path)
    assert serves(f"qemu:///system?socket={tmp_path}/virtqemud-sock", tmp_path / "other")


def _config(tmp_path, *, optional):
    config = Config(state_dir=str(tmp_path))
    uri = f"qemu:///system?socket={tmp_path}/run/libvirt-sock-ro"
    return msgspec.structs.replace(
        config, libvirt=msgspec.structs.replace(config.libvirt, uri=uri, optional=optional)
    )


def test_a_host_without_a_socket_has_no_libvirt_only_where_that_is_allowed(tmp_path):
    assert _libvirt_absent(_config(tmp_path, optional=True))
    assert not _libvirt_absent(_config(tmp_path, optional=False))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "qemu").mkdir()
    assert _libvirt_absent(_config(tmp_path, optional=True))
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(tmp_path / "run" / "libvirt-sock-ro"))
        assert has_socket(tmp_path / "run")
        assert not _libvirt_absent(_config(tmp_path, optional=True))


def test_a_host_whose_libvirt_has_answered_once_is_never_taken_for_one_without(tmp_path):
    (tmp_path / "agent-id").write_text("id\nmachine\nhost\nplace\n")
    assert not _libvirt_absent(_config(tmp_path, optional=True))


@pytest.mark.parametrize("with_uri", [True, False])
def test_a_node_whose_guests_have_daemons_of_their_own_needs_no_libvirt_of_the_host(tmp_path, with_uri):
    """The chart sets both: such an agent was ready, and not counted as cut off, whatever it saw."""
    config = _config(tmp_path, optional=True)
    discover = msgspec.structs.replace(config.libvirt.discover, preset="kubevirt", with_uri=with_uri)
    libvirt = msgspec.structs.replace(config.libvirt, discover=discover)
    assert _libvirt_absent(msgspec.structs.replace(config, libvirt=libvirt)) is with_uri


SCRIPT = """
import os, pathlib, subprocess
from virtbus.sources.sockets import was_removed
host, pod = pathlib.Path({host!r}), pathlib.Path({pod!r})
subprocess.run(["mount", "--bind", host, pod], check=True)
print(was_removed(pod))
host.rmdir(); host.mkdir()
print(was_removed(pod))
"""


def test_a_folder_that_is_removed_and_made_again_under_a_mount_is_noticed(tmp_path):
    need([] if os.geteuid() == 0 else ["root, for a mount"])
    for name in ("host", "pod"):
        (tmp_path / name).mkdir()
    script = SCRIPT.format(host=str(tmp_path / "host"), pod=str(tmp_path / "pod"))
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", script],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["False", "True"]


def test_a_machine_without_mountinfo_has_nothing_stale(tmp_path):
    assert not was_removed(Path("/run/libvirt"), tmp_path / "nothing")
