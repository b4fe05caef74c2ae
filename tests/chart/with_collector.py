"""The OpenTelemetry recipe of docs/operations.md, byte for byte, in a real collector: what comes out is OTLP.

`make chart` runs this; the collector is built first, which takes minutes once.
"""

from __future__ import annotations

import ctypes
import gzip
import json
import os
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from tests.agent.process import AgentProcess
from tests.chart import collector
from tests.conftest import need

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
# What the recipe names.
AGENT = "127.0.0.1:9466"
BACKEND = ("otlp.example", 4318)
PODS = "/var/log/pods"
POD = "virtbus_virtbus-x7k2p_0b0c5ab4-3a34-4ac3-8f47-0a0c0e5d1f11"
# Beside the recipe: OTLP as it can be read here, and no minute between two scrapes.
BESIDE = {
    "exporters": {"otlp_http": {"encoding": "json"}},
    "receivers": {"prometheus": {"config": {"global": {"scrape_interval": "1s"}}}},
    "service": {"telemetry": {"metrics": {"level": "none"}}},
}
# With mounts of its own: the names of the recipe, and the folder of the pods' logs.
INSIDE = """\
mount --bind "$1" /etc/hosts
mkdir -p "$3" && mount --bind "$2" "$3"
shift 3
exec "$@"
"""
CLONE_NEWNET = 0x40000000  # linux/sched.h


class Backend(ThreadingHTTPServer):
    """Takes OTLP as JSON over HTTPS."""

    def __init__(self, authority: trustme.CA) -> None:
        self.metrics: dict[str, dict[str, str]] = {}  # name → its resource's attributes
        self.logs: list[dict[str, Any]] = []
        backend = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                backend.take(json.loads(body))
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: the test looks at what came."""

        name, port = BACKEND
        super().__init__(("127.0.0.1", port), Handler)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(name).configure_cert(context)
        self.socket = context.wrap_socket(self.socket, server_side=True)

    def take(self, body: dict[str, Any]) -> None:
        for group in body.get("resourceMetrics", []):
            for scope in group["scopeMetrics"]:
                for metric in scope["metrics"]:
                    self.metrics[metric["name"]] = _flat(group["resource"]["attributes"])
        for group in body.get("resourceLogs", []):
            for scope in group["scopeLogs"]:
                for record in scope["logRecords"]:
                    found = {**record, "attributes": _flat(record["attributes"])}
                    self.logs.append({**found, "resource": _flat(group["resource"].get("attributes", []))})

    def events(self) -> set[str]:
        """The agent's words for what its lines tell."""
        return {record["attributes"].get("event", "") for record in list(self.logs)}


def _flat(attributes: list[dict[str, Any]]) -> dict[str, str]:
    return {one["key"]: str(next(iter(one["value"].values()), "")) for one in attributes}


@dataclass(frozen=True)
class Room:
    """A network of its own, in which every address of the recipe is free, with a backend in it."""

    folder: Path
    backend: Backend
    ca_file: Path


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    """This thread, and what it starts, is in that network until the test's end."""
    need([*collector.missing(), *([] if os.geteuid() == 0 else ["root (a network namespace)"])])
    libc = ctypes.CDLL(None, use_errno=True)
    with ExitStack() as stack:
        before = stack.enter_context(Path("/proc/thread-self/ns/net").open("rb"))
        assert libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        stack.callback(libc.setns, before.fileno(), CLONE_NEWNET)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        authority = trustme.CA()
        ca_file = tmp_path / "ca.pem"
        authority.cert_pem.write_to_path(str(ca_file))
        backend = stack.enter_context(Backend(authority))
        threading.Thread(target=backend.serve_forever, daemon=True).start()
        stack.callback(backend.shutdown)
        yield Room(tmp_path, backend, ca_file)


