"""Typed settings: one model gives the defaults, the JSON schema, the checks and the chart's values.

A flag wins over the environment (`VIRTBUS_BUS__URL`), that over the file (`/etc/virtbus/virtbus.toml`),
that over the default. All problems are told at once, each with the place it comes from.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema_rs
import msgspec
from msgspec import Meta

from virtbus import redaction
from virtbus.errors import ConfigError, InputMissing

DEFAULT_FILE = Path("/etc/virtbus/virtbus.toml")
ENVIRONMENT_PREFIX = "VIRTBUS_"

# Every number has an upper bound: what no wait, socket or file system takes would break a thread later.
DAY, YEARS = 86_400, 3_153_600_000  # seconds; a hundred years
Seconds = Annotated[float, Meta(gt=0, le=DAY)]
Count = Annotated[int, Meta(ge=1, le=YEARS)]
Path_ = Annotated[str, Meta(min_length=1)]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: unknown keys are errors."""


class OwnerRule(_Section, frozen=True):
    """Where a guest's owner stands in its `<metadata>`, for platforms virtbus does not know."""

    platform: Annotated[str, Meta(min_length=1, description="Name that goes into owner.platform")]
    namespace: Annotated[str, Meta(min_length=1, description="XML namespace of the metadata element")]
    id: Annotated[str | None, Meta(description="Path below that element, e.g. 'owner/@uuid'")] = None
    name: Annotated[str | None, Meta(description="Path of the guest's name there")] = None
    project_id: Annotated[str | None, Meta(description="Path of the project's id")] = None
    project_name: Annotated[str | None, Meta(description="Path of the project's name")] = None
    user_id: Annotated[str | None, Meta(description="Path of the user's id")] = None
    user_name: Annotated[str | None, Meta(description="Path of the user's name")] = None


class Discover(_Section, frozen=True):
    """Hypervisors that come and go, each behind a socket of its own."""

    preset: Annotated[
        Literal["kubevirt"] | None, Meta(description="Where a platform keeps its sockets: kubevirt")
    ] = None
    sockets: Annotated[
        tuple[Annotated[str, Meta(pattern="^/[^/].*$", max_length=1024)], ...],
        Meta(description="Patterns of sockets (* matches within one name); links are not followed"),
    ] = ()
    uri: Annotated[
        str,
        Meta(
            pattern=r"\{socket\}",
            description="libvirt connection URI of a socket that was found; {socket} stands for it",
        ),
    ] = "qemu+unix:///session?socket={socket}"
    host: Annotated[
        str | None, Meta(description="Name of the host in events; default: the kernel's node name")
    ] = None
    with_uri: Annotated[bool, Meta(description="Observe the hypervisor of libvirt.uri as well")] = False

    @property
    def on(self) -> bool:
        """Whether sockets are looked for."""
        return self.preset is not None or bool(self.sockets)


class Libvirt(_Section, frozen=True):
    """The hypervisor to observe."""

    uri: Annotated[
        str, Meta(min_length=1, description="libvirt connection URI", examples=["qemu:///system"])
    ] = "qemu:///system"
    optional: Annotated[
        bool,
        Meta(
            description="This host may have no libvirt: ready, and not counted as cut off, until its first "
            "socket appears"
        ),
    ] = False
    lookup_deadline_seconds: Annotated[
        Seconds, Meta(description="How long one look-up of a domain may take before it is given up")
    ] = 0.5
    lookups_in_flight: Annotated[int, Meta(ge=1, le=16, description="Look-ups at the same time")] = 4
    keepalive_interval_seconds: Annotated[
        int, Meta(ge=1, le=60, description="Between two keepalive messages")
    ] = 5
    keepalive_count: Annotated[
        int, Meta(ge=1, le=100, description="Unanswered ones that end the connection")
    ] = 3
    grace_seconds: Annotated[
        Seconds, Meta(description="How long a pause by I/O error waits for its own I/O-error event")
    ] = 1.0
    owner_rules: Annotated[tuple[OwnerRule, ...], Meta(description="Further owners in guest metadata")] = ()
    discover: Annotated[Discover, Meta(description="Many hypervisors instead of one: KubeVirt")] = Discover()


