"""The chart on a real API server: installed, upgraded, rolled back and removed by the genuine helm.

`make chart` runs this: the server must be built first, which takes minutes once.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest

from tests.chart import helm
from tests.chart.apiserver import ApiServer
from tests.chart.helm import CHART, CI_VALUES, Object
from tests.chart.tools import HELMS

every_helm = pytest.mark.parametrize("major", HELMS, ids=lambda major: f"helm{major}")

# What a namespace with audit=restricted is told of an agent's pod, and nothing else.
DOCUMENTED_VIOLATIONS = {
    "restricted volume types",  # hostPath: libvirt's sockets, the spool, the machine id
    "unrestricted capabilities",  # the init container's CHOWN; with kubevirt.enabled DAC_OVERRIDE
    "runAsNonRoot != true",  # the init container is root
    "runAsUser=0",
    "seLinuxOptions",  # only with the value of that name
}

_numbers = itertools.count()


@pytest.fixture
def namespace(kube_apiserver: ApiServer) -> str:
    """A namespace with the labels that NOTES.txt asks for, and the bus's Secret."""
    return _namespace(kube_apiserver, "privileged")


def _namespace(server: ApiServer, enforce: str) -> str:
    name = f"chart-{next(_numbers)}"
    labels = {
        "pod-security.kubernetes.io/enforce": enforce,
        "pod-security.kubernetes.io/audit": "restricted",
    }
    server.namespace(name, labels)
    _secret(server, name, "virtbus-bus", url="amqps://broker//", password="one")
    return name


def _secret(server: ApiServer, namespace: str, name: str, **content: str) -> None:
    manifest = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": content}
    server.kubectl("apply", "-n", namespace, "-f", "-", manifest=manifest)


def _helm(server: ApiServer, major: str, *arguments: str) -> str:
    done = helm.run(major, *arguments, kubeconfig=server.kubeconfig)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _daemonset(server: ApiServer, namespace: str) -> Object:
    return server.get("daemonset", "vb-virtbus", namespace)


def _annotations(server: ApiServer, namespace: str) -> dict[str, str]:
    return _daemonset(server, namespace)["spec"]["template"]["metadata"]["annotations"]


@pytest.fixture
def previous(tmp_path: Path) -> Path:
    """The chart as the release before it: another version, another image, a setting less."""
    chart = tmp_path / "virtbus"
    shutil.copytree(CHART, chart)
    file = chart / "Chart.yaml"
    text = file.read_text(encoding="utf-8").replace("version: 0.1.0", "version: 0.0.9")
    file.write_text(text.replace('appVersion: "0.1.0"', 'appVersion: "0.0.9"'), encoding="utf-8")
    return chart


