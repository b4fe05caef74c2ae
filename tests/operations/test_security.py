"""What a security reviewer asks: do secrets leak, is TLS checked, can one host speak for another."""

from __future__ import annotations

import base64
import datetime
import io
import json
import os
import re
import shlex
import stat
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import amqp
import kombu
import pytest
import trustme
from confluent_kafka.admin import (
    AdminClient,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from tests.agent.process import COMMAND, AgentProcess, virtbus
from tests.brokers.rabbitmq import RabbitMQ
from tests.bus.test_amqp_rabbitmq import bind
from tests.faults.amqp_kit import close_connections
from tests.kafka.cluster import SCRAM_PASSWORD, SCRAM_USER, Cluster
from tests.kafka.help import read
from tests.ports import free_ports
from tests.waiting import wait_until
from virtbus import telemetry
from virtbus.bus import Bus, BusOptions, open_bus
from virtbus.commands.doctor import PROBE_TYPE
from virtbus.envelope import ROUTING_WORDS, routing_key
from virtbus.errors import BusDenied, BusUnavailable
from virtbus.model import Confirmed, Deferred, Unroutable
from virtbus.telemetry import METRICS
from virtbus.testing import ListFeed, records

SILENCE = "replay:/dev/null"

# ---------------------------------------------------------------------------------------- secrets

CANARY = "Kanar1en+vogel/9"


def leaks(text: str) -> list[str]:
    """The forms of the canary that stand in a text."""
    forms = (CANARY, quote(CANARY, safe=""), quote(CANARY), base64.b64encode(CANARY.encode()).decode())
    return [form for form in forms if form in text]


def secret_settings(folder: Path, bus_port: int) -> dict[str, tuple[str, dict[str, str]]]:
    """Name → (TOML, environment): together the canary stands in every field that can hold a secret."""
    (folder / "secret").write_text(f"{CANARY}\n")
    (folder / "url").write_text(f"amqp://agent:{quote(CANARY, safe='')}@127.0.0.1:{bus_port}//\n")
    (folder / "tell").write_text(f"#!/bin/sh\necho '{CANARY}'\n")
    (folder / "tell").chmod(0o755)
    secret = quote(CANARY, safe="")
    return {
        "url": (f'[bus]\nurl = "amqp://agent:{secret}@127.0.0.1:{bus_port}//"\n', {}),
        "raw url": (f'[bus]\nurl = "amqp://agent:{CANARY}@127.0.0.1:{bus_port}//"\n', {}),
        "url file": (f'[bus]\nurl_file = "{folder}/url"\n', {}),
        "environment": ("", {"VIRTBUS_BUS__URL": f"amqp://agent:{secret}@127.0.0.1:{bus_port}//"}),
        "several urls": (
            f'[bus]\nurl = "amqp://a:{secret}@127.0.0.1:{bus_port}//;amqp://b:{secret}@127.0.0.1:1//"\n', {},
        ),
        "query": (f'[bus]\nurl = "amqp://h:{bus_port}//?password={secret}"\n', {}),
        "password file": (
            f'[bus]\nurl = "amqp://agent@127.0.0.1:{bus_port}//"\npassword_file = "{folder}/secret"\n', {},
        ),
        "kafka options": (
            '[bus]\nurl = "kafka://127.0.0.1:1"\n[bus.kafka.options]\n'
            f'"sasl.password" = "{CANARY}"\n"ssl.key.password" = "{CANARY}"\n', {},
        ),
        "kafka password": (f'[bus]\nurl = "kafka://agent:{secret}@127.0.0.1:1"\n', {}),
        "oauth": (
            f'[bus]\nurl = "kafka://127.0.0.1:1"\n[bus.kafka]\nsasl_mechanism = "OAUTHBEARER"\n'
            f'oauth_token_file = "{folder}/secret"\n', {},
        ),
        "oauth command": (
            f'[bus]\nurl = "kafka://127.0.0.1:1"\n[bus.kafka]\nsasl_mechanism = "OAUTHBEARER"\n'
            f'oauth_token_command = ["{folder}/tell"]\n', {},
        ),
        "libvirt": (
            f'[libvirt]\nuri = "qemu+tcp://operator:{secret}@127.0.0.1:1/system"\n'
            f'[bus]\nurl = "amqp://127.0.0.1:{bus_port}//"\n', {},
        ),
        "oauth command's words": (
            f'[bus]\nurl = "kafka://127.0.0.1:1"\n[bus.kafka]\nsasl_mechanism = "OAUTHBEARER"\n'
            f'oauth_token_command = ["/bin/false", "Authorization: Basic {CANARY}"]\n', {},
        ),
        "hooks": (
            f'[bus]\nurl = "amqp://127.0.0.1:{bus_port}//"\n'
            f'[react.exec]\ncommand = ["/bin/cat", "--with", "{CANARY}"]\n'
            f'[react.webhook]\nurl = "https://127.0.0.1:1/?token={CANARY}"\n'
            f'[react.options]\n"x.password" = "{CANARY}"\n"x.url" = "https://u:{CANARY}@127.0.0.1:1"\n', {},
        ),
        "wrong type": (f'[bus]\nurl = ["amqp://agent:{CANARY}@h"]\npassword = "{CANARY}"\n', {}),
    }  # fmt: skip


PLACES = [
    "url", "raw url", "url file", "environment", "several urls", "query", "password file", "kafka options",
    "kafka password", "oauth", "oauth command", "oauth command's words", "libvirt", "hooks", "wrong type",
]  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_no_secret_is_printed_logged_or_measured(name: str, rabbitmq: RabbitMQ, tmp_path: Path) -> None:
    text, environment = secret_settings(tmp_path, rabbitmq.port)[name]
    file = tmp_path / "secrets.toml"
    file.write_text(text)
    common = ["--config", str(file), "--debug"]
    state = ["--state-dir", str(tmp_path / "state")]
    told = []
    for words in (
        ["config", "show", *common],
        ["config", "show", "--json", *common],
        ["config", "check", *common],
        ["doctor", "--timeout", "2", *common, *state],
        ["doctor", "--json", "--timeout", "2", *common, *state],
        ["consume", "--timeout", "1", *common],
        ["watch", "--timeout", "0.5", *common],
        ["react", "--with", "webhook", "--probe", *common],
        ["react", "--with", "exec", "--probe", *common],
    ):
        done = virtbus(*words, **environment)
        told.append(done.stdout + done.stderr)
    source = [] if name == "libvirt" else ["--libvirt", SILENCE]
    with _Run(tmp_path, [*common, *state, *source], environment) as agent:
        time.sleep(1.5)
        with suppress(OSError, AssertionError):
            told += [agent.get("/metrics")[1], agent.get("/readyz")[1], json.dumps(agent.status())]
            told.append(virtbus("status", "--control-socket", str(agent.socket)).stdout)
        told.append(agent.log)
    assert any(told)
    found = {form for text in told for form in leaks(text)}
    assert not found, [line for text in told for line in text.splitlines() if leaks(line)]


def test_a_password_in_a_flag_is_warned_of_and_not_told_to_who_asks_for_the_spool(
    rabbitmq: RabbitMQ, tmp_path: Path
) -> None:
    url = f"amqp://agent:{quote(CANARY, safe='')}@127.0.0.1:{rabbitmq.port}//"
    flags = ["--libvirt", SILENCE, "--bus", url, "--state-dir", str(tmp_path / "state")]
    with _Run(tmp_path, flags, {}) as agent:
        agent.until(lambda: agent.get("/livez"), "up")
        second = virtbus("run", *flags, "--http-listen", "", "--control-socket", "")
        told = second.stderr + virtbus("spool", "status", *flags[-2:]).stdout
        assert f"{agent.process.pid} (" in told
        assert "a secret in a flag shows in ps" in agent.log
        told += agent.log + "".join(path.read_text("latin-1") for path in (tmp_path / "state").iterdir())
    assert leaks(told) == []


class _Run(AgentProcess):
    """A run with words of our own; it may end at once."""

    def __init__(self, folder: Path, words: list[str], environment: dict[str, str]) -> None:
        self.folder, self.socket = folder, folder / "control.sock"
        self._log = folder / "agent.log"
        self.http = f"127.0.0.1:{free_ports(1)[0]}"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "run", *words, "--http-listen", self.http, "--control-socket", str(self.socket)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **environment},
            )  # fmt: skip


