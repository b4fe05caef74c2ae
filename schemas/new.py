"""What of a new schema version can be generated: `python schemas/new.py next TYPE | renew | release`.

next TYPE   the next minor of an event type (or of `envelope`), as a draft: file, `$id`, entry in index.json
renew       after a change of a draft: its hash in index.json, its golden events, the documents; then the gate
release     at the release that sends them: drafts become `released`, tests/unit/test_schema.py pins them

schemas/README.md says what is left to write by hand.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from virtbus.errors import VirtbusError
from virtbus.schema import PREFIX, read_index

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
GOLDEN = ROOT / "tests/data/golden"
PINS = ROOT / "tests/unit/test_schema.py"
_PINNED = re.compile(r"^(RELEASED: dict\[str, str\] = \{)([^}]*)\}", re.MULTILINE)


def add_next(folder: Path, type_: str) -> Path:
    """Copy the newest minor of a type to the next one, a draft. Raises SystemExit for an unknown type."""
    versions = [entry for entry in read_index(folder) if entry.type == type_]
    if not versions:
        known = ", ".join(sorted({entry.type for entry in read_index(folder)}))
        raise SystemExit(f"no schema of type {type_}; known: {known}")
    newest = versions[-1]
    if newest.status == "draft":
        raise SystemExit(f"{newest.file} is a draft: change that one, then `python schemas/new.py renew`")
    version = f"{newest.order[0]}.{newest.order[1] + 1}"
    made = folder / type_ / f"{version}.json"
    urn = f"{PREFIX}{type_}:{version}"
    text = (folder / newest.file).read_text(encoding="utf-8")
    made.write_text(text.replace(f'"$id": "{newest.id}"', f'"$id": "{urn}"', 1), encoding="utf-8")
    index = _index(folder)
    index.append({"id": urn, "type": type_, "version": version, "file": f"{type_}/{made.name}",
                  "sha256": _hash(made), "status": "draft"})  # fmt: skip
    _write_index(folder, index)
    return made


def rehash(folder: Path) -> list[str]:
    """Give the drafts that changed their hashes in index.json → their files, as index.json names them."""
    index, changed = _index(folder), []
    for entry in index:
        now = _hash(folder / entry["file"])
        if entry["status"] == "draft" and entry["sha256"] != now:
            entry["sha256"] = now
            changed.append(entry["file"])
    _write_index(folder, index)
    return changed


def release(folder: Path, pins: Path) -> list[str]:
    """Mark every draft as released, and pin its hash in the test → the ids."""
    index, lines = _index(folder), []
    for entry in index:
        if entry["status"] == "draft":
            entry["status"], entry["sha256"] = "released", _hash(folder / entry["file"])
            lines.append((entry["id"], f'    "{entry["id"]}":\n        "{entry["sha256"]}",\n'))
    new = "".join(line for _, line in lines)
    text = pins.read_text(encoding="utf-8")
    pinned = _PINNED.sub(lambda found: f"{found[1]}\n{found[2][1:]}{new}}}" if new else found[0], text)
    pins.write_text(pinned, encoding="utf-8")
    _write_index(folder, index)
    return [id_ for id_, _ in lines]


def _renew() -> int:
    for file in rehash(HERE):
        print(f"{file}: hash renewed")
        shutil.rmtree(GOLDEN / file.removesuffix(".json"), ignore_errors=True)
    for command in (["-m", "tests.golden"], ["docs/generate.py"], ["schemas/check.py"]):
        code = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
        if code:
            return code
    return 0


def _index(folder: Path) -> list[dict[str, Any]]:
    index: list[dict[str, Any]] = json.loads((folder / "index.json").read_bytes())
    return index


def _write_index(folder: Path, index: list[dict[str, Any]]) -> None:
    index.sort(key=lambda entry: (entry["type"], [int(part) for part in entry["version"].split(".")]))
    (folder / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main(words: list[str]) -> int:
    """See the module; the exit code."""
    try:
        match words:
            case ["next", type_]:
                print(f"{add_next(HERE, type_).relative_to(ROOT)} written: see schemas/README.md")
                return 0
            case ["renew"]:
                return _renew()
            case ["release"]:
                print("\n".join(f"{id_} released" for id_ in release(HERE, PINS)) or "there is no draft")
                return 0
    except VirtbusError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(__doc__, file=sys.stderr)
    return 64


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
