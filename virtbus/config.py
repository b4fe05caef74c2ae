"""The settings: one model gives the defaults, the JSON schema, the checks and the chart's values.

What stands below a setting is its description; that of a section is its class's. `loading` reads them.
"""

from __future__ import annotations

import ast
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from virtbus.errors import ConfigError

# Every number has an upper bound: what no wait, socket or file system takes would break a thread later.
DAY, YEARS = 86_400, 3_153_600_000  # seconds; a hundred years
Seconds = Annotated[float, Meta(gt=0, le=DAY)]
Count = Annotated[int, Meta(ge=1, le=YEARS)]
Text = Annotated[str, Meta(min_length=1)]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: unknown keys are errors."""


class OwnerRule(_Section, frozen=True):
    """Where a guest's owner stands in its `<metadata>`, for platforms virtbus does not know."""

    platform: Text
    """Name that goes into owner.platform"""
    namespace: Text
    """XML namespace of the metadata element"""
    id: str | None = None
    """Path below that element, e.g. 'owner/@uuid'"""
    name: str | None = None
    """Path of the guest's name there"""
    project_id: str | None = None
    """Path of the project's id"""
    project_name: str | None = None
    """Path of the project's name"""
    user_id: str | None = None
    """Path of the user's id"""
    user_name: str | None = None
    """Path of the user's name"""


class Discover(_Section, frozen=True):
    """Hypervisors that come and go, each behind a socket of its own."""

    preset: Literal["kubevirt"] | None = None
    """Where a platform keeps its sockets: kubevirt"""
    sockets: tuple[Annotated[str, Meta(pattern="^/[^/].*$", max_length=1024)], ...] = ()
    """Patterns of sockets (* matches within one name); links are not followed"""
    uri: Annotated[str, Meta(pattern=r"^[a-z]+(\+unix)?:///[^?#]+\?([^#]+&)?socket=\{socket\}(&[^#]+)?$")] = (
        "qemu+unix:///session?socket={socket}"
    )
    """libvirt connection URI of a socket that was found; {socket} stands for it"""
    host: str | None = None
    """Name of the host in events; default: the kernel's node name"""
    with_uri: bool = False
    """Observe the hypervisor of libvirt.uri as well"""

    @property
    def on(self) -> bool:
        """Whether sockets are looked for."""
        return self.preset is not None or bool(self.sockets)


class Libvirt(_Section, frozen=True):
    """The hypervisor to observe."""

    uri: Annotated[str, Meta(min_length=1, examples=["qemu:///system"])] = "qemu:///system"
    """libvirt connection URI"""
    optional: bool = False
    """This host may have no libvirt: ready, and not counted as cut off, until its first socket appears"""
    grace_seconds: Seconds = 1.0
    """How long a pause by I/O error waits for its own I/O-error event"""
    owner_rules: tuple[OwnerRule, ...] = ()
    """Further owners in guest metadata"""
    discover: Discover = Discover()


class Tls(_Section, frozen=True):
    """TLS towards the broker; host name verification is always on."""

    ca_file: Text | None = None
    """CA certificates (PEM); default: the system's"""
    cert_file: Text | None = None
    """Client certificate (PEM)"""
    key_file: Text | None = None
    """Client key (PEM)"""
    server_name: str | None = None
    """Name to verify when it differs from the URL's host"""


class KafkaTopic(_Section, frozen=True):
    """What a missing topic is created with."""

    partitions: Annotated[int, Meta(ge=1, le=100_000)] = 12
    """Number of partitions"""
    replication: Annotated[int, Meta(ge=-1, le=1000)] = -1
    """Replicas; -1 is the broker's default"""
    retention_seconds: Count | None = None
    """retention.ms in seconds"""
    min_insync_replicas: Count | None = None
    """min.insync.replicas"""


class Kafka(_Section, frozen=True):
    """Settings that only Kafka knows."""

    sasl_mechanism: Annotated[
        str | None, Meta(examples=["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"])
    ] = None
    """SASL mechanism; none without a user name"""
    oauth_token_file: Text | None = None
    """File with an OAuth bearer token"""
    oauth_token_command: tuple[str, ...] | None = None
    """Command (a list, no shell) that prints a bearer token"""
    topic: KafkaTopic = KafkaTopic()
    options: dict[str, str] = {}
    """Further librdkafka options, handed over as they are"""


