"""The command line: options and help only; what a command does stands in `virtbus.commands`.

Every failure is one clear line a problem on stderr and an exit code of sysexits.h; `--debug` adds the
traceback. Imports are delayed into the commands, so that `virtbus --help` is quick.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from virtbus import __version__
from virtbus.errors import ConfigError, SpoolFull, VirtbusError

EXIT_USAGE = ConfigError.exit_code
_YEAR = 366 * 86400
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _Seconds(click.FloatRange):
    """Seconds up to a year: nan and infinity pass every comparison that would end a wait, more overflows."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See click.ParamType."""
        seconds = super().convert(value, param, ctx)
        if not seconds <= _YEAR:
            self.fail(f"{seconds} is no number of seconds up to a year", param, ctx)
        return seconds


# A file that is missing or not ours to read: its reader says so, with the right exit code.
_FILE = click.Path(readable=False, path_type=Path)
F = TypeVar("F", bound=Callable[..., Any])


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments or os.environ.get("VIRTBUS_DEBUG") == "1"
    _open_standard_streams()
    try:
        code = _invoke(arguments)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = EXIT_USAGE
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "virtbus"
        _complain(f"{' '.join(error.format_message().split()).rstrip('.')}; see {where} --help")
        code = EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        _discard_output()  # whoever read it has had enough (| head): that is no failure
        code = 0
    except VirtbusError as error:
        if debug:
            raise
        _complain(str(error))
        code = error.exit_code
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.filename is None and error.errno in _NO_ROOM:
            # Whatever else can be full was translated where it was written.
            _discard_output()
            _complain(f"standard output can't be written: {error.strerror}; make room, or write elsewhere")
            sys.exit(SpoolFull.exit_code)
        _complain(f"unexpected {type(error).__name__}: {error}; run again with --debug and report it")
        code = VirtbusError.exit_code
    sys.exit(code if isinstance(code, int) else 0)


def _open_standard_streams() -> None:
    """What the caller left closed leads nowhere, and no other file gets its number; JSON is always UTF-8."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (
        stream or os.fdopen(number, mode, encoding="utf-8", closefd=False)
        for stream, number, mode in ((sys.stdin, 0, "r"), (sys.stdout, 1, "w"), (sys.stderr, 2, "w"))
    )
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def _invoke(arguments: list[str]) -> Any:
    """Run the command; its exit code, if it has one. Raises BrokenPipeError when nobody reads our output."""
    streams = sys.stdout, sys.stderr
    try:
        return cli.main(args=arguments, prog_name="virtbus", standalone_mode=False)
    except SystemExit as error:
        if sys.stdout is not streams[0]:  # click has wrapped it: its way to end with 1 for a broken pipe
            sys.stdout, sys.stderr = streams
            raise BrokenPipeError from None
        return error.code


def _discard_output() -> None:
    """What standard output did not take goes nowhere, also at the interpreter's end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(text: str) -> None:
    from virtbus.log import printable  # a broker's words may be among them

    for line in text.splitlines() or [""]:
        click.echo(f"virtbus: {printable(line)}", err=True)


