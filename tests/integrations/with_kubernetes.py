"""Against a real kube-apiserver with its etcd: condition, taint, Event, and a guest's disk behind it all."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import yaml

from tests.agent.process import AgentProcess
from tests.chart.apiserver import ApiServer
from tests.integrations.parts import eventually
from tests.integrations.plane import POINTS, World, story_of_a_kill
from tests.lab.lab import PAUSED_IOERROR, RUNNING, Lab
from tests.sim import scripts
from tests.sim.plane import Node, Plane, PlaneIntegration
from virtbus.config import React, ReactKubernetes
from virtbus.errors import ConfigError
from virtbus.fleet import Blame, HostHealth
from virtbus.integrations.base import (
    HOLD,
    RELEASE,
    REPORT,
    Action,
    NotOurs,
    TargetUnavailable,
    open_integration,
)

TAINT = "virtbus.io/storage-unhealthy"


def a_health(**overrides) -> HostHealth:
    plain: dict = dict(  # noqa: C408
        name="compute-1",
        agent_id="a",
        state="observing",
        heard_seconds=1.0,
        blame=Blame.NONE,
        why="",
        full=False,
        since=None,
        incidents=0,
        guests=0,
        paused=0,
        flapping=0,
        errors_per_minute=0.0,
        backends=(),
        fresh=True,
    )
    return HostHealth(**{**plain, **overrides})


def an_action(verb: str, node: str, why: str = "undetermined: two guests", **body: str) -> Action:
    return Action(f"{verb}/{node}/{uuid.uuid4()}", node, verb, why, body)


@pytest.fixture
def node(kube_apiserver: ApiServer) -> str:
    """A node of this test's own, with a taint and a condition of somebody else."""
    name = f"compute-{uuid.uuid4().hex[:8]}"
    add_node(kube_apiserver, name)
    yield name
    kube_apiserver.kubectl("delete", "node", name)


def add_node(server: ApiServer, name: str) -> None:
    spec = {"taints": [{"key": "example.org/mine", "effect": "NoSchedule"}]}
    server.kubectl(
        "create",
        "-f",
        "-",
        manifest={"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": spec},
    )
    status = {
        "status": {"conditions": [{"type": "Ready", "status": "True", "reason": "Kubelet", "message": "ok"}]}
    }
    server.kubectl("patch", "node", name, "--subresource=status", "-p", json.dumps(status))


@pytest.fixture
def kubernetes(kube_apiserver: ApiServer):
    settings = React(kubernetes=ReactKubernetes(kubeconfig=str(kube_apiserver.kubeconfig)))
    made = open_integration("kubernetes", settings)
    yield made
    made.close()


def taints(server: ApiServer, node: str) -> list[str]:
    return [one["key"] for one in server.get("node", node)["spec"].get("taints", [])]


def condition(server: ApiServer, node: str) -> dict[str, str]:
    found = server.get("node", node)["status"]["conditions"]
    return next((one for one in found if one["type"] == "VirtbusStorageHealthy"), {})


def events(server: ApiServer, node: str) -> list[str]:
    answer = server.kubectl(
        "get", "events", "--output=json", "--field-selector", f"involvedObject.name={node}"
    )
    return [one["reason"] for one in json.loads(answer.stdout)["items"]]


def test_a_held_node_gets_our_taint_beside_the_others_and_an_event(kube_apiserver, kubernetes, node):
    action = an_action(HOLD, node)
    assert kubernetes.execute(action).endswith("set")
    assert kubernetes.execute(action).endswith("was there")
    assert set(taints(kube_apiserver, node)) >= {"example.org/mine", TAINT}
    assert events(kube_apiserver, node) == ["VirtbusHeld"]


def test_a_released_node_keeps_the_others(kube_apiserver, kubernetes, node):
    kubernetes.execute(an_action(HOLD, node))
    kubernetes.execute(an_action(RELEASE, node))
    assert "example.org/mine" in taints(kube_apiserver, node)
    assert TAINT not in taints(kube_apiserver, node)
    with pytest.raises(NotOurs):
        kubernetes.execute(an_action(RELEASE, node))


def test_a_taint_that_an_operator_set_is_neither_taken_over_nor_removed(kube_apiserver, kubernetes, node):
    kube_apiserver.kubectl("taint", "node", node, f"{TAINT}=mine:NoSchedule")
    for verb in (HOLD, RELEASE):
        with pytest.raises(NotOurs):
            kubernetes.execute(an_action(verb, node))
    assert TAINT in taints(kube_apiserver, node)


