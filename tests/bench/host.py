"""What the agent costs its host, on a private libvirtd with real QEMU guests and a real RabbitMQ.

The agent runs as an operator runs it, `virtbus run`, with a Python that has `virtbus[agent]` and nothing else
(development tools beside it cost memory of their own).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.agent.process import AgentProcess
from tests.bench import peers
from tests.bench.events import Confirms, Events
from tests.bench.measure import Row, cpu_seconds, memory, ratio, wakeups
from tests.bench.publish import broker
from tests.lab.lab import Guest, Lab
from tests.waiting import wait_until
from virtbus.bus import BusOptions, open_bus
from virtbus.model import Confirmed
from virtbus.testing import ListFeed, records

IDLE_SECONDS = 120.0
WINDOW_SECONDS = 10.0
STORM_SECONDS = 60.0
KAFKA = ("confluent_kafka", "librdkafka")


def agent(folder: str, lab: Lab, bus: str, settings: str = "") -> AgentProcess:
    """`virtbus run` in the clean environment."""
    words = [str(peers.agent_python()), "-m", "virtbus"]
    # An installed package has its byte code: compiling it at each start costs a second and 2 MiB.
    return AgentProcess(
        Path(folder),
        libvirt=lab.uri_ro,
        bus=bus,
        settings=settings,
        command=words,
        PYTHONDONTWRITEBYTECODE="",
    )


# ------------------------------------------------------------------------------------- idle


def idle_rows(rounds: int, *, seconds: float = IDLE_SECONDS) -> list[Row]:
    """An agent that watches one healthy guest and has nothing to tell; and how long its start takes."""
    rss, anon, cpu, fastest, starts, kafka = [], [], [], [], [], []
    with broker() as node, Lab() as lab:
        lab.guest("quiet", error="EIO").start()
        url = node.url(node.vhost())
        for turn in range(rounds + 1):
            with tempfile.TemporaryDirectory() as folder:
                took = cold_start(folder, lab, url)
            if turn:  # the first one compiled
                starts.append(took)
        with tempfile.TemporaryDirectory() as folder, agent(folder, lab, url).ready() as one:
            pid = one.process.pid
            time.sleep(10)  # the start is over
            begun, spent = time.monotonic(), cpu_seconds(pid)
            # Windows so short that the heartbeat, each minute, falls into one of them: the median is without.
            for _ in range(max(rounds, round(seconds / WINDOW_SECONDS))):
                before = wakeups(pid)
                time.sleep(WINDOW_SECONDS)
                now = wakeups(pid)
                rates = {key: (now[key] - before.get(key, 0)) / WINDOW_SECONDS for key in now}
                fastest.append(max(rates.values()))
                rss.append(memory(pid)["VmRSS"])
                anon.append(memory(pid)["RssAnon"])
            cpu.append((cpu_seconds(pid) - spent) / (time.monotonic() - begun) * 100)  # heartbeats too
            kafka.append(sum(word in Path(f"/proc/{pid}/maps").read_text() for word in KAFKA))
    return [
        Row("idle rss", "idle agent on AMQP: RSS", tuple(rss), "MiB", 60, least=False),
        Row("idle anon", "idle agent on AMQP: RssAnon", tuple(anon), "MiB", 40, least=False),
        Row("idle cpu", "idle agent on AMQP: CPU of one core", tuple(cpu), "%", 0.1, least=False),
        Row(
            "idle wake-ups",
            "idle agent: wake-ups a second of its busiest thread, median of windows of 10 s",
            tuple(fastest),
            "/s",
            1.1,
            least=False,
        ),
        Row("idle kafka", "idle agent on AMQP: Kafka libraries loaded", tuple(kafka), "", 0, least=False),
        Row("cold start", "from exec to callbacks registered", tuple(starts), "s", 0.7, least=False),
    ]


def cold_start(folder: str, lab: Lab, url: str) -> float:
    """Seconds from exec until libvirt's callbacks are registered, as the agent's own log has it."""
    begun = time.time()
    with agent(folder, lab, url) as one:
        one.until(lambda: _connected_at(one.log) is not None, "connected", 30)
        at = _connected_at(one.log)
    assert at is not None
    return at - begun


def _connected_at(log: str) -> float | None:
    for line in log.splitlines():
        found = json.loads(line)
        if str(found.get("event")).startswith("libvirt connected"):
            return datetime.fromisoformat(found["timestamp"]).timestamp()
    return None


# ------------------------------------------------------------------------------------- latency


def fsync_seconds(folder: Path, times: int) -> list[float]:
    """How long an append of 8 KiB and its fdatasync take, as a commit to a log does."""
    took = []
    with (folder / "probe").open("wb") as file:
        for _ in range(times):
            begun = time.perf_counter()
            file.write(b"x" * 8192)
            file.flush()
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - begun)
            time.sleep(0.02)
    return took


def confirm_seconds(url: str, times: int) -> list[float]:
    """How long one record takes from the bus to its confirmation, connection open, nothing else under way."""
    bus = open_bus(url, BusOptions())
    took = []
    for record in records(times):
        begun = time.perf_counter()
        outcomes = ListFeed([record]).publish(bus)
        took.append(time.perf_counter() - begun)
        assert isinstance(outcomes[0], Confirmed)
        time.sleep(0.02)
    bus.close()
    return took[5:]


def _is_of(event: dict[str, Any], guests: Sequence[Guest]) -> bool:
    """Whether it tells of errors of these guests; some updates only tell that one goes on."""
    data = event["data"]
    return (
        data["origin"] == "event"
        and data["occurrences"]["count"] > 0
        and data["domain"]["uuid"] in {guest.uuid for guest in guests}
    )


def _heard(events: Events, guest: Guest) -> int:
    """How many error events of this guest have arrived."""
    return sum(_is_of(event, [guest]) for _, event in list(events.of_type("io_error")))


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of them lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def latency_rows(rounds: int, *, errors: int = 40) -> list[Row]:
    """From libvirt's callback (the event's `time`) to the broker's confirm, against fsync + confirm.

    One error at a time, of guests in turn; each is resumed on a healed disk. The agent's tap tells of each
    confirm as it comes.
    """
    over: dict[str, list[float]] = {"p50": [], "p99": []}
    raw: dict[str, list[float]] = {"p50": [], "p99": []}
    with broker() as node, Lab() as lab, tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        url = node.url(node.vhost())
        guests = [lab.guest(f"g{number}", error="EIO").start() for number in range(4)]
        time.sleep(1)
        with (
            Events(url) as events,
            agent(folder, lab, url, "[incidents]\nfold = false\n").ready() as one,
            Confirms(one.socket) as confirmed,
        ):
            for _ in range(rounds):
                seen = len(events.of_type("io_error"))
                syncs = fsync_seconds(Path(folder), errors)
                for number in range(errors):
                    guest = guests[number % len(guests)]
                    want = _heard(events, guest) + 1
                    guest.fail()
                    wait_until(lambda g=guest, n=want: _heard(events, g) >= n, "an event", 20)
                    guest.heal()
                    guest.wait_state(3)
                    guest.resume()
                    time.sleep(0.05)
                confirms = confirm_seconds(url, errors)
                latencies = [
                    _latency(confirmed.at[event["id"]], event)
                    for _, event in events.of_type("io_error")[seen:]
                    if _is_of(event, guests)
                ]
                for name, share in (("p50", 0.5), ("p99", 0.99)):
                    limit = percentile(syncs, share) + percentile(confirms, share)
                    over[name].append((percentile(latencies, share) - limit) * 1000)
                    raw[name].append(percentile(latencies, share) * 1000)
    return [
        Row("latency p50", "error → confirmed, p50", tuple(raw["p50"]), "ms"),
        Row("latency p99", "error → confirmed, p99", tuple(raw["p99"]), "ms"),
        Row(
            "latency p50 over",
            "error → confirmed, p50, beyond fsync + confirm p50",
            tuple(over["p50"]),
            "ms",
            1,
            least=False,
        ),
        Row(
            "latency p99 over",
            "error → confirmed, p99, beyond fsync + confirm p99",
            tuple(over["p99"]),
            "ms",
            5,
            least=False,
        ),
    ]


# ------------------------------------------------------------------------------------- storm


@contextmanager
def virsh_listening(lab: Lab) -> Iterator[None]:
    """`virsh event --loop`, the least that listens, its output thrown away."""
    words = ["virsh", "--connect", lab.uri_ro, "event", "--all", "--loop"]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as listener:
        time.sleep(1)
        try:
            yield
        finally:
            listener.kill()


LISTENER = """
import sys, libvirt
libvirt.virEventRegisterDefaultImpl()
connection = libvirt.openReadOnly(sys.argv[1])
count = 0
def error(connection, domain, path, alias, action, reason, opaque):
    global count
    count += 1
connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON, error, None)
print("listening", flush=True)
while True:
    libvirt.virEventRunDefaultImpl()
"""


@contextmanager
def bare_listener(lab: Lab) -> Iterator[int]:
    """libvirt-python, one callback that only counts; yields its pid."""
    words = [sys.executable, "-c", LISTENER, lab.uri_ro]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "listening\n"
        try:
            yield listener.pid
        finally:
            listener.kill()


@contextmanager
def storming(lab: Lab, name: str) -> Iterator[Guest]:
    """A guest that writes to an IDE disk as fast as it can, policy `report`; not failing yet."""
    guest = lab.guest(name, error="EIO", policy="report", bus="ide", boot="storm").start()
    time.sleep(1)
    yield guest
    guest.heal()
    guest.destroy()


@dataclass(frozen=True)
class Raged:
    """What a storm cost libvirtd: RSS before and at its highest in MiB, CPU in µs an error."""

    before: float
    rss: float
    cpu: float
    injected: int


@dataclass(frozen=True)
class Told:
    """What a storm cost the agent, and what of it came to a consumer."""

    counted: int
    sent: int
    cpu: float  # % of a core
    each: float  # CPU of an error, µs
    rss: tuple[float, ...]  # MiB, four a second, from a quarter of the storm on


def storm_with_virsh(seconds: float, *, asked: bool) -> Raged:
    """A storm on a fresh libvirtd with `virsh event --loop` listening; `asked`: see `ask_version`."""
    with Lab() as lab, virsh_listening(lab):
        if asked:
            ask_version(lab)
        with storming(lab, "storm") as guest:
            return _storm(lab, guest, seconds)


def ask_version(lab: Lab) -> None:
    """What every control plane does at its start, and the agent: it makes libvirtd read its emulators'
    capabilities, once.
    """
    subprocess.run(
        ["virsh", "--readonly", "-c", lab.uri_ro, "version"], check=True, stdout=subprocess.DEVNULL
    )


def storm_with_bare_listener(seconds: float) -> float:
    """A storm on a fresh libvirtd with `bare_listener`: its CPU of an error in µs."""
    with Lab() as lab, bare_listener(lab) as pid, storming(lab, "storm") as guest:
        cpu = cpu_seconds(pid)
        raged = _storm(lab, guest, seconds)
        return (cpu_seconds(pid) - cpu) / raged.injected * 1e6


def storm_with_agent(seconds: float) -> tuple[Raged, Told]:
    """A storm on a fresh libvirtd with the agent listening."""
    with broker() as node, Lab() as lab, tempfile.TemporaryDirectory() as folder:
        url = node.url(node.vhost())
        with (
            Events(url) as events,
            agent(folder, lab, url).ready() as one,
            storming(lab, "storm") as guest,
        ):
            pid = one.process.pid
            samples: list[tuple[float, float]] = []
            begun = time.monotonic()
            cpu = cpu_seconds(pid)
            raged = _storm(
                lab, guest, seconds, lambda: samples.append((time.monotonic() - begun, memory(pid)["VmRSS"]))
            )
            spent, lasted = cpu_seconds(pid) - cpu, time.monotonic() - begun
            injected = raged.injected
            one.until(lambda: one.metric("virtbus_callbacks_total") >= injected, "all callbacks counted", 30)
            one.until(lambda: _counted(events) >= injected, "all counts at the consumer", 90)
            sent = sum(event["data"]["origin"] == "event" for _, event in events.of_type("io_error"))
            # From a quarter on, which is a minute and more after the start of a storm of minutes.
            settled = tuple(rss for at, rss in samples if at >= seconds / 4)
            return raged, Told(_counted(events), sent, spent / lasted * 100, spent / injected * 1e6, settled)


def storm_rows(rounds: int, seconds: float = STORM_SECONDS) -> list[Row]:
    """A real storm, with `virsh event` and with the agent listening, in turn: one long pair, then shorter."""
    theirs, asked, ours, told, bare = [], [], [], [], []
    for turn in range(rounds):
        lasts = seconds if not turn else seconds / 3
        theirs.append(storm_with_virsh(lasts, asked=False))
        asked.append(storm_with_virsh(lasts, asked=True))
        bare.append(storm_with_bare_listener(lasts))
        raged, heard = storm_with_agent(lasts)
        ours.append(raged)
        told.append(heard)
    missed = max(abs(heard.counted - raged.injected) for raged, heard in zip(ours, told, strict=True))
    daemon = "libvirtd's RSS at its highest ÷ the same with `virsh event --loop`"
    long, injected = told[0], ours[0].injected
    what = f"storm of {seconds:g} s, {injected:,} errors"
    return [
        Row("storm counts", "storms: errors counted too many or too few", (missed,), "", 0, least=False),
        Row(
            "storm rate",
            f"{what}: messages a second after the first ten",
            (max(0, long.sent - 10) / seconds,),
            "/s",
            1.0,
            least=False,
        ),
        Row("storm messages", f"{what}: messages in all", (float(long.sent),), ""),
        Row("storm cpu", f"{what}: agent's CPU of one core", (long.cpu,), "%", 25, least=False),
        Row("storm cpu an error", "agent's CPU of an error", tuple(heard.each for heard in told), "µs"),
        ratio(
            "storm cpu over bare",
            "agent's CPU of an error ÷ a bare libvirt-python listener that only counts",
            [heard.each for heard in told],
            bare,
            1.25,
            least=False,
        ),
        Row(
            "storm rss",
            f"{what}: agent's RSS at the end ÷ after a quarter",
            (long.rss[-1] / long.rss[0],),
            goal=1.05,
            least=False,
        ),
        *(
            Row(
                name,
                label,
                tuple(a.rss / b.rss for a, b in zip(ours, under, strict=True)),
                goal=1.05,
                least=False,
            )
            for name, label, under in (
                ("storm daemon rss", f"{daemon}, both asked for a version", asked),
                ("storm daemon rss fresh", f"{daemon}, on a libvirtd that nobody asked", theirs),
            )
        ),
        Row(
            "storm daemon growth",
            "MiB that libvirtd grows by in a storm, beyond the same with `virsh event --loop`",
            tuple((a.rss - a.before) - (b.rss - b.before) for a, b in zip(ours, theirs, strict=True)),
            "MiB",
            goal=1,
            least=False,
        ),
        Row(
            "storm daemon cpu",
            "libvirtd's CPU of an error ÷ the same with `virsh event --loop`",
            tuple(a.cpu / b.cpu for a, b in zip(ours, theirs, strict=True)),
            goal=1.05,
            least=False,
        ),
    ]


def _counted(events: Events) -> int:
    return sum(
        event["data"]["occurrences"]["count"]
        for _, event in list(events.of_type("io_error"))
        if event["data"]["origin"] == "event"
    )


def _storm(lab: Lab, guest: Guest, seconds: float, look: Callable[[], object] = lambda: None) -> Raged:
    """Let it rage; `look` is called four times a second."""
    pid = lab.libvirtd_pid
    before = peak = memory(pid)["VmRSS"]
    cpu = cpu_seconds(pid)
    guest.fail()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.25)
        peak = max(peak, memory(pid)["VmRSS"])
        look()
    guest.heal()
    time.sleep(1)
    injected = guest.injected()
    return Raged(before, peak, (cpu_seconds(pid) - cpu) / injected * 1e6, injected)


def _latency(confirmed_ns: int, event: dict[str, Any]) -> float:
    """Seconds from the callback, by the event's `time`, to its confirm: two readings of one clock."""
    return confirmed_ns / 1e9 - datetime.fromisoformat(event["time"]).timestamp()