def test_files_and_sockets_are_for_their_owner_alone(tmp_path: Path) -> None:
    with AgentProcess(tmp_path, libvirt=SILENCE, bus=f"embedded://{tmp_path}/bus.db").ready() as agent:
        agent.until((tmp_path / "bus.db").exists, "the first event is published", 10)
        made = [agent.socket, tmp_path / "bus.db", agent.state_dir, *agent.state_dir.iterdir()]
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made}
        limits = Path(f"/proc/{agent.process.pid}/limits").read_text()
        status = Path(f"/proc/{agent.process.pid}/status").read_text()
    assert len(modes) >= 5
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o077} == {}
    assert "\nUmask:\t0077\n" in status
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)  # it would hold the password


# -------------------------------------------------------------------------------- bad certificates


def refusals(url: str, count: int = 3, **options: Any) -> int:
    """How many of so many attempts to publish were refused without a connection being made."""
    before = METRICS.bus_reconnects._value.get()
    refused = 0
    for _ in range(count):
        bus = open_bus(url, BusOptions(**options))
        try:
            outcomes = ListFeed(records(1)).publish(bus)
            assert not any(isinstance(outcome, Confirmed) for outcome in outcomes)
        except (BusDenied, BusUnavailable):
            refused += 1
        finally:
            bus.close()
    assert METRICS.bus_reconnects._value.get() == before, "an insecure connection was made"
    return refused


