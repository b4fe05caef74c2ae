"""A real Prometheus of the tests' own, and the queries of the dashboard."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.chart import tools
from tests.chart.helm import CHART
from tests.ports import free_ports

DASHBOARD = CHART / "files" / "dashboard.json"
READY_SECONDS = 60

CONFIG = """\
global: {{scrape_interval: {seconds}s, scrape_timeout: {seconds}s}}
scrape_configs:
  - job_name: virtbus
    file_sd_configs: [{{files: ["{folder}/targets.json"], refresh_interval: 1s}}]
  - job_name: prometheus
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


class Prometheus:
    """Scrapes what `targets` names every `seconds`, and itself, as a target of others; a context manager.

    Raises ToolMissing.
    """

    def __init__(self, folder: Path, *, seconds: int = 1) -> None:
        self.seconds = seconds
        self.port = free_ports(1)[0]
        self._folder = folder
        self._log = folder / "prometheus.log"
        (folder / "prometheus.yml").write_text(CONFIG.format(seconds=seconds, folder=folder, port=self.port))
        self.targets({})
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [tools.debian("prometheus"), f"--config.file={folder}/prometheus.yml",
                 f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address=127.0.0.1:{self.port}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def __enter__(self) -> Prometheus:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                self.ask("vector(1)")
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__(None, None, None)
                    raise AssertionError(f"Prometheus: {error}\n{self._log.read_text()}") from error
                time.sleep(0.2)
            else:
                return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def targets(self, addresses: Mapping[str, str]) -> None:
        """Scrape these from now on: instance → host:port."""
        groups = [
            {"targets": [where], "labels": {"instance": instance}} for instance, where in addresses.items()
        ]
        draft = self._folder / "targets.new"
        draft.write_text(json.dumps(groups))
        draft.replace(self._folder / "targets.json")

    def ask(self, query: str) -> list[Any]:
        """The samples of an instant query."""
        return self._get("query", query=query)

    def ask_range(self, query: str, start: float, end: float, step: float) -> list[Any]:
        """The series of a query between two times."""
        return self._get("query_range", query=query, start=start, end=end, step=step)

    def _get(self, what: str, **words: object) -> list[Any]:
        url = f"http://127.0.0.1:{self.port}/api/v1/{what}?" + urllib.parse.urlencode(words)
        with urllib.request.urlopen(url, timeout=10) as answer:
            result: list[Any] = json.load(answer)["data"]["result"]
        return result


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels."""
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return found


def fill(query: str, rate_interval: str = "30s") -> str:
    """A panel's query with every agent, as Grafana sends it."""
    for name in ("$cluster", "$namespace", "$job", "$instance"):
        query = query.replace(name, ".*")  # each variable's allValue
    query = query.replace("$__rate_interval", rate_interval)
    assert "$" not in query
    return query
