"""The common rules: stored before done, in order, limited, believed, one at a time, told."""

from __future__ import annotations

import gc
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import tracemalloc
import uuid
from contextlib import closing

import amqp
import pytest

from tests.integrations.parts import Recording, errors, eventually, heartbeat, publish, running
from virtbus.config import React
from virtbus.errors import ConfigError
from virtbus.fleet import Publishers
from virtbus.integrations.base import (
    EVENT,
    HOLD,
    RELEASE,
    REPORT,
    Action,
    ActionRefused,
    NotOurs,
    TargetUnavailable,
    open_integration,
)
from virtbus.integrations.policy import HoldRules
from virtbus.integrations.store import ActionStore
from virtbus.integrations.telemetry import ActionGivenUp, Audited, Disbelieved, Withheld
from virtbus.testing import a_record, an_io_error, no_waiting


class Forwarding(Recording):
    """Wants every event."""

    name = "forwarding"
    holds = False

    def wants(self, delivery):
        return Action(f"{delivery.source}#{delivery.id}", delivery.key, EVENT, delivery.type, {})


@pytest.fixture
def url(tmp_path):
    return f"embedded://{tmp_path}/bus.db"


def test_each_event_is_done_once_and_audited(url, tmp_path):
    told, target = [], Forwarding()
    publish(url, *errors(5))
    with running(target, url, tmp_path, told=told):
        eventually(lambda: len(target.done) == 5, "all done")
        time.sleep(0.2)
    lines = [line for line in told if isinstance(line, Audited)]
    assert [line.outcome for line in lines] == ["done"] * 5
    assert len({line.key for line in lines}) == 5


def test_what_was_done_is_not_done_again_after_a_restart_even_when_the_event_comes_again(url, tmp_path):
    target, records = Forwarding(), errors(3)
    publish(url, *records)
    with running(target, url, tmp_path):
        eventually(lambda: len(target.done) == 3, "all done")
    publish(url, *records, *errors(1, first=9))
    with running(target, url, tmp_path):
        eventually(lambda: len(target.done) == 4, "the new one done")
        time.sleep(0.3)
    assert len(target.done) == 4


def test_an_action_that_fails_is_tried_until_it_succeeds_and_others_go_on(url, tmp_path):
    target, told, tries = Forwarding(), [], []

    def fails(action):
        if action.target.endswith("0001"):
            tries.append(action.key)
            if len(tries) < 4:
                raise TargetUnavailable("not now")

    target.fails = fails
    publish(url, *errors(3))
    with running(target, url, tmp_path, told=told), no_waiting():
        eventually(lambda: len(target.done) == 3, "all done")
    assert len(tries) == 4
    assert target.done[-1][1].endswith("0001")


def test_a_target_keeps_its_order_while_its_first_action_fails(url, tmp_path):
    target, order = Forwarding(), []

    def fails(action):
        order.append(action.key.rpartition("#")[2])
        if len(order) < 3:
            raise TargetUnavailable("not now")

    target.fails = fails
    records = [a_record(an_io_error(), sequence=number) for number in (1, 2, 3)]
    publish(url, *records)
    with running(target, url, tmp_path), no_waiting():
        eventually(lambda: len(target.done) == 3, "all done")
    assert order == [records[0].id] * 3 + [records[1].id, records[2].id]


def test_an_unknown_exception_of_a_client_library_is_tried_again(url, tmp_path):
    target, raised = Forwarding(), []

    def fails(action):
        if not raised:
            raised.append(action)
            raise KeyError("surprise")

    target.fails = fails
    publish(url, *errors(1))
    with running(target, url, tmp_path), no_waiting():
        eventually(lambda: target.done, "done in the end")


def test_a_refused_action_is_given_up_aloud(url, tmp_path):
    target, told = Forwarding(), []

    def fails(action):
        if action.target.endswith("0001"):
            raise ActionRefused("never")

    target.fails = fails
    publish(url, *errors(2))
    with running(target, url, tmp_path, told=told):
        eventually(lambda: target.done, "the other done")
        eventually(lambda: any(isinstance(line, ActionGivenUp) for line in told), "told")


