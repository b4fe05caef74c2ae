"""The documents tell the truth: each command in them is run, each name in them is there."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
)
from prometheus_client import generate_latest

from tests.agent.process import COMMAND, AgentProcess
from tests.brokers.__main__ import KAFKA_NEWEST, KAFKA_OLDEST, RELEASES
from tests.brokers.rabbitmq import RabbitMQ
from tests.chart import helm, tools
from tests.commandline import cli, commands_of
from tests.kafka.cluster import LIMITED_PASSWORD, LIMITED_USER, SCRAM_PASSWORD, SCRAM_USER, Cluster
from tests.kafka.help import admin, opened
from tests.lab.chroot import SUITES
from tests.lab.lab import Lab
from tests.waiting import wait_until
from virtbus import __version__
from virtbus.bus import BusOptions, open_bus
from virtbus.consumer import Consumer
from virtbus.errors import BusDenied
from virtbus.integrations.telemetry import REACT
from virtbus.model import Confirmed, Deferred
from virtbus.testing import ListFeed, records

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Whatever else is written for a reader: its links have to lead somewhere, too.
LINKED = sorted(
    page
    for pattern in ("*.md", ".github/*.md", "charts/**/*.md", "docs/*.md", "schemas/*.md", "tests/**/*.md")
    for page in ROOT.glob(pattern)
)
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
BLOCK = re.compile(r"^```(console|sh|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) of every command line in the documents."""
    for page in PAGES:
        for _, text in BLOCK.findall(page.read_text()):
            for line in text.replace("\\\n", " ").splitlines():
                if shlex.split(line, comments=True):
                    yield page.name, line


def ids(found: tuple[str, str]) -> str:
    return f"{found[0]}: {' '.join(shlex.split(found[1], comments=True))[:60]}"


ALL = sorted(set(commands()))
# What a cluster's tools do is shown where a cluster is: tests/chart.
ELSEWHERE = {"helm", "kubectl", "docker", "podman", "buildah"}
# These would change this machine: that a shell understands them is shown. The install page's
# are run in root file systems of their own: tests/packages.
OF_THE_HOST = (
    *("groupadd", "useradd", "echo", "apt-get", "dnf", "systemctl", "python3", "install", "runuser"),
    "ansible-playbook",
)
# Where the documents' broker is, and as whom.
BROKER = r"amqps?://[a-z]+(:SECRET)?@[a-z.]+/(/|virtbus\b)"
INSTALLED = "/opt/virtbus/bin/virtbus"
PIPS = ("/opt/virtbus/bin/pip", "consumer/bin/pip")


def of(*programs: str) -> list[tuple[str, str]]:
    return [found for found in ALL if shlex.split(found[1], comments=True)[0] in programs]


def test_every_command_in_the_documents_is_run_by_some_test_here():
    known = {
        "make",
        "python",
        "virtbus",
        INSTALLED,
        "rabbitmqctl",
        "kafka-acls.sh",
        *PIPS,
        *ELSEWHERE,
        *OF_THE_HOST,
    }
    programs = {shlex.split(line, comments=True)[0] for _, line in ALL}
    assert "virtbus" in programs
    assert programs <= known, f"no test runs {programs - known}"


@pytest.mark.parametrize("found", of(*OF_THE_HOST, *sorted(ELSEWHERE)), ids=ids)
def test_a_command_for_another_machine_is_understood_by_a_shell(found):
    assert subprocess.run(["bash", "-n", "-c", found[1]], check=False).returncode == 0


@pytest.mark.parametrize("found", of("python"), ids=ids)
def test_a_script_of_a_checkout_does_what_the_documents_say(found):
    _, *words = shlex.split(found[1], comments=True)
    words = [str(ROOT / "schemas") if word == "OLD" else word for word in words]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("found", of("make"), ids=ids)