def test_a_condition_stands_beside_the_others_and_keeps_its_transition_time(kube_apiserver, kubernetes, node):
    told = kubernetes.condition(a_health(blame=Blame.HOST, why="two systems lost", incidents=2))
    kubernetes.execute(an_action(REPORT, node, **told))
    first = condition(kube_apiserver, node)
    assert (first["status"], first["reason"]) == ("False", "HostAtFault")
    assert {one["type"] for one in kube_apiserver.get("node", node)["status"]["conditions"]} >= {"Ready"}
    kubernetes.execute(an_action(REPORT, node, **{**told, "message": "three systems lost"}))
    second = condition(kube_apiserver, node)
    assert second["message"] == "three systems lost"
    assert second["lastTransitionTime"] == first["lastTransitionTime"]
    kubernetes.execute(an_action(REPORT, node, **kubernetes.condition(a_health())))
    assert condition(kube_apiserver, node)["status"] == "True"
    assert sorted(events(kube_apiserver, node)) == ["VirtbusHostAtFault", "VirtbusNoTrouble"]


@pytest.mark.parametrize(("state", "reason"), [("silent", "AgentSilent"), ("blind", "AgentBlind")])
def test_what_is_not_known_is_unknown(kubernetes, state, reason):
    told = kubernetes.condition(a_health(state=state, blame=Blame.HOST))
    assert (told["status"], told["reason"]) == ("Unknown", reason)


def test_a_host_is_found_by_its_short_name_and_one_that_is_no_node_is_left_alone(kubernetes, node):
    assert kubernetes.execute(an_action(HOLD, f"{node}.example.org")).endswith("set")
    with pytest.raises(NotOurs, match=r"react.hosts"):
        kubernetes.execute(an_action(HOLD, "nobody"))


def test_an_api_server_that_is_away_is_tried_again(kube_apiserver, tmp_path):
    away = yaml.safe_load(Path(kube_apiserver.kubeconfig).read_text())
    away["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    file = tmp_path / "kubeconfig"
    file.write_text(yaml.safe_dump(away))
    made = open_integration("kubernetes", React(kubernetes=ReactKubernetes(kubeconfig=str(file))))
    with pytest.raises(TargetUnavailable):
        made.execute(an_action(HOLD, "anything"))
    made.close()


def test_a_missing_kubeconfig_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"react.kubernetes.kubeconfig"):
        open_integration("kubernetes", React(kubernetes=ReactKubernetes(kubeconfig=str(tmp_path / "no"))))


def test_the_documented_rights_suffice_and_less_is_named(kube_apiserver, node, tmp_path):
    documented = Path("docs/examples/kubernetes-rbac.yaml")
    for document in yaml.safe_load_all(documented.read_text()):
        kube_apiserver.kubectl("apply", "-f", "-", manifest=document)
    token = kube_apiserver.kubectl(
        "create", "token", "virtbus-react", "--namespace", "default"
    ).stdout.strip()
    limited = yaml.safe_load(Path(kube_apiserver.kubeconfig).read_text())
    limited["users"][0]["user"] = {"token": token}
    file = tmp_path / "kubeconfig"
    file.write_text(yaml.safe_dump(limited))
    made = open_integration("kubernetes", React(kubernetes=ReactKubernetes(kubeconfig=str(file))))
    assert [check.status for check in made.probe()] == ["ok"]
    made.execute(an_action(REPORT, node, status="False", reason="HostAtFault", message="x"))
    made.execute(an_action(HOLD, node))
    made.execute(an_action(RELEASE, node))
    kube_apiserver.kubectl("delete", "clusterrolebinding", "virtbus-react")
    eventually(lambda: [check.exit_code for check in made.probe()] == [77], "denied")
    with pytest.raises(TargetUnavailable, match=r"403"):
        made.execute(an_action(HOLD, node))
    made.close()


