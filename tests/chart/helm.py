"""Run the genuine helm on the chart; no cluster, no user's settings."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.chart import tools

CHART = Path(__file__).resolve().parents[2] / "charts" / "virtbus"
CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
MINIMAL = CHART / "ci" / "minimal-values.yaml"
RELEASE, NAMESPACE = "vb", "virtbus"

Object = dict[str, Any]


def run(
    major: str, *arguments: str, kubeconfig: Path | None = None, seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    """helm with an empty home of its own, so that nothing of this machine's user counts."""
    home = _home()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": home,
        "HELM_CONFIG_HOME": f"{home}/config",
        "HELM_CACHE_HOME": f"{home}/cache",
        "HELM_DATA_HOME": f"{home}/data",
        "KUBECONFIG": str(kubeconfig) if kubeconfig else f"{home}/no-kubeconfig",
    }
    return subprocess.run(
        [str(tools.helm(major)), *arguments],
        capture_output=True, text=True, env=environment, timeout=seconds,
    )  # fmt: skip


@functools.cache
def _home() -> str:
    return tempfile.mkdtemp(prefix="vbhelm-", dir=os.environ.get("VIRTBUS_TEST_RUN"))


def template(
    major: str, *values: Path, sets: tuple[str, ...] = (), chart: Path = CHART, options: tuple[str, ...] = ()
) -> str:
    """The rendered text. Raises AssertionError with helm's words when it refuses."""
    arguments = ["template", RELEASE, str(chart), "--namespace", NAMESPACE, *options]
    for file in values:
        arguments += ["--values", str(file)]
    for one in sets:
        arguments += ["--set", one]
    done = run(major, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(text: str) -> list[Object]:
    """The rendered objects, in the order of their kind and name."""
    found = [one for one in yaml.safe_load_all(text) if one]
    return sorted(found, key=lambda one: (one["kind"], one["metadata"]["name"]))


def render(*values: Path, sets: tuple[str, ...] = (), major: str = "4") -> list[Object]:
    """The objects that helm makes of these values."""
    return objects(template(major, *values, sets=sets))


def one(found: list[Object], kind: str, name: str | None = None) -> Object:
    """The only object of this kind (and name)."""
    (match,) = (
        item for item in found if item["kind"] == kind and (name is None or item["metadata"]["name"] == name)
    )
    return match


def pod_specs(found: list[Object]) -> list[tuple[str, Object]]:
    """Every pod that the objects stand for → (kind/name, pod spec)."""
    specs = []
    for item in found:
        spec = item if item["kind"] == "Pod" else item.get("spec", {}).get("template")
        if spec and "spec" in spec:
            specs.append((f"{item['kind']}/{item['metadata']['name']}", spec["spec"]))
    return specs
