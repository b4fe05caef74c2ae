"""`virtbus doctor`: look at every part once; say what is wrong, on what, and what to do.

It changes nothing but one thing it says: a probe event (type PROBE_TYPE) goes to the bus and is confirmed,
because only that shows that this identity may publish. Consumers that know our types only hand it over as an
unknown type.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import click

from virtbus import envelope, redaction
from virtbus.agent.identity import read_agent_id
from virtbus.bus.certificates import ends_of
from virtbus.bus.url import DEFAULT_PORTS, read_url
from virtbus.commands import checks
from virtbus.commands.checks import Look, fail, ok, warn
from virtbus.commands.common import (
    as_json,
    common,
    libvirt,
    load,
    on_bus,
    open_bus,
    open_source,
    state_dir,
    timeout,
)
from virtbus.errors import BusDenied, BusUnavailable, ConfigError, VirtbusError
from virtbus.loading import Loaded, bus_url
from virtbus.log import printable, takes_colour
from virtbus.model import Check, Confirmed, Nacked, Record, Refused, Unroutable, to_datetime

PROBE_TYPE = "io.virtbus.agent.probe.v1"
SOON_DAYS = 14.0  # a certificate that ends within so many days is a warning
_MARKS = {"ok": ("ok  ", "32"), "warning": ("WARN", "33"), "failed": ("FAIL", "31"), "skipped": ("skip", "2")}
_REMEDIES: dict[type[VirtbusError], str] = {
    ConfigError: "fix the setting; `virtbus config show` says where it comes from",
    BusDenied: "check user, password, certificate and the broker's permissions",
    BusUnavailable: "check address, firewall and that the broker runs",
}


def examine(loaded: Loaded, timeout: float) -> Iterator[Check]:
    """Every check, one after the other."""
    look = Look(loaded, timeout)
    try:
        for name, part in _PARTS.items():
            for check in _bounded(name, part, look):
                if check.status == "failed":
                    look.failed.add(name)
                yield check
    finally:
        if look.bus is not None:
            look.bus.close()


def _bounded(name: str, part: Callable[[Look], Iterable[Check]], look: Look) -> Iterator[Check]:
    """The checks of a part, on a thread: one that hangs (a frozen libvirt) is a finding, not our end."""
    found: list[Check] = []

    def run() -> None:
        try:
            found.extend(part(look))
        except VirtbusError as error:
            found.append(Check(name, "failed", str(error), _REMEDIES.get(type(error)), error.exit_code))
        except Exception as error:  # noqa: BLE001 - a part that breaks is a finding
            found.append(
                fail(name, f"unexpected {type(error).__name__}: {error}", "report it", os.EX_SOFTWARE)
            )

    thread = threading.Thread(target=run, name=f"virtbus-doctor-{name}", daemon=True)
    thread.start()
    thread.join(look.timeout + 1.0)
    if thread.is_alive():
        remedy = "look at the network path and at the broker's log"
        if name == "libvirt":
            remedy = (
                "look at libvirtd's process and log; one that was stopped shows as state T in ps (kill -CONT)"
            )
        elif name == "spool":
            remedy = "look at the disk below the folder, and at the kernel's log"
        yield fail(name, f"no answer within {look.timeout:g} s: it hangs", remedy, os.EX_UNAVAILABLE)
        return
    for check in found:  # whoever looked, no secret is shown, and a failure is never without a next step
        remedy_ = check.remedy
        if check.status == "failed" and not remedy_:
            kinds = (text for kind, text in _REMEDIES.items() if kind.exit_code == check.exit_code)
            remedy_ = next(kinds, "see the message")
        yield replace(check, summary=redaction.text(check.summary), remedy=remedy_)


# -------------------------------------------------------------------------------------------- the broker


def _targets(loaded: Loaded) -> list[tuple[str, int, str]]:
    """(host, port, name to be verified there) of every broker that the bus URL reaches by TLS."""
    targets = []
    try:
        for url in re.split(r";(?=[a-z][a-z0-9+.-]*:)", bus_url(loaded.config)):
            parts = read_url(url)
            if parts.scheme not in ("amqps", "kafkas"):  # a third party's adapter looks by itself (Bus.probe)
                continue
            for host, port in parts.hosts:
                name = loaded.config.bus.tls.server_name or host
                targets.append((host, port or DEFAULT_PORTS[parts.scheme], name))
    except ConfigError:
        return []  # the bus's own check reports it
    return targets


# X509_V_ERR_* (openssl-verification-options(1)) → what to do.
_AUTHORITY = "set bus.tls.ca_file to the authority that signed the broker's certificate"
_NAME = "use a name of the certificate as the host in bus.url, or set bus.tls.server_name"
_VERIFY_REMEDIES = {
    9: "set this host's clock, or the certificate is not valid yet",
    10: "renew the broker's certificate (or is this host's clock wrong?)",
    18: "set bus.tls.ca_file to the broker's own certificate or to its authority",
    **dict.fromkeys((19, 20, 21), _AUTHORITY),
    **dict.fromkeys((62, 64), _NAME),
}


def _tls(look: Look) -> Iterator[Check]:
    """One handshake with each broker, our trust and our certificate: chain, host name, days left."""
    files = look.loaded.config.bus.tls
    for host, port, name in _targets(look.loaded):
        where = f"{host}:{port}"
        try:
            context = ssl.create_default_context(cafile=files.ca_file)
            if files.cert_file is not None:
                context.load_cert_chain(files.cert_file, files.key_file)
        except OSError as error:  # ssl.SSLError is one
            named = ", ".join(filter(None, (files.ca_file, files.cert_file, files.key_file)))
            remedy = "bus.tls.* name PEM files that this user can read; the key belongs to the certificate"
            yield fail("tls", f"{named}: can't be used: {error.strerror or error}", remedy, os.EX_CONFIG)
            continue
        try:
            with (
                socket.create_connection((host, port), look.timeout) as plain,
                context.wrap_socket(plain, server_hostname=name) as secure,
            ):
                certificate, version = secure.getpeercert() or {}, secure.version()
        except ssl.SSLCertVerificationError as error:
            summary = f"{where}: the broker's certificate is refused: {error.verify_message}"
            remedy = "check bus.tls.ca_file and the broker's certificate"
            yield fail("tls", summary, _VERIFY_REMEDIES.get(error.verify_code, remedy), os.EX_NOPERM)
            continue
        except OSError as error:
            reason = getattr(error, "reason", None) or error.strerror or str(error)
            remedy = "check that this is the broker's TLS port, and that it runs"
            yield fail("tls", f"{where}: no TLS connection: {reason}", remedy, os.EX_UNAVAILABLE)
            continue
        days = (ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()) / 86400
        summary = f"{where}: {version}, verified for {name}, {days:.0f} days left"
        details: dict[str, Any] = {"days_left": round(days, 1), "protocol": version}
        if days < SOON_DAYS:
            yield warn("tls", summary, "renew the broker's certificate", **details)
        else:
            yield ok("tls", summary, **details)


def _own_certificate(look: Look) -> Iterator[Check]:
    """How long the broker will go on taking our certificate. One that can't be read is reported by `tls`."""
    path = look.loaded.config.bus.tls.cert_file
    ends = ends_of(path) if path is not None and _targets(look.loaded) else ()
    if not ends:
        return
    days = (ends[0] - time.time()) / 86400
    summary, remedy = f"{path}: {days:.0f} days left", "renew it; the next connection uses the new file"
    if days < 0:
        summary = f"{path}: ended {-days:.0f} days ago"
        yield fail("client certificate", summary, remedy, os.EX_NOPERM, days_left=round(days, 1))
    elif days < SOON_DAYS:
        yield warn("client certificate", summary, remedy, days_left=round(days, 1))
    else:
        yield ok("client certificate", summary, days_left=round(days, 1))


