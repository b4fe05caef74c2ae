"""SIGKILL at each named point, and at random times under load: nothing that was committed is lost.

    python -m tests.faults.kills [runs a point, default 50] [random runs, default 200] [POINT…]

The obligations are what the child told over its pipe after each commit, never what is read back from the
spool. Lost: an obligation that neither arrives nor is named in a gap event. A duplicate has the same id and
the same bytes; other bytes under one id are counted as `changed`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import kombu

from tests.brokers.rabbitmq import RabbitMQ
from tests.faults.kill_child import POINTS

WINDOW = 256


@dataclass
class Ledger:
    """What was promised and what came."""

    owed: dict[str, tuple[str, int]] = field(default_factory=dict)  # id → (epoch, sequence)
    arrived: dict[str, bytes] = field(default_factory=dict)
    named: set[tuple[str, int]] = field(default_factory=set)
    last: dict[tuple[str, str], int] = field(
        default_factory=lambda: defaultdict(int)
    )  # (epoch, key) → sequence
    numbers: dict[tuple[str, int], str] = field(default_factory=dict)
    duplicates: int = 0
    changed: int = 0
    disorder: int = 0
    reused: int = 0

    def took(self, message: kombu.Message) -> None:
        """A message arrived."""
        headers, body = message.headers, bytes(message.body)
        event_id, epoch, sequence = headers["ce-id"], headers["ce-epoch"], int(headers["ce-sequence"])
        if self.numbers.setdefault((epoch, sequence), event_id) != event_id:
            self.reused += 1
        if event_id in self.arrived:
            self.duplicates += 1
            self.changed += self.arrived[event_id] != body
        else:
            key = (epoch, headers["ce-partitionkey"])
            self.disorder += sequence < self.last[key]
            self.last[key] = max(self.last[key], sequence)
        self.arrived[event_id] = body
        for item in json.loads(body).get("missing", ()):
            self.named |= {(item["epoch"], n) for n in range(item["first"], item["last"] + 1)}
        message.ack()

    def lost(self) -> list[str]:
        """Obligations that neither came nor are named."""
        return [
            each
            for each, number in self.owed.items()
            if each not in self.arrived and number not in self.named
        ]


class Bench:
    """One spool, one queue, one child after the other."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._state = url, folder / "state"
        self.ledger = Ledger()
        self.ready_seconds = 0.0
        self.most_duplicates = 0
        self._connection = kombu.Connection(url)
        exchange = kombu.Exchange("virtbus.events", type="topic", durable=True)
        queue = kombu.Queue("kills", exchange, routing_key="#", durable=True)
        self._consumer = self._connection.Consumer(queue, on_message=self.ledger.took)
        self._consumer.qos(prefetch_count=1000)
        self._consumer.consume()

    def run(
        self,
        point: str,
        *,
        nth: int = 1,
        rate: float = 500,
        kill_after: float | None = None,
        midway: Callable[[], object] = lambda: None,
        **environment: str,
    ) -> None:
        """Start a child and wait for its end; all that it told is owed.

        With `kill_after` it is killed so many seconds after its first commit, `midway` is called before.
        """
        before = self.ledger.duplicates
        reader, writer = os.pipe()
        begun = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.kill_child", str(writer), str(self._state), self._url, point,
             str(nth), str(rate)],
            pass_fds=[writer],
            env={**os.environ, **environment},
        )  # fmt: skip
        os.close(writer)
        ready = None
        with os.fdopen(reader) as told:
            if kill_after is not None:
                ready = self._note(told.readline(), begun)
                # The pipe is read meanwhile: a child that can't tell any more would commit nothing more.
                ending = threading.Thread(target=self._end, args=(child, kill_after, midway))
                ending.start()
            for line in told:
                after = self._note(line, begun)
                ready = after if ready is None else ready
            if kill_after is not None:
                ending.join()
        code = child.wait(90)
        wanted = 0 if point == "drain" else -signal.SIGKILL
        if code != wanted:
            raise AssertionError(f"the child at {point!r} ended with {code}, not {wanted}")
        if ready is not None:
            self.ready_seconds = max(self.ready_seconds, ready)
        self._take()
        self.most_duplicates = max(self.most_duplicates, self.ledger.duplicates - before)

    def _end(self, child: subprocess.Popen[bytes], seconds: float, midway: Callable[[], object]) -> None:
        begun = time.monotonic()
        midway()
        time.sleep(max(0.0, begun + seconds - time.monotonic()))
        child.kill()

    def _note(self, line: str, begun: float) -> float | None:
        if not line.endswith("\n"):
            return None  # half a line: the child died while it told; it is not owed
        event_id, epoch, sequence = json.loads(line)
        self.ledger.owed[event_id] = (epoch, sequence)
        return time.monotonic() - begun

    def _take(self, quiet: float = 0.2) -> None:
        while True:
            try:
                self._connection.drain_events(timeout=quiet)
            except TimeoutError:
                return

    def finish(self) -> None:
        """Let the last child deliver what is left."""
        self.run("drain", rate=0)
        deadline = time.monotonic() + 30
        while self.ledger.lost() and time.monotonic() < deadline:
            self._take(0.5)

    def report(self, name: str, runs: int) -> bool:
        """Print the line; whether every promise was kept."""
        ledger = self.ledger
        lost = len(ledger.lost())
        print(
            f"{name} runs={runs} events={len(ledger.owed)} lost={lost} duplicates={ledger.duplicates} "
            f"most_duplicates_a_run={self.most_duplicates} changed={ledger.changed} reused={ledger.reused} "
            f"out_of_order={ledger.disorder} ready_max_seconds={self.ready_seconds:.2f}",
            flush=True,
        )
        wrong = lost + ledger.changed + ledger.reused + ledger.disorder
        return not wrong and self.most_duplicates <= WINDOW and self.ready_seconds <= 5.0

    def close(self) -> None:
        self._connection.close()


