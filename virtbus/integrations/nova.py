"""OpenStack Nova: keep the scheduler from placing new guests on a host, and let it again.

It disables the compute service with a reason that names us, and enables only a service whose reason still
does. What an operator or Nova itself disabled (`AUTO: …`) is never touched, no service is ever forced down,
no guest is moved. That reason is the truth of what we hold: a service that somebody enabled was taken back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from virtbus.config import React
from virtbus.integrations.base import (
    HOLD,
    Action,
    Found,
    Hold,
    Integration,
    NotOurs,
    TargetMissing,
    seconds_of,
    utc,
)
from virtbus.integrations.openstack import call, connect
from virtbus.model import Check

MARK = "virtbus: "
_MOST_REASON = 255  # nova.conf's column
_REASON = re.compile(
    r"virtbus: (?P<why>.*?)( \[since (?P<since>\S+?)(, (?P<times>[0-9]{1,4}) times)?(, by (?P<by>.*))?\])?",
    re.S,
)


class Nova(Integration):
    """See the module."""

    name: ClassVar[str] = "nova"
    holds: ClassVar[bool] = True

    def __init__(self, settings: React) -> None:
        """Raises ConfigError when no cloud is configured."""
        self._hosts, self._binary = settings.hosts, settings.nova.binary
        self._cloud = connect(settings.nova.cloud, "react.nova.cloud")
        self._names: dict[str, str] = {}  # libvirt's name of a host: Nova's

    def execute(self, action: Action) -> str:
        """See virtbus.integrations.Integration."""
        told = action.body.get("target")
        service = self._service(told or action.target, self._services(told))
        disabled, ours = service.status == "disabled", _is_ours(service)
        compute = self._cloud.compute
        if action.verb == HOLD:
            if ours:
                return f"{service.host} was disabled by us"
            if disabled:
                raise NotOurs(f"{service.host} is disabled already: {service.disabled_reason or 'no reason'}")
            reason = _reason(action)
            call(
                f"disabling {self._binary} on {service.host}",
                lambda: compute.disable_service(service, service.host, self._binary, reason),
            )
            return f"{service.host} disabled: {reason}"
        if not ours:
            raise NotOurs(f"{service.host} is {service.status}, and not by us: {service.disabled_reason}")
        call(
            f"enabling {self._binary} on {service.host}",
            lambda: compute.enable_service(service, service.host, self._binary),
        )
        return f"{service.host} enabled"

    def look(self, hosts: Mapping[str, str | None], *, everything: bool) -> Found:
        """See virtbus.integrations.Integration."""
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
            lambda: list(self._cloud.compute.services(binary=self._binary, **asked)),
        )

    def _service(self, host: str, found: Sequence[Any] | None = None) -> Any:
        """The host's service: as told, by its name, or by its short name when that is only one."""
        found = self._services() if found is None else found
        told = self._hosts.get(host)
        wanted = [told] if told is not None else [host, host.partition(".")[0]]
        for name in wanted:
            matches = [one for one in found if one.host == name]
            if told is None and not matches:
                matches = [one for one in found if one.host.partition(".")[0] == name]
            if len(matches) == 1:
                self._names[host] = matches[0].host
                return matches[0]
        raise TargetMissing(
            f"no {self._binary} runs on {host}: name it in react.hosts if Nova calls it otherwise"
        )

    def probe(self) -> Sequence[Check]:
        """See virtbus.integrations.Integration."""
        try:
            found = self._services()
        except Exception as error:  # noqa: BLE001 - a probe tells, it does not fail
            return [Check("nova", "failed", str(error), "check clouds.yaml and the role (admin)", 69)]
        return [Check("nova", "ok", f"{len(found)} compute services")]

    def close(self) -> None:
        """See virtbus.integrations.Integration."""
        self._cloud.close()


def _is_ours(service: Any) -> bool:
    return service.status == "disabled" and (service.disabled_reason or "").startswith(MARK)


def _reason(action: Action) -> str:
    """Our mark, why, and since when and by whom where that is told; as long as Nova takes it."""
    end = ""
    if action.body.get("since") is not None:
        end = f" [since {utc(action.body['since'])}"
        end += f", {action.body['times']} times" if action.body.get("times", 1) > 1 else ""
        end += f", by {action.body['by'][:64]}]" if action.body.get("by") else "]"
    return (MARK + action.why)[: _MOST_REASON - len(end)] + end
