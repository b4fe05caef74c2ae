"""Inventory and play of docs/fleet.md, as they stand there, on a fresh Debian with a real RabbitMQ as broker.

Part of `make packages-test`. Ansible is fetched once, into .cache. The host is a root file system without a
systemd that runs; `systemctl` answers for it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import amqp
import pytest

from tests.brokers.rabbitmq import BIN, RabbitMQ
from tests.conftest import need
from tests.lab import chroot
from tests.lab.lab import CHECKOUT
from tests.packages.root import Root
from tests.packages.with_packages import package

pytestmark = [pytest.mark.rabbitmq, pytest.mark.slow, pytest.mark.timeout(3600)]

ANSIBLE = "ansible==11.13.0"
HOST, BROKER = "compute-007.example", "broker.example"

FLEET = (CHECKOUT / "docs" / "fleet.md").read_text(encoding="utf-8")

# A daemon that is there, and is not enabled or running before it is told to be.
SYSTEMCTL = """\
#!/bin/sh
echo "$*" >>/var/log/systemctl
case $1 in
  show)
    state=inactive; grep -q '^start ' /var/log/systemctl && state=active
    printf 'LoadState=loaded\\nActiveState=%s\\nFragmentPath=/virtbus.service\\n' $state ;;
  is-enabled) grep -q '^enable ' /var/log/systemctl && echo enabled || { echo disabled; exit 1; } ;;
  is-active) grep -q '^start ' /var/log/systemctl && echo active || { echo inactive; exit 3; } ;;
esac
"""


def ansible() -> Path:
    """The folder of Ansible's programs, in an environment of its own."""
    folder = CHECKOUT / ".cache" / "ansible"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / ANSIBLE.replace("==", "-")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "complete").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", made], check=True)
            pip = [made / "bin/pip", "install", "--quiet", "--disable-pip-version-check", ANSIBLE]
            subprocess.run(pip, check=True)
            (made / "complete").touch()
    return made / "bin"


def page(language: str) -> str:
    """The page's one block of a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", FLEET, re.MULTILINE | re.DOTALL)
    return str(found)


def inventory(vhost: str, broker: str, host: str) -> str:
    """The page's, with what says how these hosts are reached; this machine's Ansible is root already."""
    text = page("ini")
    for line, mine in (
        (BROKER, f"{BROKER} {broker}"),
        ("compute-[001:100].example", f"{HOST} {host}"),
        ("ansible_become=true", "ansible_become=false"),
        ("virtbus_vhost=virtbus", f"virtbus_vhost={vhost}"),
    ):
        text, changed = re.subn(rf"^{re.escape(line)}$", mine, text, flags=re.MULTILINE)
        assert changed == 1, line
    return text


def script(file: Path, text: str) -> Path:
    file.write_text(text)
    file.chmod(0o755)
    return file


@pytest.fixture(params=["bookworm", "trixie"])
def root(request: pytest.FixtureRequest) -> Iterator[Root]:
    """A Debian as Ansible expects one: with Python and its apt."""
    need(chroot.missing())
    with Root(request.param) as made:
        made.run(
            "sh", "-euc", "apt-get update -qq && apt-get install -qq --no-install-recommends python3-apt"
        )
        script(made.path / "usr/bin/systemctl", SYSTEMCTL)
        yield made


def test_the_play_installs_seeds_permits_configures_and_changes_nothing_the_second_time(
    root: Root, rabbitmq: RabbitMQ, vhost: str, tmp_path: Path
) -> None:
    programs = ansible()
    for user in rabbitmq.rabbitmqctl("list_users", "--silent").split():
        if user == "scheduler" or user.startswith("virtbus-"):  # of the suite before, with its passwords
            rabbitmq.rabbitmqctl("delete_user", user)
    (tmp_path / "virtbus.yaml").write_text(page("yaml"))
    shutil.copy(package("deb"), tmp_path)
    # How a command gets into the host, and how one reaches this test's broker.
    enter = root.command("/usr/bin/true")[:-1]
    script(tmp_path / "enter", f'#!/bin/sh\nshift\nexec {shlex.join(enter)} "$@"\n')
    (tmp_path / "bin").mkdir()
    words = [str(BIN / "rabbitmqctl"), "--node", rabbitmq.node]
    variables = [f"{name}={value}" for name, value in rabbitmq._environment().items()]
    # Ansible asks for the node that a host has by default (-q -n rabbit); this test's has a name of its own.
    script(
        tmp_path / "bin/rabbitmqctl",
        f'#!/bin/sh\ntest "$2" != -n || shift 3\nexec env {shlex.join([*variables, *words])} -q "$@"\n',
    )
    (tmp_path / "inventory").write_text(
        inventory(
            vhost,
            f"ansible_connection=local ansible_python_interpreter={programs}/python",
            f"ansible_connection=community.general.chroot ansible_host={root.path} "
            f"ansible_chroot_exe={tmp_path}/enter ansible_python_interpreter=/usr/bin/python3",
        )
    )

    def run() -> dict[str, int]:
        """Both hosts' figures, added up."""
        done = subprocess.run(
            [programs / "ansible-playbook", "--inventory", "inventory", "virtbus.yaml"],
            cwd=tmp_path, capture_output=True, text=True,
            env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        recap = done.stdout.partition("PLAY RECAP")[2]
        figures: Counter[str] = Counter()
        for name, value in re.findall(r"(\w+)=(\d+)", recap):
            figures[name] += int(value)
        assert all(host in recap for host in (HOST, BROKER))
        return figures

    assert run()["changed"] >= 8
    told = (root.path / "var/log/systemctl").read_text().splitlines()
    assert {"enable virtbus", "start virtbus", "restart virtbus"} <= set(told)
    assert root.run("virtbus", "config", "check", user="virtbus").returncode == 0
    again = run()
    assert (again["changed"], again["failed"], again["unreachable"]) == (0, 0, 0)

    # The group's user is enough for the page's two commands; the exchange is there from the first one on.
    mine = rabbitmq.url(vhost, "scheduler", (tmp_path / "passwords/scheduler").read_text().strip())
    settings = tmp_path / "consumer.toml"
    settings.write_text(f'bus.url = "{mine}"\n')
    for line in re.findall(r"^virtbus (?:consume|fleet) --config consumer.toml .*$", FLEET, re.MULTILINE):
        words = shlex.split(line.replace("consumer.toml", str(settings)).replace(" --once", ""))
        words += ["--listen" if "fleet" in words else "--timeout", "1"]
        # From here, and not from the host, whose configuration is its agent's.
        subprocess.run([sys.executable, "-m", *words], cwd=CHECKOUT, check=True)
    assert {"virtbus.scheduler", "virtbus.scheduler.dead"} == set(rabbitmq.queues(vhost))

    # The host's user speaks for its own agent and for no other one.
    identity = root.run("virtbus", "agent-id").stdout.strip()
    user, password = f"virtbus-{HOST.partition('.')[0]}", (tmp_path / "passwords" / HOST).read_text().strip()
    for agent, refused in ((identity, False), ("11111111-2222-4333-8444-555555555555", True)):
        with amqp.Connection(f"127.0.0.1:{rabbitmq.port}", user, password, virtual_host=vhost) as connection:
            channel = connection.channel()
            channel.confirm_select()
            message = amqp.Message("{}")
            with pytest.raises(amqp.AccessRefused) if refused else nullcontext():
                channel.basic_publish_confirm(message, "virtbus.events", f"io_error.{agent}.x")
