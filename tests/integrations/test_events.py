"""One event at a time: stored before it is acknowledged, and put aside when it can't be worked on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import urllib.request
from contextlib import nullcontext
from unittest import mock

import pytest

from tests.integrations.parts import Recording, eventually, heartbeat, publish
from tests.integrations.plane import Killed, Plane, World
from tests.ports import free_ports
from virtbus.commands import consume
from virtbus.errors import BusUnavailable
from virtbus.fleet import Fleet, Publishers
from virtbus.integrations.base import EVENT, HOLD, Action, Integration, TargetUnavailable
from virtbus.integrations.reactor import _BATCH
from virtbus.integrations.store import ActionStore
from virtbus.integrations.telemetry import REACT, Audited, EventPutAside, EventsLeft, EventsTaken
from virtbus.integrations.worker import MOST_SURPRISES
from virtbus.model import IoError
from virtbus.retry import no_waiting
from virtbus.testing import a_host, a_record, an_io_error


class Forwarding(Recording):
    """Wants every event; `key` makes its key of the event's id."""

    name = "forwarding"
    holds = False

    def __init__(self):
        super().__init__()
        self.key = lambda id_: id_

    def wants(self, delivery):
        return Action(self.key(delivery.id), delivery.source, EVENT, delivery.type, {})


@pytest.fixture
def world(tmp_path):
    one = World(tmp_path, ["h1", "h2"], plane=Forwarding())
    yield one
    if one.reactor is not None:
        one.kill()


def test_an_event_is_acknowledged_after_what_it_calls_for_is_stored(world, monkeypatch):
    order = []
    add, settle = ActionStore.add, world.bus._settle

    def adding(self, actions, wall):
        found = add(self, actions, wall)
        order.extend(("stored", action.key) for action in actions)
        return found

    def settling(delivery):
        order.append(("acknowledged", delivery.id))
        settle(delivery)

    monkeypatch.setattr(ActionStore, "add", adding)
    monkeypatch.setattr(world.bus, "_settle", settling)
    world.run(3)
    assert len(order) == 4
    for id_ in world.bus.acked:
        assert order.index(("stored", id_)) < order.index(("acknowledged", id_))


def test_a_kill_before_an_event_is_stored_leaves_it_unacknowledged(world, monkeypatch):
    monkeypatch.setattr(ActionStore, "add", mock.Mock(side_effect=Killed))
    world.run(3)
    assert world.kills == 1
    assert world.bus.acked == []


@pytest.mark.parametrize("where", ["saw", "wants", "stored"])
def test_an_event_that_cant_be_worked_on_is_put_aside_and_the_others_go_on(world, monkeypatch, where):
    victim = next(iter(world.agents.values()))
    saw, wants = Fleet.saw, world.plane.wants

    def failing(real, source):
        def wrapped(*arguments):
            if victim in source(arguments):
                raise OverflowError("int too large to convert to float")
            return real(*arguments)

        return wrapped

    if where == "saw":
        monkeypatch.setattr(Fleet, "saw", failing(saw, lambda told: told[2]["source"]))
    elif where == "wants":
        monkeypatch.setattr(world.plane, "wants", failing(wants, lambda told: told[0].source))
    else:
        first = []
        world.plane.key = lambda id_: "\ud800" if not first.append(id_) and len(first) == 1 else id_
    world.run(3)
    assert world.kills == 0
    ((id_, reason),) = world.bus.dead
    assert "Error: " in reason
    assert len(world.bus.acked) == 1
    assert len(world.plane.done) == 1
    assert [one.id for one in world.told if isinstance(one, EventPutAside)] == [id_]


class Untold(Exception):
    """An error that can't even be told."""

    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize("error", [ValueError("half a \udcff character"), Untold()], ids=["text", "none"])