def test_rabbitmq_behind_a_bad_certificate_gets_no_connection(
    rabbitmq_alone: RabbitMQ, tmp_path: Path
) -> None:
    broker = rabbitmq_alone
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    with broker.server_certificate(host="another.example"):
        assert refusals(broker.tls_url(), tls_ca_file=broker.ca_file) == 3
    with broker.server_certificate(expired=True):
        assert refusals(broker.tls_url(), tls_ca_file=broker.ca_file) == 3
    assert refusals(broker.tls_url(), tls_ca_file=tmp_path / "other.pem") == 3
    assert refusals(broker.tls_url()) == 3  # the system's authorities do not know it either


def serve(cluster: Cluster, **issue: Any) -> None:
    """Give the brokers another certificate, of an authority that the clients trust, before they start."""
    authority = trustme.CA()
    issued = authority.issue_cert(issue.pop("host", "localhost"), **issue)
    authority.cert_pem.write_to_path(str(cluster.folder / "trusted.pem"))
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (cluster.folder / "server.pem").write_bytes(pem + issued.cert_chain_pems[0].bytes())


@pytest.mark.slow
@pytest.mark.kafka
@pytest.mark.parametrize("bad", ["host", "expired", "authority"])
def test_kafka_behind_a_bad_certificate_gets_no_connection(
    bad: str, kafka_cluster: Cluster, tmp_path: Path
) -> None:
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    options: dict[str, Any] = {"connect_timeout": 5.0}
    if bad == "authority":
        url = f"kafkas://{SCRAM_USER}:{SCRAM_PASSWORD}@{kafka_cluster.hosts('sasl_tls')}"
        assert refusals(url, 1, tls_ca_file=kafka_cluster.folder / "stranger-ca.pem",
                        sasl_mechanism="SCRAM-SHA-256", **options) == 1  # fmt: skip
        return
    cluster = Cluster(tmp_path / "bad")
    serve(cluster, **({"host": "another.example"} if bad == "host" else {"not_after": yesterday}))
    try:
        cluster.start()
        url = f"kafkas://{SCRAM_USER}:{SCRAM_PASSWORD}@{cluster.hosts('sasl_tls')}"
        options["tls_ca_file"] = cluster.folder / "trusted.pem"
        assert refusals(url, 1, sasl_mechanism="SCRAM-SHA-256", **options) == 1
    finally:
        cluster.stop()


# --------------------------------------------------------------------------------------- rotation


class Load:
    """Publishes as the agent does, on a thread, until all is confirmed."""

    def __init__(self, bus: Bus, count: int, rate: float) -> None:
        self.items = records(count, keys=20)
        self._bus, self._rate = bus, rate
        self.feed = ListFeed()
        self.before = METRICS.bus_reconnects._value.get()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        waiting = list(self.items)
        began = time.monotonic()
        while waiting or len(self.feed):
            due = int((time.monotonic() - began) * self._rate) - (len(self.items) - len(waiting))
            for record in waiting[: max(0, due)]:
                self.feed.add(record)
            del waiting[: max(0, due)]
            with suppress(BusDenied, BusUnavailable):
                self.feed.publish(self._bus, again=True)
            self._bus.tick()
            time.sleep(0.02)
            if time.monotonic() - began > 60:
                return

    def confirmed(self) -> int:
        return sum(isinstance(outcome, Confirmed) for _, outcome in self.feed.outcomes)

    def end(self) -> tuple[int, int]:
        """(lost, connections made since the load began)."""
        self._thread.join(70)
        ids = {record.id for record, outcome in self.feed.outcomes if isinstance(outcome, Confirmed)}
        lost = len({record.id for record in self.items} - ids)
        return lost, int(METRICS.bus_reconnects._value.get() - self.before)