def at_points(url: str, folder: Path, runs: int, seed: int = 1, points: Sequence[str] = POINTS) -> bool:
    """`runs` kills at each point; the line of each point."""
    chance = random.Random(seed)
    good = True
    for point in points:
        bench = Bench(url, folder / point.replace(" ", "_"))
        try:
            for _ in range(runs):
                most = 1 if point in ("during_open", "during_compaction") else 60
                # The file is compacted when there is nothing else to do.
                rate = 0 if point == "during_compaction" else 500
                if point == "during_open":  # or there would be nothing to lose yet
                    bench.run("random", rate=rate, kill_after=chance.uniform(0, 0.3))
                bench.run(point, nth=chance.randint(1, most), rate=rate)
            bench.finish()
            good = bench.report(f"kill[{point.replace(' ', '_')}]", runs) and good
        finally:
            bench.close()
    return good


def at_random(url: str, folder: Path, runs: int, seed: int = 1) -> bool:
    """`runs` kills at random times under 500 events a second."""
    chance = random.Random(seed)
    bench = Bench(url, folder / "random")
    try:
        for _ in range(runs):
            bench.run("random", rate=500, kill_after=chance.uniform(0, 1.0))
        bench.finish()
        return bench.report("kill[random]", runs)
    finally:
        bench.close()


def main() -> None:
    """Run both on a private broker."""
    runs, times = (int(word) for word in (*sys.argv[1:3], *["50", "200"][len(sys.argv) - 1 :]))
    points = sys.argv[3:] or POINTS
    with tempfile.TemporaryDirectory(prefix="vbkills-", dir="/tmp") as folder:
        broker = RabbitMQ.shared(Path(folder) / "rabbitmq")
        try:
            good = at_points(broker.url(broker.vhost()), Path(folder), runs, points=points)
            if times:
                good = at_random(broker.url(broker.vhost()), Path(folder), times) and good
        finally:
            broker.close()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