def test_an_account_that_may_write_no_events_holds_and_gives_back_all_the_same(
    kube_apiserver, node, tmp_path, caplog
):
    """An Event is a courtesy: a 403 there must not keep a hold that was done from being known as done."""
    account = f"quiet-{uuid.uuid4().hex[:6]}"
    rules = [{"apiGroups": [""], "resources": ["nodes", "nodes/status"], "verbs": ["get", "list", "patch"]}]
    subject = {"kind": "ServiceAccount", "name": account, "namespace": "default"}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": account}
    for manifest in (
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account, "namespace": "default"}},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
         "metadata": {"name": account}, "rules": rules},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
         "metadata": {"name": account}, "roleRef": role, "subjects": [subject]},
    ):  # fmt: skip
        kube_apiserver.kubectl("apply", "-f", "-", manifest=manifest)
    limited = yaml.safe_load(Path(kube_apiserver.kubeconfig).read_text())
    token = kube_apiserver.kubectl("create", "token", account, "--namespace", "default").stdout.strip()
    limited["users"][0]["user"] = {"token": token}
    file = tmp_path / "kubeconfig"
    file.write_text(yaml.safe_dump(limited))
    made = open_integration("kubernetes", React(kubernetes=ReactKubernetes(kubeconfig=str(file))))
    eventually(lambda: "create events" in made.probe()[0].summary, "the role is in force")
    assert made.execute(an_action(HOLD, node)).endswith("set")
    assert TAINT in taints(kube_apiserver, node)
    assert made.execute(an_action(RELEASE, node)).endswith("removed")
    assert TAINT not in taints(kube_apiserver, node)
    assert events(kube_apiserver, node) == []
    assert "403" in caplog.text
    made.close()


def test_a_node_that_bears_its_domain_is_found_by_the_short_name(kube_apiserver, kubernetes):
    short_name = f"fqdn-{uuid.uuid4().hex[:6]}"
    long = f"{short_name}.example.org"
    add_node(kube_apiserver, long)
    try:
        assert kubernetes.execute(an_action(HOLD, short_name)).endswith("set")
        assert TAINT in taints(kube_apiserver, long)
    finally:
        kube_apiserver.kubectl("delete", "node", long)


def test_a_short_name_that_two_nodes_bear_in_different_domains_is_neither_of_them(kube_apiserver, kubernetes):
    short_name = f"twice-{uuid.uuid4().hex[:6]}"
    both = [f"{short_name}.{domain}" for domain in ("a.org", "b.org")]
    for name in both:
        add_node(kube_apiserver, name)
    try:
        with pytest.raises(NotOurs, match=r"react.hosts"):
            kubernetes.execute(an_action(HOLD, short_name))
    finally:
        kube_apiserver.kubectl("delete", "node", *both)


# ---- holds live on the nodes


@pytest.fixture
def nodes(kube_apiserver: ApiServer):
    names = [f"held-{number}-{uuid.uuid4().hex[:6]}" for number in range(3)]
    for name in names:
        add_node(kube_apiserver, name)
    yield names
    for name in names:
        kube_apiserver.kubectl("delete", "node", name, "--ignore-not-found")


def held(server: ApiServer, names: list[str]) -> set[str]:
    """Nodes with our taint and our mark; one without the other is neither held nor given back."""
    found = {}
    for name in names:
        metadata = server.get("node", name)["metadata"]
        found[name] = (TAINT in taints(server, name), "virtbus.io/tainted" in metadata.get("annotations", {}))
    assert all(taint == mark for taint, mark in found.values()), found
    return {name for name, (taint, _) in found.items() if taint}


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_leaves_on_the_node_what_is_true(
    kube_apiserver, kubernetes, nodes, tmp_path, monkeypatch, point
):
    for ends, losing_state in (("bad", True), ("well", False)):
        folder = tmp_path / ends
        folder.mkdir()
        world = World(folder, nodes, plane=kubernetes)
        story_of_a_kill(
            world, point, monkeypatch, nodes[0], ends=ends, losing_state=losing_state,
            held=lambda: held(kube_apiserver, nodes),
        )  # fmt: skip
        world.bad = set()
        world.run(400)  # twice as long each time it came back
        assert held(kube_apiserver, nodes) == set()
        world.kill()


