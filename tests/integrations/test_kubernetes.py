"""What the Kubernetes integration makes of an API server's bad day: a gateway's answers, a login that ends.

What it does on a good one is tried against a real server in with_kubernetes.py.
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
import urllib3

from tests.integrations.drip import drip
from virtbus.config import React, ReactKubernetes
from virtbus.integrations.base import (
    EVENT,
    HOLD,
    REFUSED_STATUS,
    RELEASE,
    REPORT,
    Action,
    ActionRefused,
    TargetDenied,
    TargetUnavailable,
    open_integration,
)

NODE: dict[str, Any] = {
    "metadata": {"name": "h1", "uid": "u1", "resourceVersion": "1"},
    "spec": {},
    "status": {"addresses": [{"type": "Hostname", "address": "Rack7-H1"}]},
}
NODE["items"] = [dict(NODE)]
NODE["status"]["allowed"] = True
CONDITION = {"status": "True", "reason": "NoTrouble", "message": ""}
TIME = "2026-05-04T03:00:00Z"
VMI_EVENT = {"namespace": "n", "event": "e", "type": "Warning", "reason": "IOError", "message": "m",
             "count": 1, "last": TIME, "first": TIME, "name": "web", "uid": "u"}  # fmt: skip


def kind_of(command: str, path: str) -> str:
    """Of what an API server answers to a request."""
    if "/nodes" in path:
        return "Node" if "/nodes/" in path else "NodeList"
    return "Event" if "/events" in path else "SelfSubjectAccessReview"


class Server:
    """Answers every request with one node to who bears the token, or with `status` and its headers.

    `gateway` is what is said with 200 in its place, to requests of the method `only`; None: to all. Each byte
    takes `byte_seconds`.
    """

    def __init__(self) -> None:
        self.status, self.headers, self.token = 200, {}, "first"
        self.gateway: bytes | None = None
        self.only: str | None = None
        self.byte_seconds = 0.0
        self.requests: list[str] = []
        self.cut_off = threading.Event()  # who asked did not wait for the end
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 0.5  # an idle connection is closed

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("content-length") or 0))
                outer.requests.append(f"{self.command} {self.path}")
                known = self.headers["authorization"] == f"Bearer {outer.token}"
                found = {**NODE, "kind": kind_of(self.command, self.path)}
                body = json.dumps(found if outer.status == 200 else {}).encode()
                if outer.gateway is not None and outer.only in (None, self.command):
                    body = outer.gateway
                self.send_response(outer.status if known else 401)
                for name, value in {**outer.headers, "content-length": str(len(body))}.items():
                    self.send_header(name, value)
                self.send_header("content-type", "application/json")
                self.end_headers()
                drip(self.wfile, body, outer.byte_seconds, outer.cut_off)

            do_GET = do_PATCH = do_POST = answer

            def log_message(self, *words: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False  # closing waits for them
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def kubeconfig(self, folder: Path, user: dict[str, str]) -> Path:
        file = folder / "kubeconfig"
        file.write_text(json.dumps({
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": user}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "c",
        }))  # fmt: skip
        return file


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text("first")
    return file


@pytest.fixture
def kubernetes(server: Server, token: Path, tmp_path: Path) -> Iterator[Any]:
    file = server.kubeconfig(tmp_path, {"tokenFile": str(token)})
    made = open_integration(
        "kubernetes", React(kubernetes=ReactKubernetes(kubeconfig=str(file), events="vmi"))
    )
    yield made
    made.close()


def an_action(verb: str, **body: object) -> Action:
    return Action(f"{verb}/h1/1", "h1", verb, "host: why", {"target": "h1", **body})


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_asks_for_patience_keeps_no_other_host_waiting(server, kubernetes, monkeypatch, status):
    """The client's own retries would sleep for as long as the server says, and no signal would end us."""
    slept: list[float] = []
    monkeypatch.setattr(urllib3.util.retry.Retry, "sleep", lambda *_: slept.append(1.0))
    server.status, server.headers = status, {"retry-after": "3600"}
    for action in (an_action(HOLD), an_action(REPORT, **CONDITION), an_action(EVENT, **VMI_EVENT)):
        with pytest.raises(TargetUnavailable):
            kubernetes.execute(action)
    with pytest.raises(TargetUnavailable):
        kubernetes.look({}, everything=True)
    assert slept == []
    assert len(server.requests) == 4, "each was asked once; when it is asked again, we decide"


@pytest.mark.parametrize("status", [405, 408, 409, 410, 412, 429, 500, 502])
def test_an_answer_that_may_change_is_tried_again(server, kubernetes, status):
    server.status = status
    with pytest.raises(TargetUnavailable):
        kubernetes.execute(an_action(HOLD))


@pytest.mark.parametrize("status", sorted(REFUSED_STATUS))
def test_an_answer_about_the_action_itself_is_final(server, kubernetes, status):
    server.status = status
    with pytest.raises(ActionRefused):
        kubernetes.execute(an_action(HOLD))