def test_a_dry_run_does_nothing_and_says_what_it_would_do(url, tmp_path):
    target, told = Forwarding(), []
    publish(url, *errors(2))
    with running(target, url, tmp_path, told=told, dry_run=True):
        eventually(lambda: sum(isinstance(line, Audited) for line in told) == 2, "told")
    assert target.done == []
    assert {line.outcome for line in told if isinstance(line, Audited)} == {"would"}


def test_the_rate_of_actions_is_limited(url, tmp_path):
    target = Forwarding()
    publish(url, *errors(6))
    with running(target, url, tmp_path, actions_per_minute=0.001):  # a burst of one, then none for hours
        eventually(lambda: target.done, "the first one done")
        time.sleep(0.5)
        assert len(target.done) == 1


def test_an_event_of_a_publisher_who_may_not_speak_for_the_host_is_put_aside(url, tmp_path):
    target, told = Forwarding(), []
    publish(url, *errors(1))
    with running(target, url, tmp_path, told=told, publishers=["virtbus-{host}"]):
        eventually(lambda: told, "told")  # the embedded bus proves no publisher
    assert target.done == []


@pytest.mark.parametrize(
    ("patterns", "publisher", "host", "expected"),
    [
        ([], None, "compute-1", True),
        (["agent"], "agent", "compute-1", True),
        (["agent"], None, "compute-1", False),
        (["virtbus-{host}"], "virtbus-compute-1", "compute-1", True),
        (["virtbus-{host}"], "virtbus-compute-1", "compute-2", False),
        (["virtbus-{host}"], "virtbus-compute-1", "*", False),
        (["virtbus-{host}"], "virtbus-compute-1", "compute-[1]", False),
        (["virtbus-{host}"], "virtbus-compute-1", None, True),
        (["virtbus-{host}"], "somebody", None, False),
    ],
)
def test_a_publisher_is_bound_to_its_host(patterns, publisher, host, expected):
    assert (Publishers(patterns).refuses(publisher, "agent/1", host) is None) is expected


def test_a_source_belongs_to_the_first_publisher_that_spoke_for_it_also_after_a_restart(tmp_path):
    for told, publisher, believed in (
        (1, "virtbus-a", True),
        (2, "virtbus-b", False),
        (3, "virtbus-a", True),
    ):
        store = ActionStore(tmp_path / "x.db")
        publishers = Publishers(["virtbus-*"], store.owners)
        assert (publishers.refuses(publisher, "agent/1", "h1") is None) is believed, told
        store.close()


def test_nobody_speaks_for_the_agent_of_another_user_on_a_real_broker(rabbitmq, vhost, tmp_path):
    """A compromised host beats with the id of another host's agent, and in its own name."""
    url = rabbitmq.url(vhost)
    users = {
        host: rabbitmq.user(f"virtbus-{host}", vhost, write="virtbus[.]events", configure="virtbus[.]events")
        for host in ("victim", "evil")
    }
    evil_agent = "eeeeeeee-0000-4000-8000-000000000001"
    target, told = Recording(), []
    queue = f"virtbus.react-{target.name}"

    def put_aside() -> int:
        return sum(isinstance(one, Disbelieved) for one in told)

    with running(target, url, tmp_path, told=told, publishers=["virtbus-{host}"]):
        eventually(lambda: waiting(rabbitmq, vhost, queue) is not None, "listening", 60)
        publish(users["evil"], heartbeat("evil", agent=evil_agent))
        publish(users["victim"], heartbeat("victim", guests=1, sequence=1))
        eventually(lambda: ("hold", "victim") in target.done, "the victim held", 60)
        publish(users["evil"], heartbeat("evil", sequence=10**15))  # the victim's source
        publish(users["evil"], heartbeat("victim", sequence=10**15))  # and its host
        eventually(lambda: put_aside() == 2, "both put aside", 60)
        assert ("release", "victim") not in target.done
        publish(users["victim"], heartbeat("victim", sequence=2))
        eventually(lambda: ("release", "victim") in target.done, "its own word counts", 60)
    assert put_aside() == 2
    assert waiting(rabbitmq, vhost, f"{queue}.dead") == 2


