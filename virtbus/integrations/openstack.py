"""OpenStack: Nova keeps new guests off a host, Masakari is notified of guests' I/O errors.

**Nova**: disables the compute service with a reason that names us, and enables only a service whose reason
still does. What an operator or Nova itself disabled (`AUTO: …`) is never touched, no service is ever forced
down, no guest is moved. That reason is the truth of what we hold: a service that somebody enabled was taken
back.

**Masakari**: what its schema can't carry: path, device, reason, message, counts, incident. Its server takes a
second error of the same guest within 180 s (`duplicate_notification_detection_interval`) for a duplicate and
answers 409, also when it is another disk. Its engine acts on IO_ERROR_REPORT only, and it restarts the guest:
such errors are sent only where an operator asked for it (`react.masakari.send_report`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import openstack
import requests
from keystoneauth1 import exceptions as keystone
from openstack import exceptions

from virtbus import __version__
from virtbus.config import React
from virtbus.consumer import Delivery
from virtbus.errors import ConfigError
from virtbus.integrations import answers
from virtbus.integrations.base import (
    EVENT,
    HOLD,
    REFUSED_STATUS,
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
    short,
    target_of,
    utc,
)
from virtbus.model import Check, IoError
from virtbus.words import Action as Kind
from virtbus.words import Origin, Phase, Platform

TIMEOUT_SECONDS = 15
MARK = "virtbus: "
_MOST_REASON = 255  # nova.conf's column
_REASON = re.compile(
    r"virtbus: (?P<why>.*?)( \[since (?P<since>\S+?)(, (?P<times>[0-9]{1,4}) times)?(, by (?P<by>.*))?\])?",
    re.S,
)
_EVENTS = {Kind.PAUSE: "IO_ERROR_PAUSE", Kind.REPORT: "IO_ERROR_REPORT", Kind.NONE: "IO_ERROR_NONE"}

T = TypeVar("T")


def call(doing: str, call: Callable[[], T]) -> T:
    """Do one request. Raises TargetUnavailable, or ActionRefused when once more would change nothing."""
    try:
        return call()
    except exceptions.HttpException as error:
        status = error.status_code
        text = f"{doing}: {status or ''} {error.details or error.message}".strip()
        if status in REFUSED_STATUS:
            raise ActionRefused(text) from error
        raise (TargetDenied(text) if status in (401, 403) else TargetUnavailable(text)) from error
    except (exceptions.SDKException, keystone.ClientException, requests.RequestException, OSError) as error:
        raise TargetUnavailable(f"{doing}: {error}") from error
    # What the SDK makes of an answer that is none of the service's.
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise TargetUnavailable(
            f"{doing}: can't read the answer ({error!r}): is a gateway in between?"
        ) from error


class _OpenStack(Integration):
    """A connection that logs in at its first use."""

    def __init__(self, settings: React, cloud: str | None) -> None:
        """Raises ConfigError when no cloud is configured."""
        self._hosts = settings.hosts
        try:
            self._cloud: Any = openstack.connect(
                cloud=cloud, app_name="virtbus", app_version=__version__, api_timeout=TIMEOUT_SECONDS
            )
            http: Any = self._cloud.session.session
            for adapter in http.adapters.values():
                answers.bound(adapter.poolmanager)
        except (
            exceptions.ConfigException,
            keystone.MissingRequiredOptions,
            keystone.NoMatchingPlugin,
        ) as error:
            raise ConfigError(
                f"no OpenStack cloud: {error}; name one of clouds.yaml in react.{self.name}.cloud, "
                "or set the OS_* variables"
            ) from error

    def probe(self) -> Sequence[Check]:
        """See Integration."""
        try:
            summary = self._reached()
        except Exception as error:  # noqa: BLE001 - a probe reports, it does not fail
            return [Check(self.name, "failed", str(error), "check clouds.yaml and the role (admin)", 69)]
        return [Check(self.name, "ok", summary)]

    def _reached(self) -> str:
        raise NotImplementedError

    def close(self) -> None:
        """See Integration."""
        self._cloud.close()


class Nova(_OpenStack):
    """See the module."""

    name: ClassVar[str] = "nova"
    holds: ClassVar[bool] = True

    def __init__(self, settings: React) -> None:
        """Raises ConfigError when no cloud is configured."""
        super().__init__(settings, settings.nova.cloud)
        self._binary = settings.nova.binary
        self._names: dict[str, str] = {}  # libvirt's name of a host: Nova's

    def execute(self, action: Action) -> str:
        """See Integration."""
        target = action.body.get("target")
        service = self._service(target or action.target, self._services(target))
        disabled, ours, compute = service.status == "disabled", _is_ours(service), self._cloud.compute
        host = service.host
        if action.verb == HOLD:
            if ours:
                return f"{service.host} was disabled by us"
            if disabled:
                raise NotOurs(f"{service.host} is disabled already: {service.disabled_reason or 'no reason'}")
            reason = _reason(action)
            call(
                f"disabling {self._binary} on {service.host}",
                lambda: compute.disable_service(service, host, self._binary, reason),
            )
            self._check(host, disabled=True)
            return f"{host} disabled: {reason}"
        if not ours:
            raise NotOurs(f"{service.host} is {service.status}, and not by us: {service.disabled_reason}")
        call(
            f"enabling {self._binary} on {service.host}",
            lambda: compute.enable_service(service, host, self._binary),
        )
        self._check(host, disabled=False)
        return f"{host} enabled"

    def _check(self, host: str, *, disabled: bool) -> None:
        """Read what became of it: the SDK takes a login page that a gateway answers with 200 for done."""
        if _is_ours(self._service(host, self._services(host))) is not disabled:
            verb = "disabling" if disabled else "enabling"
            raise TargetUnavailable(f"{verb} {self._binary} on {host}: it was answered and not done")

    def look(self, hosts: Mapping[str, str | None], *, everything: bool) -> Found:
        """See Integration."""
        services = self._services() if everything else []
        uids = {}
        for host, target in hosts.items():
            found = services if everything else self._services(target or self._names.get(host, host))
            try:
                service = self._service(target or host, found)
            except TargetMissing:
                continue
            uids[host] = str(service.id)
            if not everything:
                services.append(service)
        return Found([self._mark(one) for one in services if _is_ours(one)], uids)

    def _mark(self, service: Any) -> Hold:
        match = _REASON.fullmatch(service.disabled_reason)
        assert match is not None  # it begins with our mark
        return Hold(
            host=next((host for host, name in self._hosts.items() if name == service.host), service.host),
            target=service.host,
            why=match["why"],
            since=seconds_of(match["since"]),
            times=int(match["times"] or 1),
            by=match["by"] or "",
            uid=str(service.id),
        )

    def _services(self, host: str | None = None) -> list[Any]:
        asked = {} if host is None else {"host": host}
        return call(
            "listing compute services",
            lambda: list(
                self._cloud.compute.services(binary=self._binary, **asked)
            ),  # logs in within the call
        )

    def _service(self, host: str, found: Sequence[Any] | None = None) -> Any:
        """The host's service among `found`, or among all: as given, or by its name."""
        found = self._services() if found is None else found
        name = self._hosts.get(host) or target_of(host, {one.host: {short(one.host)} for one in found})
        for service in found:
            if service.host == name:
                self._names[host] = service.host
                return service
        raise TargetMissing(
            f"no {self._binary} runs on {host}: name it in react.hosts if Nova calls it otherwise"
        )

    def _reached(self) -> str:
        return f"{len(self._services())} compute services"


