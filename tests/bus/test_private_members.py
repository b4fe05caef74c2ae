"""What the buses take over inside kombu and py-amqp is still there, as it was.

Checked with kombu 5.7.0 and py-amqp 5.4.2. A release that fails here has to be read before it is allowed:
the bounds stand in pyproject.toml.
"""

from __future__ import annotations

import importlib
import inspect
import tomllib
from collections.abc import Iterator
from functools import partial
from importlib.metadata import packages_distributions, version
from pathlib import Path
from types import SimpleNamespace

import amqp
import pytest
from amqp import abstract_channel, channel, method_framing, spec
from kombu.transport import TRANSPORT_ALIASES, pyamqp, virtual

ROOT = Path(__file__).parents[2]
RELEASES = f"kombu {version('kombu')}, py-amqp {version('amqp')}; checked with kombu 5.7.0, py-amqp 5.4.2"

PREPARE = "self, body, priority, content_type, content_encoding, headers, properties"
SIGNATURES = {
    method_framing.frame_writer: "connection, transport",
    amqp.Connection._on_close: "self, reply_code, reply_text, class_id, method_id",
    amqp.Connection.drain_events: "self, timeout",
    amqp.Connection.heartbeat_tick: "self, rate",
    amqp.Connection.collect: "self",
    channel.Channel._on_close: "self, reply_code, reply_text, class_id, method_id",
    channel.Channel._basic_publish: "self, msg, exchange, routing_key, mandatory, immediate",
    abstract_channel.AbstractChannel.dispatch_method: "self, method_sig, payload, content",
    abstract_channel.AbstractChannel.send_method: "self, sig, format, args, content",
    pyamqp.Channel.prepare_message: PREPARE,
    virtual.Channel.prepare_message: PREPARE,
    virtual.Channel.basic_publish: "self, message, exchange, routing_key",
}


@pytest.mark.parametrize(
    "member", SIGNATURES, ids=lambda member: getattr(member, "__qualname__", str(member))
)
def test_a_member_that_is_taken_over_has_the_parameters_it_had(member: object) -> None:
    wanted = SIGNATURES[member]  # type: ignore[index]
    names = list(inspect.signature(member).parameters)  # type: ignore[arg-type]
    assert ", ".join(names).startswith(wanted), RELEASES


def test_the_connection_reads_its_methods_from_a_table_by_name() -> None:
    assert spec.Connection.Blocked in amqp.Connection._METHODS, RELEASES
    assert isinstance(inspect.getattr_static(amqp.Connection, "on_inbound_frame"), property), RELEASES
    assert {"frame_writer", "on_blocked", "on_unblocked"} <= set(
        inspect.signature(amqp.Connection.__init__).parameters
    ), RELEASES


def test_a_channel_keeps_its_consumers_until_the_broker_has_confirmed_their_end() -> None:
    fake = SimpleNamespace(callbacks={"tag": None}, cancel_callbacks={}, no_ack_consumers=set())
    fake._remove_tag = partial(channel.Channel._remove_tag, fake)
    channel.Channel._on_basic_cancel_ok(fake, "tag")
    assert fake.callbacks == {}, RELEASES
    assert spec.Basic.Cancel == (60, 30), RELEASES
    assert "callbacks" in inspect.getsource(channel.Channel.__init__), RELEASES


def test_a_transport_is_found_by_its_alias() -> None:
    importlib.import_module("virtbus.bus.kafka.bus")
    assert TRANSPORT_ALIASES["virtbus-kafka"] == "virtbus.bus.kafka.bus:Transport"


def imported() -> Iterator[str]:
    """The top-level modules that virtbus imports, and that are not its own."""
    for path in (ROOT / "virtbus").rglob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] == ["import"] or (words[:1] == ["from"] and "import" in words):
                yield words[1].partition(".")[0].rstrip(",")


def test_every_module_that_is_imported_comes_from_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in extras if name != "dev" for line in extras[name])]
    declared = {line.partition(">")[0].lower().replace("_", "-") for line in lines}
    assert all(">=" in line for line in lines)
    owners = packages_distributions()
    found = {name: owners[name] for name in set(imported()) if name in owners and name != "virtbus"}
    missing = {
        name
        for name, packages in found.items()
        if not {p.lower().replace("_", "-") for p in packages} & declared
    }
    assert not missing