class Tls(_Section, frozen=True):
    """TLS towards the broker; host name verification is always on."""

    ca_file: Annotated[Path_ | None, Meta(description="CA certificates (PEM); default: the system's")] = None
    cert_file: Annotated[Path_ | None, Meta(description="Client certificate (PEM)")] = None
    key_file: Annotated[Path_ | None, Meta(description="Client key (PEM)")] = None
    server_name: Annotated[
        str | None, Meta(description="Name to verify when it differs from the URL's host")
    ] = None


class KafkaTopic(_Section, frozen=True):
    """What a missing topic is created with."""

    partitions: Annotated[int, Meta(ge=1, le=100_000, description="Number of partitions")] = 12
    replication: Annotated[int, Meta(ge=-1, le=1000, description="Replicas; -1 is the broker's default")] = -1
    retention_seconds: Annotated[Count | None, Meta(description="retention.ms in seconds")] = None
    min_insync_replicas: Annotated[Count | None, Meta(description="min.insync.replicas")] = None


class Kafka(_Section, frozen=True):
    """Settings that only Kafka knows."""

    sasl_mechanism: Annotated[
        str | None,
        Meta(
            description="SASL mechanism; none without a user name",
            # Not an enum: the bus checks it, so that it is told together with whatever else is wrong.
            examples=["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"],
        ),
    ] = None
    oauth_token_file: Annotated[Path_ | None, Meta(description="File with an OAuth bearer token")] = None
    oauth_token_command: Annotated[
        tuple[str, ...] | None, Meta(description="Command (a list, no shell) that prints a bearer token")
    ] = None
    topic: Annotated[KafkaTopic, Meta(description="How a missing topic is created")] = KafkaTopic()
    options: Annotated[
        dict[str, str], Meta(description="Further librdkafka options, handed over as they are")
    ] = {}


class Bus(_Section, frozen=True):
    """The broker to publish to."""

    url: Annotated[
        str | None,
        Meta(
            description="amqp://, amqps://, kafka://, kafkas:// or embedded:; several brokers by ';'",
            examples=["amqps://virtbus@broker:5671//", "kafkas://broker1:9093,broker2:9093"],
            extra_json_schema={"writeOnly": True},
        ),
    ] = None
    url_file: Annotated[Path_ | None, Meta(description="File that holds the URL (a mounted secret)")] = None
    username: Annotated[str | None, Meta(description="User; default: the URL's")] = None
    password_file: Annotated[
        Path_ | None, Meta(description="File with the password, read again at each connection")
    ] = None
    auth: Annotated[
        Literal["plain", "external"], Meta(description="AMQP: password, or client certificate (EXTERNAL)")
    ] = "plain"
    exchange: Annotated[str, Meta(min_length=1, max_length=255, description="AMQP topic exchange")] = (
        "virtbus.events"
    )
    topic: Annotated[str, Meta(min_length=1, description="Kafka topic")] = "virtbus.events"
    declare: Annotated[
        bool, Meta(description="Declare the exchange / create the topic; false: operators own the topology")
    ] = True
    window: Annotated[int, Meta(ge=1, le=65535, description="Unconfirmed events at most")] = 256
    content_mode: Annotated[Literal["binary", "structured"], Meta(description="CloudEvents content mode")] = (
        "binary"
    )
    heartbeat_seconds: Annotated[int, Meta(ge=0, le=60, description="AMQP heartbeat; 0 is off")] = 10
    connect_timeout_seconds: Annotated[Seconds, Meta(description="To connect and log in")] = 5.0
    confirm_timeout_seconds: Annotated[
        Seconds, Meta(description="Without a confirm for so long, the connection is thrown away")
    ] = 30.0
    tls: Annotated[Tls, Meta(description="TLS files")] = Tls()
    kafka: Annotated[Kafka, Meta(description="Kafka only")] = Kafka()


