"""`virtbus watch`: libvirt's events on the terminal, as they come: no broker, no spool, no folding."""

from __future__ import annotations

import queue
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TextIO

import click

from virtbus.commands.common import Seconds, common, libvirt, load
from virtbus.errors import ConfigError, SourceUnavailable, VirtbusError
from virtbus.log import printable
from virtbus.model import Domain, Host
from virtbus.observations import Description, RawIoError
from virtbus.sources import SourceOptions, domain_xml, recording
from virtbus.sources.descriptions import Cache
from virtbus.sources.libvirt import LibvirtConnector
from virtbus.sources.link import STARTED, STATES, Handler, Link
from virtbus.words import Action, GuestState

_EVENTS = ("defined", "undefined", "started", "suspended", "resumed", "stopped", "shutdown", "pmsuspended")
_SUSPENDED = ("paused", "migrated", "I/O error", "watchdog", "restored", "from snapshot", "API error")
_STOPPED = ("shutdown", "destroyed", "crashed", "migrated", "saved", "failed", "from snapshot")


def run(uri: str, *, as_json: bool, out: TextIO, timeout: float | None = None) -> None:
    """Print until `timeout` seconds are over or an interrupt.

    With `as_json` each line is one of a recording (virtbus.sources.recording), which the replay source
    plays. Raises SourceUnavailable when libvirt is away or goes away, SourceDenied, ConfigError.
    """
    if uri.startswith("replay:"):
        raise ConfigError(f"{uri} is not a hypervisor: `virtbus demo --recording FILE` plays a recording")
    watch = _Watch(as_json)
    link = LibvirtConnector(uri, SourceOptions()).open(watch)
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        facts = link.facts()
        found = Host(facts.name, hypervisor=replace(facts.hypervisor, version=link.version()))
        watch.say(recording.host_line(found), facts.name)
        for domain in link.domains():
            watch.describe(link, domain.uuid, domain.name, STATES.get(domain.state, ""))
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            try:
                # Not for ever: an interrupt must be seen.
                line = watch.lines.get(timeout=1.0 if left is None else min(1.0, left))
            except queue.Empty:
                continue
            if isinstance(line, SourceUnavailable):
                raise SourceUnavailable(f"{uri}: {line}")
            if isinstance(line, tuple):
                watch.describe(link, *line, "running")
                continue
            out.write(line + "\n")
            out.flush()
    except BrokenPipeError:
        return
    finally:
        link.close()


class _Watch(Handler):
    """Turns callbacks into lines, for the thread that writes them."""

    def __init__(self, as_json: bool) -> None:
        # A line, a guest that was started (uuid, name), or the end.
        self.lines: queue.SimpleQueue[str | tuple[str, str] | SourceUnavailable] = queue.SimpleQueue()
        self._as_json = as_json
        self._known = Cache()

    def say(self, as_json: str, as_text: str) -> None:
        """Queue a line in the form that was asked for."""
        self.lines.put(as_json if self._as_json else as_text)

    def describe(self, link: Link, uuid: str, name: str, state: str) -> None:
        """Queue what is known of a domain; in text only its name."""
        try:
            xml = domain_xml.parse(link.xml(uuid))
        except VirtbusError as error:
            self.lines.put(recording.problem_line(str(error)) if self._as_json else printable(str(error)))
            return
        self._known.saw(uuid, name, xml.id, GuestState(state))
        self._known.read(uuid, xml)
        domain = Domain(uuid, name, xml.id, GuestState(state), xml.owner)
        self.say(recording.domain_line(Description(domain, xml.devices)), f"{printable(name)} {uuid} {state}")

    def io_error(self, raw: RawIoError) -> None:
        """See Handler."""
        raw = self._known.shown(raw)
        action = Action.from_code(raw.action_code).value
        reason, path = printable(raw.reason) or "-", printable(raw.path) or "-"
        text = (
            f"{_at(raw.observed_at)} {printable(raw.domain_name)} I/O ERROR device={printable(raw.alias)} "
            f"action={action}({raw.action_code}) reason={reason} path={path}"
        )
        self.say(recording.io_error_line(raw), text)

    def lifecycle(self, uuid: str, name: str, number: int | None, event: int, detail: int) -> None:
        """See Handler."""
        ns = time.time_ns()
        words = {3: _SUSPENDED, 5: _STOPPED}.get(event, ())
        why = f" ({words[detail] if detail < len(words) else detail})" if words else ""
        what = _EVENTS[event] if event < len(_EVENTS) else f"lifecycle event {event}"
        if event == STARTED:
            self.lines.put((uuid, name))
        self.say(
            recording.lifecycle_line(uuid, name, number, event=event, detail=detail, ns=ns),
            f"{_at(ns)} {printable(name)} {what}{why}",
        )

    def device_removed(self, uuid: str, alias: str) -> None:
        """See Handler."""
        ns = time.time_ns()
        self.say(
            recording.device_removed_line(uuid, alias, ns),
            f"{_at(ns)} {uuid} device removed: {printable(alias)}",
        )

    def changed(self, uuid: str) -> None:
        """Not shown."""

    def job_ended(self, uuid: str, disk: str, *, failed: bool) -> None:
        """Not shown."""

    def undecodable(self) -> None:
        """See Handler."""
        text = "a callback was lost: its text is not UTF-8"
        self.say(recording.problem_line(text), text)

    def closed(self, why: str, silent_seconds: float) -> None:
        """See Handler."""
        self.lines.put(SourceUnavailable(why))


def _at(ns: int) -> str:
    return datetime.fromtimestamp(ns // 1000 / 1e6, UTC).isoformat(timespec="milliseconds")


@click.command("watch")
@common
@libvirt
@click.option("--json", "as_json", is_flag=True, help="JSON lines; `virtbus` can replay them.")
@click.option("--timeout", type=Seconds(0), metavar="S", help="End after S seconds.")
def command(as_json: bool, timeout: float | None, **options: Any) -> None:
    """Print libvirt's events on the terminal: no broker, no spool.

    \b
    Example: virtbus watch --libvirt qemu:///system --json > recording.jsonl
    """
    uri = load(options).config.libvirt.uri
    run(uri, as_json=as_json, out=sys.stdout, timeout=timeout)
