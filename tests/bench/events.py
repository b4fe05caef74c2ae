"""What arrives at a broker, with the moment of its arrival."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from virtbus.agent.control import ask
from virtbus.bus import BusOptions, open_bus
from virtbus.envelope import decode
from virtbus.errors import BusUnavailable


class Events:
    """What arrives at the broker: (monotonic time, decoded envelope) of each, on a thread of its own."""

    def __init__(self, url: str) -> None:
        self.seen: list[tuple[float, dict[str, Any]]] = []
        self._over = threading.Event()
        self._ready = threading.Event()
        self._url = url
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._ready.wait(10)

    def _run(self) -> None:
        stream = open_bus(self._url, BusOptions()).consume("bench")
        stream.receive(0.2)
        self._ready.set()
        while not self._over.is_set():
            try:
                message = stream.receive(0.2)
            except BusUnavailable:
                continue  # it is away, or about to be: whoever misses something will say so
            if message is not None:
                envelope = decode(message)
                self.seen.append((time.monotonic(), {**envelope.attributes, "data": envelope.data}))
                stream.ack(message)
        stream.close()

    def of_type(self, name: str) -> list[tuple[float, dict[str, Any]]]:
        """Those of one type, e.g. "io_error"."""
        return [item for item in self.seen if item[1]["type"].endswith(f".{name}.v1")]

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading."""
        self._over.set()
        self._thread.join()


class Confirms:
    """When an agent has each event confirmed, as its tap says: id → wall time in ns."""

    def __init__(self, control: Path) -> None:
        self.at: dict[str, int] = {}
        self._peer = ask(control, {"command": "tap", "stage": "published", "domain": None})
        self._peer.settimeout(None)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for line in self._peer.makefile("rb"):
            if line.strip():
                told = json.loads(line)
                self.at[told["item"]["id"]] = told["at_ns"]

    def __enter__(self) -> Confirms:
        return self

    def __exit__(self, *_: object) -> None:
        self._peer.shutdown(2)
        self._thread.join()
        self._peer.close()