def test_a_rabbitmq_password_rotated_under_load_loses_nothing(
    rabbitmq: RabbitMQ, vhost: str, tmp_path: Path
) -> None:
    name = f"rotated-{vhost}"
    url = rabbitmq.user(name, vhost, configure=".*", write=".*", read=".*", password="first")
    bind(rabbitmq.url(vhost), "all")
    file = tmp_path / "password"
    file.write_text("first")
    bus = open_bus(url, BusOptions(username=name, password_file=file))
    load = Load(bus, 2000, 500)
    wait_until(lambda: load.confirmed() > 300)
    file.write_text("second")
    rabbitmq.user(name, vhost, configure=".*", write=".*", read=".*", password="second")
    close_connections(rabbitmq, vhost)  # who was logged in with the old one is thrown out
    lost, connections = load.end()
    bus.close()
    assert lost == 0
    assert 1 <= connections <= 2  # the first is no reconnect
    assert rabbitmq.queues(vhost)["all"] >= 2000


def test_certificates_rotated_under_load_lose_nothing(rabbitmq_alone: RabbitMQ, tmp_path: Path) -> None:
    broker = rabbitmq_alone
    vhost = broker.vhost()
    name = f"agent-{vhost}"
    broker.user(name, vhost, configure=".*", write=".*", read=".*")
    bind(broker.url(vhost), "all")

    def install() -> None:
        made = broker.client_certificate(name)
        for path in (made.certfile, made.keyfile):
            (tmp_path / path.name).write_bytes(path.read_bytes())

    install()
    bus = open_bus(
        broker.tls_url(vhost),
        BusOptions(
            auth="external",
            username=name,
            tls_ca_file=broker.ca_file,
            tls_cert_file=tmp_path / f"client-{name}.pem",
            tls_key_file=tmp_path / f"client-{name}.key",
        ),
    )
    load = Load(bus, 2000, 500)
    wait_until(lambda: load.confirmed() > 300)
    install()
    with broker.server_certificate():  # a new one, of the same authority
        close_connections(broker, vhost)
        lost, connections = load.end()
    bus.close()
    assert lost == 0
    assert 1 <= connections <= 2


