"""`virtbus react`: run one integration."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from virtbus.commands import wiring
from virtbus.config import Config, Loaded, bus_url
from virtbus.consumer import Consumer
from virtbus.fleet import Fleet, FleetRules, StorageRules, VerdictRules
from virtbus.fleet.storage import SHARED_PATHS
from virtbus.integrations import open_integration
from virtbus.integrations.policy import HoldPolicy, HoldRules
from virtbus.integrations.reactor import Reactor
from virtbus.integrations.store import ActionStore
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


def run(loaded: Loaded, *, name: str, group: str | None, dry_run: bool, probe: bool, out: TextIO) -> int:
    """Run until a signal. Raises VirtbusError for what can't work."""
    config = loaded.config
    with ExitStack() as stack:
        integration = open_integration(name, config.react)
        stack.callback(integration.close)
        if probe:
            checks = integration.probe()
            for check in checks:
                remedy = f"; {check.remedy}" if check.remedy and check.status != "ok" else ""
                out.write(f"{check.status}: {check.name}: {check.summary}{remedy}\n")
            return max((check.exit_code or 69 for check in checks if check.status == "failed"), default=0)
        folder = Path(config.react.state_dir or Path(config.state_dir) / "react")
        store = ActionStore(None if dry_run else folder / f"{name}.db")
        stack.callback(store.close)
        # A dry run takes nothing away from the real one: it listens beside the group.
        named = None if dry_run else (group or f"react-{name}")
        consumer = Consumer(
            bus_url(config), group=named, options=wiring.bus_options(config), prefetch=_PREFETCH,
            exclusive=not dry_run,
        )  # fmt: skip
        stack.callback(consumer.close)
        reactor = Reactor(
            integration,
            consumer=consumer,
            store=store,
            fleet=Fleet(fleet_rules(config)),
            policy=HoldPolicy(hold_rules(config)),
            publishers=config.react.publishers,
            actions_per_minute=config.react.actions_per_minute,
            dry_run=dry_run,
        )
        if not config.react.publishers:
            emit(Notice("every publisher is believed: name the agents' broker users in react.publishers"))
        _on_signals(reactor.stop)
        emit(Notice(f"{name}: {'dry run' if dry_run else f'group {named}, state in {folder}'}"))
        reactor.run()
    return 0


def _on_signals(stop: Callable[[], None]) -> None:
    def on_signal(number: int, frame: object) -> None:
        stop()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
