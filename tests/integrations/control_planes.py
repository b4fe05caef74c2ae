"""A virtual environment with Nova and Masakari of their own: their needs are not ours."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "control-planes"
PYTHON = CACHE / "bin" / "python"
WANTED = ("nova==34.*", "masakari==22.*")
_READY = CACHE / "ready"


def missing() -> list[str]:
    """What is missing to run them, after trying to install it; empty when all is there."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _READY.exists() and _READY.read_text() == " ".join(WANTED):
            return []
        made = subprocess.run([sys.executable, "-m", "venv", str(CACHE)], capture_output=True, text=True)
        done = (
            made
            if made.returncode
            else subprocess.run(
                [str(PYTHON), "-m", "pip", "install", "--quiet", *WANTED],
                capture_output=True,
                text=True,
                timeout=1500,
            )
        )
        if done.returncode:
            return [f"Nova and Masakari from PyPI ({done.stderr.strip().splitlines()[-1:]})"]
        _READY.write_text(" ".join(WANTED))
    return []


def python(code: str, *arguments: str, timeout: float = 120, **environment: str) -> str:
    """Run code in their environment; its standard output."""
    done = subprocess.run(
        [str(PYTHON), "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# What stands for Keystone's middleware: a token or none, and the headers that it would set.
_AUTH = '''
class Auth:
    """Stands for Keystone: the token "admin" is an administrator's, all else is 401."""

    def __init__(self, application):
        self.application = application

    def __call__(self, environ, start_response):
        if environ.get("HTTP_X_AUTH_TOKEN") != "admin":
            start_response("401 Unauthorized", [("Content-Type", "text/plain")])
            return [b"who are you?"]
        environ.update(HTTP_X_IDENTITY_STATUS="Confirmed", HTTP_X_USER_ID="admin", HTTP_X_PROJECT_ID="admin",
                       HTTP_X_ROLES="admin,member,reader", HTTP_X_USER="admin", HTTP_X_TENANT="admin")
        return self.application(environ, start_response)


def factory(global_conf, **local_conf):
    return Auth
'''

_SERVE = """
from nova import monkey_patch; monkey_patch.patch(backend="threading")
import sys
port, hosts = int(sys.argv[1]), sys.argv[2].split(",")
sys.argv = ["nova-api"]
from nova.api.openstack import wsgi_app
application = wsgi_app.init_application("osapi_compute", "nova-api-os-compute")
from nova import context, objects
admin = context.get_admin_context()
(cell,) = [one for one in objects.CellMappingList.get_all(admin) if not one.is_cell0()]
with context.target_cell(admin, cell) as inside:
    for host in hosts:
        service = objects.Service(inside, host=host, binary="nova-compute", topic="compute", report_count=0)
        service.create()
        objects.HostMapping(admin, host=host, cell_mapping=cell).create()
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
class Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
class Quiet(WSGIRequestHandler):
    def log_message(self, *words):
        pass
make_server("127.0.0.1", port, application, Server, Quiet).serve_forever()
"""


_REGISTER = """
from nova import monkey_patch; monkey_patch.patch(backend="threading")
import sys
host, conf = sys.argv[1:]
from nova import config, context, objects
config.parse_args(["nova-api"], default_config_files=[conf])
objects.register_all()
admin = context.get_admin_context()
(cell,) = [one for one in objects.CellMappingList.get_all(admin) if not one.is_cell0()]
with context.target_cell(admin, cell) as inside:
    objects.Service(inside, host=host, binary="nova-compute", topic="compute", report_count=0).create()
objects.HostMapping(admin, host=host, cell_mapping=cell).create()
"""


class NovaApi:
    """A real nova-api on SQLite, with compute services that are down. A context manager."""

    def __init__(self, folder: Path, hosts: list[str]) -> None:
        self.folder, self.hosts = folder, hosts
        (self.port,) = free_ports(1)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> NovaApi:
        self.folder.mkdir(parents=True, exist_ok=True)
        paste = (CACHE / "etc" / "nova" / "api-paste.ini").read_text()
        head, _, tail = paste.partition("[filter:authtoken]")
        tail = tail[tail.index("\n[") :] if "\n[" in tail else ""
        (self.folder / "api-paste.ini").write_text(
            f"{head}[filter:authtoken]\npaste.filter_factory = stand_in:factory\n{tail}"
        )
        (self.folder / "stand_in.py").write_text(_AUTH)
        (self.folder / "nova.conf").write_text(
            f"[DEFAULT]\ntransport_url = fake://\nstate_path = {self.folder}\nlong_rpc_timeout = 1\n"
            f"rpc_response_timeout = 1\nhost = controller\nlog_file = {self.folder}/nova.log\n"
            f"[api_database]\nconnection = sqlite:///{self.folder}/api.db\n"
            f"[database]\nconnection = sqlite:///{self.folder}/cell.db\n"
            "[placement]\nauth_type = none\nendpoint_override = http://127.0.0.1:1\n"
        )
        self._environment = {
            **os.environ,
            "OS_NOVA_CONFIG_DIR": str(self.folder),
            "PYTHONPATH": str(self.folder),
            "PYTHONWARNINGS": "ignore",
        }
        # By its interpreter: the script's own first line names the folder that it was installed in.
        manage = [
            str(PYTHON),
            str(CACHE / "bin" / "nova-manage"),
            "--config-file",
            str(self.folder / "nova.conf"),
        ]
        for words in (
            ["api_db", "sync"],
            ["cell_v2", "map_cell0", "--database_connection", f"sqlite:///{self.folder}/cell0.db"],
            ["db", "sync"],
            ["cell_v2", "create_cell", "--name", "one"],
        ):
            done = subprocess.run([*manage, *words], capture_output=True, text=True, env=self._environment)
            assert done.returncode == 0, f"nova-manage {' '.join(words)}: {done.stderr[-2000:]}"
        with (self.folder / "api.log").open("wb") as log:
            self._process = subprocess.Popen(
                [str(PYTHON), "-c", _SERVE, str(self.port), ",".join(self.hosts)],
                env=self._environment,
                stdout=log,
                stderr=log,
                cwd="/",
            )
        deadline = time.monotonic() + 90
        while True:
            try:
                self.request("GET", "/v2.1/os-services")
                return self
            except (ConnectionError, urllib.error.URLError) as error:
                if self._process.poll() is not None:
                    told = (self.folder / "api.log").read_text()[-3000:]
                    raise AssertionError(f"nova-api ended: {told}") from error
                if time.monotonic() > deadline:
                    raise AssertionError("nova-api does not answer") from error
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def request(self, method: str, path: str, body: object = None, token: str = "admin") -> tuple[int, Any]:
        """Status and JSON of one raw request."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "X-Auth-Token": token,
                "Content-Type": "application/json",
                "X-OpenStack-Nova-API-Version": "2.53",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def delete(self, host: str) -> None:
        """Delete the compute service of a host, as an operator does."""
        _, found = self.request("GET", f"/v2.1/os-services?binary=nova-compute&host={host}")
        (one,) = found["services"]
        status, told = self.request("DELETE", f"/v2.1/os-services/{one['id']}")
        assert status == 204, told

    def register(self, host: str) -> None:
        """What a nova-compute does that starts on a host without a service; the mapping is the API's."""
        here = {name: self._environment[name] for name in ("OS_NOVA_CONFIG_DIR", "PYTHONPATH")}
        python(_REGISTER, host, str(self.folder / "nova.conf"), **here)

    def register_anew(self, host: str) -> None:
        """Another service of the same name."""
        self.delete(host)
        self.register(host)

    def services(self) -> dict[str, tuple[str, str | None]]:
        """Host → (status, disabled reason) of the compute services."""
        _, found = self.request("GET", "/v2.1/os-services?binary=nova-compute")
        return {one["host"]: (one["status"], one["disabled_reason"]) for one in found["services"]}

    def clouds(self, file: Path) -> Path:
        """A clouds.yaml with the cloud "test"."""
        url = f"http://127.0.0.1:{self.port}"
        file.write_text(
            "clouds:\n  test:\n    auth_type: admin_token\n"
            f"    auth: {{endpoint: '{url}', token: admin}}\n"
            f"    compute_endpoint_override: {url}/v2.1\n    compute_api_version: '2'\n"
            "    compute_default_microversion: '2.53'\n"
        )
        return file
