"""Against a real kube-apiserver: `kubectl describe vmi` shows which volume fails, why and how often."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.apiserver import ApiServer
from tests.integrations.parts import eventually
from tests.integrations.vmis import delivered, kubevirt_device, kubevirt_domain
from virtbus.config import React, ReactKubernetes
from virtbus.errors import VirtbusError
from virtbus.integrations.base import ActionRefused, open_integration
from virtbus.model import Event
from virtbus.testing import a_resolved, an_io_error
from virtbus.words import Phase

VMI = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "virtualmachineinstances.kubevirt.io"},
    "spec": {
        "group": "kubevirt.io",
        "scope": "Namespaced",
        "names": {"plural": "virtualmachineinstances", "singular": "virtualmachineinstance",
                  "kind": "VirtualMachineInstance", "shortNames": ["vmi"]},
        "versions": [{"name": "v1", "served": True, "storage": True,
                      "schema": {"openAPIV3Schema": {"type": "object"}}}],
    },
}  # fmt: skip


class Guest:
    """A VirtualMachineInstance on the server, and events about its disks as an agent sends them."""

    def __init__(self, server: ApiServer) -> None:
        self.server, self.namespace = server, f"shop-{uuid.uuid4().hex[:6]}"
        server.kubectl("apply", "-f", "-", manifest=VMI)
        server.namespace(self.namespace)
        made = {"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
                "metadata": {"name": "web-1.blue", "namespace": self.namespace}}  # fmt: skip
        eventually(
            lambda: server.kubectl("apply", "-f", "-", manifest=made, check=False).returncode == 0,
            "the definition is served",
        )
        self.uid = server.get("vmi", "web-1.blue", self.namespace)["metadata"]["uid"]
        domain = kubevirt_domain()
        assert domain.owner is not None
        owner = replace(domain.owner, id=self.uid, project_name=self.namespace, project_id=self.namespace)
        self.domain = replace(domain, owner=owner)

    def error(self, total: int, phase: Phase = Phase.UPDATED) -> Event:
        made = an_io_error(domain=self.domain, device=kubevirt_device("database"))
        return replace(
            made,
            occurrences=replace(made.occurrences, total=total),
            incident=replace(made.incident, phase=phase),
        )

    def over(self, total: int) -> Event:
        made = a_resolved(domain=self.domain, device=kubevirt_device("database"))
        return replace(made, occurrences=replace(made.occurrences, total=total))

    def events(self) -> list[dict[str, Any]]:
        answer = self.server.kubectl("get", "events", "-n", self.namespace, "--output=json")
        return json.loads(answer.stdout)["items"]

    def described(self) -> str:
        return self.server.kubectl("describe", "vmi", "web-1.blue", "-n", self.namespace).stdout


@pytest.fixture
def guest(kube_apiserver: ApiServer) -> Guest:
    return Guest(kube_apiserver)


def integration(kubeconfig: Path):
    return open_integration(
        "kubernetes", React(kubernetes=ReactKubernetes(kubeconfig=str(kubeconfig), events="vmi"))
    )


def test_kubectl_describe_shows_volume_reason_and_count_and_then_that_it_is_over(guest: Guest) -> None:
    made = integration(guest.server.kubeconfig)

    def act(event: Event, row: int) -> None:
        action = made.wants(delivered(event, row=row))
        assert action is not None
        made.execute(action)
        made.execute(action)  # once more after a kill: nothing changes

    act(guest.error(1, Phase.OPENED), 1)
    act(guest.error(12), 2)
    (event,) = guest.events()
    assert event["involvedObject"]["uid"] == guest.uid
    assert (event["count"], event["type"], event["reason"]) == (12, "Warning", "VirtbusIOErrorPaused")
    shown = guest.described()
    assert "VirtbusIOErrorPaused" in shown
    assert "volume database (vdc): 12 I/O errors (enospc), the guest is paused; seen on compute-1" in shown
    act(guest.over(12), 3)
    (event,) = guest.events()
    assert (event["count"], event["type"], event["reason"]) == (12, "Normal", "VirtbusIOErrorResolved")
    assert "over after 42 s (resumed)" in guest.described()
    made.close()


def account(server: ApiServer, folder: Path, rules: list[dict[str, Any]], namespace: str | None) -> Path:
    """A kubeconfig of an account with the rights of nodes, and these in a namespace (None: in all)."""
    name = f"react-{uuid.uuid4().hex[:6]}"
    nodes = [{"apiGroups": [""], "resources": ["nodes", "nodes/status"], "verbs": ["get", "list", "patch"]}]
    ours = [{"apiGroups": [""], "resources": ["events"], "verbs": ["create"]}]
    subjects = [{"kind": "ServiceAccount", "name": name, "namespace": "default"}]
    group = "rbac.authorization.k8s.io"
    manifests: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": "default"}}
    ]
    for where, what in ((None, nodes), ("default", ours), (namespace, rules)):
        kind = "ClusterRole" if where is None else "Role"
        metadata = {"name": f"{name}-{len(manifests)}", **({} if where is None else {"namespace": where})}
        role = {"apiVersion": f"{group}/v1", "kind": kind, "metadata": metadata, "rules": what}
        bound = {"apiVersion": f"{group}/v1", "kind": f"{kind}Binding", "metadata": metadata,
                 "roleRef": {"apiGroup": group, "kind": kind, "name": metadata["name"]},
                 "subjects": subjects}  # fmt: skip
        manifests += [role, bound]
    for manifest in manifests:
        server.kubectl("apply", "-f", "-", manifest=manifest)
    limited = yaml.safe_load(Path(server.kubeconfig).read_text())
    token = server.kubectl("create", "token", name, "--namespace", "default").stdout.strip()
    limited["users"][0]["user"] = {"token": token}
    file = folder / "kubeconfig"
    file.write_text(yaml.safe_dump(limited))
    return file


@pytest.mark.parametrize("everywhere", [True, False], ids=["in all namespaces", "in one namespace"])
def test_the_documented_rights_suffice_and_where_they_lack_is_said(
    guest: Guest, tmp_path: Path, everywhere: bool
) -> None:
    rules = [{"apiGroups": [""], "resources": ["events"], "verbs": ["create", "patch"]}]
    made = integration(account(guest.server, tmp_path, rules, None if everywhere else guest.namespace))
    status = "ok" if everywhere else "warning"
    eventually(lambda: [check.status for check in made.probe()] == [status], "the roles are in force")
    for event in (guest.error(1), guest.error(2)):
        action = made.wants(delivered(event))
        assert action is not None
        made.execute(action)
    assert [event["count"] for event in guest.events()] == [2]
    made.close()


def test_an_account_without_the_rights_is_refused_by_name_and_holds_all_the_same(
    guest: Guest, tmp_path: Path
) -> None:
    rules = [{"apiGroups": [""], "resources": ["events"], "verbs": ["get"]}]
    made = integration(account(guest.server, tmp_path, rules, guest.namespace))
    eventually(lambda: [check.status for check in made.probe()] == ["warning"], "the roles are in force")
    action = made.wants(delivered(guest.error(1)))
    assert action is not None
    with pytest.raises(ActionRefused, match="events create and patch"):
        made.execute(action)
    made.close()


def test_a_vmi_whose_namespace_is_gone_is_not_waited_for(guest: Guest) -> None:
    owner = replace(guest.domain.owner, project_name="gone")
    event = replace(guest.error(1), domain=replace(guest.domain, owner=owner))
    made = integration(guest.server.kubeconfig)
    action = made.wants(delivered(event))
    assert action is not None
    with pytest.raises(VirtbusError, match="404") as raised:
        made.execute(action)
    assert not raised.value.retryable
    made.close()
