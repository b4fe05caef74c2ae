"""`virtbus react holds` and `virtbus react release`: what is held, read from where it is held."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, TextIO, TypeVar

import click

from virtbus import config as settings_of
from virtbus.commands.options import common, load, state_dir
from virtbus.commands.terminal import cut
from virtbus.commands.wiring import react_folder
from virtbus.config import Config, Loaded
from virtbus.errors import ConfigError
from virtbus.integrations.base import RELEASE, Action, Hold, Integration, NotOurs, open_integration, utc


def show(loaded: Loaded, *, names: Sequence[str], as_json: bool, out: TextIO) -> int:
    """List every hold. Raises VirtbusError when a control plane can't be read."""
    found = []
    for integration in _opened(loaded.config, names):
        with closing(integration):
            found += [(integration.name, hold) for hold in _holds(integration)]
    if as_json:
        out.write(json.dumps([_data(name, hold) for name, hold in found]) + "\n")
        return 0
    if not found:
        out.write("nothing is held\n")
        return 0
    out.write(f"{'HOST':<28} {'IN':<11} {'SINCE':<20} {'BY':<24} WHY\n")
    for name, hold in sorted(found, key=lambda one: (one[1].host, one[0])):
        since = "-" if hold.since is None else utc(hold.since)
        why = hold.why + ("" if hold.intact else " (overwritten by another controller)")
        by = cut(hold.by, 24) or "-"
        out.write(f"{cut(hold.host, 28):<28} {name:<11} {since:<20} {by:<24} {cut(why, len(why))}\n")
        if hold.target != hold.host:
            out.write(f"  as {cut(hold.target, 70)}\n")
    return 0


def release(loaded: Loaded, host: str, *, names: Sequence[str], as_json: bool, out: TextIO) -> int:
    """Give `host` back, by libvirt's name or the control plane's. Raises VirtbusError when refused."""
    told = []
    for integration in _opened(loaded.config, names):
        with closing(integration):
            holds = [hold for hold in _holds(integration) if host in (hold.host, hold.target)]
            for hold in holds:
                told.append((integration.name, hold.host, True, _release(integration, hold)))
            if not holds:
                told.append((integration.name, host, False, f"{host} is not held by virtbus"))
    if as_json:
        keys = ("integration", "host", "released", "result")
        out.write(json.dumps([dict(zip(keys, one, strict=True)) for one in told]) + "\n")
    else:
        for name, _, _, text in told:
            out.write(f"{name}: {cut(text, len(text))}\n")
    return 0


def _release(integration: Integration, hold: Hold) -> str:
    key = f"{RELEASE}/{hold.host}/{uuid.uuid4()}"
    try:
        return integration.execute(
            Action(key, hold.host, RELEASE, "released by hand", {"target": hold.target})
        )
    except NotOurs as error:  # somebody was quicker
        return str(error)


def _holds(integration: Integration) -> Sequence[Hold]:
    found = integration.look({}, everything=True)
    if found is None:
        raise ConfigError(f"{integration.name} can't tell what it holds")
    return found.holds


def _opened(config: Config, names: Sequence[str]) -> Iterator[Integration]:
    """Those that were named, or that hold hosts and have their state here."""
    folder = react_folder(config)
    chosen = list(names) or sorted(file.stem for file in folder.glob("*.db"))
    hold = 0
    for name in dict.fromkeys(chosen):
        integration = open_integration(name, config.react)
        if integration.holds:
            hold += 1
            yield integration
        else:
            integration.close()
            if names:
                raise ConfigError(f"{name} holds no hosts; name kubernetes or nova")
    if not hold:
        raise ConfigError(
            f"no control plane is named, and none has its state in {folder}: say --with kubernetes, "
            "or --with nova"
        )


def _data(name: str, hold: Hold) -> dict[str, Any]:
    return {
        "integration": name,
        "host": hold.host,
        "target": hold.target,
        "since": None if hold.since is None else utc(hold.since),
        "why": hold.why,
        "times": hold.times,
        "by": hold.by,
        "intact": hold.intact,
    }


# ------------------------------------------------------------------------------- the command line

F = TypeVar("F", bound=Callable[..., Any])


def options(command: F) -> F:
    """What `react` and its commands share."""
    for option in (
        click.option(
            "--option",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            help="A setting of [react], e.g. --option 'exec.command=[\"/usr/bin/logger\"]'.",
        ),
        click.option(
            "--with",
            "names",
            multiple=True,
            metavar="NAME",
            help="exec, webhook, kubernetes, nova, masakari, or one that a package adds.",
        ),
    ):
        command = option(command)
    return common(state_dir(command))


def load_with(settings: Sequence[str], given: Mapping[str, Any]) -> Loaded:
    """Settings with those of --option. Raises ConfigError for one that is not KEY=VALUE."""
    told = dict(given)
    for text in settings:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--option {text}: write KEY=VALUE")
        dotted = f"react.{key}"
        if not settings_of.knows(dotted):
            dotted = f"react.options.{key}"
        told[dotted] = settings_of.from_text(dotted, value)
    return load(told)


def _told(
    ctx: click.Context, names: tuple[str, ...], settings: tuple[str, ...], given: Mapping[str, Any]
) -> tuple[tuple[str, ...], Loaded]:
    """A command's own options win over those that stand before it: `react --config FILE holds`."""
    before, earlier, outer = ctx.obj
    own = {key: value for key, value in given.items() if value not in (None, False)}
    return names or before, load_with((*earlier, *settings), {**outer, **own})


@click.command("holds")
@options
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def list_command(
    ctx: click.Context, /, names: tuple[str, ...], settings: tuple[str, ...], as_json: bool, **given: Any
) -> None:
    """List what is held, since when, why and by whom.

    Read from the control plane, where it stands. Without --with: of the control planes whose state is here.

    \b
    Example: virtbus react holds --with kubernetes
    """
    names, loaded = _told(ctx, names, settings, given)
    sys.exit(show(loaded, names=names, as_json=as_json, out=sys.stdout))


@click.command("release")
@click.argument("host")
@options
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
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
    names, loaded = _told(ctx, names, settings, given)
    sys.exit(release(loaded, host, names=names, as_json=as_json, out=sys.stdout))