class SpoolSettings(_Section, frozen=True):
    """The durable outbox."""

    max_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 40, description="Bytes of events it may hold")] = (
        256 << 20
    )
    max_age_seconds: Annotated[
        Annotated[float, Meta(gt=0, le=YEARS)] | None,
        Meta(description="Give up older events (named in a gap event); null: never"),
    ] = None


class IncidentSettings(_Section, frozen=True):
    """How errors are folded into incidents."""

    fold: Annotated[bool, Meta(description="false: each callback is an event of its own")] = True
    first_window_seconds: Annotated[Seconds, Meta(description="First window; it doubles")] = 1.0
    max_window_seconds: Annotated[Seconds, Meta(description="Widest window")] = 60.0
    quiet_seconds: Annotated[Seconds, Meta(description="Quiet for so long resolves an incident")] = 300.0
    max_open: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Open incidents before they are folded wider")
    ] = 1000
    flapping_pauses: Annotated[
        int, Meta(ge=2, le=1_000_000, description="So many pauses are a pause/resume loop")
    ] = 3
    flapping_window_seconds: Annotated[Seconds, Meta(description="… within this time")] = 600.0


class HeartbeatSettings(_Section, frozen=True):
    """The sign of life."""

    interval_seconds: Annotated[
        float, Meta(ge=0, le=3600, description="Between two heartbeats; 0 is off")
    ] = 60.0


_LISTEN = r"^(\[[0-9a-fA-F:.]+\]|[^\[\]:]+):[0-9]{1,5}$|^$"


class Http(_Section, frozen=True):
    """The HTTP listener of /metrics, /livez and /readyz."""

    listen: Annotated[
        str,
        Meta(
            pattern=_LISTEN,
            description="host:port; empty is off; loopback unless something else must scrape it",
            examples=["127.0.0.1:9466", "[::1]:9466", "0.0.0.0:9466"],
        ),
    ] = "127.0.0.1:9466"
    allowed_hosts: Annotated[
        tuple[str, ...],
        Meta(
            description="Names that a listener on loopback answers to, beside IP addresses and localhost; "
            "any other listener answers to every name"
        ),
    ] = ()


class Control(_Section, frozen=True):
    """The Unix socket of `virtbus status` and `virtbus tap`."""

    socket: Annotated[str, Meta(description="Path of the socket; empty is off")] = "/run/virtbus/control.sock"