def _is_ours(service: Any) -> bool:
    return service.status == "disabled" and (service.disabled_reason or "").startswith(MARK)


def _reason(action: Action) -> str:
    """Our mark, why, and since when and by whom where that is known; as long as Nova takes it."""
    end = ""
    if action.body.get("since") is not None:
        end = f" [since {utc(action.body['since'])}"
        end += f", {action.body['times']} times" if action.body.get("times", 1) > 1 else ""
        end += f", by {action.body['by'][:64]}]" if action.body.get("by") else "]"
    return (MARK + action.why)[: _MOST_REASON - len(end)] + end


class Masakari(_OpenStack):
    """See the module."""

    name: ClassVar[str] = "masakari"

    def __init__(self, settings: React) -> None:
        """Raises ConfigError when no cloud is configured."""
        super().__init__(settings, settings.masakari.cloud)
        self._drills, self._report = settings.drills, settings.masakari.send_report

    def wants(self, delivery: Delivery) -> Action | None:
        """A notification for each incident of a Nova guest: when it opens, and when it pauses the guest.

        An incident that a reported error opened may pause the guest later. Each incident reports each kind
        once: that is the action's key, so that what comes again is not sent again.
        """
        event = delivery.event
        if not isinstance(event, IoError):
            return None
        kind, owner = event.error.action, event.domain.owner
        if (
            (event.incident.phase is not Phase.OPENED and kind is not Kind.PAUSE)
            or (event.origin is Origin.REPLAY and not self._drills)
            or (kind is Kind.REPORT and not self._report)
            or (owner is not None and owner.platform != Platform.OPENSTACK)
            or kind not in _EVENTS
        ):
            return None
        instance = (owner.id if owner is not None and owner.id else None) or event.domain.uuid
        # As Masakari's schema wants it; generated_time in UTC, without a zone.
        body = {
            "type": "VM",
            "hostname": self._hosts.get(event.host.name, event.host.name),
            "generated_time": event.error.occurred_at.strftime("%Y-%m-%dT%H:%M:%S"),
            "payload": {"event": "IO_ERROR", "instance_uuid": instance, "vir_domain_event": _EVENTS[kind]},
        }
        key = f"{delivery.source}#{event.incident.id}#{_EVENTS[kind]}"
        return Action(key, event.domain.uuid, EVENT, f"{_EVENTS[kind]} of {event.domain.name}", body)

    def execute(self, action: Action) -> str:
        """See Integration."""

        def create() -> Any:
            try:
                return self._cloud.instance_ha.create_notification(**action.body)
            except exceptions.ConflictException:
                return None

        made = call("sending a notification", create)
        if made is None:
            return "409: Masakari has one of this guest from the last minutes"
        if not made.notification_uuid:  # the SDK takes a gateway's login page for an answer
            raise TargetUnavailable("sending a notification: the answer names none: is a gateway in between?")
        return f"notification {made.notification_uuid}"

    def _reached(self) -> str:
        call(
            "listing notifications", lambda: next(iter(self._cloud.instance_ha.notifications(limit=1)), None)
        )
        return "reached"
