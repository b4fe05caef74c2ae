"""Scripts for a model and its original: what each of them says to the same calls, as words to compare.

A script speaks to the contract that virtbus speaks to (`virtbus.bus`, `virtbus.integrations.base`,
`virtbus.sources.link`) and tells what it saw. Where two originals differ by nature the script is told which.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.sim.runtime import HostClock, Process, Scheduler, Virtual, installed
from virtbus import envelope
from virtbus.bus import Bus, Subscription
from virtbus.errors import SourceUnavailable
from virtbus.integrations.base import (
    HOLD,
    RELEASE,
    REPORT,
    Action,
    Integration,
    NotOurs,
    TargetMissing,
)
from virtbus.model import Confirmed, Deferred, Message, Record
from virtbus.observations import RawIoError
from virtbus.sources.link import PAUSED, Connector, NoSuchDomain
from virtbus.testing import ListFeed, a_domain, a_record, an_io_error

QUIET = 0.5


@contextmanager
def simulated(script: Callable[[Virtual, Process], list[str]]) -> Iterator[list[str]]:
    """What a script says to a model, played in virtual time."""
    sched = Scheduler(1)
    said: list[str] = []
    process = Process("script", HostClock())
    with installed(sched) as virtual:
        sched.spawn(lambda: said.extend(script(virtual, process)), process)
        sched.run(600.0)
        yield said


# ---- brokers


def numbered(*domains: int) -> list[Record]:
    """Records of these domains, numbered from 1."""
    return [
        a_record(an_io_error(domain=a_domain(uuid=f"00000000-0000-4000-8000-{domain:012d}")), row=number)
        for number, domain in enumerate(domains, 1)
    ]


def _number(message: Message) -> int:
    return int(envelope.decode(message).attributes["sequence"])


def _receive(subscription: Subscription, quiet: float, most: int = 100) -> list[Message]:
    """What comes until nothing comes any more."""
    got: list[Message] = []
    empty = 0
    while len(got) < most and empty < 2:
        message = subscription.receive(quiet)
        empty = empty + 1 if message is None else 0
        if message is not None:
            got.append(message)
    return got


def broker(bus: Bus, *, domains: tuple[int, int], quiet: float = QUIET) -> list[str]:
    """Confirms, order, what an end without an ack brings back, retries, dead letters; of two domains."""
    one, two = domains
    keys = [record.key for record in numbered(one, two)]
    said = []
    with_group = bus.consume("g", prefetch=20)
    said.append(f"nothing yet: {with_group.receive(quiet)}")
    feed = ListFeed(numbered(one, two, one, two, one, two))
    outcomes = [type(outcome) for outcome in feed.publish(bus)]
    said.append(f"confirmed {outcomes.count(Confirmed)}, deferred {outcomes.count(Deferred)}")
    got = _receive(with_group, quiet)
    for key in keys:
        said.append(f"order of a key: {[_number(message) for message in got if message.key == key]}")
    mine = [message for message in got if message.key == keys[0]]
    said.append(f"redelivered: {any(message.redelivered for message in got)}")
    with_group.ack(mine[1])  # not the first: what a broker of positions makes of that, its script tells
    for message in [message for message in got if message.key == keys[1]]:
        with_group.ack(message)
    with_group.close()
    again = bus.consume("g", prefetch=20)
    got = _receive(again, quiet)
    said.append(f"after a close without an ack: {sorted(_number(message) for message in got)}")
    for message in got[1:]:
        again.ack(message)
    again.retry(got[0], 2 * quiet)
    ListFeed(numbered(*[one] * 6, one, two)[6:]).publish(bus)
    later = []
    while message := again.receive(quiet * 3):
        later.append(message)
        again.ack(message)
    for name, key in zip(("retried", "other"), keys, strict=True):
        said.append(f"behind a retry, of the {name} key: {[_number(one) for one in later if one.key == key]}")
    again.close()
    letters = bus.consume("g", prefetch=20)
    said.append(f"nothing after the verdicts: {letters.receive(quiet)}")
    ListFeed(numbered(*[one] * 9)[8:]).publish(bus)
    (letter,) = _receive(letters, quiet)
    letters.dead_letter(letter, "a reason")
    said.append(f"nothing behind a dead letter: {letters.receive(quiet)}")
    letters.close()
    last = bus.consume("g", prefetch=20)
    said.append(f"nor to the next member: {last.receive(quiet)}")
    last.close()
    return said


# ---- control planes


def control_plane(
    plane: Integration,
    name: str,
    *,
    wipe: Callable[[], object],
    take_back: Callable[[], object],
    condition: dict[str, str],
) -> list[str]:
    """Hold, wipe, hold again, release, take back, a name that nobody has."""
    said = []

    def do(verb: str, target: str = name, **body: object) -> None:
        told = (
            {"target": target, "since": 1_767_225_600.0, "times": 2, "by": "script"} if verb == HOLD else body
        )
        try:
            plane.execute(Action(f"{verb} {uuid.uuid4()}", target, verb, "host: a reason", told))
            said.append(f"{verb}: done")
        except (NotOurs, TargetMissing) as error:
            said.append(f"{verb}: {type(error).__name__}")

    def look(*, everything: bool) -> None:
        found = plane.look({name: name}, everything=everything)
        assert found is not None
        ours = [hold for hold in found.holds if hold.target == name]
        held = [(hold.why, hold.since, hold.times, hold.by, hold.intact, bool(hold.uid)) for hold in ours]
        said.append(f"look: held {held}, known {name in found.uids}, bare {name in found.bare}")

    look(everything=True)
    do(RELEASE)
    do(HOLD)
    do(HOLD)
    look(everything=True)
    look(everything=False)
    wipe()
    look(everything=False)
    do(HOLD)
    look(everything=False)
    do(REPORT, **condition)
    look(everything=False)
    do(RELEASE)
    look(everything=True)
    do(HOLD)
    take_back()
    look(everything=False)
    do(RELEASE)
    do(HOLD, "nobody-is-called-this")
    do(REPORT, "nobody-is-called-this", **condition)
    return said


# ---- libvirt


class Told:
    """A handler that writes down what one guest's callbacks say."""

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        self.said: list[str] = []

    def io_error(self, raw: RawIoError) -> None:
        self.said.append(
            f"error at {raw.alias}, named {bool(raw.path)}, action {raw.action_code}, {raw.reason!r}"
        )

    def lifecycle(self, uuid: str, name: str, number: int | None, event: int, detail: int) -> None:
        if uuid == self.uuid:
            self.said.append(f"lifecycle {event}/{detail}")

    def closed(self, why: str, silent_seconds: float) -> None:
        self.said.append(f"closed, with a reason {bool(why)}")

    def device_removed(self, uuid: str, alias: str) -> None:
        self.said.append(f"removed {alias}")

    def changed(self, uuid: str) -> None:
        """Not compared: which calls change a description is a matter of each release."""

    def job_ended(self, uuid: str, disk: str, *, failed: bool) -> None:
        self.said.append(f"job of {disk} ended, failed {failed}")

    def undecodable(self) -> None:
        self.said.append("undecodable")