class Log(_Section, frozen=True):
    """The log on stderr."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="Least level")] = "info"
    format: Annotated[
        Literal["auto", "text", "json"], Meta(description="auto: text on a terminal, JSON otherwise")
    ] = "auto"


class ReactFleet(_Section, frozen=True):
    """What the operator knows of storage and racks, and no device tells."""

    local_paths: Annotated[
        tuple[str, ...], Meta(description="Folders (globs) that are the host's own disks, not a share")
    ] = ()
    shared_paths: Annotated[
        tuple[str, ...], Meta(description="Further mount points (globs) that are one share on every host")
    ] = ()
    groups: Annotated[
        dict[str, tuple[str, ...]],
        Meta(description="Storage systems: name = globs of addresses, pools and paths that belong to it"),
    ] = {}
    racks: Annotated[dict[str, str], Meta(description="Host = rack: hosts that share power or a switch")] = {}


class ReactNova(_Section, frozen=True):
    """`virtbus react --with nova`."""

    cloud: Annotated[str | None, Meta(description="Name in clouds.yaml; none: OS_* variables")] = None
    binary: Annotated[str, Meta(min_length=1, description="The service to disable")] = "nova-compute"


class ReactKubernetes(_Section, frozen=True):
    """`virtbus react --with kubernetes`."""

    kubeconfig: Annotated[Path_ | None, Meta(description="File; none: in the cluster, or the user's")] = None
    context: Annotated[str | None, Meta(description="Context of the kubeconfig")] = None
    taint: Annotated[str, Meta(min_length=1, description="Key of the NoSchedule taint")] = (
        "virtbus.io/storage-unhealthy"
    )
    events: Annotated[
        Literal["node", "vmi"],
        Meta(
            description="Where Kubernetes Events are written: on nodes; vmi: also on the "
            "VirtualMachineInstance of a guest in trouble (KubeVirt)"
        ),
    ] = "node"


class ReactMasakari(_Section, frozen=True):
    """`virtbus react --with masakari`."""

    cloud: Annotated[str | None, Meta(description="Name in clouds.yaml; none: OS_* variables")] = None
    send_report: Annotated[
        bool,
        Meta(description="Also send errors that were reported to the guest: Masakari restarts it for one"),
    ] = False


class ReactExec(_Section, frozen=True):
    """`virtbus react --with exec`."""

    command: Annotated[
        tuple[str, ...], Meta(description="Command (a list, no shell); the event is its standard input")
    ] = ()
    timeout_seconds: Annotated[Seconds, Meta(description="It is killed after so long")] = 60.0


class ReactWebhook(_Section, frozen=True):
    """`virtbus react --with webhook`."""

    url: Annotated[str | None, Meta(description="http:// or https:// address to POST to")] = None
    token_file: Annotated[Path_ | None, Meta(description="File with a bearer token, read each time")] = None
    ca_file: Annotated[Path_ | None, Meta(description="CA certificates (PEM); default: the system's")] = None
    content_mode: Annotated[Literal["binary", "structured"], Meta(description="CloudEvents content mode")] = (
        "binary"
    )
    timeout_seconds: Annotated[Seconds, Meta(description="For an answer")] = 10.0


class React(_Section, frozen=True):
    """`virtbus react`: how a control plane is told, and how often."""

    state_dir: Annotated[Path_ | None, Meta(description="Folder of its state; none: state_dir/react")] = None
    publishers: Annotated[
        tuple[str, ...],
        Meta(
            description="Broker users (globs) whose events are believed; {host} is the event's host name",
            examples=[["virtbus-{host}"]],
        ),
    ] = ()
    types: Annotated[
        tuple[str, ...], Meta(description="Event types for exec and webhook (the last words suffice)")
    ] = ("io_error.v1", "io_error_resolved.v1", "gap.v1")
    when: Annotated[
        Literal["host", "undetermined", "any"],
        Meta(
            description="A host is held back when it is at fault; also when that can't be told; "
            "or for any trouble, a backend's too"
        ),
    ] = "host"
    min_guests: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Guests in trouble before a host is held back")
    ] = 2
    raise_seconds: Annotated[
        float, Meta(ge=0, le=7 * DAY, description="Trouble lasts so long before a host is held")
    ] = 30.0
    clear_seconds: Annotated[
        float,
        Meta(
            ge=0,
            le=7 * DAY,
            description="Well for so long before it is released; doubles when it comes again",
        ),
    ] = 300.0
    max_share: Annotated[
        float, Meta(gt=0, le=1, description="Share of all hosts that may be held at once (one always may)")
    ] = 0.1
    actions_per_minute: Annotated[float, Meta(gt=0, le=1_000_000, description="Upper limit")] = 600.0
    listen: Annotated[
        str,
        Meta(
            pattern=_LISTEN,
            description="host:port of its /metrics, /livez and /readyz; empty is off",
            examples=["127.0.0.1:9467", "0.0.0.0:9467"],
        ),
    ] = "127.0.0.1:9467"
    fleet_listen: Annotated[
        str, Meta(pattern=_LISTEN, description="The same of `virtbus fleet --write`; empty is off")
    ] = "127.0.0.1:9468"
    drills: Annotated[
        bool, Meta(description="Act on replayed errors (drills, recordings) too, as if they were live")
    ] = False
    hosts: Annotated[
        dict[str, str], Meta(description="libvirt's host name = the control plane's, where they differ")
    ] = {}
    fleet: Annotated[ReactFleet, Meta(description="What is known of storage and racks")] = ReactFleet()
    nova: Annotated[ReactNova, Meta(description="OpenStack Nova")] = ReactNova()
    kubernetes: Annotated[ReactKubernetes, Meta(description="Kubernetes")] = ReactKubernetes()
    masakari: Annotated[ReactMasakari, Meta(description="OpenStack Masakari")] = ReactMasakari()
    exec: Annotated[ReactExec, Meta(description="A command an event")] = ReactExec()
    webhook: Annotated[ReactWebhook, Meta(description="An HTTP request an event")] = ReactWebhook()
    options: Annotated[
        dict[str, str], Meta(description="For integrations of third parties, handed over as they are")
    ] = {}


class Config(_Section, frozen=True):
    """All settings of virtbus."""

    state_dir: Annotated[Path_, Meta(description="Folder of agent-id, spool and lock")] = "/var/lib/virtbus"
    drain_seconds: Annotated[
        float, Meta(ge=0, le=3600, description="After SIGTERM, publish what is there for so long at most")
    ] = 10.0
    libvirt: Annotated[Libvirt, Meta(description="The hypervisor")] = Libvirt()
    bus: Annotated[Bus, Meta(description="The broker")] = Bus()
    spool: Annotated[SpoolSettings, Meta(description="The outbox")] = SpoolSettings()
    incidents: Annotated[IncidentSettings, Meta(description="Folding")] = IncidentSettings()
    heartbeat: Annotated[HeartbeatSettings, Meta(description="The sign of life")] = HeartbeatSettings()
    http: Annotated[Http, Meta(description="The HTTP listener")] = Http()
    control: Annotated[Control, Meta(description="The control socket")] = Control()
    react: Annotated[React, Meta(description="virtbus react")] = React()
    log: Annotated[Log, Meta(description="The log")] = Log()


# ------------------------------------------------------------------------------------------ loading


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, where each value that is not a default comes from, and the file that was read."""

    config: Config
    origins: Mapping[str, str]
    file: Path | None


