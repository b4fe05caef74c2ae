"""The images, built here and run as the chart's pods: real libvirtd, real RabbitMQ, a webhook.

`make chart` runs this: the first build makes a base and takes minutes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.chart import helm, image
from tests.chart.pod import Pod, Process
from tests.conftest import need
from tests.lab.lab import Lab
from tests.ports import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

OWN = 65532  # the image's own user
# What the footprint may be before charts/virtbus/values.yaml must be thought over.
MEMORY_REQUEST_KIB = 96 << 10


@pytest.fixture(scope="session")
def built() -> str:
    need(image.missing())
    return image.build()


@pytest.fixture(scope="session")
def react_image() -> str:
    need(image.missing())
    return image.build("react")


@pytest.fixture(scope="session", params=image.IMAGES)
def root(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The root file system of each image."""
    name = request.getfixturevalue({"agent": "built", "react": "react_image"}[request.param])
    with image.mounted(name) as folder:
        yield folder


@pytest.fixture(scope="session")
def agents_root(built: str) -> Iterator[Path]:
    with image.mounted(built) as folder:
        yield folder


# ------------------------------------------------------------------------------------- what is in it


def test_no_compiler_no_headers_and_no_package_installer_are_left(root: Path) -> None:
    folders = [root / name for name in ("usr/bin", "usr/local/bin", "opt/virtbus/bin")]
    names = {path.name for folder in folders if folder.exists() for path in folder.iterdir()}
    assert not names & {"gcc", "cc", "g++", "ld", "as", "make", "pkg-config", "strip"}
    assert not [name for name in names if name.startswith("x86_64-linux-gnu-gcc")]
    assert not [name for name in names if name.startswith(("pip", "apt"))]
    for folder in ("opt", "usr/lib", "usr/local/lib", "usr/share"):
        assert not [*(root / folder).rglob("pip"), *(root / folder).rglob("ensurepip")]
    assert not (root / "usr" / "include" / "libvirt").exists()


def _of_libvirt(root: Path) -> set[str]:
    status = (root / "var/lib/dpkg/status").read_text(encoding="utf-8")
    return set(re.findall(r"^Package: (.*libvirt.*|qemu.*)$", status, re.MULTILINE))


def test_of_libvirt_there_is_the_client_library_alone(agents_root: Path) -> None:
    assert _of_libvirt(agents_root) == {"libvirt0", "libvirt-common"}  # the latter: files that libvirt0 needs
    for daemon in ("libvirtd", "virtqemud", "virsh"):
        assert not [
            path for folder in ("usr/sbin", "usr/bin") for path in (agents_root / folder).glob(daemon)
        ]


def test_the_image_for_react_has_the_control_planes_clients_and_no_libvirt(react_image: str) -> None:
    with image.mounted(react_image) as root:
        assert _of_libvirt(root) == set()
        (packages,) = root.glob("opt/virtbus/lib/python3*/site-packages")
        assert {"kubernetes", "openstack", "confluent_kafka"} <= {path.name for path in packages.iterdir()}
        assert not [*packages.glob("libvirt*")]
    config = json.loads(image.buildah("inspect", "--type", "image", react_image))["Docker"]["config"]
    assert (config["User"], config["Cmd"]) == (f"{OWN}:{OWN}", ["react"])
    assert "9467/tcp" in config["ExposedPorts"]


