"""The .deb of the commit before the last change to the code: what a real upgrade starts from.

`python -m tests.packages.before [COMMIT]` builds it, once for a commit, and prints its path; without history
it prints nothing and says so.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.lab.lab import CHECKOUT

CACHE = CHECKOUT / ".cache" / "packages"


def git(*words: str) -> str:
    """What git says of this checkout; empty when there is no repository."""
    done = subprocess.run(["git", "-C", str(CHECKOUT), *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def build(commit: str) -> Path:
    """The commit's .deb, built by its own build.py with the interpreter that this checkout compiled."""
    target = CACHE / f"before-{git('rev-parse', '--short=12', commit)}.deb"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "before"
        cloned = ["clone", "--quiet", "--shared", "--no-checkout", str(CHECKOUT), str(clone)]
        for words in (cloned, ["-C", str(clone), "checkout", "--quiet", commit]):
            subprocess.run(["git", *words], check=True)
        cache = clone / ".cache" / "packages"
        cache.mkdir(parents=True)
        for each in CACHE.iterdir():
            (cache / each.name).symlink_to(each)
        command = ["/usr/bin/python3", ".packaging/build.py", "packages"]
        done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the package of {commit}: {done.stderr.strip()}")
        (made,) = (clone / "dist").glob("*.deb")
        for old in CACHE.glob("before-*.deb"):
            old.unlink()
        shutil.copy(made, target)
    return target


def main(words: list[str]) -> None:
    """See the module."""
    changes = words or git("log", "-2", "--format=%H", "--", "virtbus", "schemas").split()[1:]
    if not changes:
        print("no history: the upgrade starts from this code under an earlier version", file=sys.stderr)
        return
    print(f"the upgrade starts from {git('log', '-1', '--format=%h (%s)', changes[0])}", file=sys.stderr)
    print(build(changes[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