def json_schema() -> dict[str, Any]:
    """The configuration's JSON schema (2020-12): what `virtbus config schema` prints."""
    schema = msgspec.json.schema(Config)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "virtbus configuration",
        **schema,
    }


def load(
    *,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Loaded:
    """Read and check all settings.

    `file` must exist when it is named; without it DEFAULT_FILE is read if it is there. `flags` maps
    dotted keys ("bus.url") to values; None means not given.

    Raises ConfigError with one line a problem, InputMissing when the named file can't be read.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    problems: list[str] = []

    path = file if file is not None else DEFAULT_FILE
    used: Path | None = None
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except FileNotFoundError:
        if file is not None:
            raise InputMissing(
                f"configuration file {path} does not exist; name another with --config"
            ) from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 text ({error})"
        raise InputMissing(
            f"configuration file {path} can't be read: {why}; fix it, or name another with --config"
        ) from error
    else:
        used = path
        try:
            merged = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from error
        lines = _lines_of_keys(text)
        for key, _ in _leaves(merged):
            origins[key] = f"{path}:{lines[key]}" if key in lines else str(path)

    schema = json_schema()
    for name, raw in sorted((environment if environment is not None else os.environ).items()):
        if not name.startswith(ENVIRONMENT_PREFIX) or _NOT_SETTINGS.fullmatch(name):
            continue
        key = name[len(ENVIRONMENT_PREFIX) :].lower().replace("__", ".")
        try:
            value = _from_text(schema, key, raw)
        except ValueError as error:
            problems.append(f"environment {name}: {error}")
            continue
        if not _set(merged, key, value):
            problems.append(f"environment {name}: {key.rpartition('.')[0]} is not a section")
        origins[key] = f"environment {name}"
    for key, given in (flags or {}).items():
        if given is not None:
            _set(merged, key, given)
            origins[key] = f"flag --{key.replace('.', '-').replace('_', '-')}"

    unusable = _unusable_text(merged, origins)  # the schema's check can't even read such text
    problems += unusable or _check(schema, merged, origins)
    if not problems:
        config = msgspec.convert(merged, Config)
        problems += list(_cross_checks(config, origins))
        if not problems:
            return Loaded(config, origins, used)
    raise ConfigError("\n".join(problems))


# Not settings: what is read elsewhere, what an exec hook is given, what the tests use, and what Kubernetes
# puts into every pod beside a Service that is named like us (VIRTBUS_SERVICE_HOST, VIRTBUS_PORT_9466_TCP, …).
_NOT_SETTINGS = re.compile(
    r"VIRTBUS_(CONFIG|DEBUG|CI|FAULTS|EVENT_.*|SOAK_.*|FUZZ_.*|TEST_.*|([A-Z0-9]+_)*SERVICE_(HOST|PORT(_.*)?)|([A-Z0-9]+_)*PORT(_.*)?)"
)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _lines_of_keys(text: str) -> dict[str, int]:
    """Dotted key → line number, for plain `[section]` and `key = value` lines (for messages only)."""
    section, found = "", {}
    for number, line in enumerate(text.splitlines(), 1):
        if head := re.match(r"\s*\[+\s*([\w.\"-]+)\s*\]+", line):
            section = head[1].replace('"', "") + "."
        elif item := re.match(r"\s*([\w.\"-]+)\s*=", line):
            found[section + item[1].replace('"', "")] = number
    return found


def _set(tree: dict[str, Any], key: str, value: object) -> bool:
    *parents, last = key.split(".")
    for part in parents:
        child = tree.setdefault(part, {})
        if not isinstance(child, dict):
            return False
        tree = child
    tree[last] = value
    return True


def _schema_at(schema: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    node: Mapping[str, Any] = _resolve(schema, schema)
    for part in key.split("."):
        properties = node.get("properties", {})
        if part in properties:
            node = _resolve(schema, properties[part])
        elif isinstance(node.get("additionalProperties"), dict):
            node = node["additionalProperties"]
        else:
            return None
    return node


def _resolve(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" in node:
        target: Mapping[str, Any] = schema["$defs"][node["$ref"].rpartition("/")[2]]
        return target
    return node


def _types(node: Mapping[str, Any]) -> set[str]:
    options = node.get("anyOf", [node])
    return {option["type"] for option in options if "type" in option}


def _from_text(schema: Mapping[str, Any], key: str, raw: str) -> object:
    """An environment variable's text as the type its setting has; what is not text is written as in TOML."""
    node = _schema_at(schema, key)
    if node is None:
        return raw  # unknown: the check names it
    types = _types(node)
    if "null" in types and raw == "":
        return None
    if types & {"string"} or not types:
        return raw
    try:
        (value,) = tomllib.loads(f"value = {raw}").values()  # a second line is no part of a value
        return value
    except (ValueError, RecursionError):
        wanted = " or ".join(sorted(types - {"null"}))
        # A table or list may hold secrets; a number does not.
        shown = "it" if types & {"object", "array"} else repr(raw)
        raise ValueError(f"{shown} is not a TOML {wanted}") from None


def knows(key: str) -> bool:
    """Whether a dotted key is a setting (or a place for free ones)."""
    return _schema_at(json_schema(), key) is not None


def from_text(key: str, raw: str) -> object:
    """A setting's value from text, as in the environment. Raises ConfigError naming the key."""
    try:
        return _from_text(json_schema(), key, raw)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def _check(schema: dict[str, Any], merged: dict[str, Any], origins: Mapping[str, str]) -> list[str]:
    problems = []
    for error in jsonschema_rs.validator_for(schema).iter_errors(merged):
        where = ".".join(str(part) for part in error.instance_path)
        unexpected = getattr(error.kind, "unexpected", None)
        if unexpected:
            section = _schema_at(schema, where) if where else _resolve(schema, schema)
            known = list((section or {}).get("properties", {}))
            for name in unexpected:
                key = f"{where}.{name}" if where else name
                problems.append(f"{_place(key, origins)}: unknown setting {key}{_did_you_mean(name, known)}")
            continue
        shown = repr(error.instance)
        if redaction.is_secret(where) or (
            "://" in shown and "@" in shown
        ):  # a URL, in whatever it was wrapped
            shown = redaction.HIDDEN
        message = error.message.replace(repr(error.instance), "").strip().strip('"')
        expected = _expected(schema, where) or message
        problems.append(f"{_place(where, origins)}: {where or 'the file'} = {shown}: expected {expected}")
    return sorted(problems)


def _unusable_text(merged: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    """Text that no file, socket or broker takes: it would break whoever uses it, on its own thread."""
    problems = []
    for key, value in _texts(merged):
        try:
            value.encode()
        except UnicodeEncodeError:
            problems.append(f"{_place(key, origins)}: {key} is not UTF-8 text")
        else:
            if "\0" in value:
                problems.append(f"{_place(key, origins)}: {key} holds a NUL character")
    return problems


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, Mapping):
        for name, value in node.items():
            yield from _texts(value, f"{key}.{name}" if key else name)
            yield from _texts(name, key)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value, key)


