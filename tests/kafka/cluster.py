"""A real Apache Kafka of our own: KRaft, on loopback, on free ports, its data in a folder of the test's.

Every broker is tied to the process that started it (PR_SET_PDEATHSIG), so that none outlives even a test
run that is killed with SIGKILL; otherwise it ends by its pid.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from base64 import urlsafe_b64encode
from dataclasses import dataclass, field
from pathlib import Path

import trustme

from tests.ports import free_ports

HERE = Path(__file__).parent
CHECKOUT = HERE.parent.parent
POM = HERE / "pom.xml"
START_SECONDS = 180.0

PLAIN_USER, PLAIN_PASSWORD = "agent", "agent-secret"  # SASL/PLAIN
SCRAM_USER, SCRAM_PASSWORD = "scram-agent", "scram-secret"  # SCRAM-SHA-256 and -512
LIMITED_USER, LIMITED_PASSWORD = "limited", "limited-secret"  # SASL/PLAIN, named in ACLs by a test


class KafkaMissing(Exception):
    """What is needed to run a real Kafka is not on this machine; the text says what and how to get it."""


# Names another release of Kafka than pom.xml pins (`make brokers`).
VERSION = "VIRTBUS_TEST_KAFKA"


def kafka_version() -> str:
    """The version that pom.xml pins, or VERSION names."""
    if os.environ.get(VERSION):
        return os.environ[VERSION]
    namespace = {"m": "http://maven.apache.org/POM/4.0.0"}
    version = ElementTree.parse(POM).findtext("m:properties/m:kafka.version", namespaces=namespace)
    assert version
    return version


def jars() -> Path:
    """The folder with Kafka's jars, fetched by Maven on first use into the checkout's .cache."""
    pinned = hashlib.sha256(POM.read_bytes()).hexdigest()[:8]
    folder = CHECKOUT / ".cache" / f"kafka-{kafka_version()}-{pinned}"
    if (folder / "complete").exists():
        return folder
    if shutil.which("java") is None:
        raise KafkaMissing("a real Kafka needs Java 17 or later: apt-get install openjdk-17-jdk-headless")
    if shutil.which("mvn") is None:
        raise KafkaMissing(f"Kafka's jars come by Maven ({POM}): apt-get install maven")
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    command = ["mvn", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies"]
    command += [f"-Dkafka.version={kafka_version()}"]
    command += [f"-DoutputDirectory={partial}", "-DincludeScope=runtime"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0 or not any(partial.glob("kafka_2.13-*.jar")):
        raise KafkaMissing(
            f"Maven could not fetch Kafka's jars for {POM}: {(done.stdout + done.stderr)[-800:]}"
        )
    (partial / "complete").touch()
    try:
        partial.rename(folder)
    except OSError:  # another test process was faster
        shutil.rmtree(partial, ignore_errors=True)
    return folder


@dataclass
class Broker:
    """One broker process and its ports."""

    node: int
    folder: Path
    plain: int  # no TLS, no SASL
    sasl: int  # SASL without TLS: PLAIN, SCRAM-SHA-256, SCRAM-SHA-512, OAUTHBEARER (unsecured tokens)
    tls: int  # TLS, client certificate required
    sasl_tls: int  # SASL over TLS
    controller: int
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    log_mark: int = 0  # where the log of the running process begins

    @property
    def pid(self) -> int:
        """The pid of the running Java process."""
        assert self.process is not None
        return self.process.pid

    def log(self) -> str:
        """What the running process has said so far."""
        return (self.folder / "broker.log").read_bytes()[self.log_mark :].decode(errors="replace")


class Cluster:
    """A number of brokers that form one Kafka; each is broker and controller in one process."""

    def __init__(self, folder: Path, brokers: int = 1, settings: dict[str, str] | None = None) -> None:
        """Lay out configuration, certificates and data folders under `folder`; nothing runs yet."""
        self.folder = folder
        self.jars = jars()
        self.settings = settings or {}
        ports = free_ports(5 * brokers)
        self.brokers = [
            Broker(node + 1, folder / f"broker-{node + 1}", *ports[5 * node : 5 * node + 5])
            for node in range(brokers)
        ]
        # The first byte keeps it from beginning with "-", which Kafka's tool takes for a flag.
        self.cluster_id = urlsafe_b64encode(b"v" + os.urandom(15)).decode().rstrip("=")
        self._certificates()
        for broker in self.brokers:
            broker.folder.mkdir(parents=True)
            (broker.folder / "server.properties").write_text(self._properties(broker))
        self._format()

    # ---------------------------------------------------------------------------------------- life

    def start(self) -> Cluster:
        """Start every broker and wait until each answers."""
        for broker in self.brokers:
            self.spawn(broker)
        for broker in self.brokers:
            self.wait(broker)
        return self

    def spawn(self, broker: Broker) -> None:
        """Start one broker's process, without waiting for it."""
        command = ["setpriv", "--pdeathsig", "KILL", *self.java("-Xms64m", "-Xmx512m"), "kafka.Kafka"]
        command.append(str(broker.folder / "server.properties"))
        with (broker.folder / "broker.log").open("ab") as log:
            broker.log_mark = log.tell()
            broker.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=broker.folder
            )

    def wait(self, broker: Broker) -> None:
        """Wait until a broker says that it has started."""
        assert broker.process is not None
        deadline = time.monotonic() + START_SECONDS
        while "Kafka Server started" not in broker.log():
            if broker.process.poll() is not None:
                raise RuntimeError(f"Kafka broker {broker.node} ended at start:\n{broker.log()[-3000:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"Kafka broker {broker.node} did not start:\n{broker.log()[-3000:]}")
            time.sleep(0.05)

    def kill(self, broker: Broker) -> None:
        """SIGKILL one broker by its pid and wait for its end."""
        if broker.process is not None and broker.process.poll() is None:
            os.kill(broker.pid, signal.SIGKILL)
            broker.process.wait()

    def restart(self, broker: Broker) -> None:
        """Start a killed broker again on its data and wait until it answers."""
        self.spawn(broker)
        self.wait(broker)

    def stop(self) -> None:
        """End every broker; the data is a test's, so no clean shutdown is needed."""
        for broker in self.brokers:
            self.kill(broker)

    # --------------------------------------------------------------------------------------- facts

    def hosts(self, listener: str = "plain") -> str:
        """`host:port,host:port` of one listener: plain, sasl, tls or sasl_tls."""
        return ",".join(f"localhost:{getattr(broker, listener)}" for broker in self.brokers)

    @property
    def url(self) -> str:
        """The plain listeners as a bus URL."""
        return f"kafka://{self.hosts()}"

    @property
    def ca(self) -> Path:
        """The CA that signed the brokers' certificates."""
        return self.folder / "ca.pem"

    def java(self, *flags: str) -> list[str]:
        """The beginning of a java command with Kafka's class path."""
        classes = f"{self.jars}/*"
        quiet = "-Dorg.slf4j.simpleLogger.defaultLogLevel=info"
        return ["java", *flags, "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", quiet, "-cp", classes]

    # --------------------------------------------------------------------------------------- setup

    def _certificates(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        ca = trustme.CA()
        server = ca.issue_cert("localhost")
        client = ca.issue_cert("agent.example")
        stranger = trustme.CA()
        ca.cert_pem.write_to_path(str(self.ca))
        stranger.cert_pem.write_to_path(str(self.folder / "stranger-ca.pem"))
        server.private_key_and_cert_chain_pem.write_to_path(str(self.folder / "server.pem"))
        client.private_key_pem.write_to_path(str(self.folder / "client-key.pem"))
        client.cert_chain_pems[0].write_to_path(str(self.folder / "client.pem"))
        # Java reads PKCS#8 PEM only; trustme writes the traditional format.
        key = subprocess.run(
            ["openssl", "pkcs8", "-topk8", "-nocrypt", "-in", str(self.folder / "server.pem")],
            capture_output=True,
            check=True,
        ).stdout
        (self.folder / "server.pem").write_bytes(key + server.cert_chain_pems[0].bytes())

    def _properties(self, broker: Broker) -> str:
        names = {"PLAIN": broker.plain, "SASL": broker.sasl, "TLS": broker.tls, "SASLTLS": broker.sasl_tls}
        voters = ",".join(f"{each.node}@localhost:{each.controller}" for each in self.brokers)
        replicas = min(3, len(self.brokers))
        module = "org.apache.kafka.common.security"
        values = {
            "process.roles": "broker,controller",
            "node.id": str(broker.node),
            "controller.quorum.voters": voters,
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAIN",
            "listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in names.items())
            + f",CONTROLLER://127.0.0.1:{broker.controller}",
            "advertised.listeners": ",".join(f"{name}://localhost:{port}" for name, port in names.items()),
            "listener.security.protocol.map": "PLAIN:PLAINTEXT,SASL:SASL_PLAINTEXT,TLS:SSL,SASLTLS:SASL_SSL,"
            "CONTROLLER:PLAINTEXT",
            "log.dirs": str(broker.folder / "data"),
            "num.network.threads": "2",
            "num.io.threads": "4",
            "num.partitions": "1",
            "auto.create.topics.enable": "true",
            "group.initial.rebalance.delay.ms": "0",
            "offsets.topic.num.partitions": "3",
            "offsets.topic.replication.factor": str(replicas),
            "transaction.state.log.num.partitions": "1",
            "transaction.state.log.replication.factor": str(replicas),
            "transaction.state.log.min.isr": "1",
            "log.cleaner.enable": "false",
            "broker.session.timeout.ms": "3000",
            "broker.heartbeat.interval.ms": "500",
            "replica.lag.time.max.ms": "3000",
            "controller.quorum.election.timeout.ms": "1000",
            "controller.quorum.fetch.timeout.ms": "2000",
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self.folder / "server.pem"),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.ca),
            "listener.name.tls.ssl.client.auth": "required",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "allow.everyone.if.no.acl.found": "true",
            "super.users": f"User:ANONYMOUS;User:{PLAIN_USER}",
        }
        for listener in ("sasl", "sasltls"):
            jaas = f"listener.name.{listener}"
            users = f'user_{PLAIN_USER}="{PLAIN_PASSWORD}" user_{LIMITED_USER}="{LIMITED_PASSWORD}"'
            values[f"{jaas}.plain.sasl.jaas.config"] = f"{module}.plain.PlainLoginModule required {users};"
            for mechanism in ("scram-sha-256", "scram-sha-512"):
                values[f"{jaas}.{mechanism}.sasl.jaas.config"] = f"{module}.scram.ScramLoginModule required;"
            values[f"{jaas}.oauthbearer.sasl.jaas.config"] = (
                f"{module}.oauthbearer.OAuthBearerLoginModule required "
                'unsecuredLoginStringClaim_sub="broker";'
            )
        values |= self.settings
        return "".join(f"{key}={value}\n" for key, value in values.items())

    def _format(self) -> None:
        running = []
        for broker in self.brokers:
            command = [
                *self.java("-Xmx256m"),
                "kafka.tools.StorageTool",
                "format",
                f"--cluster-id={self.cluster_id}",
            ]
            command += ["-c", str(broker.folder / "server.properties")]
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512"):
                command += ["--add-scram", f"{mechanism}=[name={SCRAM_USER},password={SCRAM_PASSWORD}]"]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        for process in running:
            said, _ = process.communicate(timeout=START_SECONDS)
            if process.returncode != 0:
                raise RuntimeError(f"Kafka's storage could not be formatted:\n{said.decode()[-3000:]}")
