"""In whose name the agent speaks: an id made once a host, never shared with a clone; and its gap events."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from virtbus import statefiles
from virtbus.errors import RestartNeeded, SpoolFull
from virtbus.model import Gap, Host, PreviousRun, SequenceRange
from virtbus.spool import Spool
from virtbus.spool.files import AGENT_ID
from virtbus.telemetry import Trouble, emit
from virtbus.words import GapReason

MACHINE_ID = Path("/etc/machine-id")
_UNSTABLE = "unstable"  # this host's UUID says nothing


# The file `agent-id` holds four lines: the id; a digest of the machine's id; from `tie_to_host` on a digest
# of the hypervisor's host UUID, and where that was heard (boot id, device and inode of the folder).


def _lines(state_dir: Path) -> list[str]:
    """The four lines of the file, "" for what it lacks. Raises OSError."""
    statefiles.check(state_dir / AGENT_ID)
    text = (state_dir / AGENT_ID).read_text(encoding="ascii", errors="replace")
    return [*text.splitlines(), "", "", "", ""][:4]


def _id_of(lines: list[str]) -> str | None:
    try:
        return str(uuid.UUID(lines[0].strip()))
    except ValueError:
        return None


def _digest(text: str, key: bytes) -> str:
    """Only digests are kept: machine-id(5) is confidential."""
    return hashlib.blake2b(text.encode(), key=key, digest_size=16).hexdigest()


def _machine(file: Path) -> tuple[str, str]:
    """The machine's id ("" without one) and its digest."""
    try:
        machine = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        machine = ""
    return machine, _digest(machine, b"virtbus agent-id")


def load_agent_id(state_dir: Path, machine_id_file: Path = MACHINE_ID) -> tuple[str, str | None]:
    """The agent's id from `<state_dir>/agent-id`, made once → (id, what was before it, or None).

    A cloned disk brings another machine's id with it: it gets an id of its own, and the caller reports that
    in a gap event, as it does of a file that holds no id. Without a machine id (a container) the file alone
    decides. Raises SpoolFull when the file can't be read or written.
    """
    machine, digest = _machine(machine_id_file)
    before: str | None = None
    try:
        lines = _lines(state_dir)
    except FileNotFoundError:
        pass
    except OSError as error:
        # Not a new identity: the old one is there, and would speak again tomorrow.
        path = state_dir / AGENT_ID
        raise SpoolFull(f"{path} can't be read: {error.strerror}; check its rights and the disk") from error
    else:
        before = _id_of(lines)
        if before is None:
            before = "an agent-id file without an id"
        elif not machine or lines[1] in ("", digest):
            return before, None
    agent_id = str(uuid.uuid4())
    _write(state_dir, agent_id, digest)
    return agent_id, before


def tie_to_host(state_dir: Path, host: Host, dmi: Path = Path("/sys/class/dmi/id")) -> str | None:
    """Tie the id to the host, by libvirt's UUID of it → a new id when it is another host's, else None.

    Two hosts that were made from one backup image may share the machine's id, and never this UUID. Where
    the firmware gives none, libvirt makes one up at each start: one that changes in the same folder on the
    same boot, or from one boot to the next on a host without DMI, is not asked again.

    Raises SpoolFull when the file can't be written.
    """
    if host.uuid is None:
        return None
    try:
        before, machine, tied, seen_at = _lines(state_dir)
        here = state_dir.stat()
    except OSError:
        return None
    agent_id, digest = before, _digest(host.uuid, b"virtbus host")
    place = f"{host.boot_id or '-'} {here.st_dev}:{here.st_ino}"
    if tied == _UNSTABLE or (tied == digest and seen_at == place):
        return None
    if tied and tied != digest:
        same_boot = seen_at == place
        no_dmi = not seen_at.startswith(host.boot_id or "") and not dmi.exists()
        if host.boot_id is not None and (same_boot or no_dmi):
            digest = _UNSTABLE
        else:
            agent_id = str(uuid.uuid4())
    _write(state_dir, agent_id, machine, digest, place)
    return agent_id if agent_id != before else None