def _expected(schema: Mapping[str, Any], key: str) -> str | None:
    node = _schema_at(schema, key) if key else None
    if node is None:
        return None
    words = []
    for option in node.get("anyOf", [node]):
        if "enum" in option:
            words += [repr(value) for value in option["enum"] if value is not None]
            continue
        kind = {
            "string": "text",
            "number": "a number",
            "integer": "a whole number",
            "boolean": "true or false",
            "array": "a list",
            "object": "a table",
            "null": None,
        }.get(option.get("type", ""))
        if kind is None:
            continue
        limits = [
            f"{sign} {option[name]}"
            for name, sign in (
                ("minimum", "at least"),
                ("exclusiveMinimum", "more than"),
                ("maximum", "at most"),
            )
            if name in option
        ]
        if "pattern" in option:
            limits.append("of the form " + ", ".join(option.get("examples", [option["pattern"]])))
        if option.get("minLength"):
            limits.append("not empty")
        words.append(" ".join([kind, *limits]))
    return " or ".join(words) or None


def _did_you_mean(name: str, known: list[str]) -> str:
    import difflib  # here only: an agent whose settings are right never needs it

    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(sorted(known))}"


def _place(key: str, origins: Mapping[str, str]) -> str:
    while key:
        if key in origins:
            return origins[key]
        below = [place for name, place in origins.items() if name.startswith(f"{key}.")]
        if below:
            return below[0]
        key = key.rpartition(".")[0]
    return "configuration"


