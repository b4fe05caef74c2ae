"""Random and damaged input for everything that reads what others wrote: it is refused, nothing breaks.

A moment for each target in `make test`, ten minutes together in `make soak` (VIRTBUS_FUZZ_SECONDS).
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import amqp
from amqp.method_framing import frame_handler
from amqp.serialization import loads
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from virtbus import envelope, loading, schema
from virtbus.agent.control import ControlSocket, Drill
from virtbus.agent.http import HttpServer
from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.agent.tap import Taps
from virtbus.bus.amqp.wire import WireConnection, _with_readable_key
from virtbus.errors import ConfigError, InputMissing, SchemaError
from virtbus.model import Binding, Host, Message, Now
from virtbus.observations import DeviceRemoved, DomainResumed, DomainState, RawIoError, SourceReady
from virtbus.sources import domain_xml
from virtbus.telemetry import METRICS
from virtbus.testing import a_gap, a_heartbeat, a_resolved, a_stamp, an_io_error

MANY = settings(
    max_examples=100,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def damaged(good: bytes, where: list[tuple[int, int]]) -> bytes:
    """`good` with bytes replaced, and cut where a replacement says so."""
    data = bytearray(good)
    for at, value in where:
        if not data:
            break
        if value == 256:
            del data[at % len(data) :]
        else:
            data[at % len(data)] = value
    return bytes(data)


DAMAGE = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 256)), max_size=6)

# ---------------------------------------------------------------------------------------- decoder

ENCODED = [
    envelope.encode(event, a_stamp()) for event in (an_io_error(), a_resolved(), a_gap(), a_heartbeat())
]
HEADER = st.one_of(st.text(max_size=40), st.binary(max_size=40), st.integers(), st.none(), st.booleans())


def decode(message: Message) -> None:
    """Decode, check and read an event: SchemaError is the only way out."""
    with suppress(SchemaError):
        opened = envelope.decode(message)
        envelope.to_event(opened)
        schema.validate(opened.attributes.get("dataschema", "?"), opened.data)


@MANY
@given(
    which=st.integers(0, 3),
    binding=st.sampled_from(Binding),
    structured=st.booleans(),
    damage=DAMAGE,
    changed=st.dictionaries(
        st.sampled_from(["id", "type", "source", "specversion", "dataschema", "time", "sequence", "odd"]),
        HEADER,
        max_size=3,
    ),
    content_type=st.none() | st.sampled_from(["application/json", "Application/CloudEvents+JSON", "x"]),
)
def fuzz_decoder(
    which: int,
    binding: Binding,
    structured: bool,
    damage: list[tuple[int, int]],
    changed: dict[str, object],
    content_type: str | None,
) -> None:
    good = ENCODED[which]
    if binding is Binding.AMQP:
        amqp = envelope.to_amqp(good.attributes, good.body, structured=structured)
        headers: dict[str, object] = {**amqp.headers}
        kind, body, prefix = amqp.content_type, amqp.body, "ce-"
    else:
        kafka = envelope.to_kafka(good.attributes, good.body, structured=structured)
        headers = {name: value.encode() for name, value in kafka.headers}
        kind, body, prefix = None, kafka.value, "ce_"
    headers |= {prefix + name: value for name, value in changed.items()}
    message = Message(
        binding, headers, content_type or kind, damaged(body, damage), None, False, None, "fuzz", None
    )
    decode(message)
    with suppress(SchemaError):
        envelope.decode_structured(damaged(envelope.structured_json(good.attributes, good.body), damage))


# ---------------------------------------------------------------------------------- configuration

SECTIONS = ["bus", "libvirt", "spool", "incidents", "http", "log", "control", "heartbeat", "state_dir", "odd"]
KEYS = ["url", "window", "tls", "kafka", "options", "listen", "level", "socket", "max_bytes", "odd key"]
VALUE = JSON | st.sampled_from(["amqp://u:p@h", "", "127.0.0.1:1", "[::1]:70000", "a:b:c"])


def toml(value: Any) -> str:
    """TOML of what can be written in TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    return json.dumps("" if value is None else value)


