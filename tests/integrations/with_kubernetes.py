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
from tests.lab.lab import PAUSED_IOERROR, RUNNING, Lab
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
    assert events(kube_apiserver, node) == ["VirtbusHostAtFault", "VirtbusNoTrouble"]


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


def test_a_real_guests_disk_fails_and_its_node_is_tainted_until_it_is_resumed(
    lab: Lab, amqp_url: str, kube_apiserver: ApiServer, tmp_path: Path
):
    """Guest → libvirt → agent → RabbitMQ → `virtbus react` → a real API server, and back."""
    import socket

    name = socket.gethostname().lower()
    add_node(kube_apiserver, name)
    config = tmp_path / "react.toml"
    config.write_text(
        f'state_dir = "{tmp_path}/react"\n[react]\nwhen = "any"\nmin_guests = 1\nraise_seconds = 0.5\nclear_seconds = 0.5\n'
        f'publishers = ["*"]\n[react.kubernetes]\nkubeconfig = "{kube_apiserver.kubeconfig}"\n'
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