class Bus(_Section, frozen=True):
    """The broker to publish to."""

    url: Annotated[
        str | None,
        Meta(
            examples=["amqps://virtbus@broker:5671//", "kafkas://broker1:9093,broker2:9093"],
            extra_json_schema={"writeOnly": True},
        ),
    ] = None
    """amqp://, amqps://, kafka://, kafkas:// or embedded:; several brokers by ';'"""
    url_file: Text | None = None
    """File that holds the URL (a mounted secret)"""
    username: str | None = None
    """User; default: the URL's"""
    password_file: Text | None = None
    """File with the password, read again at each connection"""
    auth: Literal["plain", "external"] = "plain"
    """AMQP: password, or client certificate (EXTERNAL)"""
    exchange: Annotated[str, Meta(min_length=1, max_length=255)] = "virtbus.events"
    """AMQP topic exchange"""
    topic: Text = "virtbus.events"
    """Kafka topic"""
    declare: bool = True
    """Declare the exchange / create the topic; false: operators own the topology"""
    window: Annotated[int, Meta(ge=1, le=65535)] = 256
    """Unconfirmed events at most"""
    content_mode: Literal["binary", "structured"] = "binary"
    """CloudEvents content mode"""
    heartbeat_seconds: Annotated[int, Meta(ge=0, le=60)] = 10
    """AMQP heartbeat; 0 is off"""
    connect_timeout_seconds: Seconds = 5.0
    """To connect and log in"""
    confirm_timeout_seconds: Seconds = 30.0
    """Without a confirm for so long, the connection is thrown away"""
    tls: Tls = Tls()
    kafka: Kafka = Kafka()


class SpoolLimits(_Section, frozen=True):
    """The durable outbox."""

    max_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 40)] = 256 << 20
    """Bytes of events it may hold"""
    max_age_seconds: Annotated[float, Meta(gt=0, le=YEARS)] | None = None
    """Give up older events (named in a gap event); null: never"""


class IncidentLimits(_Section, frozen=True):
    """How errors are folded into incidents."""

    fold: bool = True
    """false: each callback is an event of its own"""
    first_window_seconds: Seconds = 1.0
    """First window; it doubles"""
    max_window_seconds: Seconds = 60.0
    """Widest window"""
    quiet_seconds: Seconds = 300.0
    """Quiet for so long resolves an incident"""
    max_open: Annotated[int, Meta(ge=1, le=1_000_000)] = 1000
    """Open incidents before they are folded wider"""


class HeartbeatSettings(_Section, frozen=True):
    """The sign of life."""

    interval_seconds: Annotated[float, Meta(ge=0, le=3600)] = 60.0
    """Between two heartbeats; 0 is off"""


_LISTEN = r"^(\[[0-9a-fA-F:.]+\]|[^\[\]:]+):[0-9]{1,5}$|^$"


class Http(_Section, frozen=True):
    """The HTTP listener of /metrics, /livez and /readyz."""

    listen: Annotated[
        str, Meta(pattern=_LISTEN, examples=["127.0.0.1:9466", "[::1]:9466", "0.0.0.0:9466"])
    ] = "127.0.0.1:9466"
    """host:port; empty is off; loopback unless something else must scrape it"""
    allowed_hosts: tuple[str, ...] = ()
    """Names that a listener on loopback answers to, beside IP addresses and localhost; any other listener
    answers to every name"""


class Control(_Section, frozen=True):
    """The Unix socket of `virtbus status` and `virtbus tap`."""

    socket: str = "/run/virtbus/control.sock"
    """Path of the socket; empty is off"""


class Log(_Section, frozen=True):
    """The log on stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level"""
    format: Literal["auto", "text", "json"] = "auto"
    """auto: text on a terminal, JSON otherwise"""


class ReactFleet(_Section, frozen=True):
    """What the operator knows of storage and racks, and no device shows."""

    local_paths: tuple[str, ...] = ()
    """Folders (globs) that are the host's own disks, not a share"""
    shared_paths: tuple[str, ...] = ()
    """Further mount points (globs) that are one share on every host"""
    groups: dict[str, tuple[str, ...]] = {}
    """Storage systems: name = globs of addresses, pools and paths that belong to it"""
    racks: dict[str, str] = {}
    """Host = rack: hosts that share power or a switch"""


class ReactNova(_Section, frozen=True):
    """OpenStack Nova: `virtbus react --with nova`."""

    cloud: str | None = None
    """Name in clouds.yaml; none: OS_* variables"""
    binary: Text = "nova-compute"
    """The service to disable"""


# A name, with or without a DNS name before it: what Kubernetes takes for a taint's key.
_LABEL_KEY = r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"


class ReactKubernetes(_Section, frozen=True):
    """Kubernetes: `virtbus react --with kubernetes`."""

    kubeconfig: Text | None = None
    """File; none: in the cluster, or the user's"""
    context: str | None = None
    """Context of the kubeconfig"""
    taint: Annotated[str, Meta(pattern=_LABEL_KEY, max_length=317)] = "virtbus.io/storage-unhealthy"
    """Key of the NoSchedule taint"""
    events: Literal["node", "vmi"] = "node"
    """Where Kubernetes Events are written: on nodes; vmi: also on the VirtualMachineInstance of a guest in
    trouble (KubeVirt)"""


class ReactMasakari(_Section, frozen=True):
    """OpenStack Masakari: `virtbus react --with masakari`."""

    cloud: str | None = None
    """Name in clouds.yaml; none: OS_* variables"""
    send_report: bool = False
    """Also send errors that were reported to the guest: Masakari restarts it for one"""