def waiting(rabbitmq, vhost: str, queue: str) -> int | None:
    """How many messages wait in a queue; None when there is no such queue."""
    with amqp.Connection(f"127.0.0.1:{rabbitmq.port}", virtual_host=vhost) as connection:
        try:
            return connection.channel().queue_declare(queue, passive=True).message_count
        except amqp.NotFound:
            return None


def test_a_second_instance_on_the_same_state_is_refused(tmp_path):
    first = ActionStore(tmp_path / "x.db")
    with pytest.raises(ConfigError, match=r"another process .* runs this integration"):
        ActionStore(tmp_path / "x.db")
    first.close()
    ActionStore(tmp_path / "x.db").close()


@pytest.mark.parametrize(
    "made",
    [
        "CREATE TABLE holds (host TEXT PRIMARY KEY, state TEXT)",
        "another word",
        "damage",
        "no folder",
    ],
)
def test_a_state_that_cant_be_read_is_one_clear_error_at_the_start(tmp_path, made):
    file = tmp_path / "x.db"
    if made.startswith("CREATE"):  # as an older release had it
        with closing(sqlite3.connect(file)) as database:
            database.execute(made)
    elif made == "another word":
        ActionStore(file).close()
        with closing(sqlite3.connect(file, isolation_level=None)) as database:
            database.execute(
                "INSERT INTO holds (host, state, since, times, why, uid, agent, heard_at)"
                " VALUES ('h', 'upgraded', 0, 1, '', '', '', 0)"
            )
    elif made == "damage":
        file.write_bytes(b"no database" * 1000)
    else:
        (tmp_path / "file").touch()
        file = tmp_path / "file" / "x.db"
    for _ in range(2):  # and its lock is let go
        with pytest.raises(ConfigError, match=r"x\.db can't be used: .*; move it away"):
            ActionStore(file)


@pytest.mark.parametrize("replaced", [0, 1, 9], ids=lambda count: f"{count} of each done one are replaced")
def test_a_store_keeps_the_newest_actions_whatever_became_of_them(tmp_path, monkeypatch, replaced):
    """A report that a newer one replaces, while the control plane is slow, is never finished."""
    monkeypatch.setattr("virtbus.integrations.store.KEPT_ROWS", 100)
    with closing(ActionStore(tmp_path / "exec.db")) as store:
        for number in range(1, 601):
            action = Action(f"report/{number}", "h1", REPORT, "", topic="report")
            ((stored, _),) = store.show([("h1", "shown", action)], 0.0)
            if number % (replaced + 1) == 0:
                store.finish(stored, "done", "", 0.0)
        assert [number for number, *_ in store.waiting()] in ([], [600])
    with closing(sqlite3.connect(tmp_path / "exec.db")) as database:
        count, oldest = database.execute("SELECT count(*), min(number) FROM actions").fetchone()
    assert count <= 110 + replaced
    assert oldest >= 600 - 110 - replaced


def test_an_action_stored_before_a_kill_is_done_after_it(tmp_path):
    code = (
        "import os, sys; from pathlib import Path\n"
        "from virtbus.integrations.base import Action\n"
        "from virtbus.integrations.store import ActionStore\n"
        "store = ActionStore(Path(sys.argv[1]))\n"
        "(entry,) = store.add([Action('k', 't', 'event', 'why', {'a': 1})], 1.0)\n"
        "store.tried(entry[0]); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.db")], check=False, timeout=60)
    assert done.returncode == -9
    store = ActionStore(tmp_path / "x.db")
    ((_, action, attempts),) = store.waiting()
    store.close()
    assert (action.key, dict(action.body), attempts) == ("k", {"a": 1}, 1)


