"""The release workflow's steps on what `make dist` left in dist/, up to the upload.

A package index and an OCI registry on loopback, and an OCI layout in a folder, take what it publishes. What
can't be tried here: the hosted parts (trusted publishing, attestations, the release page), and the images for
64-bit ARM, which take emulation.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.chart import helm, image, tools
from tests.conftest import need
from tests.lab.lab import CHECKOUT
from tests.packages.with_packages import DIST
from tests.ports import free_ports
from virtbus import __version__

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

WORKFLOW = yaml.safe_load((CHECKOUT / ".github/workflows/release.yml").read_text())["jobs"]
TAG = f"v{__version__}"
PYPI = "https://pypi.org/simple"
INDEX = ("pypiserver==2.4.1", "twine==6.2.0")
REGISTRY = """\
version: 0.1
storage: {{filesystem: {{rootdir: {folder}}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


def steps(job: str) -> list[str]:
    """The commands of a job, as the workflow has them."""
    return [step["run"] for step in WORKFLOW[job]["steps"] if "run" in step]


def run(*command: str | Path, cwd: Path = CHECKOUT, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Writes a line of the rehearsal's story, past pytest's capture."""

    def write(line: str) -> None:
        with capsys.disabled():
            print(f"\n  {line}", end="", flush=True)

    return write


@contextmanager
def server(url: str, *command: str | Path) -> Iterator[None]:
    """A server that answers on `url`."""
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, command
            try:
                urllib.request.urlopen(url, timeout=5).close()
            except OSError:
                assert time.monotonic() < deadline, url
                time.sleep(0.2)
            else:
                break
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real OCI registry (Debian's docker-registry) → its host and port."""
    folder = tmp_path_factory.mktemp("registry")
    (port,) = free_ports(1)
    config = folder / "config.yml"
    config.write_text(REGISTRY.format(folder=folder / "storage", port=port))
    program = tools.debian("docker-registry")
    with server(f"http://127.0.0.1:{port}/v2/", program, "serve", config):
        yield f"127.0.0.1:{port}"


def test_the_tag_is_the_version_and_has_notes(tell: Callable[[str], None]) -> None:
    check = next(step for step in steps("build") if "release.py" in step)
    assert check == 'python3 .packaging/release.py check --tag "$GITHUB_REF_NAME"'
    done = subprocess.run(
        [sys.executable, ".packaging/release.py", "check", "--tag", TAG],
        cwd=CHECKOUT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    index = json.loads((CHECKOUT / "schemas/index.json").read_text())
    drafts = [entry["file"] for entry in index if entry["status"] == "draft"]
    changes = (CHECKOUT / "CHANGELOG.md").read_text()
    noted = changes.partition("## [Unreleased]\n")[2].partition("\n## ")[0].strip()
    # Between two releases each draft stops one, by name, and so do notes without a version; nothing else.
    stops = [*(f"schemas/{file}" for file in drafts), *(["CHANGELOG.md"] if noted else [])]
    assert done.returncode == (1 if stops else 0), done.stderr
    assert [line.split()[0] for line in done.stderr.splitlines()] == stops
    notes = next(step for step in steps("release") if "notes" in step)
    assert 'release.py notes "${GITHUB_REF_NAME#v}"' in notes
    text = run(sys.executable, ".packaging/release.py", "notes", __version__)
    assert "### Added" in text
    frozen = [entry["id"].rpartition("schema:")[2] for entry in index if entry["status"] == "released"]
    tell(f"{TAG}: schemas released: {', '.join(frozen)}; held back by: {', '.join(stops) or 'nothing'}")
    tell(f"{TAG}: chart, Dockerfile and package have this version; notes: {len(text.splitlines())} lines")


def test_the_checksums_are_those_of_the_files(tell: Callable[[str], None]) -> None:
    told = run("sha256sum", "--check", "--strict", "SHA256SUMS", cwd=DIST)
    tell(f"sha256sum: {', '.join(told.splitlines())}")
    kinds = (".deb", ".rpm", ".whl", ".tar.gz", ".tgz", ".cdx.json")
    assert [kind for kind in kinds if f"{kind}: OK" not in told] == []


def test_wheel_and_sdist_are_uploaded_to_an_index_and_installed_from_it(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    assert steps("pypi") == ["mkdir upload && mv dist/*.whl dist/*.tar.gz upload/"]
    upload = tmp_path / "upload"
    upload.mkdir()
    for file in [*DIST.glob("*.whl"), *DIST.glob("*.tar.gz")]:
        shutil.copy(file, upload)
    tool, packages = tmp_path / "tool", tmp_path / "packages"
    packages.mkdir()
    run(sys.executable, "-m", "venv", tool)
    run(tool / "bin/pip", "install", "--quiet", "--disable-pip-version-check", *INDEX)
    run(tool / "bin/twine", "check", "--strict", *sorted(upload.iterdir()))
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    # What is not ours comes from where pip would have had it.
    index = run(sys.executable, "-m", "pip", "config", "get", "global.index-url") if _other_index() else PYPI
    options = ("-i", "127.0.0.1", "-p", str(port), "-P", ".", "-a", ".", "--fallback-url", index.strip())
    with server(url, tool / "bin/pypi-server", "run", *options, packages):
        words = ("--non-interactive", "--disable-progress-bar", "--username", "u", "--password", "p")
        run(tool / "bin/twine", "upload", *words, "--repository-url", url, *sorted(upload.iterdir()))
        assert {file.name for file in packages.iterdir()} == {file.name for file in upload.iterdir()}
        tell(f"twine upload to {url}: {', '.join(sorted(file.name for file in packages.iterdir()))}")
        fresh = tmp_path / "fresh"
        run(sys.executable, "-m", "venv", fresh)
        pip = (fresh / "bin/pip", "--quiet", "--disable-pip-version-check")
        here = ("--index-url", f"{url}/simple/", f"virtbus=={__version__}")
        run(*pip, "download", "--no-deps", "--dest", tmp_path / "got", *here)
        run(*pip, "install", "--only-binary", ":all:", *here, PIP_FIND_LINKS="")
    (got,) = (tmp_path / "got").iterdir()
    assert got.read_bytes() == (DIST / got.name).read_bytes()
    told = run(fresh / "bin/virtbus", "--version", cwd=tmp_path)
    assert told == f"virtbus {__version__}\n"
    run(fresh / "bin/python", "-I", "-c", "from virtbus import Consumer, IoError", cwd=tmp_path)
    tell(f"pip install virtbus from {url} in a fresh environment, without a compiler: {told.strip()}")


def _other_index() -> bool:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, check=False
    )
    return done.returncode == 0


def test_the_chart_is_pushed_to_a_registry_and_installed_from_it(
    registry: str, tell: Callable[[str], None]
) -> None:
    push = next(step for step in steps("registry") if "push-chart" in step)
    assert push.startswith('.packaging/push-chart "dist/virtbus-${GITHUB_REF_NAME#v}.tgz" "oci://')
    need(tools.missing())
    where = f"oci://{registry}/charts"
    said = run(
        ".packaging/push-chart", DIST / f"virtbus-{__version__}.tgz", where, "--plain-http",
        HELM=str(tools.helm("4")),
    )  # fmt: skip
    (digest,) = re.findall(r"^digest=(sha256:[0-9a-f]{64})$", said, re.MULTILINE)
    request = urllib.request.Request(
        f"http://{registry}/v2/charts/virtbus/manifests/{digest}",
        headers={"Accept": "application/vnd.oci.image.manifest.v1+json"},
    )
    with urllib.request.urlopen(request, timeout=60) as one:
        assert hashlib.sha256(one.read()).hexdigest() == digest.removeprefix("sha256:")
    done = helm.run(
        "4", "template", "vb", f"{where}/virtbus", "--version", __version__, "--plain-http",
        "--set", "bus.existingSecret=virtbus-bus",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "kind: DaemonSet" in done.stdout
    tell(f"helm push to {where}/virtbus, {digest}; rendered from there")


@pytest.mark.parametrize("kind", image.IMAGES)
def test_an_image_is_pushed_to_a_registry_and_to_a_layout(
    kind: str, registry: str, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """The one for this machine's architecture, built from the Dockerfile with the tests' base."""
    need(image.missing())
    name = image.build(kind)
    for target in (f"oci:{tmp_path}/layout:{TAG}", f"docker://{registry}/{kind}:{__version__}"):
        image.buildah("push", "--quiet", "--tls-verify=false", name, target)
    index = json.loads((tmp_path / "layout/index.json").read_text())
    (entry,) = index["manifests"]
    algorithm, digest = entry["digest"].split(":")
    manifest = json.loads((tmp_path / "layout/blobs" / algorithm / digest).read_text())
    config = json.loads((tmp_path / "layout/blobs/sha256" / manifest["config"]["digest"][7:]).read_text())
    assert config["architecture"] == "amd64"
    assert config["config"]["Labels"]["org.opencontainers.image.version"] == __version__
    with urllib.request.urlopen(f"http://{registry}/v2/{kind}/tags/list", timeout=10) as answer:
        assert json.load(answer)["tags"] == [__version__]
    tell(f"image {kind} (amd64) to {registry}/{kind}:{__version__} and to an OCI layout, {entry['digest']}")


def test_the_script_that_pushes_the_images_is_shell_and_says_the_digest(tmp_path: Path) -> None:
    """With a docker that only writes down what it is asked for."""
    stub = tmp_path / "docker"
    stub.write_text(
        '#!/bin/sh\necho "$*" >>"$0.log"\ncase $* in *metadata-file*) '
        'echo \'{"containerimage.digest": "sha256:0123"}\' >image.json;; esac\n'
    )
    stub.chmod(0o755)
    done = subprocess.run(
        [CHECKOUT / ".packaging/push-image", "ghcr.io/Owner/virtbus", __version__, "react"],
        cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "GIT_DIR": str(CHECKOUT / ".git")},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "digest=sha256:0123\n"), done.stderr
    asked = (tmp_path / "docker.log").read_text()
    assert re.search(r"run --privileged --rm docker.io/tonistiigi/binfmt:\S+@sha256:\w{64} ", asked)
    assert re.search(r"create .*image=docker.io/moby/buildkit:\S+@sha256:\w{64}", asked)
    assert re.search(r" SNAPSHOT=20\d{6}T000000Z ", asked)
    assert f"FOR=react --tag ghcr.io/owner/virtbus-react:{__version__}" in asked