def _bus(look: Look) -> Iterable[Check]:
    look.bus = open_bus(look.loaded.config)
    return look.bus.probe()


class _OneRecord:
    """A feed of a single record."""

    def __init__(self, record: Record) -> None:
        self._records = [record]

    def take(self, limit: int, busy: object) -> list[Record]:
        """See virtbus.bus.Feed."""
        taken, self._records = self._records, []
        return taken


def _round_trip(look: Look) -> Iterator[Check]:
    """Publish one probe event and wait for the broker's word."""
    if look.bus is None or "bus" in look.failed:
        yield Check("bus round trip", "skipped", "the bus can't be used: see above")
        return
    now, agent_id = time.time_ns(), read_agent_id(look.state_dir) or "doctor"
    event_id = envelope.uuid7(now)
    attributes = {
        "specversion": "1.0",
        "id": event_id,
        "type": PROBE_TYPE,
        "source": f"/virtbus/agents/{agent_id}",
        "subject": agent_id,
        "time": to_datetime(now).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "partitionkey": agent_id,
    }
    record = Record(
        row=0,
        epoch=event_id,
        seq=0,
        id=event_id,
        key=agent_id,
        attributes=attributes,
        body=b"{}",
        created_ns=now,
    )
    begun = time.monotonic()
    outcome = None
    for _, outcome in look.bus.publish(_OneRecord(record)):  # noqa: B007 - the last one counts
        pass
    seconds = time.monotonic() - begun
    if isinstance(outcome, Confirmed):
        summary = f"a probe event was confirmed in {seconds * 1000:.0f} ms"
        yield ok("bus round trip", summary, seconds=round(seconds, 6))
    elif isinstance(outcome, Unroutable):
        remedy = "bind a consumer's queue: events wait in the spool until somebody does"
        if outcome != Unroutable():
            remedy = "permit this agent's routing keys, and the probe's: docs/security.md"
        yield warn("bus round trip", f"we may publish, but {outcome.reason}", remedy)
    elif isinstance(outcome, Nacked):
        summary = f"the broker does not take our events now: {outcome.reason}"
        yield warn("bus round trip", summary, "make room in its queues: events wait in the spool")
    else:
        error = outcome.error if outcome is not None else BusUnavailable("the broker gave no answer")
        kind = BusDenied if isinstance(outcome, Refused) or isinstance(error, BusDenied) else BusUnavailable
        yield fail("bus round trip", str(error), _REMEDIES[kind], kind.exit_code)


