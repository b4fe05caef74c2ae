"""Kubernetes: a node condition, a NoSchedule taint, an Event on the node. Nothing is evicted.

For clusters whose nodes run guests beside the pods (OpenStack-Helm) or in them (KubeVirt, whose guests can
have Events of their own: vmi.py). RBAC: nodes get, list, patch; nodes/status patch; events create.

What we hold stands on the node: the annotation `virtbus.io/tainted` names the key of the taint that we
set (whatever the settings say by now), `virtbus.io/hold` says for whom, why and since when. Who wants a node
back removes taint and annotation (`virtbus react release NODE`); a taint that goes alone was overwritten by
another controller and is set again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import StringIO
from typing import Any, ClassVar, TypeVar

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from virtbus.config import React, ReactKubernetes
from virtbus.consumer import Delivery
from virtbus.errors import ConfigError, VirtbusError
from virtbus.fleet import Blame, HostHealth
from virtbus.integrations import answers, vmi
from virtbus.integrations.base import (
    EVENT,
    HOLD,
    REFUSED_STATUS,
    REPORT,
    Action,
    ActionRefused,
    Found,
    Hold,
    Integration,
    NotOurs,
    TargetDenied,
    TargetMissing,
    TargetUnavailable,
    seconds_of,
    target_of,
    utc,
)
from virtbus.model import Check
from virtbus.telemetry import Trouble, emit

CONDITION = "VirtbusStorageHealthy"
ANNOTATION = "virtbus.io/tainted"  # its value is the key of the taint that we set
DETAILS = "virtbus.io/hold"  # JSON: host, why, since, times, by
COMPONENT = "virtbus"
_TIMEOUT = 10.0
_CONFLICTS = 5
_LOGIN_SECONDS = 10.0  # a login that was refused is not read again more often
_KNOWN_SECONDS = 60.0  # the list of nodes is not read more often to find a host by its name
_MERGE = "application/merge-patch+json"
_STRATEGIC = "application/strategic-merge-patch+json"

_REASONS = {Blame.HOST: "HostAtFault", Blame.BACKEND: "BackendAtFault", Blame.UNDETERMINED: "Undetermined"}
_VALUES = frozenset({COMPONENT, *(blame.value for blame in _REASONS)})  # of our taint

T = TypeVar("T")


class _Conflict(TargetUnavailable):
    """Somebody else changed the object meanwhile, or it is there already."""


Taints = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Node:
    """What we need of a node, as the API server keeps it."""

    name: str
    uid: str
    version: str
    annotations: Mapping[str, str]
    taints: Taints
    shows: str | None  # the status of our condition, if it has one
    hostnames: frozenset[str]

    @property
    def ours(self) -> str | None:
        """The key of the taint that we set; None: we hold nothing here."""
        return self.annotations.get(ANNOTATION)

    def has(self, key: str | None) -> bool:
        """Whether it has a taint of that key."""
        return any(one.get("key") == key for one in self.taints)


class Kubernetes(Integration):
    """See the module. A taint is removed only when the node's annotation says that it is ours."""

    name: ClassVar[str] = "kubernetes"
    holds: ClassVar[bool] = True

    def __init__(self, settings: React) -> None:
        """Raises ConfigError when there is no cluster to be found."""
        self._own = own = settings.kubernetes
        self._hosts, self._taint = settings.hosts, own.taint
        self._vmis, self._drills = own.events == "vmi", settings.drills
        self._names: dict[str, str] = {}  # host: node
        self._listed: list[_Node] = []
        self._listed_at = float("-inf")
        self._log_in()

    def _log_in(self) -> None:
        self._logged_in_at = time.monotonic()
        # Any: every field of the client's models is Optional to a type checker.
        self._client: Any = _logged_in(self._own)
        self._api: Any = client.CoreV1Api(self._client)

    def _log_in_again(self) -> None:
        """A token or certificate that was refused may have been renewed since the client read it."""
        if time.monotonic() - self._logged_in_at < _LOGIN_SECONDS:
            return
        before = self._client
        with suppress(ConfigError):  # the file may be in the middle of being replaced
            self._log_in()
            before.close()

    def condition(self, host: HostHealth) -> Mapping[str, str] | None:
        """See Integration."""
        if host.state != "observing":
            message = "its agent is not heard" if host.state == "silent" else "its agent does not see libvirt"
            return {"status": "Unknown", "reason": f"Agent{host.state.capitalize()}", "message": message}
        if host.blame is Blame.NONE:
            return {"status": "True", "reason": "NoTrouble", "message": "no guest has an open I/O error"}
        return {"status": "False", "reason": _REASONS[host.blame], "message": host.why[:1024]}

    def wants(self, delivery: Delivery) -> Action | None:
        """See Integration."""
        return vmi.wanted(delivery, drills=self._drills) if self._vmis else None

    def execute(self, action: Action) -> str:
        """See Integration."""
        if action.verb == EVENT:
            try:
                return vmi.put(self._api, action.body, _TIMEOUT)
            except TargetDenied:
                self._log_in_again()
                raise
        node = action.body.get("target") or self._find(action.target)
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
        condition = dict(action.body)
        known = self._read(node).shows
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        entry = {"type": CONDITION, "lastHeartbeatTime": now, **condition}
        changed = known != condition["status"]
        if changed:
            entry["lastTransitionTime"] = now
        # Conditions merge by their type: nobody else's are touched.
        body = {"status": {"conditions": [entry]}}
        write = self._api.patch_node_status
        self._call("writing the condition of", node, write, node, body, _content_type=_STRATEGIC)
        if changed and (known is not None or condition["status"] != "True"):
            kind = "Normal" if condition["status"] == "True" else "Warning"
            self._event(node, action, kind, f"Virtbus{condition['reason']}", condition["message"])
        return f"{CONDITION}={condition['status']} ({condition['reason']})"

    def _hold(self, node: str, action: Action) -> str:
        value = action.why.partition(":")[0]
        value = value if value in _VALUES else COMPONENT
        taint = {"key": self._taint, "value": value, "effect": "NoSchedule"}

        def change(found: _Node) -> tuple[Taints, str | None] | None:
            if found.has(self._taint) and found.ours != self._taint:
                raise NotOurs(f"node {node} already has the taint {self._taint}, and not from us")
            if found.has(self._taint):
                return None
            return [*self._without(found), taint], self._taint

        changed = self._change(node, change, _details(action))
        return f"taint {self._taint} " + ("set" if changed else "was there")

    def _release(self, node: str) -> str:
        removed = self._taint

        def change(found: _Node) -> tuple[Taints, str | None] | None:
            nonlocal removed
            if found.ours is None:
                raise NotOurs(f"node {node} has no taint from us any more")
            removed = found.ours
            return self._without(found), None

        self._change(node, change, None)
        return f"taint {removed} removed"

    def _without(self, found: _Node) -> Taints:
        """The node's taints but for the one that our mark names.

        A node may write its own annotations, and its taints it may not: under another key than ours only a
        taint that says what ours say is taken away, or the mark would rid a node of an operator's.
        """

        def is_ours(one: dict[str, Any]) -> bool:
            known = found.ours == self._taint or one.get("value") in _VALUES
            return known and (one.get("key"), one.get("effect")) == (found.ours, "NoSchedule")

        return [one for one in found.taints if not is_ours(one)]

    def _change(
        self, node: str, change: Callable[[_Node], tuple[Taints, str | None] | None], details: str | None
    ) -> bool:
        """Read, change and write the taints; somebody else's change in between is never overwritten."""
        for _ in range(_CONFLICTS):
            found = self._read(node)
            changed = change(found)
            if changed is None:
                return False
            body = {
                "metadata": {
                    "resourceVersion": found.version,
                    "annotations": {ANNOTATION: changed[1], DETAILS: details},
                },
                "spec": {"taints": changed[0]},
            }
            with suppress(_Conflict):
                self._call("tainting", node, self._api.patch_node, node, body, _content_type=_MERGE)
                return True
        raise TargetUnavailable(f"node {node} changed {_CONFLICTS} times while we were at it")

    def _event(self, node: str, action: Action, kind: str, reason: str, message: str) -> None:
        """An Event named after the action: once more makes no second one. Only a courtesy to people: whatever
        refuses it (rights, quota, a namespace that is gone), what it reports was done.
        """
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
            write = self._api.create_namespaced_event
            self._call("writing an Event on", node, write, "default", body, kind="Event")
        except _Conflict:
            pass  # it is there already
        except VirtbusError as error:
            emit(Trouble("Kubernetes Event", error))

    # ---- what is held

    def look(self, hosts: Mapping[str, str | None], *, everything: bool) -> Found:
        """See Integration."""
        if everything:
            self._list()
        nodes: dict[str, _Node] = {}
        by_host: dict[str, _Node] = {}
        listed = {node.name: node for node in self._listed} if everything else {}
        for host, target in hosts.items():
            try:
                name = target or self._find(host)
                node = listed.get(name) if everything else (nodes.get(name) or self._read(name))
            except TargetMissing:
                continue
            if node is not None:
                by_host[host] = nodes[node.name] = node
        marked = (listed or nodes).values()
        return Found(
            holds=[self._mark(node) for node in marked if node.ours is not None],
            uids={host: node.uid for host, node in by_host.items()},
            shown={host: node.shows for host, node in by_host.items()},
        )

    def _mark(self, node: _Node) -> Hold:
        try:
            details = json.loads(node.annotations.get(DETAILS) or "{}")
            host = str(details.get("host"))
            # A node may write its own annotations: what it says of another host counts for nothing.
            return Hold(
                host=host if self._hosts.get(host, self._named(host)) == node.name else self._host(node.name),
                target=node.name,
                why=str(details.get("why", ""))[:1024],
                since=seconds_of(details.get("since")),
                times=int(details.get("times", 1)),
                by=str(details.get("by", ""))[:256],
                uid=node.uid,
                intact=node.has(node.ours),
            )
        # Somebody else wrote into our annotation: no JSON, no object, numbers without end, any nesting.
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            return Hold(self._host(node.name), node.name, "", uid=node.uid, intact=node.has(node.ours))

    def _host(self, node: str) -> str:
        return next((host for host, name in self._hosts.items() if name == node), node)

    def _read(self, node: str) -> _Node:
        return _facts(self._call("reading", node, self._api.read_node, node))

    def _list(self) -> None:
        found = self._call("listing", "*", self._api.list_node, kind="NodeList")
        self._listed = [_facts(one) for one in found.get("items") or ()]
        self._listed_at = time.monotonic()
        self._names.clear()

    # ---- names

    def _find(self, host: str) -> str:
        """The node of a host: as given, by its name, its short name, or the Hostname it gives itself."""
        named = self._hosts.get(host)
        if named is not None:
            return named
        known = self._names.get(host)
        if known is None:
            known = self._named(host)
        if known is None and time.monotonic() - self._listed_at > _KNOWN_SECONDS:
            self._list()
            known = self._named(host)
        if known is None:
            raise TargetMissing(f"no node is called {host}: name it in react.hosts if it has another name")
        self._names[host] = known
        return known

    def _named(self, host: str) -> str | None:
        # kubelet makes its node's name of the hostname in lower case.
        return target_of(host.lower(), {node.name: node.hostnames for node in self._listed})

    def _call(
        self, doing: str, node: str, call: Callable[..., Any], *words: Any, kind: str = "Node", **more: Any
    ) -> dict[str, Any]:
        """Do one request; what it answers, of that kind. Raises what `_translated` makes of its error.

        The client's own objects would cost a second of CPU for 1,000 nodes, and refuse what lacks any part.
        """
        try:
            answer: bytes = call(*words, **more, _request_timeout=_TIMEOUT, _preload_content=False).data
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            if isinstance(error, ApiException) and error.status == 404:
                self._names = {host: name for host, name in self._names.items() if name != node}
            if isinstance(error, ApiException) and error.status == 401:
                self._log_in_again()
            raise _translated(error, doing, node) from error
        return answers.kubernetes_object(answer, kind, f"{doing} node {node}")

    def probe(self) -> Sequence[Check]:
        """See Integration."""
        wanted = [("get", "nodes", None), ("list", "nodes", None), ("patch", "nodes", None),
                  ("patch", "nodes/status", None), ("create", "events", "default")]  # fmt: skip
        everywhere = [("create", "events", None), ("patch", "events", None)] if self._vmis else []
        try:
            refused = [f"{one[0]} {one[1]}" for one in wanted if not self._may(*one)]
            narrow = not all(self._may(*one) for one in everywhere)
        except VirtbusError as error:
            return [Check("kubernetes", "failed", str(error), "check the kubeconfig and the network", 69)]
        if refused:
            missing = ", ".join(refused)
            return [Check("kubernetes", "failed", f"not allowed: {missing}", "grant it to our account", 77)]
        if narrow:
            summary = "reached; Events on VMIs may not be written in every namespace"
            return [
                Check("kubernetes", "warning", summary, "grant create and patch of events where guests are")
            ]
        return [Check("kubernetes", "ok", "reached, and everything that is needed is allowed")]

    def _may(self, verb: str, resource: str, namespace: str | None) -> bool:
        """Whether our account may; without a namespace: in all of them."""
        name, _, below = resource.partition("/")
        asked = client.V1ResourceAttributes(
            verb=verb, resource=name, subresource=below or None, namespace=namespace
        )
        spec = client.V1SelfSubjectAccessReviewSpec(resource_attributes=asked)
        ask = client.AuthorizationV1Api(self._client).create_self_subject_access_review
        review = client.V1SelfSubjectAccessReview(spec=spec)
        status = self._call("asking", "*", ask, review, kind="SelfSubjectAccessReview").get("status")
        return bool((status or {}).get("allowed"))

    def close(self) -> None:
        """See Integration."""
        self._client.close()


