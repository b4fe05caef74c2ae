"""Alerts and dashboard: checked by promtool, and asked of a real Prometheus that scrapes a real agent."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from tests.chart import helm, tools
from tests.chart.helm import CHART
from tests.chart.prometheus import DASHBOARD, Prometheus, fill, panels
from tests.conftest import need
from tests.lab.lab import Guest, Lab
from tests.ports import free_ports
from virtbus.fleet import FleetView
from virtbus.integrations.telemetry import REACT, ReactMetrics

ALERTS = CHART / "files" / "alerts.yaml"
UNIT_TESTS = Path(__file__).parent / "alerts.test.yaml"
ADDED = ("job", "instance", "namespace")


@pytest.fixture(scope="session")
def promtool() -> Path:
    try:
        return tools.debian("promtool")
    except tools.ToolMissing as error:
        need([str(error)])
        raise


def _rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)


def test_promtool_takes_the_alerts(promtool: Path) -> None:
    done = _run(promtool, "check", "rules", ALERTS)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["agents", "virtbus", "virtbus-react"])
def test_promtool_takes_the_alerts_as_rendered(promtool: Path, tmp_path: Path, name: str) -> None:
    found = helm.render(helm.MINIMAL, sets=("prometheusRule.enabled=true", f"nameOverride={name}"))
    spec = helm.one(found, "PrometheusRule")["spec"]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(spec), encoding="utf-8")
    done = _run(promtool, "check", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr
    for group, job in zip(spec["groups"], (name, f"{name}-react"), strict=True):
        for rule in group["rules"]:
            asked = set(re.findall(r'(job=~?".*?")', rule["expr"]))
            assert asked in ({f'job="{job}"'}, {f'job=~"{name}(-react)?"'}), rule["alert"]
            assert len(re.findall("job=", rule["expr"])) <= rule["expr"].count('namespace="virtbus"')
            assert rule["annotations"]["runbook_url"].startswith("https://")


def test_each_alert_fires_when_it_should_and_is_silent_when_not(promtool: Path, tmp_path: Path) -> None:
    shutil.copy(ALERTS, tmp_path)
    shutil.copy(UNIT_TESTS, tmp_path)
    done = _run(promtool, "test", "rules", tmp_path / UNIT_TESTS.name)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_unit_test_of_both_kinds() -> None:
    cases = [
        case for one in yaml.safe_load(UNIT_TESTS.read_text())["tests"] for case in one["alert_rule_test"]
    ]
    fires = {case["alertname"] for case in cases if case.get("exp_alerts")}
    silent = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    names = {rule["alert"] for rule in _rules()}
    assert fires == names
    assert silent == names


def test_each_alert_links_to_its_own_runbook_entry() -> None:
    for rule in _rules():
        anchor = rule["alert"].lower()
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{anchor}"
        assert rule["labels"]["severity"] in ("warning", "critical")
        headings = (CHART.parents[1] / "docs" / "operations.md").read_text(encoding="utf-8").splitlines()
        assert f"### {rule['alert']}" in headings


def test_the_dashboard_config_map_is_the_dashboard() -> None:
    found = helm.render(helm.MINIMAL, sets=("dashboard.enabled=true",))
    data = helm.one(found, "ConfigMap", "vb-virtbus-dashboard")["data"]
    rendered, source = json.loads(data["vb-virtbus.json"]), json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert rendered["uid"].startswith("virtbus-")
    assert rendered["uid"] != source["uid"]  # two releases have two dashboards
    assert rendered["links"][0]["url"].startswith("https://")
    for one in (rendered, source):
        del one["uid"], one["links"]
        for panel in one["panels"]:
            del panel["links"]
    assert rendered == source


def test_every_panel_says_what_it_shows_and_lists_by_host_are_short() -> None:
    for panel in panels():
        assert panel["description"], panel["title"]
        for target in panel["targets"]:
            assert target.get("legendFormat") != "{{instance}}" or target["expr"].startswith("topk(20, ")
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    variables = dashboard["templating"]["list"][1:]
    assert [one["name"] for one in variables] == ["cluster", "namespace", "job", "instance"]
    assert {one["allValue"] for one in variables} == {".*"}
    assert [one["name"] for one in dashboard["annotations"]["list"]] == ["Alerts", "Restarts"]


def test_the_dashboards_numbers_are_there_when_all_agents_are_down(promtool: Path, tmp_path: Path) -> None:
    with Prometheus(tmp_path) as prometheus:
        for panel in panels():
            if panel["type"] == "stat":
                (sample,) = prometheus.ask(fill(panel["targets"][0]["expr"]))
                assert sample["value"][1] == "0", panel["title"]


def test_rules_are_left_out_and_added_by_name() -> None:
    sets = ("prometheusRule.enabled=true", "prometheusRule.disabled={VirtbusUnroutable}")
    extra = ("prometheusRule.extraRules[0].alert=Mine", "prometheusRule.extraRules[0].expr=vector(1)")
    groups = helm.one(helm.render(helm.MINIMAL, sets=(*sets, *extra)), "PrometheusRule")["spec"]["groups"]
    names = [rule["alert"] for group in groups for rule in group["rules"]]
    assert set(names) == {rule["alert"] for rule in _rules()} - {"VirtbusUnroutable"} | {"Mine"}


def test_a_group_of_which_no_rule_is_left_is_left_out() -> None:
    """Rules of null are refused by the operator's definition, and with them the release."""
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    unwanted = ",".join(rule["alert"] for rule in groups[1]["rules"])
    sets = ("prometheusRule.enabled=true", f"prometheusRule.disabled={{{unwanted}}}")
    found = helm.one(helm.render(helm.MINIMAL, sets=sets), "PrometheusRule")["spec"]["groups"]
    assert [group["name"] for group in found] == ["virtbus"]