def test_a_state_that_cant_be_written_ends_the_run_aloud(url, tmp_path, monkeypatch):
    def full(self, number):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(ActionStore, "tried", full)
    publish(url, *errors(1))
    with pytest.raises(sqlite3.OperationalError), running(Forwarding(), url, tmp_path) as reactor:
        eventually(lambda: reactor._worker.stopping, "stopped by itself")


# ---- hosts


def test_a_host_in_trouble_is_held_and_released_when_it_is_well(url, tmp_path):
    target = Recording()
    publish(url, heartbeat("compute-1"), *errors(2))
    with running(target, url, tmp_path):
        eventually(lambda: target.done == [(HOLD, "compute-1")], "held")
        publish(url, heartbeat("compute-1", sequence=200))
        eventually(lambda: target.done[1:] == [(RELEASE, "compute-1")], "released")


def test_a_restart_does_not_release_before_the_host_was_heard(url, tmp_path):
    target = Recording()
    publish(url, heartbeat("compute-1", guests=2))
    with running(target, url, tmp_path):
        eventually(lambda: target.done == [(HOLD, "compute-1")], "held")
    with running(target, url, tmp_path) as reactor:
        time.sleep(1.5)
        publish(url, heartbeat("compute-1", guests=2))
        eventually(lambda: len(reactor.fleet), "heard")
        time.sleep(1.5)
        assert target.done == [(HOLD, "compute-1")]
        publish(url, heartbeat("compute-1", sequence=200))
        eventually(lambda: target.done[1:] == [(RELEASE, "compute-1")], "released")


def test_never_more_than_the_share_is_held_and_what_is_withheld_is_told(url, tmp_path):
    target, told = Recording(), []
    hosts = [f"compute-{number}" for number in range(10)]
    publish(url, *(heartbeat(host, guests=1, agent=str(uuid.uuid4())) for host in hosts))
    with running(
        target,
        url,
        tmp_path,
        told=told,
        rules=HoldRules(when="any", min_guests=1, raise_seconds=0.0, clear_seconds=0.0, max_share=0.3),
    ):
        eventually(lambda: any(isinstance(line, Withheld) for line in told), "withheld")
        time.sleep(1.2)
    assert len({host for _, host in target.done}) == len(target.done) == 3


def test_a_host_that_somebody_else_holds_is_left_alone(url, tmp_path):
    target, told = Recording(), []

    def fails(action):
        raise NotOurs("an operator has it")

    target.fails = fails
    publish(url, heartbeat("compute-1", guests=2))
    with running(target, url, tmp_path, told=told):
        eventually(lambda: any(isinstance(line, Audited) for line in told), "told")
        time.sleep(1.5)
        publish(url, heartbeat("compute-1", sequence=200))
        time.sleep(1.5)
    assert [line.outcome for line in told if isinstance(line, Audited)] == ["left alone"]


def test_one_guest_alone_holds_no_host_by_default(url, tmp_path):
    target = Recording()
    publish(url, heartbeat("compute-1"), *errors(1))
    with running(target, url, tmp_path, rules=HoldRules(raise_seconds=0.0)) as reactor:
        eventually(lambda: len(reactor.fleet), "heard")
        time.sleep(1.5)
    assert target.done == []


