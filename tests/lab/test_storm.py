"""A real storm of I/O errors, and an agent that is killed in the middle of it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest

from tests.agent.process import AgentProcess
from tests.bench.events import Events
from tests.lab.lab import Guest, Lab, wait_until

SECONDS = 10.0
LATE = 1.0  # seconds that a callback, or its commit, may come after its error


class InjectedOverTime:
    """Samples of how many errors nbdkit had injected at which wall-clock time."""

    def __init__(self, guest: Guest) -> None:
        self.samples: list[tuple[float, int]] = []
        self._guest = guest

    @contextmanager
    def watched(self) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.1):
                before = time.time()
                self.samples.append((before, self._guest.injected()))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def at_least_by(self, moment: float) -> int:
        """A number that had been injected by `moment` for certain."""
        return max((number for at, number in self.samples if at <= moment - 0.5), default=0)

    def at_most_by(self, moment: float) -> int:
        """No more than this had been injected by `moment`."""
        return min(number for at, number in self.samples if at >= moment)


def taken(ledger: Path) -> tuple[int, int]:
    """Callbacks that were committed for certain, and those that may have been (a commit that was killed)."""
    lines = [line.split() for line in ledger.read_text().splitlines()]
    done = [0] + [int(number) for word, number in lines if word == "done"]
    begun = [0] + [int(number) for word, number in lines if word == "begin"]
    return done[-1], begun[-1]


def counted(events: Events) -> int:
    """The sum of counts of real callbacks, of all that has arrived."""
    return sum(
        event["data"]["occurrences"]["count"]
        for _, event in list(events.of_type("io_error"))
        if event["data"]["origin"] == "event"
    )


@pytest.mark.slow
def test_a_storm_over_a_kill_loses_no_committed_count_and_names_the_rest_in_the_gap(
    lab: Lab, amqp_url: str, tmp_path: Path
) -> None:
    guest = lab.guest("storm", error="EIO", policy="report", bus="ide", boot="storm").start()
    ledgers = [tmp_path / "ledger-1", tmp_path / "ledger-2"]
    history = InjectedOverTime(guest)
    events = Events(amqp_url)

    def agent(ledger: Path) -> AgentProcess:
        words = [sys.executable, "-m", "tests.lab.storm_agent", str(ledger)]
        return AgentProcess(tmp_path, libvirt=lab.uri_ro, bus=amqp_url, command=words)

    try:
        with history.watched():
            with agent(ledgers[0]).ready() as first:
                guest.fail()
                time.sleep(SECONDS / 2)
                wait_until(lambda: taken(ledgers[0])[0] > 1000, "a thousand errors are committed", 120)
                first.kill()
            with agent(ledgers[1]).ready() as second:
                time.sleep(SECONDS / 2)
                guest.heal()
                time.sleep(2 * LATE)

                def is_quiet() -> bool:
                    # libvirtd sends what a storm has piled up for seconds after the last injection.
                    before = second.metric("virtbus_callbacks_total")
                    time.sleep(3 * LATE)
                    now = second.metric("virtbus_callbacks_total")
                    return 0 < before == now == taken(ledgers[1])[0]

                second.until(is_quiet, "quiet", 120)
                (certain, possible), (after, _) = taken(ledgers[0]), taken(ledgers[1])
                # An update comes at the end of its window, which may have grown for as long as the storm.
                wait_until(lambda: counted(events) >= certain + after, "all counts arrived", 60)
        injected = guest.injected()
    finally:
        events.close()

    # Exactly what was committed, in the first life or the second: nothing lost, nothing counted twice.
    assert counted(events) - after in {certain, possible}
    lost = injected - counted(events)
    gaps = [event["data"] for _, event in events.of_type("gap") if event["data"]["reason"] == "agent_down"]
    started, ended = (
        datetime.fromisoformat(gaps[-1][name]).timestamp() for name in ("started_at", "ended_at")
    )
    # What was injected before the gap was committed, and what was injected after it too: so what is missing
    # was injected within it.
    assert certain > 1000
    assert possible >= history.at_least_by(started - LATE)
    assert after >= injected - history.at_most_by(ended)
    assert 0 <= lost <= history.at_most_by(ended) - history.at_least_by(started - LATE)