@MANY
@given(
    tree=st.dictionaries(
        st.sampled_from(SECTIONS),
        VALUE | st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=3),
        max_size=3,
    ),
    environment=st.dictionaries(
        st.sampled_from(["VIRTBUS_BUS__WINDOW", "VIRTBUS_BUS", "VIRTBUS_BUS__KAFKA__OPTIONS",
                         "VIRTBUS_X__Y__Z", "VIRTBUS___", "VIRTBUS_BUS__URL",
                         "VIRTBUS_LIBVIRT__OWNER_RULES"]),
        st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=20),
        max_size=2,
    ),
    raw=st.binary(max_size=60),
    damage=DAMAGE,
)  # fmt: skip
def fuzz_configuration(
    tree: dict[str, Any], environment: dict[str, str], raw: bytes, damage: list[tuple[int, int]]
) -> None:
    text = "".join(f"{name} = {toml(value)}\n" for name, value in tree.items()).encode("utf-8", "replace")
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        for content in (text, damaged(text, damage), raw):
            Path(file.name).write_bytes(content)
            with suppress(ConfigError, InputMissing):  # InputMissing: not UTF-8
                loading.effective(loading.load(file=Path(file.name), environment=environment).config)


# ---------------------------------------------------------------------------------- control socket


class _Socket:
    """One control socket for all examples; `broke` counts exceptions that reached a thread's end."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="vbfuzz-", dir="/tmp")
        self.path = Path(self.folder.name) / "s"
        self.broke: list[object] = []
        threading.excepthook = self.broke.append
        self.drills: list[Drill] = []
        self.control = ControlSocket(
            self.path, status=lambda: {"fine": True}, taps=Taps(), drill=self.drills.append
        )
        self.control.start()

    def send(self, data: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(5)
            peer.connect(str(self.path))
            try:
                peer.sendall(data)
                peer.shutdown(socket.SHUT_WR)
                return peer.recv(65536)
            except (BrokenPipeError, ConnectionResetError):
                return b""


_socket: list[_Socket] = []
REQUEST = st.fixed_dictionaries(
    {"command": st.sampled_from(["status", "drill", "tap", "x"]) | JSON},
    optional=dict.fromkeys(("stage", "domain_name", "alias", "action", "reason", "count", "resolve"), JSON),
)


@MANY
@given(request=REQUEST, damage=DAMAGE, raw=st.binary(max_size=200) | st.just(b"[" * 4096 + b"\n"))
def fuzz_control_socket(request: dict[str, Any], damage: list[tuple[int, int]], raw: bytes) -> None:
    if not _socket:
        _socket.append(_Socket())
    server = _socket[0]
    line = json.dumps(request).encode() + b"\n"
    for data in (line, damaged(line, damage), raw):
        server.send(data)
    assert not server.broke, server.broke
    assert json.loads(server.send(b'{"command": "status"}\n')) == {"fine": True}
    for drill in server.drills:
        assert drill.action_code in (0, 1, 2)
    server.drills.clear()


# ------------------------------------------------------------------------------------- domain XML

PIECES = st.sampled_from([
    "<disk type='network' device='disk'>", "</disk>", "<source protocol='rbd' name='a/b'/>",
    "<target dev='vda'/>",
    "<alias name='virtio-disk0'/>", "<source file='json:{\"driver\":\"x\"}'/>", "<devices>", "</devices>",
    "<metadata>", "</metadata>", "<!DOCTYPE a [<!ENTITY b 'c'>]>", "&b;", "<name>n</name>", "<uuid>u</uuid>",
    "<![CDATA[x]]>", "<a xmlns='http://openstack.org/xmlns/libvirt/nova/1.1'/>", "\0", "é", "<serial/>",
    "&#0;",
    "<host name='h' port='p'/>", "<backingStore>", "</backingStore>", "<a" * 50, "<x>" * 600,
])  # fmt: skip
GOOD = (
    "<domain type='qemu' id='3'><name>g</name><uuid>2554af7c-b775-4636-89df-b5b43afc47c0</uuid><devices>"
    "<disk type='network' device='disk'><driver name='qemu' error_policy='stop'/><source protocol='nbd' "
    "name='disk0'><host transport='unix' socket='/s'/></source><target dev='vda' bus='virtio'/>"
    "<alias name='virtio-disk0'/></disk></devices></domain>"
)


@MANY
@given(pieces=st.lists(PIECES | st.text(max_size=10), max_size=12), damage=DAMAGE, text=st.text(max_size=60))
def fuzz_domain_xml(pieces: list[str], damage: list[tuple[int, int]], text: str) -> None:
    made = "<domain>" + "".join(pieces) + "</domain>"
    for xml in (made, damaged(GOOD.encode(), damage), GOOD.replace("virtio", text)):
        with suppress(SchemaError):
            for device in domain_xml.parse(xml).devices.values():
                assert device.alias


# ------------------------------------------------------------------------------------ AMQP frames


class _Frames(WireConnection):
    """The reading half of a connection, without one."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.keys: list[str] = []
        self.bytes_recv = 0
        self.on_inbound_frame = frame_handler(self, self._take)

    def _take(self, channel: int, method: tuple[int, int], arguments: bytes, content: Any) -> None:
        values, _ = loads("sLbss", _with_readable_key(arguments), 4)
        self.keys.append(values[4])
        self.messages.append(content)