class ReactExec(_Section, frozen=True):
    """A command for each event: `virtbus react --with exec`."""

    command: tuple[str, ...] = ()
    """Command (a list, no shell); the event is its standard input"""
    timeout_seconds: Seconds = 60.0
    """It is killed after so long"""


class ReactWebhook(_Section, frozen=True):
    """An HTTP request for each event: `virtbus react --with webhook`."""

    url: str | None = None
    """http:// or https:// address to POST to"""
    token_file: Text | None = None
    """File with a bearer token, read each time"""
    ca_file: Text | None = None
    """CA certificates (PEM); default: the system's"""
    content_mode: Literal["binary", "structured"] = "binary"
    """CloudEvents content mode"""
    timeout_seconds: Seconds = 10.0
    """For an answer"""


class HoldRules(_Section, frozen=True):
    """When a host is held and released: settings of `[react]`."""

    when: Literal["host", "undetermined", "any"] = "host"
    """A host is held back when it is at fault; also when that is unclear; or for any trouble, a
    backend's too"""
    min_guests: Annotated[int, Meta(ge=1, le=1_000_000)] = 2
    """Guests in trouble before a host is held that is not at fault (`when` undetermined or any)"""
    raise_seconds: Annotated[float, Meta(ge=0, le=7 * DAY)] = 30.0
    """Trouble lasts so long before a host is held"""
    clear_seconds: Annotated[float, Meta(ge=0, le=7 * DAY)] = 300.0
    """Well for so long before it is released; doubles when it comes again"""
    max_share: Annotated[float, Meta(gt=0, le=1)] = 0.1
    """Share of all hosts that may be held at once (one always may)"""


class React(HoldRules, frozen=True):
    """`virtbus react`: when and how often a control plane is called."""

    state_dir: Text | None = None
    """Folder of its state; none: state_dir/react"""
    publishers: Annotated[tuple[str, ...], Meta(examples=[["virtbus-{host}"]])] = ()
    """Broker users (globs) whose events are believed; {host} is the event's host name"""
    types: tuple[str, ...] = ("io_error.v1", "io_error_resolved.v1", "gap.v1")
    """Event types for exec and webhook (the last words suffice)"""
    actions_per_minute: Annotated[float, Meta(gt=0, le=1_000_000)] = 600.0
    """Upper limit"""
    listen: Annotated[str, Meta(pattern=_LISTEN, examples=["127.0.0.1:9467", "0.0.0.0:9467"])] = (
        "127.0.0.1:9467"
    )
    """host:port of its /metrics, /livez and /readyz; empty is off"""
    fleet_listen: Annotated[str, Meta(pattern=_LISTEN)] = "127.0.0.1:9468"
    """The same of `virtbus fleet --write`; empty is off"""
    drills: bool = False
    """Act on replayed errors (drills, recordings) too, as if they were live"""
    hosts: dict[str, str] = {}
    """libvirt's host name = the control plane's, where they differ"""
    fleet: ReactFleet = ReactFleet()
    nova: ReactNova = ReactNova()
    kubernetes: ReactKubernetes = ReactKubernetes()
    masakari: ReactMasakari = ReactMasakari()
    exec: ReactExec = ReactExec()
    webhook: ReactWebhook = ReactWebhook()
    options: dict[str, str] = {}
    """For integrations of third parties, handed over as they are"""


class Config(_Section, frozen=True):
    """All settings of virtbus."""

    state_dir: Text = "/var/lib/virtbus"
    """Folder of agent-id, spool and lock"""
    drain_seconds: Annotated[float, Meta(ge=0, le=3600)] = 10.0
    """After SIGTERM, publish what is there for so long at most"""
    libvirt: Libvirt = Libvirt()
    bus: Bus = Bus()
    spool: SpoolLimits = SpoolLimits()
    incidents: IncidentLimits = IncidentLimits()
    heartbeat: HeartbeatSettings = HeartbeatSettings()
    http: Http = Http()
    control: Control = Control()
    react: React = React()
    log: Log = Log()


def json_schema(*, described: bool = True) -> dict[str, Any]:
    """The configuration's JSON schema (2020-12): what `virtbus config schema` prints."""
    schema: dict[str, Any] = msgspec.json.schema(Config)
    if described:  # what stands below each setting, also of a section that another one begins with
        parsed = ast.parse(Path(__file__).read_text(encoding="utf-8")).body
        sections = {node.name: node for node in parsed if isinstance(node, ast.ClassDef)}
        for section, definition in schema["$defs"].items():
            bases = [sections[ast.unparse(base)] for base in sections[section].bases]
            settings = definition["properties"]
            for setting, text in chain(*(pairwise(each.body) for each in (*bases, sections[section]))):
                if isinstance(setting, ast.AnnAssign) and isinstance(text, ast.Expr):
                    name, words = ast.unparse(setting.target), str(ast.literal_eval(text.value)).split()
                    settings[name] = {"description": " ".join(words), **settings[name]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "virtbus configuration",
        **schema,
    }


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