def hypervisor(
    connector: Connector,
    uuid: str,
    *,
    fail: Callable[[], object],
    pause: Callable[[], object],
    resume: Callable[[], object],
    destroy: Callable[[], object],
    restart: Callable[[], object],
    until: Callable[[Callable[[], bool]], object],
) -> list[str]:
    """Errors that pause, looks, a resume and what stays, an operator's pause, an end, a restarted daemon."""
    told = Told(uuid)
    link = connector.open(told)
    said = told.said

    def hear() -> None:
        """All that was sent until now has come."""
        heard: list[bool] = []
        link.heard(lambda: heard.append(True))
        until(lambda: bool(heard))

    def look() -> None:
        state, _ = link.state(uuid)
        said.append(f"state {state}, disk errors {sorted(link.disk_errors(uuid).items())}")

    (domain,) = [one for one in link.domains() if one.uuid == uuid]
    said.append(f"listed in state {domain.state}")
    look()
    for stop in (fail, fail, pause):  # the second and third find what QEMU kept of the first
        stop()
        until(lambda: link.state(uuid)[0] == PAUSED)
        hear()
        said.append(f"paused, reason {link.state(uuid)[1]}")
        look()
        resume()
        hear()
        look()
    destroy()
    hear()
    try:
        link.state(uuid)
    except NoSuchDomain:
        said.append("no such domain")
    restart()
    until(lambda: said[-1].startswith("closed"))
    try:
        link.domains()
    except SourceUnavailable:
        said.append("unavailable")
    link.close()
    again = connector.open(told)
    said.append(f"listed again: {[one.uuid for one in again.domains() if one.uuid == uuid]}")
    again.close()
    return said
