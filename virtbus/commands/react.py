"""`virtbus react`: run integrations."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import click

from virtbus import config as settings_of
from virtbus.commands import wiring
from virtbus.commands.options import (
    bus,
    common,
    load,
    state_dir,
)
from virtbus.config import Config, Loaded, bus_url
from virtbus.consumer import Consumer
from virtbus.errors import ConfigError
from virtbus.fleet import Fleet, FleetRules, StorageRules, VerdictRules
from virtbus.fleet.storage import SHARED_PATHS
from virtbus.integrations.base import Integration, open_integration
from virtbus.integrations.policy import HoldPolicy, HoldRules
from virtbus.integrations.reactor import Reactor
from virtbus.integrations.store import ActionStore
from virtbus.log import printable
from virtbus.telemetry import Notice, emit

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
    folder = Path(config.react.state_dir or Path(config.state_dir) / "react")
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
    )


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


@click.command("react")
@common
@bus
@state_dir
@click.option(
    "--with",
    "names",
    required=True,
    multiple=True,
    metavar="NAME",
    help="exec, webhook, kubernetes, nova, masakari, or one that a package adds.",
)
@click.option("--group", metavar="GROUP", help="Durable group: GROUP-NAME [default: react-NAME].")
@click.option("--dry-run", is_flag=True, help="Only say what would be done; takes no event from the group.")
@click.option("--probe", is_flag=True, help="Only look whether the control plane lets us, and end.")
@click.option(
    "--option",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of [react], e.g. --option 'exec.command=[\"/usr/bin/logger\"]'.",
)
def command(
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
    Example: virtbus react --with kubernetes --bus amqps://scheduler@broker//
    """
    for text in settings:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--option {text}: write KEY=VALUE")
        dotted = f"react.{key}"
        if not settings_of.knows(dotted):
            dotted = f"react.options.{key}"
        options[dotted] = settings_of.from_text(dotted, value)
    sys.exit(run(load(options), names=names, group=group, dry_run=dry_run, probe=probe, out=sys.stdout))
