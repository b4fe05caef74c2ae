"""The health of the fleet: which hosts and which storage systems are in trouble, and whose fault it is.

    fleet = Fleet()
    for delivery in consumer:
        fleet.saw(delivery.event, delivery.attributes, clock())
        delivery.ack()
    ...
    view = fleet.view(clock())

It distinguishes a host's fault (unrelated storage lost by one host) from a backend's (one storage system lost
by several hosts), and says `undetermined` when it can't: a scheduler must not evacuate a healthy host because
a shared array is sick. Pure: no I/O, the clock is passed in.
"""

from __future__ import annotations

from virtbus.fleet.publishers import Publishers
from virtbus.fleet.state import Fleet
from virtbus.fleet.storage import Sharing, StorageRules
from virtbus.fleet.verdict import Blame, VerdictRules
from virtbus.fleet.view import Answer, BackendHealth, FleetRules, FleetView, HostHealth

__all__ = [
    "Answer",
    "BackendHealth",
    "Blame",
    "Fleet",
    "FleetRules",
    "FleetView",
    "HostHealth",
    "Publishers",
    "Sharing",
    "StorageRules",
    "VerdictRules",
]
