"""What a look at a domain in trouble found, and what it says about an error: facts and evidence. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from virtbus.model import MAX_COUNT, Device, Evidence, to_ns
from virtbus.sources.link import (
    DISK_ERROR_NO_SPACE,
    DISK_ERRORS,
    PAUSED,
    PAUSED_IOERROR,
    PAUSED_UNKNOWN,
    STATES,
    Space,
)
from virtbus.words import ENOSPC
from virtbus.words import EvidenceCheck as Looked
from virtbus.words import EvidenceVerdict as Says


@dataclass(frozen=True, slots=True)
class Message:
    """One "I/O error" line of virDomainGetMessages, as far as it could be read."""

    target: str
    at_ns: int | None
    text: str


@dataclass(frozen=True, slots=True)
class FreeSpace:
    """What the file system under an image has left (statvfs), on a host whose paths we see."""

    free_bytes: int
    path: str


@dataclass(frozen=True, slots=True)
class Look:
    """What was asked about a domain in trouble, and answered; None is "could not be had"."""

    state: int
    reason: int
    disk_errors: Mapping[str, int] | None = None  # by target
    messages: tuple[Message, ...] | None = None
    spaces: Mapping[str, Space] = field(default_factory=dict)
    free: Mapping[str, FreeSpace] = field(default_factory=dict)
    asked_at: float = 0.0  # monotonic: what began later it can't have seen

    @property
    def paused_by_io_error(self) -> bool:
        """PAUSED/IOERROR, or a pause of unknown reason (STOP came first) with a disk in error."""
        if self.state != PAUSED:
            return False
        return self.reason == PAUSED_IOERROR or (self.reason == PAUSED_UNKNOWN and bool(self.disk_errors))


_MESSAGE = re.compile(r"^I/O error: disk='(?P<disk>[^']*)'")
_STAMP = re.compile(r"timestamp='(\d{4})-(\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)\.(\d{1,6})\+0000'")
_TEXT = re.compile(r"message='(.*)'\s*$", re.DOTALL)


def read_messages(lines: Sequence[str]) -> tuple[Message, ...]:
    """The I/O errors among a domain's messages (libvirt 11.1 and later); other lines are left out."""
    found = []
    for line in lines:
        head = _MESSAGE.match(line)
        if head is None:
            continue
        stamp, text = _STAMP.search(line), _TEXT.search(line)
        at_ns = None
        if stamp is not None:
            *parts, fraction = stamp.groups()
            try:
                moment = datetime(*map(int, parts), int(fraction.ljust(6, "0")), tzinfo=UTC)  # type: ignore[arg-type, misc]
            except ValueError:
                moment = None
            at_ns = None if moment is None else to_ns(moment)
        found.append(Message(head["disk"], at_ns, text[1] if text else line))
    return tuple(found)


def disk_errors_by_alias(disk_errors: Mapping[str, int], devices: Mapping[str, Device]) -> dict[str, int]:
    """Disk errors by alias, which libvirt gives by target; an alias nobody knows becomes ""."""
    by_target = {device.target: alias for alias, device in devices.items() if device.target}
    return {by_target.get(target, ""): code for target, code in disk_errors.items()}


def stamps_by_alias(look: Look, devices: Mapping[str, Device]) -> dict[str, int]:
    """When each device's last error was, as far as libvirt kept a message of it."""
    by_target = {device.target: alias for alias, device in devices.items() if device.target}
    return {by_target.get(m.target, ""): m.at_ns for m in look.messages or () if m.at_ns is not None}


# ------------------------------------------------------------------------------------------ evidence

FULL_BELOW_BYTES = 1 << 20  # less than a guest's single write: full for it


def gather(
    look: Look | None, device: Device | None, reason: str, *, lifecycle: bool, pause: bool
) -> tuple[Evidence, ...]:
    """What was looked at and what it says, in the order of the checks."""
    out = []
    if lifecycle:
        out.append(Evidence(Looked.LIFECYCLE, Says.CONFIRMS, "the guest was suspended by an I/O error"))
    if look is None:
        return (
            *out,
            Evidence(Looked.STATE, Says.UNAVAILABLE, "the look-up did not end in time"),
        )
    if pause:
        verdict = Says.CONFIRMS if look.paused_by_io_error else Says.INCONCLUSIVE
        out.append(
            Evidence(Looked.STATE, verdict, f"{STATES.get(look.state, look.state)}, reason {look.reason}")
        )
    target = None if device is None else device.target
    if look.disk_errors is None:
        if look.state == PAUSED:
            out.append(Evidence(Looked.DISK_ERRORS, Says.UNAVAILABLE))
    elif target is not None:
        code = look.disk_errors.get(target)
        name = None if code is None else DISK_ERRORS.get(code, f"code {code}")
        verdict = Says.INCONCLUSIVE if code is None else Says.CONFIRMS
        out.append(Evidence(Looked.DISK_ERRORS, verdict, f"{target}: {name or 'none'}"))
    if look.messages is not None and target is not None:
        texts = [m.text for m in look.messages if m.target == target]
        verdict = Says.CONFIRMS if texts else Says.INCONCLUSIVE
        out.append(Evidence(Looked.MESSAGES, verdict, texts[-1] if texts else None))
    no_space = reason == ENOSPC or (
        target is not None and (look.disk_errors or {}).get(target) == DISK_ERROR_NO_SPACE
    )
    if no_space and target is not None:
        out += _space_evidence(look, device, target)
    return tuple(out)


def _space_evidence(look: Look, device: Device | None, target: str) -> list[Evidence]:
    """Is there really no space? A stale device says so too."""
    out = []
    space = look.spaces.get(target)
    kind = device.source.type if device is not None and device.source is not None else None
    if space is None:
        out.append(Evidence(Looked.BLOCK_INFO, Says.UNAVAILABLE))
    else:
        verdict, found = Says.INCONCLUSIVE, "says nothing about the space below"
        if kind == "block" and space.physical:
            left = space.physical - space.allocation
            verdict = Says.CONFIRMS if left < FULL_BELOW_BYTES else Says.INCONCLUSIVE
            found = f"{left} bytes of the block device were never written"
        elif kind == "file" and space.capacity and space.allocation >= space.capacity:
            verdict, found = (
                Says.CONTRADICTS,
                "the image is wholly allocated: it needs no more space",
            )
        out.append(
            Evidence(
                Looked.BLOCK_INFO,
                verdict,
                found,
                capacity_bytes=min(space.capacity, MAX_COUNT),
                allocation_bytes=min(space.allocation, MAX_COUNT),
                physical_bytes=min(space.physical, MAX_COUNT),
            )
        )
    free = look.free.get(target)
    if free is None:
        out.append(
            Evidence(
                Looked.FILE_SYSTEM,
                Says.UNAVAILABLE,
                "the image's file system is not visible here",
            )
        )
    else:
        verdict = Says.CONFIRMS if free.free_bytes < FULL_BELOW_BYTES else Says.CONTRADICTS
        out.append(Evidence(Looked.FILE_SYSTEM, verdict, f"{free.free_bytes} bytes free at {free.path}"))
    return out
