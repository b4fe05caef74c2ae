"""A cluster without machines: a real API server, scheduler and controllers; `Kubelets` stands for the nodes.

    with Cluster(folder) as cluster, Kubelets(cluster) as kubelets:
        kubelets.join("compute-1")

What the DaemonSet controller makes is placed by the real scheduler, with taints, node selectors and
affinities. No container runs: a kubelet here says of each pod on its nodes that it is ready (a pod that runs
once: that it succeeded), and deletes what is to be deleted. What a pod does is tried in with_image.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from tests.chart import apiserver
from tests.chart.apiserver import ApiServer, binary

CONTROLLERS = (
    "daemonset-controller,deployment-controller,replicaset-controller,namespace-controller,"
    "serviceaccount-controller,root-ca-certificate-publisher-controller,garbage-collector-controller,"
    "node-lifecycle-controller,taint-eviction-controller"
)
POLL_SECONDS = 0.2


def missing() -> list[str]:
    """What this machine lacks to run a cluster, in words."""
    return apiserver.missing(*apiserver.PROGRAMS)


class Cluster(ApiServer):
    """An API server with a scheduler and a controller manager. A context manager."""

    def __enter__(self) -> Cluster:
        super().__enter__()
        try:
            common = (f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", "--secure-port=0")
            self._start("kube-scheduler", str(binary("kube-scheduler")), *common)
            self._start(
                "kube-controller-manager", str(binary("kube-controller-manager")), *common,
                f"--controllers={CONTROLLERS}",
                f"--service-account-private-key-file={self.folder}/accounts.key",
                f"--root-ca-file={self.folder}/certificates/apiserver.crt",
                "--node-monitor-grace-period=24h",  # kubelets here send no heartbeat
            )  # fmt: skip
        except BaseException:
            self.close()
            raise
        return self


class Kubelets:
    """The kubelets of all nodes that joined. A context manager."""

    def __init__(self, cluster: Cluster) -> None:
        self.core = client.CoreV1Api(config.new_client_from_config(str(cluster.kubeconfig)))
        self._nodes: set[str] = set()
        self._idle = False
        self._end = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kubelets", daemon=True)

    def __enter__(self) -> Kubelets:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        self.core.api_client.close()
        if self._failed is not None and error is None:
            raise self._failed

    def join(self, name: str, *, os: str = "linux", labels: Mapping[str, str] | None = None,
             taints: tuple[str, ...] = ()) -> str:  # fmt: skip
        """Add a ready node, with taints of the effect NoSchedule; its name."""
        given = {"kubernetes.io/hostname": name, "kubernetes.io/os": os, **(labels or {})}
        spec = {"taints": [{"key": key, "effect": "NoSchedule"} for key in taints]}
        self.core.create_node({"metadata": {"name": name, "labels": given}, "spec": spec})
        status = {
            "capacity": {"cpu": "4", "memory": "8Gi", "pods": "110"},
            "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "110"},
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": ""}],
        }
        self.core.patch_node_status(name, {"status": status})
        self._nodes.add(name)
        return name

    def leave(self, *names: str) -> None:
        """Remove nodes."""
        for name in names:
            self.core.delete_node(name)
            self._nodes.discard(name)

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Pods that come now stay in ContainerCreating, as where an image can't be pulled."""
        self._idle = True
        try:
            yield
        finally:
            self._idle = False

    def pods(self, namespace: str, **labels: str) -> dict[str, Any]:
        """The placed pods that are not being deleted, by node. One of each set of labels runs on a node."""
        selector = ",".join(f"app.kubernetes.io/{name}={value}" for name, value in labels.items())
        found = self.core.list_namespaced_pod(namespace, label_selector=selector).items
        return {
            pod.spec.node_name: pod
            for pod in found
            if pod.spec.node_name and pod.metadata.deletion_timestamp is None
        }

    def wait(self, what: str, check: Callable[[], object], seconds: float = 120) -> None:
        """Until `check` is true; AssertionError with `what` when it does not become so."""
        for _ in range(int(seconds / POLL_SECONDS)):
            if self._failed is not None:
                raise self._failed
            if check():
                return
            self._end.wait(POLL_SECONDS)
        raise AssertionError(what)

    # ---- the kubelets

    def _run(self) -> None:
        try:
            while not self._end.wait(POLL_SECONDS):
                for pod in self.core.list_pod_for_all_namespaces().items:
                    if pod.spec.node_name in self._nodes:
                        self._look_after(pod)
        except BaseException as error:
            self._failed = error

    def _look_after(self, pod: Any) -> None:
        where = (pod.metadata.name, pod.metadata.namespace)
        try:
            if pod.metadata.deletion_timestamp is not None:
                self.core.delete_namespaced_pod(*where, grace_period_seconds=0)
            elif pod.status.phase == "Pending" and not self._idle:
                once = pod.spec.restart_policy == "Never"
                ready = {"type": "Ready", "status": "False" if once else "True"}
                status = {"phase": "Succeeded" if once else "Running", "conditions": [ready]}
                self.core.patch_namespaced_pod_status(*where, {"status": status})
        except ApiException as error:
            if error.status not in (404, 409):  # somebody else was faster
                raise
