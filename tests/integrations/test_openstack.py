"""Against Nova's and Masakari's own code: a real nova-api, Nova's weight handler, Masakari's schema."""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path

import pytest
from openstack import exceptions as openstack_exceptions

from tests.agent.process import AgentProcess
from tests.conftest import need
from tests.integrations import control_planes
from tests.integrations.control_planes import NovaApi
from tests.integrations.parts import Recording, errors, eventually, heartbeat, publish, running
from tests.integrations.plane import POINTS, World, story_of_a_kill
from tests.lab.lab import PAUSED_IOERROR
from tests.lab.test_source import NOVA
from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.config import React, ReactMasakari, ReactNova
from virtbus.consumer import Consumer
from virtbus.integrations.base import (
    HOLD,
    RELEASE,
    Action,
    ActionRefused,
    NotOurs,
    TargetMissing,
    TargetUnavailable,
    open_integration,
)
from virtbus.integrations.holds import Finding
from virtbus.model import Action as Kind
from virtbus.model import Now, Origin, Owner, Phase
from virtbus.sources.link import ACTION_PAUSE, ACTION_REPORT
from virtbus.testing import a_domain, a_host, a_raw_io_error, a_record, an_io_error
from virtbus.words import Platform

pytestmark = [
    pytest.mark.timeout(1800),  # the first run installs Nova
    # openstacksdk uses what it deprecates itself.
    pytest.mark.filterwarnings("ignore::openstack.warnings.RemovedInSDK50Warning"),
    pytest.mark.filterwarnings("ignore::openstack.warnings.RemovedInSDK60Warning"),
]


@pytest.fixture(scope="session")
def planes() -> None:
    need(control_planes.missing())


@pytest.fixture(scope="session")
def nova_api(planes, tmp_path_factory):
    with NovaApi(tmp_path_factory.mktemp("nova"), ["compute-1", "compute-2.example.org", "compute-3"]) as api:
        yield api


@pytest.fixture
def nova(nova_api, tmp_path, monkeypatch):
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(nova_api.clouds(tmp_path / "clouds.yaml")))
    made = open_integration("nova", React(nova=ReactNova(cloud="test")))
    yield made
    made.close()


def an_action(verb: str, host: str, why: str = "host: two unrelated storage systems") -> Action:
    return Action(f"{verb}/{host}/{uuid.uuid4()}", host, verb, why)


def test_a_service_is_disabled_with_our_reason_and_enabled_again(nova, nova_api):
    nova.execute(an_action(HOLD, "compute-1"))
    nova.execute(an_action(HOLD, "compute-1"))
    status, reason = nova_api.services()["compute-1"]
    assert (status, reason) == ("disabled", "virtbus: host: two unrelated storage systems")
    assert not reason.startswith("AUTO: ")
    nova.execute(an_action(RELEASE, "compute-1"))
    assert nova_api.services()["compute-1"] == ("enabled", None)


def test_what_an_operator_disabled_is_neither_taken_over_nor_enabled(nova, nova_api):
    _, found = nova_api.request("GET", "/v2.1/os-services?host=compute-3&binary=nova-compute")
    path = f"/v2.1/os-services/{found['services'][0]['id']}"
    nova_api.request("PUT", path, {"status": "disabled", "disabled_reason": "maintenance"})
    for verb in (HOLD, RELEASE):
        with pytest.raises(NotOurs, match="maintenance"):
            nova.execute(an_action(verb, "compute-3"))
    assert nova_api.services()["compute-3"] == ("disabled", "maintenance")
    nova_api.request("PUT", path, {"status": "enabled"})


def test_a_release_leaves_alone_what_an_operator_has_enabled_meanwhile(nova, nova_api):
    with pytest.raises(NotOurs, match="enabled"):
        nova.execute(an_action(RELEASE, "compute-1"))