@pytest.mark.slow
def test_a_kafka_password_rotated_under_load_loses_nothing(
    own_kafka: Cluster, kafka_topic: str, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text(SCRAM_PASSWORD)
    options = BusOptions(
        topic=kafka_topic, username=SCRAM_USER, password_file=file, sasl_mechanism="SCRAM-SHA-256"
    )
    bus = open_bus(f"kafka://{own_kafka.hosts('sasl')}", options)
    load = Load(bus, 3000, 200)
    wait_until(lambda: load.confirmed() > 200)
    client = AdminClient({"bootstrap.servers": own_kafka.hosts(), "log_level": 0})
    change = UserScramCredentialUpsertion(
        SCRAM_USER, ScramCredentialInfo(ScramMechanism.SCRAM_SHA_256, 4096), b"a-new-one"
    )
    for future in client.alter_user_scram_credentials([change]).values():
        future.result(10)
    file.write_text("a-new-one")
    broker = own_kafka.brokers[0]
    own_kafka.kill(broker)  # so that the new one is needed
    own_kafka.restart(broker)
    lost, connections = load.end()
    bus.close()
    assert lost == 0
    assert 1 <= connections <= 2
    assert len({message.key() for message in read(own_kafka.url, kafka_topic, 3000)}) == 20


# ------------------------------------------------------------------------- one credential a host

SECURITY = Path(__file__).parents[2] / "docs" / "security.md"
AGENT = "5f1c2d3e-4b5a-4c6d-8e7f-901234567890"
OTHER = "11111111-2222-4333-8444-555555555555"


def commands(heading: str) -> list[list[str]]:
    """The commands of the console block below a heading of docs/security.md."""
    section = SECURITY.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    block = re.search(r"```console\n(.*?)```", section, re.DOTALL)
    assert block, heading
    text = block[1].replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


def agents_user(rabbitmq: RabbitMQ, vhost: str) -> str:
    """Run the commands of docs/security.md, as they stand there; the user whose password is s3cret."""
    user = f"agent-{vhost}"
    for words in commands("RabbitMQ: one user per host"):
        assert words[0] == "rabbitmqctl"
        mine = {"compute-7": user, "virtbus": vhost, "SECRET": "s3cret"}
        rabbitmq.rabbitmqctl(
            *(mine.get(word, word).replace("AGENT-ID", re.escape(AGENT)) for word in words[1:])
        )
    return user


def test_a_documented_right_is_for_each_kind_of_event_that_an_agent_sends_and_for_no_other_word() -> None:
    probe = routing_key({"type": PROBE_TYPE, "source": AGENT, "partitionkey": AGENT}).partition(".")[0]
    for name in ("security.md", "fleet.md"):
        (words,) = re.findall(r"\^\(([a-z0-9_|]+)\)\\\.", SECURITY.with_name(name).read_text())
        assert set(words.split("|")) == {*ROUTING_WORDS.values(), probe}


def test_doctor_with_the_documented_rights_alone_sends_its_probe(
    rabbitmq: RabbitMQ, vhost: str, tmp_path: Path
) -> None:
    user = agents_user(rabbitmq, vhost)
    bind(rabbitmq.url(vhost), "all")
    config = tmp_path / "virtbus.toml"
    config.write_text("[bus]\ndeclare = false\n")

    def round_trip(agent_id: str) -> dict[str, str]:
        (tmp_path / "agent-id").write_text(f"{agent_id}\n")
        done = virtbus(
            "doctor", "--json", "--config", str(config), "--state-dir", str(tmp_path),
            "--libvirt", SILENCE, "--bus", rabbitmq.url(vhost, user, "s3cret"),
        )  # fmt: skip
        (found,) = (each for each in json.loads(done.stdout)["checks"] if each["name"] == "bus round trip")
        return found  # type: ignore[no-any-return]

    assert round_trip(AGENT)["status"] == "ok"
    stranger = round_trip(OTHER)
    assert stranger["status"] == "warning"
    assert "refuses its routing key" in stranger["summary"]
    assert "docs/security.md" in stranger["remedy"]


def test_a_host_cant_speak_for_another_on_rabbitmq(rabbitmq: RabbitMQ, vhost: str) -> None:
    user = agents_user(rabbitmq, vhost)
    bind(rabbitmq.url(vhost), "all")
    own, spoof = records(2, keys=2)
    own = own._replace(attributes={**own.attributes, "source": f"/virtbus/agents/{AGENT}"})
    spoof = spoof._replace(attributes={**spoof.attributes, "source": f"/virtbus/agents/{OTHER}"})
    bus = open_bus(rabbitmq.url(vhost, user, "s3cret"), BusOptions(declare=False))
    feed = ListFeed([own, spoof])
    for _ in range(3):
        for record, outcome in bus.publish(feed):
            feed.settle(record, outcome, again=isinstance(outcome, Deferred))
    bus.close()
    verdicts = {record.id: outcome for record, outcome in feed.outcomes}
    assert isinstance(verdicts[own.id], Confirmed)
    assert isinstance(verdicts[spoof.id], Unroutable)
    with kombu.Connection(rabbitmq.url(vhost)) as connection:
        queue = kombu.Queue("all", channel=connection.channel())
        arrived = {message.headers["ce-id"] for message in iter(lambda: queue.get(no_ack=True), None)}
    assert arrived == {own.id}

    forged = rabbitmq.url(vhost, user, "s3cret")
    with kombu.Connection(forged) as connection:
        message = amqp.Message(b"{}", user_id="somebody")
        connection.channel().basic_publish(message, "virtbus.events", f"io_error.{AGENT}.-")
        with pytest.raises(amqp.exceptions.PreconditionFailed, match="user_id"):
            connection.drain_events(timeout=5)
    with kombu.Connection(forged) as connection, pytest.raises(amqp.exceptions.AccessRefused):
        connection.channel().queue_declare("mine")


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_a_log_line_holds_no_control_characters_whatever_a_guest_is_called(fmt: str) -> None:
    stream = io.StringIO()
    telemetry.configure(fmt=fmt, stream=stream)
    try:
        telemetry.emit(telemetry.Notice("guest \x1b[31m\x9b2J\u202e\nINFO forged"))
    finally:
        telemetry.configure()
    (line,) = stream.getvalue().splitlines()
    assert line.isprintable()
    assert "forged" in line