@pytest.mark.parametrize("where", ["wants", "execute", "look"])
def test_a_library_that_ends_its_program_does_not_end_the_reactor(url, tmp_path, where):
    """A thread that ends with SystemExit ends without a word, and nothing more would be done."""
    target, calls, told = Recording(), [], []
    target.wants = lambda delivery: Action(delivery.id, "t", EVENT, "")
    real = getattr(target, where)

    def ends(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 1:
            raise SystemExit(3)
        return real(*arguments, **named)

    setattr(target, where, ends)
    publish(url, *errors(3))
    with no_waiting(), running(target, url, tmp_path, told=told):
        eventually(lambda: len(calls) >= 2, "called again")
    assert any("sys.exit(3) was called" in str(getattr(line, "error", "")) for line in told)


def test_a_worker_that_can_not_go_on_ends_the_reactor_with_its_reason(url, tmp_path):
    target = Recording()
    target.wants = lambda delivery: Action(delivery.id, "t", EVENT, "")
    target.fails = lambda action: (_ for _ in ()).throw(GeneratorExit("enough"))
    publish(url, *errors(1))
    with pytest.raises(GeneratorExit, match="enough"), running(target, url, tmp_path) as reactor:
        eventually(lambda: reactor.dead(), "ended")
        eventually(lambda: reactor._worker.stopping, "stopping")


# ---- exec and the command line


def test_exec_gets_each_event_on_its_standard_input(url, tmp_path):
    out = tmp_path / "out"
    script = f"cat >> {out}; echo $VIRTBUS_EVENT_TYPE >> {out}.types"
    settings = React(exec=type(React().exec)(command=("/bin/sh", "-c", script)))
    publish(url, *errors(2))
    with running(open_integration("exec", settings), url, tmp_path):
        eventually(lambda: out.exists() and len(out.read_text().splitlines()) == 2, "two lines")
    events = [json.loads(line) for line in out.read_text().splitlines()]
    assert {event["data"]["domain"]["name"] for event in events} == {"guest-1", "guest-2"}
    assert {event["specversion"] for event in events} == {"1.0"}


def test_an_event_of_others_is_handed_over_whatever_its_data_are(url, tmp_path):
    out = tmp_path / "out"
    settings = React(types=("thing",), exec=type(React().exec)(command=("/bin/sh", "-c", f"cat >> {out}")))
    for id_, body in (("a", b"\x00\xff"), ("b", b"two\nlines"), ("c", b"")):
        attributes = {"specversion": "1.0", "id": id_, "source": "/theirs", "type": "com.example.thing"}
        attributes["datacontenttype"] = "text/plain"
        publish(url, a_record()._replace(attributes=attributes, id=id_, body=body, key="k"))
    with running(open_integration("exec", settings), url, tmp_path):
        eventually(lambda: out.exists() and len(out.read_text().splitlines()) == 3, "three lines")
    events = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one.get("data", one.get("data_base64")) for one in events] == ["AP8=", "two\nlines", None]


@pytest.mark.parametrize(
    ("code", "error"), [(65, ActionRefused), (1, TargetUnavailable), (75, TargetUnavailable)]
)
def test_what_a_commands_exit_code_means(code, error):
    settings = React(exec=type(React().exec)(command=("/bin/sh", "-c", f"echo no; exit {code}")))
    action = Action("k", "t", EVENT, "", {"attributes": dict(a_record().attributes), "data": "{}"})
    with pytest.raises(error, match=r"no$"):
        open_integration("exec", settings).execute(action)


@pytest.mark.parametrize("ends", [True, False])
def test_a_command_that_says_more_than_fits_into_memory_costs_none(ends):
    shell = "head -c 50000000 /dev/zero; echo the end" if ends else "yes"
    ran = type(React().exec)(command=("/bin/sh", "-c", shell), timeout_seconds=60.0 if ends else 1.0)
    hook = open_integration("exec", React(exec=ran))
    action = Action("k", "t", EVENT, "", {"attributes": dict(a_record().attributes), "data": "{}"})
    tracemalloc.start()
    try:
        if ends:
            assert hook.execute(action).endswith("the end")
        else:
            with pytest.raises(TargetUnavailable, match="longer than 1 s"):
                hook.execute(action)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_a_command_that_hangs_is_killed_with_all_it_started(tmp_path):
    mark = tmp_path / "mark"
    command = ("/bin/sh", "-c", f"(sleep 1; touch {mark}) & wait")
    settings = React(exec=type(React().exec)(command=command, timeout_seconds=0.2))
    action = Action("k", "t", EVENT, "", {"attributes": dict(a_record().attributes), "data": "{}"})
    with pytest.raises(TargetUnavailable, match=r"longer than 0.2 s"):
        open_integration("exec", settings).execute(action)
    time.sleep(1.2)
    assert not mark.exists()