def test_a_host_is_found_by_its_short_name(nova, nova_api):
    nova.execute(an_action(HOLD, "compute-2"))
    assert nova_api.services()["compute-2.example.org"][0] == "disabled"
    nova.execute(an_action(RELEASE, "compute-2"))
    assert nova_api.services()["compute-2.example.org"][0] == "enabled"
    with pytest.raises(TargetMissing, match=r"compute-2\.other\.domain"):  # another domain's host
        nova.execute(an_action(HOLD, "compute-2.other.domain"))
    with pytest.raises(NotOurs, match=r"react\.hosts"):
        nova.execute(an_action(HOLD, "compute-9"))


def test_a_service_that_was_deleted_and_registers_anew_is_disabled_again(nova, nova_api, tmp_path):
    hosts = ("compute-1", "compute-2.example.org", "compute-3")
    world = World(tmp_path, hosts, plane=nova)
    world.bad = {"compute-1"}
    world.run(60)
    assert nova_api.services()["compute-1"][0] == "disabled"
    nova_api.register_anew("compute-1")
    assert nova_api.services()["compute-1"] == ("enabled", None)
    world.run(30)
    status, reason = nova_api.services()["compute-1"]
    assert status == "disabled"
    assert reason.startswith("virtbus: ")
    assert Finding.REGISTERED_ANEW in world.findings
    world.bad = set()
    world.run(90)
    assert nova_api.services()["compute-1"] == ("enabled", None)
    world.kill()


def test_a_service_that_was_deleted_for_good_is_forgotten(nova, nova_api, tmp_path):
    hosts = ("compute-1", "compute-2.example.org", "compute-3")
    world = World(tmp_path, hosts, plane=nova)
    world.bad = {"compute-3"}
    world.run(60)
    nova_api.delete("compute-3")
    world.run(30)
    assert not any(row.ours for row in world.store.rows().values())
    nova_api.register("compute-3")
    world.run(90)
    assert nova_api.services()["compute-3"][0] == "disabled", "it is there again, and still bad"
    world.bad = set()
    world.run(90)
    assert nova_api.services()["compute-3"] == ("enabled", None)
    world.kill()


def test_a_long_reason_is_cut_to_what_nova_takes(nova, nova_api):
    nova.execute(an_action(HOLD, "compute-1", "x" * 1000))
    assert len(nova_api.services()["compute-1"][1]) == 255
    nova.execute(an_action(RELEASE, "compute-1"))


def test_this_nova_refuses_a_wrong_body_and_a_wrong_token(nova_api):
    """The server of these tests is no yes-man."""
    _, found = nova_api.request("GET", "/v2.1/os-services?host=compute-1")
    path = f"/v2.1/os-services/{found['services'][0]['id']}"
    assert nova_api.request("PUT", path, {"status": "tired"})[0] == 400
    assert nova_api.request("GET", "/v2.1/os-services", token="nobody")[0] == 401


def test_a_body_that_nova_refuses_is_given_up_and_a_nova_that_is_away_is_tried_again(
    nova, nova_api, tmp_path, monkeypatch
):
    from virtbus.integrations.openstack import call

    with pytest.raises(ActionRefused, match="400"):
        call("x", lambda: nova._cloud.compute.update_service(nova._service("compute-1"), status="tired"))
    file = tmp_path / "away.yaml"
    file.write_text(nova_api.clouds(tmp_path / "c").read_text().replace(str(nova_api.port), "1"))
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(file))
    away = open_integration("nova", React(nova=ReactNova(cloud="test")))
    with pytest.raises(TargetUnavailable):
        away.execute(an_action(HOLD, "compute-1"))
    assert away.probe()[0].status == "failed"
    away.close()


@pytest.mark.parametrize("status", [401, 403, 404, 406, 409, 411, 412, 425, 429, 499, 500, 503])
def test_an_answer_that_may_change_gives_nothing_up(status):
    """A hold that is given up leaves a host at fault open until it was well once."""
    from virtbus.integrations.openstack import call

    def answers():
        raise openstack_exceptions.HttpException("no", http_status=status)

    with pytest.raises(TargetUnavailable):
        call("x", answers)


