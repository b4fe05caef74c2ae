"""The script that installs system packages, called twice at once as by two targets of make."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.conftest import need
from tests.lab.lab import CHECKOUT

# Refuses, as apt-get does, to run beside another one.
APT_GET = """\
#!/bin/sh
mkdir "$BUSY" || exit 100
test -e /usr/sbin/policy-rc.d || exit 101
sleep 0.2
rmdir "$BUSY"
case $* in *install*) touch "$BUSY.installed";; esac
"""
DPKG_QUERY = '#!/bin/sh\nif test -e "$BUSY.installed"; then echo installed; else exit 1; fi\n'


def test_two_calls_at_once_install_one_after_the_other(tmp_path: Path) -> None:
    need([] if os.geteuid() == 0 and Path("/var/lib/apt/lists").is_dir() else ["root on Debian"])
    shutil.copy(CHECKOUT / "tests/install-packages", tmp_path)
    (tmp_path / "system-packages.txt").write_text("[demo]\nsomething\n")
    (tmp_path / "bin").mkdir()
    for name, text in (("apt-get", APT_GET), ("dpkg-query", DPKG_QUERY)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "BUSY": str(tmp_path / "busy")}
    calls = [
        subprocess.Popen([tmp_path / "install-packages", "demo"], env=environment, stdout=subprocess.DEVNULL)
        for _ in range(3)
    ]
    assert [call.wait() for call in calls] == [0, 0, 0]