def recipe() -> str:
    """The page's settings, as they stand there."""
    part = PAGE.read_text(encoding="utf-8").partition("\n## OpenTelemetry\n")[2].partition("\n## ")[0]
    (text,) = re.findall(r"^```yaml\n(.*?)^```", part, re.MULTILINE | re.DOTALL)
    assert f'"https://{BACKEND[0]}:{BACKEND[1]}"' in text
    assert f'"{AGENT}"' in text
    assert f"{PODS}/" in text
    return str(text)


def as_kubelet_writes(line: str) -> str:
    """A line of a container's log file (CRI)."""
    return f"{datetime.now(UTC).isoformat()} stderr F {line}\n"


def collected(room: Room, settings: str, log: Path, written_as: Any) -> None:
    """Run an agent and the collector until the backend has the agent's metrics and the line of its start."""
    recipes = room.folder / "recipe.yaml", room.folder / "beside.yaml"
    recipes[0].write_text(settings)
    recipes[1].write_text(yaml.safe_dump(BESIDE))
    hosts, said = room.folder / "hosts", room.folder / "collector.log"
    hosts.write_text(f"127.0.0.1 localhost {BACKEND[0]}\n")
    log.parent.mkdir(parents=True)
    agent = AgentProcess(
        room.folder, libvirt="replay:/dev/null", bus=f"embedded://{room.folder}/bus.db", http=AGENT
    )
    with agent.ready(seconds=300), ExitStack() as stack, said.open("wb") as out:
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-euc", INSIDE, "inside", hosts, room.folder / "pods", PODS,
             collector.BINARY, *(f"--config={file}" for file in recipes)],
            stdout=out, stderr=out, env={"PATH": os.environ["PATH"], "SSL_CERT_FILE": str(room.ca_file)},
        )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.kill)
        deadline = time.monotonic() + 600
        while not (
            "virtbus_spool_events" in room.backend.metrics and "agent started" in room.backend.events()
        ):
            assert process.poll() is None, said.read_text()[-3000:]
            assert time.monotonic() < deadline, said.read_text()[-3000:]
            # The collector begins at the end of a file that it finds at its own start.
            with log.open("a") as file:
                file.write("".join(written_as(line) for line in agent.log.splitlines()))
            time.sleep(1)


def test_an_agents_metrics_and_log_go_through_the_collector(room: Room) -> None:
    collected(room, recipe(), room.folder / "pods" / POD / "agent" / "0.log", as_kubelet_writes)
    resource = room.backend.metrics["virtbus_spool_events"]
    assert resource["service.name"] == "virtbus"
    assert resource["service.instance.id"] == "HOST"
    started = next(one for one in room.backend.logs if one["attributes"].get("event") == "agent started")
    assert started["severityText"] == "info"
    assert started["attributes"]["version"]
    assert int(started["timeUnixNano"]) > 0
    assert started["resource"]["k8s.namespace.name"] == "virtbus"
    assert started["resource"]["k8s.pod.name"] == "virtbus-x7k2p"


def test_outside_kubernetes_the_recipe_reads_a_plain_file_without_the_operator_container(room: Room) -> None:
    text = recipe()
    for named, ours in (
        (f"{PODS}/virtbus_*/agent/*.log", f"{PODS}/virtbus.log"),
        ("      - type: container\n", ""),
    ):
        assert text.count(named) == 1
        text = text.replace(named, ours)
    collected(room, text, room.folder / "pods" / "virtbus.log", "{}\n".format)
    started = next(one for one in room.backend.logs if one["attributes"].get("event") == "agent started")
    assert started["severityText"] == "info"
    assert int(started["timeUnixNano"]) > 0


@pytest.mark.parametrize("older", [False, True])
def test_the_collector_takes_the_recipe_and_the_older_names_that_the_page_tells(
    older: bool, tmp_path: Path
) -> None:
    need(collector.missing())
    text = recipe()
    if older:
        text = text.replace("file_log", "filelog").replace("otlp_http", "otlphttp")
    (tmp_path / "recipe.yaml").write_text(text)
    done = subprocess.run(
        [collector.BINARY, "validate", f"--config={tmp_path}/recipe.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
