"""The same error again and again: little is asked of it, and all else is as if each were judged by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from virtbus.model import Now
from virtbus.observations import Observation, RawIoError, SourceReady
from virtbus.sources import domain_xml, session
from virtbus.sources.libvirt import _callbacks
from virtbus.sources.link import (
    ACTION_PAUSE,
    RESUMED,
    STARTED,
    STOPPED,
    SUSPENDED,
    SUSPENDED_IOERROR,
)
from virtbus.sources.session import LookAt, Session, Shared
from virtbus.testing import a_host

T = 1_800_000_000 * 10**9
REPORTED = 2
XML = "<domain id='{number}'><name>guest</name><uuid>{uuid}</uuid><devices>{disks}</devices></domain>"
DISK = (
    "<disk type='file' device='disk'><source file='/{name}'/><target dev='{name}'/>"
    "<alias name='{name}'/></disk>"
)


class World:
    """A session by a clock of its own: what it reported, and what it left for the source thread."""

    def __init__(self) -> None:
        self.at = 0.0
        self.told: list[Observation] = []
        self.last: tuple[str, str, int, str, int] = "a", "vda", REPORTED, "/vda", 1
        self.shared = Shared(lambda: Now(T + int(self.at * 1e9), self.at), 1.0)
        self.session = Session(self.shared, self.told.append)
        self.session.since_listing = None
        for uuid in ("a", "b"):
            self.shared.cache.saw(uuid, "guest", 1, "running")
            self.read(uuid, "vda", "vdb")

    def read(self, uuid: str, *disks: str) -> None:
        described = "".join(DISK.format(name=disk) for disk in disks)
        xml = domain_xml.parse(XML.format(number=1, uuid=uuid, disks=described))
        self.shared.cache.read(uuid, xml, self.at, frozenset())
        with self.shared.lock:
            self.session.described(uuid)

    def error(
        self, uuid: str = "a", alias: str = "vda", action: int = REPORTED, path: str = "/vda", number: int = 1
    ) -> None:
        self.last = uuid, alias, action, path, number
        wall_ns = T + int(self.at * 1e9)
        self.session.io_error(RawIoError(uuid, "guest", number, path, alias, action, "eio", wall_ns))

    def again(self) -> None:
        self.error(*self.last)

    def lifecycle(self, uuid: str, event: int, detail: int) -> None:
        self.session.lifecycle(uuid, "guest", 1, event, detail)

    def looks_around(self) -> None:
        self.session.since_listing = {}

    def wait(self, seconds: float) -> None:
        self.at += seconds

    def cases(self) -> list[dict[str, object]]:
        return [asdict(case) for case in self.shared.check.cases.values()]

    def notes(self) -> list[object]:
        return list(iter(self.session.notes.next, None))


UUIDS = st.sampled_from("ab")
ALIASES = st.sampled_from(["vda", "vda", "vdb", "", "unknown"])
PATHS = st.sampled_from(["/vda", "/vda", "/vdb", "/new", "http://user:password@host/vda"])
ERRORS = st.tuples(
    st.just(World.error), UUIDS, ALIASES, st.sampled_from([REPORTED, REPORTED, ACTION_PAUSE]), PATHS
)
AGAIN = st.tuples(st.just(World.again))
STEPS = st.one_of(
    AGAIN,
    AGAIN,
    AGAIN,
    st.tuples(st.just(World.error), UUIDS),
    ERRORS,
    st.tuples(st.just(World.error), UUIDS, st.just("vda"), st.just(REPORTED), st.just("/vda"), st.just(2)),
    st.tuples(st.just(World.wait), st.sampled_from([0.01, 2.0, 61.0, -5.0])),
    st.tuples(
        st.just(World.lifecycle),
        UUIDS,
        st.sampled_from([RESUMED, SUSPENDED, STOPPED, STARTED]),
        st.sampled_from([0, SUSPENDED_IOERROR]),
    ),
    st.tuples(st.just(World.read), UUIDS, st.sampled_from(["vda", "vdb"])),
    st.tuples(st.just(lambda world, uuid: world.session.device_removed(uuid, "vda")), UUIDS),
    st.tuples(st.just(lambda world, uuid: world.session.job_ended(uuid, "vda", failed=True)), UUIDS),
    st.tuples(st.just(lambda world, uuid: world.session.changed(uuid)), UUIDS),
    st.tuples(st.just(lambda world, uuid: world.shared.cache.gone(uuid)), UUIDS),
    st.tuples(st.just(lambda world, uuid: world.shared.cache.saw(uuid, "guest", 1, "running")), UUIDS),
    st.tuples(st.just(lambda world: world.shared.cache.doubt(world.at))),
    st.tuples(st.just(lambda world: world.shared.check.keep_only(frozenset("b")))),
    st.tuples(st.just(World.looks_around)),
    st.tuples(st.just(lambda world: world.session.first_look_is_over(SourceReady(a_host(), T, ())))),
    st.tuples(st.just(lambda world: world.session.end())),
)


@example([(World.error, "a"), (World.error, "a", "vda", ACTION_PAUSE), (World.again,)])
@example([(World.looks_around,), (World.error, "a"), (World.lifecycle, "a", RESUMED, 0), (World.again,)])
@given(steps=st.lists(STEPS, max_size=60))
def test_whatever_happens_each_is_reported_as_if_it_were_judged_by_itself(
    steps: list[tuple[Callable[..., object], object]],
) -> None:
    one, other = World(), World()
    for step, *words in steps:
        step(one, *words)
        with mock.patch.object(session, "JUDGED_NS", 0):
            step(other, *words)
        assert one.told == other.told
        assert one.notes() == other.notes()
        assert one.cases() == other.cases()


def test_of_a_storm_one_error_a_second_is_judged() -> None:
    world = World()
    judged = mock.Mock(side_effect=world.shared.check.event)
    world.shared.check.event = judged  # type: ignore[method-assign]
    for _ in range(2999):
        world.error()
        world.error("b")
        world.wait(0.001)
    assert len(world.told) == 2 * 2999
    assert judged.call_count == 2 * 3
    assert world.notes() == [LookAt("a"), LookAt("b")]


class Guest:
    """A domain as libvirt-python gives it to a callback; it counts the questions."""

    def __init__(self, uuid: str, number: int) -> None:
        self.uuid, self.number, self.asked = uuid, number, 0

    def ID(self) -> int:
        return self.number

    def UUIDString(self) -> str:
        self.asked += 1
        return self.uuid

    def name(self) -> str:
        return f"guest {self.uuid}"


@pytest.mark.parametrize("other", ["lifecycle", "changed"])
def test_of_a_storm_libvirt_is_asked_for_the_guests_number_alone(other: str) -> None:
    handler, heard = mock.Mock(), threading.Event()
    callbacks = _callbacks(handler, heard)
    guests = [Guest("a", 1), Guest("b", 2)]
    for _ in range(3):
        for guest in guests:
            callbacks["io_error"](None, guest, "/vda", "vda", REPORTED, "eio", None)
    raws = [call.args[0] for call in handler.io_error.call_args_list]
    assert [raw[:3] for raw in raws] == [("a", "guest a", 1), ("b", "guest b", 2)] * 3
    assert [guest.asked for guest in guests] == [1, 1]
    assert heard.is_set()
    callbacks[other](None, Guest("c", 3), 0, 0, None)
    callbacks["io_error"](None, guests[0], "/vda", "vda", REPORTED, "eio", None)
    assert guests[0].asked == 2


def test_guests_that_have_no_number_any_more_are_told_apart() -> None:
    handler = mock.Mock()
    callbacks = _callbacks(handler, threading.Event())
    for uuid in "aba":
        callbacks["io_error"](None, Guest(uuid, -1), "/vda", "vda", REPORTED, "eio", None)
    raws = [call.args[0] for call in handler.io_error.call_args_list]
    assert [raw[:3] for raw in raws] == [(uuid, f"guest {uuid}", None) for uuid in "aba"]
