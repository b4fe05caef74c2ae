"""A Nova weigher that prefers hosts without open incidents; loaded by nova-scheduler, imports only Nova.

In nova.conf of each nova-scheduler:

    [filter_scheduler]
    weight_classes = nova.scheduler.weights.all_weighers,virtbus.integrations.nova_weigher.HealthWeigher

and on the same machine `virtbus fleet --write /run/virtbus/fleet.json`. The weigher reads that local file,
never the network: scheduling waits for nobody. A file that is missing, broken or older than five minutes
weighs nothing. The environment of nova-scheduler may name another file in VIRTBUS_FLEET_FILE and another
multiplier in VIRTBUS_WEIGHT_MULTIPLIER.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nova.scheduler import weights

DEFAULT_FILE = "/run/virtbus/fleet.json"
STALE_SECONDS = 300.0
_LOOK_SECONDS = 1.0

# How much a host's trouble weighs: its own fault most, a shared backend's least (others have it too).
_BLAME = {"none": 0.0, "backend": 0.5, "undetermined": 1.0, "host": 2.0}


class HealthWeigher(weights.BaseHostWeigher):  # type: ignore[misc] # Nova carries no types
    """0 for a well host, below 0 for one in trouble; Nova scales the weights of all weighers alike."""

    # Nova scales to these: a host with little trouble loses little, whatever the others have.
    minval = -2.5
    maxval = 0.0

    def __init__(self) -> None:
        """Reads nothing yet."""
        super().__init__()
        self._path = Path(os.environ.get("VIRTBUS_FLEET_FILE", DEFAULT_FILE))
        self._multiplier = float(os.environ.get("VIRTBUS_WEIGHT_MULTIPLIER", "10.0"))
        self._looked, self._mark = float("-inf"), (0, 0)
        self._hosts: Mapping[str, Mapping[str, Any]] = {}

    def weight_multiplier(self, host_state: Any) -> float:
        """How much this counts beside RAM, disk and so on (those have 1.0)."""
        return self._multiplier

    def _weigh_object(self, host_state: Any, weight_properties: Any) -> float:
        health = self._health()
        found = health.get(host_state.host) or health.get(host_state.nodename) or {}
        if not found:
            # One of them without its domain: `x.a.org` and `x.b.org` are two hosts.
            host = str(host_state.host)
            short = host.partition(".")[0]
            alike = [one for name, one in health.items() if name == short or name.partition(".")[0] == host]
            found = alike[0] if len(alike) == 1 else {}
        trouble = _BLAME.get(str(found.get("blame")), 0.0)
        # A silent host is not a host in trouble; whether it is up Nova knows better.
        guests = found.get("guests", 0)
        return -trouble - (0.01 * min(guests, 50) if trouble and isinstance(guests, int) else 0.0)

    def _health(self) -> Mapping[str, Mapping[str, Any]]:
        """The file's hosts, read again when it changed; looked at once a second at most."""
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return self._hosts
        self._looked = now
        try:
            found = self._path.stat()
            if (
                abs(time.time() - found.st_mtime) > STALE_SECONDS
            ):  # a clock that was ahead may have written it
                self._hosts, self._mark = {}, (0, 0)
            elif (found.st_mtime_ns, found.st_ino) != self._mark:
                self._hosts = _hosts(json.loads(self._path.read_text(encoding="utf-8")))
                self._mark = (found.st_mtime_ns, found.st_ino)
        except (OSError, ValueError):
            self._hosts, self._mark = {}, (0, 0)
        return self._hosts


def _hosts(data: object) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(data, dict) or not isinstance(data.get("hosts"), dict) or data.get("suspect_ourselves"):
        return {}
    return {str(name): one for name, one in data["hosts"].items() if isinstance(one, dict)}
