"""The chart by the genuine Helm 3 and Helm 4: it lints, renders, packages, and renders what was reviewed."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.chart import helm
from tests.chart.helm import CHART, CI_VALUES
from tests.chart.tools import HELMS
from virtbus import loading

GOLDEN = Path(__file__).parent / "golden"
# The oldest release that Chart.yaml allows, to the newest whose schemas are at hand.
OLDEST_KUBERNETES = (1, 28)
# Kinds of the Prometheus operator: not Kubernetes' own, checked by test_apiserver.py with their CRDs.
CUSTOM = {"PodMonitor", "ServiceMonitor", "PrometheusRule"}

every_helm = pytest.mark.parametrize("major", HELMS, ids=lambda major: f"helm{major}")
every_ci_file = pytest.mark.parametrize(
    "values", CI_VALUES, ids=lambda path: path.stem.removesuffix("-values")
)


def _versions() -> list[str]:
    newest = tuple(int(part) for part in kubernetes_validate.latest_version().split(".")[:2])
    return [f"1.{minor}" for minor in range(OLDEST_KUBERNETES[1], newest[1] + 1)]


@every_helm
def test_the_chart_passes_lint_strict(major: str) -> None:
    done = helm.run(major, "lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 chart(s) failed" in done.stdout


@every_ci_file
@every_helm
def test_the_chart_passes_lint_strict_with_each_ci_values_file(major: str, values: Path) -> None:
    done = helm.run(major, "lint", "--strict", str(CHART), "--values", str(values))
    assert done.returncode == 0, done.stdout + done.stderr


@every_ci_file
def test_what_is_rendered_is_what_was_reviewed(values: Path) -> None:
    """GOLDEN=write renews the files; the diff is then part of the review."""
    text = helm.template("4", values)
    golden = GOLDEN / values.name.replace("-values", "")
    if os.environ.get("GOLDEN") == "write":
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


@every_ci_file
def test_helm_3_and_helm_4_render_the_same_objects(values: Path) -> None:
    assert helm.objects(helm.template("3", values)) == helm.objects(helm.template("4", values))


@every_ci_file
def test_every_object_is_valid_for_every_kubernetes_release(values: Path) -> None:
    checked = 0
    for item in helm.render(values):
        if item["kind"] in CUSTOM:
            continue
        for version in _versions():
            kubernetes_validate.validate(item, version, strict=True)
            checked += 1
    assert checked >= 3 * len(_versions())


@pytest.mark.parametrize("word", ["123", "1e3", "null", "true"])
def test_a_name_that_looks_like_a_number_or_a_nothing_stays_a_name(word: str) -> None:
    """YAML without quotes would make one of it, and the API server refuse the object."""
    names = ("fullnameOverride", "priorityClassName", "serviceAccount.name", "bus.existingSecret",
             "bus.urlKey", "bus.passwordKey", "bus.tls.existingSecret", "bus.tls.caKey", "react.group",
             "react.existingClaim", "dashboard.namespace", "serviceMonitor.namespace",
             "prometheusRule.namespace")  # fmt: skip
    on = ("react", "serviceMonitor", "prometheusRule", "dashboard", "networkPolicy")
    options = [option for name in names for option in ("--set-string", f"{name}={word}")]
    options += [option for name in on for option in ("--set", f"{name}.enabled=true")]
    options += ["--namespace", word, "--values", str(helm.MINIMAL), "--set", "react.with=kubernetes"]
    done = helm.run("4", "template", helm.RELEASE, str(CHART), *options)
    assert done.returncode == 0, done.stderr
    found = [item for item in yaml.safe_load_all(done.stdout) if item]
    assert len(found) >= 15
    for item in found:
        for name in ("name", "namespace"):
            assert isinstance(item["metadata"].get(name, ""), str), item["metadata"]
        if item["kind"] not in CUSTOM:
            kubernetes_validate.validate(item, _versions()[-1], strict=True)


def test_a_path_with_a_blank_and_a_hash_is_the_path() -> None:
    wanted = {name: f"/srv/{name} # x" for name in ("spool.hostPath", "libvirt.socketDir", "machineIdFile")}
    found = helm.render(helm.MINIMAL, sets=tuple(f"{name}={path}" for name, path in wanted.items()))
    (spec,) = (spec for where, spec in helm.pod_specs(found) if where.startswith("DaemonSet/"))
    paths = {one["hostPath"]["path"] for one in spec["volumes"] if "hostPath" in one}
    assert paths == set(wanted.values())


def test_ten_kubernetes_releases_are_looked_at() -> None:
    assert _versions()[0] == "1.28"
    assert len(_versions()) >= 10


def test_the_validation_finds_a_field_that_does_not_exist() -> None:
    daemonset = helm.one(helm.render(helm.MINIMAL), "DaemonSet")
    daemonset["spec"]["template"]["spec"]["hostNetwrok"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="hostNetwrok"):
        kubernetes_validate.validate(daemonset, _versions()[-1], strict=True)


@every_helm
def test_the_package_holds_the_chart_and_nothing_else(major: str, tmp_path: Path) -> None:
    done = helm.run(major, "package", str(CHART), "--destination", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("*.tgz")
    with tarfile.open(package) as tar:
        names = {name.removeprefix("virtbus/") for name in tar.getnames()}
    top = {name.partition("/")[0] for name in names}
    assert top == {
        "Chart.yaml", "README.md", "values.yaml", "values.schema.json", "files", "templates", ".helmignore",
    }  # fmt: skip
    text = helm.template(major, helm.MINIMAL, chart=package)
    assert helm.objects(text) == helm.render(helm.MINIMAL)


@every_ci_file
def test_install_dry_run_shows_the_notes(values: Path) -> None:
    """Helm 3 asks a server even for this: test_apiserver.py has one."""
    done = helm.run(
        "4", "install", helm.RELEASE, str(CHART), "--namespace", helm.NAMESPACE, "--values", str(values),
        "--dry-run=client",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    user = "0:0 with the capability DAC_OVERRIDE" if "kubevirt" in values.name else "which libvirtd must find"
    assert "Agents run as " in done.stdout
    assert user in done.stdout


def test_the_schema_and_the_readme_are_fresh() -> None:
    check = subprocess.run(
        [sys.executable, str(CHART.parent / "generate.py"), "--check"], capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr


@every_ci_file
def test_the_rendered_settings_are_good_settings(values: Path, tmp_path: Path) -> None:
    """What the chart writes is read by the agent's own loader, with the values that were asked for."""
    rendered = helm.one(helm.render(values), "ConfigMap", _fullname(values))["data"]["virtbus.toml"]
    file = tmp_path / "virtbus.toml"
    file.write_text(rendered, encoding="utf-8")
    loaded = loading.load(file=file, environment={}).config
    assert loaded.bus.url_file == "/run/secrets/virtbus/bus/url"
    asked = yaml.safe_load(values.read_text(encoding="utf-8")).get("config", {})
    asked.pop("react", None)  # not the agents' business
    assert _contains(tomllib.loads(rendered), asked)


def _fullname(values: Path) -> str:
    return "vb-ioerrors" if values.name.startswith("everything") else "vb-virtbus"


def _contains(tree: object, part: object) -> bool:
    if isinstance(tree, dict) and isinstance(part, dict):
        return all(key in tree and _contains(tree[key], value) for key, value in part.items())
    return tree == part