def _logged_in(own: ReactKubernetes) -> Any:
    """The client of who we are now. Raises ConfigError when there is no cluster to be found."""
    try:
        if own.kubeconfig is None and own.context is None:
            load: Any = config.load_config
            with redirect_stdout(StringIO()):  # it prints where it looks, among what our commands print
                load()
            settings: Any = client.Configuration.get_default_copy()
        else:
            new: Any = config.new_client_from_config
            settings = new(config_file=own.kubeconfig, context=own.context).configuration
        # Its own retries would sleep for as long as a server's Retry-After says: that is ours to decide.
        settings.retries = urllib3.Retry(0)
        made: Any = client.ApiClient(settings)
        answers.bound(made.rest_client.pool_manager)
        return made
    # OSError, YAMLError, TypeError, …: its own reader trusts the file to be one.
    except Exception as error:
        why = " ".join(str(error).split())
        raise ConfigError(
            f"no Kubernetes cluster: {why}; set react.kubernetes.kubeconfig, or run in a pod with a "
            "service account"
        ) from error


def _translated(error: Exception, doing: str, node: str) -> TargetUnavailable | ActionRefused:
    text = f"{doing} node {node}: "
    if not isinstance(error, ApiException):
        return TargetUnavailable(f"{text}{error}")
    text += f"{error.status} {error.reason}"
    if error.status == 409:
        return _Conflict(text)
    if error.status == 404:
        return TargetMissing(f"{text}: there is no such node")
    if error.status in REFUSED_STATUS:
        return ActionRefused(f"{text}: {error.body}")
    return TargetDenied(text) if error.status in (401, 403) else TargetUnavailable(text)


def _facts(node: dict[str, Any]) -> _Node:
    metadata, status = node["metadata"], node.get("status", {})
    return _Node(
        name=metadata["name"],
        uid=metadata.get("uid", ""),
        version=metadata.get("resourceVersion", ""),
        annotations=metadata.get("annotations") or {},
        taints=node.get("spec", {}).get("taints") or [],
        shows=next(
            (one.get("status") for one in status.get("conditions") or () if one.get("type") == CONDITION),
            None,
        ),
        hostnames=frozenset(
            one.get("address", "").lower()
            for one in status.get("addresses") or ()
            if one.get("type") == "Hostname"
        ),
    )


def _details(action: Action) -> str:
    details = {"host": action.target, "why": action.why[:1024], **{
        name: action.body[name] for name in ("times", "by") if action.body.get(name)
    }}  # fmt: skip
    if action.body.get("since") is not None:
        details["since"] = utc(action.body["since"])
    return json.dumps(details)
