"""An agent whose mount of libvirt's folder went stale ends with the reason, to be started again."""

import os
import subprocess
import sys

from tests.conftest import need

SCRIPT = """
import pathlib, subprocess, sys
host, pod, agent = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:]
subprocess.run(["mount", "--bind", host, pod], check=True)
with subprocess.Popen(agent, stderr=subprocess.PIPE, text=True) as process:
    for line in process.stderr:
        print(line, end="")
        if "agent started" in line:
            host.rmdir(); host.mkdir()
sys.exit(process.returncode)
"""


def test_an_agent_with_a_stale_folder_of_sockets_ends_to_be_started_again(tmp_path):
    need([] if os.geteuid() == 0 else ["root, for a mount"])
    for name in ("host", "pod", "state"):
        (tmp_path / name).mkdir()
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", SCRIPT,
         tmp_path / "host", tmp_path / "pod", sys.executable, "-m", "virtbus", "run",
         "--libvirt", f"qemu:///system?socket={tmp_path}/pod/libvirt-sock-ro",
         "--bus", f"embedded://{tmp_path}/bus.db", "--state-dir", tmp_path / "state",
         "--http-listen", "", "--control-socket", ""],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 75, done.stdout
    assert f"{tmp_path}/pod was removed on the host" in done.stdout