@pytest.mark.parametrize("begins", ["", "setsid "])
def test_a_command_is_done_when_it_ended_whatever_it_leaves_behind(begins):
    script = f"{begins}sleep 60 & echo $!; echo begun"
    settings = React(exec=type(React().exec)(command=("/bin/sh", "-c", script)))
    action = Action("k", "t", EVENT, "", {"attributes": dict(a_record().attributes), "data": "{}"})
    said = open_integration("exec", settings).execute(action).split()
    if begins:
        os.kill(int(said[0]), signal.SIGKILL)  # a session of its own lives on, as a daemon does
    assert said[1:] == ["begun"]


@pytest.mark.parametrize(("script", "ends"), [("echo done", True), ("sleep 60", False)])
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_a_command_that_runs_as_somebody_else_is_not_waited_for_in_vain(monkeypatch, script, ends):
    """Who starts `sudo` may not end what it runs, not even when it has ended by itself."""
    started = []

    def refused(group, number):
        started.append(group)
        raise PermissionError("not ours")

    ran = type(React().exec)(command=("/bin/sh", "-c", script), timeout_seconds=20.0 if ends else 0.2)
    action = Action("k", "t", EVENT, "", {"attributes": dict(a_record().attributes), "data": "{}"})
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", refused)
        patch.setattr("virtbus.integrations.hooks._END_SECONDS", 0.1)
        hook = open_integration("exec", React(exec=ran))
        if ends:
            assert hook.execute(action) == "done"
        else:
            with pytest.raises(TargetUnavailable, match="longer than"):
                hook.execute(action)
    if not ends:
        os.killpg(started[0], signal.SIGKILL)
        os.waitpid(started[0], 0)
    gc.collect()  # it warns of what it left, here


def test_a_command_that_closes_its_output_is_waited_for():
    settings = React(exec=type(React().exec)(command=("/bin/sh", "-c", "exec >&- 2>&-; sleep 0.3; exit 65")))
    action = Action("k", "t", EVENT, "", {"attributes": dict(a_record().attributes), "data": "{}"})
    with pytest.raises(ActionRefused):
        open_integration("exec", settings).execute(action)


def test_an_attribute_that_no_environment_holds_keeps_no_event_from_its_command():
    settings = React(
        exec=type(React().exec)(command=("/bin/sh", "-c", "echo [$VIRTBUS_EVENT_SUBJECT]; wc -c"))
    )
    for subject, shown in (("s" * 200_000, "[]"), ("short", "[short]")):
        attributes = {**a_record().attributes, "subject": subject}
        action = Action("k", "t", EVENT, "", {"attributes": attributes, "data": "{}"})
        said = open_integration("exec", settings).execute(action).split()
        assert said[0] == shown
        assert int(said[1]) > len(subject)


def test_the_command_runs_until_a_signal_and_ends_clean(url, tmp_path):
    out = tmp_path / "out"
    publish(url, *errors(1))
    option = "exec.command=" + json.dumps(["/bin/sh", "-c", f"cat >> {out}"])
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "virtbus",
            "react",
            "--with",
            "exec",
            "--bus",
            url,
            "--state-dir",
            str(tmp_path),
            "--option",
            option,
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        eventually(out.exists, "run")
        process.terminate()
        _, log = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0, log
    assert json.loads(out.read_text())["type"] == "io.virtbus.domain.io_error.v1"
    audits = [line for line in map(json.loads, log.splitlines()) if line["event"] == "action"]
    assert [line["outcome"] for line in audits] == ["done"]


@pytest.mark.parametrize("name", ["exec", "webhook"])
def test_an_integration_without_its_setting_says_which(name):
    with pytest.raises(ConfigError, match=rf"set react.{name}"):
        open_integration(name, React())


def test_an_unknown_integration_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"exec, kubernetes, masakari, nova, webhook"):
        open_integration("nomad", React())
