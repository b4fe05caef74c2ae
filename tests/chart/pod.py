"""What kubelet makes of a pod spec, on this machine: crun runs its containers from the built image.

Security contexts, capabilities, seccomp, read-only root and every volume are taken from the rendered spec as
it is. Host folders are replaced by the test's own. The network is this machine's, so that the test's broker
on loopback can be reached, or a namespace that a test made; nothing is scheduled, limited or restarted.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chart import image

SECCOMP = Path("/usr/share/containers/seccomp.json")  # the engines' default: RuntimeDefault
IMAGE_ENV = ["PATH=/opt/virtbus/bin:/usr/local/bin:/usr/bin:/bin"]


class PodError(Exception):
    """kubelet would have refused, or a container failed: what, and its log's end."""


@dataclass
class Process:
    """A container that runs: its log is a file."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path
    state: Path
    user: str

    def output(self) -> str:
        """What it has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def pid(self) -> int:
        """The PID, as this machine sees it, of the container's first process."""
        done = subprocess.run(_crun(self.state, "state", self.name), capture_output=True, check=True)
        return int(json.loads(done.stdout)["pid"])

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as `kubectl exec` does."""
        return subprocess.run(
            _crun(self.state, "exec", "--user", self.user, self.name, *command),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def stop(self, number: int = signal.SIGTERM, within: float = 120) -> int:
        """Send a signal and wait for the end; the exit code."""
        subprocess.run(_crun(self.state, "kill", self.name, str(int(number))), check=True)
        return self.popen.wait(within)


@dataclass
class Pod:
    """One pod on one pretended node.

    `host` maps host paths of the spec to real folders; `secrets` and `config_maps` are name → key → text.
    """

    spec: Mapping[str, Any]
    host: Mapping[str, Path]
    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    config_maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    image_config: Mapping[str, Any] = field(default_factory=dict)
    network: str | None = None  # path of a network namespace

    def __enter__(self) -> Pod:
        self._stack = ExitStack()
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="vbpod-", dir="/tmp"))
            self.folder.chmod(0o755)
            self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            name = self.spec["containers"][0]["image"]
            self._root = self._stack.enter_context(image.mounted(name))
            text = image.buildah("inspect", "--type", "image", name)
            self.image_config = json.loads(text)["Docker"]["config"]
            self._volumes = {volume["name"]: self._volume(volume) for volume in self.spec.get("volumes", [])}
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def init(self) -> list[str]:
        """Run the init containers one after the other; their logs. Raises PodError when one fails."""
        logs = []
        for container in self.spec.get("initContainers", []):
            process = self.start(container)
            code = process.popen.wait(60)
            logs.append(process.output())
            if code:
                raise PodError(f"init container {container['name']} ended with {code}: {process.output()}")
        return logs

    def main(self) -> Process:
        """Start the only container."""
        (container,) = self.spec["containers"]
        return self.start(container)

    def start(self, container: Mapping[str, Any]) -> Process:
        """Start a container and return at once."""
        bundle = Path(tempfile.mkdtemp(prefix=f"{container['name']}-", dir=self.folder))
        (bundle / "config.json").write_text(json.dumps(self._oci(container)), encoding="utf-8")
        log = bundle / "log"
        name = f"virtbus-test-{os.getpid()}-{time.monotonic_ns()}"
        state = self.folder / "crun"
        with log.open("wb") as out:
            popen = subprocess.Popen(
                _crun(state, "run", "--bundle", str(bundle), name),
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip

        def end() -> None:
            if popen.poll() is None:
                subprocess.run(_crun(state, "kill", name, "9"), capture_output=True)
                try:
                    popen.wait(10)
                except subprocess.TimeoutExpired:
                    popen.kill()
                    popen.wait()
            subprocess.run(_crun(state, "delete", "--force", name), capture_output=True)

        self._stack.callback(end)
        user = json.loads((bundle / "config.json").read_text())["process"]["user"]
        return Process(name, popen, log, state, f"{user['uid']}:{user['gid']}")

    # ---- volumes

    def _volume(self, volume: Mapping[str, Any]) -> Path:
        if "hostPath" in volume:
            return self._host_path(volume["hostPath"])
        group = self.spec["securityContext"].get("fsGroup")
        folder = self.folder / "volumes" / volume["name"]
        folder.mkdir(parents=True)
        if "emptyDir" in volume:
            # As kubelet: for everyone, and with fsGroup that group's.
            folder.chmod(0o777 if group is None else 0o2777)
            if group is not None:
                os.chown(folder, 0, group)
            return folder
        if "configMap" in volume:
            source = volume["configMap"]
            content = dict(self.config_maps[source["name"]])
        else:
            source = volume["secret"]
            kept = self.secrets[source["secretName"]]
            content = {item["path"]: kept[item["key"]] for item in source["items"]}
        for name, text in content.items():
            file = folder / name
            file.write_text(text, encoding="utf-8")
            file.chmod(source.get("defaultMode", 0o644))
            if group is not None:
                os.chown(file, 0, group)
        return folder

    def _host_path(self, source: Mapping[str, Any]) -> Path:
        real, kind = self.host[source["path"]], source.get("type", "")
        if kind == "DirectoryOrCreate" and not real.exists():
            real.mkdir(mode=0o755)  # as kubelet: root's
        good = {"Directory": real.is_dir, "DirectoryOrCreate": real.is_dir, "File": real.is_file}
        if not good[kind]():
            raise PodError(f"hostPath {source['path']} ({real}) is not a {kind}")
        return real

    # ---- the runtime's configuration

    def _oci(self, container: Mapping[str, Any]) -> dict[str, Any]:
        pod, own = self.spec["securityContext"], container["securityContext"]
        uid = own.get("runAsUser", pod.get("runAsUser"))
        gid = own.get("runAsGroup", pod.get("runAsGroup"))
        if own.get("runAsNonRoot", pod.get("runAsNonRoot")) and uid == 0:
            raise PodError(f"{container['name']}: runAsNonRoot and uid 0")
        groups = [*pod.get("supplementalGroups", []), *([pod["fsGroup"]] if "fsGroup" in pod else [])]
        assert own["capabilities"]["drop"] == ["ALL"]
        caps = [f"CAP_{name}" for name in own["capabilities"].get("add", [])]
        # Without ambient capabilities a user other than root gets none in effect, as with containerd.
        effective = caps if uid == 0 else []
        command = container.get("command") or self.image_config["Entrypoint"]
        arguments = container.get("args") or ([] if "command" in container else self.image_config["Cmd"])
        environment = [*self.image_config["Env"]]
        environment += [f"{item['name']}={item['value']}" for item in container.get("env", [])]
        return {
            "ociVersion": "1.0.2",
            "root": {"path": str(self._root), "readonly": own["readOnlyRootFilesystem"]},
            "hostname": "pod",
            "process": {
                "user": {"uid": uid, "gid": gid, "additionalGids": groups},
                "args": [*command, *arguments],
                "env": environment,
                "cwd": "/",
                "noNewPrivileges": not own["allowPrivilegeEscalation"],
                "capabilities": {
                    "bounding": caps,
                    "permitted": effective,
                    "effective": effective,
                    "inheritable": [],
                    "ambient": [],
                },
            },
            "mounts": [*_system_mounts(), *map(self._mount, container.get("volumeMounts", []))],
            "linux": {
                "namespaces": [
                    *({"type": kind} for kind in ("mount", "pid", "ipc", "uts")),
                    *([{"type": "network", "path": self.network}] if self.network else []),
                ],
                "seccomp": _seccomp(set(caps)),
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
                "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus"],
            },
        }

    def _mount(self, mount: Mapping[str, Any]) -> dict[str, Any]:
        options = ["rbind", "rprivate", "ro" if mount.get("readOnly") else "rw"]
        source = str(self._volumes[mount["name"]])
        return {"destination": mount["mountPath"], "type": "bind", "source": source, "options": options}


def _system_mounts() -> list[dict[str, Any]]:
    return [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        {
            "destination": "/dev/shm",
            "type": "tmpfs",
            "source": "shm",
            "options": ["nosuid", "nodev", "noexec"],
        },
        # Name resolution is kubelet's business too; loopback is all these tests need.
        {"destination": "/etc/hosts", "type": "bind", "source": "/etc/hosts", "options": ["bind", "ro"]},
    ]


def _seccomp(caps: set[str]) -> dict[str, Any]:
    """The engines' default profile as the runtime wants it, for these capabilities on x86-64."""
    profile = json.loads(SECCOMP.read_text(encoding="utf-8"))
    syscalls = []
    for rule in profile["syscalls"]:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        if includes.get("caps") and not set(includes["caps"]) <= caps:
            continue
        if includes.get("arches") and "amd64" not in includes["arches"]:
            continue
        if caps & set(excludes.get("caps", [])) or "amd64" in excludes.get("arches", []):
            continue
        made = {"names": rule["names"], "action": rule["action"]}
        if rule.get("args"):
            made["args"] = rule["args"]
        if "errnoRet" in rule:
            made["errnoRet"] = rule["errnoRet"]
        syscalls.append(made)
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile.get("defaultErrnoRet", 38),
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": syscalls,
    }


def _crun(state: Path, *arguments: str) -> list[str]:
    """The command line of crun, without control groups: it refuses a machine with both versions of them."""
    script = 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"'
    return [
        "unshare", "--mount", "sh", "-c", script, "sh",
        "crun", f"--root={state}", "--cgroup-manager=disabled", *arguments,
    ]  # fmt: skip
