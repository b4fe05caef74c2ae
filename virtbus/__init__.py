"""virtbus: every guest I/O error that libvirt reports, as a durable CloudEvent on RabbitMQ or Kafka.

This package's public names are the consumer SDK; it works where libvirt is not installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from virtbus.bus import BusOptions
    from virtbus.consumer import Consumer, Delivery
    from virtbus.model import Event, Gap, Heartbeat, IoError, IoErrorResolved
    from virtbus.sequences import MissingEvents

# Loaded at first use: `virtbus --help` needs none of it.
_HOMES = {
    "BusOptions": "virtbus.bus",
    "Consumer": "virtbus.consumer",
    "Delivery": "virtbus.consumer",
    "Event": "virtbus.model",
    "Gap": "virtbus.model",
    "Heartbeat": "virtbus.model",
    "IoError": "virtbus.model",
    "IoErrorResolved": "virtbus.model",
    "MissingEvents": "virtbus.sequences",
}

__all__ = [
    "BusOptions",
    "Consumer",
    "Delivery",
    "Event",
    "Gap",
    "Heartbeat",
    "IoError",
    "IoErrorResolved",
    "MissingEvents",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'virtbus' has no attribute {name!r}")
