"""From a real guest's I/O error to its effect: `virtbus react --with webhook`, beside masakari-monitors.

The ways take turns on one libvirtd and its guests, an error at a time. Both end at the same kind of sink on
loopback. Ours goes through the spool, RabbitMQ and the store of what is to be done, so that nothing is lost
on the way; theirs goes straight from the callback to the sink.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.bench import peers
from tests.bench.host import agent, percentile
from tests.bench.measure import Row
from tests.bench.publish import broker
from tests.lab.lab import PAUSED_IOERROR, Guest, Lab
from tests.waiting import wait_until


class Sink:
    """A server that takes whatever is POSTed: (arrived at, header, body) of each. A context manager."""

    def __init__(self) -> None:
        self.posts: list[tuple[float, Any, Any]] = []
        sink = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                sink.posts.append((time.time(), self.headers, body))
                self._answer(202, {"notification": {"id": 1, "notification_uuid": "u"}})

            def do_GET(self) -> None:
                version = {"id": "v1.0", "status": "CURRENT", "version": "1.3", "min_version": "1.0"}
                self._answer(200, {"versions": [{**version, "links": []}]})

            def _answer(self, status: int, data: object) -> None:
                body = json.dumps(data).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Nobody reads it."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Sink:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def rows(rounds: int, *, errors: int = 100) -> list[Row]:
    """Milliseconds from libvirt's callback to the sink, p50 and p99 of each way."""
    found: dict[str, list[float]] = {"ours p50": [], "ours p99": [], "theirs p50": [], "theirs p99": []}
    with broker() as node, Lab() as lab:
        guests = [lab.guest(f"g{number}", error="EIO").start() for number in range(4)]
        for _ in range(rounds):
            for way, run in (("ours", _virtbus), ("theirs", _monitors)):
                with tempfile.TemporaryDirectory() as folder, Sink() as sink:
                    with run(folder, lab, node.url(node.vhost()), sink) as latencies:
                        _fail_in_turn(guests, errors, latencies)
                    took = latencies()
                    for name, share in (("p50", 0.5), ("p99", 0.99)):
                        found[f"{way} {name}"].append(percentile(took, share) * 1000)
    what = {"ours": "error → effect of a webhook", "theirs": "masakari-monitors: error → its sink"}
    return [
        Row(f"effect {name}", f"{what[name.split()[0]]}, {name.split()[1]}", tuple(values), "ms")
        for name, values in found.items()
    ]


def _fail_in_turn(guests: Sequence[Guest], errors: int, latencies: Callable[[], list[float]]) -> None:
    for number in range(errors):
        guest, before = guests[number % len(guests)], len(latencies())
        guest.fail()
        wait_until(lambda n=before: len(latencies()) > n, "an effect", 20)
        guest.heal()
        guest.wait_state(PAUSED_IOERROR[0])
        guest.resume()
        time.sleep(0.05)


@contextmanager
def _virtbus(folder: str, lab: Lab, url: str, sink: Sink) -> Iterator[Callable[[], list[float]]]:
    words = [str(peers.agent_python()), "-m", "virtbus", "react", "--with", "webhook", "--bus", url,
             "--state-dir", folder, "--http-listen", "", "--option", f"webhook.url={sink.url}/"]  # fmt: skip

    def latencies() -> list[float]:
        return [
            arrived - datetime.fromisoformat(headers["ce-time"]).timestamp()
            for arrived, headers, body in list(sink.posts)
            if body.get("origin") == "event" and body.get("occurrences", {}).get("count")
        ]

    log = Path(folder) / "react.log"
    with log.open("wb") as out, subprocess.Popen(words, stderr=out) as reacting:
        try:
            wait_until(lambda: "group react-webhook" in log.read_text(), "a reactor that listens", 30)
            time.sleep(3)  # its queue is declared and bound
            with agent(folder, lab, url, "[incidents]\nfold = false\n").ready():
                yield latencies
        finally:
            reacting.kill()


@contextmanager
def _monitors(folder: str, lab: Lab, url: str, sink: Sink) -> Iterator[Callable[[], list[float]]]:
    words = [str(peers.python_of("masakari", *peers.PACKAGES["masakari"])),
             str(peers.HERE / "monitor_peer.py"), lab.uri_ro, sink.url]  # fmt: skip
    heard = Path(folder) / "heard"

    def latencies() -> list[float]:
        begun = [json.loads(line) for line in heard.read_text().splitlines() if line.startswith("[")]
        arrived = [
            at
            for at, _, body in list(sink.posts)
            if body["notification"]["payload"]["event"] == "IO_ERROR"  # it tells of the pause, too
        ]
        return [end - start for end, (_, start) in zip(arrived, begun, strict=False)]

    with heard.open("wb") as out, subprocess.Popen(words, stdout=out) as monitor:
        try:
            wait_until(lambda: "ready" in heard.read_text(), "a monitor that listens", 60)
            time.sleep(1)
            yield latencies
        finally:
            monitor.kill()
