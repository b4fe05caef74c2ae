"""The dashboard on the data of twenty real agents, scraped by a real Prometheus. `make chart` runs this."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.agent.process import AgentProcess, virtbus
from tests.chart import tools
from tests.chart.prometheus import DASHBOARD, Prometheus, fill, panels
from tests.conftest import need

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

AGENTS = 20


def test_every_panel_shows_twenty_agents_and_those_that_were_chosen(tmp_path: Path) -> None:
    need(tools.missing())
    with ExitStack() as stack:
        agents = {}
        for number in range(AGENTS):
            name = f"host-{number:02}"
            folder = tmp_path / name
            folder.mkdir()
            bus = f"embedded://{folder}/bus.db"
            agents[name] = stack.enter_context(AgentProcess(folder, libvirt="replay:/dev/null", bus=bus))
        for agent in agents.values():
            agent.ready(seconds=300)
        prometheus = stack.enter_context(Prometheus(tmp_path, seconds=2))
        prometheus.targets({name: agent.http for name, agent in agents.items()})
        for agent in (agents["host-03"], agents["host-07"]):
            drill = ("emit", "--action", "pause", "--reason", "enospc")
            done = virtbus(*drill, "--control-socket", str(agent.socket), timeout=300)
            assert done.returncode == 0, done.stderr

        def wait(query: str) -> None:
            deadline = time.monotonic() + 180
            while not prometheus.ask(query):
                assert time.monotonic() < deadline, query
                time.sleep(0.5)

        wait(f"count(count_over_time(virtbus_build_info[1m]) >= 3) == {AGENTS}")
        wait('count(virtbus_incidents_open{origin="replay"} == 1) == 2')

        shown: dict[str, set[str]] = {}
        for panel in panels():
            for target in panel["targets"]:
                query = target["expr"]
                everything = prometheus.ask(fill(query))
                if panel["title"] == "Agents":
                    assert everything[0]["value"][1] == str(AGENTS)
                if target.get("legendFormat") == "{{instance}}":
                    shown[panel["title"]] = {one["metric"]["instance"] for one in everything}
                    assert len(everything) <= AGENTS  # topk
                    two = prometheus.ask(fill(query.replace("$instance", "host-03|host-07")))
                    assert {one["metric"]["instance"] for one in two} <= {"host-03", "host-07"}, panel[
                        "title"
                    ]
        assert shown["Oldest unpublished event, by host"] == set(agents)
        assert shown["Spool fill, by host"] == set(agents)

        # What the variables offer: the agents', and nothing of what else is scraped.
        variables = json.loads(DASHBOARD.read_text(encoding="utf-8"))["templating"]["list"]
        offered = {}
        for one in variables[1:]:
            series, _, label = one["query"]["query"].removeprefix("label_values(").rpartition(", ")
            found = prometheus.ask(fill(series))
            offered[one["name"]] = {each["metric"].get(label.removesuffix(")")) for each in found}
        assert offered["instance"] == set(agents)
        assert offered["job"] == {"virtbus"}
        # The annotations' queries are taken, and nothing is wrong here.
        for one in json.loads(DASHBOARD.read_text(encoding="utf-8"))["annotations"]["list"]:
            assert prometheus.ask(fill(one["expr"])) == []
