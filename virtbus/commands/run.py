"""`virtbus run`: the agent in the foreground."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path

from virtbus.agent import Agent, AgentOptions, load_agent_id
from virtbus.commands import wiring
from virtbus.config import Loaded, bus_url, redact_url
from virtbus.control import ControlSocket, HttpServer
from virtbus.envelope import uuid7
from virtbus.errors import ConfigError
from virtbus.incidents import Incidents
from virtbus.model import Clock
from virtbus.spool import Spool, prepare_state_dir
from virtbus.telemetry import METRICS, Notice, emit


def run(loaded: Loaded) -> None:
    """Run until a signal. Raises VirtbusError when the agent can't start or was refused by libvirt."""
    config = loaded.config
    os.umask(0o077)
    if os.geteuid() == 0:
        emit(Notice("running as root; a user in libvirt's group is enough"))
    clock = Clock()
    with ExitStack() as stack:
        bus = wiring.open_bus(config)
        stack.callback(bus.close)
        state_dir = Path(config.state_dir)
        prepare_state_dir(state_dir)
        agent_id, previous = load_agent_id(state_dir)
        spool = Spool.open(state_dir, limits=wiring.spool_limits(config), agent_id=agent_id, clock=clock)
        stack.callback(spool.close)
        source = wiring.open_source(config, since_ns=spool.opening.last_alive_ns)
        METRICS.spool_max_bytes.set(config.spool.max_bytes)
        agent = Agent(
            source=source,
            bus=bus,
            spool=spool,
            incidents=Incidents(wiring.incident_limits(config), new_id=lambda: uuid7(clock().wall_ns)),
            agent_id=agent_id,
            previous_agent_id=previous,
            options=AgentOptions(
                drain_seconds=config.drain_seconds,
                heartbeat_seconds=config.heartbeat.interval_seconds,
                fold=config.incidents.fold,
            ),
            clock=clock,
            bus_name=redact_url(bus_url(config)),
        )
        if config.http.listen:
            http = HttpServer(config.http.listen, dead=agent.dead_threads, not_ready=agent.not_ready)
            http.start()
            stack.callback(http.close)
        if config.control.socket:
            _open_control(config.control.socket, agent, stack, named="control.socket" in loaded.origins)
        _on_signals(agent)
        agent.start()
        while not agent.wait(1.0):
            pass  # a bounded wait lets Python run the signal handlers
        agent.join()


def _open_control(path: str, agent: Agent, stack: ExitStack, *, named: bool) -> None:
    """The control socket; a default path that can't be had costs `status` and `tap`, not the agent."""
    try:
        control = ControlSocket(Path(path), status=agent.status, taps=agent.taps)
    except ConfigError as error:
        if named:
            raise
        emit(Notice(f"no control socket: {error}"))
        return
    control.start()
    stack.callback(control.close)


def _on_signals(agent: Agent) -> None:
    """The first SIGTERM or SIGINT drains, the second aborts."""
    asked = 0

    def on_signal(number: int, frame: object) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            agent.stop()
        else:
            agent.abort()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
