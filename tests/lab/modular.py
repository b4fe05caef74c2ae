"""A modular daemon: virtqemud, which Debian does not ship, built from Debian's own source package of libvirt.

    with Lab(root=modular_root(), daemon=VIRTQEMUD) as lab:          # system mode
        ...

It is built once, in a chroot that is thrown away afterwards (about ten minutes on two cores), kept in .cache/
of the checkout under its version, and stands beside libvirtd in the suite's root. The packages that building
takes are the group `modular` of tests/system-packages.txt; none of them is installed on this machine.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from pathlib import Path

from tests.lab import chroot
from tests.lab.lab import CHECKOUT, Daemon, LabError

SUITE = "bookworm"
VERSION = "9.0.0-4+deb12u2"
PREFIX = "/opt/virtqemud"
SESSION_USER = 107  # KubeVirt's, for guests that do not run as root

VIRTQEMUD = Daemon(f"{PREFIX}/sbin/virtqemud", "virtqemud")
SESSION_VIRTQEMUD = Daemon(f"{PREFIX}/sbin/virtqemud", "virtqemud", user=SESSION_USER)

MIRROR = "http://deb.debian.org/debian"
BUILD = f"""
cd /usr/src
apt-get source --quiet libvirt={VERSION}
cd libvirt-*/
meson setup build --auto-features=disabled --prefix={PREFIX} --sysconfdir=/etc --localstatedir=/var \
  -Drunstatedir=/run -Ddriver_qemu=enabled -Ddriver_remote=enabled -Ddriver_libvirtd=enabled -Dyajl=enabled \
  -Ddocs=disabled -Dtests=disabled -Dnls=disabled -Drpath=enabled -Dqemu_user=root -Dqemu_group=root
ninja -C build
DESTDIR=/usr/src/out meson install -C build --no-rebuild --quiet
find /usr/src/out{PREFIX} -type f -name '*.so*' -exec strip --strip-unneeded {{}} +
strip /usr/src/out{PREFIX}/sbin/*
"""


def packages() -> list[str]:
    """What building takes, as tests/system-packages.txt names it."""
    text = (CHECKOUT / "tests" / "system-packages.txt").read_text()
    lines = text.partition("[modular]\n")[2].partition("\n[")[0].splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def modular_root() -> Path:
    """The suite's root folder, with virtqemud below PREFIX; both are made if they are not there yet."""
    recipe = hashlib.sha256(repr((SUITE, packages(), BUILD)).encode()).hexdigest()[:8]
    folder = CHECKOUT / ".cache" / "modular"
    folder.mkdir(parents=True, exist_ok=True)
    root = chroot.suite_root(SUITE)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = folder / f"virtqemud-{VERSION}-{recipe}"
        if not built.exists():
            _build(folder / "new", built)
        inside = root / PREFIX.lstrip("/")
        mark = inside / "recipe"
        if not mark.exists() or mark.read_text() != recipe:
            shutil.rmtree(inside, ignore_errors=True)
            shutil.copytree(built, inside, symlinks=True)
            mark.write_text(recipe)
    return root


def _build(fresh: Path, built: Path) -> None:
    shutil.rmtree(fresh, ignore_errors=True)
    script = fresh.with_name("build.sh")
    script.write_text(f"set -eu\n{BUILD}")
    try:
        done = subprocess.run(
            ["mmdebstrap", "--quiet", "--mode=root", "--variant=apt", f"--include={','.join(packages())}",
             f"--customize-hook=copy-in {script} /usr/src",
             '--customize-hook=chroot "$1" sh /usr/src/build.sh',
             SUITE, str(fresh), f"deb {MIRROR} {SUITE} main", f"deb-src {MIRROR} {SUITE} main"],
            capture_output=True, text=True, cwd="/", timeout=3600,
        )  # fmt: skip
        if done.returncode:
            raise LabError(
                f"virtqemud {VERSION} can't be built: {(done.stderr or done.stdout).strip()[-2000:]}; if the "
                f"archive has another version by now, name it in {__file__}"
            )
        (fresh / "usr" / "src" / "out" / PREFIX.lstrip("/")).rename(built)
    finally:
        script.unlink(missing_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
