"""A real RabbitMQ node of the tests' own: Debian's package, own port, node name, cookie, epmd and folders.

    broker = RabbitMQ.shared(folder)      # the first caller starts it, the others join
    broker = RabbitMQ.shared(folder, root=suite_root("trixie", RABBITMQ))   # another release of it
    url = broker.url(broker.vhost())      # a virtual host for one test: nothing to clean up
    broker.close()                        # the last one to let go ends it, also by being killed

Ready in about 5 seconds, once a test run. Orders to the node go through erl_call, in 20 ms each, where
rabbitmqctl takes more than a second.
"""

from __future__ import annotations

import datetime
import fcntl
import itertools
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import amqp
import trustme

from tests import waiting
from tests.brokers.keeper import Hold
from tests.lab import chroot
from tests.ports import free_ports

# Not the programs of the same names in /usr/sbin: those change to the user rabbitmq.
BIN = Path("/usr/lib/rabbitmq/bin")
COOKIE = "virtbustests"
READY_SECONDS = 180

# Names a Debian suite: its RabbitMQ is used wherever no other is asked for (`make brokers`).
SUITE = "VIRTBUS_TEST_RABBITMQ"

# Runs a program of another root file system, which sees this machine's processes, devices and the node's
# folder; the mounts are its own and go when it ends.
INSIDE = """\
root=$1 folder=$2; shift 2
for each in proc sys dev; do mount --rbind /$each "$root/$each"; done
mount -t tmpfs node "$root/tmp"
mkdir -p "$root$folder"
mount --bind "$folder" "$root$folder"
exec chroot "$root" "$@"
"""

CONFIG = """\
listeners.tcp.1 = 127.0.0.1:{port}
listeners.ssl.1 = 127.0.0.1:{tls_port}
ssl_options.cacertfile = {folder}/tls/ca.pem
ssl_options.certfile = {folder}/tls/server.pem
ssl_options.keyfile = {folder}/tls/server.key
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = false
ssl_cert_login_from = common_name
auth_mechanisms.1 = PLAIN
auth_mechanisms.2 = AMQPLAIN
auth_mechanisms.3 = EXTERNAL
log.file.level = info
disk_free_limit.absolute = 50MB
"""


class BrokerError(Exception):
    """The broker for the tests failed: what was tried, and what it said."""


def default_root() -> Path | None:
    """The root file system that SUITE names, made if need be; None: this machine's own."""
    suite = os.environ.get(SUITE)
    return chroot.suite_root(suite, chroot.RABBITMQ) if suite else None


def missing() -> list[str]:
    """What this machine lacks to run a node, in words; empty when it can."""
    if os.environ.get(SUITE):
        return chroot.missing()
    lacks = []
    if not (BIN / "rabbitmq-server").exists():
        lacks.append("RabbitMQ (Debian package rabbitmq-server)")
    if shutil.which("erl_call") is None:
        lacks.append("erl_call (Debian package erlang-base)")
    return lacks


@dataclass(frozen=True)
class Certificate:
    """A client's certificate for TLS: files for `ssl.SSLContext.load_cert_chain` or a client's options."""

    name: str
    certfile: Path
    keyfile: Path


