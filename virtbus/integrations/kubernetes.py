"""Kubernetes: a node condition, a NoSchedule taint, an Event on the node. Nothing is evicted.

For clusters whose nodes run guests beside the pods (OpenStack-Helm, say). RBAC: nodes get, list, patch;
nodes/status patch; events create.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar, TypeVar

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException

from virtbus.config import React
from virtbus.errors import ConfigError
from virtbus.fleet import Blame, HostHealth
from virtbus.integrations.base import (
    HOLD,
    REPORT,
    Action,
    ActionRefused,
    Integration,
    NotOurs,
    TargetUnavailable,
)
from virtbus.model import Check

CONDITION = "VirtbusStorageHealthy"
ANNOTATION = "virtbus.io/tainted"  # its value is the key of the taint that we set
COMPONENT = "virtbus"
_TIMEOUT = 10.0
_CONFLICTS = 5
_MERGE = "application/merge-patch+json"
_STRATEGIC = "application/strategic-merge-patch+json"

_REASONS = {
    Blame.HOST: "HostAtFault",
    Blame.BACKEND: "BackendAtFault",
    Blame.UNDETERMINED: "Undetermined",
}

T = TypeVar("T")


class Kubernetes(Integration):
    """See the module. A taint is removed only when the node's annotation says that it is ours."""

    name: ClassVar[str] = "kubernetes"
    holds: ClassVar[bool] = True

    def __init__(self, settings: React) -> None:
        """Raises ConfigError when there is no cluster to be found."""
        told = settings.kubernetes
        self._hosts, self._taint = settings.hosts, told.taint
        self._names: dict[str, str] = {}
        try:
            if told.kubeconfig is None and told.context is None:
                load: Any = config.load_config
                load()
                made = client.ApiClient()
            else:
                new: Any = config.new_client_from_config
                made = new(config_file=told.kubeconfig, context=told.context)
        except (ConfigException, OSError) as error:
            raise ConfigError(
                f"no Kubernetes cluster: {error}; set react.kubernetes.kubeconfig, or run in a pod with a "
                "service account"
            ) from error
        # Any: every field of the client's models is Optional to a type checker.
        self._client: Any = made
        self._api: Any = client.CoreV1Api(made)

    def condition(self, host: HostHealth) -> Mapping[str, str] | None:
        """See virtbus.integrations.Integration."""
        if host.state != "observing":
            told = "its agent is not heard" if host.state == "silent" else "its agent does not see libvirt"
            return {"status": "Unknown", "reason": f"Agent{host.state.capitalize()}", "message": told}
        if host.blame is Blame.NONE:
            return {"status": "True", "reason": "NoTrouble", "message": "no guest has an open I/O error"}
        return {"status": "False", "reason": _REASONS[host.blame], "message": host.why[:1024]}

    def execute(self, action: Action) -> str:
        """See virtbus.integrations.Integration."""
        node = self._node(action.target)
        if action.verb == REPORT:
            return self._report(node, action)
        done = self._hold(node, action) if action.verb == HOLD else self._release(node)
        if action.verb == HOLD:
            self._event(node, action, "Warning", "VirtbusHeld", f"no new pods: {action.why}")
        else:
            self._event(node, action, "Normal", "VirtbusReleased", action.why)
        return done

    # ---- the three things

    def _report(self, node: str, action: Action) -> str:
        told = dict(action.body)
        before = self._call("reading", node, lambda: self._api.read_node(node, _request_timeout=_TIMEOUT))
        known = next((one for one in before.status.conditions or () if one.type == CONDITION), None)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        entry = {"type": CONDITION, "lastHeartbeatTime": now, **told}
        changed = known is None or known.status != told["status"]
        if changed:
            entry["lastTransitionTime"] = now
        # Conditions merge by their type: nobody else's are touched.
        body = {"status": {"conditions": [entry]}}
        self._call(
            "writing the condition of",
            node,
            lambda: self._api.patch_node_status(
                node, body, _content_type=_STRATEGIC, _request_timeout=_TIMEOUT
            ),
        )
        if changed and (known is not None or told["status"] != "True"):
            kind = "Normal" if told["status"] == "True" else "Warning"
            self._event(node, action, kind, f"Virtbus{told['reason']}", told["message"])
        return f"{CONDITION}={told['status']} ({told['reason']})"

    def _hold(self, node: str, action: Action) -> str:
        value = action.why.partition(":")[0]

        def change(
            taints: list[dict[str, Any]], ours: bool
        ) -> tuple[list[dict[str, Any]], str | None] | None:
            if any(one["key"] == self._taint for one in taints):
                if not ours:
                    raise NotOurs(f"node {node} already has the taint {self._taint}, and not from us")
                return None
            return [*taints, {"key": self._taint, "value": value, "effect": "NoSchedule"}], self._taint

        return f"taint {self._taint} " + ("set" if self._change(node, change) else "was there")

    def _release(self, node: str) -> str:
        def change(
            taints: list[dict[str, Any]], ours: bool
        ) -> tuple[list[dict[str, Any]], str | None] | None:
            if not ours:
                raise NotOurs(f"node {node} has no taint from us any more")
            return [one for one in taints if one["key"] != self._taint], None

        self._change(node, change)
        return f"taint {self._taint} removed"

    def _change(
        self,
        node: str,
        change: Callable[[list[dict[str, Any]], bool], tuple[list[dict[str, Any]], str | None] | None],
    ) -> bool:
        """Read, change and write the taints; somebody else's change in between is never overwritten."""
        for _ in range(_CONFLICTS):
            found = self._call("reading", node, lambda: self._api.read_node(node, _request_timeout=_TIMEOUT))
            taints = self._client.sanitize_for_serialization(found.spec.taints or [])
            ours = (found.metadata.annotations or {}).get(ANNOTATION) == self._taint
            changed = change(taints, ours)
            if changed is None:
                return False
            body = {
                "metadata": {
                    "resourceVersion": found.metadata.resource_version,
                    "annotations": {ANNOTATION: changed[1]},
                },
                "spec": {"taints": changed[0]},
            }
            try:
                self._api.patch_node(node, body, _content_type=_MERGE, _request_timeout=_TIMEOUT)
            except (ApiException, urllib3.exceptions.HTTPError) as error:
                if isinstance(error, ApiException) and error.status == 409:
                    continue
                raise _translated(error, "tainting", node) from error
            return True
        raise TargetUnavailable(f"node {node} changed {_CONFLICTS} times while we were at it")

    def _event(self, node: str, action: Action, kind: str, reason: str, message: str) -> None:
        """An Event named after the action: once more makes no second one."""
        digest = hashlib.sha256(action.key.encode()).hexdigest()[:16]
        now = datetime.now(UTC)
        body = client.CoreV1Event(
            metadata=client.V1ObjectMeta(name=f"{node}.{digest}", namespace="default"),
            involved_object=client.V1ObjectReference(api_version="v1", kind="Node", name=node, uid=node),
            type=kind,
            reason=reason,
            message=message[:1024],
            count=1,
            first_timestamp=now,
            last_timestamp=now,
            source=client.V1EventSource(component=COMPONENT),
            reporting_component=COMPONENT,
            reporting_instance=COMPONENT,
        )
        try:
            self._api.create_namespaced_event("default", body, _request_timeout=_TIMEOUT)
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            if not (isinstance(error, ApiException) and error.status == 409):
                raise _translated(error, "writing an Event on", node) from error

    # ---- names

    def _node(self, host: str) -> str:
        """The node of a host: as told, by its name, its short name, or the Hostname it gives itself."""
        told = self._hosts.get(host)
        if told is not None:
            return told
        known = self._names.get(host)
        if known is not None:
            return known
        found = self._call(
            "listing nodes for", host, lambda: self._api.list_node(_request_timeout=_TIMEOUT)
        ).items
        short = host.partition(".")[0]
        for wanted in dict.fromkeys((host, short)):
            matches = {
                node.metadata.name
                for node in found
                if wanted == node.metadata.name
                or any(
                    one.type == "Hostname" and one.address == wanted for one in node.status.addresses or ()
                )
            }
            if len(matches) == 1:
                self._names[host] = matches.pop()
                return self._names[host]
        raise NotOurs(f"no node is called {host}: name it in react.hosts if it has another name")

    def _call(self, doing: str, node: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            if isinstance(error, ApiException) and error.status == 404:
                self._names = {host: name for host, name in self._names.items() if name != node}
            raise _translated(error, doing, node) from error

    def probe(self) -> Sequence[Check]:
        """See virtbus.integrations.Integration."""
        wanted = (("get", "nodes", ""), ("list", "nodes", ""), ("patch", "nodes", ""),
                  ("patch", "nodes", "status"), ("create", "events", ""))  # fmt: skip
        refused = []
        try:
            for verb, resource, subresource in wanted:
                review = client.V1SelfSubjectAccessReview(
                    spec=client.V1SelfSubjectAccessReviewSpec(
                        resource_attributes=client.V1ResourceAttributes(
                            verb=verb,
                            resource=resource,
                            subresource=subresource or None,
                            namespace="default" if resource == "events" else None,
                        )
                    )
                )
                answer: Any = client.AuthorizationV1Api(self._client).create_self_subject_access_review(
                    review, _request_timeout=_TIMEOUT
                )
                if not answer.status.allowed:
                    refused.append(f"{verb} {resource}{'/' + subresource if subresource else ''}")
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            told = str(_translated(error, "asking", "the API server"))
            return [Check("kubernetes", "failed", told, "check the kubeconfig and the network", 69)]
        if refused:
            missing = ", ".join(refused)
            return [Check("kubernetes", "failed", f"not allowed: {missing}", "grant it to our account", 77)]
        return [Check("kubernetes", "ok", "reached, and everything that is needed is allowed")]

    def close(self) -> None:
        """See virtbus.integrations.Integration."""
        self._client.close()


def _translated(error: Exception, doing: str, node: str) -> TargetUnavailable | ActionRefused:
    text = f"{doing} node {node}: "
    if not isinstance(error, ApiException):
        return TargetUnavailable(f"{text}{error}")
    text += f"{error.status} {error.reason}"
    if error.status == 404:
        return NotOurs(f"{text}: there is no such node")
    if error.status in (400, 422):
        return ActionRefused(f"{text}: {error.body}")
    return TargetUnavailable(text)
