"""The life of a release where pods are really placed: taints, mixed nodes, updates, two releases, `--wait`.

`make chart` runs this; scheduler and controllers are built first, which takes minutes once.
"""

from __future__ import annotations

import itertools
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chart import cluster as cluster_module
from tests.chart import helm
from tests.chart.cluster import Cluster, Kubelets
from tests.chart.helm import CHART
from tests.chart.tools import HELMS
from tests.conftest import need
from virtbus.config import React, ReactKubernetes
from virtbus.integrations.base import HOLD, RELEASE, Action, open_integration

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

every_helm = pytest.mark.parametrize("major", HELMS, ids=lambda major: f"helm{major}")
TAINT = "virtbus.io/storage-unhealthy"
WAIT = ("--wait", "--timeout", "5m")

_numbers = itertools.count()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    need(cluster_module.missing())
    folder = Path(tempfile.mkdtemp(dir=os.environ["VIRTBUS_TEST_RUN"], prefix="cluster-"))
    with Cluster(folder) as made:
        yield made


@pytest.fixture
def kubelets(cluster: Cluster) -> Iterator[Kubelets]:
    with Kubelets(cluster) as made:
        yield made


@pytest.fixture
def nodes(kubelets: Kubelets) -> Iterator[list[str]]:
    """Two compute nodes, one that libvirt is not on and pods avoid, and one of another operating system."""
    labels = {"example.org/kvm": "yes"}
    names = [
        kubelets.join("compute-1", labels=labels),
        kubelets.join("compute-2", labels=labels),
        kubelets.join("control-1", taints=("node-role.kubernetes.io/control-plane",)),
        kubelets.join("windows-1", os="windows"),
    ]
    yield names
    kubelets.leave(*names)


@pytest.fixture
def namespace(cluster: Cluster) -> str:
    name = cluster.namespace(f"life-{next(_numbers)}", {"pod-security.kubernetes.io/enforce": "privileged"})
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "virtbus-bus"},
        "stringData": {"url": "amqps://broker//"},
    }
    cluster.kubectl("create", "-n", name, "-f", "-", manifest=secret)
    return name


def _helm(cluster: Cluster, major: str, *words: str, fails: bool = False) -> str:
    done = helm.run(major, *words, kubeconfig=cluster.kubeconfig, seconds=400)
    assert (done.returncode != 0) is fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def _install(cluster: Cluster, namespace: str, *sets: str, major: str = "4", name: str = "vb") -> None:
    words = [word for one in sets for word in ("--set", one)]
    _helm(
        cluster, major, "install", name, str(CHART), "--namespace", namespace, *WAIT,
        "--values", str(helm.MINIMAL), *words,
    )  # fmt: skip


def _uids(pods: dict[str, Any]) -> dict[str, str]:
    return {node: pod.metadata.uid for node, pod in pods.items()}


@pytest.mark.usefixtures("nodes")
@every_helm
def test_install_with_wait_and_helm_test_end_in_a_mixed_cluster(
    major: str, cluster: Cluster, kubelets: Kubelets, namespace: str
) -> None:
    _install(cluster, namespace, major=major)
    agents = kubelets.pods(namespace, component="agent")
    assert set(agents) == {"compute-1", "compute-2", "control-1"}
    status = cluster.get("daemonset", "vb-virtbus", namespace)["status"]
    assert (status["desiredNumberScheduled"], status["numberReady"]) == (3, 3)
    assert "numberUnavailable" not in status
    _helm(cluster, major, "test", "vb", "--namespace", namespace)
    (doctor,) = kubelets.pods(namespace, component="doctor")
    assert doctor in agents

    # The compute nodes are named from now on: the others' agents go, and the doctor follows.
    _helm(
        cluster, major, "upgrade", "vb", str(CHART), "--namespace", namespace, *WAIT, "--reuse-values",
        "--set-string", r"nodeSelector.example\.org/kvm=yes",
    )  # fmt: skip
    kubelets.wait(
        "agents on the compute nodes alone",
        lambda: set(kubelets.pods(namespace, component="agent")) == {"compute-1", "compute-2"},
    )
    _helm(cluster, major, "test", "vb", "--namespace", namespace)
    (doctor,) = kubelets.pods(namespace, component="doctor")
    assert doctor.startswith("compute-")
    _helm(cluster, major, "uninstall", "vb", "--namespace", namespace)
    kubelets.wait("no agent is left", lambda: not kubelets.pods(namespace, component="agent"))


@pytest.mark.usefixtures("nodes")
def test_the_runbooks_command_leads_from_an_alerts_instance_to_the_nodes_agent_and_to_no_other_pod(
    cluster: Cluster, kubelets: Kubelets, namespace: str
) -> None:
    react = (
        "react.enabled=true",
        "react.with=kubernetes",
        "react.nodeSelector.kubernetes\\.io/hostname=compute-1",
    )
    _install(cluster, namespace, *react)
    assert set(kubelets.pods(namespace, component="react")) == {"compute-1"}
    page = (CHART.parents[1] / "docs" / "operations.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^kubectl (-n virtbus get pods .*spec\.nodeName=INSTANCE)$", page, re.MULTILINE)
    for node, agent in kubelets.pods(namespace, component="agent").items():
        words = line.replace("-n virtbus", f"-n {namespace}").replace("INSTANCE", node).split()
        told = cluster.kubectl(*words, "--output=name").stdout.split()
        assert told == [f"pod/{agent.metadata.name}"]
    _helm(cluster, "4", "uninstall", "vb", "--namespace", namespace)