def test_what_is_wiped_taken_back_or_registered_anew_on_a_real_server(
    kube_apiserver, kubernetes, nodes, tmp_path
):
    first, server = nodes[0], kube_apiserver
    world = World(tmp_path, nodes, plane=kubernetes)
    world.bad = {first}
    world.run(60)
    assert held(server, nodes) == {first}
    # Another controller writes the taints from an older copy of the node.
    others = json.dumps(
        {"spec": {"taints": [{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}]}}
    )
    server.kubectl("patch", "node", first, "--type=merge", "-p", others)
    world.run(15)
    assert held(server, nodes) == {first}
    assert "node.kubernetes.io/not-ready" in taints(server, first)
    # The node is deleted and registers anew; we are killed in between and lose our state.
    server.kubectl("delete", "node", first)
    add_node(server, first)
    world.run(15)
    assert held(server, nodes) == {first}
    assert condition(server, first)["status"] == "False"
    world.kill(losing_state=True)
    # An operator takes both away.
    world.run(30)
    server.kubectl("taint", "node", first, f"{TAINT}-")
    server.kubectl("annotate", "node", first, "virtbus.io/tainted-", "virtbus.io/hold-")
    world.run(200)
    assert held(server, nodes) == set()
    world.bad = set()
    world.run(90)
    world.bad = {first}
    world.run(60)
    assert held(server, nodes) == {first}, "it was well once"
    world.kill()
    kubernetes.execute(an_action(RELEASE, first))


@pytest.mark.parametrize(
    "details",
    [
        '{"host": "OTHER", "why": "mine", "times": 1}',
        '{"times": ' + "9" * 400 + ', "since": "0001-01-01T00:00:00"}',
        '{"times": 1e999, "since": "9999-12-31T23:59:59-23:59"}',
        '{"why": "\\ud800", "by": "\\ud800"}',
        "[" * 100_000,
        "no JSON",
        "null",
    ],
    ids=["another host", "400 digits", "infinite", "no text", "deep", "no JSON", "null"],
)
def test_what_a_node_writes_into_its_own_mark_holds_no_other_host_and_ends_nothing(
    kube_apiserver, kubernetes, nodes, tmp_path, details
):
    """A compromised kubelet may annotate its own node."""
    server, (evil, other) = kube_apiserver, nodes[:2]
    mark = {"virtbus.io/tainted": TAINT, "virtbus.io/hold": details.replace("OTHER", other)}
    patch = tmp_path / "patch"
    patch.write_text(json.dumps({"metadata": {"annotations": mark}}))
    server.kubectl("patch", "node", evil, "--type=merge", f"--patch-file={patch}")
    world = World(tmp_path, nodes, plane=kubernetes)
    world.bad = {other}
    world.run(30)
    assert {host for host, row in world.store.rows().items() if row.ours and row.target == evil} == {evil}
    world.bad = set()
    world.run(400)
    assert held(server, nodes) == set()
    world.kill()


def test_a_node_can_not_rid_itself_of_an_operators_taint_by_our_mark(
    kube_apiserver, kubernetes, nodes, tmp_path
):
    """It may write its own annotations, and not its taints."""
    server, evil = kube_apiserver, nodes[0]
    server.kubectl("taint", "node", evil, "example.org/quarantine=compromised:NoSchedule")
    server.kubectl("annotate", "node", evil, "virtbus.io/tainted=example.org/quarantine")
    world = World(tmp_path, nodes, plane=kubernetes)
    world.run(400)
    assert "example.org/quarantine" in taints(server, evil)
    assert "virtbus.io/tainted" not in server.get("node", evil)["metadata"].get("annotations", {})
    world.kill()


def test_a_taint_whose_key_was_renamed_in_the_settings_is_undone_by_the_key_it_was_made_with(
    kube_apiserver, kubernetes, nodes, tmp_path
):
    world = World(tmp_path, nodes, plane=kubernetes)
    world.bad = {nodes[0]}
    world.run(60)
    world.kill(losing_state=True)
    other = ReactKubernetes(kubeconfig=str(kube_apiserver.kubeconfig), taint="example.org/broken-storage")
    renamed = open_integration("kubernetes", React(kubernetes=other))
    world = World(tmp_path, nodes, plane=renamed)
    world.agents = dict(zip(nodes, world.agents.values(), strict=True))
    world.run(200)
    assert TAINT not in taints(kube_apiserver, nodes[0])
    assert held(kube_apiserver, nodes) == set()
    world.kill()
    renamed.close()