def was_tied(state_dir: Path) -> bool:
    """Whether this agent has ever heard the hypervisor's host UUID."""
    try:
        return bool(_lines(state_dir)[2])
    except OSError:
        return False


def read_agent_id(state_dir: Path) -> str | None:
    """The id that stands in the file, whoever's disk it is; None without one. Writes nothing."""
    try:
        return _id_of(_lines(state_dir))
    except OSError:
        return None


def is_of_another_machine(state_dir: Path, machine_id_file: Path = MACHINE_ID) -> bool:
    """Whether the file was made where /etc/machine-id was another one: `load_agent_id` will replace it."""
    machine, digest = _machine(machine_id_file)
    try:
        return bool(machine) and _lines(state_dir)[1] not in ("", digest)
    except OSError:
        return False


def _write(state_dir: Path, *lines: str) -> None:
    """Replace the file so that after a power cut it is the old one or the new one, never an empty one."""
    path, draft = state_dir / AGENT_ID, state_dir / f"{AGENT_ID}.new"
    try:
        draft.unlink(missing_ok=True)  # of a start that was cut off; or a link that somebody laid here
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(draft, flags, 0o600), "w", encoding="ascii") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        folder = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise SpoolFull(f"{path} can't be written: {error.strerror}; check rights and space") from error


class Speaker:
    """The agent's id may turn out to be another host's: then this run ends, or begins, under a new one."""

    def __init__(
        self,
        agent_id: str,
        spool: Spool,
        *,
        previous_id: str | None = None,
        identify: Callable[[Host], str | None] = lambda host: None,
    ) -> None:
        """`identify` takes the host that libvirt names → a new agent id when the present one is another's."""
        self.agent_id = agent_id
        self.previous_id = previous_id  # what was in the state folder, where that was not ours
        self.identify = identify
        self.host: Host | None = None
        self.unidentified: Host | None = None  # of whom it is not known whether our id is another host's
        self._spool = spool

    def is_on(self, host: Host) -> None:
        """The source named the host."""
        self.host = self._spool.host = host

    def _changed(self, host: Host) -> str | None:
        """The id to speak under, where ours is another host's; asked again when the disk refuses it."""
        try:
            new = self.identify(host)
        except SpoolFull as error:
            self.unidentified = host
            emit(Trouble("agent-id", error))
            return None
        self.unidentified = None
        return new

    def begin_on(self, host: Host) -> None:
        """Before this run's first event: speak under an id of our own where ours is another host's."""
        new = self._changed(host)
        if new is not None:
            self.previous_id, self.agent_id = self.agent_id, new
            self._spool.agent_id = new

    def is_anothers(self, host: Host) -> RestartNeeded | None:
        """Later: our id is another host's. This run began under it and ends so; the next has a new one."""
        new = self._changed(host)
        if new is None:
            return None
        why = f"this is another machine (a copied state folder?); the agent starts again as {new}"
        return RestartNeeded(f"{why}; its id was {self.agent_id}")

    def gap(
        self,
        reason: GapReason,
        detail: str | None = None,
        *,
        ended_at: datetime,
        started_at: datetime | None = None,
        previous: PreviousRun | None = None,
        missing: tuple[SequenceRange, ...] = (),
        missing_occurrences: int = 0,
        found: int = 0,
    ) -> Gap:
        """A gap event; it never ends before it began."""
        return Gap(
            host=self.host,
            agent_id=self.agent_id,
            reason=reason,
            detail=detail,
            started_at=None if started_at is None else min(started_at, ended_at),
            ended_at=ended_at,
            previous=previous,
            missing=missing,
            missing_events=sum(item.last - item.first + 1 for item in missing),
            missing_occurrences=missing_occurrences,
            found=found,
        )
