"""What the image is built from fits the package: every dependency is pinned, and nothing else is copied."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from virtbus import __version__

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = {"agent": ("agent", "kafka"), "react": ("kafka", "kubernetes", "nova")}


def _pinned(name: str) -> dict[str, Version]:
    text = (ROOT / ".docker" / name).read_text(encoding="utf-8")
    return {
        found[1]: Version(found[2]) for found in re.finditer(r"^([a-z0-9.-]+)==([^ ;]+)", text, re.MULTILINE)
    }


@pytest.mark.parametrize("kind", EXTRAS)
def test_every_dependency_of_the_package_is_pinned_at_a_version_it_takes(kind: str) -> None:
    """Renew: `uv pip compile --generate-hashes --universal --extra … pyproject.toml -o .docker/…`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for extra in EXTRAS[kind]:
        wanted += project["optional-dependencies"][extra]
    pinned = _pinned(f"requirements-{kind}.txt")
    for requirement in map(Requirement, wanted):
        assert requirement.name in pinned
        assert pinned[requirement.name] in requirement.specifier
    names = {Requirement(each).name for each in wanted}
    text = (ROOT / ".docker" / f"requirements-{kind}.txt").read_text(encoding="utf-8")
    blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)
    ours = {each.partition("==")[0] for each in blocks if "via virtbus (pyproject.toml)" in each}
    assert ours <= names, "pinned for us, and no dependency of ours"


@pytest.mark.parametrize(
    "name", ["requirements-agent.txt", "requirements-react.txt", "build.txt", "../.packaging/sbom.txt"]
)
def test_every_pinned_package_has_its_hashes(name: str) -> None:
    text = (ROOT / ".docker" / name).read_text(encoding="utf-8")
    blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(_pinned(name)) >= 5
    assert all("--hash=sha256:" in block for block in blocks)


def test_the_base_is_pinned_by_its_digest() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG BASE=\S+@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == [
        "${BASE}",
        "base",
        "base",
        "runtime",
        "runtime",
        "${FOR}",
    ]


def test_every_image_that_a_release_is_built_in_or_with_is_pinned_by_its_digest() -> None:
    named = []
    for file in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        jobs = yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"]
        named += [job["container"]["image"] for job in jobs.values() if "container" in job]
    push = (ROOT / ".packaging" / "push-image").read_text(encoding="utf-8")
    named += re.findall(r"^[a-z]+=(docker\.io/\S+)$", push, re.MULTILINE)
    assert len(named) >= 6
    assert [name for name in named if not re.search(r":\S+@sha256:[0-9a-f]{64}$", name)] == []


MANIFESTS = {"go.mod": "gomod", "package.json": "npm", "pom.xml": "maven", "Dockerfile": "docker"}


def test_dependabot_looks_after_every_list_of_dependencies() -> None:
    told = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text(encoding="utf-8"))["updates"]
    watched = {
        (one["package-ecosystem"], folder)
        for one in told for folder in one.get("directories", [one.get("directory")])
    }  # fmt: skip
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [Path(name) for name in listed.stdout.splitlines()]
    there = {
        (MANIFESTS[file.name], f"/{file.parent}".removesuffix("/.") or "/")
        for file in files if file.name in MANIFESTS
    }  # fmt: skip
    assert watched == there | {
        ("github-actions", "/"),
        ("pip", "/"),
        ("pip", "/.docker"),
        ("pip", "/.packaging"),
    }


def test_the_build_sees_only_what_it_copies() -> None:
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = {
        word for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.MULTILINE) for word in line.split()
    }
    assert copied == allowed


def test_chart_image_and_package_have_one_version_and_one_address() -> None:
    done = subprocess.run(
        [sys.executable, ".packaging/release.py", "check"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


ADDRESS = "https://github.com/virtbus/virtbus"
# What earlier releases said, and what is rendered from the values.
KEPT = ("tests/chart/released/", "tests/chart/golden/", "tests/chart/test_image_files.py")


def _copy_of_what_names(text: str, folder: Path) -> list[Path]:
    """The files of the repository that name it, copied to a folder of their own."""
    told = subprocess.run(["git", "grep", "-lI", text], cwd=ROOT, capture_output=True, text=True, check=True)
    found = [Path(name) for name in told.stdout.splitlines() if not name.startswith(KEPT)]
    for name in {*found, Path("virtbus/__init__.py"), Path(".packaging/release.py")}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return [folder / name for name in found]


def test_the_repositorys_address_is_set_once_and_every_link_follows(tmp_path: Path) -> None:
    files = _copy_of_what_names(ADDRESS, tmp_path)
    project = tmp_path / "pyproject.toml"
    line = f'Repository = "{ADDRESS}"'
    assert line in project.read_text()
    project.write_text(project.read_text().replace(line, 'Repository = "https://git.example/us/agent"'))
    command = [sys.executable, str(tmp_path / ".packaging/release.py")]
    subprocess.run([*command, "sync"], check=True)
    subprocess.run([*command, "check"], check=True)
    assert [str(file) for file in files if ADDRESS in file.read_text()] == []


def test_a_version_that_differs_is_named_with_its_file(tmp_path: Path) -> None:
    _copy_of_what_names(ADDRESS, tmp_path)
    chart = tmp_path / "charts/virtbus/Chart.yaml"
    chart.write_text(re.sub(r"^version: .*$", "version: 9.9.9", chart.read_text(), flags=re.MULTILINE))
    command = [sys.executable, str(tmp_path / ".packaging/release.py")]
    done = subprocess.run([*command, "check"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "charts/virtbus/Chart.yaml: 9.9.9; it must be " in done.stderr
    subprocess.run([*command, "sync"], check=True)
    subprocess.run([*command, "check"], check=True)


def test_a_tag_is_refused_for_a_draft_and_for_notes_without_a_version(tmp_path: Path) -> None:
    _copy_of_what_names(ADDRESS, tmp_path)
    index = tmp_path / "schemas/index.json"
    index.parent.mkdir(exist_ok=True)
    index.write_text(json.dumps([{"file": "x/1.1.json", "status": "draft"}]))
    changes = tmp_path / "CHANGELOG.md"
    heading = "## [Unreleased]\n"
    assert heading in changes.read_text()
    changes.write_text(changes.read_text().replace(heading, f"{heading}\n### Fixed\n\n- A fault.\n"))
    tag = f"v{__version__}"
    command = [sys.executable, str(tmp_path / ".packaging/release.py"), "check", "--tag", tag]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["schemas/x/1.1.json", "CHANGELOG.md"]
