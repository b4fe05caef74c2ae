"""What commands share: options and settings, the parts that they open, and how output fits a terminal."""

from __future__ import annotations

import ctypes
import os
import resource
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from virtbus import bus, loading, plugins, telemetry
from virtbus.bus import Bus, BusOptions
from virtbus.config import Config
from virtbus.loading import Loaded, bus_url
from virtbus.log import printable, takes_escapes
from virtbus.sources import Source, SourceFactory, SourceOptions

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

F = TypeVar("F", bound=Callable[..., Any])

# ---------------------------------------------------------------------------------------------- options


class Seconds(click.FloatRange):
    """Seconds up to a year: nan and infinity pass every comparison that would end a wait, more overflows."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See click.ParamType."""
        seconds = super().convert(value, param, ctx)
        if not seconds <= 366 * 86400:
            self.fail(f"{seconds} is not a number of seconds up to a year", param, ctx)
        return seconds


# A file that is missing or not ours to read: its reader says so, with the right exit code.
FILE = click.Path(readable=False, path_type=Path)


def setting(key: str, *names: str, help: str, **more: Any) -> Callable[[F], F]:
    """An option that overrides the setting `key`."""
    return click.option(*names, key.replace(".", "__"), help=help, **more)


def common(command: F) -> F:
    """The options that every command with settings takes."""
    file = click.option("--config", "config_file", type=FILE, metavar="FILE",
                        help="Settings [default: /etc/virtbus/virtbus.toml if it is there].")  # fmt: skip
    return file(
        click.option("--debug", is_flag=True, help="Tracebacks, and the log at level debug.")(command)
    )


as_json = click.option("--json", "as_json", is_flag=True, help="As JSON.")
on_bus = setting("bus.url", "--bus-url", "--bus", metavar="URL",
                 help="amqp[s]://…, kafka[s]://…, embedded: or embedded:///FILE (bus.url).")  # fmt: skip
libvirt = setting("libvirt.uri", "--libvirt-uri", "--libvirt", metavar="URI",
                  help="Hypervisor, e.g. qemu:///system (libvirt.uri).")  # fmt: skip
control = setting("control.socket", "--control-socket", metavar="PATH", help="The agent's control socket.")
state_dir = setting("state_dir", "--state-dir", metavar="DIR", help="Folder of the spool (state_dir).")


def timeout(least: float, default: float | None, help: str) -> Callable[[F], F]:
    """`--timeout`, in seconds."""
    return click.option("--timeout", type=Seconds(least), default=default, show_default=default is not None,
                        metavar="S", help=help)  # fmt: skip


def load(options: Mapping[str, Any]) -> Loaded:
    """Settings from file, environment and this command's flags; the log is set up from them."""
    loaded = read(options)
    telemetry.configure(level=loaded.config.log.level, fmt=loaded.config.log.format)
    return loaded


def read(options: Mapping[str, Any]) -> Loaded:
    """Settings from file, environment and this command's flags."""
    flags = {
        key.replace("__", "."): value
        for key, value in options.items()
        if key not in ("config_file", "debug") and value is not None
    }
    if options.get("debug"):
        flags["log.level"] = "debug"
    named = options.get("config_file") or os.environ.get("VIRTBUS_CONFIG")
    return loading.load(file=Path(named) if named else None, flags=flags)


# ------------------------------------------------------------------------------------------------ parts


def bus_options(config: Config) -> BusOptions:
    """What every adapter may ask for. Raises ConfigError for settings that exclude each other."""
    settings, kafka = config.bus, config.bus.kafka

    def path(name: str | None) -> Path | None:
        return None if name is None else Path(name)

    topic = {}
    if kafka.topic.retention_seconds is not None:
        topic["retention.ms"] = str(kafka.topic.retention_seconds * 1000)
    if kafka.topic.min_insync_replicas is not None:
        topic["min.insync.replicas"] = str(kafka.topic.min_insync_replicas)
    return BusOptions(
        exchange=settings.exchange,
        topic=settings.topic,
        declare=settings.declare,
        window=settings.window,
        structured=settings.content_mode == "structured",
        heartbeat=settings.heartbeat_seconds,
        confirm_timeout=settings.confirm_timeout_seconds,
        connect_timeout=settings.connect_timeout_seconds,
        username=settings.username,
        password_file=path(settings.password_file),
        auth=settings.auth,
        sasl_mechanism=kafka.sasl_mechanism,
        oauth_token_file=path(kafka.oauth_token_file),
        oauth_token_command=kafka.oauth_token_command or (),
        tls_ca_file=path(settings.tls.ca_file),
        tls_cert_file=path(settings.tls.cert_file),
        tls_key_file=path(settings.tls.key_file),
        tls_server_name=settings.tls.server_name,
        topic_partitions=kafka.topic.partitions,
        topic_replication=None if kafka.topic.replication == -1 else kafka.topic.replication,
        topic_config=topic,
        extra=kafka.options,
        state_dir=Path(config.state_dir),
    )


