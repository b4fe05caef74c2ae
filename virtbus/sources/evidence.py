"""What a look at a domain in trouble found, and what it says about an error: facts and evidence. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from virtbus import redaction
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

STAMP_SLACK_NS = 2_000_000_000  # between libvirt's own stamp of an error and our callback


@dataclass(frozen=True, slots=True)
class Message:
    """One "I/O error" line of virDomainGetMessages, as far as it could be read.

    libvirt keeps one per image, in the order of the backing chain.
    """

    target: str
    at_ns: int | None
    text: str

    def recency(self, now_ns: float) -> tuple[bool, bool, int]:
        """What messages are sorted by, oldest first: without a stamp, from ahead, the others."""
        at_ns = self.at_ns or 0
        return self.at_ns is not None, at_ns <= now_ns, at_ns


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
    complete: bool = True  # False: a part of it failed, and is asked for again

    @property
    def paused_by_io_error(self) -> bool:
        """PAUSED/IOERROR, or a pause of unknown reason (STOP came first) with a disk in error."""
        if self.state != PAUSED:
            return False
        return self.reason == PAUSED_IOERROR or (self.reason == PAUSED_UNKNOWN and bool(self.disk_errors))


_MESSAGE = re.compile(r"^I/O error: disk='(?P<disk>[^']*)'")
_STAMP = re.compile(r"timestamp='(\d{4})-(\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)\.(\d{1,6})\+0000'")
_TEXT = re.compile(r"message='(.*)'\s*$", re.DOTALL)


def read_messages(lines: Sequence[str], now_ns: float = math.inf) -> tuple[Message, ...]:
    """The I/O errors among a domain's messages (libvirt 11.1 and later), oldest first; others are left out.

    A stamp that lies ahead of `now_ns` was written before the clock was set back, and so before the others.
    """
    found = []
    for line in reversed(lines):  # of one disk's the top image comes first, and counts where stamps agree
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
        found.append(Message(head["disk"], at_ns, redaction.text(text[1] if text else line)))
    return tuple(sorted(found, key=lambda each: each.recency(now_ns)))


DISK_KINDS = frozenset({None, "disk", "cdrom", "lun", "floppy"})  # None: a recording that does not say


def disks_by_target(devices: Mapping[str, Device]) -> dict[str, str]:
    """Disk target → alias; an interface may have a target that is called like a disk's."""
    return {d.target: alias for alias, d in devices.items() if d.target and d.kind in DISK_KINDS}


def disk_errors_by_alias(disk_errors: Mapping[str, int], devices: Mapping[str, Device]) -> dict[str, int]:
    """Disk errors by alias, which libvirt gives by target; an alias nobody knows becomes ""."""
    aliases = disks_by_target(devices)
    return {aliases.get(target, ""): code for target, code in disk_errors.items()}


def newest_message(messages: Sequence[Message] | None, target: str | None) -> Message | None:
    """The last error of a disk."""
    own = [message for message in messages or () if message.target == target]
    return own[-1] if own else None


def newest_by_alias(look: Look, devices: Mapping[str, Device]) -> dict[str, Message]:
    """The last error of each disk that libvirt kept a message of; "" for a disk that nobody knows."""
    aliases = disks_by_target(devices)
    return {aliases.get(message.target, ""): message for message in look.messages or ()}


# ------------------------------------------------------------------------------------------ evidence

FULL_BELOW_BYTES = 1 << 20  # less than a guest's single write: full for it


def gather(
    look: Look | None, device: Device | None, reason: str, *, lifecycle: bool, pause: bool
) -> tuple[Evidence, ...]:
    """What was looked at and what it says, in the order of the checks.

    A pause confirms an error; that space was short it does not.
    """
    out = []
    target = None if device is None else device.target
    code = None if look is None or target is None else (look.disk_errors or {}).get(target)
    claims_no_space = reason == ENOSPC or code == DISK_ERROR_NO_SPACE
    by_pause = _confirms(not claims_no_space)
    if lifecycle:
        out.append(Evidence(Looked.LIFECYCLE, by_pause, "the guest was suspended by an I/O error"))
    if look is None:
        return (*out, Evidence(Looked.STATE, Says.UNAVAILABLE, "the look-up did not end in time"))
    if pause:
        verdict = by_pause if look.paused_by_io_error else Says.INCONCLUSIVE
        words = f"{STATES.get(look.state, look.state)}, reason {look.reason}"
        out.append(Evidence(Looked.STATE, verdict, words))
    if look.disk_errors is None:
        if look.state == PAUSED:
            out.append(Evidence(Looked.DISK_ERRORS, Says.UNAVAILABLE))
    elif target is not None:
        name = "none" if code is None else DISK_ERRORS.get(code, f"code {code}")
        agrees = code == DISK_ERROR_NO_SPACE if claims_no_space else code is not None
        out.append(Evidence(Looked.DISK_ERRORS, _confirms(agrees), f"{target}: {name}"))
    if look.messages is not None and target is not None:
        kept = newest_message(look.messages, target)
        out.append(Evidence(Looked.MESSAGES, _confirms(kept is not None), kept.text if kept else None))
    if claims_no_space and target is not None:
        out += _space_evidence(look, device, target)
    return tuple(out)


def _confirms(agrees: bool) -> Says:
    """What is seen here can confirm an error, and never contradict it."""
    return Says.CONFIRMS if agrees else Says.INCONCLUSIVE


def _space_evidence(look: Look, device: Device | None, target: str) -> list[Evidence]:
    """Is there really no space?

    A file system may lack metadata blocks, quota or space in the pool below it while its blocks are free.
    """
    space, free = look.spaces.get(target), look.free.get(target)
    source = None if device is None else device.source
    block = Evidence(Looked.BLOCK_INFO, Says.UNAVAILABLE)
    if space is not None:
        short, found = False, "says nothing about the space below"
        # Of a raw image the highest byte written says nothing: writing again needs no more space.
        if source is not None and source.type == "block" and source.format not in (None, "raw"):
            left = space.physical - space.allocation
            if space.physical:
                short = left < FULL_BELOW_BYTES
                found = f"{left} bytes of the block device were never written"
        elif source is not None and source.type == "file" and space.capacity <= space.allocation:
            found = "the image is wholly allocated"
        block = Evidence(
            Looked.BLOCK_INFO, _confirms(short), found, *(min(size, MAX_COUNT) for size in space)
        )
    if free is None:
        words, verdict = "the image's file system is not visible here", Says.UNAVAILABLE
    else:
        words, verdict = (
            f"{free.free_bytes} bytes free at {free.path}",
            _confirms(free.free_bytes < FULL_BELOW_BYTES),
        )
    return [block, Evidence(Looked.FILE_SYSTEM, verdict, words)]