@pytest.mark.usefixtures("nodes")
def test_install_with_wait_fails_where_no_pod_becomes_ready(
    cluster: Cluster, kubelets: Kubelets, namespace: str
) -> None:
    """So that the test above would fail, too."""
    with kubelets.idle():
        told = _helm(
            cluster, "4", "install", "vb", str(CHART), "--namespace", namespace, "--wait",
            "--timeout", "10s", "--values", str(helm.MINIMAL), fails=True,
        )  # fmt: skip
    assert "vb-virtbus" in told
    _helm(cluster, "4", "uninstall", "vb", "--namespace", namespace)


@pytest.mark.usefixtures("nodes")
def test_an_agent_that_is_deleted_on_a_node_which_react_has_tainted_comes_back_there(
    cluster: Cluster, kubelets: Kubelets, namespace: str
) -> None:
    _install(cluster, namespace)
    labels = {"app.kubernetes.io/component": "bystander"}
    container = {"name": "pause", "image": "localhost/pause"}
    bystander = {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "bystander"},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [container], "nodeSelector": {"kubernetes.io/os": "linux"}},
            },
        },
    }
    cluster.kubectl("create", "-n", namespace, "-f", "-", manifest=bystander)
    kubelets.wait(
        "a DaemonSet without tolerations is on both compute nodes",
        lambda: set(kubelets.pods(namespace, component="bystander")) == {"compute-1", "compute-2"},
    )

    settings = React(kubernetes=ReactKubernetes(kubeconfig=str(cluster.kubeconfig)))
    react = open_integration("kubernetes", settings)
    react.execute(Action(f"hold/{uuid.uuid4()}", "compute-1", HOLD, "undetermined: two guests", {}))
    before = _uids(kubelets.pods(namespace, component="agent"))
    cluster.kubectl("delete", "pod", "--all", "-n", namespace, "--wait=false")

    def back() -> bool:
        now = _uids(kubelets.pods(namespace, component="agent"))
        return set(now) == set(before) and all(now[node] != before[node] for node in before)

    kubelets.wait("each node has a new agent, the tainted one too", back)
    kubelets.wait(
        "what does not tolerate the taint stays away",
        lambda: (
            cluster.get("daemonset", "bystander", namespace)["status"]["desiredNumberScheduled"] == 1
            and set(kubelets.pods(namespace, component="bystander")) == {"compute-2"}
        ),
    )
    assert TAINT in [taint.key for taint in kubelets.core.read_node("compute-1").spec.taints]
    react.execute(Action(f"release/{uuid.uuid4()}", "compute-1", RELEASE, "well", {}))
    kubelets.wait(
        "the node is given back",
        lambda: set(kubelets.pods(namespace, component="bystander")) == {"compute-1", "compute-2"},
    )
    react.close()
    _helm(cluster, "4", "uninstall", "vb", "--namespace", namespace)


@pytest.mark.usefixtures("nodes")
@every_helm
def test_a_change_of_uid_rolls_out_a_rollback_takes_it_back_and_two_releases_stand_side_by_side(
    major: str, cluster: Cluster, kubelets: Kubelets, namespace: str
) -> None:
    def users(release: str) -> set[int]:
        pods = kubelets.pods(namespace, component="agent", instance=release)
        assert len(pods) == 3
        return {pod.spec.security_context.run_as_user for pod in pods.values()}

    where = ("--namespace", namespace, *WAIT)
    _install(cluster, namespace, major=major)
    first = _uids(kubelets.pods(namespace, component="agent"))
    assert users("vb") == {65534}

    # A new value that no agent reads restarts none.
    _helm(
        cluster, major, "upgrade", "vb", str(CHART), *where, "--reuse-values", "--set", "tests.enabled=false"
    )
    assert _uids(kubelets.pods(namespace, component="agent")) == first

    uid = ("--set", "runAsUser=65532", "--set", "runAsGroup=65532")
    _helm(cluster, major, "upgrade", "vb", str(CHART), *where, "--reuse-values", *uid)
    kubelets.wait("every agent runs as the new user", lambda: users("vb") == {65532})
    _install(cluster, namespace, "spool.hostPath=/var/lib/two", major=major, name="two")
    assert users("two") == {65534}
    _helm(cluster, major, "rollback", "vb", "1", *where)
    kubelets.wait("every agent runs as the first user", lambda: users("vb") == {65534})
    _helm(cluster, major, "uninstall", "vb", "--namespace", namespace)
    kubelets.wait(
        "its agents are gone", lambda: not kubelets.pods(namespace, component="agent", instance="vb")
    )
    assert users("two") == {65534}
    _helm(cluster, major, "uninstall", "two", "--namespace", namespace)
    kubelets.wait("no agent is left", lambda: not kubelets.pods(namespace, component="agent"))
