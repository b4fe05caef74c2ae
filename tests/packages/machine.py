"""A fresh Debian that is booted: what debootstrap makes, with its own systemd, processes and loopback.

    with Machine("trixie") as machine:
        machine.run("systemctl is-active dbus")
        machine.run("apt-get install --yes hello", internet=True)

It has no network but its own loopback: a daemon may take its usual port, whatever else runs here. `internet`
lends a single command this machine's network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

from tests.brokers.rabbitmq import wait_until
from tests.lab import chroot
from tests.lab.lab import DISK_BYTES, boot_sector
from tests.packages.root import FOLDER

SECONDS = 600  # for what a machine does: an end to the wait for what never comes
NAME = "fresh"

# cgroups of its own, of version 2 as on any Debian, whatever this machine has.
BOOT = """\
root=$1 name=$2
umount --recursive /sys/fs/cgroup 2>/dev/null || true
mount -t cgroup2 none /sys/fs/cgroup
mkdir "/sys/fs/cgroup/$name"
echo $$ >"/sys/fs/cgroup/$name/cgroup.procs"
exec systemd-nspawn --quiet --boot --directory="$root" --machine="$name" --private-network \
  --register=no --keep-unit --link-journal=no --console=pipe
"""

# A killed systemd-nspawn leaves its machine behind; this namespace ends with its first process and takes all.
ENDS_WITH_US = (
    "setpriv",
    "--pdeathsig=KILL",
    "unshare",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
)

CLEAR = """\
name=$1
umount --recursive /sys/fs/cgroup 2>/dev/null || true
mount -t cgroup2 none /sys/fs/cgroup
cd "/sys/fs/cgroup/$name"
while grep -q 'populated 1' cgroup.events; do sleep 0.1; done
cd /
find "/sys/fs/cgroup/$name" -depth -type d -exec rmdir {} +
find /run/systemd/nspawn -depth -name "$name" -exec rmdir {} +
"""

GUEST = """\
<domain type='qemu'><name>{name}</name><memory unit='MiB'>16</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type></os><devices>
<disk type='file' device='disk'><driver name='qemu' type='raw' error_policy='stop'/><source file='{image}'/>
<target dev='vda' bus='virtio'/><boot order='1'/></disk>
<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>
"""


def missing() -> list[str]:
    """What this machine lacks to boot another one, in words; empty when it can."""
    lacks = chroot.missing()
    if shutil.which("systemd-nspawn") is None:
        lacks.append("systemd-nspawn (Debian package systemd-container)")
    return lacks


class Machine:
    """One machine; a context manager that ends and removes it. `path` is its root as this process sees it."""

    def __init__(self, suite: str) -> None:
        pristine = chroot.suite_root(suite, (), variant="important")
        FOLDER.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{suite}-", dir=FOLDER))
        self._name = self._folder.name.replace("_", "")
        root = self._folder / "root"
        subprocess.run(["cp", "-a", "--reflink=auto", str(pristine), str(root)], check=True)
        # As Debian's installer leaves them.
        (root / "etc/hostname").write_text(f"{NAME}\n")
        (root / "etc/hosts").write_text(f"127.0.0.1\tlocalhost\n127.0.1.1\t{NAME}\n")
        (root / "etc/machine-id").write_text(f"{uuid.uuid4().hex}\n")
        log = self._folder / "console"
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [*ENDS_WITH_US, "sh", "-euc", BOOT, "boot", str(root), self._name],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        try:
            wait_until(self._is_booted, f"{suite} boots ({log} says more)", SECONDS)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Switch it off hard, and remove it."""
        self._process.kill()
        self._process.wait()
        subprocess.run(["unshare", "--mount", "sh", "-euc", CLEAR, "clear", self._name], check=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _is_booted(self) -> bool:
        assert self._process.poll() is None, "the machine ended at its start"
        with suppress(OSError, ValueError):
            state = self.run("systemctl is-system-running", check=False).stdout.strip()
            return state in ("running", "degraded")
        return False

    @property
    def _leader(self) -> int:
        """Its process 1, as this machine numbers it; ValueError before it has one."""
        pid = self._process.pid
        for _ in ("unshare's child is systemd-nspawn", "and that one's is the machine's process 1"):
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
        return pid

    @property
    def path(self) -> Path:
        return Path(f"/proc/{self._leader}/root")

    def command(self, *words: str, internet: bool = False) -> list[str]:
        """What runs `words` inside of it as root, in an empty environment."""
        spaces = ["--mount", "--uts", "--ipc", "--pid", "--cgroup", *([] if internet else ["--net"])]
        clean = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "HOME=/root",
                 "DEBIAN_FRONTEND=noninteractive"]  # fmt: skip
        enter = ["nsenter", f"--target={self._leader}", *spaces, "--root", "--wd"]
        # nsenter waits outside for what it started, which is to end with it.
        return [*enter, *clean, "setpriv", "--pdeathsig=TERM", *words]

    def run(
        self, line: str, *, given: str = "", internet: bool = False, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a line as its root's shell would, in /root; `given` is what is typed then."""
        done = subprocess.run(
            self.command("sh", "-c", f"cd /root && {line}", internet=internet),
            input=given, capture_output=True, text=True,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, f"{line}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    # -- a guest whose thin disk runs full

    def start_guest(self, name: str) -> None:
        """A guest of its libvirt that writes to its disk without end."""
        pool = f"/srv/{name}"
        self.run(f"mkdir {pool} && mount -t tmpfs -o size={2 * DISK_BYTES} pool {pool}")
        image = self.path / f"srv/{name}/disk.img"
        image.write_bytes(boot_sector("bios"))
        os.truncate(image, DISK_BYTES)
        self.run("virsh create /dev/stdin", given=GUEST.format(name=name, image=f"{pool}/disk.img"))

    def fill_disk(self, name: str) -> None:
        """Leave the guest's disk room for a few blocks more."""
        image = f"srv/{name}/disk.img"
        self.run(f"fallocate --punch-hole --offset 4096 --length {DISK_BYTES} /{image}")
        size = (self.path / image).stat().st_blocks * 512 + (64 << 10)
        self.run(f"mount -o remount,size={size} /srv/{name}")
