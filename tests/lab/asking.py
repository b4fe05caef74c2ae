"""Look-ups that are always under way, four at a time, while the daemon freezes and thaws.

python asking.py URI UUID LOSSES     # until so many calls were lost; prints how many were answered
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from virtbus import telemetry
from virtbus.errors import SourceUnavailable
from virtbus.sources import SourceOptions
from virtbus.sources.crew import Crew
from virtbus.sources.libvirt import LibvirtConnector
from virtbus.sources.link import Link
from virtbus.sources.lookups import Lookups, Want


def main(uri: str, uuid: str, losses: int) -> None:
    telemetry.configure(level="error")
    answers: list[tuple[int, int]] = []
    lost: list[SourceUnavailable] = []

    def ask(link: Link, _subject: str, want: Want) -> Want:
        try:
            while True:
                answers.append(link.state(uuid))
        except SourceUnavailable as error:
            lost.append(error)
        return want

    connector = LibvirtConnector(uri, SourceOptions(keepalive_interval_seconds=1, keepalive_count=1))
    lookups = Lookups(connector, ask, Crew(), in_flight=4, deadline=3600.0)
    lookups.resume()
    for subject in "abcd":
        lookups.request(subject, Want.TROUBLE)
    while len(lost) < losses:
        lookups.check()
        time.sleep(0.1)
    print(len(answers))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