def test_a_make_target_of_the_documents_is_there(found):
    words = shlex.split(found[1], comments=True)
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_users_of_the_documents_are_made_in_an_empty_system(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for name in ("passwd", "group", "shadow", "gshadow"):
        (tmp_path / "etc" / name).touch()
    for program in ("groupadd", "useradd"):
        ((_, command),) = of(program)
        words = shlex.split(command, comments=True)
        subprocess.run([f"/usr/sbin/{words[0]}", "--prefix", str(tmp_path), *words[1:]], check=True)
    assert "virtbus:x:65532:65532:" in (tmp_path / "etc" / "passwd").read_text()


def test_the_folder_of_the_documents_is_made_in_an_empty_system(tmp_path: Path) -> None:
    ((_, command),) = of("echo")
    (tmp_path / "etc" / "tmpfiles.d").mkdir(parents=True)
    command = command.replace("/etc/tmpfiles.d", f"{tmp_path}/etc/tmpfiles.d")
    subprocess.run(["bash", "-c", f"{command} --root={tmp_path}"], check=True)
    made = (tmp_path / "var" / "lib" / "virtbus").stat()
    assert (made.st_mode & 0o777, made.st_uid, made.st_gid) == (0o700, 65534, 65534)


def test_make_help_tells_of_every_family_of_tests():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for family in ("demo", "test", "faults", "matrix", "soak", "bench", "chart"):
        assert re.search(rf"\b{family}\b", done.stdout), family


def test_what_make_demo_runs_tells_of_every_error_of_a_real_guest():
    # Not through make: that may install the package anew, under the feet of other tests.
    done = subprocess.run([sys.executable, "-m", "tests.lab.demo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (figures,) = re.findall(r"injected=(\d+) observed=(\d+) delivered=(\d+) lost=0", done.stdout)
    assert int(figures[0]) > 0
    assert len(set(figures)) == 1


HELM = [found for found in of("helm") if "install" in found[1] or "upgrade" in found[1]]


@pytest.mark.parametrize("found", HELM, ids=ids)
def test_a_helm_command_of_the_documents_is_taken_by_helm(found: tuple[str, str]) -> None:
    """As far as it goes without a cluster; tests/chart goes further with a real API server."""
    words = shlex.split(found[1], comments=True)[1:]
    if "…" in words:  # an upgrade of what was installed by the command before it
        words = [*shlex.split(HELM[0][1], comments=True)[1:], *words[words.index("…") + 1 :]]
    words = [str(ROOT / word) if word == "charts/virtbus" else word for word in words]
    done = helm.run("4", *words, "--dry-run=client")
    assert done.returncode == 0, done.stderr
    assert "registry.example/virtbus" in done.stdout


def test_the_label_of_the_documents_is_put_on_a_namespace(tmp_path: Path) -> None:
    ((_, command),) = (found for found in of("kubectl") if " label namespace " in found[1])
    words = shlex.split(command, comments=True)[1:]
    space = tmp_path / "space.yaml"
    space.write_text("{apiVersion: v1, kind: Namespace, metadata: {name: virtbus}}")
    words = ["label", "--local", "--filename", str(space), "--output", "yaml", *words[3:]]
    done = subprocess.run([str(tools.kubectl()), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    labels = yaml.safe_load(done.stdout)["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "privileged"


@pytest.mark.parametrize("found", [found for found in of("kubectl") if " create " in found[1]], ids=ids)
def test_a_kubectl_command_of_the_documents_makes_its_object(found: tuple[str, str]) -> None:
    words = shlex.split(found[1], comments=True)[1:]
    done = subprocess.run(
        [str(tools.kubectl()), *words, "--dry-run=client", "--output", "yaml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["kind"].lower() == words[1]


@pytest.mark.parametrize("found", of(*PIPS), ids=ids)
def test_a_wheel_of_the_documents_is_the_one_that_is_built_and_has_the_extras(found: tuple[str, str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in shlex.split(found[1], comments=True)[2:]:
        named = re.fullmatch(r"\./virtbus-(.+)-py3-none-any\.whl(?:\[([a-z,]+)\])?", word)
        assert named, word
        assert named[1] == __version__
        assert set((named[2] or "agent").split(",")) <= set(extras)


@pytest.mark.parametrize("found", [each for each in of("apt-get", "dnf") if "install" in each[1]], ids=ids)
def test_a_package_of_the_documents_is_one_that_is_built_or_one_that_our_own_targets_install(
    found: tuple[str, str],
) -> None:
    ours = {f"./virtbus_{__version__}-1_amd64.deb", f"./virtbus-{__version__}-1.x86_64.rpm"}
    system = [*(ROOT / "tests" / "system-packages.txt").read_text().split("\n"), "libvirt-daemon-system"]
    words = shlex.split(found[1], comments=True)
    named = {word for word in words[words.index("install") + 1 :] if not word.startswith("-")}
    assert named
    assert named <= ours | set(system)


# ------------------------------------------------------------------------------------------- ours

LASTING = ("run", "consume", "tap", "watch", "react", "fleet")


def ours(words: list[str], tmp_path: Path, rabbitmq: RabbitMQ, vhost: str, libvirt: str) -> list[str]:
    """A command of the documents with the addresses of real parts."""
    replaced = []
    for word in words:
        word = re.sub(
            BROKER,
            rabbitmq.tls_url(vhost) if "amqps" in word else rabbitmq.url(vhost),
            word,
        )
        word = word.replace("qemu:///system", libvirt).replace("/tmp/virtbus", str(tmp_path / "virtbus"))
        if word == "--once":  # that is a whole minute
            replaced += ["--listen", "1"]
            continue
        replaced.append(word.replace("DIR", str(tmp_path / "out")).replace("OLD", str(ROOT / "schemas")))
    return replaced


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """An agent for the commands that ask one."""
    folder = tmp_path_factory.mktemp("running")
    with AgentProcess(folder, libvirt="replay:/dev/null", bus=f"embedded://{folder}/bus.db").ready() as agent:
        yield agent


@pytest.mark.parametrize("found", of("virtbus", INSTALLED), ids=ids)
def test_a_virtbus_command_of_the_documents_works(
    found: tuple[str, str],
    running: AgentProcess,
    rabbitmq: RabbitMQ,
    vhost: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    words = shlex.split(found[1], comments=True)[1:]
    libvirt = "replay:/dev/null"
    if words[0] in ("run", "watch", "doctor"):
        lab: Lab = request.getfixturevalue("lab")
        libvirt = lab.uri_ro
    words = ours(words, tmp_path, rabbitmq, vhost, libvirt)
    environment = {
        **os.environ,
        "VIRTBUS_CONTROL__SOCKET": str(running.socket),
        "VIRTBUS_STATE_DIR": str(running.state_dir),
        "VIRTBUS_BUS__TLS__CA_FILE": str(rabbitmq.ca_file),
        "VIRTBUS_LIBVIRT__URI": libvirt,
    }
    if "consumer.toml" in words:
        words[words.index("consumer.toml")] = str(tmp_path / "consumer.toml")
        (tmp_path / "consumer.toml").write_text(f'bus.url = "{rabbitmq.url(vhost)}"\n')
    elif "--bus" not in words:
        environment["VIRTBUS_BUS__URL"] = f"embedded://{running.folder}/bus.db"
    if words[0] == "run":
        environment["VIRTBUS_CONTROL__SOCKET"] = str(tmp_path / "control.sock")
        environment["VIRTBUS_HTTP__LISTEN"] = ""
        if "--state-dir" not in words:
            environment["VIRTBUS_STATE_DIR"] = str(tmp_path / "state")
    if words[0] == "agent-id":
        environment["VIRTBUS_STATE_DIR"] = str(tmp_path)
        words += ["--user", "root"]
    lasting = words[0] in LASTING and not {"--count", "--timeout", "--listen"} & set(words)
    process = subprocess.Popen(
        [*COMMAND, *words], env=environment, cwd=ROOT, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    if lasting:
        time.sleep(4.0)
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    # Python itself says that it was interrupted while it still started, on a busy machine.
    interrupted = (0, 130, -signal.SIGINT)
    assert process.returncode in (interrupted if lasting else (0,)), out + err
    assert "FAIL" not in out


def python_blocks() -> list[tuple[str, str]]:
    return [(page.name, text) for page in PAGES for text in PYTHON.findall(page.read_text())]


@pytest.mark.parametrize("found", python_blocks(), ids=lambda found: found[0])
def test_a_python_example_of_the_documents_handles_a_real_event(
    found: tuple[str, str], tmp_path: Path
) -> None:
    url = f"embedded://{tmp_path}/bus.db"
    code = re.sub(BROKER, url, found[1])
    assert url in code
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", code], cwd=tmp_path, stdout=out, stderr=out,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    bus = open_bus(url, BusOptions())
    try:
        wait_until(lambda: any(check.details for check in bus.probe() if check.name == "bus room"))
        assert ListFeed(records(1)).drain(bus) == 1
        wait_until(lambda: "failed:" in (tmp_path / "out").read_text())
    finally:
        process.kill()
        process.wait()
        bus.close()


# ---------------------------------------------------------------------------------------- brokers


# Pages whose commands belong together, and are run so by a test of their own.
TOGETHER = ("security.md", "tutorial.md", "install.md")


@pytest.mark.parametrize("found", [found for found in of("rabbitmqctl") if found[0] not in TOGETHER], ids=ids)
def test_a_rabbitmq_command_of_the_documents_is_taken(
    found: tuple[str, str], rabbitmq: RabbitMQ, vhost: str
) -> None:
    program, action, *words = shlex.split(found[1], comments=True)
    assert program == "rabbitmqctl"
    rabbitmq.rabbitmqctl(action, "--vhost", vhost, *words)


@pytest.mark.timeout(1200)  # a dozen calls of rabbitmqctl, each of them minutes where others take the machine
def test_the_users_of_the_tutorial_are_enough_for_an_agent_and_a_group(rabbitmq: RabbitMQ) -> None:
    """All of its commands, in its order, in a virtual host and for users of other names."""
    made = [words for page, line in commands() if page == "tutorial.md" for words in [shlex.split(line)]
            if words[0] == "rabbitmqctl"]  # fmt: skip
    vhost = rabbitmq.vhost()
    rabbitmq.drop_vhost(vhost)
    names = {"virtbus": vhost, "agent": f"agent-{vhost}", "scheduler": f"scheduler-{vhost}"}
    try:
        for words in made:
            rabbitmq.rabbitmqctl(*(names.get(word, word) for word in words[1:]))
        place = f"127.0.0.1:{rabbitmq.port}/{vhost}"
        url = f"amqp://{names['scheduler']}:SECRET@{place}"
        with Consumer(url, group="first") as consumer:
            assert consumer.receive(1.0) is None
            assert "virtbus.first" in rabbitmq.queues(vhost)
            bus = open_bus(f"amqp://{names['agent']}:SECRET@{place}", BusOptions())
            try:
                assert ListFeed(records(1)).publish(bus) == [Confirmed()]
            finally:
                bus.close()
            delivery = consumer.receive(60.0)
            assert delivery is not None
            delivery.ack()
    finally:
        rabbitmq.drop_vhost(vhost)
        for user in ("agent", "scheduler"):
            rabbitmq.rabbitmqctl("delete_user", names[user])


@pytest.mark.kafka
@pytest.mark.parametrize("found", of("kafka-acls.sh"), ids=ids)
def test_a_kafka_command_of_the_documents_does_what_it_says(
    found: tuple[str, str], own_kafka: Cluster
) -> None:
    """The tool itself is not in Kafka's server library: its words become the same call of the admin API."""
    words = shlex.split(found[1], comments=True)
    given = [(words[at], words[at + 1]) for at in range(len(words) - 1) if words[at].startswith("--")]
    (topic,) = [value for name, value in given if name == "--topic"]
    assert ("--allow-principal", "User:compute-7") in given
    assert "--add" in words
    rules = [
        AclBinding(
            ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, f"User:{LIMITED_USER}", "*",
            AclOperation[value.upper()], AclPermissionType.ALLOW,
        )
        for name, value in given if name == "--operation"
    ]  # fmt: skip
    with opened(own_kafka.url, topic) as operator:
        ListFeed(records(1)).publish(operator)  # makes the topic
    client = admin(own_kafka.url)  # kept: a client that goes takes its requests along
    for future in client.create_acls(rules).values():
        future.result(10)
    time.sleep(0.5)  # the broker's authorizer learns of it a moment later
    mine = f"kafka://{LIMITED_USER}:{LIMITED_PASSWORD}@{own_kafka.hosts('sasl')}"
    with opened(mine, topic, declare=False) as bus:
        assert ListFeed(records(1)).publish(bus) == [Confirmed()]
    stranger = f"kafka://{SCRAM_USER}:{SCRAM_PASSWORD}@{own_kafka.hosts('sasl')}"
    with opened(stranger, topic, declare=False, sasl_mechanism="SCRAM-SHA-256") as bus:
        try:
            (outcome,) = ListFeed(records(1)).publish(bus)
        except BusDenied:
            return
        assert isinstance(outcome, Deferred)
        assert isinstance(outcome.error, BusDenied)


def inline_commands() -> list[tuple[str, str]]:
    """(page, command) of every `virtbus …` inside a sentence."""
    pages = [
        *PAGES,
        ROOT / "charts" / "virtbus" / "README.md",
        ROOT / "charts" / "virtbus" / "files" / "alerts.yaml",
    ]
    return sorted(
        {
            (page.name, words)
            for page in pages
            for words in re.findall(r"`(virtbus [a-z][^`]*)`", page.read_text())
        }
    )


@pytest.mark.parametrize("found", inline_commands(), ids=lambda found: f"{found[0]}: {found[1][:60]}")
def test_a_virtbus_command_inside_a_sentence_and_its_options_are_there(found: tuple[str, str]) -> None:
    _, *words = found[1].split()
    command: click.Command = cli
    while words and isinstance(command, click.Group) and not words[0].startswith("-"):
        name = words.pop(0).partition("|")[0]
        assert name in commands_of(command), f"{command.name} knows no {name}"
        command = commands_of(command)[name]
    known = {name for parameter in command.params for name in parameter.opts}
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert options <= known | {"--help"}, f"{command.name} knows no {options - known}"


# ------------------------------------------------------------------------------------------ names


def test_the_path_of_one_error_is_counted_and_every_module_of_its_rooms_is_on_the_map() -> None:
    page, package = (ROOT / "docs" / "ARCHITECTURE.md").read_text(), ROOT / "virtbus"
    path = page.partition("libvirt's    ")[2].partition("── the broker ──")[0]
    files = re.findall(r"[\w/]+\.py", path)
    assert [name for name in files if not (package / name).exists()] == []
    machine = {f"agent/{name}.py" for name in ("incidents", "telling", "book", "incident")}
    assert machine < set(files)
    said = f"{len(files)} files from libvirt's callback to the broker, {len(machine)} of them"
    assert said in page
    rooms = ("sources", "agent", "spool", "bus/amqp", "fleet", "integrations")
    modules = {module for room in rooms for module in (package / room).glob("[a-z]*.py")}
    assert [module.name for module in sorted(modules) if not re.search(rf"\b{module.stem}\b", page)] == []


def test_every_alert_has_an_entry_in_the_runbook_and_no_entry_is_left_over():
    rules = yaml.safe_load((ROOT / "charts" / "virtbus" / "files" / "alerts.yaml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    for group in rules["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["runbook_url"].endswith(f"#{rule['alert'].lower()}")
    assert set(re.findall(r"^### (Virtbus\w+)$", OPERATIONS, re.MULTILINE)) == alerts


def test_every_entry_of_the_runbook_has_a_command_and_says_what_healthy_again_looks_like():
    entries = re.findall(r"^### (Virtbus\w+)\n(.*?)(?=^##)", OPERATIONS, re.MULTILINE | re.DOTALL)
    assert len(entries) > 20
    for name, text in entries:
        assert re.search(r"`(virtbus|kubectl|rabbitmqctl|systemctl|journalctl|df|virsh) [^`]+`", text), name
        assert "Healthy again" in text, name


def test_every_check_of_doctor_has_an_entry():
    made = set()
    for path in (ROOT / "virtbus").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") in ("Check", "ok", "warn", "fail")
                and node.args
                and isinstance(node.args[0], ast.Constant)
                and "integrations" not in path.parts
                and path.name != "testing.py"
            ):
                made.add(node.args[0].value)
    table = OPERATIONS.partition("## What doctor finds")[2].partition("\n## ")[0]
    told = {
        name
        for row in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
        for name in re.findall("`([^`]+)`", row)
    }
    assert told == made


def test_every_metric_of_the_page_is_in_a_scrape_of_a_real_agent_and_the_other_way_round(
    running: AgentProcess,
) -> None:
    table = OPERATIONS.partition("## Metrics")[2].partition("\n## ")[0]
    told = set(re.findall(r"^\| `(virtbus_\w+)`", table, re.MULTILINE))
    text = running.get("/metrics")[1]
    scraped = set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))
    scraped = {name for name in scraped if not name.endswith("_created")}
    assert told == scraped
    for name in told:
        assert re.search(rf"^# HELP {name} \S", text, re.MULTILINE), name


def test_every_metric_of_react_stands_on_the_page_and_the_other_way_round() -> None:
    REACT.begin("docs", lambda: 0.0, lambda: 0.0)
    table = OPERATIONS.partition("## Metrics of react")[2].partition("\n## ")[0]
    told = set(re.findall(r"^\| `(virtbus_\w+)`", table, re.MULTILINE))
    text = generate_latest(REACT.registry).decode()
    served = set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))
    assert told == {
        name for name in served if re.match("virtbus_(react|fleet)_", name) and "_created" not in name
    }
    for name in served - told:
        assert name.endswith("_created") or f"`{name}`" in table, name


def test_no_metric_has_a_label_that_grows_with_guests(running: AgentProcess) -> None:
    labels = set(re.findall(r"[{,](\w+)=", running.get("/metrics")[1]))
    assert labels <= {"state", "type", "origin", "phase", "outcome", "le", "stage", "result", "reason", "why",
                      "event", "version"}  # fmt: skip


def test_every_document_is_looked_at():
    assert set(PAGES) < set(LINKED)
    assert {"charts", "schemas", "tests", ".github"} <= {page.relative_to(ROOT).parts[0] for page in LINKED}


def test_every_link_between_the_documents_leads_somewhere():
    """`make pages` looks at their anchors, too; here at what is not a page."""
    broken = []
    for page in LINKED:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []


def test_every_anchor_of_a_link_is_a_heading_of_its_page():
    broken = []
    for page in LINKED:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text()):
            other = page.parent / target if target else page
            if "://" not in target and other.suffix == ".md" and anchor not in anchors(other):
                broken.append(f"{page.name}: {target}#{anchor}")
    assert broken == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("faq.md", "[gone](gone.md)", "'gone.md'"),
        ("faq.md", "[gone](install.md#no-such-heading)", "no-such-heading"),
        ("not-in-the-navigation.md", "A page.", "not-in-the-navigation.md"),
        ("", "", ""),
    ],
)
def test_make_pages_fails_on_a_dead_link_a_dead_anchor_and_a_page_that_no_one_finds(
    name: str, text: str, said: str, tmp_path: Path
) -> None:
    for each in (".mkdocs.yml", ".packaging", "docs", "README.md", "CHANGELOG.md"):
        copy = shutil.copytree if (ROOT / each).is_dir() else shutil.copy
        copy(ROOT / each, tmp_path / each)
    if name:
        with (tmp_path / "docs" / name).open("a") as page:
            page.write(f"\n{text}\n")
    bin = Path(sys.executable).parent
    done = subprocess.run(
        ["make", "--file", str(ROOT / "Makefile"), "--old-file=setup", "pages", f"BIN={bin}"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode == 0) is (not name), done.stdout + done.stderr
    assert said in done.stderr


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_support_table_names_the_releases_that_our_targets_run() -> None:
    rows = (ROOT / "docs" / "support.md").read_text().splitlines()
    (kafka,) = (row for row in rows if row.startswith("| Kafka |"))
    assert re.findall(r"\d+\.\d+\.\d+", kafka) == [KAFKA_OLDEST, KAFKA_NEWEST]
    (rabbitmq,) = (row for row in rows if row.startswith("| RabbitMQ |"))
    assert len(re.findall(r"\d+\.\d+\.\d+", rabbitmq)) == sum("rabbitmq" in each.name for each in RELEASES)
    (daemon,) = (row for row in rows if row.startswith("| libvirt, the daemon |"))
    tested = daemon.split("|")[3]
    assert len(re.findall(r"\d+\.\d+", tested)) == len(SUITES)
    (python,) = (row for row in rows if row.startswith("| Python "))
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    versions = workflow["jobs"]["unit"]["strategy"]["matrix"]["python"]
    assert f"{versions[0]} to {versions[-1]}" in python
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {f"Programming Language :: Python :: {each}" for each in versions} <= set(project["classifiers"])
    assert project["requires-python"] == f">={versions[0]}"
