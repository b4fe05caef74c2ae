"""The agent's id: made once a host, kept in the state folder, never shared with a clone."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

from virtbus.errors import SpoolFull
from virtbus.model import Host

_UNSTABLE = "unstable"  # this host's UUID says nothing


def load_agent_id(state_dir: Path, machine_id_file: Path = Path("/etc/machine-id")) -> tuple[str, str | None]:
    """The agent's id from `<state_dir>/agent-id`, made once → (id, what was before it, or None).

    The file holds the id, a digest of the machine's id and one of the hypervisor's host (`tie_to_host`). A
    cloned disk brings another machine's id with it: it gets an id of its own, and the caller tells of it in
    a gap event, as it does of a file that holds no id. Without a machine id (a container) the file alone
    decides.

    Raises SpoolFull when the file can't be read or written.
    """
    path = state_dir / "agent-id"
    machine, digest = _machine(machine_id_file)
    before: str | None = None
    try:
        lines = path.read_text(encoding="ascii", errors="replace").split()
    except FileNotFoundError:
        pass
    except OSError as error:
        # Not a new identity: the old one is there, and would speak again tomorrow.
        raise SpoolFull(f"{path} can't be read: {error.strerror}; check its rights and the disk") from error
    else:
        try:
            before = str(uuid.UUID(lines[0]))
            if not machine or len(lines) < 2 or lines[1] == digest:
                return before, None
        except (ValueError, IndexError):
            before = "an agent-id file without an id"
    agent_id = str(uuid.uuid4())
    try:
        _write(path, f"{agent_id}\n{digest}\n")
    except OSError as error:
        raise SpoolFull(f"{path} can't be written: {error.strerror}; check rights and space") from error
    return agent_id, before


def tie_to_host(state_dir: Path, host: Host, dmi: Path = Path("/sys/class/dmi/id")) -> str | None:
    """Tie the id to the host, by libvirt's UUID of it → a new id when it is another host's, else None.

    Two hosts that were made from one backup image may share the machine's id, and never this UUID. Where
    the firmware gives none, libvirt makes one up at each start: one that changes in the same folder on the
    same boot, or from one boot to the next on a host without DMI, is not asked again.

    Raises SpoolFull when the file can't be written.
    """
    path = state_dir / "agent-id"
    if host.uuid is None:
        return None
    try:
        words = path.read_text(encoding="ascii", errors="replace").splitlines()
        here = state_dir.stat()
    except OSError:
        return None
    agent_id, machine, tied, seen_at, *_ = [*words, "", "", "", ""]
    digest = hashlib.blake2b(host.uuid.encode(), key=b"virtbus host", digest_size=16).hexdigest()
    place = f"{host.boot_id or '-'} {here.st_dev}:{here.st_ino}"
    if tied == _UNSTABLE or (tied == digest and seen_at == place):
        return None
    if tied and tied != digest:
        same_boot = host.boot_id is not None and seen_at == place
        if same_boot or (
            host.boot_id is not None and not seen_at.startswith(host.boot_id) and not dmi.exists()
        ):
            digest = _UNSTABLE
        else:
            agent_id = str(uuid.uuid4())
    try:
        _write(path, f"{agent_id}\n{machine}\n{digest}\n{place}\n")
    except OSError as error:
        raise SpoolFull(f"{path} can't be written: {error.strerror}; check rights and space") from error
    return agent_id if agent_id != words[0] else None


def was_tied(state_dir: Path) -> bool:
    """Whether this agent has ever heard the hypervisor's host UUID."""
    try:
        return len((state_dir / "agent-id").read_text(encoding="ascii", errors="replace").splitlines()) > 2
    except OSError:
        return False


def read_agent_id(state_dir: Path) -> str | None:
    """The id that stands in the file, whoever's disk it is; None without one. Writes nothing."""
    try:
        text = (state_dir / "agent-id").read_text(encoding="ascii", errors="replace")
        return str(uuid.UUID(text.split()[0]))
    except (OSError, ValueError, IndexError):
        return None


def is_of_another_machine(state_dir: Path, machine_id_file: Path = Path("/etc/machine-id")) -> bool:
    """Whether the file was made where /etc/machine-id was another one: `load_agent_id` will replace it."""
    machine, digest = _machine(machine_id_file)
    try:
        lines = (state_dir / "agent-id").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return False
    return bool(machine) and len(lines) > 1 and lines[1] != digest


def _machine(file: Path) -> tuple[str, str]:
    """The machine's id ("" without one) and its digest. Only that is kept: machine-id(5) is confidential."""
    try:
        machine = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        machine = ""
    return machine, hashlib.blake2b(machine.encode(), key=b"virtbus agent-id", digest_size=16).hexdigest()


def _write(path: Path, text: str) -> None:
    """Replace the file so that after a power cut it is the old one or the new one, never an empty one."""
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)  # of a start that was cut off; or a link that somebody laid here
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        os.write(descriptor, text.encode("ascii"))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
