"""A real Kubernetes API server with its etcd, for tests: what it admits, a cluster admits.

    with ApiServer(folder) as server:
        server.kubectl("get", "namespaces")
        kubernetes.config.load_kube_config(str(server.kubeconfig))

No nodes, no controllers, no scheduler: objects are validated, defaulted, admitted and stored, and nothing
comes of them (tests.chart.cluster adds scheduler and controllers). RBAC, Pod Security and ServiceAccount
admission are on. The programs are built from their Go module (`python -m tests.chart.apiserver`, ten minutes
of two processors, 275 MB), because nobody packages them; etcd is Debian's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from ssl import create_default_context
from typing import Any

import yaml

from tests.chart import tools
from tests.chart.tools import CACHE, ToolMissing
from tests.ports import free_ports

VERSION = "v1.36.0"
PROGRAMS = ("kube-apiserver", "kube-scheduler", "kube-controller-manager")
MODULE = Path(__file__).parent / "apiserver"
ADMIN = "admin-token-of-these-tests"
# Prometheus operator's definitions, as its release carries them.
CRDS = ("github.com/prometheus-operator/prometheus-operator@v0.85.0", "example/prometheus-operator-crd")
CRD_KINDS = ("podmonitors", "servicemonitors", "prometheusrules")

AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "Metadata", "verbs": ["create"], "resources": [{"group": "", "resources": ["pods"]}]},
        {"level": "None"},
    ],
}  # fmt: skip


class ApiServerError(Exception):
    """A command to the server failed: which, and its words."""


def binary(program: str) -> Path:
    """Where the built program is, or will be."""
    return CACHE / f"{program}-{VERSION}"


def missing(*programs: str) -> list[str]:
    """What this machine lacks to run these programs (the server, if none is named), in words."""
    lacks = tools.missing()
    for program in programs or PROGRAMS[:1]:
        if not binary(program).exists():
            lacks.append(f"{program} {VERSION}: build it with `python -m tests.chart.apiserver` (needs Go)")
    try:
        tools.debian("etcd")
    except ToolMissing as error:
        lacks.append(f"etcd: {error}")
    return lacks


def build() -> None:
    """Build the programs that were not built before. Raises ToolMissing when there is no Go."""
    wanted = [program for program in PROGRAMS if not binary(program).exists()]
    if wanted and shutil.which("go") is None:
        raise ToolMissing(f"{', '.join(wanted)} {VERSION}: Go is not here to build them with")
    CACHE.mkdir(parents=True, exist_ok=True)
    major, minor = VERSION.removeprefix("v").split(".")[:2]
    stamp = "-X k8s.io/component-base/version."
    flags = f"-s -w {stamp}gitVersion={VERSION} {stamp}gitMajor={major} {stamp}gitMinor={minor}"
    for program in wanted:
        draft = binary(program).with_suffix(".new")
        done = subprocess.run(
            ["go", "build", "-mod=readonly", "-trimpath", "-ldflags", flags, "-o", str(draft),
             f"k8s.io/kubernetes/cmd/{program}"],
            cwd=MODULE, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise ToolMissing(f"{program} {VERSION}: go build: {done.stderr.strip()[-2000:]}")
        draft.replace(binary(program))


class ApiServer:
    """One etcd and one kube-apiserver on loopback. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kubeconfig = folder / "kubeconfig"
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> ApiServer:
        self.folder.mkdir(parents=True, exist_ok=True)
        client, peer, self.port = free_ports(3)
        self._keys()
        try:
            self._start(
                "etcd",
                str(tools.debian("etcd")),
                f"--data-dir={self.folder}/etcd",
                f"--listen-client-urls=http://127.0.0.1:{client}",
                f"--advertise-client-urls=http://127.0.0.1:{client}",
                f"--listen-peer-urls=http://127.0.0.1:{peer}",
                "--unsafe-no-fsync",
            )
            self._start("kube-apiserver", str(binary("kube-apiserver")), *self._options(client))
            self._write_kubeconfig()
            self._wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End both processes, at once: nothing of theirs is kept."""
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        self._processes.clear()

    # ---- use

    def kubectl(
        self, *arguments: str, manifest: object = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run the genuine kubectl as the cluster's admin; `manifest` goes to its standard input as YAML."""
        done = subprocess.run(
            [str(tools.kubectl()), f"--kubeconfig={self.kubeconfig}", *arguments],
            input=None if manifest is None else yaml.safe_dump(manifest), capture_output=True, text=True,
            timeout=60, env={"PATH": os.environ["PATH"], "HOME": str(self.folder)},
        )  # fmt: skip
        if check and done.returncode:
            raise ApiServerError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    def get(self, kind: str, name: str, namespace: str = "default") -> dict[str, Any]:
        """One object as the server keeps it."""
        answer = self.kubectl("get", kind, name, "--namespace", namespace, "--output=json")
        found: dict[str, Any] = json.loads(answer.stdout)
        return found

    def namespace(self, name: str, labels: Mapping[str, str] | None = None) -> str:
        """A new namespace with these labels; its name."""
        metadata = {"name": name, "labels": dict(labels or {})}
        self.kubectl(
            "create", "-f", "-", manifest={"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}
        )
        return name

    def install_prometheus_operator_crds(self) -> None:
        """Teach the server PodMonitor, ServiceMonitor and PrometheusRule, as the operator defines them."""
        module, inside = CRDS
        done = subprocess.run(
            ["go", "mod", "download", "-json", module], cwd="/", capture_output=True, text=True
        )
        if done.returncode:
            raise ToolMissing(f"{module}: {done.stderr.strip() or done.stdout.strip()}")
        folder = Path(json.loads(done.stdout)["Dir"]) / inside
        for kind in CRD_KINDS:
            # Server-side: a client-side annotation can't hold definitions as long as these.
            file = folder / f"monitoring.coreos.com_{kind}.yaml"
            self.kubectl("apply", "--server-side", "-f", str(file))
        self.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd", "--all")

    def audit(self) -> list[dict[str, Any]]:
        """The audit log of creations: Pod Security writes its verdicts into the annotations."""
        text = (self.folder / "audit.log").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    # ---- life

    def _keys(self) -> None:
        subprocess.run(
            ["openssl", "genrsa", "-out", str(self.folder / "accounts.key"), "2048"],
            check=True,
            capture_output=True,
        )
        (self.folder / "tokens.csv").write_text(f"{ADMIN},admin,admin,system:masters\n", encoding="utf-8")
        (self.folder / "audit-policy.yaml").write_text(yaml.safe_dump(AUDIT_POLICY), encoding="utf-8")

    def _options(self, etcd: int) -> list[str]:
        return [
            f"--etcd-servers=http://127.0.0.1:{etcd}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={self.port}",
            f"--cert-dir={self.folder}/certificates",
            f"--token-auth-file={self.folder}/tokens.csv",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self.folder}/accounts.key",
            f"--service-account-signing-key-file={self.folder}/accounts.key",
            "--service-cluster-ip-range=10.99.0.0/24",
            "--endpoint-reconciler-type=none",
            f"--audit-log-path={self.folder}/audit.log",
            f"--audit-policy-file={self.folder}/audit-policy.yaml",
        ]

    def _start(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.log").open("wb")
        self._processes.append(
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd="/")
        )
        log.close()

    def _write_kubeconfig(self) -> None:
        cluster = {
            "server": f"https://127.0.0.1:{self.port}",
            "certificate-authority": str(self.folder / "certificates" / "apiserver.crt"),
        }
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tests", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": ADMIN}}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "admin"}}],
            "current-context": "tests",
        }
        self.kubeconfig.write_text(yaml.safe_dump(config), encoding="utf-8")
        self.kubeconfig.chmod(0o600)

    def _wait(self) -> None:
        deadline = time.monotonic() + 120
        certificate = self.folder / "certificates" / "apiserver.crt"
        said = "no answer"
        while time.monotonic() < deadline:
            for process in self._processes:
                if process.poll() is not None:
                    raise ToolMissing(f"{process.args} ended: {self._last_words()}")  # type: ignore[str-bytes-safe]
            try:
                request = urllib.request.Request(
                    f"https://127.0.0.1:{self.port}/readyz", headers={"Authorization": f"Bearer {ADMIN}"}
                )
                context = create_default_context(cafile=str(certificate))
                with urllib.request.urlopen(request, timeout=2, context=context) as answer:
                    if answer.status == 200:
                        return
            except urllib.error.HTTPError as error:
                said = error.read().decode()
                error.close()
            except OSError as error:
                said = str(error)
            time.sleep(0.3)
        raise ToolMissing(f"kube-apiserver is not ready: {said}; {self._last_words()}")

    def _last_words(self) -> str:
        logs = sorted(self.folder.glob("*.log"))
        return " | ".join(f"{log.name}: {log.read_text(errors='replace')[-600:]}" for log in logs)


if __name__ == "__main__":
    try:
        build()
    except ToolMissing as error:
        raise SystemExit(str(error)) from error
    print(*map(binary, PROGRAMS), sep="\n")
