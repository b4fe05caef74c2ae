"""A private libvirtd and QEMU guests whose disks fail on demand: the ground truth of every lab test.

    with Lab() as lab:
        guest = lab.guest("db1", error="EIO", policy="stop")
        guest.start()
        guest.fail()                      # from now on each write of the guest's disk is refused
        guest.wait_state(PAUSED_IOERROR)
        assert guest.injected() == 1      # counted by nbdkit, not by anything of ours
        guest.heal()
        guest.resume()

Needs root, QEMU, libvirtd, nbdkit and nasm; no KVM, no systemd. A lab is up in well under a second, and a
guest is a 512-byte boot sector that runs half a second after `start`. Everything ends with the `with`
block, or with the test process, however that ends (see init.py).
"""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from tests import waiting

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
BOOT_SECTORS = HERE.parent / "data" / "guests"
DISK_BYTES = 16 << 20

# (state, reason) as virDomainGetState numbers them: virDomainState, virDomainPausedReason, …
RUNNING = 1
PAUSED = 3
SHUT_OFF = 5
PAUSED_IOERROR = (3, 5)

PROGRAMS = {
    "libvirtd": "libvirt-daemon",
    "virsh": "libvirt-clients",
    "qemu-system-x86_64": "qemu-system-x86",
    "nbdkit": "nbdkit",
    "nasm": "nasm",
    "unshare": "util-linux",
}
DAEMONS = ("libvirtd", "qemu-system-x86_64", "nbdkit")

LIBVIRTD_CONF = """\
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_ro_perms = "0777"
unix_sock_rw_perms = "0700"
"""

# As root, because another user may not open /dev/kvm, and libvirt then probes QEMU again at every guest
# start. No sandboxing and no log daemon: the whole lab is one already, and each costs start-up time.
QEMU_CONF = """\
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""


@dataclass(frozen=True)
class Daemon:
    """Which daemon a lab runs: its program, the stem of its sockets' names, and the user of session mode.

    `user` is None in system mode. A session daemon has one socket, for reading and writing alike.
    """

    program: str = "libvirtd"
    stem: str = "libvirt"
    user: int | None = None

    @property
    def name(self) -> str:
        """Of its log and its configuration."""
        return Path(self.program).name


LIBVIRTD = Daemon()


SESSION_QEMU_CONF = """\
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""


class LabError(Exception):
    """The lab itself failed (not what is tested with it): what was tried, and what was said."""


def missing(inside: bool = True) -> list[str]:
    """What this machine lacks to run a lab, in words; empty when it can.

    With `inside` false the daemons are taken from another root file system, and only the rest is asked for.
    """
    lacks = []
    if os.geteuid() != 0:
        lacks.append("root (the lab makes mount, PID and network namespaces)")
    for program, package in PROGRAMS.items():
        if (inside or program not in DAEMONS) and shutil.which(program, path=_path()) is None:
            lacks.append(f"{program} (Debian package {package})")
    if not lacks:
        probe = subprocess.run(
            ["unshare", "--mount", "--pid", "--net", "--fork", "mount", "-t", "tmpfs", "lab", "/mnt"],
            capture_output=True, text=True,
        )  # fmt: skip
        if probe.returncode:
            lacks.append(f"the right to make namespaces and mounts (CAP_SYS_ADMIN): {probe.stderr.strip()}")
    return lacks


@dataclass(frozen=True)
class NbdDisk:
    """A network disk served by nbdkit, which refuses every write while its trigger file exists.

    With `reads` it refuses reads too: a guest that is failed before its boot sector is read never runs.
    `export` is the NBD export's name, "" for the unnamed source whose error events old libvirt loses.
    `error` is the errno name that the guest's QEMU sees: EIO, ENOSPC, EPERM, …
    `policy` is QEMU's write error policy: stop, report, ignore or enospace; `read_policy` the same for reads.
    `address` is what the guest reaches it by, an IPv4 address of the lab's own network; "" is a Unix socket.
    `alias` is the device's user alias ("ua-…"); "" leaves it to libvirt.
    """

    error: str = "EIO"
    policy: str = "stop"
    bus: str = "virtio"
    export: str = "disk0"
    read_policy: str = "report"
    serial: str = ""
    reads: bool = False
    address: str = ""
    alias: str = ""


@dataclass(frozen=True)
class ThinDisk:
    """A sparse raw file on a tmpfs of its own, which is full while the disk fails: a real ENOSPC."""

    policy: str = "stop"
    bus: str = "virtio"
    read_policy: str = "report"
    serial: str = ""