def test_events_on_rabbitmq_disable_the_service_and_a_well_heartbeat_enables_it(
    nova, nova_api, amqp_url, tmp_path
):
    bound = Consumer(amqp_url, group="react-nova")
    bound.receive(1.0)  # the group's queue is there before the first event
    bound.close()
    publish(amqp_url, heartbeat("compute-1"), *errors(3))
    with running(nova, amqp_url, tmp_path):
        eventually(lambda: nova_api.services()["compute-1"][0] == "disabled", "disabled")
        publish(amqp_url, heartbeat("compute-1", sequence=200))
        eventually(lambda: nova_api.services()["compute-1"][0] == "enabled", "enabled")


# ---- holds live in Nova


def disabled(nova_api: NovaApi) -> set[str]:
    """Hosts whose service is disabled, and by us."""
    found = {host: reason for host, (status, reason) in nova_api.services().items() if status == "disabled"}
    assert all(reason.startswith("virtbus: ") for reason in found.values()), found
    return set(found)


@pytest.mark.parametrize(
    ("point", "ends", "losing_state"),
    [(point, *(("bad", False), ("well", True))[turn % 2]) for turn, point in enumerate(POINTS)],
)
def test_a_kill_at_any_point_leaves_in_nova_what_is_true(
    nova, nova_api, tmp_path, monkeypatch, point, ends, losing_state
):
    world = World(tmp_path, ["compute-1", "compute-2", "compute-3"], plane=nova)
    story_of_a_kill(
        world, point, monkeypatch, "compute-2", ends=ends, losing_state=losing_state,
        held=lambda: {host.partition(".")[0] for host in disabled(nova_api)},
    )  # fmt: skip
    world.bad = set()
    world.run(400)  # twice as long each time it came back
    assert disabled(nova_api) == set()
    world.kill()


def test_a_service_that_we_disabled_tells_why_since_when_and_by_whom(nova, nova_api, tmp_path):
    world = World(tmp_path, ["compute-1", "compute-2", "compute-3"], plane=nova)
    world.bad = {"compute-1"}
    world.run(60)
    (told,) = nova.look({}, everything=True).holds
    assert (told.host, told.since, told.by, told.times) == ("compute-1", 1_800_000_032.0, "test", 1)
    assert told.why.startswith("undetermined: ")
    _, found = nova_api.request("GET", "/v2.1/os-services?host=compute-1&binary=nova-compute")
    nova_api.request("PUT", f"/v2.1/os-services/{found['services'][0]['id']}", {"status": "enabled"})
    world.run(200)
    assert disabled(nova_api) == set(), "an operator enabled it: left alone until it was well once"
    world.kill()


# ---- the weigher

_WEIGH = """
import collections, json, os, sys
sys.path.insert(0, sys.argv[1])
from nova import conf
conf.CONF([], project="nova")
ours = ["virtbus.integrations.nova_weigher.HealthWeigher"]
conf.CONF.set_override("weight_classes", ours, "filter_scheduler")
from nova.scheduler import weights
handler = weights.HostWeightHandler()
classes = handler.get_matching_classes(conf.CONF.filter_scheduler.weight_classes)
Host = collections.namedtuple("Host", "host nodename")
hosts = [Host(name, name) for name in sys.argv[2].split(",")]
orders = []
for file in sys.argv[3:]:
    os.environ["VIRTBUS_FLEET_FILE"] = file
    found = handler.get_weighed_objects([one() for one in classes], hosts, {})
    orders.append([(one.obj.host, one.weight) for one in found])
loaded = [name for name in ("kombu", "msgspec", "virtbus.config") if name in sys.modules]
print(json.dumps({"orders": orders, "loaded": loaded}))
"""


