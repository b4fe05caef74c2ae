"""A bus URL taken apart: one reader for all buses. No error of it shows a password."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from virtbus.config import secret_text, why_unread
from virtbus.errors import BusDenied, ConfigError

# What a broker listens on by default, by the URL's scheme; a third party's adapter knows its own.
DEFAULT_PORTS = {"amqp": 5672, "amqps": 5671, "kafka": 9092, "kafkas": 9092}
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^:\[\]\s]+))?(?::(.*))?")


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
    """Take a bus URL apart. Raises ConfigError when it is unclear where its parts end."""
    scheme, _, rest = url.strip().partition(":")
    scheme = scheme.lower()
    authority, path = "", rest
    if rest.startswith("//"):
        authority, slash, path = rest[2:].partition("/")
        path = slash + path
    userinfo, at, hosts = authority.rpartition("@")
    user, colon, secret = userinfo.partition(":")
    hosts, mark, query = hosts.partition("?")
    if not mark:
        path, mark, query = path.partition("?")
    for wrong, what in (
        # Not a path but most of the password: no part of this may be shown.
        (authority and "@" in f"{path}{mark}{query}", "an @ after the hosts"),
        (set("?#") & set(userinfo), "a ? or # before the @"),
        ("#" in hosts + path + query, "a # means nothing in it"),
    ):
        if wrong:
            raise ConfigError(f"bus.url: {what}: write {_example(scheme)}")
    found, problems = [], []
    for text in filter(None, map(str.strip, re.split("[,;]", hosts))):
        try:
            found.append(_host(text))
        except ValueError as error:
            problems.append(str(error))
    return BusUrl(
        scheme=scheme,
        hosts=tuple(found),
        username=unquote(user) if at else None,
        password=unquote(secret) if colon else None,
        path=unquote(path),
        query=dict(parse_qsl(query, keep_blank_values=True)),
        problems=tuple(problems),
    )


def _example(scheme: str) -> str:
    return f"{scheme}://[user@]host[:port] (inside its parts every / ? # @ ; , is percent-encoded)"


def _host(text: str) -> tuple[str, int | None]:
    """(name, port) of one host. Raises ValueError with the problem."""
    match = _HOST.fullmatch(text)
    if match is None:
        raise ValueError(f'host "{text}" can\'t be read: write host, host:port or [IPv6]:port')
    name, port = match[1] or match[2], match[3]
    if not name:
        raise ValueError(f'host missing before port "{port}"')
    try:
        if match[2]:
            name.encode("idna")  # as every look-up of the name does it
    except UnicodeError:
        raise ValueError(
            f"host {name[:80]!r} can't be a name: between dots are 1 to 63 characters each"
        ) from None
    if port is not None and not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError(f'host {name} has port "{port}": use 1 to 65535, or leave it out')
    return name, None if port is None else int(port)


def password(file: Path | None, otherwise: str | None) -> str | None:
    """The password as its file holds it now, so that a rotated one is used; `otherwise` without a file.

    Raises BusDenied.
    """
    if file is None:
        return otherwise
    try:
        return secret_text(file)
    except (OSError, ValueError) as error:
        raise BusDenied(f"bus.password_file: {file} can't be read: {why_unread(error)}") from error
