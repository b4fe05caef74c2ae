"""`virtbus react`, `react holds` and `react release`: run integrations; show and end what they hold."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from virtbus import __version__, loading
from virtbus.agent.http import HttpServer
from virtbus.bus.certificates import watch_files
from virtbus.commands.common import (
    as_json,
    bus_options,
    common,
    cut,
    keep_memory_private,
    load,
    on_bus,
    setting,
    state_dir,
)
from virtbus.config import Config
from virtbus.consumer import Consumer
from virtbus.errors import ConfigError, StateUnavailable, translating
from virtbus.fleet import Fleet, FleetRules, StorageRules, VerdictRules
from virtbus.fleet.storage import SHARED_PATHS
from virtbus.integrations.base import (
    RELEASE,
    Action,
    Hold,
    Integration,
    NotOurs,
    may_hold,
    open_integration,
    short,
    utc,
)
from virtbus.integrations.policy import HoldPolicy
from virtbus.integrations.reactor import Reactor
from virtbus.integrations.store import ActionStore
from virtbus.integrations.telemetry import REACT
from virtbus.loading import Loaded, bus_url
from virtbus.log import printable
from virtbus.telemetry import METRICS, Notice, emit

F = TypeVar("F", bound=Callable[..., Any])


def fleet_rules(config: Config) -> FleetRules:
    """How the fleet is judged."""
    rules = config.react.fleet
    return FleetRules(
        storage=StorageRules((*rules.shared_paths, *SHARED_PATHS), rules.local_paths, rules.groups),
        verdict=VerdictRules(racks=rules.racks),
        drills=config.react.drills,
    )


@contextmanager
def serving(
    loaded: Loaded,
    key: str,
    listen: str,
    *,
    dead: Callable[[], Sequence[str]],
    not_ready: Callable[[], Sequence[str]],
) -> Iterator[None]:
    """/metrics, /livez and /readyz of `react` or `fleet` at `listen` while inside; nothing when it is empty.

    Does without a default address that another process has, and says so; one that was set is a ConfigError.
    """
    keep_memory_private()
    METRICS.build_info.labels(__version__).set(1)
    watch_files(loaded.config.bus.tls.cert_file, loaded.config.bus.tls.ca_file)
    with ExitStack() as stack:
        if listen:
            try:
                server = HttpServer(
                    listen, dead=dead, not_ready=not_ready, registry=REACT.registry, setting=key,
                    allowed_hosts=loaded.config.http.allowed_hosts,
                )  # fmt: skip
                server.start()
                stack.callback(server.close)
            except ConfigError as error:
                if key in loaded.origins:
                    raise
                emit(Notice(f"no /metrics of this process: {error}"))
        yield


def _reactor(
    integration: Integration, config: Config, group: str | None, dry_run: bool, stack: ExitStack
) -> Reactor:
    react, name, group = config.react, integration.name, group or "react"
    store = ActionStore(None if dry_run else _folder(config) / f"{name}.db")
    stack.callback(store.close)
    # A dry run takes nothing away from the real one: it listens beside the group.
    named = None if dry_run else f"{group}-{name}"
    consumer = Consumer(
        bus_url(config), group=named, options=bus_options(config), prefetch=500, exclusive=not dry_run
    )
    stack.callback(consumer.close)
    emit(Notice(f"{name}: {'dry run' if dry_run else f'group {named}, state in {_folder(config)}'}"))
    return Reactor(
        integration,
        consumer=consumer,
        store=store,
        fleet=Fleet(fleet_rules(config)),
        policy=HoldPolicy(react),
        publishers=react.publishers,
        actions_per_minute=react.actions_per_minute,
        dry_run=dry_run,
        by=f"{group}-{name}@{socket.gethostname()}",
    )


def _folder(config: Config) -> Path:
    """Where the integrations keep their state."""
    return Path(config.react.state_dir or Path(config.state_dir) / "react")


def _probe(integration: Integration) -> int:
    code = 0
    for check in integration.probe():
        remedy = f"; {check.remedy}" if check.remedy and check.status != "ok" else ""
        click.echo(printable(f"{check.status}: {check.name}: {check.summary}{remedy}"))
        if check.status == "failed":
            code = max(code, check.exit_code or 69)
    return code


# ------------------------------------------------------------------------------------- the command line


def _options(command: F) -> F:
    """What `react` and its commands share."""
    key_value = click.option(
        "--option", "settings", multiple=True, metavar="KEY=VALUE",
        help="A setting of [react], e.g. --option 'exec.command=[\"/usr/bin/logger\"]'.",
    )  # fmt: skip
    names = click.option(
        "--with", "names", multiple=True, metavar="NAME",
        help="exec, webhook, kubernetes, nova, masakari, or one that a package adds.",
    )  # fmt: skip
    return common(state_dir(names(key_value(command))))


def _load(settings: Sequence[str], given: Mapping[str, Any]) -> Loaded:
    """Settings with those of --option. Raises ConfigError for one that is not KEY=VALUE."""
    flags = dict(given)
    for text in settings:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--option {text}: write KEY=VALUE")
        dotted = f"react.{key}" if loading.knows(f"react.{key}") else f"react.options.{key}"
        flags[dotted] = loading.from_text(dotted, value)
    return load(flags)


@click.group("react", invoke_without_command=True)
@_options
@on_bus
@setting("react.listen", "--http-listen", metavar="HOST:PORT",
         help="Where /metrics, /livez and /readyz are served; '' for none (react.listen).")  # fmt: skip
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
    """Act on control planes: run integrations until a signal, each for itself.

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
    loaded = _load(settings, options)
    config = loaded.config
    with ExitStack() as stack:
        integrations = [open_integration(name, config.react) for name in dict.fromkeys(names)]
        for integration in integrations:
            stack.callback(integration.close)
        if probe:
            sys.exit(max(map(_probe, integrations)))
        if not config.react.publishers:
            emit(Notice("every publisher is believed: name the agents' broker users in react.publishers"))
        reactors = [_reactor(each, config, group, dry_run, stack) for each in integrations]

        def stop(number: int, frame: object) -> None:
            for reactor in reactors:
                reactor.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
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
        unwritable = f"what is done can't be kept in {_folder(config)}"
        advice = "make room, or move a damaged file away (what is held is read from the control plane)"
        with translating({sqlite3.Error: lambda error: StateUnavailable(f"{unwritable}: {error}; {advice}")}):
            for one in (*done, *running):
                one.result()