_PARTS: dict[str, Callable[[Look], Iterable[Check]]] = {
    "schemas": checks.schemas,
    "user": checks.user,
    "secrets": checks.secrets,
    "clock": checks.clock,
    "spool": checks.spool,
    "libvirt": lambda look: open_source(look.loaded.config).probe(),
    "tls": _tls,
    "client certificate": _own_certificate,
    "bus": _bus,
    "bus round trip": _round_trip,
}


# ----------------------------------------------------------------------------------------- the command line


@click.command("doctor")
@common
@libvirt
@on_bus
@state_dir
@as_json
@timeout(0.1, 15.0, "How long one part may take to answer.")
def command(as_json: bool, timeout: float, **options: Any) -> None:
    """Look at every part: what is wrong, on what, and what to do.

    libvirt and its events, the broker with credentials, TLS and topology, one confirmed probe event, the
    spool's disk, the clock, the schemas. Ends with the first failure's exit code.

    \b
    Example: virtbus doctor --bus amqps://virtbus@broker//
    """
    found = []
    for check in examine(load(options), timeout):
        found.append(check)
        if not as_json:
            click.echo(lines(check, terminal=sys.stdout.isatty(), colour=takes_colour(sys.stdout)), nl=False)
    failed = (check.exit_code or VirtbusError.exit_code for check in found if check.status == "failed")
    code = next(failed, 0)
    if as_json:
        names = ("name", "status", "summary", "remedy", "exit_code")
        plain = [
            {**{name: getattr(check, name) for name in names}, "details": dict(check.details)}
            for check in found
        ]
        click.echo(json.dumps({"ok": code == 0, "checks": plain}, indent=2, ensure_ascii=False))
    sys.exit(code)


def lines(check: Check, *, terminal: bool, colour: bool) -> str:
    """A check for people; what others chose can't move the terminal's cursor."""
    mark, code = _MARKS[check.status]
    out = [f"{mark} {check.name}: {printable(check.summary)}"]
    if check.remedy and check.status != "ok":
        out.append(f"     → {printable(check.remedy)}")
    if terminal:  # elsewhere one line each: for grep
        width = min(shutil.get_terminal_size().columns, 100)
        fill = textwrap.TextWrapper(
            width, subsequent_indent=" " * 7, break_long_words=False, break_on_hyphens=False
        ).fill
        out = [fill(line) for line in out]
    if colour:
        out[0] = f"\x1b[{code}m{mark}\x1b[0m{out[0].removeprefix(mark)}"
    return "\n".join(out) + "\n"