@MANY
@given(
    flags=st.integers(0, 0xFFFF), values=st.binary(max_size=120) | st.just(b"F\0\0\0\x09\x01k" * 3000),
    body=st.binary(max_size=40), key=st.binary(max_size=255),
)  # fmt: skip
def fuzz_amqp_frames(flags: int, values: bytes, body: bytes, key: bytes) -> None:
    """Whatever its properties and its key are, a message arrives, and so does the one behind it."""
    frames = _Frames()
    deliver = struct.pack(">HHB1sQBB1sB", 60, 60, 1, b"c", 1, 0, 1, b"x", len(key)) + key
    good = envelope.to_amqp(ENCODED[0].attributes, ENCODED[0].body)
    properties = amqp.Message(application_headers=dict(good.headers))._serialize_properties()
    for raw, text in ((struct.pack(">H", flags) + values, body), (properties, good.body)):
        frames._on_frame(1, 1, deliver)
        frames._on_frame(2, 1, struct.pack(">HHQ", 60, 0, len(text)) + raw)
        if text:
            frames._on_frame(3, 1, text)
    assert [bytes(message.body or b"") for message in frames.messages] == [body, good.body]
    assert frames.messages[1].properties["application_headers"] == good.headers


# --------------------------------------------------------------------------------------------- HTTP

_http: list[HttpServer] = []
REQUEST_LINE = st.sampled_from(
    [b"GET /livez HTTP/1.1", b"POST /metrics HTTP/1.0", b"GET /readyz", b"PRI * HTTP/2.0"]
)


@MANY
@given(line=REQUEST_LINE, rest=st.binary(max_size=200), damage=DAMAGE)
def fuzz_http(line: bytes, rest: bytes, damage: list[tuple[int, int]]) -> None:
    if not _http:
        _http.append(HttpServer("127.0.0.1:0", dead=list, not_ready=list))
        _http[0].start()
    troubles = METRICS.warnings.labels("Trouble")._value.get()
    for data in (rest, damaged(line + b"\r\nHost: localhost\r\n" + rest + b"\r\n\r\n", damage)):
        with socket.create_connection(("127.0.0.1", _http[0].port), 5) as peer, suppress(ConnectionError):
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(65536):
                pass
    with socket.create_connection(("127.0.0.1", _http[0].port), 5) as peer:
        peer.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        assert peer.recv(64).startswith(b"HTTP/1.0 200")
    assert METRICS.warnings.labels("Trouble")._value.get() == troubles


# ------------------------------------------------------------------------------- incident states

GUESTS = [f"6b6f2f4e-0b8c-4d7a-9a51-3d1f3a9f5c1{number}" for number in range(5)]
START = Now(1_795_353_029_000_000_000, 100.0)


