"""What a look says, as findings: an error that no event reported, or facts about one that was. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from virtbus.model import Device
from virtbus.observations import Burst, RawIoError
from virtbus.seen import is_told
from virtbus.sources.evidence import Look, Message, disks_by_target, gather, newest_message
from virtbus.sources.link import ACTION_REPORT, DISK_ERROR_NO_SPACE, DISK_ERRORS
from virtbus.words import ENOSPC, DiskError, Origin

ACTION_UNKNOWN = -1  # the guest runs, and the policy does not say whether it was ever paused


def late_event(raw: RawIoError, *, found: bool) -> Burst:
    """An event whose error was reported before it, as it is passed on: its facts, no count.

    `found`: by a look alone. Of a pause that a callback reported there is no doubt, whatever the clock says.
    """
    return Burst(raw, 0, raw.observed_at, raw.observed_at, late=found)


def newer_messages(
    look: Look,
    stamps: tuple[int, float] | None,
    last_told: Mapping[str, int],
    devices: Mapping[str, Device],
    slack_ns: int,
    ns: int,
) -> dict[str, Message]:
    """The messages about an error which nobody reported, by alias; the newest of each.

    `stamps`: of what nobody saw they lie behind the first and not behind the second (ns).
    `last_told`: alias → when its last error was reported (ns).
    """
    if stamps is None or look.messages is None:
        return {}
    since_ns, until_ns = stamps
    newer: dict[str, Message] = {}
    aliases = disks_by_target(devices)
    for message in look.messages:
        alias = aliases.get(message.target, "")
        if message.at_ns is None or not since_ns < message.at_ns <= until_ns:
            continue
        last_ns = last_told.get(alias)
        if last_ns is not None and is_told(message.at_ns, last_ns + slack_ns, ns + slack_ns):
            continue
        newer[alias] = message  # the last one is the newest error, which the newest stamp need not be
    return newer


def action_by_policy(device: Device | None) -> int:
    """What the hypervisor did about an error of a guest that runs, as far as the policies say."""
    policy = None if device is None else device.policy
    asked = set() if policy is None else {policy.write, policy.read} - {None}
    return ACTION_REPORT if asked and asked <= {"report"} else ACTION_UNKNOWN


def raw_error(
    domain: tuple[str, str, int | None], *, alias: str, code: int | None, action: int, ns: int
) -> RawIoError:
    """An error that no event reported; `code` is the disk's error (virDomainDiskErrorCode), if known."""
    # libvirt's reason and its "no space" disk error come from the same word of QEMU, "nospace".
    reason = ENOSPC if code == DISK_ERROR_NO_SPACE else ""
    return RawIoError(*domain, path="", alias=alias, action_code=action, reason=reason, observed_at=ns)


def burst_of(
    raw: RawIoError,
    count: int,
    origin: Origin,
    look: Look | None,
    device: Device | None,
    *,
    pause: bool,
) -> Burst:
    """An error, or (count 0) facts about one, with what a look found at its device."""
    target = None if device is None else device.target
    kept = None
    code = None
    if look is not None and target is not None:
        kept = newest_message(look.messages, target)
        code = (look.disk_errors or {}).get(target)
    evidence = gather(look, device, raw.reason, lifecycle=origin is Origin.LIFECYCLE, pause=pause)
    return Burst(
        raw=raw,
        count=count,
        first_ns=raw.observed_at,
        last_ns=raw.observed_at,
        origin=origin,
        message=kept.text if kept else None,
        stamp_ns=kept.at_ns if kept else None,
        disk_error=None if code is None else DISK_ERRORS.get(code, DiskError.UNSPECIFIED),
        evidence=evidence,
    )
