"""OpenStack Nova: keep the scheduler from placing new guests on a host, and let it again.

It disables the compute service with a reason that names us, and enables only a service whose reason still
does. What an operator or Nova itself disabled (`AUTO: …`) is never touched, no service is ever forced down,
no guest is moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from virtbus.config import React
from virtbus.integrations.base import HOLD, Action, Integration, NotOurs
from virtbus.integrations.openstack import call, connect
from virtbus.model import Check

MARK = "virtbus: "
_MOST_REASON = 255  # nova.conf's column


class Nova(Integration):
    """See the module."""

    name: ClassVar[str] = "nova"
    holds: ClassVar[bool] = True

    def __init__(self, settings: React) -> None:
        """Raises ConfigError when no cloud is configured."""
        self._hosts, self._binary = settings.hosts, settings.nova.binary
        self._cloud = connect(settings.nova.cloud, "react.nova.cloud")

    def execute(self, action: Action) -> str:
        """See virtbus.integrations.Integration."""
        service = self._service(action.target)
        disabled = service.status == "disabled"
        ours = disabled and (service.disabled_reason or "").startswith(MARK)
        compute = self._cloud.compute
        if action.verb == HOLD:
            if ours:
                return f"{service.host} was disabled by us"
            if disabled:
                raise NotOurs(f"{service.host} is disabled already: {service.disabled_reason or 'no reason'}")
            reason = (MARK + action.why)[:_MOST_REASON]
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

    def _service(self, host: str) -> Any:
        """The host's service: as told, by its name, or by its short name when that is only one."""
        found = call(
            "listing compute services", lambda: list(self._cloud.compute.services(binary=self._binary))
        )
        told = self._hosts.get(host)
        wanted = [told] if told is not None else [host, host.partition(".")[0]]
        for name in wanted:
            matches = [one for one in found if one.host == name]
            if told is None and not matches:
                matches = [one for one in found if one.host.partition(".")[0] == name]
            if len(matches) == 1:
                return matches[0]
        raise NotOurs(f"no {self._binary} runs on {host}: name it in react.hosts if Nova calls it otherwise")

    def probe(self) -> Sequence[Check]:
        """See virtbus.integrations.Integration."""
        try:
            found = call(
                "listing compute services", lambda: list(self._cloud.compute.services(binary=self._binary))
            )
        except Exception as error:  # noqa: BLE001 - a probe tells, it does not fail
            return [Check("nova", "failed", str(error), "check clouds.yaml and the role (admin)", 69)]
        return [Check("nova", "ok", f"{len(found)} compute services")]

    def close(self) -> None:
        """See virtbus.integrations.Integration."""
        self._cloud.close()
