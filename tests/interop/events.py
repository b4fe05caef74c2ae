"""The events that every receiver must understand, and what it must understand of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime

from tests import golden
from tests.interop.receivers import Understood
from virtbus import envelope
from virtbus.bus import Bus
from virtbus.model import Confirmed, Record
from virtbus.testing import ListFeed


def records() -> list[Record]:
    """One of each golden event, with all kinds of names."""
    made = []
    for case in golden.cases():
        made.append(envelope.record(envelope.encode(case.event, case.stamp), case.stamp, row=len(made) + 1))
    return made


def publish(bus: Bus, records: Sequence[Record]) -> None:
    """Publish all and see them confirmed."""
    assert ListFeed(records).publish(bus) == [Confirmed()] * len(records)


def facts(understood: Sequence[Understood]) -> dict[str, Understood]:
    """By id; times to the millisecond, which is all that some languages keep."""
    by_id: dict[str, Understood] = {}
    for event in understood:
        times = {
            name: datetime.fromisoformat(event.attributes[name]).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
            for name in ("time", "recordedtime")
        }
        by_id[event.attributes["id"]] = Understood({**event.attributes, **times}, event.data)
    assert len(by_id) == len(understood)
    return by_id


def expected(records: Sequence[Record]) -> dict[str, Understood]:
    """What a receiver must have understood."""
    return facts([Understood(dict(record.attributes), json.loads(record.body)) for record in records])


def differences(understood: Sequence[Understood], records: Sequence[Record]) -> list[str]:
    """What a receiver understood otherwise than we meant it, a line each."""
    found, meant = facts(understood), expected(records)
    lines = [f"{id_}: {'not there' if id_ in meant else 'unknown'}" for id_ in found.keys() ^ meant.keys()]
    for id_ in found.keys() & meant.keys():
        got, want = found[id_], meant[id_]
        for name in sorted(got.attributes.keys() | want.attributes.keys()):
            pair = got.attributes.get(name), want.attributes.get(name)
            if pair[0] != pair[1]:
                lines.append(f"{id_}: {name} is {pair[0]!r}, not {pair[1]!r}")
        if got.data != want.data:
            lines.append(f"{id_}: data is {got.data}, not {want.data}")
    return lines
