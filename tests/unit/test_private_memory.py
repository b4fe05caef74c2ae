"""A process that holds the broker's password is closed to its neighbours of the same uid."""

import os
import subprocess
import sys

import pytest

from tests.conftest import need

NOBODY = 65534
HOLD = """
import ctypes, os, sys
from virtbus.commands.common import keep_memory_private
os.setgroups([]), os.setresgid({user}, {user}, {user}), os.setresuid({user}, {user}, {user})
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as exec leaves it: a change of uid alone takes it away
{call}
os.write(1, b"ready\\n")
sys.stdin.read()
"""


@pytest.mark.parametrize(("call", "readable"), [("", True), ("keep_memory_private()", False)])
def test_a_neighbour_of_the_same_uid_reads_neither_environment_nor_memory(call, readable):
    need([] if os.geteuid() == 0 else ["root, to become another user"])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(call=call, user=NOBODY)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "ready\n"
        for name in ("environ", "maps"):
            neighbour = subprocess.run(
                ["/usr/bin/head", "-c0", f"/proc/{holder.pid}/{name}"],
                user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, check=False,
            )  # fmt: skip
            assert (neighbour.returncode == 0) is readable, name
    finally:
        holder.communicate(timeout=30)