def _cross_checks(config: Config, origins: Mapping[str, str]) -> Iterator[str]:
    """Rules between settings."""
    bus = config.bus
    if bus.url is not None and bus.url_file is not None:
        yield (
            f"{_place('bus.url_file', origins)}: bus.url and bus.url_file are both set "
            f"(bus.url by {_place('bus.url', origins)}); keep one"
        )
    if (bus.tls.cert_file is None) != (bus.tls.key_file is None):
        yield f"{_place('bus.tls', origins)}: bus.tls.cert_file and bus.tls.key_file go together; set both"
    if bus.auth == "external" and bus.tls.cert_file is None:
        yield f"{_place('bus.auth', origins)}: bus.auth = 'external' needs bus.tls.cert_file and key_file"
    if len(bus.exchange.encode()) > 255:  # AMQP's short string
        yield f"{_place('bus.exchange', origins)}: bus.exchange is longer than 255 bytes of UTF-8"
    if config.incidents.max_window_seconds < config.incidents.first_window_seconds:
        yield (
            f"{_place('incidents', origins)}: incidents.max_window_seconds is less than "
            "incidents.first_window_seconds; make it at least as long"
        )
    if config.http.listen and not 0 < int(config.http.listen.rpartition(":")[2]) < 65536:
        where = _place("http.listen", origins)
        yield f"{where}: http.listen = {config.http.listen!r}: port out of 1 to 65535"