@every_helm
def test_a_release_is_installed_upgraded_rolled_back_and_removed(
    major: str, kube_apiserver: ApiServer, namespace: str, previous: Path
) -> None:
    where = ("--namespace", namespace, "--values", str(helm.MINIMAL))
    _helm(kube_apiserver, major, "install", "vb", str(previous), *where)
    first = _daemonset(kube_apiserver, namespace)
    image = first["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == "localhost/virtbus:0.0.9"

    _helm(kube_apiserver, major, "upgrade", "vb", str(CHART), *where, "--set", "config.bus.window=99")
    second = _daemonset(kube_apiserver, namespace)
    assert second["metadata"]["uid"] == first["metadata"]["uid"]  # changed in place, not made anew
    assert second["spec"]["template"]["spec"]["containers"][0]["image"] == "localhost/virtbus:0.1.0"
    settings = kube_apiserver.get("configmap", "vb-virtbus", namespace)["data"]["virtbus.toml"]
    assert "window = 99" in settings

    _helm(kube_apiserver, major, "rollback", "vb", "1", "--namespace", namespace)
    third = _daemonset(kube_apiserver, namespace)
    assert third["spec"]["template"] == first["spec"]["template"]

    _helm(kube_apiserver, major, "uninstall", "vb", "--namespace", namespace)
    left = kube_apiserver.kubectl(
        "get", "daemonset,deployment,configmap,serviceaccount,service,networkpolicy", "-n", namespace,
        "-l", "app.kubernetes.io/instance=vb", "-o", "name",
    )  # fmt: skip
    assert left.stdout == ""


@every_helm
def test_a_release_lives_through_reused_values_another_uid_a_rollback_and_a_second_release(
    major: str, kube_apiserver: ApiServer, namespace: str, previous: Path
) -> None:
    """`--reuse-values` brings the values of the first release, which knew less than this chart."""
    shutil.copyfile(Path(__file__).parent / "released" / "0.1.0.yaml", previous / "values.yaml")
    where = ("--namespace", namespace)
    _helm(kube_apiserver, major, "install", "vb", str(previous), *where, "--values", str(helm.MINIMAL))
    _helm(
        kube_apiserver,
        major,
        "upgrade",
        "vb",
        str(CHART),
        *where,
        "--reuse-values",
        "--set",
        "runAsUser=65532",
    )
    spec = _daemonset(kube_apiserver, namespace)["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsUser"] == 65532
    assert spec["initContainers"][0]["command"][-1] == "65532:65534"
    assert {"key": "virtbus.io/storage-unhealthy", "operator": "Exists"} in spec["tolerations"]

    other = ("two", str(CHART), *where, "--values", str(helm.MINIMAL))
    told = _helm(kube_apiserver, major, "install", *other)
    assert "DaemonSet vb-virtbus keeps its events in /var/lib/virtbus too" in told
    told = _helm(kube_apiserver, major, "upgrade", *other, "--set", "spool.hostPath=/var/lib/two")
    assert "keeps its events in" not in told
    assert kube_apiserver.get("daemonset", "two-virtbus", namespace)

    _helm(kube_apiserver, major, "rollback", "vb", "1", *where)
    assert (
        _daemonset(kube_apiserver, namespace)["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
        == 65534
    )
    _helm(kube_apiserver, major, "uninstall", "vb", *where)
    assert kube_apiserver.get("daemonset", "two-virtbus", namespace)  # the other one's things are its own
    _helm(kube_apiserver, major, "uninstall", "two", *where)


def test_two_releases_of_one_name_in_two_namespaces_react_side_by_side(
    kube_apiserver: ApiServer, namespace: str
) -> None:
    """What is not in a namespace has names that can't clash: `a-b` and `c`, `a` and `b-c`."""
    second = _namespace(kube_apiserver, "privileged")
    sets = ("--values", str(helm.MINIMAL), "--set", "react.enabled=true,react.with=kubernetes")
    for one in (namespace, second):
        _helm(kube_apiserver, "4", "install", "vb", str(CHART), "--namespace", one, *sets)
    for one in (namespace, second):
        _helm(kube_apiserver, "4", "uninstall", "vb", "--namespace", one)


@pytest.fixture(scope="session")
def crds(kube_apiserver: ApiServer) -> None:
    kube_apiserver.install_prometheus_operator_crds()
    kube_apiserver.namespace("monitoring")


@pytest.mark.usefixtures("crds")
@pytest.mark.parametrize("values", CI_VALUES, ids=lambda path: path.stem.removesuffix("-values"))
@every_helm
def test_the_server_takes_every_object_of_every_ci_values_file(
    major: str, values: Path, kube_apiserver: ApiServer, namespace: str
) -> None:
    """Also the Prometheus operator's kinds, by the operator's own definitions; unknown fields are errors."""
    _secret(kube_apiserver, namespace, "virtbus-tls", **{"ca.crt": "x", "tls.crt": "x", "tls.key": "x"})
    where = ("--namespace", namespace)
    _helm(kube_apiserver, major, "install", "vb", str(CHART), *where, "--values", str(values))
    text = helm.template(major, values, options=where)
    for item in helm.objects(text):
        kube_apiserver.kubectl(
            "apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict",
            "-n", item["metadata"].get("namespace", namespace), "-f", "-", manifest=item,
        )  # fmt: skip
    _helm(kube_apiserver, major, "uninstall", "vb", *where)


@every_helm
def test_the_notes_say_whether_the_secret_is_there(
    major: str, kube_apiserver: ApiServer, namespace: str
) -> None:
    arguments = ("install", "vb", str(CHART), "--namespace", namespace, "--dry-run=server")
    there = _helm(kube_apiserver, major, *arguments, "--set", "bus.existingSecret=virtbus-bus")
    absent = _helm(kube_apiserver, major, *arguments, "--set", "bus.existingSecret=elsewhere")
    assert "was not found" not in there
    assert f"Secret {namespace}/elsewhere was not found" in absent


def _pod(values: Path, **metadata: str) -> Object:
    template = helm.one(helm.render(values), "DaemonSet")["spec"]["template"]
    spec = {**template["spec"], "serviceAccountName": "agents"}
    spec.pop("priorityClassName", None)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"generateName": "agent-", **metadata},
        "spec": spec,
    }