Disk = NbdDisk | ThinDisk


class Lab:
    """One private libvirtd, its guests and their disks. A context manager; not to be shared by threads.

    `uri` and `uri_ro` are full libvirt URIs that work in any process on this machine: read-write, and
    the read-only socket. `folder` holds sockets and logs and is removed at the end. `root` runs libvirtd,
    QEMU and nbdkit of another root file system (see chroot.py). `hostname` is what libvirt calls its host.
    """

    def __init__(self, root: Path | None = None, *, hostname: str = "", daemon: Daemon = LIBVIRTD) -> None:
        lacks = missing(inside=root is None)
        if lacks:
            raise LabError("a lab needs " + "; ".join(lacks))
        self.root = root
        self.hostname = hostname
        self.ports = itertools.count(10_809)  # NBD's own, and what follows
        # Short, because a Unix socket's path holds 107 bytes and pytest's tmp_path uses most of them.
        self.folder = Path(tempfile.mkdtemp(prefix="vblab-", dir="/tmp"))
        self.folder.chmod(0o755)  # the read-only socket is for other users too
        self._place(self.folder, daemon)
        self.guests: list[Guest] = []
        self._init: subprocess.Popen[bytes] | None = None
        self._daemon: Process | None = None
        self._spawned: list[Process] = []

    def _place(self, folder: Path, daemon: Daemon) -> None:
        """Where the daemon's sockets and files are."""
        self.daemon = daemon
        session = daemon.user is not None
        self.run_folder = folder / "xdg" / "libvirt" if session else folder / "run"
        self.state_folder = self.run_folder / "qemu" / "run" if session else self.run_folder / "qemu"
        self.socket = self.run_folder / f"{daemon.stem}-sock"
        self.uri = f"qemu:///{'session' if session else 'system'}?socket={self.socket}"
        self.uri_ro = self.uri if session else f"{self.uri}-ro"

    def __enter__(self) -> Lab:
        try:
            self._start_init()
            self.start_libvirtd()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the lab and remove its folder. May be called twice."""
        if self._init is not None:
            assert self._init.stdin is not None
            assert self._init.stdout is not None
            self._init.stdin.close()
            try:
                self._init.wait(10)
            except subprocess.TimeoutExpired:
                self._init.kill()  # unshare --kill-child then takes process 1, and the kernel the rest
                self._init.wait()
            self._init.stdout.close()
            self._init = None
        self._daemon = None
        for process in self._spawned:
            process.close()
        self._spawned.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- the daemon

    def start_libvirtd(self) -> None:
        """Start libvirtd and wait until it answers. Guests that run go on and are found again."""
        for kind in ("sock", "sock-ro", "admin-sock"):
            (self.run_folder / f"{self.daemon.stem}-{kind}").unlink(missing_ok=True)
        name = self.daemon.name
        log = self.folder / "log" / f"{name}.log"
        daemon = self._daemon = self.spawn(*self._as_its_user(), self.daemon.program, log=log)

        def answers() -> bool:
            if not daemon.alive():
                raise LabError(f"{name} ended at its start: {_tail(log)}")
            return self.socket.exists() and self._virsh("list", check=False).returncode == 0

        wait_until(answers, f"{name} answers", 60)
        if self.daemon.user is None:
            self._save_cache()

    def _as_its_user(self) -> list[str]:
        """The words before a session daemon's command: user, home and runtime folder; none in system mode."""
        user = self.daemon.user
        if user is None:
            return []
        home = self.run_folder.parent.parent / "home"
        for folder in (home / ".config" / "libvirt", self.run_folder):
            folder.mkdir(parents=True, exist_ok=True)
        (home / ".config" / "libvirt" / "qemu.conf").write_text(SESSION_QEMU_CONF)
        for folder in (home, home / ".config", home / ".config" / "libvirt", self.run_folder.parent):
            os.chown(folder, user, user)
        os.chown(self.run_folder, user, user)
        return [
            "setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "env", f"HOME={home}",
            f"XDG_RUNTIME_DIR={self.run_folder.parent}",
        ]  # fmt: skip

    def kill_libvirtd(self, number: int = signal.SIGKILL) -> None:
        """Send `number` to libvirtd and wait until it is gone. Guests go on."""
        assert self._daemon is not None, "libvirtd does not run"
        self._daemon.send(number)
        self._daemon.wait(30)
        self._daemon = None

    def restart_libvirtd(self) -> None:
        """End libvirtd as an upgrade does (SIGTERM), and start it again."""
        self.kill_libvirtd(signal.SIGTERM)
        self.start_libvirtd()

    @property
    def libvirtd_pid(self) -> int:
        """The PID of libvirtd as this process sees it."""
        assert self._daemon is not None, "libvirtd does not run"
        return self._daemon.pid

    def freeze(self) -> None:
        """Stop libvirtd with SIGSTOP: it holds its connections and answers nothing."""
        os.kill(self.libvirtd_pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let libvirtd go on after `freeze`."""
        os.kill(self.libvirtd_pid, signal.SIGCONT)

    # -- guests

    def guest(
        self,
        name: str = "guest",
        *disks: Disk,
        error: str = "EIO",
        policy: str = "stop",
        bus: str = "virtio",
        nbd_name: str = "disk0",
        boot: str = "",
        metadata: str = "",
        devices: str = "",
        title: str = "",
    ) -> Guest:
        """A defined, not yet started guest.

        Either give `disks`, or the one NBD disk's `error`, `policy`, `bus` and `nbd_name`. The first disk
        boots: `boot` names the boot sector, by default one that writes to all disks 18 times a second
        (virtio and the like), or to the first IDE disk: as fast as it can with "storm", 18 times a second
        with "tick". `metadata` and `devices` are raw XML for <metadata> and <devices>.
        """
        chosen = disks or (NbdDisk(error=error, policy=policy, bus=bus, export=nbd_name),)
        guest = Guest(self, name, chosen, boot=boot, metadata=metadata, devices=devices, title=title)
        self.guests.append(guest)
        return guest

    def serial_to_file(self, name: str) -> str:
        """Raw XML, for `guest(devices=…)`, of a serial port that writes to a file in the lab's folder."""
        path = self.folder / name
        return f"<serial type='file'><source path='{path}'/><target port='0'/></serial>"

    # -- running things inside

    def spawn(self, *command: str, log: Path) -> Process:
        """Start `command` inside the lab, its output appended to `log`; it ends with the lab."""
        answer = self._ask({"argv": command, "log": str(log)})
        if "error" in answer:
            raise LabError(f"could not start {answer['error']}")
        try:
            process = Process(self.pid_of(answer["pid"]))
        except (LabError, ProcessLookupError) as error:
            raise LabError(f"{command[0]} ended at its start: {_tail(log)}") from error
        self._spawned.append(process)
        return process

    def listen(self) -> Listener:
        """Start a bare libvirt listener (listen.py): what libvirt says, seen by nothing of virtbus."""
        return Listener(self.uri_ro)

    def run(self, *command: str) -> str:
        """Run `command` inside the lab's namespaces and return what it printed."""
        done = subprocess.run(
            [*self._enter(), *command], capture_output=True, text=True,
            env={**os.environ, "PATH": _path(), "LC_ALL": "C"}, timeout=60,
        )  # fmt: skip
        if done.returncode:
            raise LabError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def virsh(self, *words: str) -> str:
        """What `virsh WORDS` says to this lab's libvirtd. A process of its own, so that the lab never
        touches the libvirt event loop of the process under test."""
        return self._virsh(*words).stdout

    def inside(self, path: str) -> Path:
        """`path` of the lab's own file system, as this process can open it."""
        return Path(f"/proc/{self._init_pid()}/root{self.root or ''}{path}")

    def pid_of(self, inner: int) -> int:
        """The PID here of what the lab knows as `inner`: a daemon, or a spawned command."""
        init = self._init_pid()
        for child in Path(f"/proc/{init}/task/{init}/children").read_text().split():
            with suppress(OSError):  # it ended while we looked
                status = Path(f"/proc/{child}/status").read_text()
                numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
                if int(numbers[-1]) == inner:
                    return int(child)
        raise LabError(f"no process {inner} in the lab")

    def _start_init(self) -> None:
        for name in ("run", "lib", "cache", "log", "etc"):
            (self.folder / name).mkdir()
        (self.folder / "etc" / f"{self.daemon.name}.conf").write_text(LIBVIRTD_CONF)
        (self.folder / "etc" / "qemu.conf").write_text(QEMU_CONF)
        if self._cache.is_dir():
            shutil.copytree(self._cache, self.folder / "cache", dirs_exist_ok=True)
        words = [sys.executable, "-S", "-E", str(HERE / "init.py"), str(self.folder)]
        self._init = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--net", "--uts", "--fork", "--kill-child",
             *words, str(self.root or ""), self.hostname],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PATH": _path()},
            start_new_session=True,
        )  # fmt: skip
        assert self._init.stdout is not None
        if self._init.stdout.readline() != b"ready\n":
            raise LabError("the lab's namespaces could not be set up; see standard error")

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._init is not None, "the lab is closed"
        assert self._init.stdin is not None
        assert self._init.stdout is not None
        self._init.stdin.write(json.dumps(order).encode() + b"\n")
        self._init.stdin.flush()
        answer: dict[str, Any] = json.loads(self._init.stdout.readline())
        return answer

    def _init_pid(self) -> int:
        assert self._init is not None, "the lab is closed"
        forked = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children")  # unshare forks what it runs
        return int(forked.read_text())

    def _enter(self) -> list[str]:
        words = ["nsenter", f"--target={self._init_pid()}", "--mount", "--pid", "--net"]
        return words if self.root is None else [*words, "chroot", str(self.root)]

    def _virsh(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["virsh", "--quiet", "--connect", self.uri, *words], capture_output=True, text=True,
            env={**os.environ, "LC_ALL": "C"}, timeout=90,
        )  # fmt: skip
        if check and done.returncode:
            raise LabError(f"virsh {' '.join(words)}: {done.stderr.strip()}")
        return done

    @property
    def _cache(self) -> Path:
        # libvirt checks each entry against the times of its own and QEMU's files, so sharing it is safe.
        return CHECKOUT / ".cache" / "lab" / (self.root.name if self.root else "host")

    def _save_cache(self) -> None:
        """Keep what libvirtd learned about QEMU for the next lab: probing costs seconds."""
        self._virsh("domcapabilities", "--virttype", "qemu")
        probed = self.folder / "cache" / "qemu" / "capabilities"
        known = self._cache / "qemu" / "capabilities"
        if not probed.is_dir() or (known.is_dir() and same_files(probed, known)):
            return
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=self._cache.parent))
        shutil.copytree(self.folder / "cache", fresh, dirs_exist_ok=True)
        shutil.rmtree(self._cache, ignore_errors=True)
        try:
            fresh.rename(self._cache)
        except OSError:  # another lab was quicker
            shutil.rmtree(fresh)


