"""Keep what a release names in one place: the version in virtbus/__init__.py, the repository in pyproject.toml.

python3 .packaging/release.py check [--tag v1.2.3]    does everything agree? (make check; the release workflow)
python3 .packaging/release.py sync                    write both into the files that must repeat them
python3 .packaging/release.py notes 1.2.3             that version's part of CHANGELOG.md
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def version() -> str:
    """The version, from the one place that names it."""
    return re.findall(r'^__version__ = "([^"]+)"$', (ROOT / "virtbus/__init__.py").read_text(), re.MULTILINE)[
        0
    ]


def repository() -> str:
    """The repository's address, from the one place that names it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["urls"]["Repository"]).rstrip("/")


def repeated() -> list[tuple[str, str, str]]:
    """(file, pattern with one group, what the group must be) for every line that repeats version or repository."""
    number, address = version(), repository()
    runbook = "/blob/main/docs/operations.md"
    return [
        ("charts/virtbus/Chart.yaml", r"^version: (.+)$", number),
        ("charts/virtbus/Chart.yaml", r'^appVersion: "(.+)"$', number),
        ("charts/virtbus/Chart.yaml", r"^home: (.+)$", address),
        ("charts/virtbus/Chart.yaml", r"^sources: \[(.+)\]$", address),
        ("charts/virtbus/Chart.yaml", r"^  - name: The virtbus authors\n    url: (.+)$", address),
        ("charts/virtbus/Chart.yaml", r"^icon: (.+)/blob/", address),
        ("Dockerfile", r"^ARG VERSION=(.+)$", number),
        ("charts/virtbus/values.yaml", rf"^  runbookUrl: (.+){runbook}$", address),
        ("charts/virtbus/files/defaults.yaml", rf"^  runbookUrl: (.+){runbook}$", address),
        ("charts/virtbus/README.md", rf'^\| `prometheusRule.runbookUrl` \| `"(.+){runbook}"`', address),
        ("Dockerfile", r"^ARG SOURCE=(.+)$", address),
        ("pyproject.toml", r'^Documentation = "(.+)/tree/main/docs"$', address),
        ("pyproject.toml", r'^Changelog = "(.+)/blob/main/CHANGELOG.md"$', address),
        ("CHANGELOG.md", r"^\[[^]]+\]: (.+)/(?:compare|releases)/", address),
        (".mkdocs.yml", r"^repo_url: (.+)$", address),
        (".packaging/nfpm.yaml", r"^homepage: (.+)$", address),
    ]


def differences() -> list[str]:
    """What does not agree, a line each."""
    wrong = []
    for name, pattern, wanted in repeated():
        found = re.findall(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        if set(found) != {wanted}:
            wrong.append(f"{name}: {' and '.join(found) or f'no line like {pattern}'}; it must be {wanted}")
    return wrong


def drafts() -> list[str]:
    """Schemas that are no promise yet: a release must not send events of them."""
    index = json.loads((ROOT / "schemas/index.json").read_text(encoding="utf-8"))
    return [
        f"schemas/{entry['file']} is a draft, and a release would send it: python schemas/new.py release"
        for entry in index
        if entry["status"] == "draft"
    ]


def pending() -> list[str]:
    """Notes that stand under no version: a release would go out without them."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    noted = text.partition("## [Unreleased]\n")[2].partition("\n## ")[0].strip()
    return ["CHANGELOG.md has notes under [Unreleased]: give them the version's heading"] if noted else []


def sync() -> None:
    """Write version and repository into each of these lines."""
    for name, pattern, wanted in repeated():
        file = ROOT / name
        text = file.read_text(encoding="utf-8")
        matches = list(re.finditer(pattern, text, re.MULTILINE))
        if not matches:
            raise SystemExit(f"{name}: no line like {pattern}; add it")
        for match in reversed(matches):
            text = text[: match.start(1)] + wanted + text[match.end(1) :]
        file.write_text(text, encoding="utf-8")


def notes(number: str) -> str:
    """What CHANGELOG.md says of a version. Raises SystemExit when it says nothing."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    match = re.search(
        rf"^## \[{re.escape(number)}\][^\n]*\n(.*?)(?=^## \[|^\[|\Z)", text, re.MULTILINE | re.DOTALL
    )
    if match is None or not match[1].strip():
        raise SystemExit(f"CHANGELOG.md has no notes of {number}: add a heading '## [{number}] - DATE'")
    return match[1].strip()


def main(words: list[str]) -> int:
    """See the module; 1 when something does not agree."""
    match words:
        case ["check", *tag]:
            wrong = differences()
            if tag and tag != ["--tag", f"v{version()}"]:
                wrong.append(f"the tag is {tag[-1]}, the version is {version()}")
            if tag:
                notes(version())
                wrong += [*drafts(), *pending()]
            for line in wrong:
                print(line, file=sys.stderr)
            if differences():
                print("write them with: python3 .packaging/release.py sync", file=sys.stderr)
            return 1 if wrong else 0
        case ["sync"]:
            sync()
            return 0
        case ["notes", number]:
            print(notes(number))
            return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