# ----------------------------------------------------------------------- a real agent, a real Prometheus


@dataclass(frozen=True)
class Watched:
    """An agent that has delivered a guest's error, and the Prometheus that scrapes it every second."""

    prometheus: Prometheus
    metrics: str
    guest: Guest
    control: Path


@contextmanager
def _process(*command: object, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        return str(answer.read().decode())


def _until(what: str, seconds: float, check: Any) -> Any:
    deadline = time.monotonic() + seconds
    last: object = None
    while time.monotonic() < deadline:
        try:
            if found := check():
                return found
        except urllib.error.HTTPError as error:
            last = f"{error.code} {error.read().decode()}"
            error.close()
        except OSError as error:
            last = error
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds} s ({last})")


def _authority(folder: Path) -> Path:
    """A certificate, so that the agent has one to show the end of."""
    file = folder / "ca.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=ca",
         "-days", "30", "-keyout", "/dev/null", "-out", str(file)],
        check=True, capture_output=True,
    )  # fmt: skip
    return file


@pytest.fixture
def watched(lab: Lab, amqp_url: str, promtool: Path, tmp_path: Path) -> Iterator[Watched]:
    (agent_port,) = free_ports(1)
    virtbus = (sys.executable, "-m", "virtbus")
    with ExitStack() as stack:
        guest = lab.guest("db1", error="EIO", policy="stop")
        guest.start()
        stack.enter_context(
            _process(*virtbus, "consume", "--bus", amqp_url, "--group", "watch", log=tmp_path / "consume.log")
        )
        stack.enter_context(
            _process(
                "env", f"VIRTBUS_BUS__TLS__CA_FILE={_authority(tmp_path)}",
                *virtbus, "run", "--bus", amqp_url, "--libvirt", lab.uri_ro,
                "--state-dir", tmp_path / "state", "--control-socket", tmp_path / "control",
                "--http-listen", f"127.0.0.1:{agent_port}", log=tmp_path / "agent.log",
            )
        )  # fmt: skip
        prometheus = stack.enter_context(Prometheus(tmp_path))
        prometheus.targets({"host": f"127.0.0.1:{agent_port}"})
        _until("the agent is ready", 30, lambda: "true" in _get(agent_port, "/readyz"))
        _until("Prometheus scrapes", 60, lambda: prometheus.ask("virtbus_build_info"))
        guest.fail()
        delivered = 'virtbus_publish_outcomes_total{outcome="confirmed"} >= 2'
        _until("the error is delivered and scraped", 60, lambda: prometheus.ask(delivered))
        time.sleep(2)  # a rate needs two samples of the newest series
        yield Watched(prometheus, _get(agent_port, "/metrics"), guest, tmp_path / "control")


