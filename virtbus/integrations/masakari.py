"""OpenStack Masakari: guests' I/O errors as notifications in its own schema.

What Masakari's schema can't carry: path, device, reason, message, counts, incident. Its server takes a
second error of the same guest within 180 s (`duplicate_notification_detection_interval`) for a duplicate
and answers 409, also when it is another disk. Its engine acts on IO_ERROR_REPORT only, and it restarts the
guest: such errors are sent only where an operator asked for it (`react.masakari.send_report`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from openstack import exceptions

from virtbus.config import React
from virtbus.consumer import Delivery
from virtbus.integrations.base import EVENT, Action, Integration
from virtbus.integrations.openstack import call, connect
from virtbus.model import Check, IoError
from virtbus.words import Action as Kind
from virtbus.words import Origin, Phase, Platform

_EVENTS = {Kind.PAUSE: "IO_ERROR_PAUSE", Kind.REPORT: "IO_ERROR_REPORT", Kind.NONE: "IO_ERROR_NONE"}


class Masakari(Integration):
    """See the module."""

    name: ClassVar[str] = "masakari"

    def __init__(self, settings: React) -> None:
        """Raises ConfigError when no cloud is configured."""
        self._hosts, self._drills = settings.hosts, settings.drills
        self._report = settings.masakari.send_report
        self._cloud = connect(settings.masakari.cloud, "react.masakari.cloud")

    def wants(self, delivery: Delivery) -> Action | None:
        """A notification for each incident of a Nova guest: when it opens, and when it pauses the guest.

        An incident that a reported error opened may pause the guest later. Each incident tells each kind
        once: that is the action's key, so that what comes again is not sent again.
        """
        event = delivery.event
        if not isinstance(event, IoError):
            return None
        if event.incident.phase is not Phase.OPENED and event.error.action is not Kind.PAUSE:
            return None
        if event.origin is Origin.REPLAY and not self._drills:
            return None
        if event.error.action is Kind.REPORT and not self._report:
            return None
        owner = event.domain.owner
        if owner is not None and owner.platform != Platform.OPENSTACK:
            return None
        kind = _EVENTS.get(event.error.action)
        if kind is None:
            return None
        body = notification(
            hostname=self._hosts.get(event.host.name, event.host.name),
            instance=(owner.id if owner is not None and owner.id else None) or event.domain.uuid,
            generated_time=event.error.occurred_at.strftime("%Y-%m-%dT%H:%M:%S"),
            event=kind,
        )
        key = f"{delivery.source}#{event.incident.id}#{kind}"
        return Action(key, event.domain.uuid, EVENT, f"{kind} of {event.domain.name}", body)

    def execute(self, action: Action) -> str:
        """See virtbus.integrations.Integration."""

        def create() -> Any:
            try:
                return self._cloud.instance_ha.create_notification(**action.body)
            except exceptions.ConflictException:
                return None

        made = call("sending a notification", create)
        if made is None:
            return "409: Masakari has one of this guest from the last minutes"
        return f"notification {made.notification_uuid or made.id}"

    def probe(self) -> Sequence[Check]:
        """See virtbus.integrations.Integration."""
        try:
            call(
                "listing notifications",
                lambda: next(iter(self._cloud.instance_ha.notifications(limit=1)), None),
            )
        except Exception as error:  # noqa: BLE001 - a probe tells, it does not fail
            return [Check("masakari", "failed", str(error), "check clouds.yaml and the role", 69)]
        return [Check("masakari", "ok", "reached")]

    def close(self) -> None:
        """See virtbus.integrations.Integration."""
        self._cloud.close()


def notification(*, hostname: str, instance: str, generated_time: str, event: str) -> dict[str, Any]:
    """The body's fields as Masakari's schema wants them (`generated_time` in UTC, without a zone)."""
    return {
        "type": "VM",
        "hostname": hostname,
        "generated_time": generated_time,
        "payload": {"event": "IO_ERROR", "instance_uuid": instance, "vir_domain_event": event},
    }