@pytest.mark.parametrize("host", ["H1", "H1.Example.org", "rack7-h1"])
def test_a_host_whose_name_has_capitals_is_the_node_that_kubelet_names_without(server, kubernetes, host):
    action = Action(f"{HOLD}/{host}/1", host, HOLD, "host: why", {})
    assert kubernetes.execute(action).endswith("set")
    assert "PATCH /api/v1/nodes/h1" in server.requests


@pytest.mark.parametrize("where", ["in a file that the kubeconfig names", "in the kubeconfig"])
@pytest.mark.parametrize("verb", [HOLD, EVENT, "look"])
def test_a_token_that_was_renewed_is_used_without_a_restart(
    server, token, tmp_path, monkeypatch, where, verb
):
    """A bound token ends after an hour; the client reads it once."""
    if where == "in the kubeconfig":
        server.kubeconfig(tmp_path, {"token": "first"})
    settings = ReactKubernetes(kubeconfig=str(tmp_path / "kubeconfig"), events="vmi")
    if where != "in the kubeconfig":
        server.kubeconfig(tmp_path, {"tokenFile": str(token)})
    made = open_integration("kubernetes", React(kubernetes=settings))

    def ask() -> None:
        if verb == "look":
            made.look({}, everything=True)
        else:
            made.execute(an_action(verb, **(VMI_EVENT if verb == EVENT else {})))

    ask()
    server.token = "second"
    with pytest.raises(TargetDenied):
        ask()
    token.write_text("second")
    if where == "in the kubeconfig":
        server.kubeconfig(tmp_path, {"token": "second"})
    monkeypatch.setattr("virtbus.integrations.kubernetes._LOGIN_SECONDS", 0.0, raising=False)
    with pytest.raises(TargetDenied):
        ask()
    ask()
    made.close()


def test_a_kubeconfig_that_is_being_replaced_ends_nothing(server, kubernetes, tmp_path, monkeypatch):
    monkeypatch.setattr("virtbus.integrations.kubernetes._LOGIN_SECONDS", 0.0, raising=False)
    server.token = "second"
    (tmp_path / "kubeconfig").write_text("")
    for _ in range(2):
        with pytest.raises(TargetDenied):
            kubernetes.execute(an_action(HOLD))


# ---- a gateway in between

PAGES = [b"<html>Please log in</html>", b"", b"{}", b"null", b"[]", b"\xff", b"[" * 5000,
         b'{"kind": "Status", "status": "Failure", "code": 503}']  # fmt: skip


@pytest.mark.parametrize("verb", [HOLD, RELEASE, REPORT, EVENT])
def test_a_page_that_comes_with_200_is_no_deed(server, kubernetes, monkeypatch, verb):
    """Taken for done, a host would stay open: the next look would say that somebody took it back."""
    if verb == RELEASE:
        monkeypatch.setitem(NODE["metadata"], "annotations", {"virtbus.io/tainted": "k"})
    more = {REPORT: CONDITION, EVENT: VMI_EVENT}.get(verb, {})
    for server.gateway, server.only in itertools.product(PAGES, ("PATCH", None)):
        with pytest.raises(TargetUnavailable, match="is a gateway in between"):
            kubernetes.execute(an_action(verb, **more))
    server.gateway = None
    assert kubernetes.execute(an_action(verb, **more))


@pytest.mark.parametrize("everything", [True, False])
def test_a_page_that_comes_with_200_is_no_cluster_without_nodes(server, kubernetes, everything):
    """Taken for that, every hold would be forgotten, and no host found by its name for a minute."""
    for server.gateway in PAGES:
        with pytest.raises(TargetUnavailable, match="is a gateway in between"):
            kubernetes.look({"h1": None}, everything=everything)
    server.gateway = None
    assert kubernetes.look({"h1": None}, everything=everything).uids == {"h1": "u1"}


def test_a_page_that_comes_with_200_fails_a_probe(server, kubernetes):
    assert [one.status for one in kubernetes.probe()] == ["ok"]
    for server.gateway in PAGES:
        assert [(one.status, one.exit_code) for one in kubernetes.probe()] == [("failed", 69)]


@pytest.mark.parametrize("everything", [True, False])
def test_an_answer_that_drips_is_not_waited_for_longer_than_for_any(
    server, kubernetes, monkeypatch, everything
):
    """Each byte comes in time, and with each of them the socket's own time-out begins again."""
    monkeypatch.setattr("virtbus.integrations.answers.WHOLE_SECONDS", 0.2)
    server.byte_seconds, server.gateway = 0.05, b" " * 200
    with pytest.raises(TargetUnavailable, match="Read timed out"):
        kubernetes.look({"h1": "h1"}, everything=everything)
    assert server.cut_off.wait(20)
