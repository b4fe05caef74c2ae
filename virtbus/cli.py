"""The command line: which commands there are; their options stand with them in `virtbus.commands`.

Every failure is one clear line a problem on stderr and an exit code of sysexits.h; `--debug` adds the
traceback. A command's module is imported when it is asked for, so that `virtbus --help` is quick.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Mapping
from importlib import import_module
from io import TextIOWrapper
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from virtbus import __version__, plugins, redaction
from virtbus.errors import ConfigError, SpoolFull, VirtbusError

EXIT_USAGE = ConfigError.exit_code
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

# Each command: its module in `virtbus.commands` and its name there, and the first line of its help.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "run": ("run:command", "Run the agent in the foreground."),
    "consume": (
        "consume:consume_command",
        "Print events as they come: one CloudEvent in structured JSON per line.",
    ),
    "dead": ("consume:dead", "A consumer group's dead letters: count, list, send back, drop."),
    "watch": ("watch:command", "Print libvirt's events on the terminal: no broker, no spool."),
    "demo": (
        "demo:command",
        "Replay recorded real I/O errors through the whole pipeline, on the embedded bus.",
    ),
    "status": ("ask:status_command", "Ask the running agent what it is doing and what it holds."),
    "tap": ("ask:tap_command", "Look at what passes through the running agent, one JSON line an item."),
    "emit": (
        "ask:emit_command",
        "Run an alert drill: an event that says `replay`, through the running agent to the broker.",
    ),
    "agent-id": (
        "host:agent_id_command",
        "Print the agent's id, which its routing keys and broker permissions name.",
    ),
    "doctor": ("doctor:command", "Look at every part: what is wrong, on what, and what to do."),
    "fleet": ("fleet:command", "Show which hosts and storage systems are in trouble, and whose fault it is."),
    "react": ("react:command", "Act on control planes: run integrations until a signal, each for itself."),
    "config": ("settings:command", "Show and check the settings."),
    "validate": (
        "schema:validate_command",
        "Check events against their schemas: structured CloudEvents, one document or JSON lines.",
    ),
    "schema": ("schema:command", "Show and hand out the events' JSON schemas."),
    "spool": ("spool:command", "Look into the spool, and let an operator decide what becomes of an event."),
    "print": ("host:print_group", "Print files for the host that virtbus runs on."),
}


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments or os.environ.get("VIRTBUS_DEBUG") == "1"
    _open_standard_streams()
    if arguments[:1] == ["run"]:
        # A reload that is asked for while the agent still starts: done when it can be, and not its end.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
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
        _discard_output()  # whoever read it has had enough (| head): that is not a failure
        code = 0
    except VirtbusError as error:
        if debug:
            _trace(error)
        _complain(str(error))
        code = error.exit_code
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported, and the process exits with a code
        if debug:
            _trace(error)
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
        if sys.stdout is not streams[0]:  # click has wrapped it: its way to exit with 1 for a broken pipe
            sys.stdout, sys.stderr = streams
            raise BrokenPipeError from None
        return error.code


def _discard_output() -> None:
    """What standard output did not take goes nowhere, also at the interpreter's end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _trace(error: Exception) -> None:
    """The traceback, without the secrets that other people's exceptions may hold."""
    import traceback

    for entry in traceback.format_exception(error):
        click.echo(redaction.text(entry), err=True, nl=False)


def _complain(text: str) -> None:
    from virtbus.log import printable  # a broker's words may be among them

    for line in redaction.text(text).splitlines() or [""]:
        click.echo(f"virtbus: {printable(line)}", err=True)


class _Lazy(click.Group):
    """A group whose commands are imported when they are asked for, one by one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See click.Group."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """See click.Group."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        try:
            command: click.Command = getattr(import_module(f"virtbus.commands.{module}"), name)
        except ModuleNotFoundError as error:
            raise plugins.missing(error, f"virtbus {cmd_name}") from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See click.Group."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """See click.Group."""
        found = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        items = [CompletionItem(name, help=COMMANDS[name][1]) for name in found]
        return [*items, *click.Command.shell_complete(self, ctx, incomplete)]


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", message="virtbus %(version)s")
def cli() -> None:
    """Every guest I/O error that libvirt reports, as a durable CloudEvent on RabbitMQ or Kafka.

    \b
    Try it without a broker:   virtbus demo
    Run the agent on a host:   virtbus run --bus amqps://virtbus@broker//
    See the events:            virtbus consume --bus amqps://virtbus@broker//
    """