def test_holds_are_listed_and_released_by_hand(kube_apiserver, kubernetes, nodes, tmp_path):
    world = World(tmp_path, nodes, plane=kubernetes)
    world.bad = {nodes[0]}
    world.run(60)
    config = tmp_path / "react.toml"
    config.write_text(f'[react.kubernetes]\nkubeconfig = "{kube_apiserver.kubeconfig}"\n')

    def virtbus(*words: str) -> str:
        command = [sys.executable, "-m", "virtbus", "react", *words, "--with", "kubernetes"]
        done = subprocess.run(
            [*command, "--config", str(config)], capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout

    (told,) = [one for one in json.loads(virtbus("holds", "--json")) if one["host"] in nodes]
    assert (told["host"], told["times"], told["by"], told["intact"]) == (nodes[0], 1, "test", True)
    assert told["why"].startswith("undetermined: ")
    assert told["since"].startswith("2027-01-15T")
    assert nodes[0] in virtbus("holds")
    assert "removed" in virtbus("release", nodes[0])
    assert "not held" in virtbus("release", nodes[0])
    assert held(kube_apiserver, nodes) == set()
    world.run(100)
    assert held(kube_apiserver, nodes) == set(), "it is left alone until it was well once"
    world.kill()


def test_a_real_guests_disk_fails_and_its_node_is_tainted_until_it_is_resumed(
    lab: Lab, amqp_url: str, kube_apiserver: ApiServer, tmp_path: Path
):
    """Guest → libvirt → agent → RabbitMQ → `virtbus react` → a real API server, and back."""
    import socket

    name = socket.gethostname().lower()
    add_node(kube_apiserver, name)
    config = tmp_path / "react.toml"
    config.write_text(
        f'state_dir = "{tmp_path}/react"\n[react]\nwhen = "any"\nmin_guests = 1\n'
        f'raise_seconds = 0.5\nclear_seconds = 0.5\npublishers = ["*"]\n'
        f'[react.kubernetes]\nkubeconfig = "{kube_apiserver.kubeconfig}"\n'
    )
    guest = lab.guest("victim", error="EIO").start()
    settings = "[incidents]\nquiet_seconds = 1.0\n[heartbeat]\ninterval_seconds = 1.0\n"
    with (tmp_path / "react.log").open("wb") as log:
        words = ["react", "--with", "kubernetes", "--bus", amqp_url, "--config", str(config)]
        reacting = subprocess.Popen([sys.executable, "-m", "virtbus", *words], stderr=log)
    try:
        with AgentProcess(tmp_path, libvirt=lab.uri_ro, bus=amqp_url, settings=settings).ready() as agent:
            eventually(lambda: condition(kube_apiserver, name).get("status") == "True", "a healthy condition")
            guest.fail()
            guest.wait_state(PAUSED_IOERROR)
            eventually(lambda: TAINT in taints(kube_apiserver, name), "tainted")
            eventually(lambda: condition(kube_apiserver, name)["status"] == "False", "unhealthy")
            guest.heal()
            guest.resume()
            guest.wait_state(RUNNING)
            eventually(lambda: TAINT not in taints(kube_apiserver, name), "untainted", 30)
            eventually(lambda: condition(kube_apiserver, name)["status"] == "True", "healthy")
            agent.stop()
        reacting.terminate()
        assert reacting.wait(20) == 0, (tmp_path / "react.log").read_text()
    finally:
        reacting.kill()
        reacting.wait()
        kube_apiserver.kubectl("delete", "node", name)
    assert "VirtbusHeld" in events(kube_apiserver, name)
    lines = (tmp_path / "react.log").read_text().splitlines()
    verbs = [line["verb"] for line in map(json.loads, lines) if line["event"] == "action"]
    assert [verb for verb in verbs if verb != "report"] == ["hold", "release"]


def test_the_simulations_control_plane_is_like_a_real_server(kube_apiserver, kubernetes, node):
    report = kubernetes.condition(a_health())
    nothing = json.dumps({"metadata": {"annotations": {"virtbus.io/tainted": None}}, "spec": {"taints": []}})
    said = scripts.control_plane(
        kubernetes,
        node,
        wipe=lambda: kube_apiserver.kubectl("taint", "node", node, f"{TAINT}-"),
        take_back=lambda: kube_apiserver.kubectl("patch", "node", node, "--type=merge", "-p", nothing),
        condition=dict(report),
    )

    def to_the_model(virtual, process) -> list[str]:
        plane = Plane(virtual.scheduler, {node: Node("a-uid")})
        return scripts.control_plane(
            PlaneIntegration(plane, lambda step: None, lambda key: None),
            node,
            wipe=lambda: plane.wipe(node),
            take_back=lambda: plane.take_back(node),
            condition={"status": "True", "message": ""},
        )

    with scripts.simulated(to_the_model) as model_said:
        assert said == model_said