@pytest.mark.parametrize("where", ["wants", "execute"])
def test_an_error_whose_text_can_not_be_told_ends_nothing(world, where, error):
    def fails(*arguments):
        raise error

    if where == "wants":
        world.plane.wants = fails
    else:
        world.plane.fails = fails
    with no_waiting():
        world.run(200)
    assert world.kills == 0
    if where == "wants":
        assert len(world.bus.dead) > 2
        assert all(type(error).__name__ in reason and reason.encode() for _, reason in world.bus.dead)
    else:
        states = {state for (state,) in world.store._db.execute("SELECT state FROM actions")}
        assert "refused" in states


def test_a_dead_letter_that_the_broker_does_not_take_now_ends_nothing(world, monkeypatch):
    world.start()
    world.reactor._publishers = Publishers(["virtbus-{host}"])
    monkeypatch.setattr(world.bus, "_dead_letter", mock.Mock(side_effect=BusUnavailable("nack")))
    world.run(3)
    assert world.kills == 0
    assert world.bus.acked == []


def test_an_event_that_its_library_chokes_on_is_given_up_after_a_while(world):
    tries = []

    def fails(action):
        tries.append(action.key)
        raise TypeError("a surprise")

    world.plane.fails = fails
    with no_waiting():
        world.run(9)
    assert len(tries) == 2 * MOST_SURPRISES
    assert world.store.waiting() == []


# ---- a control plane that is away for hours


class Telling(Plane):
    """Shows and holds hosts, and hands over each error, as Kubernetes does."""

    def wants(self, delivery):
        if not isinstance(delivery.event, IoError):
            return None
        return Action(delivery.id, delivery.id, EVENT, delivery.type, {"target": "h2"}, topic="event")


def some_errors(count, *, first=1):
    """Errors of a host that no test looks at, with their records."""
    made = [(an_io_error(host=a_host(name="h3")), f"e{number}") for number in range(first, first + count)]
    return [(event, a_record(event, id=id_)) for event, id_ in made]


def given_up(world):
    return [line.key for line in world.told if isinstance(line, Audited) and line.outcome == "given up"]


@pytest.mark.timeout(60)  # it would wait for ever
def test_events_that_wait_for_an_absent_control_plane_keep_no_heartbeat_away(tmp_path, monkeypatch):
    """Holds and conditions are decided from heartbeats, which come behind the events in the same queue."""
    monkeypatch.setattr("virtbus.integrations.worker.MOST_WAITING", 20)
    world = World(tmp_path, ["h1", "h2", "h3"], plane=Telling("h1", "h2", "h3"))
    world.run(60)
    with world.outage():
        world.bus.waiting += some_errors(100)
        world.bad = {"h1"}
        world.run(60)
        assert world.reactor._heartbeat_age() <= 10
        assert world.store.rows()["h1"].state == "holding"
        events = [action.key for _, action, _ in world.store.waiting() if action.verb == EVENT]
        assert len(events) <= 20
        assert given_up(world) + events == [f"e{number}" for number in range(1, 101)], (
            "the oldest, each named"
        )
    world.run(90)
    assert world.plane.held == {"h1"}
    assert [action for _, action, _ in world.store.waiting() if action.verb == EVENT] == []
    assert len([one for one in world.plane.done if one == (EVENT, "h2")]) == len(events)
    world.kill()


def test_a_hold_does_not_wait_behind_events(tmp_path):
    world = World(tmp_path, ["h1", "h2", "h3"], plane=Telling("h1", "h2", "h3"))
    world.run(60)
    world.bad = {"h1"}
    while not world.reactor._store.rows():
        world.wall, world.monotonic = world.wall + 1, world.monotonic + 1
        world.bus.waiting += some_errors(50, first=50 * int(world.monotonic))  # ten a second are executed
        if not int(world.monotonic) % 10:
            world.beat()
        while world.bus.waiting:
            world.reactor.step(0.0)
        world.reactor.step(0.0)
    world.monotonic += 1
    while (HOLD, "h1") not in world.plane.done:
        assert world.reactor._worker.step()
    assert world.reactor._worker.waiting > 100
    world.kill()


