"""Build the images without a container engine's daemon: buildah, chroot isolation, a base of our own.

The base stands in for the Dockerfile's own (Debian 13 with Python 3.13): made by mmdebstrap once, in about
a minute, and kept in .cache. `python -m tests.chart.image` makes both before a test's own time begins.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.chart.tools import CACHE, ToolMissing
from tests.lab.chroot import PROGRESS

CHECKOUT = Path(__file__).resolve().parents[2]
BASE_PACKAGES = ("python3", "python3-venv", "ca-certificates")
BASE = "localhost/virtbus-test-base:trixie"
IMAGE = "localhost/virtbus:0.1.0"
# What the Dockerfile builds, by its argument FOR.
IMAGES = {"agent": IMAGE, "react": "localhost/virtbus-react:0.1.0"}
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")


def missing() -> list[str]:
    """What this machine lacks to build and run the image, in words."""
    lacks = [] if os.geteuid() == 0 else ["root (buildah's chroot isolation and crun)"]
    lacks += [f"{tool} (Debian package {tool})" for tool in ("buildah", "crun", "mmdebstrap")
              if shutil.which(tool) is None]  # fmt: skip
    return lacks


def buildah(*arguments: str) -> str:
    """Run buildah on a store of our own; returns what it prints. Raises ToolMissing with its last words."""
    done = subprocess.run(
        ["buildah", "--root", str(CACHE / "storage"), "--runroot", "/run/virtbus-tests-buildah",
         "--storage-driver", "overlay", *arguments],
        capture_output=True, text=True, cwd=CHECKOUT,
    )  # fmt: skip
    if done.returncode:
        raise ToolMissing(f"buildah {arguments[0]}: {done.stderr.strip()[-3000:]}")
    return done.stdout.strip()


def build(kind: str = "agent") -> str:
    """The image's name, built from the checkout as it is; layers that did not change are taken again."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "image.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if BASE not in buildah("images", "--format", "{{.Name}}:{{.Tag}}"):
            _make_base()
        buildah(
            "build", "--quiet", "--isolation", "chroot", "--format", "docker", "--pull-never", "--layers",
            "--build-arg", f"BASE={BASE}", "--build-arg", f"FOR={kind}", *_own_authorities(),
            "--tag", IMAGES[kind], ".",
        )  # fmt: skip
    return IMAGES[kind]


def _own_authorities() -> list[str]:
    """Where this machine's certificates are, for pip in the build: a proxy may stand between."""
    if not CA_BUNDLE.exists():
        return []
    return ["--volume", f"{CA_BUNDLE}:/run/build-ca.pem:ro", "--build-arg", "PIP_CERT=/run/build-ca.pem"]


def _make_base() -> None:
    tar = CACHE / "base.tar"
    done = subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=apt", *PROGRESS, "--include", ",".join(BASE_PACKAGES), "trixie",
         str(tar)],
        capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    if done.returncode:
        raise ToolMissing(f"mmdebstrap trixie: {done.stderr.strip()[-2000:]}")
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, str(tar), "/")
    buildah("commit", "--quiet", "--rm", container, BASE)
    tar.unlink()


def size(name: str = IMAGE) -> str:
    """The image's size, unpacked, as the engines print it."""
    return buildah("images", "--format", "{{.Size}}", name)


@contextmanager
def mounted(name: str = IMAGE) -> Iterator[Path]:
    """An image's root file system as a folder; writes go nowhere that lasts."""
    container = buildah("from", "--pull-never", name)
    try:
        yield Path(buildah("mount", container))
    finally:
        buildah("rm", container)


if __name__ == "__main__":
    lacks = missing()
    if lacks:
        raise SystemExit("; ".join(lacks))
    try:
        print(*map(build, IMAGES), sep="\n")
    except ToolMissing as error:
        raise SystemExit(str(error)) from error
