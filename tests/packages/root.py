"""A copy of a Debian suite's root file system, to install a package in as an operator does.

The copy has libvirt and QEMU, as a hypervisor has, and no systemd that runs: `systemctl` is a script that
writes down what the package's own scripts ask for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.lab import chroot
from tests.lab.lab import CHECKOUT

# Copies live here, on the same disk as what they are made from.
FOLDER = CHECKOUT / ".cache" / "roots"

# Mounts of its own, which go with the process. /tmp is this machine's: the lab's sockets lie there.
INSIDE = """\
root=$1; shift
for each in proc sys dev; do mount --rbind /$each "$root/$each"; done
mount --bind /tmp "$root/tmp"
exec chroot "$root" "$@"
"""

SYSTEMCTL = """\
#!/bin/sh
echo "$*" >>/var/log/systemctl
"""


class Root:
    """One copy; a context manager that removes it. `path` is its place on this machine."""

    def __init__(self, suite: str) -> None:
        pristine = chroot.suite_root(suite)
        FOLDER.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=f"{suite}-", dir=FOLDER)) / "root"
        subprocess.run(["cp", "-a", "--reflink=auto", str(pristine), str(self.path)], check=True)
        (self.path / "run/systemd/system").mkdir(parents=True)
        stub = self.path / "usr/bin/systemctl"
        stub.unlink(missing_ok=True)
        stub.write_text(SYSTEMCTL)
        stub.chmod(0o755)

    def __enter__(self) -> Root:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path.parent)

    def command(self, *words: str, user: str = "") -> list[str]:
        """What runs `words` inside of it, as root or as a user of its own, in an empty environment."""
        who = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
        clean = [
            "env",
            "-i",
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL=C.UTF-8",
            "DEBIAN_FRONTEND=noninteractive",
        ]
        return ["unshare", "--mount", "sh", "-euc", INSIDE, "inside", str(self.path), *clean, *who, *words]

    def run(self, *words: str, user: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `words` inside of it to their end."""
        done = subprocess.run(
            self.command(*words, user=user),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if check:
            assert done.returncode == 0, f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def install(self, package: Path) -> str:
        """`dpkg -i` → what it printed."""
        shutil.copy(package, self.path / "root" / package.name)
        done = self.run("dpkg", "-i", f"/root/{package.name}")
        return done.stdout + done.stderr

    def asked_of_systemd(self) -> list[str]:
        """What systemctl was called with since this was last asked."""
        log = self.path / "var/log/systemctl"
        asked = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return asked

    def status(self, package: str) -> str:
        """dpkg's word for a package's state, such as `installed`; empty for one it does not know."""
        told = self.run("dpkg-query", "--show", "--showformat=${db:Status-Status}", package, check=False)
        return told.stdout


def earlier(deb: Path, version: str, folder: Path) -> Path:
    """The same package as an earlier version: what an upgrade starts from."""
    tree = folder / "earlier"
    subprocess.run(["dpkg-deb", "--raw-extract", str(deb), str(tree)], check=True)
    control = tree / "DEBIAN/control"
    lines = control.read_text().splitlines(keepends=True)
    control.write_text(
        "".join(f"Version: {version}-1\n" if line.startswith("Version:") else line for line in lines)
    )
    module = next(tree.glob("opt/virtbus/lib/python3/dist-packages/virtbus/__init__.py"))
    text, changes = re.subn(
        r"^__version__ = .*$", f'__version__ = "{version}"', module.read_text(), flags=re.MULTILINE
    )
    assert changes == 1
    module.write_text(text)
    python = tree / "opt/virtbus/bin/python"
    subprocess.run(
        [str(python), "-I", "-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash",
         str(module)],
        check=True, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    (tree / "DEBIAN/md5sums").unlink(missing_ok=True)
    made = folder / f"virtbus_{version}_earlier.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(made)],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    shutil.rmtree(tree)
    return made