def _common(command: F) -> F:
    """The options that every command with settings takes."""
    for option in reversed(
        [
            click.option("--config", "config_file", type=_FILE, metavar="FILE",
                         help="Settings [default: /etc/virtbus/virtbus.toml if it is there]."),
            click.option("--debug", is_flag=True, help="Tracebacks, and the log at level debug."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def _setting(key: str, *names: str, help: str, **more: Any) -> Callable[[F], F]:
    """An option that overrides the setting `key`."""
    return click.option(*names, key.replace(".", "__"), help=help, **more)


_bus = _setting("bus.url", "--bus-url", "--bus", metavar="URL",
                help="amqp[s]://…, kafka[s]://…, embedded: or embedded:///FILE (bus.url).")  # fmt: skip
_libvirt = _setting("libvirt.uri", "--libvirt-uri", "--libvirt", metavar="URI",
                    help="Hypervisor, e.g. qemu:///system (libvirt.uri).")  # fmt: skip
_patience = click.option("--timeout", "patience", type=_Seconds(0), default=30.0,
                         show_default=True, metavar="S",
                         help="How long an agent may do nothing of it; 0: do not wait.")  # fmt: skip
_state_dir = _setting("state_dir", "--state-dir", metavar="DIR", help="Folder of the spool (state_dir).")


def _load(options: Mapping[str, Any]) -> Any:
    """Settings from file, environment and this command's flags; the log is set up from them."""
    from virtbus import telemetry

    loaded = _read(options)
    telemetry.configure(level=loaded.config.log.level, fmt=loaded.config.log.format)
    return loaded


def _read(options: Mapping[str, Any]) -> Any:
    """Settings from file, environment and this command's flags."""
    from virtbus import config

    flags = {
        key.replace("__", "."): value
        for key, value in options.items()
        if key not in ("config_file", "debug") and value is not None
    }
    if options.get("debug"):
        flags["log.level"] = "debug"
    named = options.get("config_file") or os.environ.get("VIRTBUS_CONFIG")
    return config.load(file=Path(named) if named else None, flags=flags)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", message="virtbus %(version)s")
def cli() -> None:
    """Every guest I/O error that libvirt reports, as a durable CloudEvent on RabbitMQ or Kafka.

    \b
    Try it without a broker:   virtbus demo
    Run the agent on a host:   virtbus run --bus amqps://virtbus@broker//
    See the events:            virtbus consume --bus amqps://virtbus@broker//
    """


@cli.command()
@_common
@_libvirt
@_bus
@_state_dir
@_setting("http.listen", "--http-listen", metavar="HOST:PORT", help="/metrics, /livez, /readyz; '' is off.")
@_setting("control.socket", "--control-socket", metavar="PATH", help="For status and tap; '' is off.")
@_setting("log.format", "--log-format", type=click.Choice(["auto", "text", "json"]), help="Log format.")
def run(**options: Any) -> None:
    """Run the agent in the foreground.

    SIGTERM or SIGINT drains (publishes what is there, at most drain_seconds) and ends; a second one
    ends at once. What no broker has confirmed stays in the spool.

    \b
    Example: virtbus run --libvirt qemu:///system --bus amqp://127.0.0.1//
    """
    from virtbus.commands import run as command

    command.run(_load(options), again=lambda: _read(options))


@cli.command()
@_common
@_bus
@_state_dir
@click.option("--group", metavar="NAME", help="Share the events with the other members of a durable group.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after N events.")
@click.option("--timeout", type=_Seconds(0), metavar="S", help="End after S seconds.")
@click.option("--type", "types", multiple=True, metavar="TYPE", help="Only these event types (suffices).")
def consume(group: str | None, count: int | None, timeout: float | None, types: tuple[str, ...],
            **options: Any) -> None:  # fmt: skip
    """Print events as they come: one CloudEvent in structured JSON a line.

    Every event is validated against its schema; notices go to stderr. Without --group nothing is left
    behind on the broker when this ends.

    \b
    Example: virtbus consume --bus amqp://127.0.0.1// --count 1 --timeout 60
    """
    from virtbus.commands import consume as command

    sys.exit(command.run(_load(options), group=group, count=count, timeout=timeout, types=types,
                         out=sys.stdout, notices=sys.stderr))  # fmt: skip


@cli.command()
@_common
@_libvirt
@click.option("--json", "as_json", is_flag=True, help="JSON lines; `virtbus` can replay them.")
@click.option("--timeout", type=_Seconds(0), metavar="S", help="End after S seconds.")
def watch(as_json: bool, timeout: float | None, **options: Any) -> None:
    """Print libvirt's events on the terminal: no broker, no spool.

    \b
    Example: virtbus watch --libvirt qemu:///system --json > recording.jsonl
    """
    from virtbus.commands import watch as command

    uri = _load(options).config.libvirt.uri
    command.run(uri, as_json=as_json, out=sys.stdout, timeout=timeout)


@cli.command()
@click.option("--debug", is_flag=True, help="Tracebacks.")
@click.option("--recording", type=_FILE, metavar="FILE",
              help="Recorded callbacks of `virtbus watch --json`; default: the built-in ones.")  # fmt: skip
def demo(recording: Path | None, debug: bool) -> None:
    """Replay recorded real I/O errors through the whole pipeline, on the embedded bus.

    Nothing is installed and no broker is needed: a replay source, incidents, spool, embedded bus and a
    consumer, in a temporary folder. The events carry origin `replay`. In a checkout, `make demo` does
    the same with a real guest whose disk fails.

    \b
    Example: virtbus demo --recording recording.jsonl
    """
    from virtbus.commands import demo as command

    sys.exit(command.run(recorded=recording, out=sys.stdout, notices=sys.stderr, debug=debug))


@cli.command()
@_common
@_setting("control.socket", "--control-socket", metavar="PATH", help="The agent's control socket.")
@click.option("--json", "as_json", is_flag=True, help="The answer as it comes.")
@click.option("--watch", "watching", is_flag=True, help="Again every second.")
def status(as_json: bool, watching: bool, **options: Any) -> None:
    """Ask the running agent what it is doing and what it holds.

    \b
    Example: virtbus status --watch
    """
    from virtbus.commands import status as command

    command.status(_load(options).config, as_json=as_json, watching=watching, out=sys.stdout)


@cli.command()
@_common
@_setting("control.socket", "--control-socket", metavar="PATH", help="The agent's control socket.")
@click.option("--stage", type=click.Choice(["raw", "incident", "published"]), help="Only this stage.")
@click.option("--domain", metavar="NAME|UUID", help="Only this domain.")
def tap(stage: str | None, domain: str | None, **options: Any) -> None:
    """Look at what passes through the running agent, one JSON line an item.

    Bounded and lossy: a reader that lags loses lines (and is told how many); the agent never waits.

    \b
    Example: virtbus tap --stage incident --domain web-1
    """
    from virtbus.commands import status as command

    command.tap(_load(options).config, stage=stage, domain=domain, out=sys.stdout)


@cli.command("emit")
@_common
@_setting("control.socket", "--control-socket", metavar="PATH", help="The agent's control socket.")
@click.option("--domain-name", default="virtbus-drill", show_default=True, metavar="NAME",
              help="The guest that the event names.")  # fmt: skip
@click.option("--action", type=click.Choice(["none", "pause", "report"]), default="report",
              show_default=True, help="What the hypervisor is said to have done.")  # fmt: skip
@click.option("--reason", default="drill", show_default=True, metavar="TEXT", help="libvirt's reason.")
@click.option("--count", type=click.IntRange(1, 1000), default=1, show_default=True, help="Errors in it.")
@click.option("--resolve", is_flag=True, help="End the drill: its incidents are resolved.")
@click.option("--timeout", type=_Seconds(0.1), default=10.0, show_default=True, metavar="S",
              help="How long to wait for the broker's confirmation.")  # fmt: skip
def emit_(timeout: float, domain_name: str, action: str, reason: str, count: int, resolve: bool,
          **options: Any) -> None:  # fmt: skip
    """Run an alert drill: an event that says `replay`, through the running agent to the broker.

    It takes the way of a real error: incident, spool, broker. The guest it names does not exist; consumers
    that act must leave events of origin `replay` alone, and every event of the drill carries it.

    \b
    Example: virtbus emit --action pause --reason enospc
             virtbus emit --resolve
    """
    from virtbus.commands import emit as command

    request = {"domain_name": domain_name, "action": action, "reason": reason, "count": count,
               "resolve": resolve}  # fmt: skip
    command.run(_load(options).config, request, timeout=timeout, out=sys.stdout)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Example: virtbus completion bash > /etc/bash_completion.d/virtbus
             virtbus completion zsh > "${fpath[1]}/_virtbus"
             virtbus completion fish > ~/.config/fish/completions/virtbus.fish
    """
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    assert made is not None  # click knows each shell of the choice
    click.echo(made(cli, {}, "virtbus", "_VIRTBUS_COMPLETE").source())


@cli.command()
@_common
@_libvirt
@_bus
@_state_dir
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--timeout", type=_Seconds(0.1), default=15.0, show_default=True, metavar="S",
              help="How long one part may take to answer.")  # fmt: skip
def doctor(as_json: bool, timeout: float, **options: Any) -> None:
    """Look at every part: what is wrong, on what, and what to do.

    libvirt and its events, the broker with credentials, TLS and topology, one confirmed probe event, the
    spool's disk, the clock, the schemas. Ends with the first failure's exit code.

    \b
    Example: virtbus doctor --bus amqps://virtbus@broker//
    """
    from virtbus.commands import doctor as command

    sys.exit(command.run(_load(options), as_json=as_json, timeout=timeout, out=sys.stdout))


@cli.command()
@_common
@_bus
@_state_dir
@click.option("--once", is_flag=True, help="Listen for one round of heartbeats, print, and end.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, a line each second.")
@click.option("--write", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Keep FILE up to date instead, as JSON: for a scheduler on this machine.")  # fmt: skip
@click.option("--listen", type=_Seconds(0), metavar="S", help="End after S seconds.")
@_setting("react.fleet_listen", "--http-listen", metavar="HOST:PORT",
          help="With --write: address of /metrics, /livez, /readyz (react.fleet_listen).")  # fmt: skip
def fleet(once: bool, as_json: bool, write: Path | None, listen: float | None, **options: Any) -> None:
    """Show which hosts and storage systems are in trouble, and whose fault it is.

    It knows a host once it has heard its agent: complete after one round of heartbeats (60 s).

    \b
    Example: virtbus fleet --bus amqp://guest:guest@127.0.0.1// --once --json
    """
    from virtbus.commands import fleet as command

    sys.exit(command.run(_load(options), once=once, as_json=as_json, write=write, listen=listen,
                         out=sys.stdout, notices=sys.stderr))  # fmt: skip


def _react_options(command: F) -> F:
    """What `react` and its commands share."""
    for option in reversed(
        [
            click.option("--with", "names", multiple=True, metavar="NAME",
                         help="exec, webhook, kubernetes, nova, masakari, or one that a package adds."),
            click.option("--option", "settings", multiple=True, metavar="KEY=VALUE",
                         help="A setting of [react], e.g. --option 'exec.command=[\"/usr/bin/logger\"]'."),
        ]
    ):  # fmt: skip
        command = option(command)
    return _common(_state_dir(command))


@cli.group(invoke_without_command=True)
@_react_options
@_bus
@_setting("react.listen", "--http-listen", metavar="HOST:PORT",
          help="Where /metrics, /livez and /readyz are served; '' for none (react.listen).")  # fmt: skip
@click.option("--group", metavar="GROUP", help="Durable group: GROUP-NAME [default: react-NAME].")
@click.option("--dry-run", is_flag=True, help="Only say what would be done; takes no event from the group.")
@click.option("--probe", is_flag=True, help="Only look whether the control plane lets us, and end.")
@click.pass_context
def react(ctx: click.Context, /, names: tuple[str, ...], group: str | None, dry_run: bool, probe: bool,
          settings: tuple[str, ...], **options: Any) -> None:  # fmt: skip
    """Tell control planes: run integrations until a signal, each for itself.

    Actions are stored before they are done, limited, and each is a line in the log. Guests are never moved
    or restarted.

    \b
    Examples:
      virtbus react --with kubernetes --bus amqps://scheduler@broker//
      virtbus react holds --with kubernetes
    """
    from virtbus.commands import react as command

    if ctx.invoked_subcommand is not None:
        ctx.obj = (names, settings, options)
        return
    if not names:
        raise click.UsageError("Missing option '--with'", ctx)
    sys.exit(command.run(_load_react(settings, options), names=names, group=group, dry_run=dry_run,
                         probe=probe, out=sys.stdout))  # fmt: skip


@react.command()
@_react_options
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def holds(ctx: click.Context, /, names: tuple[str, ...], settings: tuple[str, ...], as_json: bool,
          **options: Any) -> None:  # fmt: skip
    """List what is held, since when, why and by whom.

    Read from the control plane, where it stands. Without --with: of the control planes whose state is here.
    """
    from virtbus.commands import holds as command

    names, loaded = _of_react(ctx, names, settings, options)
    sys.exit(command.show(loaded, names=names, as_json=as_json, out=sys.stdout))


@react.command()
@click.argument("host")
@_react_options
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def release(ctx: click.Context, /, host: str, names: tuple[str, ...], settings: tuple[str, ...],
            as_json: bool, **options: Any) -> None:  # fmt: skip
    """Give a host back by hand.

    It is left alone until it was well once. A host that is not held is fine.

    \b
    Example: virtbus react release compute-7 --with kubernetes
    """
    from virtbus.commands import holds as command

    names, loaded = _of_react(ctx, names, settings, options)
    sys.exit(command.release(loaded, host, names=names, as_json=as_json, out=sys.stdout))


def _of_react(
    ctx: click.Context, names: tuple[str, ...], settings: tuple[str, ...], options: Mapping[str, Any]
) -> tuple[tuple[str, ...], Any]:
    """A command's own options win over those that stand before it: `react --config FILE holds`."""
    before, earlier, given = ctx.obj
    told = {key: value for key, value in options.items() if value not in (None, False)}
    return names or before, _load_react((*earlier, *settings), {**given, **told})


def _load_react(settings: tuple[str, ...], given: Mapping[str, Any]) -> Any:
    from virtbus import config as settings_module

    options = dict(given)
    for text in settings:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--option {text}: write KEY=VALUE")
        dotted = f"react.{key}"
        if not settings_module.knows(dotted):
            dotted = f"react.options.{key}"
        options[dotted] = settings_module.from_text(dotted, value)
    return _load(options)


@cli.command()
@_common
@_bus
@_state_dir
@click.option("--events", type=click.IntRange(1), default=10_000, show_default=True, metavar="N",
              help="How many are published as fast as it goes.")  # fmt: skip
@click.option("--domains", type=click.IntRange(1), default=1000, show_default=True, metavar="N",
              help="Of how many domains: one event of each is under way at a time.")  # fmt: skip
@click.option("--group", metavar="NAME",
              help="Into this durable group, whose queue stays [default: a transient one].")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def bench(events: int, domains: int, group: str | None, as_json: bool, **options: Any) -> None:
    """Measure a bus from this host: events confirmed a second, and how long a confirm takes.

    The events are made up and go to an exchange or topic of their own, virtbus.bench: no consumer of real
    events sees them.

    \b
    Example: virtbus bench --bus amqp://guest:guest@127.0.0.1//
    """
    from virtbus.commands import bench as command

    command.run(_load(options).config, events=events, domains=domains, group=group, as_json=as_json,
                out=sys.stdout, notices=sys.stderr)  # fmt: skip


@cli.group()
def config() -> None:
    """Show and check the settings.

    \b
    Example: virtbus config check
    """


@config.command("show")
@_common
@_bus
@_libvirt
@_state_dir
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def config_show(as_json: bool, **options: Any) -> None:
    """Print the effective settings, without secrets, and where each one comes from.

    \b
    Example: virtbus config show --json
    """
    from virtbus.commands import settings as command

    command.show(_load(options), as_json=as_json, out=sys.stdout)


@config.command("schema")
def config_schema() -> None:
    """Print the settings' JSON schema.

    \b
    Example: virtbus config schema > virtbus.schema.json
    """
    from virtbus.commands import settings as command

    command.schema(sys.stdout)


@config.command("check")
@_common
def config_check(**options: Any) -> None:
    """Check the settings without connecting to anything.

    \b
    Example: virtbus config check --config virtbus.toml
    """
    from virtbus.commands import settings as command

    command.check(_load(options), sys.stdout)


@cli.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE…|-")
@click.option("--schema", "schema_name", metavar="URN|TYPE",
              help="The input is data of this schema, not whole events.")  # fmt: skip
@click.option("--format", "fmt", type=click.Choice(["text", "json"]), default="text", help="How to tell.")
def validate(files: tuple[str, ...], schema_name: str | None, fmt: str) -> None:
    """Check events against their schemas: structured CloudEvents, one document or JSON lines.

    Tells all problems at once, each with its JSON pointer, what was expected and what was found. Ends with
    0 when all is valid, 65 when something is not (or there was nothing to check), 66 when a file can't be
    read.

    \b
    Example: virtbus consume --count 10 | virtbus validate -
    """
    from virtbus.commands import validate as command

    sys.exit(command.run(files, sys.stdout, fmt=fmt, schema_name=schema_name))


@cli.group("schema")
def schema_group() -> None:
    """Show, check and hand out the events' JSON schemas.

    \b
    Example: virtbus schema list
    """


@schema_group.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def schema_list(as_json: bool) -> None:
    """List the schemas of this release: id, status and how the SHA-256 begins (all of it with --json).

    \b
    Example: virtbus schema list --json
    """
    from virtbus.commands import schema as command

    command.list_schemas(sys.stdout, as_json=as_json)


@schema_group.command("show")
@click.argument("name", metavar="URN|TYPE")
def schema_show(name: str) -> None:
    """Print a schema; an event type prints its newest.

    \b
    Example: virtbus schema show io.virtbus.domain.io_error.v1
    """
    from virtbus.commands import schema as command

    command.show(name, sys.stdout)


@schema_group.command("export")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def schema_export(folder: Path) -> None:
    """Write all schemas below FOLDER, for other languages and registries.

    \b
    Example: virtbus schema export schemas
    """
    from virtbus.commands import schema as command

    command.export(folder, sys.stdout)


@schema_group.command("check")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--released", type=click.Path(path_type=Path), metavar="FOLDER",
              help="An earlier release's schemas: each of its files must be here, unchanged.")  # fmt: skip
def schema_check(folder: Path | None, released: Path | None) -> None:
    """Check FOLDER [default: this release's schemas] for what would break a consumer.

    A released file never changes, and every minor version must be readable by a consumer of every older
    one. Ends with 0 or 65.

    \b
    Example: virtbus schema check schemas --released older-schemas
    """
    from virtbus.commands import schema as command

    sys.exit(command.check(sys.stdout, folder=folder, released=released))


@schema_group.command("asyncapi")
def schema_asyncapi() -> None:
    """Print the AsyncAPI 3 document: exchange, topic, keys, headers and payloads.

    \b
    Example: virtbus schema asyncapi > asyncapi.json
    """
    from virtbus.commands import contract as command

    command.asyncapi(sys.stdout)


@schema_group.command("reference")
@click.argument("page", required=False, type=_FILE)
def schema_reference(page: Path | None) -> None:
    """Print the tables of all fields; with PAGE renew what stands between its markers.

    \b
    Example: virtbus schema reference docs/events.md
    """
    from virtbus.commands import contract as command

    command.reference(sys.stdout, page=page)


@cli.group()
def spool() -> None:
    """Look into the spool, and let an operator decide what becomes of an event.

    Works beside a running agent, which then does what was asked; an interrupt leaves it to that.

    \b
    Example: virtbus spool list --dead
    """


@spool.command("status")
@_common
@_state_dir
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def spool_status(as_json: bool, **options: Any) -> None:
    """How much waits and since when, who holds the spool, what was set aside.

    \b
    Example: virtbus spool status --json
    """
    from virtbus.commands import spool as command

    command.status(Path(_load(options).config.state_dir), sys.stdout, as_json=as_json)


@spool.command("list")
@_common
@_state_dir
@click.option("--dead", is_flag=True, help="The dead letters instead of what waits.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines.")
def spool_list(dead: bool, limit: int, as_json: bool, **options: Any) -> None:
    """List what waits, the oldest first.

    \b
    Example: virtbus spool list --dead
    """
    from virtbus.commands import spool as command

    folder = Path(_load(options).config.state_dir)
    command.list_events(folder, sys.stdout, dead=dead, limit=limit, as_json=as_json)


@spool.command("show")
@_common
@_state_dir
@click.argument("event", metavar="ID|NUMBER")
def spool_show(event: str, **options: Any) -> None:
    """Print one event as it would go out.

    \b
    Example: virtbus spool show 17
    """
    from virtbus.commands import spool as command

    command.show(Path(_load(options).config.state_dir), event, sys.stdout)


@spool.command("retry")
@_common
@_state_dir
@click.argument("events", nargs=-1, metavar="[ID|NUMBER]…")
@_patience
def spool_retry(events: tuple[str, ...], patience: float, **options: Any) -> None:
    """Send refused dead letters again, with the same ids; all of them when none is named.

    \b
    Example: virtbus spool retry 17 18
    """
    from virtbus.commands import spool as command

    command.retry(Path(_load(options).config.state_dir), events, sys.stdout,
                  notices=sys.stderr, patience=patience)  # fmt: skip


@spool.command("drop")
@_common
@_state_dir
@click.argument("events", nargs=-1, metavar="[ID|NUMBER]…")
@click.option("--dead", is_flag=True, help="Dead letters instead of what waits.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_patience
def spool_drop(events: tuple[str, ...], dead: bool, yes: bool, patience: float, **options: Any) -> None:
    """Give events up; each is named in a gap event. All of them when none is named.

    \b
    Example: virtbus spool drop --dead
    """
    from virtbus.commands import spool as command

    def confirm(question: str) -> bool:
        return yes or click.confirm(question, err=True)

    command.drop(Path(_load(options).config.state_dir), events, sys.stdout, dead=dead, confirm=confirm,
                 notices=sys.stderr, patience=patience)  # fmt: skip


@cli.group("print")
def print_group() -> None:
    """Print files for the host that virtbus runs on.

    \b
    Example: virtbus print unit > /etc/systemd/system/virtbus.service
    """


@print_group.command("unit")
@_common
@click.option("--user", default="virtbus", show_default=True, help="The user it runs as.")
@click.option("--command", "program", metavar="PATH", help="The program [default: this one].")
def print_unit(user: str, program: str | None, **options: Any) -> None:
    """Print a hardened systemd unit for `virtbus run`; its head says how to install it.

    \b
    Example: virtbus print unit > /etc/systemd/system/virtbus.service
    """
    from virtbus.commands import unit as command

    drain = _load(options).config.drain_seconds
    command.unit(sys.stdout, user=user, command=program, drain_seconds=drain)
