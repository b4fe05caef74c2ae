"""An incident as a Kubernetes Event on its VirtualMachineInstance, which `kubectl describe vmi` shows.

One Event per incident: it is written again with each change, and turns `Normal` when the incident is over.
RBAC: events create, patch, in the namespaces of the guests.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import urllib3
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from virtbus.consumer import Delivery
from virtbus.integrations.answers import kubernetes_object
from virtbus.integrations.base import EVENT, Action, ActionRefused, TargetDenied, TargetUnavailable
from virtbus.model import IoError, IoErrorResolved
from virtbus.words import Action as Did
from virtbus.words import Origin, Platform

COMPONENT = "virtbus"
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SAID = {
    Did.PAUSE: ("IOErrorPaused", "the guest is paused"),
    Did.REPORT: ("IOError", "the guest got the error"),
}


def wanted(delivery: Delivery, *, drills: bool) -> Action | None:
    """What to write about one event; None unless it is about a guest of KubeVirt."""
    event = delivery.event
    if not isinstance(event, IoError | IoErrorResolved):
        return None
    if isinstance(event, IoError) and event.origin is Origin.REPLAY and not drills:
        return None
    owner = event.domain.owner
    if owner is None or owner.platform != Platform.KUBEVIRT:
        return None
    namespace, name = owner.project_name or "", owner.name or ""
    if not (owner.id and _NAMESPACE.fullmatch(namespace) and _NAME.fullmatch(name)):
        return None
    digest = hashlib.sha256(f"{delivery.source} {event.incident.id}".encode()).hexdigest()[:16]
    reason, message = _words(event)
    seen = event.occurrences
    body = {
        "namespace": namespace, "name": name, "uid": owner.id, "event": f"{name[:230]}.{digest}",
        "type": "Warning" if isinstance(event, IoError) else "Normal", "reason": reason, "message": message,
        "count": min(seen.total, 2**31 - 1), "first": _stamp(event.incident.opened_at),
        "last": _stamp(seen.last),
    }  # fmt: skip
    key, topic = f"{delivery.source}#{delivery.id}", f"vmi/{digest}"
    return Action(key, f"{namespace}/{name}", EVENT, f"{reason}: {message}"[:1024], body, topic)


def put(api: Any, body: Mapping[str, Any], timeout: float) -> str:
    """Write the Event. Raises ActionRefused when our account may not, TargetUnavailable when it may come."""
    namespace, name = body["namespace"], body["event"]
    told = {"type": body["type"], "reason": f"Virtbus{body['reason']}", "message": body["message"][:1024],
            "count": body["count"], "lastTimestamp": body["last"]}  # fmt: skip
    vmi = client.V1ObjectReference(
        api_version="kubevirt.io/v1", kind="VirtualMachineInstance", namespace=namespace, name=body["name"],
        uid=body["uid"],
    )  # fmt: skip
    whole = {
        **told, "metadata": {"name": name, "namespace": namespace}, "involvedObject": vmi,
        "firstTimestamp": body["first"], "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT, "reportingInstance": COMPONENT,
    }  # fmt: skip
    # Not as the client's objects: those refuse one that lacks anything.
    asked = {"_request_timeout": timeout, "_preload_content": False}
    doing = f"writing an Event on VMI {namespace}/{body['name']}"
    try:
        try:
            answer = api.patch_namespaced_event(name, namespace, told, **asked).data
        except ApiException as error:
            if error.status != 404:
                raise
            if body["type"] == "Normal":
                return "its Event is not there (any more)"
            answer = api.create_namespaced_event(namespace, whole, **asked).data
    except (ApiException, urllib3.exceptions.HTTPError) as error:
        if not isinstance(error, ApiException):
            raise TargetUnavailable(f"{doing}: {error}") from error
        doing += f": {error.status} {error.reason}"
        if error.status in (400, 403, 404, 422):
            raise ActionRefused(f"{doing}; it takes events create and patch there") from error
        raise (TargetDenied if error.status == 401 else TargetUnavailable)(doing) from error
    kubernetes_object(answer, "Event", doing)
    return f"Event {name}: {told['reason']}"


def _words(event: IoError | IoErrorResolved) -> tuple[str, str]:
    device, times = event.device, event.occurrences.total
    source = device.source
    volume = (source.volume if source is not None else None) or device.alias or "an unknown disk"
    target = f" ({device.target})" if device.target else ""
    least = "at least " if event.occurrences.lower_bound else ""
    counted = f"volume {volume}{target}: {least}{times} I/O error{'' if times == 1 else 's'}"
    if isinstance(event, IoErrorResolved):
        over = f"over after {event.resolution.duration_seconds:.0f} s ({event.resolution.cause})"
        return "IOErrorResolved", f"{counted}, {over}; seen on {event.host.name}"
    reason, said = _SAID.get(event.error.action, ("IOError", f"action {event.error.action}"))
    why = event.error.message or event.error.reason
    flapping = ", paused and resumed again and again" if event.incident.flapping else ""
    return reason, f"{counted}{f' ({why})' if why else ''}, {said}{flapping}; seen on {event.host.name}"


def _stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
