"""The folder of libvirt's sockets: does this host have libvirt at all, and is our mount of it stale?"""

from __future__ import annotations

import stat
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

_DEFAULT = Path("/run/libvirt")
_MOUNTS = Path("/proc/self/mountinfo")


def is_local(uri: str) -> bool:
    """Whether a libvirt URI names the machine we run on, by the rules of libvirt's own URIs."""
    parts = urlsplit(uri)
    transport = parts.scheme.partition("+")[2]
    return not parts.netloc and transport in ("", "unix")


def socket_folder(uri: str) -> Path | None:
    """Where the socket of a system connection on this host is; None: the URI names no such socket."""
    parts = urlsplit(uri)
    driver, _, transport = parts.scheme.partition("+")
    if parts.netloc or transport not in ("", "unix") or driver == "test" or parts.path != "/system":
        return None
    named = parse_qs(parts.query).get("socket")
    return Path(named[0]).parent if named else _DEFAULT


def serves(uri: str, path: Path) -> bool:
    """Whether this is a socket, the read-only one or the other, of the system daemon that a URI names."""
    folder = socket_folder(uri)
    if folder is None or path.parent.resolve() != folder.resolve():
        return False
    parts = urlsplit(uri)
    named = parse_qs(parts.query).get("socket")
    driver = parts.scheme.partition("+")[0]
    names = (Path(named[0]).name.removesuffix("-ro"),) if named else ("libvirt-sock", f"virt{driver}d-sock")
    return path.name.removesuffix("-ro") in names


def has_socket(folder: Path) -> bool:
    """Whether a libvirt daemon, or systemd for it, has a socket there. A folder that can't be read has."""
    try:
        return any(stat.S_ISSOCK(entry.lstat().st_mode) for entry in folder.iterdir())
    except FileNotFoundError:
        return False
    except OSError:
        return True


def was_removed(folder: Path, mounts: Path = _MOUNTS) -> bool:
    """Whether the folder is a mount of a folder that was removed on the host since.

    A container keeps the removed one for as long as it runs; what is made in its place is never seen.
    """
    names = {str(folder), str(folder.resolve())}
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    # proc_pid_mountinfo(5): id, parent, device, root, mount point; the kernel marks a root that was unlinked.
    return any(
        words[4] in names and words[3].endswith("//deleted")
        for line in lines
        if len(words := line.split()) > 4
    )
