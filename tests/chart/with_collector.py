"""The OpenTelemetry recipe of docs/operations.md in a real collector: metrics and log come out as OTLP.

`make chart` runs this; the collector is built first, which takes minutes once.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.agent.process import AgentProcess
from tests.chart import collector
from tests.conftest import need

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
POD = "virtbus_virtbus-x7k2p_0b0c5ab4-3a34-4ac3-8f47-0a0c0e5d1f11"


class Backend(ThreadingHTTPServer):
    """Takes OTLP as JSON over HTTP."""

    def __init__(self) -> None:
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

        super().__init__(("127.0.0.1", 0), Handler)

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


def _flat(attributes: list[dict[str, Any]]) -> dict[str, str]:
    return {one["key"]: str(next(iter(one["value"].values()), "")) for one in attributes}


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend() as made, ExitStack() as stack:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        stack.callback(made.shutdown)
        yield made


def recipe(agent: str, logs: Path, backend: Backend) -> dict[str, Any]:
    """The page's own settings with this test's addresses, and OTLP in a form that can be read here."""
    part = PAGE.read_text(encoding="utf-8").partition("\n## OpenTelemetry\n")[2].partition("\n## ")[0]
    (text,) = re.findall(r"^```yaml\n(.*?)^```", part, re.MULTILINE | re.DOTALL)
    for named, ours in (
        ("127.0.0.1:9466", agent),
        ("/var/log/pods", str(logs)),
        ("https://otlp.example:4318", f"http://127.0.0.1:{backend.server_port}"),
    ):
        assert named in text
        text = text.replace(named, ours)
    settings: dict[str, Any] = yaml.safe_load(text)
    settings["exporters"]["otlp_http"]["encoding"] = "json"
    settings["receivers"]["file_log"]["start_at"] = "beginning"
    settings["receivers"]["prometheus"]["config"]["global"] = {"scrape_interval": "1s"}
    settings["service"]["telemetry"] = {"metrics": {"level": "none"}}
    return settings


def as_kubelet_writes(line: str) -> str:
    """A line of a container's log file (CRI)."""
    return f"{datetime.now(UTC).isoformat()} stderr F {line}\n"


def test_an_agents_metrics_and_log_go_through_the_collector(tmp_path: Path, backend: Backend) -> None:
    need(collector.missing())
    agent = AgentProcess(tmp_path, libvirt="replay:/dev/null", bus=f"embedded://{tmp_path}/bus.db")
    folder = tmp_path / "pods" / POD / "agent"
    folder.mkdir(parents=True)
    config = tmp_path / "collector.yaml"
    config.write_text(yaml.safe_dump(recipe(agent.http, tmp_path / "pods", backend)))
    with agent.ready(), ExitStack() as stack:
        lines = [as_kubelet_writes(line) for line in agent.log.splitlines()]
        (folder / "0.log").write_text("".join(lines))
        said = (tmp_path / "collector.log").open("wb")
        stack.callback(said.close)
        process = subprocess.Popen([collector.BINARY, f"--config={config}"], stdout=said, stderr=said)
        stack.callback(process.wait)
        stack.callback(process.kill)
        deadline = time.monotonic() + 90
        while not ("virtbus_spool_events" in backend.metrics and len(backend.logs) >= len(lines)):
            text = (tmp_path / "collector.log").read_text()
            assert process.poll() is None, text[-3000:]
            assert time.monotonic() < deadline, text[-3000:]
            time.sleep(0.2)
    resource = backend.metrics["virtbus_spool_events"]
    assert resource["service.name"] == "virtbus"
    assert resource["service.instance.id"] == "HOST"
    (started,) = [one for one in backend.logs if one["attributes"].get("event") == "agent started"]
    assert started["severityText"] == "info"
    assert started["attributes"]["version"]
    assert int(started["timeUnixNano"]) > 0
    assert started["resource"]["k8s.namespace.name"] == "virtbus"
    assert started["resource"]["k8s.pod.name"] == "virtbus-x7k2p"
