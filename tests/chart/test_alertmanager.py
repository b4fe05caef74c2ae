"""The inhibition of docs/operations.md in a real Alertmanager, and a real Prometheus that scrapes by name."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.agent.process import AgentProcess
from tests.chart import tools
from tests.chart.prometheus import Prometheus
from tests.conftest import need
from tests.ports import free_ports

# Debian's package is unpacked, not installed, and asks for its templates where they would be.
INSIDE = """\
mount --bind "$1" /usr/share
shift
exec "$@"
"""
PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


def until(what: str, check: Callable[[], object]) -> None:
    deadline = time.monotonic() + 240
    last: OSError | None = None
    while True:
        try:
            if check():
                return
        except OSError as error:
            last = error
        assert time.monotonic() < deadline, f"{what} ({last})"
        time.sleep(0.2)


@pytest.fixture
def alertmanager(tmp_path: Path) -> Iterator[str]:
    """One with the rules of the page → its API's address."""
    need([] if os.geteuid() == 0 else ["root (a mount namespace)"])
    try:
        program = tools.debian("alertmanager")
    except tools.ToolMissing as error:
        need([str(error)])
        raise
    (text,) = re.findall(r"^```yaml\n(inhibit_rules:.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    config = tmp_path / "alertmanager.yml"
    config.write_text(f"route: {{receiver: nobody}}\nreceivers: [{{name: nobody}}]\n{text}")
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}/api/v2"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-euc", INSIDE, "inside", program.parents[1] / "share",
             program, f"--config.file={config}", f"--storage.path={tmp_path}", "--cluster.listen-address=",
             f"--web.listen-address=127.0.0.1:{port}"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:

        def answers() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text()
            return bool(asked(f"{url}/status"))

        until("Alertmanager answers", answers)
        yield url
    finally:
        process.kill()
        process.wait()


def asked(url: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read() or b"true")


def test_a_brokers_outage_is_one_alert_and_what_follows_from_it_is_silent(alertmanager: str) -> None:
    follows = ("VirtbusSpoolFillingUp", "VirtbusUnroutable", "VirtbusReactDeaf")
    own = ("VirtbusBrokerAway", "VirtbusGuestsInTrouble", "VirtbusSpoolUnwritable", "VirtbusEventsDropped")
    alerts = [
        {"labels": {"alertname": name, "namespace": space, "instance": "h1"}}
        for space, names in (("here", follows + own), ("elsewhere", follows))
        for name in names
    ]
    assert asked(f"{alertmanager}/alerts", alerts)

    def states() -> dict[tuple[str, str], str]:
        return {
            (one["labels"]["namespace"], one["labels"]["alertname"]): one["status"]["state"]
            for one in asked(f"{alertmanager}/alerts")
        }

    until("every alert is judged", lambda: set(states().values()) == {"active", "suppressed"})
    assert {key for key, state in states().items() if state == "suppressed"} == {
        ("here", name) for name in follows
    }
    assert len(states()) == len(alerts)


def test_a_prometheus_that_scrapes_by_host_name_finds_the_agent_up(tmp_path: Path) -> None:
    """What a listener on loopback refuses (a name of the web) is how Kubernetes and operators scrape."""
    need(tools.missing())
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        need([f"an address of its own host name ({name})"])
    (port,) = free_ports(1)
    (tmp_path / "agent").mkdir()
    bus = f"embedded://{tmp_path}/bus.db"
    with (
        AgentProcess(tmp_path / "agent", libvirt="replay:/dev/null", bus=bus, http=f"[::]:{port}") as agent,
        Prometheus(tmp_path) as prometheus,
    ):
        agent.ready(seconds=240)
        prometheus.targets({"by-name": f"{name}:{port}", "by-address": f"127.0.0.1:{port}"})
        until("both are up", lambda: len(prometheus.ask('up{job="virtbus"} == 1')) == 2)
        assert prometheus.ask('up{job="virtbus"} == 0') == []
