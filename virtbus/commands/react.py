"""`virtbus react`: run integrations."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

import click

from virtbus import __version__
from virtbus.agent.http import HttpServer
from virtbus.bus.certificates import watch_files
from virtbus.commands import holds, wiring
from virtbus.commands.options import bus, setting
from virtbus.commands.wiring import react_folder
from virtbus.config import Config, Loaded, bus_url
from virtbus.consumer import Consumer
from virtbus.errors import ConfigError
from virtbus.fleet import Fleet, FleetRules, StorageRules, VerdictRules
from virtbus.fleet.storage import SHARED_PATHS
from virtbus.integrations.base import Integration, open_integration
from virtbus.integrations.policy import HoldPolicy, HoldRules
from virtbus.integrations.reactor import Reactor
from virtbus.integrations.store import ActionStore
from virtbus.integrations.told import REACT
from virtbus.log import printable
from virtbus.telemetry import METRICS, Notice, emit

_PREFETCH = 500


def fleet_rules(config: Config) -> FleetRules:
    """How the fleet is judged."""
    told = config.react.fleet
    return FleetRules(
        storage=StorageRules(
            shared_paths=(*told.shared_paths, *SHARED_PATHS),
            local_paths=told.local_paths,
            groups=told.groups,
        ),
        verdict=VerdictRules(racks=told.racks),
        drills=config.react.drills,
    )


def hold_rules(config: Config) -> HoldRules:
    """When a host is held back."""
    told = config.react
    return HoldRules(told.when, told.min_guests, told.raise_seconds, told.clear_seconds, told.max_share)


def run(
    loaded: Loaded, *, names: Sequence[str], group: str | None, dry_run: bool, probe: bool, out: TextIO
) -> int:
    """Run until a signal, or until one of them can't go on. Raises VirtbusError for what can't work."""
    config = loaded.config
    reactors: list[Reactor] = []
    with ExitStack() as stack:
        integrations = [open_integration(name, config.react) for name in dict.fromkeys(names)]
        for integration in integrations:
            stack.callback(integration.close)
        if probe:
            return max(_probe(integration, out) for integration in integrations)
        if not config.react.publishers:
            emit(Notice("every publisher is believed: name the agents' broker users in react.publishers"))
        for integration in integrations:
            reactors.append(_reactor(integration, config, group, dry_run, stack))
        _on_signals(reactors)
        stack.enter_context(
            serving(
                loaded,
                "react.listen",
                config.react.listen,
                dead=lambda: [name for reactor in reactors for name in reactor.dead()],
                not_ready=lambda: [why for reactor in reactors for why in reactor.not_ready()],
            )
        )
        with ThreadPoolExecutor(len(reactors), "virtbus-reactor") as pool:
            running = [pool.submit(reactor.run) for reactor in reactors]
            while not (done := [one for one in running if one.done()]):
                time.sleep(0.2)  # a bounded wait lets Python run the signal handlers
            for reactor in reactors:
                reactor.stop()
        for one in (*done, *running):
            one.result()
    return 0


def _reactor(
    integration: Integration, config: Config, group: str | None, dry_run: bool, stack: ExitStack
) -> Reactor:
    name = integration.name
    folder = react_folder(config)
    store = ActionStore(None if dry_run else folder / f"{name}.db")
    stack.callback(store.close)
    # A dry run takes nothing away from the real one: it listens beside the group.
    named = None if dry_run else f"{group or 'react'}-{name}"
    consumer = Consumer(
        bus_url(config),
        group=named,
        options=wiring.bus_options(config),
        prefetch=_PREFETCH,
        exclusive=not dry_run,
    )
    stack.callback(consumer.close)
    emit(Notice(f"{name}: {'dry run' if dry_run else f'group {named}, state in {folder}'}"))
    return Reactor(
        integration,
        consumer=consumer,
        store=store,
        fleet=Fleet(fleet_rules(config)),
        policy=HoldPolicy(hold_rules(config)),
        publishers=config.react.publishers,
        actions_per_minute=config.react.actions_per_minute,
        dry_run=dry_run,
        by=f"{group or 'react'}-{name}@{socket.gethostname()}",
    )


@contextmanager
def serving(
    loaded: Loaded,
    setting: str,
    listen: str,
    *,
    dead: Callable[[], Sequence[str]],
    not_ready: Callable[[], Sequence[str]],
) -> Iterator[None]:
    """/metrics, /livez and /readyz at `listen` while inside; nothing when it is empty.

    A default address that another process has is done without, aloud. Raises ConfigError for one that
    was set.
    """
    wiring.keep_memory_private()
    METRICS.build_info.labels(__version__).set(1)
    watch_files(loaded.config.bus.tls.cert_file, loaded.config.bus.tls.ca_file)
    server = None
    if listen:
        try:
            server = HttpServer(
                listen,
                dead=dead,
                not_ready=not_ready,
                registry=REACT.registry,
                setting=setting,
                allowed_hosts=loaded.config.http.allowed_hosts,
            )
            server.start()
        except ConfigError as error:
            if setting in loaded.origins:
                raise
            emit(Notice(f"no /metrics of this process: {error}"))
    try:
        yield
    finally:
        if server is not None:
            server.close()


def _probe(integration: Integration, out: TextIO) -> int:
    code = 0
    for check in integration.probe():
        remedy = f"; {check.remedy}" if check.remedy and check.status != "ok" else ""
        out.write(printable(f"{check.status}: {check.name}: {check.summary}{remedy}") + "\n")
        if check.status == "failed":
            code = max(code, check.exit_code or 69)
    return code


def _on_signals(reactors: Sequence[Reactor]) -> None:
    def on_signal(number: int, frame: object) -> None:
        for reactor in reactors:
            reactor.stop()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)


# ------------------------------------------------------------------------------- the command line


@click.group("react", invoke_without_command=True)
@holds.options
@bus
@setting(
    "react.listen",
    "--http-listen",
    metavar="HOST:PORT",
    help="Where /metrics, /livez and /readyz are served; '' for none (react.listen).",
)
@click.option("--group", metavar="GROUP", help="Durable group: GROUP-NAME [default: react-NAME].")
@click.option("--dry-run", is_flag=True, help="Only say what would be done; takes no event from the group.")
@click.option("--probe", is_flag=True, help="Only look whether the control plane lets us, and end.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    names: tuple[str, ...],
    group: str | None,
    dry_run: bool,
    probe: bool,
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Tell control planes: run integrations until a signal, each for itself.

    Actions are stored before they are done, limited, and each is a line in the log. Guests are never moved
    or restarted.

    \b
    Examples:
      virtbus react --with kubernetes --bus amqps://scheduler@broker//
      virtbus react holds --with kubernetes
    """
    if ctx.invoked_subcommand is not None:
        ctx.obj = (names, settings, options)
        return
    if not names:
        raise click.UsageError("Missing option '--with'", ctx)
    loaded = holds.load_with(settings, options)
    sys.exit(run(loaded, names=names, group=group, dry_run=dry_run, probe=probe, out=sys.stdout))


command.add_command(holds.list_command)
command.add_command(holds.release_command)
