"""A scheduler that acts: it keeps new guests off a host while a guest there is paused by an I/O error.

python acting.py URL-FILE state.db     (a URL in a flag shows its password in ps)
"""

import logging
import signal
import sqlite3
import sys
from pathlib import Path

from virtbus import BusOptions, Consumer, Delivery, IoError, IoErrorResolved, MissingEvents


class Holds:
    """Which incidents hold which host: an effect that may be repeated, in a file of its own."""

    def __init__(self, path: Path) -> None:
        self.database = sqlite3.connect(path, isolation_level=None)
        self.database.execute(
            "CREATE TABLE IF NOT EXISTS hold (incident TEXT PRIMARY KEY, host TEXT NOT NULL)"
        )

    def hold(self, incident: str, host: str) -> None:
        self.database.execute("INSERT OR REPLACE INTO hold VALUES (?, ?)", (incident, host))

    def release(self, incident: str) -> None:
        self.database.execute("DELETE FROM hold WHERE incident = ?", (incident,))


def act(delivery: Delivery, holds: Holds) -> None:
    event = delivery.event
    if isinstance(event, IoError) and event.host is not None and event.error.action.value == "pause":
        holds.hold(event.incident.id, event.host.name)
    elif isinstance(event, IoErrorResolved):
        holds.release(event.incident.id)


def missing(told: MissingEvents) -> None:
    logging.error("%s: events %s to %s will not come: look at its guests", told.source, told.first, told.last)


def main(url: str, state: Path, topic: str = "virtbus.events") -> None:
    logging.basicConfig(level=logging.WARNING)
    holds, seen, options = Holds(state), Path(f"{state}.seen"), BusOptions(topic=topic)
    with Consumer(
        url, group="acting", options=options, dedupe=seen, check_gaps=True, on_missing=missing
    ) as consumer:
        signal.signal(signal.SIGTERM, lambda *_: consumer.stop())
        for delivery in consumer:
            try:
                act(delivery, holds)
            except sqlite3.OperationalError:
                delivery.retry(after=5)
            else:
                delivery.ack()  # effect first, ack after


if __name__ == "__main__":
    main(Path(sys.argv[1]).read_text().strip(), Path(sys.argv[2]), *sys.argv[3:])