@dataclass
class RabbitMQ:
    """One node. `port` speaks AMQP 0-9-1 on 127.0.0.1, `tls_port` the same over TLS.

    The server's certificate is for `localhost` alone: `127.0.0.1` is the wrong host name. A client may show
    a certificate (EXTERNAL logs in as its common name) or give a password.
    """

    folder: Path
    port: int
    tls_port: int
    dist_port: int
    epmd_port: int
    node: str
    hold: Hold
    root: Path | None = None
    wrapper: int = 0
    _vhosts: Iterator[int] = field(default_factory=itertools.count)
    _callers: Iterator[int] = field(default_factory=itertools.count)

    # -- life

    @classmethod
    def shared(cls, folder: Path, root: Path | None = None) -> RabbitMQ:
        """The node in `folder`: started by the first process that asks, joined by the others.

        `root` is the root file system that RabbitMQ comes from: by default this machine's, or SUITE's.
        """
        root = root or default_root()
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            generations = sorted(folder.glob("node-*"))
            for home in generations[-1:]:
                with suppress(OSError):  # it has ended, or is about to
                    facts = json.loads((home / "node.json").read_text())
                    return cls(folder=home, hold=Hold(home), root=root, **facts)
            return cls._first(folder / f"node-{len(list(folder.iterdir())):03}-{os.getpid()}", root)

    @classmethod
    def _first(cls, home: Path, root: Path | None) -> RabbitMQ:
        ports = free_ports(4)
        facts: dict[str, Any] = dict(zip(("port", "tls_port", "dist_port", "epmd_port"), ports, strict=True))
        facts["node"] = f"virtbus{ports[0]}@localhost"
        broker = cls(folder=home, hold=Hold.first(home), root=root, **facts)
        broker._prepare()
        broker.start()
        (home / "node.json").write_text(json.dumps(facts | {"wrapper": broker.wrapper}))
        return broker

    def running(self) -> bool:
        """Whether it takes connections."""
        return self._listens(self.port)

    def close(self) -> None:
        """Let go of it. The last process to do so ends the node."""
        self.hold.close()

    def start(self) -> None:
        """Start the node and wait until it takes connections. What was confirmed before is still there."""
        until = time.monotonic() + READY_SECONDS
        self.wrapper = self.hold.ask(
            start=self._inside(str(BIN / "rabbitmq-server")),
            env=self._environment(),
            log=str(self.folder / "server.log"),
        )["pid"]
        while not (self._listens(self.port) and self._listens(self.tls_port)):
            if not self.hold.ask(alive=self.wrapper)["alive"]:
                raise BrokerError(f"RabbitMQ ended at its start: {self.log()[-2000:]}")
            if time.monotonic() > until:
                raise BrokerError(f"RabbitMQ is not ready after {READY_SECONDS} s: {self.log()[-2000:]}")
            time.sleep(0.05)

    def kill(self, number: int = signal.SIGKILL, *, flush: bool = True) -> None:
        """Kill the node and wait until its port is closed.

        `flush` writes the definitions of queues and bindings to disk first: RabbitMQ keeps them in memory
        for a moment, and a queue declared just before the kill would be gone (seen with 3.10.8).
        """
        if flush:
            self.eval("(catch mnesia:sync_log()), ok.")  # 4.3 has no Mnesia, and nothing to flush
        os.kill(self.pid, number)
        wait_until(lambda: not self._listens(self.port), "RabbitMQ's port is closed", 30)
        # Its name must be free at epmd too, or a restart refuses.
        wait_until(lambda: not self.hold.ask(alive=self.wrapper)["alive"], "RabbitMQ has ended", 30)

    def restart(self) -> None:
        """End the node in good order (SIGTERM), if it runs, and start it again."""
        if self.running():
            self.kill(signal.SIGTERM)
        self.start()

    @property
    def pid(self) -> int:
        """The PID of the Erlang VM."""
        return int((self.folder / "pid").read_text())

    def version(self) -> str:
        """RabbitMQ's own version."""
        return self.eval("{ok, V} = application:get_key(rabbit, vsn), list_to_atom(V).").strip("'")

    # -- what a test asks for

    def url(
        self, vhost: str = "/", user: str = "guest", password: str = "guest", host: str = "127.0.0.1"
    ) -> str:
        """An amqp:// URL of this node."""
        return f"amqp://{quote(user)}:{quote(password)}@{host}:{self.port}/{quote(vhost, safe='')}"

    def tls_url(
        self, vhost: str = "/", user: str = "guest", password: str = "guest", host: str = "localhost"
    ) -> str:
        """An amqps:// URL of this node; with host="127.0.0.1" the certificate does not fit the name."""
        return f"amqps://{quote(user)}:{quote(password)}@{host}:{self.tls_port}/{quote(vhost, safe='')}"

    def vhost(self) -> str:
        """A new virtual host for one test; guest has all permissions in it."""
        name = f"test-{os.getpid()}-{next(self._vhosts)}"
        self.eval(
            f'rabbit_vhost:add(<<{erlang(name)}>>, <<"tests">>), '
            f"rabbit_auth_backend_internal:set_permissions("
            f'<<"guest">>, <<{erlang(name)}>>, <<".*">>, <<".*">>, <<".*">>, <<"tests">>).'
        )
        return name

    def drop_vhost(self, vhost: str) -> None:
        """Delete a virtual host with all that is in it; its connections are closed."""
        self.eval(f'rabbit_vhost:delete(<<{erlang(vhost)}>>, <<"tests">>).')

    def user(
        self, name: str, vhost: str, *, configure: str = "", write: str = "", read: str = "",
        password: str = "secret",
    ) -> str:  # fmt: skip
        """Make the user (or set its password) with these permissions in `vhost`; the amqp:// URL for it."""
        self.eval(
            f"U = <<{erlang(name)}>>, P = <<{erlang(password)}>>, "
            "case rabbit_auth_backend_internal:exists(U) of "
            'true -> rabbit_auth_backend_internal:change_password(U, P, <<"tests">>); '
            'false -> rabbit_auth_backend_internal:add_user(U, P, <<"tests">>) end.'
        )
        self.permit(name, vhost, configure=configure, write=write, read=read)
        return self.url(vhost, name, password)

    def permit(self, name: str, vhost: str, *, configure: str = "", write: str = "", read: str = "") -> None:
        """Set a user's permissions in `vhost`: regular expressions of resource names, "" for none."""
        rights = ", ".join(f"<<{erlang(each)}>>" for each in (configure, write, read))
        self.eval(
            f"rabbit_auth_backend_internal:set_permissions("
            f'<<{erlang(name)}>>, <<{erlang(vhost)}>>, {rights}, <<"tests">>).'
        )

    def permit_topic(self, name: str, vhost: str, exchange: str, *, write: str = "", read: str = "") -> None:
        """Restrict a user to routing keys of a topic exchange, which is made for it: regular expressions."""
        with amqp.Connection(f"127.0.0.1:{self.port}", virtual_host=vhost) as connection:  # for 4.3
            connection.channel().exchange_declare(exchange, "topic", durable=True, auto_delete=False)
        rights = ", ".join(f"<<{erlang(each)}>>" for each in (write, read))
        self.eval(
            f"rabbit_auth_backend_internal:set_topic_permissions("
            f'<<{erlang(name)}>>, <<{erlang(vhost)}>>, <<{erlang(exchange)}>>, {rights}, <<"tests">>).'
        )

    def policy(self, vhost: str, pattern: str, apply_to: str = "queues", **definition: object) -> None:
        """Set a policy, such as max_length=10, overflow="reject-publish" (underscores become hyphens)."""
        words = json.dumps({key.replace("_", "-"): value for key, value in definition.items()})
        name = f"policy-{pattern}"
        self.rabbitmqctl("set_policy", "--vhost", vhost, "--apply-to", apply_to, name, pattern, words)

    def set_memory_alarm(self, on: bool) -> None:
        """Raise or clear the memory alarm: while it is on, publishers are blocked. For the whole node."""
        self.eval(f"vm_memory_monitor:set_vm_memory_high_watermark({'0.00001' if on else '0.4'}).")
        alarmed = "true" if on else "false"
        wait_until(
            lambda: self.eval("rabbit_alarm:get_alarms() =/= [].") == alarmed, f"alarm is {alarmed}", 20
        )

    @contextmanager
    def largest_message(self, size: int) -> Iterator[None]:
        """Take no message of more bytes for the length of a `with` block. For the whole node."""
        setting = (
            "application:set_env(rabbit, max_message_size, {0}), persistent_term:put(max_message_size, {0})."
        )
        self.eval(setting.format(size))  # the latter is 4.x's, which reads the former at its start only
        try:
            yield
        finally:
            self.eval(setting.format(134217728))

    def queues(self, vhost: str) -> dict[str, int]:
        """How many messages each queue of `vhost` holds, ready and unacknowledged."""
        out = self.rabbitmqctl("list_queues", "--vhost", vhost, "--silent", "name", "messages")
        return {name: int(number) for name, number in (line.split("\t") for line in out.splitlines())}

    def rabbitmqctl(self, *words: str) -> str:
        """What rabbitmqctl prints; more than a second each."""
        return self._run(*self._inside(str(BIN / "rabbitmqctl"), "--node", self.node, *words))

    def eval(self, expression: str) -> str:
        """Evaluate an Erlang expression in the node (ends with a full stop) and return its value as text."""
        # A name of its own each: two callers of one name at the same time and the node refuses one.
        name = f"caller{os.getpid()}x{next(self._callers)}"
        # This machine's erl_call speaks to nodes of other releases too.
        words = ["erl_call", "-c", COOKIE, "-n", self.node, "-h", name, "-timeout", "30", "-e"]
        done = subprocess.run(
            words,
            input=expression + "\n",
            capture_output=True,
            text=True,
            env=self._environment(),
            timeout=60,
        )
        said = done.stdout.strip()
        if not said.startswith("{ok, ") or "{error," in said or "{badrpc" in said:
            raise BrokerError(f"{expression}: {said} {done.stderr.strip()}")
        return said.removeprefix("{ok, ").removesuffix("}")

    @contextmanager
    def memory_alarm(self) -> Iterator[None]:
        """The memory alarm for the length of a `with` block."""
        self.set_memory_alarm(True)
        try:
            yield
        finally:
            self.set_memory_alarm(False)

    def log(self) -> str:
        """What the node has logged."""
        files = [self.folder / "server.log", *sorted((self.folder / "log").glob("*.log"))]
        return "\n".join(file.read_text(errors="replace") for file in files if file.exists())

    # -- TLS

    @property
    def ca_file(self) -> Path:
        """The authority that signed the server's certificate."""
        return self.folder / "tls" / "ca.pem"

    def client_certificate(self, name: str) -> Certificate:
        """A client's certificate with the common name `name`; make the user `name` to log in by EXTERNAL."""
        issued = self._authority().issue_cert(f"{name}.client.test", common_name=name)
        folder = self.folder / "tls"
        made = Certificate(name, folder / f"client-{name}.pem", folder / f"client-{name}.key")
        issued.private_key_pem.write_to_path(str(made.keyfile))
        made.certfile.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        return made

    @contextmanager
    def server_certificate(self, *, host: str = "localhost", expired: bool = False) -> Iterator[None]:
        """Serve another certificate for the length of a `with` block. For the whole node."""
        past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1) if expired else None
        self._issue_server(host, past)
        self.eval("ssl:clear_pem_cache().")
        try:
            yield
        finally:
            self._issue_server("localhost", None)
            self.eval("ssl:clear_pem_cache().")

    # -- within

    def _prepare(self) -> None:
        for name in ("home", "mnesia", "log", "tls"):
            (self.folder / name).mkdir()
        cookie = self.folder / "home" / ".erlang.cookie"
        cookie.write_text(COOKIE)
        cookie.chmod(0o400)
        authority = trustme.CA()
        authority.private_key_pem.write_to_path(str(self.folder / "tls" / "ca.key"))
        authority.cert_pem.write_to_path(str(self.ca_file))
        self._issue_server("localhost", None)
        (self.folder / "rabbitmq.conf").write_text(
            CONFIG.format(port=self.port, tls_port=self.tls_port, folder=self.folder)
        )
        (self.folder / "advanced.config").write_text("[].\n")
        (self.folder / "enabled_plugins").write_text("[rabbitmq_auth_mechanism_ssl].\n")

    def _authority(self) -> trustme.CA:
        folder = self.folder / "tls"
        return trustme.CA.from_pem((folder / "ca.pem").read_bytes(), (folder / "ca.key").read_bytes())

    def _issue_server(self, host: str, not_after: datetime.datetime | None) -> None:
        issued = self._authority().issue_cert(host, not_after=not_after)
        issued.private_key_pem.write_to_path(str(self.folder / "tls" / "server.key"))
        (self.folder / "tls" / "server.pem").write_bytes(b"".join(b.bytes() for b in issued.cert_chain_pems))

    def _environment(self) -> dict[str, str]:
        folder = self.folder
        return {
            "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HOME": str(folder / "home"),
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }

    def _inside(self, *words: str) -> list[str]:
        """A command of the node's own root file system."""
        if self.root is None:
            return list(words)
        return ["unshare", "--mount", "--propagation", "private", "sh", "-ec", INSIDE, "sh",
                str(self.root), str(self.folder), *words]  # fmt: skip

    def _run(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, env=self._environment(), timeout=240)
        if done.returncode:
            raise BrokerError(f"{' '.join(words)}: {done.stdout.strip()} {done.stderr.strip()}")
        return done.stdout

    def _listens(self, port: int) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", port)) == 0


def client_context(broker: RabbitMQ, certificate: Certificate | None = None) -> ssl.SSLContext:
    """A context that trusts the broker's authority and checks the host name."""
    context = ssl.create_default_context(cafile=str(broker.ca_file))
    if certificate is not None:
        context.load_cert_chain(certificate.certfile, certificate.keyfile)
    return context


def erlang(text: str) -> str:
    """`text` as an Erlang string literal."""
    return json.dumps(text, ensure_ascii=True)


wait_until = partial(waiting.wait_until, pause=0.05, error=BrokerError)
