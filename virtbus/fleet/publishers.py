"""Whose events are believed: who may speak for an agent, by what the broker proved of the publisher. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import MutableMapping, Sequence
from fnmatch import fnmatchcase

_MAX_SOURCES = 100_000
_MAX_SOURCES_OF_A_HOST = 32  # agents that one host's user can have had: each reinstallation makes a new one


class Publishers:
    """The broker users whose events are believed (`react.publishers`), and the agents they spoke for.

    Without patterns everybody is believed. A pattern with {host} binds a user to one host. For an event
    without a host (an agent that has not seen its hypervisor yet), {host} stands for any name. A source (an
    agent) belongs to the first user who spoke for it: nobody else's events count for it, or one heartbeat
    would silence a host of somebody else's. Only RabbitMQ proves the user (user-id); Kafka and the embedded
    bus prove none, so that with patterns nothing of theirs is believed.
    """

    def __init__(self, patterns: Sequence[str] = (), owners: MutableMapping[str, str] | None = None) -> None:
        """`owners` (source → user) is what was known before; it is added to."""
        self._patterns = patterns
        self._owners: MutableMapping[str, str] = {} if owners is None else owners
        self._sources = Counter(self._owners.values())

    def refuses(self, publisher: str | None, source: str, host: str | None) -> str | None:
        """Why an event is not believed; None when it is. `publisher` is what the broker proved."""
        if not self._patterns:
            return None
        if publisher is None:
            return "the broker does not prove who published it"
        fitting = self._fitting(publisher, host)
        if not fitting:
            return f"publisher {publisher} may not speak for host {host}"
        owner = self._owners.get(source)
        if owner == publisher:
            return None
        # A user whom the patterns no longer name claims nothing: the fleet was given other users.
        if owner is not None and self._fitting(owner, None):
            return f"publisher {publisher} may not speak for {owner}'s {source}"
        of_one_host = all("{host}" in pattern for pattern in fitting)
        if of_one_host and self._sources[publisher] >= _MAX_SOURCES_OF_A_HOST:
            return f"publisher {publisher} spoke for {self._sources[publisher]} agents of one host already"
        if owner is None and len(self._owners) >= _MAX_SOURCES:
            return f"publisher {publisher} names an agent beyond the {_MAX_SOURCES} that can be told apart"
        if owner is not None:
            self._sources[owner] -= 1
        self._owners[source] = publisher
        self._sources[publisher] += 1
        return None

    def _fitting(self, publisher: str, host: str | None) -> list[str]:
        """The patterns by which a user may speak for a host; for no host yet, {host} is any."""
        name = "*" if host is None else _literal(host)
        return [one for one in self._patterns if fnmatchcase(publisher, one.replace("{host}", name))]


def _literal(text: str) -> str:
    """A host name must not be a glob: an agent chooses it."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)