def test_no_file_gives_its_user_more_rights(root: Path) -> None:
    found = subprocess.run(
        ["find", str(root), "-xdev", "-perm", "/6000", "-type", "f"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == ""


def test_nothing_is_writable_for_everyone_but_the_temporary_folders(root: Path) -> None:
    found = subprocess.run(
        ["find", str(root), "-xdev", "-perm", "-0002", "!", "-type", "l", "-printf", "/%P\n"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(found.stdout.split()) <= {"/tmp", "/var/tmp", "/run/lock", "/dev/shm"} | {
        line for line in found.stdout.split() if line.startswith("/dev/")
    }


def test_the_configuration_says_user_labels_and_health_check(built: str) -> None:
    config = json.loads(image.buildah("inspect", "--type", "image", image.IMAGE))["Docker"]["config"]
    assert config["User"] == f"{OWN}:{OWN}"
    assert config["Entrypoint"] == ["virtbus"]
    assert config["Healthcheck"]["Test"][:2] == ["CMD", "virtbus"]
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert config["StopSignal"] == "SIGTERM"


def test_the_image_is_small(built: str, record_figure: Any) -> None:
    size = image.size(built)
    record_figure(f"{built}: {size} unpacked, of which the base is {image.size(image.BASE)}")
    number, unit = size.split()
    assert unit == "MB"
    assert float(number) < 300


@pytest.mark.parametrize("kind", image.IMAGES)
def test_every_dependency_has_a_wheel_for_64_bit_arm_with_a_pinned_hash(kind: str, tmp_path: Path) -> None:
    """But libvirt-python, which has none and is compiled in the build, on either architecture."""
    text = (image.CHECKOUT / ".docker" / f"requirements-{kind}.txt").read_text(encoding="utf-8")
    blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)
    lock = tmp_path / "lock.txt"
    lock.write_text("".join(block for block in blocks if not block.startswith("libvirt-python==")))
    base = re.findall(
        r"^ARG BASE=.*python:(3\.\d+)-", (image.CHECKOUT / "Dockerfile").read_text(), re.MULTILINE
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
         "--require-hashes", "--only-binary=:all:", "--implementation=cp", f"--python-version={base[0]}",
         "--platform=manylinux_2_17_aarch64", "--platform=manylinux_2_28_aarch64",
         "--platform=manylinux2014_aarch64", "--dest", str(tmp_path), "--requirement", str(lock)],
        check=True,
    )  # fmt: skip
    wheels = [path.name for path in tmp_path.glob("*.whl")]
    assert len(wheels) == len(re.findall(r"^[a-z0-9.-]+==", lock.read_text(), re.MULTILINE))
    assert [name for name in wheels if name.endswith("aarch64.whl")]


class _Archive(ThreadingHTTPServer):
    """Answers like snapshot.debian.org, out of today's archive; the paths that were asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        archive = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                archive.asked.append(self.path)
                _, kind, _, rest = self.path.removeprefix("/archive").split("/", 3)
                self.send_response(302)
                self.send_header("Location", f"http://deb.debian.org/{kind}/{rest}")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: the test looks at what was asked."""

        super().__init__(("127.0.0.1", 0), Handler)


def test_debians_packages_are_those_of_the_day_that_the_build_names(built: str) -> None:
    day = "20260101T000000Z"
    with ExitStack() as stack:
        archive = stack.enter_context(_Archive())
        threading.Thread(target=archive.serve_forever, daemon=True).start()
        stack.callback(archive.shutdown)
        name = "localhost/virtbus-base:of-a-day"
        image.buildah(
            "build", "--quiet", "--isolation", "chroot", "--pull-never", "--target", "base", "--tag", name,
            "--build-arg", f"BASE={image.BASE}", "--build-arg", f"SNAPSHOT={day}",
            "--build-arg", f"ARCHIVE=http://127.0.0.1:{archive.server_port}/archive", ".",
        )  # fmt: skip
        stack.callback(image.buildah, "rmi", name)
        container = image.buildah("from", "--pull-never", name)
        stack.callback(image.buildah, "rm", container)
        image.buildah("run", "--isolation", "chroot", container, "apt-get", "update", "--error-on=any")
    asked = [path.removeprefix("/archive/").split("/") for path in archive.asked]
    assert {(kind, suite) for kind, at, _, suite, *_ in asked if at == day} == {
        ("debian", "trixie"), ("debian", "trixie-updates"), ("debian-security", "trixie-security"),
    }  # fmt: skip


# ------------------------------------------------------------------------------------ run as a pod


@pytest.fixture
def record_figure(capsys: pytest.CaptureFixture[str]) -> Any:
    """Print a measured figure, past pytest's capture."""

    def record(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}", end="")

    return record


class Node:
    """A pretended node: its libvirtd, its folders, and the chart's pod on it."""

    def __init__(self, lab: Lab, folder: Path, url: str, *sets: str) -> None:
        folder.chmod(0o755)
        self.lab, self.folder = lab, folder
        (self.port,) = free_ports(1)
        (folder / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
        found = helm.render(helm.MINIMAL, sets=(f"http.port={self.port}", *sets))
        self.spec: dict[str, Any] = helm.one(found, "DaemonSet")["spec"]["template"]["spec"]
        self.doctor: dict[str, Any] = helm.one(found, "Pod")["spec"]
        self.deployment = next(
            (one["spec"]["template"]["spec"] for one in found if one["kind"] == "Deployment"), None
        )
        self.config = {one["metadata"]["name"]: one["data"] for one in found if one["kind"] == "ConfigMap"}
        self.address = "127.0.0.1"
        self.secrets = {"virtbus-bus": {"url": url}}

    def pod(self, spec: Mapping[str, Any] | None = None) -> Pod:
        """The pod as rendered: the agent's, if no other one is meant."""
        host = {
            "/run/libvirt": self.lab.folder / "run",
            "/var/lib/virtbus": self.folder / "spool",
            "/etc/machine-id": self.folder / "machine-id",
        }
        return Pod(spec or self.spec, host=host, secrets=self.secrets, config_maps=self.config)

    def ask(self, path: str, port: int | None = None) -> tuple[int, str]:
        """GET from the agent, as kubelet's probes do → (status, body); 0 when it does not answer."""
        try:
            where = f"http://{self.address}:{port or self.port}{path}"
            with urllib.request.urlopen(where, timeout=2) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def wait(
        self, path: str, status: int, agent: Process, seconds: float = 300, port: int | None = None
    ) -> float:
        """Seconds until the path answers with the status."""
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            if self.ask(path, port)[0] == status:
                return time.monotonic() - begun
            if agent.popen.poll() is not None:
                raise AssertionError(f"the agent ended with {agent.popen.returncode}: {agent.output()}")
            time.sleep(0.02)
        raise AssertionError(f"{path} is {self.ask(path)}, not {status}: {agent.output()}")


def _give_account(lab: Lab, folder: Path, uid: int) -> None:
    """Give libvirtd an account for this uid, as useradd on the host would: it refuses strangers."""
    for name, line in (
        ("passwd", f"virtbus:x:{uid}:{uid}::/:/bin/false\n"),
        ("group", f"virtbus:x:{uid}:\n"),
    ):
        file = folder / name
        shutil.copyfile(Path("/etc") / name, file)
        with file.open("a") as out:
            out.write(line)
        subprocess.run(
            ["nsenter", "--target", str(lab.libvirtd_pid), "--mount",
             "mount", "--bind", str(file), f"/etc/{name}"], check=True,
        )  # fmt: skip


def _consume(url: str, kind: str, seconds: float = 600) -> subprocess.Popen[str]:
    """A consumer that ends with the first event of this type."""
    return subprocess.Popen(
        [sys.executable, "-m", "virtbus", "consume", "--bus", url, "--type", kind, "--count", "1",
         "--timeout", str(seconds)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def _event(consumer: subprocess.Popen[str]) -> Mapping[str, Any]:
    out, _ = consumer.communicate(timeout=700)
    event: Mapping[str, Any] = json.loads(out.splitlines()[0])
    return event


def _wait_for(words: str, agent: Process, times: int = 1) -> None:
    """Until its log says so."""
    deadline = time.monotonic() + 300
    while agent.output().count(words) < times:
        assert time.monotonic() < deadline, agent.output()
        assert agent.popen.poll() is None, agent.output()
        time.sleep(0.1)


def _status(agent: Process) -> dict[str, str]:
    text = Path(f"/proc/{agent.pid()}/status").read_text(encoding="utf-8")
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("user", [OWN, 65534], ids=["its-own-user", "nobody"])
def test_a_guests_error_goes_from_a_real_libvirtd_through_the_pod_to_rabbitmq(
    user: int, lab: Lab, amqp_url: str, tmp_path: Path, record_figure: Any
) -> None:
    sets = (f"runAsUser={user}", f"runAsGroup={user}")
    node = Node(lab, tmp_path, amqp_url, *sets)
    if user == OWN:
        _give_account(lab, tmp_path, user)
    guest = lab.guest("db1", error="EIO", policy="stop")
    guest.start()
    with ExitStack() as stack:
        pod = stack.enter_context(node.pod())
        pod.init()
        assert (tmp_path / "spool").stat().st_uid == user
        consumer = _consume(amqp_url, "io_error.v1")
        stack.callback(consumer.kill)
        begun = time.monotonic()
        agent = pod.main()
        live = node.wait("/livez", 200, agent)
        node.wait("/readyz", 200, agent)
        ready = time.monotonic() - begun
        guest.fail()
        event = _event(consumer)
        assert event["data"]["domain"]["name"] == "db1"
        assert event["data"]["error"]["action"] == "pause"

        status = _status(agent)
        assert status["Uid"].split() == [str(user)] * 4
        assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        peak = int(status["VmHWM"].split()[0])
        assert peak < MEMORY_REQUEST_KIB
        record_figure(
            f"pod as {user}: alive after {live:.2f} s, ready after {ready:.2f} s, peak {peak >> 10} MiB"
        )
        inside = agent.run("virtbus", "status", "--json")
        assert json.loads(inside.stdout)["not_ready"] == []
        assert agent.run("touch", "/opt/virtbus/x").returncode != 0
        assert agent.run("touch", "/run/libvirt/x").returncode != 0
        assert agent.stop() == 0


@pytest.mark.usefixtures("built")
def test_the_health_check_of_the_image_is_well_while_the_broker_is_away(lab: Lab, tmp_path: Path) -> None:
    """And so are all three probes: a restart would help nobody."""
    node = Node(lab, tmp_path, "amqp://guest:guest@127.0.0.1:1//")
    with node.pod() as pod:
        pod.init()
        agent = pod.main()
        node.wait("/readyz", 200, agent)
        _wait_for("connection refused", agent)
        node.wait("/livez", 200, agent)
        node.wait("/readyz", 200, agent)
        assert agent.run(*pod.image_config["Healthcheck"]["Test"][1:]).returncode == 0


@pytest.mark.usefixtures("built")
def test_an_agent_that_libvirtd_does_not_know_ends_and_says_why(lab: Lab, tmp_path: Path) -> None:
    """Why the chart's default is nobody: libvirtd refuses a uid without an account on its own side."""
    node = Node(lab, tmp_path, "amqp://127.0.0.1:1//", f"runAsUser={OWN}", f"runAsGroup={OWN}")
    with node.pod() as pod:
        pod.init()
        agent = pod.main()
        assert agent.popen.wait(300) == 77, agent.output()
        assert f"Failed to find user record for uid '{OWN}'" in agent.output().splitlines()[-1]


@pytest.mark.usefixtures("built")
def test_the_pod_goes_on_after_libvirtd_was_restarted(lab: Lab, amqp_url: str, tmp_path: Path) -> None:
    """The folder is mounted, not the socket: the new socket is seen through it."""
    node = Node(lab, tmp_path, amqp_url)
    guest = lab.guest("db1", error="EIO", policy="stop")
    guest.start()
    with node.pod() as pod:
        pod.init()
        agent = pod.main()
        node.wait("/readyz", 200, agent)
        lab.restart_libvirtd()
        consumer = _consume(amqp_url, "io_error.v1")
        _wait_for("callbacks registered", agent, times=2)
        guest.fail()
        assert _event(consumer)["data"]["domain"]["name"] == "db1"


@pytest.mark.usefixtures("built")
def test_the_spool_and_the_identity_outlive_the_pod(lab: Lab, amqp_url: str, tmp_path: Path) -> None:
    guest = lab.guest("db1", error="EIO", policy="stop")
    guest.start()
    away = Node(lab, tmp_path, "amqp://guest:guest@127.0.0.1:1//", "config.drain_seconds=0")
    with away.pod() as pod:
        pod.init()
        agent = pod.main()
        away.wait("/readyz", 200, agent)
        guest.fail()
        deadline = time.monotonic() + 300
        while 'virtbus_events_total{origin="event"' not in away.ask("/metrics")[1]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        first = json.loads(agent.run("virtbus", "status", "--json").stdout)["agent_id"]
        agent.stop(9)
    node = Node(lab, tmp_path, amqp_url)
    with node.pod() as pod:
        pod.init()
        consumer = _consume(amqp_url, "io_error.v1")
        agent = pod.main()
        event = _event(consumer)
        assert event["source"] == f"/virtbus/agents/{first}"
        assert event["data"]["origin"] == "event"


@pytest.mark.usefixtures("built")
def test_on_a_node_without_libvirt_the_pod_is_ready_and_says_so(lab: Lab, tmp_path: Path) -> None:
    """Instead of ContainerCreating for ever, which would stop the rollout."""
    node = Node(lab, tmp_path, "amqp://127.0.0.1:1//")
    pod = node.pod()
    pod.host = {**pod.host, "/run/libvirt": tmp_path / "no-libvirt-here"}
    with pod:
        pod.init()
        agent = pod.main()
        node.wait("/readyz", 200, agent)
        assert "virtbus_source_absent 1.0" in node.ask("/metrics")[1]
        assert "this host has no libvirt" in agent.output()


@pytest.mark.usefixtures("built")
def test_on_a_chosen_node_without_libvirt_the_pod_is_not_ready(lab: Lab, tmp_path: Path) -> None:
    node = Node(lab, tmp_path, "amqp://127.0.0.1:1//", "nodeSelector.kvm=yes")
    pod = node.pod()
    pod.host = {**pod.host, "/run/libvirt": tmp_path / "no-libvirt-here"}
    with pod:
        pod.init()
        agent = pod.main()
        node.wait("/livez", 200, agent)
        node.wait("/readyz", 503, agent)


@pytest.mark.usefixtures("built")
def test_a_folder_of_libvirt_that_is_removed_and_made_again_ends_the_pod_with_the_reason(
    lab: Lab, tmp_path: Path
) -> None:
    """The running container keeps the removed folder; the next one has the new one."""
    node = Node(lab, tmp_path, "amqp://127.0.0.1:1//")
    folder = tmp_path / "libvirt"
    folder.mkdir()
    pod = node.pod()
    pod.host = {**pod.host, "/run/libvirt": folder}
    with pod:
        pod.init()
        agent = pod.main()
        node.wait("/readyz", 200, agent)
        folder.rmdir()
        folder.mkdir()
        assert agent.popen.wait(300) == 75, agent.output()
        assert "/run/libvirt" in agent.output().splitlines()[-1] or "removed" in agent.output()


@pytest.fixture
def ipv6_only(built: str) -> Iterator[tuple[str, str]]:
    """A pod's network with an IPv6 address and no other → (path of the namespace, the pod's address)."""
    number = os.getpid() % 10_000
    name, outside, address = f"vb6-{number}", f"vb6h{number}", f"fd00:{number}::2"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    ip("netns", "add", name)
    try:
        ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("-6", "addr", "add", f"fd00:{number}::1/64", "dev", outside, "nodad")
        ip("link", "set", outside, "up")
        ip("-n", name, "-6", "addr", "add", f"{address}/64", "dev", "eth0", "nodad")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")
        ip("-n", name, "addr", "del", "127.0.0.1/8", "dev", "lo")
        yield f"/run/netns/{name}", address
    finally:
        ip("netns", "del", name)


def test_the_probes_reach_a_pod_that_has_ipv6_alone(
    ipv6_only: tuple[str, str], lab: Lab, tmp_path: Path
) -> None:
    network, address = ipv6_only
    node = Node(lab, tmp_path, "amqp://[::1]:1//")
    node.address = f"[{address}]"
    pod = node.pod()
    pod.network = network
    with pod:
        pod.init()
        agent = pod.main()
        node.wait("/livez", 200, agent)
        node.wait("/readyz", 200, agent)
        assert "virtbus_source_connected 1.0" in node.ask("/metrics")[1]
        assert agent.stop() == 0


class _Posts(ThreadingHTTPServer):
    """A webhook's receiver."""

    def __init__(self) -> None:
        self.types: list[str] = []
        posts = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                posts.types.append(self.headers["ce-type"])
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: the test looks at what came."""

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.mark.usefixtures("built")
def test_the_pod_of_react_tells_a_webhook_of_a_guests_error(
    react_image: str, lab: Lab, amqp_url: str, tmp_path: Path
) -> None:
    """Its own image, as the chart's Deployment runs it, beside an agent's pod."""
    with ExitStack() as stack:
        posts = stack.enter_context(_Posts())
        threading.Thread(target=posts.serve_forever, daemon=True).start()
        stack.callback(posts.shutdown)
        (port,) = free_ports(1)
        repository, tag = react_image.rsplit(":", 1)
        node = Node(
            lab, tmp_path, amqp_url, "react.enabled=true", "react.with=webhook", f"react.http.port={port}",
            f"react.image.repository={repository}", f"react.image.tag={tag}", "config.react.publishers={*}",
            f"config.react.webhook.url=http://127.0.0.1:{posts.server_port}/", "config.log.level=info",
        )  # fmt: skip
        reacting = stack.enter_context(node.pod(node.deployment))
        react = reacting.main()
        node.wait("/readyz", 200, react, port=port)
        pod = stack.enter_context(node.pod())
        pod.init()
        node.wait("/readyz", 200, pod.main())
        guest = lab.guest("db1", error="EIO", policy="stop")
        guest.start()
        guest.fail()
        deadline = time.monotonic() + 300
        while "io.virtbus.domain.io_error.v1" not in posts.types:
            assert time.monotonic() < deadline, react.output()
            time.sleep(0.1)
        status = _status(react)
        assert status["Uid"].split() == [str(OWN)] * 4
        assert {status[name] for name in ("CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
        assert react.stop() == 0


@pytest.mark.usefixtures("built")
def test_helm_test_passes_beside_a_running_agent(lab: Lab, amqp_url: str, tmp_path: Path) -> None:
    """The doctor's pod, as the chart renders it: the same eyes as the agent's."""
    node = Node(lab, tmp_path, amqp_url)
    with node.pod() as pod:
        pod.init()
        node.wait("/readyz", 200, pod.main())
        with node.pod(node.doctor) as other:
            doctor = other.main()
            assert doctor.popen.wait(300) == 0, doctor.output()
            assert "libvirt" in doctor.output()


@pytest.mark.usefixtures("built")
def test_helm_test_fails_when_the_broker_is_away(lab: Lab, tmp_path: Path) -> None:
    node = Node(lab, tmp_path, "amqp://guest:guest@127.0.0.1:1//")
    with node.pod(node.doctor) as pod:
        doctor = pod.main()
        assert doctor.popen.wait(300) != 0
        assert "127.0.0.1:1" in doctor.output()