def test_every_metric_of_alerts_and_dashboard_is_the_agents_and_every_query_finds_data(
    watched: Watched,
) -> None:
    known = set(re.findall(r"^(virtbus_\w+)(?:\{| )", watched.metrics, re.MULTILINE))
    reacting = generate_latest(REACT.registry).decode()
    known |= set(re.findall(r"^# TYPE (virtbus_(?:react|fleet)_\w+)", reacting, re.MULTILINE))
    queries = [target["expr"] for panel in panels() for target in panel["targets"]]
    rules = [rule["expr"] for rule in _rules()]
    for expression in [*queries, *rules]:
        named = set(re.findall(r"virtbus_\w+", expression))
        assert named <= known, expression
    assert len(queries) >= 25
    empty = [query for query in queries if not watched.prometheus.ask(fill(query))]
    assert empty == []


def _series(lines: str) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    """Of a text as Prometheus reads it: names, and labels without those that a scrape adds."""
    found = re.findall(r"^(virtbus_\w+)(?:\{(.*?)\})? ", lines, re.MULTILINE)
    return {
        (name, frozenset(pair for pair in re.findall(r'(\w+)="(.*?)"', labels) if pair[0] not in ADDED))
        for name, labels in found
    }


def test_the_series_of_the_alerts_unit_tests_are_those_of_a_real_agent_and_of_react(watched: Watched) -> None:
    """By name and labels; the client certificate's series is the authority's with another value."""
    react = ReactMetrics()
    react.begin("nova", lambda: 0.0, lambda: 0.0)
    for integration in ("nova", "standby"):
        react.show_fleet(integration, FleetView((), (), 0, 0, 0.0, False))
    served = _series(watched.metrics.replace('certificate="ca"', 'certificate="client"'))
    served |= _series(generate_latest(react.registry).decode())
    cases = yaml.safe_load(UNIT_TESTS.read_text())["tests"]
    tested = _series("".join(f"{one['series']} 0\n" for case in cases for one in case["input_series"]))
    assert len(tested) > 25
    assert tested - served == set()


def test_a_guests_error_raises_its_alert_alone_and_a_drill_raises_none(watched: Watched) -> None:
    """The alerts' own expressions, asked of what a real agent serves."""

    def raised() -> set[str]:
        return {
            rule["alert"]
            for rule in _rules()
            for series in watched.prometheus.ask(rule["expr"]) if series["metric"].get("job") == "virtbus"
        }  # fmt: skip

    assert raised() == {"VirtbusGuestsInTrouble"}
    done = _run(sys.executable, "-m", "virtbus", "emit", "--control-socket", watched.control)
    assert done.returncode == 0, done.stdout + done.stderr
    watched.guest.destroy()
    _until("the guest's incident is over, the drill's is not", 240, lambda: (
        watched.prometheus.ask('virtbus_incidents_open{origin="live"} == 0')
        and watched.prometheus.ask('virtbus_incidents_open{origin="replay"} == 1')
    ))  # fmt: skip
    assert raised() == set()


def test_the_first_error_of_an_agents_life_moves_the_panels(watched: Watched) -> None:
    """A rate of a series that is not there before its first event would stay 0."""

    def moved(title: str) -> list[dict[str, str]]:
        return [
            series["metric"]
            for panel in panels() if panel["title"] == title
            for target in panel["targets"]
            for series in watched.prometheus.ask(fill(target["expr"])) if float(series["value"][1]) > 0
        ]  # fmt: skip

    assert {"origin": "event"} in moved("I/O errors")
    assert {"phase": "opened"} in moved("Events")
    assert moved("Gaps")  # its start