def weigh(hosts: str, *files: Path) -> dict:
    """What Nova's own handler makes of each file: hosts in order, with their weights."""
    told = control_planes.python(_WEIGH, str(control_planes.ROOT), hosts, *map(str, files))
    return json.loads(told.splitlines()[-1])


def test_novas_own_handler_loads_the_weigher_and_prefers_well_hosts(planes, tmp_path):
    file = tmp_path / "fleet.json"
    blames = {"a": ("host", 4), "b": ("none", 0), "c": ("undetermined", 2), "d": ("backend", 9)}
    hosts = {name: {"blame": blame, "guests": guests} for name, (blame, guests) in blames.items()}
    file.write_text(json.dumps({"hosts": hosts}))
    found = weigh("a,b.example.org,c,d,unknown", file)
    (order,) = found["orders"]
    assert [host for host, _ in order[2:]] == ["d", "c", "a"]
    assert {host for host, _ in order[:2]} == {"b.example.org", "unknown"}
    assert found["loaded"] == [], "nova-scheduler must not load what it has no need of"


def test_a_host_of_the_same_short_name_in_another_domain_weighs_nothing(planes, tmp_path):
    file = tmp_path / "fleet.json"
    trouble = {"blame": "host", "guests": 4}
    file.write_text(json.dumps({"hosts": {"a.a.org": trouble, "b.a.org": trouble, "b.b.org": trouble}}))
    (order,) = weigh("a.b.org,b,c", file)["orders"]
    assert len({weight for _, weight in order}) == 1
    (order,) = weigh("a,c", file)["orders"]
    assert [host for host, _ in order] == ["c", "a"]


def test_a_missing_broken_or_old_file_weighs_nothing(planes, tmp_path):
    files = [tmp_path / "missing"]
    for content in ("{", "[]", '{"hosts": 3}', '{"hosts": {"a": 1}}'):
        files.append(tmp_path / f"{len(files)}.json")
        files[-1].write_text(content)
    old = tmp_path / "old"
    old.write_text(json.dumps({"hosts": {"a": {"blame": "host", "guests": 3}}}))
    os.utime(old, (time.time() - 1000, time.time() - 1000))
    for order in weigh("a,b", *files, old)["orders"]:
        assert len({weight for _, weight in order}) == 1


# ---- Masakari

_VALIDATE = """
import json, sys
from masakari import conf
from masakari.api.openstack.ha.schemas import notifications, payload
from masakari.api.validation import validators
body = json.loads(sys.argv[1])
validators._SchemaValidator(notifications.create).validate({"notification": body})
validators._SchemaValidator(payload.create_vm_payload).validate(body["payload"])
print("accepted")
"""


class Capturing(Recording):
    name = "capturing"
    holds = False


def masakari(tmp_path, monkeypatch, **settings):
    file = tmp_path / "clouds.yaml"
    file.write_text(
        "clouds: {test: {auth_type: admin_token, auth: {endpoint: 'http://127.0.0.1:1', token: t}}}"
    )
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(file))
    return open_integration("masakari", React(masakari=ReactMasakari(cloud="test", **settings)))


def actions_for(integration, url, event) -> list[Action]:
    publish(url, a_record(event))
    with Consumer(url, group=f"g{uuid.uuid4().hex}") as consumer:
        wanted = integration.wants(consumer.receive(5))
    return [] if wanted is None else [wanted]


def test_masakaris_own_schema_accepts_our_notification_and_refuses_more(planes, tmp_path, monkeypatch):
    made = masakari(tmp_path, monkeypatch)
    owner = Owner(Platform.OPENSTACK, id="1b2c3d4e-0000-4000-8000-000000000001")
    (action,) = actions_for(made, f"embedded://{tmp_path}/bus.db", an_io_error(domain=a_domain(owner=owner)))
    assert action.body["payload"]["instance_uuid"] == owner.id
    assert action.body["payload"]["vir_domain_event"] == "IO_ERROR_PAUSE"
    assert control_planes.python(_VALIDATE, json.dumps(dict(action.body))).strip() == "accepted"
    more = {**action.body, "payload": {**action.body["payload"], "device": "vda"}}
    with pytest.raises(AssertionError, match="device"):
        control_planes.python(_VALIDATE, json.dumps(more))
    made.close()


