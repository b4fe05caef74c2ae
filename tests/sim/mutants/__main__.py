"""`make sim-mutants`: apply one patch at a time to a copy of virtbus, and tell which seed finds it first."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def main() -> int:
    """Arguments: how many seeds each (300), and names of patches (all). Returns 1 when one was not found."""
    seeds = sys.argv[1] if len(sys.argv) > 1 else "300"
    patches = [HERE / f"{name}.patch" for name in sys.argv[2:]] or sorted(HERE.glob("*.patch"))
    survived = 0
    for patch in patches:
        said = _try(patch, seeds)
        survived += said is None
        print(f"{patch.stem:<28} {said or f'NOT FOUND within {seeds} seeds'}", flush=True)
    return 1 if survived else 0


def _try(patch: Path, seeds: str) -> str | None:
    with tempfile.TemporaryDirectory(prefix="virtbus-mutant-") as folder:
        copy = Path(folder)
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "virtbus", copy / "virtbus", ignore=ignore)
        shutil.copytree(ROOT / "schemas", copy / "schemas", ignore=ignore)
        (copy / "tests").mkdir()
        (copy / "tests" / "__init__.py").touch()
        shutil.copytree(HERE.parent, copy / "tests" / "sim", ignore=ignore)
        subprocess.run(
            ["patch", "--quiet", "-p1", "-i", str(patch)], cwd=copy, check=True, stdout=subprocess.DEVNULL
        )
        out = subprocess.run(
            [sys.executable, "-m", "tests.sim", "--seeds", seeds, "--stop"],
            cwd=copy,
            capture_output=True,
            text=True,
        ).stdout
        found = re.search(r"^BROKEN  (seed \d+: .*)$", out, re.MULTILINE)
        return found[1][:110] if found else None


if __name__ == "__main__":
    sys.exit(main())