# ------------------------------------------------------------------------------------- what is held


@contextmanager
def _holding(ctx: click.Context, names: Sequence[str], settings: Sequence[str], given: Mapping[str, Any]) \
        -> Iterator[list[tuple[Integration, Sequence[Hold]]]]:  # fmt: skip
    """The integrations that were named, or that hold hosts and have their state here, each with its holds.

    A command's own options win over those that stand before it: `react --config FILE holds`.
    """
    before, earlier, outer = ctx.obj
    own = {key: value for key, value in given.items() if value not in (None, False)}
    config = _load((*earlier, *settings), {**outer, **own}).config
    named, folder = names or before, _folder(config)
    found: list[tuple[Integration, Sequence[Hold]]] = []
    with ExitStack() as stack:
        stored = sorted(file.stem for file in folder.glob("*.db"))
        for name in dict.fromkeys(named or filter(may_hold, stored)):
            integration = stack.enter_context(closing(open_integration(name, config.react)))
            if integration.holds:
                held = integration.look({}, everything=True)
                if held is None:
                    raise ConfigError(f"{name} can't tell what it holds")
                found.append((integration, held.holds))
            elif named:
                raise ConfigError(f"{name} holds no hosts; name kubernetes or nova")
        if not found:
            raise ConfigError(
                f"no control plane is named, and none has its state in {folder}: say --with kubernetes, "
                "or --with nova"
            )
        yield found


@command.command("holds")
@_options
@as_json
@click.pass_context
def holds_command(
    ctx: click.Context, /, names: tuple[str, ...], settings: tuple[str, ...], as_json: bool, **given: Any
) -> None:
    """List what is held, since when, why and by whom.

    Read from the control plane, where it stands. Without --with: of the control planes whose state is here.

    \b
    Example: virtbus react holds --with kubernetes
    """
    with _holding(ctx, names, settings, given) as found:
        holds = [(integration.name, hold) for integration, held in found for hold in held]
    if as_json:
        click.echo(json.dumps([
            {
                "integration": name, "host": hold.host, "target": hold.target,
                "since": None if hold.since is None else utc(hold.since), "why": hold.why,
                "times": hold.times, "by": hold.by, "intact": hold.intact,
            }
            for name, hold in holds
        ]))  # fmt: skip
        return
    if not holds:
        click.echo("nothing is held")
        return
    click.echo(f"{'HOST':<28} {'IN':<11} {'SINCE':<20} {'BY':<24} WHY")
    for name, hold in sorted(holds, key=lambda one: (one[1].host, one[0])):
        since = "-" if hold.since is None else utc(hold.since)
        why = hold.why + ("" if hold.intact else " (overwritten by another controller)")
        by = cut(hold.by, 24) or "-"
        click.echo(f"{cut(hold.host, 28):<28} {name:<11} {since:<20} {by:<24} {cut(why, len(why))}")
        if hold.target != hold.host:
            click.echo(f"  as {cut(hold.target, 70)}")


@command.command("release")
@click.argument("host")
@_options
@as_json
@click.pass_context
def release_command(
    ctx: click.Context,
    /,
    host: str,
    names: tuple[str, ...],
    settings: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Give a host back by hand.

    It is left alone until it was well once. A host that is not held is fine.

    \b
    Example: virtbus react release compute-7 --with kubernetes
    """
    results = []
    with _holding(ctx, names, settings, given) as found:
        for integration, held in found:
            holds = _meant(host, held)
            for hold in holds:
                results.append((integration.name, hold.host, True, _release(integration, hold)))
            if not holds:
                results.append((integration.name, host, False, f"{host} is not held by virtbus"))
    if as_json:
        keys = ("integration", "host", "released", "result")
        click.echo(json.dumps([dict(zip(keys, one, strict=True)) for one in results]))
    else:
        for name, _, _, text in results:
            click.echo(f"{name}: {cut(text, len(text))}")


def _meant(host: str, held: Sequence[Hold]) -> Sequence[Hold]:
    """The holds of a host, by one of its names, or with or without its domain where that means one host.

    Raises ConfigError where it means several.
    """
    exact = [hold for hold in held if host in (hold.host, hold.target)]
    alike = [
        hold
        for hold in held
        for name in dict.fromkeys((hold.host, hold.target))
        if name == short(host) or short(name) == host
    ]
    found = exact or list(dict.fromkeys(alike))
    if not exact and len(found) > 1:
        raise ConfigError(f"{host} may be {', '.join(hold.host for hold in found)}: name it with its domain")
    return found


def _release(integration: Integration, hold: Hold) -> str:
    key = f"{RELEASE}/{hold.host}/{uuid.uuid4()}"
    try:
        return integration.execute(
            Action(key, hold.host, RELEASE, "released by hand", {"target": hold.target})
        )
    except NotOurs as error:  # somebody was quicker
        return str(error)
