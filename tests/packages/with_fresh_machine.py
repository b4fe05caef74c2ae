"""The install page by a stranger: a fresh Debian with the .deb alone, and the page's commands in their order.

Part of `make packages-test`. Packages come from Debian, services are started by the machine's own systemd,
and the broker is the RabbitMQ that the page installs.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from tests.brokers.rabbitmq import wait_until
from tests.conftest import need
from tests.lab.lab import CHECKOUT
from tests.packages import machine as machines
from tests.packages.machine import SECONDS, Machine
from tests.packages.with_packages import Told, package

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TRIED, INSTALLED = "A fresh machine", "Debian and Ubuntu"
PASSWORD = "SECRET"
URL = f"amqp://virtbus:{PASSWORD}@localhost//"


def page(heading: str, language: str) -> list[str]:
    """The blocks of one language below a heading of the install page."""
    text = (CHECKOUT / "docs/install.md").read_text(encoding="utf-8")
    part = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", part, re.MULTILINE | re.DOTALL)


def commands(heading: str) -> list[str]:
    return [line for block in page(heading, "console") for line in block.splitlines()]


@pytest.fixture(params=["bookworm", "trixie"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    need(machines.missing())
    with Machine(request.param) as made:
        yield made


def test_the_install_page_leads_from_nothing_but_the_package_to_a_guests_error_on_rabbitmq(
    machine: Machine, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    for absent in ("libvirtd", "virsh", "qemu-system-x86_64", "rabbitmqctl", "virtbus", "python3"):
        assert machine.run(f"command -v {absent}", check=False).returncode != 0, absent
    shutil.copy(package("deb"), machine.path / "root")
    (settings,) = page(TRIED, "toml")
    told: Told | None = None
    times = {"start": time.monotonic()}
    with ExitStack() as stack:
        for line in [*commands(TRIED), *commands(INSTALLED)]:
            if line.startswith("apt-get"):
                machine.run(line, given="y\n", internet=True)
            elif line.startswith("install "):
                (machine.path / "etc/virtbus/virtbus.toml").write_text(settings)
                machine.run(line, given=f"{PASSWORD}\n")
            elif line == "virtbus consume --config consumer.toml":
                told = Told(machine, URL)
                stack.callback(told.close)
                # What the agent has to say about its own start waited for this queue.
                first = partial(told.of_type, "agent.gap")
                wait_until(first, "the first event comes", SECONDS)
            else:
                done = machine.run(line)
                assert "FAIL" not in done.stdout, done.stdout
            times[line] = time.monotonic()
        assert told is not None
        wait_until(lambda: told.errors(), "the drill comes", SECONDS)
        (drill,) = told.of_type("domain.io_error")
        assert drill["data"]["origin"] == "replay"
        machine.start_guest("db1")
        wait_until(lambda: "running" in machine.run("virsh domstate db1").stdout, "the guest runs", SECONDS)
        machine.fill_disk("db1")

        def of_the_guest() -> list[dict[str, Any]]:
            return [event for event in told.of_type("domain.io_error") if event["data"]["origin"] == "event"]

        wait_until(of_the_guest, "the guest's error comes", SECONDS)
        times["a guest's error is consumed"] = time.monotonic()
        data = of_the_guest()[0]["data"]
        assert data["domain"]["name"] == "db1"
        assert (data["error"]["action"], data["error"]["reason"]) == ("pause", "enospc")
        assert data["host"]["name"] == machines.NAME
        assert "paused (I/O error)" in machine.run("virsh domstate --reason db1").stdout

    # What runs is the package's own unit, and it had nothing to complain about.
    shown = machine.run("systemctl show virtbus --property=ActiveState,UnitFileState,NRestarts").stdout
    assert set(shown.split()) == {"ActiveState=active", "UnitFileState=enabled", "NRestarts=0"}
    journal = machine.run("journalctl --unit=virtbus --output=cat").stdout
    # systemd's own words about the unit are no JSON.
    assert "different" not in journal
    with capsys.disabled():
        whole = times["a guest's error is consumed"] - times["start"]
        own = times["a guest's error is consumed"] - times[commands(TRIED)[-1]]
        print(
            f"\n  {request.node.callspec.id}: {whole / 60:.1f} minutes from nothing, "
            f"{own / 60:.1f} of them after libvirt and RabbitMQ were there",
            end="",
        )