def test_what_is_only_handed_over_waits_in_the_broker_and_nothing_is_given_up(world, monkeypatch):
    monkeypatch.setattr("virtbus.integrations.worker.MOST_WAITING", 20)
    world.start()
    world.bus.waiting = some_errors(100)

    def away(action):
        raise TargetUnavailable("away")

    world.plane.fails = away
    for _ in range(200):
        world.monotonic += 1
        world.reactor.step(0.0)
        world.reactor._worker.step()
    kept = len(world.bus.acked)
    assert 20 <= kept == len(world.store.waiting()) < 20 + _BATCH, "and what came in one batch with the last"
    assert len(world.bus.waiting) == 100 - kept
    assert [line.waiting for line in world.told if isinstance(line, EventsLeft)] == [kept]
    world.plane.fails = lambda action: None
    while world.bus.waiting or world.store.waiting():
        world.monotonic += 1
        world.reactor.step(0.0)
        world.reactor._worker.step()
    assert world.bus.acked == [f"e{number}" for number in range(1, 101)]
    assert given_up(world) == []
    lines = [line for line in world.told if isinstance(line, EventsLeft | EventsTaken)]
    assert len(lines) % 2 == 0, "each time it is full it says once that it was, and once that it is not"
    assert isinstance(lines[-1], EventsTaken)


# ---- watched


def test_the_metrics_of_a_reactor_are_its_own_and_begin_at_zero(tmp_path):
    world = World(tmp_path, ["h1", "h2", "h3"], plane=Plane("h1", "h2", "h3"))
    world.bad = {"h1"}
    world.run(60)
    get = REACT.registry.get_sample_value
    assert get("virtbus_react_holds", {"integration": "plane", "reason": "undetermined"}) == 1
    assert get("virtbus_react_holds", {"integration": "plane", "reason": "host"}) == 0
    labels = {"integration": "plane", "verb": "release", "result": "refused"}
    assert get("virtbus_react_actions_total", labels) is not None
    assert get("virtbus_fleet_hosts", {"integration": "plane", "state": "observing"}) == 3
    assert get("virtbus_fleet_hosts_in_trouble", {"integration": "plane", "blame": "undetermined"}) == 1
    assert get("virtbus_react_heartbeat_age_seconds", {"integration": "plane"}) < 60
    assert get("virtbus_source_connected", {}) is None, "an agent's, which would page"
    world.kill()


def test_an_integration_that_another_process_acts_for_hides_no_trouble_of_its_neighbours_fleet(tmp_path):
    """Each has a group of its own, and knows of the fleet what that group was sent."""

    class Standby(Integration):
        name = "standby"

    world = World(tmp_path, ["h1", "h2", "h3"], plane=Plane("h1", "h2", "h3"))
    world.bad = {"h1"}
    world.run(60)
    world.kill()
    idle = World(tmp_path / "idle", [], plane=Standby())
    idle.run(60)
    idle.kill()
    get = REACT.registry.get_sample_value
    assert get("virtbus_fleet_incidents", {"integration": "plane"}) == 1
    assert get("virtbus_fleet_hosts", {"integration": "plane", "state": "observing"}) == 3
    assert get("virtbus_fleet_incidents", {"integration": "standby"}) == 0


def test_what_only_hands_over_shows_the_fleet_and_no_age_of_holds_that_grows_for_ever(tmp_path):
    """An alert on the age would fire for ever, and one on the fleet's verdict never."""

    class HandsOver(Integration):
        name = "hands-over"

    world = World(tmp_path, ["h1", "h2", "h3", "h4"], plane=HandsOver())
    world.bad = {"h1", "h2"}
    world.run(1300)
    get = REACT.registry.get_sample_value
    assert math.isnan(get("virtbus_react_look_age_seconds", {"integration": "hands-over"}))
    assert get("virtbus_fleet_hosts", {"integration": "hands-over", "state": "observing"}) == 4
    assert get("virtbus_fleet_storage_in_trouble", {"integration": "hands-over", "blame": "backend"}) == 1
    world.kill()


