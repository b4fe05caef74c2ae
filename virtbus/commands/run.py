"""`virtbus run`: the agent in the foreground."""

from __future__ import annotations

import ctypes
import gc
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from virtbus import redaction, telemetry
from virtbus.agent.agent import Agent, AgentOptions
from virtbus.agent.control import ControlSocket
from virtbus.agent.http import HttpServer
from virtbus.agent.identity import load_agent_id, tie_to_host, was_tied
from virtbus.agent.incidents import Incidents
from virtbus.bus.certificates import watch_files
from virtbus.commands.common import (
    common,
    control,
    keep_memory_private,
    libvirt,
    load,
    on_bus,
    open_bus,
    open_source,
    read,
    setting,
    state_dir,
)
from virtbus.config import Config
from virtbus.envelope import uuid7
from virtbus.errors import AgentBroken, ConfigError, RestartNeeded, VirtbusError
from virtbus.loading import Loaded, bus_url, differences, exposed_secrets
from virtbus.model import Clock
from virtbus.sources.sockets import has_socket, socket_folder, was_removed
from virtbus.spool import Spool, prepare_state_dir
from virtbus.telemetry import (
    METRICS,
    ConfigRefused,
    ConfigReloaded,
    Notice,
    RunningAsRoot,
    SecretExposed,
    ThreadDied,
    emit,
)

STATUS_SECONDS = 5.0  # between two lines to the service manager


def run(loaded: Loaded, again: Callable[[], Loaded] | None = None) -> None:
    """Run until a signal. Raises VirtbusError when the agent can't start or was refused by libvirt.

    `again` reads the settings again, for SIGHUP.
    """
    config = loaded.config
    os.umask(0o077)
    keep_memory_private()
    use_one_heap()
    if os.geteuid() == 0:
        emit(RunningAsRoot())
    for secret in exposed_secrets(loaded):
        emit(SecretExposed(secret))
    clock = Clock()
    with ExitStack() as stack:
        bus = open_bus(config)
        stack.callback(bus.close)
        state_dir = Path(config.state_dir)
        prepare_state_dir(state_dir)
        spool = Spool.open(state_dir, limits=config.spool, agent_id="", clock=clock)
        stack.callback(spool.close)
        # Behind the lock: an agent of another machine must not give a new id to the one that runs here.
        spool.agent_id, previous = load_agent_id(state_dir)
        source = open_source(config, since_ns=spool.opening.stamps_since_ns)
        METRICS.spool_max_bytes.set(config.spool.max_bytes)
        watch_files(config.bus.tls.cert_file, config.bus.tls.ca_file)
        agent = Agent(
            source=source,
            bus=bus,
            spool=spool,
            incidents=Incidents(config.incidents, new_id=lambda: uuid7(clock().wall_ns)),
            agent_id=spool.agent_id,
            previous_agent_id=previous,
            options=AgentOptions(
                drain_seconds=config.drain_seconds,
                heartbeat_seconds=config.heartbeat.interval_seconds,
                fold=config.incidents.fold,
            ),
            clock=clock,
            bus_name=redaction.uri(bus_url(config)),
            identify=partial(tie_to_host, state_dir),
            libvirt_absent=partial(_libvirt_absent, config),
        )
        threading.excepthook = partial(_end_with_thread, agent)
        if config.http.listen:
            http = HttpServer(
                config.http.listen,
                dead=agent.dead_threads,
                not_ready=agent.not_ready,
                allowed_hosts=config.http.allowed_hosts,
            )
            http.start()
            stack.callback(http.close)
        if config.control.socket:
            _open_control(config.control.socket, agent, stack, named="control.socket" in loaded.origins)
        signals = stack.enter_context(_Signals())
        spare_collector()
        if _libvirt_absent(config):
            folder = socket_folder(config.libvirt.uri)
            emit(Notice(f"this host has no libvirt: no socket in {folder}; waiting for one"))
        agent.start()
        _supervise(agent, loaded.config, again, signals)


def _libvirt_absent(config: Config) -> bool:
    """Whether this is a host without libvirt, and may be: no socket, and never one that answered."""
    settings = config.libvirt
    is_observed = settings.discover.with_uri or not settings.discover.on
    folder = socket_folder(settings.uri) if settings.optional and is_observed else None
    return folder is not None and not has_socket(folder) and not was_tied(Path(config.state_dir))


def _end_with_thread(agent: Agent, died: threading.ExceptHookArgs) -> None:
    """A thread that ends by an error does its work no longer: end, so that a supervisor starts us again."""
    name = died.thread.name if died.thread is not None else "a thread"
    error = f"{died.exc_type.__name__}: {died.exc_value}"
    emit(ThreadDied(name, error))
    agent.fail(AgentBroken(f"thread {name} ended: {error}"))


def use_one_heap() -> None:
    """Keep all threads on one heap of the C library: each of glibc's arenas holds pages of its own."""
    with suppress(AttributeError):  # another C library has no such option
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX, <malloc.h>


