"""The fakes that ship with the package keep the promises of what they stand in for."""

from __future__ import annotations

import socket
import threading

import pytest

from tests.faultkit import TcpFaultProxy
from tests.waiting import wait_until
from virtbus import envelope
from virtbus.errors import BusUnavailable
from virtbus.model import Binding, Confirmed, Deferred, Event, Message, Record, Refused, Unroutable
from virtbus.observations import DomainResumed, Observation, SourceReady
from virtbus.testing import (
    FakeBus,
    FakeSource,
    ListFeed,
    a_gap,
    a_heartbeat,
    a_raw_io_error,
    a_record,
    a_resolved,
    an_io_error,
    records,
)


@pytest.mark.parametrize("event", [an_io_error(), a_resolved(), a_gap(), a_heartbeat()])
def test_every_factory_makes_an_event_that_fits_its_schema_and_reads_back(event: Event) -> None:
    made = a_record(event)  # encoding checks the schema
    wire = envelope.to_amqp(made.attributes, made.body)
    message = Message(Binding.AMQP, wire.headers, wire.content_type, wire.body, made.key, False, None, "")
    assert envelope.to_event(envelope.decode(message)) == event


def test_records_are_distinct_and_in_order_within_their_keys() -> None:
    made = records(9, keys=3)
    assert [record.row for record in made] == list(range(1, 10))
    assert len({record.id for record in made}) == 9
    assert len({record.key for record in made}) == 3
    assert all(record.attributes["sequence"] == f"{record.seq:012d}" for record in made)


# ------------------------------------------------------------------------------------- the feed


def test_a_list_feed_gives_one_record_a_key_until_it_is_settled() -> None:
    first, second, other = records(1)[0], records(2)[1], a_record(a_gap(), row=3)
    feed = ListFeed([first, second, other])
    assert feed.take(10, frozenset()) == [first, other]
    assert feed.take(10, frozenset()) == []
    feed.settle(first, Confirmed())
    assert feed.take(10, {second.key}) == []
    assert feed.take(10, frozenset()) == [second]


def test_a_list_feed_gives_again_what_was_not_confirmed_before_the_rest_of_its_key() -> None:
    first, second = records(2)
    feed = ListFeed([first, second])
    (taken,) = feed.take(1, frozenset())
    feed.settle(taken, Deferred(BusUnavailable("away")))
    (again,) = feed.take(1, frozenset())
    assert again == first._replace(attempts=1)
    feed.settle(again, Refused(ValueError("no")))
    assert feed.take(1, frozenset()) == [second]


def test_a_list_feed_fails_loudly_on_an_outcome_of_what_was_not_taken() -> None:
    with pytest.raises(AssertionError, match="not taken"):
        ListFeed().settle(records(1)[0], Confirmed())


# ------------------------------------------------------------------------------------- the bus


def test_a_fake_bus_gives_each_record_the_outcome_that_was_decided() -> None:
    def decide(record: Record) -> Confirmed | Unroutable | Refused:
        return {1: Confirmed(), 2: Unroutable(), 3: Refused(ValueError("no"))}[record.row]

    bus = FakeBus(decide)
    assert [type(one) for one in ListFeed(records(3, keys=3)).publish(bus)] == [
        Confirmed,
        Unroutable,
        Refused,
    ]
    assert [record.row for record in bus.delivered] == [1]


def test_a_fake_bus_ends_publish_after_a_deferred_record() -> None:
    bus = FakeBus(lambda record: Deferred(BusUnavailable("away")))
    feed = ListFeed(records(2))
    assert len(feed.publish(bus, again=True)) == 1
    assert len(feed) == 2


def test_a_fake_bus_that_is_unavailable_or_closed_raises_and_takes_nothing() -> None:
    bus, feed = FakeBus(), ListFeed(records(1))
    bus.unavailable = BusUnavailable("away")
    with pytest.raises(BusUnavailable, match="away"):
        feed.publish(bus)
    bus.unavailable = None
    bus.close()
    with pytest.raises(BusUnavailable, match="closed"):
        feed.publish(bus)
    assert feed.took == []


# ------------------------------------------------------------------------------------- the source


def test_a_fake_source_is_ready_first_then_plays_its_script_and_what_comes_later() -> None:
    seen: list[Observation] = []
    stop = threading.Event()
    source = FakeSource([a_raw_io_error()])
    thread = threading.Thread(target=source.run, args=(seen.append, stop))
    thread.start()
    resumed = DomainResumed("x", 1)
    source.play(resumed)
    wait_until(lambda: len(seen) == 3, what="three observations")
    stop.set()
    thread.join(5.0)
    assert isinstance(seen[0], SourceReady)
    assert seen[1:] == [a_raw_io_error(), resumed]
    assert not thread.is_alive()


# ------------------------------------------------------------------------------------- the proxy


class Echo:
    """A TCP server that sends back what it gets."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                while data := client.recv(65536):
                    client.sendall(data)
            except OSError:
                return

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(5.0)


@pytest.fixture
def echo():
    server = Echo()
    yield server
    server.close()


def connected(proxy: TcpFaultProxy) -> socket.socket:
    return socket.create_connection((proxy.host, proxy.port), timeout=5.0)


def test_the_proxy_delays_in_each_direction(echo: Echo) -> None:
    with TcpFaultProxy("127.0.0.1", echo.port) as proxy, connected(proxy) as client:
        client.sendall(b"one")
        assert client.recv(3) == b"one"
        proxy.delay(0.2)
        client.sendall(b"two")
        assert client.recv(3) == b"two"
        proxy.delay(3600.0)
        client.sendall(b"late")
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(4)


def test_the_proxy_swallows_until_it_heals(echo: Echo) -> None:
    with TcpFaultProxy("127.0.0.1", echo.port) as proxy, connected(proxy) as client:
        proxy.black_hole()
        client.sendall(b"three")
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(5)
        proxy.heal()
        client.settimeout(5.0)
        assert client.recv(5) == b"three"


def test_the_proxy_throttles(echo: Echo) -> None:
    with TcpFaultProxy("127.0.0.1", echo.port) as proxy:
        proxy.throttle(20_000)
        with connected(proxy) as client:
            client.sendall(b"x" * 1_000)
            got = 0
            while got < 1_000:
                got += len(client.recv(65536))
        proxy.throttle(1)
        with connected(proxy) as client:
            client.sendall(b"x" * 10_000)
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                while True:
                    client.recv(65536)


def test_the_proxy_cuts_half_closes_and_refuses(echo: Echo) -> None:
    with TcpFaultProxy("127.0.0.1", echo.port) as proxy:
        with connected(proxy) as client:
            client.sendall(b"one")
            assert client.recv(3) == b"one"
            assert proxy.cut() == 1
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        with connected(proxy) as client:
            client.sendall(b"one")
            assert client.recv(3) == b"one"
            proxy.half_close("client")
            assert client.recv(1) == b""
        proxy.refuse()
        with (
            pytest.raises(ConnectionResetError),
            connected(proxy) as client,
        ):
            client.recv(1)
        assert proxy.accepted == 3