@pytest.mark.parametrize("values", CI_VALUES, ids=lambda path: path.stem.removesuffix("-values"))
def test_agents_are_admitted_at_the_level_privileged_with_the_documented_audit_warnings(
    values: Path, kube_apiserver: ApiServer, namespace: str
) -> None:
    kube_apiserver.kubectl("create", "serviceaccount", "agents", "-n", namespace)
    kube_apiserver.kubectl("create", "-n", namespace, "-f", "-", manifest=_pod(values))
    (entry,) = (
        item
        for item in kube_apiserver.audit()
        if item["objectRef"]["resource"] == "pods" and item["objectRef"].get("namespace") == namespace
    )
    said = entry["annotations"]["pod-security.kubernetes.io/audit-violations"]
    found = {words for words in DOCUMENTED_VIOLATIONS if words in said}
    rest = said.partition(": ")[2]
    kinds = {part.partition(" (")[0].strip() for part in _violations(rest)}
    assert kinds <= DOCUMENTED_VIOLATIONS, said
    assert "restricted volume types" in found


def _violations(text: str) -> list[str]:
    """Split 'a (…), b (…)' at the commas outside of brackets."""
    parts, depth, current = [], 0, ""
    for sign in text:
        depth += (sign == "(") - (sign == ")")
        if sign == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += sign
    return [*parts, current]


def test_agents_are_refused_at_the_level_baseline(kube_apiserver: ApiServer) -> None:
    """Why NOTES.txt asks for `privileged`: host folders, and nothing else, need it."""
    name = _namespace(kube_apiserver, "baseline")
    kube_apiserver.kubectl("create", "serviceaccount", "agents", "-n", name)
    done = kube_apiserver.kubectl("create", "-n", name, "-f", "-", manifest=_pod(helm.MINIMAL), check=False)
    assert done.returncode != 0
    assert "hostPath volumes" in done.stderr
    assert "capabilities" not in done.stderr


def test_the_checksum_of_secrets_changes_when_and_only_when_their_content_does(
    kube_apiserver: ApiServer, namespace: str
) -> None:
    where = ("vb", str(CHART), "--namespace", namespace, "--values", str(helm.MINIMAL))
    _helm(kube_apiserver, "4", "install", *where)
    first = _annotations(kube_apiserver, namespace)
    _secret(kube_apiserver, namespace, "somebody-elses", url="x")
    kube_apiserver.kubectl("annotate", "secret", "virtbus-bus", "note=new", "-n", namespace)
    _helm(kube_apiserver, "4", "upgrade", *where)
    assert _annotations(kube_apiserver, namespace) == first
    _secret(kube_apiserver, namespace, "virtbus-bus", url="amqps://other//")
    _helm(kube_apiserver, "4", "upgrade", *where)
    second = _annotations(kube_apiserver, namespace)
    assert second["checksum/secrets"] != first["checksum/secrets"]
    assert second["checksum/config"] == first["checksum/config"]


def test_react_may_mark_nodes_and_nothing_else(kube_apiserver: ApiServer, namespace: str) -> None:
    sets = ("--set", "react.enabled=true,react.with=kubernetes")
    where = ("vb", str(CHART), "--namespace", namespace, "--values", str(helm.MINIMAL), *sets)
    _helm(kube_apiserver, "4", "install", *where)

    def may(account: str, *what: str, where: str = namespace) -> bool:
        who = f"--as=system:serviceaccount:{namespace}:{account}"
        done = kube_apiserver.kubectl("auth", "can-i", *what, who, "-n", where, check=False)
        return done.stdout.strip().endswith("yes")

    assert may("vb-virtbus-react", "create", "events", where="default")
    assert not may("vb-virtbus-react", "create", "events")  # those of nodes live in `default`
    assert not may("vb-virtbus-react", "get", "events", where="default")
    for granted in (["get", "nodes"], ["list", "nodes"], ["patch", "nodes"]):
        assert may("vb-virtbus-react", *granted), granted
        assert not may("vb-virtbus", *granted), granted
    assert may("vb-virtbus-react", "patch", "nodes", "--subresource=status")
    for verb, resource in itertools.product(("get", "list", "create", "delete"), ("secrets", "pods")):
        assert not may("vb-virtbus-react", verb, resource), (verb, resource)
    for refused in (["delete", "nodes"], ["update", "nodes"], ["watch", "nodes"], ["delete", "events"]):
        assert not may("vb-virtbus-react", *refused), refused
    _helm(kube_apiserver, "4", "uninstall", "vb", "--namespace", namespace)
