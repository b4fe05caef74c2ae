"""Which storage a device lives on, as far as its description shows: pure.

Two devices are on one *system* (a cluster, array or server) when they share an address, a target name or
a configured name. They are *akin* when they may be one system under two names (neighbouring addresses,
numbered host names, one vendor's target names): that is never used to blame, only to doubt.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from functools import lru_cache

from virtbus.model import DeviceSource

# Mount points that the platforms name after the share, alike on every host (as many parts as it takes to
# name the share): Nova and Cinder by a hash of the export, oVirt by server and export or by the storage
# domain, CloudStack by the pool's UUID.
_UUID_GLOB = "????????-????-????-????-????????????"
SHARED_PATHS = (
    "/var/lib/nova/mnt/*",
    "/var/lib/cinder/mnt/*",
    "/rhev/data-center/mnt/glusterSD/*",
    "/rhev/data-center/mnt/blockSD/*",
    "/rhev/data-center/mnt/*",
    f"/rhev/data-center/{_UUID_GLOB}/{_UUID_GLOB}",
    f"/mnt/{_UUID_GLOB}",
    f"/dev/{_UUID_GLOB}",  # an oVirt block domain is a volume group named by its UUID
)


class Sharing(Enum):
    """Whether other hosts can be on the same storage."""

    SHARED = "shared"
    LOCAL = "local"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class StorageRules:
    """What an operator knows and no device description shows."""

    shared_paths: tuple[str, ...] = SHARED_PATHS  # globs, a part at a time; the parts named are the share
    local_paths: tuple[str, ...] = ()  # below these a file or device is the host's own
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # name → globs: address, pool, path

    def __hash__(self) -> int:
        return hash((self.shared_paths, self.local_paths, tuple(sorted(self.groups.items()))))


@dataclass(frozen=True, slots=True)
class Backend:
    """One device's storage: `names` identify its system, `kin` are what it may have in common with others."""

    kind: str  # "rbd", "iscsi", "nfs", "nbd", "fc", "file", "block", …
    sharing: Sharing
    names: tuple[str, ...]  # at least one; sorted
    part: str  # the pool, export, folder or volume group in it, for people
    kin: frozenset[str] = frozenset()
    thin: bool = False  # "no space" may mean this one volume only (a thin logical volume)
    _hash: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.kind, self.names, self.part, self.kin)))

    def __hash__(self) -> int:
        return self._hash  # asked for thousands of times a second


@lru_cache(maxsize=65_536)
def identify(host: str, source: DeviceSource | None, rules: StorageRules) -> Backend:
    """Where a device of `host` lives; what can't be told apart is the host's `unidentified` storage."""
    if source is None:
        return _unidentified(host, "unknown", "")
    for name, globs in rules.groups.items():
        if any(fnmatchcase(word, glob) for glob in globs for word in _words(source)):
            return Backend(source.protocol or source.type, Sharing.SHARED, (f"group:{name}",), _part(source))
    if source.type == "network":
        return _network(host, source)
    if source.type == "nvme":
        return Backend("nvme", Sharing.LOCAL, (f"local@{host}",), source.path or "")
    if source.path is not None and source.type in ("file", "block", "dir"):
        return _path(host, source, source.path, rules)
    return _unidentified(host, source.type, _part(source))


def _words(source: DeviceSource) -> list[str]:
    words = [_address(host) for host in source.hosts]
    words += [word for word in (source.pool, source.path) if word]
    return words


def _part(source: DeviceSource) -> str:
    if source.pool:
        return source.pool
    path = source.path or ""
    if source.type == "network":
        return path.partition("/")[0]
    return path.rpartition("/")[0]


def _unidentified(host: str, kind: str, part: str) -> Backend:
    """All of a host's storage that nothing identifies counts as one: it may be one disk, or one share."""
    return Backend(kind, Sharing.UNKNOWN, (f"unidentified@{host}",), part, frozenset({f"{kind}:{part}"}))


def _network(host: str, source: DeviceSource) -> Backend:
    kind = source.protocol or "network"
    addresses = [_address(one) for one in source.hosts]
    if not addresses or any(one.startswith("unix:") or _is_loopback(one) for one in addresses):
        # A process on the host, or a cluster that only the host's own configuration names.
        return _unidentified(host, kind, _part(source))
    names = set(addresses)
    kin = {word for one in addresses for word in _kin(one)}
    target = (source.path or "").partition("/")[0]
    if target.startswith(("iqn.", "naa.", "eui.")):
        names.add(target)
        kin.add(target.partition(":")[0])
    return Backend(kind, Sharing.SHARED, tuple(sorted(names)), _part(source), frozenset(kin))


_BY_PATH_IP = re.compile(r"/dev/disk/by-path/.*?ip-(?P<address>.+?):\d+-iscsi-(?P<target>.+?)-lun-")
_BY_PATH_FC = re.compile(r"/dev/disk/by-path/.*?fc-0x(?P<port>[0-9a-f]{16})")
_WWID = re.compile(
    r"/dev/(?:mapper/|disk/by-id/(?:dm-uuid-mpath-|dm-name-))3(?P<naa>6[0-9a-f]{31}|[25][0-9a-f]{15})"
)


def _path(host: str, source: DeviceSource, path: str, rules: StorageRules) -> Backend:
    kind = source.type
    for glob in rules.local_paths:
        if fnmatchcase(path, glob.rstrip("/") + "/*") or fnmatchcase(path, glob):
            return Backend(kind, Sharing.LOCAL, (f"local@{host}",), glob)
    if found := _BY_PATH_IP.match(path):
        address, target = _address(found["address"]), found["target"]
        kin = {*_kin(address), target.partition(":")[0]}
        return Backend(
            "iscsi", Sharing.SHARED, tuple(sorted((address, target))), target, frozenset(kin), True
        )
    if found := _BY_PATH_FC.match(path):
        port = found["port"]
        return Backend("fc", Sharing.SHARED, (f"wwpn:{port}",), port, frozenset({f"oui:{port[1:7]}"}), True)
    if found := _WWID.match(path):
        naa = found["naa"]
        # NAA 6: vendor and vendor-specific identifier come first, the volume's own number after them.
        system = naa[:16] if naa[0] == "6" else naa[:10]
        return Backend("lun", Sharing.SHARED, (f"naa:{system}",), naa, frozenset({f"oui:{naa[1:7]}"}), True)
    parts = path.split("/")
    for glob in rules.shared_paths:
        depth = glob.count("/") + 1
        head = parts[:depth]
        if len(parts) > depth and all(map(fnmatchcase, head, glob.split("/"))):
            share = "/".join(head)
            server = head[-1].partition(":")[0] if ":" in head[-1] else None
            names = {f"share:{share}"} | ({_address(server)} if server else set())
            kin = set(_kin(_address(server))) if server else set()
            thin = source.type == "block" or "/blockSD/" in share
            return Backend(kind, Sharing.SHARED, tuple(sorted(names)), share, frozenset(kin), thin)
    return _unidentified(host, kind, _part(source))


def _address(host: str) -> str:
    """A host without its port: monitors and portals answer on several."""
    if host.startswith("unix:"):
        return host
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _is_loopback(address: str) -> bool:
    return address in ("localhost", "::1") or address.startswith("127.")


def _kin(address: str) -> tuple[str, ...]:
    """The neighbourhood: the same network, or the same host name but for its numbers."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return (f"named:{re.sub(r'[0-9]+', '#', address)}",)
    return (str(ipaddress.ip_network((ip, 24 if ip.version == 4 else 64), strict=False)),)