def open_bus(config: Config) -> Bus:
    """The bus of the settings. Raises ConfigError; connects to nothing yet."""
    return bus.open_bus(bus_url(config), bus_options(config))


def open_source(config: Config, *, since_ns: int | None = None) -> Source:
    """The source of `libvirt.uri`: a scheme that an entry point of `virtbus.sources` names, else libvirt.

    `since_ns`: up to when the last run saw everything; what the hypervisor kept from after it is reported.
    """
    settings, group = config.libvirt, "virtbus.sources"
    options = SourceOptions(
        grace_seconds=settings.grace_seconds, owner_rules=settings.owner_rules, since_ns=since_ns
    )
    if settings.discover.on:
        from virtbus.sources.many import ManySource

        uri = settings.uri if settings.discover.with_uri else None
        return ManySource(settings.discover, options=options, uri=uri)
    point = plugins.find(group, settings.uri.partition(":")[0]) or plugins.find(group, "libvirt")
    assert point is not None  # the package's own
    factory: SourceFactory = plugins.load(point, settings.uri)
    return factory(settings.uri, options=options)


def keep_memory_private() -> None:
    """No core dump, and no look by others of our uid into /proc: we hold the broker's password."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None, use_errno=True).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE, <linux/prctl.h>


# ---------------------------------------------------------------------------------------------- terminal

COLUMNS = 80


class Progress:
    """Shows how far the work is; drawn with the first step, below what connecting has logged."""

    def __init__(self, bar: ProgressBar[int], drawn: ExitStack, notices: TextIO) -> None:
        """`drawn` ends the bar when the work ends."""
        self._bar, self._drawn, self._notices = bar, drawn, notices

    def update(self, steps: int) -> None:
        """So many more are done."""
        if not self._bar.entered:
            self._drawn.enter_context(self._bar)
        self._bar.update(steps)

    def make_way(self, out: TextIO) -> None:
        """Take the bar off the line before something is written to `out`; the next step draws it again."""
        if self._bar.entered and not self._bar.hidden and out.isatty():
            self._notices.write("\r\x1b[K")
            self._notices.flush()


@contextmanager
def progress(length: int, label: str, notices: TextIO) -> Iterator[Progress]:
    """A bar of `length` steps on `notices` if that is a terminal, else nothing; nothing for 0 steps too."""
    shown = length > 0 and takes_escapes(notices)
    columns = os.get_terminal_size(notices.fileno()).columns if shown else COLUMNS
    with ExitStack() as drawn:
        bar = click.progressbar(
            length=length,
            label=label,
            file=notices,
            hidden=not shown,
            width=max(1, min(30, columns - len(label) - 25)),  # brackets, per cent and time left take 25
            update_min_steps=max(1, length // 500),
        )
        yield Progress(bar, drawn, notices)


def rows(pairs: Iterable[tuple[str, str]]) -> str:
    """(name, text) as lines; a long text goes on below itself, but a long word stays whole."""
    return "".join(wrapped(f"{name:<10} {text}", indent=11) for name, text in pairs)


def wrapped(text: str, *, indent: int) -> str:
    """A text in lines that fit, all but the first of them indented; a long word stays whole."""
    filled = textwrap.fill(printable(text), COLUMNS, subsequent_indent=" " * indent,
                           break_long_words=False, break_on_hyphens=False)  # fmt: skip
    return filled + "\n"


def cut(text: str, width: int) -> str:
    """A name of somebody else's in at most `width` columns: nothing in it may move the terminal's cursor."""
    clean = printable(text)
    return clean if len(clean) <= width else clean[: width - 1] + "…"