def some_incidents() -> Incidents:
    return Incidents(IncidentLimits(max_open=8), new_id=lambda: envelope.uuid7(START.wall_ns), host=Host("h"))


def an_error_of(guest: str, alias: str, reason: str = "") -> RawIoError:
    return RawIoError(guest, "guest", 1, "/p", alias, 1, reason, START.wall_ns)


def some_states() -> dict[str, bytes]:
    """States of every kind: of devices, of a domain, of the host, and of a device that is quiet again."""
    incidents = some_incidents()
    for guest in GUESTS:
        for alias in ("disk0", "disk1"):
            for reason in ("", "", "enospc", "enospc"):
                incidents.apply(an_error_of(guest, alias, reason), START, lambda _uuid: None)
    incidents.apply(DeviceRemoved(GUESTS[0], "disk1", START.wall_ns), START, lambda _uuid: None)
    incidents.apply(DomainResumed(GUESTS[0], START.wall_ns), START, lambda _uuid: None)
    incidents.tick(START._replace(monotonic=500.0))
    return {key: state for key, state in incidents.changes().items() if state is not None}


STATES = some_states()
EXTREME = JSON | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of all that a JSON value holds."""
    inside: list[tuple[Any, Any]] = []
    if isinstance(tree, dict | list):
        inside = list(tree.items() if isinstance(tree, dict) else enumerate(tree))
    return [(tree, key) for key, _ in inside] + [place for _, value in inside for place in places(value)]


@MANY
@given(
    key=st.sampled_from(sorted(STATES)),
    other_key=st.none()
    | st.sampled_from(["incident", "incident/", "incident/*", "drill/*", "seen/a", "seen"]),
    changed=st.lists(st.tuples(st.integers(0, 200), EXTREME), max_size=2),
    damage=DAMAGE,
)
def fuzz_incident_states(
    key: str, other_key: str | None, changed: list[tuple[int, Any]], damage: list[tuple[int, int]]
) -> None:
    tree = json.loads(STATES[key])
    for number, value in changed:
        found = places(tree)
        container, at = found[number % len(found)]
        container[at] = json.loads(json.dumps(value))
    for state in (json.dumps(tree).encode(), damaged(STATES[key], damage)):
        incidents = some_incidents()
        states = {name: kept for name, kept in STATES.items() if name != key}
        incidents.restore({**states, other_key or key: state}, START)
        incidents.open_incidents()
        incidents.tick(START._replace(monotonic=200.0))
        for guest in GUESTS:
            incidents.apply(an_error_of(guest, "disk0"), START, lambda _uuid: None)
        running = DomainState(GUESTS[0], "guest", "running", False, None)
        incidents.apply(SourceReady(Host("h"), START.wall_ns, (running,)), START, lambda _uuid: None)
        incidents.tick(START._replace(monotonic=2000.0))
        incidents.changes()


# ------------------------------------------------------------------------------------------ running

TARGETS: dict[str, Callable[[], None]] = {
    "decoder": fuzz_decoder,
    "configuration": fuzz_configuration,
    "control socket": fuzz_control_socket,
    "domain XML": fuzz_domain_xml,
    "AMQP frames": fuzz_amqp_frames,
    "HTTP": fuzz_http,
    "incident states": fuzz_incident_states,
}


def run(target: Callable[[], None], seconds: float) -> int:
    """Feed a target for so long; the number of examples. Raises what breaks, made small."""
    end, examples, number = time.monotonic() + seconds, 0, 0
    while examples == 0 or time.monotonic() < end:
        number += 1
        seed(time.time_ns() if seconds > 60 else number)(target)()
        examples += 100
    return examples


if __name__ == "__main__":
    each = float(os.environ.get("VIRTBUS_FUZZ_SECONDS", "600")) / len(TARGETS)
    counts = {name: run(target, each) for name, target in TARGETS.items()}
    print(json.dumps({"examples": counts, "crashes": 0}))
    sys.exit(0)