def spare_collector() -> None:
    """Let Python's cycle collector leave alone what start-up made, and come less often.

    It walked all modules again and again while a backlog drained: a tenth of the time of an event.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def _supervise(agent: Agent, config: Config, again: Callable[[], Loaded] | None, signals: _Signals) -> None:
    """Wait for the end; meanwhile answer signals and keep the service manager informed."""
    systemd = Systemd()
    current = config
    # Ready: the spool is open and the threads run. libvirt and the broker may come later: /readyz knows.
    systemd.tell(READY=1, STATUS="started")
    said = fed = time.monotonic()
    wait = min(1.0, systemd.watchdog_seconds or 1.0)
    while not agent.wait(0.0):
        numbers = signals.wait(wait)
        agent.beat(wait)
        for number in numbers:
            if number != signal.SIGHUP:
                agent.stop()
            elif again is not None:
                systemd.reloading()
                current = _reload(agent, config, current, again)
                systemd.tell(READY=1)
        now = time.monotonic()
        if systemd.watchdog_seconds is not None and now - fed >= systemd.watchdog_seconds / 2:
            fed = now
            if not agent.dead_threads():  # what /livez says; a hung disk or broker must not get us killed
                systemd.tell(WATCHDOG=1)
        if now - said >= STATUS_SECONDS:
            said = now
            folder = socket_folder(config.libvirt.uri)
            if folder is not None and agent.not_observing() and was_removed(folder):
                agent.fail(
                    RestartNeeded(
                        f"{folder} was removed on the host, and what was made in its place can't be seen "
                        "through this mount: ending, to be started again with the new one"
                    )
                )
            systemd.tell(STATUS=agent.summary())
    systemd.tell(STOPPING=1, STATUS="draining")
    failures: list[VirtbusError] = []
    joining = threading.Thread(target=_join, args=(agent, failures), name="virtbus-join", daemon=True)
    joining.start()
    while joining.is_alive():
        if any(number != signal.SIGHUP for number in signals.wait(0.1)):
            agent.abort()  # asked a second time
    joining.join()
    if failures:
        raise failures[0]


def _join(agent: Agent, failures: list[VirtbusError]) -> None:
    try:
        agent.join()
    except VirtbusError as error:
        failures.append(error)


def _apply_log(_agent: Agent, new: Config) -> None:
    telemetry.configure(level=new.log.level, fmt=new.log.format)


def _apply_times(agent: Agent, new: Config) -> None:
    agent.options = replace(
        agent.options, drain_seconds=new.drain_seconds, heartbeat_seconds=new.heartbeat.interval_seconds
    )


# What SIGHUP applies, and how; passwords, tokens and certificates are read again at each connection anyway.
RELOADED: Mapping[str, Callable[[Agent, Config], None]] = {
    "drain_seconds": _apply_times,
    "heartbeat.interval_seconds": _apply_times,
    "log.format": _apply_log,
    "log.level": _apply_log,
}


def _reload(agent: Agent, started: Config, current: Config, again: Callable[[], Loaded]) -> Config:
    """Apply what can be applied, and say what still waits for a restart. Bad settings change nothing."""
    try:
        new = again().config
    except VirtbusError as error:
        emit(ConfigRefused(error))
        return current
    applied = [key for key in differences(current, new) if key in RELOADED]
    for apply in dict.fromkeys(RELOADED[key] for key in applied):
        apply(agent, new)
    emit(
        ConfigReloaded(
            applied=applied,
            needs_restart=[key for key in differences(started, new) if key not in RELOADED],
        )
    )
    return new


def _open_control(path: str, agent: Agent, stack: ExitStack, *, named: bool) -> None:
    """The control socket; a default path that can't be had costs `status` and `tap`, not the agent."""
    try:
        control = ControlSocket(Path(path), status=agent.status, taps=agent.taps, drill=agent.drill)
    except ConfigError as error:
        if named:
            raise
        emit(Notice(f"no control socket: {error}"))
        return
    control.start()
    stack.callback(control.close)


class Systemd:
    """The service manager behind $NOTIFY_SOCKET (sd_notify(3)); without one every call is without effect."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """Read $NOTIFY_SOCKET, $WATCHDOG_USEC and $WATCHDOG_PID."""
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        meant = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = environment.get("WATCHDOG_USEC", "")
        # sd_watchdog_enabled(3) recommends half of the time.
        self.watchdog_seconds = int(usec) / 2e6 if meant and usec.isdecimal() and int(usec) else None

    def tell(self, **states: str | int) -> bool:
        """Send assignments such as READY=1, STATUS="…"; whether somebody was there to take them."""
        if not self._address:
            return False
        lines = "\n".join(f"{name}={' '.join(str(value).splitlines()[:1])}" for name, value in states.items())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)  # a service manager that hangs must not hang the agent
            try:
                sender.sendto(lines.encode(), self._address)
            except OSError:
                return False
        return True

    def reloading(self) -> None:
        """Say that a reload begins (Type=notify-reload wants the time); READY=1 ends it."""
        self.tell(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)


class _Signals:
    """SIGTERM, SIGINT and SIGHUP as numbers that the main thread reads.

    The handlers do nothing: one that touched a lock could meet its own thread inside it. Python writes the
    number into a socket, which wakes the main thread at once (signal.set_wakeup_fd).
    """

    def __enter__(self) -> _Signals:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # held back since the process began
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        self._reader.close()
        self._writer.close()

    def wait(self, timeout: float) -> bytes:
        """The numbers of the signals that came, at most `timeout` seconds from now."""
        readable, _, _ = select.select([self._reader], [], [], timeout)
        return self._reader.recv(64) if readable else b""


@click.command("run")
@common
@libvirt
@on_bus
@state_dir
@setting("http.listen", "--http-listen", metavar="HOST:PORT", help="/metrics, /livez, /readyz; '' is off.")
@control
@setting("log.format", "--log-format", type=click.Choice(["auto", "text", "json"]), help="Log format.")
def command(**options: Any) -> None:
    """Run the agent in the foreground.

    SIGTERM or SIGINT drains (publishes what is there, at most drain_seconds) and ends; a second one
    ends at once. What no broker has confirmed stays in the spool.

    \b
    Example: virtbus run --libvirt qemu:///system --bus amqp://127.0.0.1//
    """
    run(load(options), again=lambda: read(options))