class Guest:
    """One QEMU guest. Made by `Lab.guest`; disks are addressed by target ("vda"), the first by default."""

    def __init__(
        self,
        lab: Lab,
        name: str,
        disks: Sequence[Disk],
        *,
        boot: str,
        metadata: str,
        devices: str,
        title: str,
    ) -> None:
        self.lab = lab
        self.name = name
        self.uuid = str(uuid.uuid4())
        self.metadata = metadata
        self.devices = devices
        self.title = title
        self.disks: dict[str, Disk] = {}
        letters: dict[str, Iterator[str]] = {}
        for disk in disks:
            prefix = {"virtio": "vd", "ide": "hd"}.get(disk.bus, "sd")
            self.disks[prefix + next(letters.setdefault(prefix, iter("abcdefgh")))] = disk
        if not boot:
            boot = "storm" if disks[0].bus == "ide" and disks[0].policy == "report" else "bios"
        self._servers: dict[str, Process] = {}
        self._ports = {target: next(lab.ports) for target in self.disks}
        self._make_disks(boot)

    def __repr__(self) -> str:
        return f"<Guest {self.name} {self.uuid}>"

    def start(self) -> Guest:
        """Start it (transient), and its disks' servers. Returns when libvirt says it runs."""
        for target, disk in self.disks.items():
            if isinstance(disk, NbdDisk) and target not in self._servers:
                self._serve(target, disk)
        xml = self._file("", "xml")
        xml.write_text(self.xml())
        self.lab.virsh("create", str(xml))
        return self

    def fail(self, target: str = "") -> None:
        """From now on the disk refuses what the guest asks of it."""
        target = target or next(iter(self.disks))
        if isinstance(self.disks[target], NbdDisk):
            self._file(target, "trigger").touch()
        else:
            self._fill(target)

    def heal(self, target: str = "") -> None:
        """The disk works again. A guest that was paused stays so until `resume`."""
        target = target or next(iter(self.disks))
        if isinstance(self.disks[target], NbdDisk):
            self._file(target, "trigger").unlink(missing_ok=True)
        else:
            self.lab.run("mount", "-o", f"remount,size={2 * DISK_BYTES}", self._pool(target))

    def resume(self) -> None:
        """Let a paused guest go on; QEMU sends the request that failed again."""
        self.lab.virsh("resume", self.name)

    def suspend(self) -> None:
        """Pause it as an operator does."""
        self.lab.virsh("suspend", self.name)

    def destroy(self) -> None:
        """Switch it off hard. It may be started again; its disks keep their content and their log."""
        self.lab.virsh("destroy", self.name)

    def injected(self, target: str = "") -> int:
        """How many errors nbdkit has injected since the guest was made: the ground truth.

        All NBD disks together, or one. A ThinDisk's errors come from the kernel and nobody counts them.
        """
        targets = [target] if target else [t for t, disk in self.disks.items() if isinstance(disk, NbdDisk)]
        total = 0
        for each in targets:
            log = self._file(each, "log")
            total += log.read_bytes().count(b"injecting ") if log.exists() else 0
        return total

    def state(self) -> tuple[int, int]:
        """(state, reason) as virDomainGetState numbers them; (5, 0) when libvirt does not know it."""
        done = self.lab._virsh("domstats", "--state", self.name, check=False)
        found = dict(line.strip().split("=") for line in done.stdout.splitlines() if "=" in line)
        if not found:
            return (SHUT_OFF, 0)
        return int(found["state.state"]), int(found["state.reason"])

    def wait_state(self, *wanted: tuple[int, int] | int, seconds: float = 20) -> tuple[int, int]:
        """Wait until the state (or state and reason) is one of `wanted`, and return it."""
        last = (0, 0)

        def reached() -> bool:
            nonlocal last
            last = self.state()
            return last in wanted or last[0] in wanted

        wait_until(reached, lambda: f"{self.name} is in one of {wanted}; it is in {last}", seconds)
        return last

    @property
    def pid(self) -> int:
        """The PID of its QEMU process, as this process sees it."""
        inner = int((self.lab.state_folder / f"{self.name}.pid").read_text())
        return self.lab.pid_of(inner)

    def kill_disk_server(self, target: str = "") -> None:
        """Kill the disk's nbdkit: the connection breaks, as when a storage host dies."""
        server = self._servers.pop(target or next(iter(self.disks)))
        server.send(signal.SIGKILL)
        server.wait(10)

    def xml(self) -> str:
        """The domain's XML, as it is given to libvirt."""
        title = f"<title>{escape(self.title)}</title>" if self.title else ""
        metadata = f"<metadata>{self.metadata}</metadata>" if self.metadata else ""
        disks = "".join(self._disk_xml(target, disk) for target, disk in self.disks.items())
        return (
            f"<domain type='qemu'><name>{escape(self.name)}</name><uuid>{self.uuid}</uuid>{title}{metadata}"
            "<memory unit='MiB'>16</memory><vcpu>1</vcpu>"
            "<os><type arch='x86_64' machine='pc'>hvm</type></os>"
            f"<devices>{disks}{self.devices}"
            "<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"
        )

    def _disk_xml(self, target: str, disk: Disk) -> str:
        if isinstance(disk, NbdDisk):
            kind = "network"
            where = f"transport='unix' socket='{self._file(target, 'sock')}'"
            if disk.address:
                where = f"name='{disk.address}' port='{self._ports[target]}'"
            source = (
                f"<source protocol='nbd' name={quoteattr(disk.export)}><host {where}/></source>"
            ).replace(' name=""', "")
        else:
            kind = "file"
            source = f"<source file='{self._pool(target)}/disk.img'/>"
        serial = f"<serial>{escape(disk.serial)}</serial>" if disk.serial else ""
        alias = f"<alias name='{disk.alias}'/>" if isinstance(disk, NbdDisk) and disk.alias else ""
        # SeaBIOS leaves a disk alone that has no place in the boot order, and our guest writes through it.
        order = f"<boot order='{list(self.disks).index(target) + 1}'/>"
        return (
            f"<disk type='{kind}' device='disk'><driver name='qemu' type='raw' "
            f"error_policy='{disk.policy}' rerror_policy='{disk.read_policy}'/>{source}"
            f"<target dev='{target}' bus='{disk.bus}'/>{order}{serial}{alias}</disk>"
        )

    def _make_disks(self, boot: str) -> None:
        for target, disk in self.disks.items():
            if isinstance(disk, NbdDisk):
                image = self._file(target, "img")
            else:
                pool = self._pool(target)
                self.lab.run("mkdir", "-p", pool)
                self.lab.run("mount", "-t", "tmpfs", "-o", f"size={2 * DISK_BYTES}", "pool", pool)
                image = self.lab.inside(f"{pool}/disk.img")
            first = target == next(iter(self.disks))
            image.write_bytes(boot_sector(boot) if first else b"")
            os.truncate(image, DISK_BYTES)

    def _serve(self, target: str, disk: NbdDisk) -> None:
        operations = ["error-pwrite", "error-zero", "error-trim"] + ["error-pread"] * disk.reads
        rules = [
            rule
            for operation in operations
            for rule in (
                f"{operation}={disk.error}",
                f"{operation}-rate=100%",
                f"{operation}-file={self._file(target, 'trigger')}",
            )
        ]
        where = ["-U", str(self._file(target, "sock"))]
        if disk.address:
            self.lab.run("ip", "link", "set", "lo", "up")
            self.lab.run("ip", "address", "replace", f"{disk.address}/32", "dev", "lo")
            where = ["-i", disk.address, "-p", str(self._ports[target])]
        ready = self._file(target, "pid")
        for stale in (ready, self._file(target, "sock")):
            stale.unlink(missing_ok=True)
        server = self._servers[target] = self.lab.spawn(
            "nbdkit", "-f", *where, "-P", str(ready), "-e", disk.export, "--filter=error", "file",
            str(self._file(target, "img")), *rules, log=self._file(target, "log"),
        )  # fmt: skip

        def listens() -> bool:
            if not server.alive():
                raise LabError(f"nbdkit ended at its start: {_tail(self._file(target, 'log'))}")
            return ready.exists()

        wait_until(listens, f"nbdkit serves {self.name}/{target}", 10)
        if not disk.address:
            self._file(target, "sock").chmod(0o777)  # a session's QEMU is another user

    def _fill(self, target: str) -> None:
        """Leave the disk's pool room for a few blocks more, with everything but the boot sector freed."""
        pool = self._pool(target)
        image = f"{pool}/disk.img"
        self.lab.run("fallocate", "--punch-hole", "--offset", "4096", "--length", str(DISK_BYTES), image)
        used = self.lab.inside(image).stat().st_blocks * 512
        self.lab.run("mount", "-o", f"remount,size={used + (64 << 10)}", pool)

    def _pool(self, target: str) -> str:
        return f"/run/pools/{self.name}-{target}"

    def _file(self, target: str, kind: str) -> Path:
        return self.lab.folder / f"{self.name}{'-' if target else ''}{target}.{kind}"


