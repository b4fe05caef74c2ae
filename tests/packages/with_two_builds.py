"""The commit built twice, in two folders, the second time with an interpreter compiled anew: the same bytes.

Part of `make packages-test`; minutes of two processors.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.chart import tools
from tests.conftest import need
from tests.lab.lab import CHECKOUT
from tests.packages.before import git

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

CACHE = CHECKOUT / ".cache" / "packages"
# What a build brings along that no file of a release depends on: downloads, and a tool.
LENT = ("nfpm", "sources")


def build(commit: str, folder: Path, *lent: str) -> dict[str, bytes]:
    """Build the commit in a clone at `folder` → the files of its dist/; `lent` of this checkout's cache."""
    clone = ["clone", "--quiet", "--shared", "--no-checkout", str(CHECKOUT), str(folder)]
    for words in (clone, ["-C", str(folder), "checkout", "--quiet", commit]):
        subprocess.run(["git", *words], check=True)
    cache = folder / ".cache" / "packages"
    cache.mkdir(parents=True)
    for name in lent:
        (cache / name).symlink_to(CACHE / name)
    environment = {**os.environ, "HELM": str(tools.helm("4"))}
    done = subprocess.run(
        ["/usr/bin/python3", ".packaging/build.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {file.name: file.read_bytes() for file in (folder / "dist").iterdir()}


def test_two_builds_of_one_commit_give_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need(tools.missing())
    if not (CHECKOUT / "dist").exists():
        pytest.fail("dist/ is not there: run make dist")
    compiled = [path.name for path in CACHE.glob("python3*") if path.is_dir()]
    assert compiled
    commit = git("rev-parse", "HEAD")  # asked once: another one may follow while the first is built
    first = build(commit, tmp_path / "a" / "checkout", *LENT, *compiled)
    second = build(commit, tmp_path / "elsewhere", *LENT)
    kinds = {name.rpartition(".")[2] for name in first}
    assert kinds == {"whl", "gz", "tgz", "deb", "rpm", "json", "SHA256SUMS"}
    differ = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    assert differ == set()
    with capsys.disabled():
        print(f"\n  the same bytes twice: {', '.join(sorted(first))}", end="")
