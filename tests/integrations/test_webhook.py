"""The webhook speaks the CloudEvents HTTP binding, and loses nothing to a server's bad day."""

from __future__ import annotations

import ssl
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import trustme

from tests.integrations.parts import errors, eventually, publish, running
from virtbus.config import React, ReactWebhook
from virtbus.errors import ConfigError
from virtbus.integrations.base import EVENT, Action, ActionRefused, TargetUnavailable, open_integration
from virtbus.integrations.telemetry import ActionFailed
from virtbus.testing import a_record, no_waiting


class Server:
    """Answers with the statuses it is given, then with 204; remembers (path, headers, body)."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.answers: list[int] = []
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.connections = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 0.5  # an idle connection is closed

            def setup(self) -> None:
                outer.connections += 1
                super().setup()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(outer.answers.pop(0) if outer.answers else 204)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *words: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False  # closing waits for them
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
            self._server.handle_error = lambda *refused: None
        self.handler = Handler
        self.url = (
            f"{'http' if tls is None else 'https'}://127.0.0.1:{self._server.server_port}/hook?from=virtbus"
        )
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


def a_hook(server: Server, **more):
    return open_integration("webhook", React(webhook=ReactWebhook(url=server.url, **more)))


def an_action(**attributes: str) -> Action:
    record = a_record()
    body = {"attributes": {**record.attributes, **attributes}, "data": record.body.decode()}
    return Action("k", "t", EVENT, "", body)


def test_binary_mode_has_the_attributes_as_headers_and_the_data_as_the_body(server):
    hook = a_hook(server)
    action = an_action(subject="web 1/größe%")
    assert hook.execute(action).startswith("204")
    hook.execute(action)
    hook.close()
    path, headers, body = server.requests[0]
    assert path == "/hook?from=virtbus"
    assert headers["ce-id"] == action.body["attributes"]["id"]
    assert headers["ce-specversion"] == "1.0"
    assert headers["ce-subject"] == "web%201/gr%C3%B6%C3%9Fe%25"
    assert headers["content-type"] == "application/json"
    assert "ce-datacontenttype" not in headers
    assert body.decode() == action.body["data"]
    assert server.connections == 1


def test_structured_mode_and_a_token_from_a_file(server, tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    hook = a_hook(server, content_mode="structured", token_file=str(tmp_path / "token"))
    hook.execute(an_action())
    (tmp_path / "token").write_text("rotated\n")
    hook.execute(an_action())
    hook.close()
    assert [headers["authorization"] for _, headers, _ in server.requests] == [
        "Bearer s3cret",
        "Bearer rotated",
    ]
    assert server.requests[0][1]["content-type"] == "application/cloudevents+json"
    assert b'"specversion":"1.0"' in server.requests[0][2]


@pytest.mark.parametrize("status", [301, 401, 404, 409, 410, 429, 500, 503])
def test_an_answer_that_may_change_is_tried_again(server, status):
    server.answers = [status]
    hook = a_hook(server)
    with pytest.raises(TargetUnavailable, match=str(status)):
        hook.execute(an_action())
    hook.close()


@pytest.mark.parametrize("status", [400, 413, 415, 422, 431])
def test_an_answer_about_the_event_itself_is_final(server, status):
    server.answers = [status]
    hook = a_hook(server)
    with pytest.raises(ActionRefused, match=str(status)):
        hook.execute(an_action())
    hook.close()


def test_a_server_that_fails_three_times_gets_every_event_in_order_with_its_id(server, tmp_path):
    server.answers = [503, 500, 429]
    url = f"embedded://{tmp_path}/bus.db"
    records = errors(3)
    publish(url, *records)
    told: list = []
    with running(a_hook(server), url, tmp_path, told=told), no_waiting():
        eventually(lambda: len(server.requests) == 6, "six requests")
    failed = [line.key for line in told if isinstance(line, ActionFailed)]
    assert len(failed) == 3
    assert {key.partition("#")[2] for key in failed} <= {record.id for record in records}
    ids = [headers["ce-id"] for _, headers, _ in server.requests]
    assert set(ids) == {record.id for record in records}


def test_a_server_that_is_away_is_tried_again(server):
    hook = a_hook(server)
    hook.execute(an_action())
    server.close()
    with pytest.raises(TargetUnavailable):
        hook.execute(an_action())
    assert hook.probe()[0].status == "failed"
    hook.close()
    server.close = lambda: None


def test_an_answer_without_end_is_not_read_to_its_end(server):
    said = 0

    def flood(handler):
        nonlocal said
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):
            for _ in range(1000):
                handler.wfile.write(b"x" * 65536)
                said += 65536

    server.handler.do_POST = flood
    hook = a_hook(server)
    assert hook.execute(an_action()).startswith("200")
    hook.close()
    assert said < 10_000_000


HEAD = b"HTTP/1.1 200 OK\r\n"
DRIPS = {
    "the status line": (b"HTTP/1.1 200 ", b"x", False),
    "the headers": (HEAD, b"x-more: y\r\n", False),
    "answers before the answer": (b"", b"HTTP/1.1 100 Continue\r\n\r\n", False),
    "the body": (HEAD + b"\r\n", b"x", True),
    "a chunk's size": (HEAD + b"transfer-encoding: chunked\r\n\r\n1;", b"x", True),
}


@pytest.mark.parametrize("what", DRIPS)
def test_an_answer_that_drips_without_end_is_given_up(server, what):
    begin, drop, accepted = DRIPS[what]
    end = threading.Event()

    def drip(handler):
        handler.wfile.write(begin)
        with suppress(OSError):
            while not end.wait(0.02):
                handler.wfile.write(drop)

    server.handler.do_POST = drip
    hook = a_hook(server, timeout_seconds=0.5)
    try:
        if accepted:  # it said so before it dripped
            assert hook.execute(an_action()) == "200 OK"
        else:
            with pytest.raises(TargetUnavailable, match=r"no whole answer within 0\.5 s|headers"):
                hook.execute(an_action())
    finally:
        end.set()
        hook.close()


def test_a_kept_connection_has_its_whole_time_for_each_answer(server):
    hook = a_hook(server, timeout_seconds=5.0)
    for _ in range(3):
        hook.execute(an_action())
        assert hook._connection.sock.gettimeout() == 5.0
    hook.close()
    assert server.connections == 1


def test_a_redirect_is_not_followed_and_gets_no_token(server, tmp_path):
    (tmp_path / "token").write_text("s3cret")
    elsewhere = Server()

    def redirect(handler):
        handler.rfile.read(int(handler.headers["content-length"]))
        handler.send_response(302)
        handler.send_header("location", elsewhere.url)
        handler.send_header("content-length", "0")
        handler.end_headers()

    server.handler.do_POST = redirect
    hook = a_hook(server, token_file=str(tmp_path / "token"))
    with pytest.raises(TargetUnavailable, match="a redirect is not followed"):
        hook.execute(an_action())
    hook.close()
    elsewhere.close()
    assert elsewhere.connections == 0


def test_a_proxy_of_the_environment_gets_nothing(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    hook = a_hook(server)
    assert hook.execute(an_action()).startswith("204")
    hook.close()


def test_tls_is_verified_with_the_host_name(tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    outcomes = []
    for host in ("127.0.0.1", "another.example"):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(host).configure_cert(context)
        made = Server(context)
        try:
            for ca_file in (str(tmp_path / "ca.pem"), None):
                settings = ReactWebhook(url=made.url, ca_file=ca_file)
                hook = open_integration("webhook", React(webhook=settings))
                try:
                    outcomes.append(hook.execute(an_action())[:3])
                except TargetUnavailable as error:
                    outcomes.append("refused" if "CERTIFICATE_VERIFY_FAILED" in str(error) else str(error))
                hook.close()
        finally:
            made.close()
    assert outcomes == ["204", "refused", "refused", "refused"]


def test_plaintext_beyond_loopback_is_warned_of(monkeypatch):
    told = []
    monkeypatch.setattr("virtbus.integrations.hooks.emit", told.append)
    open_integration("webhook", React(webhook=ReactWebhook(url="http://127.evil.example/x?token=s3cret")))
    (warning,) = told
    assert warning.LEVEL == "warning"
    assert "s3cret" not in str(warning)


@pytest.mark.parametrize("path", ["/a b?token=s3cret", "/é?token=s3cret", "/\x01?token=s3cret"])
def test_a_path_that_http_cant_carry_is_refused_without_its_secret(path):
    with pytest.raises(ConfigError, match="percent-encode") as caught:
        open_integration("webhook", React(webhook=ReactWebhook(url=f"https://h{path}")))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["ftp://x/", "http://", "http://user:pw@x/", "http://x:0/", "https://x:99999/"]
)
def test_an_address_that_cant_be_used_is_refused_at_the_start(url):
    with pytest.raises(ConfigError, match=r"react\.webhook"):
        open_integration("webhook", React(webhook=ReactWebhook(url=url)))
