"""The play of docs/fleet.md, as it stands there, on a fresh Debian with a real RabbitMQ as the broker's host.

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
HOST, BROKER, PASSWORD = "compute-7", "broker.example", "s3cret"

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


def play() -> str:
    """The page's own."""
    text = (CHECKOUT / "docs" / "fleet.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"^```yaml\n(- hosts: .*?)^```", text, re.MULTILINE | re.DOTALL)
    return str(found)


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
    (tmp_path / "play.yaml").write_text(play())
    shutil.copy(package("deb"), tmp_path)
    # How a command gets into the host, and how one reaches this test's broker.
    enter = root.command("/usr/bin/true")[:-1]
    script(tmp_path / "enter", f'#!/bin/sh\nshift\nexec {shlex.join(enter)} "$@"\n')
    (tmp_path / "bin").mkdir()
    words = [str(BIN / "rabbitmqctl"), "--node", rabbitmq.node]
    variables = [f"{name}={value}" for name, value in rabbitmq._environment().items()]
    script(tmp_path / "bin/rabbitmqctl", f'#!/bin/sh\nexec env {shlex.join([*variables, *words])} "$@"\n')
    (tmp_path / "inventory").write_text(
        f"[hypervisors]\n{HOST} virtbus_password={PASSWORD} ansible_connection=community.general.chroot "
        f"ansible_host={root.path} ansible_chroot_exe={tmp_path}/enter ansible_become=false "
        "ansible_python_interpreter=/usr/bin/python3\n"
        f"[brokers]\n{BROKER} ansible_connection=local ansible_become=false "
        f"ansible_python_interpreter={programs}/python\n"
    )

    def run() -> dict[str, int]:
        done = subprocess.run(
            [programs / "ansible-playbook", "--inventory", "inventory",
             "--extra-vars", f"virtbus_vhost={vhost}", "play.yaml"],
            cwd=tmp_path, capture_output=True, text=True,
            env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        (recap,) = re.findall(rf"^{HOST} +: (.*)$", done.stdout, re.MULTILINE)
        return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", recap)}

    assert run()["changed"] >= 6
    told = (root.path / "var/log/systemctl").read_text().splitlines()
    assert {"enable virtbus", "start virtbus", "restart virtbus"} <= set(told)
    assert root.run("virtbus", "config", "check", user="virtbus").returncode == 0
    again = run()
    assert (again["changed"], again["failed"], again["unreachable"]) == (0, 0, 0)

    # The host's user speaks for its own agent and for no other one.
    identity = root.run("virtbus", "agent-id").stdout.strip()
    with amqp.Connection(f"127.0.0.1:{rabbitmq.port}", virtual_host=vhost) as operator:
        operator.channel().exchange_declare("virtbus.events", "topic", durable=True, auto_delete=False)
    for agent, refused in ((identity, False), ("11111111-2222-4333-8444-555555555555", True)):
        with amqp.Connection(
            f"127.0.0.1:{rabbitmq.port}", f"virtbus-{HOST}", PASSWORD, virtual_host=vhost
        ) as connection:
            channel = connection.channel()
            channel.confirm_select()
            message = amqp.Message("{}")
            with pytest.raises(amqp.AccessRefused) if refused else nullcontext():
                channel.basic_publish_confirm(message, "virtbus.events", f"io_error.{agent}.x")
