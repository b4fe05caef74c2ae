"""Plug-ins: buses, sources and integrations are found by entry points, ours and other people's alike."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from virtbus.errors import ConfigError

# What brings a module that may be missing: `pip install 'virtbus[…]'`.
_EXTRAS = {
    "confluent_kafka": "kafka",
    "libvirt": "agent",
    "keystoneauth1": "nova",
    "openstack": "nova",
    "kubernetes": "kubernetes",
}


def names(group: str) -> tuple[str, ...]:
    """The names that some installed package serves in an entry-point group, sorted."""
    return tuple(sorted({point.name for point in entry_points(group=group)}))


def find(group: str, name: str) -> EntryPoint | None:
    """The entry point of that name; another package's wins over ours, so that one can be replaced."""
    found = entry_points(group=group, name=name)
    return min(found, key=lambda point: point.dist is not None and point.dist.name == "virtbus", default=None)


def load(point: EntryPoint, what: str) -> Any:
    """What the entry point names. Raises ConfigError that says which package `what` needs."""
    try:
        return point.load()
    except ModuleNotFoundError as error:
        raise missing(error, what) from error


def missing(error: ModuleNotFoundError, what: str) -> ConfigError:
    """The error of `what`, which needs a module that is not installed, with what to install."""
    module = (error.name or "").partition(".")[0]
    extra = _EXTRAS.get(module)
    remedy = f"pip install 'virtbus[{extra}]'" if extra else "install the package it comes from"
    return ConfigError(f"{what} needs the Python module {module}: {remedy}")