def test_an_error_that_masakari_would_restart_a_guest_for_is_not_sent_unless_asked_for(tmp_path, monkeypatch):
    error = an_io_error()
    reported = an_io_error(
        error=type(error.error)(Kind.REPORT, 2, "", "", None, None, error.error.occurred_at)
    )
    replayed = an_io_error(origin=Origin.REPLAY)
    foreign = an_io_error(domain=a_domain(owner=Owner("ovirt", id="x")))
    for settings, event, expected in (
        ({}, reported, 0),
        ({"send_report": True}, reported, 1),
        ({}, replayed, 0),
        ({}, foreign, 0),
    ):
        made = masakari(tmp_path, monkeypatch, **settings)
        url = f"embedded://{tmp_path}/{uuid.uuid4().hex}.db"
        assert len(actions_for(made, url, event)) == expected
        made.close()


def test_a_pause_is_told_once_also_when_a_reported_error_opened_its_incident(tmp_path, monkeypatch):
    ids = (f"019a05f9-4236-7000-8000-{number:012d}" for number in range(9))
    incidents = Incidents(IncidentLimits(), new_id=lambda: next(ids), host=a_host())
    events = []
    for second, code in ((0, ACTION_REPORT), (30, ACTION_PAUSE), (61, ACTION_PAUSE)):
        raw = a_raw_io_error(action_code=code, observed_at=(1_800_000_000 + second) * 10**9)
        events += incidents.apply(raw, Now(raw.observed_at, float(second)), lambda uuid: None)
    assert events[0].incident.phase is Phase.OPENED
    assert events[0].error.action is Kind.REPORT
    for settings, kinds in (
        ({}, {"IO_ERROR_PAUSE"}),
        ({"send_report": True}, {"IO_ERROR_REPORT", "IO_ERROR_PAUSE"}),
    ):
        made = masakari(tmp_path, monkeypatch, **settings)
        wanted = []
        for event in events:
            wanted += actions_for(made, f"embedded://{tmp_path}/{uuid.uuid4().hex}.db", event)
        told = {action.key: action.body["payload"]["vir_domain_event"] for action in wanted}
        assert sorted(told.values()) == sorted(kinds), "a key is stored, and sent, once"
        made.close()


def test_a_nova_guest_that_really_pauses_is_told_as_masakari_takes_it(lab, planes, tmp_path, monkeypatch):
    """QEMU → libvirt → the agent → the bus → our notification → Masakari's own validation."""
    url = f"embedded://{tmp_path}/bus.db"
    guest = lab.guest("instance-0000002a", error="EIO", metadata=NOVA).start()
    made = masakari(tmp_path, monkeypatch)
    with AgentProcess(tmp_path, libvirt=lab.uri_ro, bus=url).ready() as agent:
        guest.fail()
        guest.wait_state(PAUSED_IOERROR)
        with Consumer(url, group="masakari") as consumer:
            wanted = []
            deadline = time.monotonic() + 60
            while not wanted and time.monotonic() < deadline:
                delivery = consumer.receive(1.0)
                if delivery is not None:
                    wanted += [one for one in [made.wants(delivery)] if one is not None]
                    delivery.ack()
        agent.stop()
    (action,) = wanted
    assert action.body["payload"]["instance_uuid"] == guest.uuid
    assert action.body["payload"]["vir_domain_event"] == "IO_ERROR_PAUSE"
    assert control_planes.python(_VALIDATE, json.dumps(dict(action.body))).strip() == "accepted"
    made.close()
