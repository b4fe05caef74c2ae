"""A bus URL taken apart: one reader for all buses. No error of it shows a password."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote

from virtbus.errors import ConfigError

_HOST = re.compile(r"\[([0-9A-Fa-f:.%]+)\]|([^:\[\]\s]+)")


@dataclass(frozen=True, slots=True)
class BusUrl:
    """`scheme://[user[:password]@]host[:port][,host[:port]…][/path][?name=value]`, percent-decoded."""

    scheme: str  # in lower case
    hosts: tuple[tuple[str, int | None], ...]  # an IPv6 address without brackets; None: the default port
    username: str | None
    password: str | None = field(repr=False)
    path: str  # with its "/"
    query: Mapping[str, str]
    problems: tuple[str, ...]  # hosts that can't be used, each in one line

    @property
    def host(self) -> tuple[str, int | None]:
        """The one host. Raises ConfigError when there is none that can be used, or there are several."""
        if self.problems:
            raise ConfigError("\n".join(f"bus.url: {problem}" for problem in self.problems))
        if len(self.hosts) != 1:
            raise ConfigError(f"bus.url: no usable host: write {_example(self.scheme)}")
        return self.hosts[0]


def read_url(url: str) -> BusUrl:
    """Take a bus URL apart. Raises ConfigError when where its parts end can't be told."""
    scheme, _, rest = url.strip().partition(":")
    scheme = scheme.lower()
    authority, path = "", rest
    if rest.startswith("//"):
        authority, slash, path = rest[2:].partition("/")
        path = slash + path
    if authority and "@" in path:
        # Not a path but most of the password: no part of this may be shown.
        raise ConfigError(f"bus.url: an @ after the hosts: write {_example(scheme)}")
    userinfo, at, hosts = authority.rpartition("@")
    if set("?#") & set(userinfo):
        raise ConfigError(f"bus.url: a ? or # before the @: write {_example(scheme)}")
    user, colon, password = userinfo.partition(":")
    hosts, mark, query = hosts.partition("?")
    if not mark:
        path, mark, query = path.partition("?")
    if "#" in hosts + path + query:
        raise ConfigError(f"bus.url: a # means nothing in it: write {_example(scheme)}")
    found, problems = [], []
    for text in filter(None, map(str.strip, re.split("[,;]", hosts))):
        host, problem = _host(text)
        if problem is None:
            found.append(host)
        else:
            problems.append(problem)
    return BusUrl(
        scheme=scheme,
        hosts=tuple(found),
        username=unquote(user) if at else None,
        password=unquote(password) if colon else None,
        path=unquote(path),
        query=dict(parse_qsl(query, keep_blank_values=True)),
        problems=tuple(problems),
    )


def _example(scheme: str) -> str:
    return f"{scheme}://[user@]host[:port] (inside its parts every / ? # @ ; , is percent-encoded)"


def _host(text: str) -> tuple[tuple[str, int | None], str | None]:
    """((name, port), problem) of one host."""
    nothing = ("", None)
    match = re.fullmatch(rf"(?:{_HOST.pattern})?(?::(.*))?", text)
    if match is None:
        return nothing, f'host "{text}" can\'t be read: write host, host:port or [IPv6]:port'
    name, port = match[1] or match[2], match[3]
    if not name:
        return nothing, f'host missing before port "{port}"'
    if match[2] and not _can_be_a_name(name):
        return nothing, f"host {name[:80]!r} can't be a name: between dots are 1 to 63 characters each"
    if port is None:
        return (name, None), None
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        return nothing, f'host {name} has port "{port}": use 1 to 65535, or leave it out'
    return (name, int(port)), None


def _can_be_a_name(name: str) -> bool:
    try:
        name.encode("idna")  # as every look-up of the name does it
    except UnicodeError:
        return False
    return True