class Process:
    """A process of the lab, not our child: held by a pidfd, so that its number is never another's."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def send(self, number: int) -> None:
        """Send it the signal `number`."""
        signal.pidfd_send_signal(self._fd, number)

    def alive(self, seconds: float = 0) -> bool:
        """Whether it still runs after `seconds`; returns at once when it ends."""
        return not select.select([self._fd], [], [], seconds)[0]

    def wait(self, seconds: float) -> None:
        """Wait until it has ended; LabError after `seconds`."""
        if self.alive(seconds):
            raise LabError(f"process {self.pid} still runs after {seconds} s")

    def close(self) -> None:
        """Forget it."""
        os.close(self._fd)


class Listener:
    """Every callback of libvirt as a dict, received by a process that knows nothing of virtbus.

    A context manager; see listen.py for the keys.
    """

    def __init__(self, uri: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "listen.py"), uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._heard: list[dict[str, Any]] | None = None
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise LabError(f"the bare listener could not reach {uri}; see standard error")

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.heard()

    def heard(self, settle: float = 0.3) -> list[dict[str, Any]]:
        """Wait `settle` seconds for stragglers, end the listener and return all that it heard, in order."""
        if self._heard is None:
            time.sleep(settle)
            out, _ = self._process.communicate()
            self._heard = [json.loads(line) for line in out.splitlines()]
        return self._heard


def boot_sector(name: str) -> bytes:
    """512 bytes of machine code: "bios" writes to all disks at each tick; "storm" and "tick" drive the
    first IDE disk without end, and at each tick."""
    source = BOOT_SECTORS / ("write_loop_bios.asm" if name == "bios" else "write_loop_ata.asm")
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "boot.img"
        flags = ["-DTICK"] if name == "tick" else []
        subprocess.run(["nasm", "-f", "bin", *flags, str(source), "-o", str(image)], check=True)
        return image.read_bytes()


wait_until = partial(waiting.wait_until, pause=0.02, error=LabError)


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold files of the same names and contents."""
    first, second = ({f.name: f.read_bytes() for f in folder.iterdir()} for folder in (one, other))
    return first == second


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