def fetch(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.mark.parametrize("command", ["react", "fleet"])
def test_both_commands_serve_their_metrics_and_probes(tmp_path, command):
    url, (port,) = f"embedded://{tmp_path}/bus.db", free_ports(1)
    file = tmp_path / "fleet.json"
    file.write_text("yesterday's")  # is no reason to be ready
    words = {
        "react": ["react", "--with", "exec", "--option", 'exec.command=["/bin/true"]'],
        "fleet": ["fleet", "--write", str(file)],
    }[command]
    with subprocess.Popen(
        [sys.executable, "-m", "virtbus", *words, "--bus", url, "--state-dir", str(tmp_path),
         "--http-listen", f"127.0.0.1:{port}"],
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:

            def answers():
                try:
                    return fetch(port, "/readyz")[0] == 200
                except OSError:
                    return False

            eventually(answers, "ready")
            assert command == "react" or file.read_text() != "yesterday's"
            publish(url, heartbeat("compute-1", guests=2))
            assert fetch(port, "/livez") == (200, '{"ok": true, "reasons": []}')
            status, text = fetch(port, "/metrics")
            assert status == 200
            assert "virtbus_fleet_storage_in_trouble" in text
            assert "virtbus_spool_events" not in text
        finally:
            process.terminate()
            _, log = process.communicate(timeout=20)
    if command == "fleet":
        assert json.loads(file.read_text())["hosts"].keys() <= {"compute-1"}
    assert "Traceback" not in log


def test_dead_letters_beyond_those_that_were_named_are_not_read(monkeypatch):
    """What is read is out of others' sight, and there may be a million of them."""
    letters = [mock.Mock(id=name, position=f"q#{name}") for name in "abc"]
    read, dropped = [], []
    shown = mock.Mock(drop=dropped.append, read=lambda: (read.append(one) or one for one in letters))
    monkeypatch.setattr(consume, "_letters", lambda options, group: nullcontext(shown))
    with pytest.raises(SystemExit):
        consume._settle({}, "g", ["a"], False, "dropped from", back=False)
    assert dropped == letters[:1]
    assert len(read) == 2


def test_an_address_that_was_set_and_is_taken_is_refused(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = subprocess.run(
            [sys.executable, "-m", "virtbus", "react", "--with", "exec", "--option",
             'exec.command=["/bin/true"]', "--bus", f"embedded://{tmp_path}/bus.db", "--state-dir",
             str(tmp_path), "--http-listen", f"127.0.0.1:{taken.getsockname()[1]}"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 78
    assert "react.listen = 127.0.0.1:" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["holds"], 78, "no control plane is named"),
        (["holds", "--with", "webhook", "--option", "webhook.url=http://127.0.0.1:1/"], 78, "holds no hosts"),
        (["release", "h1", "--with", "nova"], 78, "no OpenStack cloud"),
        (["holds", "--with", "nomad"], 78, "no integration is called"),
        (["holds", "--with", "kubernetes"], 78, "no Kubernetes cluster"),
        (
            ["holds", "--with", "kubernetes", "--option", "kubernetes.kubeconfig=kube"],
            78,
            "no Kubernetes cluster",
        ),
    ],
)
def test_the_commands_on_holds_say_what_they_lack(tmp_path, words, code, told):
    (tmp_path / "kube").write_text("- no: kubeconfig\n")
    (tmp_path / "react").mkdir()
    for name in ("exec", "gone"):  # what holds no hosts, or is not installed any more, is passed over
        (tmp_path / "react" / f"{name}.db").touch()
    done = subprocess.run(
        [sys.executable, "-m", "virtbus", "react", *words, "--state-dir", str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, told in done.stderr) == (code, True), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
