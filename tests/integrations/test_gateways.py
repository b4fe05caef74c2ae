"""A gateway between us and OpenStack that answers 200 to everything: what the SDK takes for done was not.

What the integrations make of a real nova-api is in test_openstack.py, of a gateway before Kubernetes in
test_kubernetes.py.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.drip import drip
from virtbus.config import React, ReactMasakari, ReactNova
from virtbus.integrations.base import (
    EVENT,
    HOLD,
    RELEASE,
    Action,
    Integration,
    TargetUnavailable,
    open_integration,
)

pytestmark = [
    # openstacksdk uses what it deprecates itself.
    pytest.mark.filterwarnings("ignore::openstack.warnings.RemovedInSDK50Warning"),
    pytest.mark.filterwarnings("ignore::openstack.warnings.RemovedInSDK60Warning"),
]

SERVICE = {"id": "5b1b1b1b-0000-4000-8000-000000000001", "binary": "nova-compute", "host": "h1",
           "status": "enabled", "state": "up", "disabled_reason": None, "forced_down": False}  # fmt: skip
PAGES = [b"<html>Please log in</html>", b"", b"{}", b"null", b"[]", b'{"error": {"code": 503}}']
NOTIFICATION = {"type": "VM", "hostname": "h1", "generated_time": "2026-05-04T03:00:00",
                "payload": {"event": "IO_ERROR", "instance_uuid": SERVICE["id"],
                            "vir_domain_event": "IO_ERROR_PAUSE"}}  # fmt: skip


class Cloud:
    """Compute and instance-HA services with a gateway before them, which says `page` in their place.

    Only to requests of the method `only`; None: to all. Each byte takes `byte_seconds`.
    """

    def __init__(self) -> None:
        self.service, self.notifications = dict(SERVICE), 0
        self.page: bytes | None = None
        self.only: str | None = None
        self.byte_seconds = 0.0
        self.cut_off = threading.Event()  # who asked did not wait for the end
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 0.5  # an idle connection is closed

            def answer(self) -> None:
                given = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
                status, body = outer.answer(self.command, self.path, given)
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                drip(self.wfile, body, outer.byte_seconds, outer.cut_off)

            do_GET = do_PUT = do_POST = answer

            def log_message(self, *words: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False  # closing waits for them
        self._url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def answer(self, command: str, path: str, given: dict[str, Any]) -> tuple[int, bytes]:
        found: object
        if "/os-services" not in path and "/notifications" not in path:
            name = path.split("/")[1]
            number, last, first = {"compute": ("v2.1", "2.90", "2.1"), "ha": ("v1", "1.3", "1.0")}[name]
            links = [{"rel": "self", "href": f"{self._url}/{name}/{number}/"}]
            found = {"id": number, "status": "CURRENT", "version": last, "min_version": first, "links": links}
            return 200, json.dumps({"versions": [found]}).encode()
        if self.page is not None and self.only in (None, command):
            return 200, self.page
        if "/notifications" in path:
            self.notifications += 1
            found = {"notification": {"notification_uuid": "n-1", "id": 1, **given["notification"]}}
            return 202, json.dumps(found).encode()
        self.service.update(given)
        found = {"services": [self.service]} if command == "GET" else {"service": self.service}
        return 200, json.dumps(found).encode()

    def clouds(self, folder: Path) -> Path:
        file = folder / "clouds.yaml"
        file.write_text(json.dumps({"clouds": {"test": {
            "auth_type": "none", "auth": {"endpoint": self._url},
            "compute_endpoint_override": f"{self._url}/compute/v2.1", "compute_api_version": "2",
            "compute_default_microversion": "2.53",
            "instance_ha_endpoint_override": f"{self._url}/ha/v1",
        }}}))  # fmt: skip
        return file

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    made = Cloud()
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(made.clouds(tmp_path)))
    yield made
    made.close()


@pytest.fixture
def nova(cloud: Cloud) -> Iterator[Integration]:
    made = open_integration("nova", React(nova=ReactNova(cloud="test")))
    yield made
    made.close()


@pytest.fixture
def masakari(cloud: Cloud) -> Iterator[Integration]:
    made = open_integration("masakari", React(masakari=ReactMasakari(cloud="test")))
    yield made
    made.close()


def an_action(verb: str) -> Action:
    return Action(
        f"{verb}/h1/1", "h1", verb, "host: why", NOTIFICATION if verb == EVENT else {"target": "h1"}
    )


@pytest.mark.parametrize("verb", [HOLD, RELEASE])
def test_a_page_that_comes_with_200_disables_and_enables_nothing(
    cloud: Cloud, nova: Integration, verb: str
) -> None:
    if verb == RELEASE:
        nova.execute(an_action(HOLD))
    for cloud.page, cloud.only in itertools.product(PAGES, ("PUT", None)):
        with pytest.raises(TargetUnavailable):
            nova.execute(an_action(verb))
    cloud.page = None
    nova.execute(an_action(verb))
    assert cloud.service["status"] == ("disabled" if verb == HOLD else "enabled")


@pytest.mark.parametrize("everything", [True, False])
def test_a_page_that_comes_with_200_is_no_cloud_without_services(
    cloud: Cloud, nova: Integration, everything: bool
) -> None:
    for cloud.page in PAGES:
        with pytest.raises(TargetUnavailable):
            nova.look({"h1": None}, everything=everything)
    cloud.page = None
    found = nova.look({"h1": None}, everything=everything)
    assert found is not None
    assert found.uids == {"h1": SERVICE["id"]}


def test_a_page_that_comes_with_200_is_no_notification(cloud: Cloud, masakari: Integration) -> None:
    for cloud.page in PAGES:
        with pytest.raises(TargetUnavailable, match="is a gateway in between"):
            masakari.execute(an_action(EVENT))
    cloud.page = None
    assert masakari.execute(an_action(EVENT)) == "notification n-1"
    assert cloud.notifications == 1


def test_an_answer_that_drips_is_not_waited_for_longer_than_for_any(
    cloud: Cloud, nova: Integration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte comes in time, and with each of them the socket's own time-out begins again."""
    assert nova.look({}, everything=True) is not None
    monkeypatch.setattr("virtbus.integrations.answers.WHOLE_SECONDS", 0.2)
    cloud.byte_seconds, cloud.page = 0.05, b" " * 200
    with pytest.raises(TargetUnavailable, match="Read timed out"):
        nova.look({"h1": "h1"}, everything=True)
    assert cloud.cut_off.wait(20)