def read_secret(path: str, what: str) -> str:
    """The first line of a secret's file. Raises ConfigError naming `what` and the path, never the content."""
    try:
        return secret_text(Path(path)).splitlines()[0].strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what}: {path} can't be read: {why_unread(error)}") from error


def secret_text(path: Path) -> str:
    """The text of a secret's file without its last line end. Raises OSError; ValueError when it is empty."""
    text = path.read_text(encoding="utf-8-sig").rstrip("\r\n")
    if not text.strip():
        raise ValueError("it is empty; was the secret written to it?")
    return text


def why_unread(error: OSError | ValueError) -> str:
    """What keeps a secret's file from being used; never what is in it."""
    if isinstance(error, OSError):
        return f"{error.strerror}; check path and rights"
    return "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)


def bus_url(config: Config) -> str:
    """The bus URL, from the setting or its file. Raises ConfigError when there is none."""
    url = config.bus.url
    if url is None and config.bus.url_file is not None:
        url = read_secret(config.bus.url_file, "bus.url_file")
    if not url:
        raise ConfigError(
            "no bus URL: name one with --bus amqp://…|kafka://…|embedded:, VIRTBUS_BUS__URL, "
            f"or bus.url in {DEFAULT_FILE}"
        )
    return url


# ------------------------------------------------------------------------------------ what may be shown


def differences(old: Config, new: Config) -> list[str]:
    """The dotted keys whose values differ, sorted."""
    before, after = (dict(_leaves(msgspec.to_builtins(config))) for config in (old, new))
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def effective(config: Config) -> dict[str, Any]:
    """All settings as plain data, redacted: safe to print."""
    plain: dict[str, Any] = msgspec.to_builtins(config)

    def clean(node: Any, key: str) -> Any:
        if isinstance(node, dict):
            return {name: clean(value, f"{key}.{name}" if key else name) for name, value in node.items()}
        if isinstance(node, list | tuple):
            if key.endswith("command"):  # whatever stands behind the program may be a password or a token
                return [word if at == 0 else redaction.HIDDEN for at, word in enumerate(node)]
            return [clean(item, key) for item in node]
        if node is not None and redaction.is_secret(key):
            return redaction.HIDDEN
        return redaction.uri(node) if isinstance(node, str) and (key == "bus.url" or "://" in node) else node

    redacted: dict[str, Any] = clean(plain, "")
    return redacted


def exposed_secrets(loaded: Loaded) -> list[str]:
    """Secrets that another user of this host can read: what, where, and what to do; one line each."""
    plain, shown = (
        dict(_leaves(settings)) for settings in (msgspec.to_builtins(loaded.config), effective(loaded.config))
    )
    found = []
    for key, value in plain.items():
        origin = loaded.origins.get(key, loaded.origins.get(key.rpartition(".")[0], ""))
        if value is not None and key.endswith(("password_file", "url_file", "token_file", "key_file")):
            if _is_open(value):
                found.append(f"{key}: {value} can be read by every user: chmod o-r it")
        elif value in (None, [], shown[key]):
            continue
        elif origin.startswith("flag"):
            found.append(f"{key}: a secret in a flag shows in ps: put it into a file (bus.url_file, say)")
        elif loaded.file is not None and origin.startswith(str(loaded.file)) and _is_open(loaded.file):
            found.append(f"{key}: {origin} holds a secret and can be read by every user: chmod o-r it")
    return found


def _is_open(path: str | Path) -> bool:
    try:
        return bool(Path(path).stat().st_mode & 0o004)
    except OSError:
        return False
