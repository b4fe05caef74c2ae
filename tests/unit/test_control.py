"""A running agent can be looked into, by those who may, and the look costs it nothing."""

import errno
import http.client
import json
import os
import socket
import stat
import threading
import time

import pytest

from tests.waiting import wait_until
from virtbus.agent import http as http_server
from virtbus.agent.control import ControlSocket, ask
from virtbus.agent.http import MAX_HTTP_PEERS, HttpServer
from virtbus.agent.tap import TAP_BUFFER, Taps
from virtbus.errors import AgentDenied, AgentUnavailable, ConfigError
from virtbus.observations import RawIoError
from virtbus.telemetry import METRICS


@pytest.fixture
def server():
    state = {"dead": [], "not_ready": []}
    server = HttpServer("127.0.0.1:0", dead=lambda: state["dead"], not_ready=lambda: state["not_ready"])
    server.start()
    yield server, state
    server.close()


def get(server, path):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body


def test_a_living_agent_is_live_and_ready(server):
    server, _ = server
    assert get(server, "/livez")[0] == 200
    assert get(server, "/readyz")[0] == 200


def test_liveness_fails_for_a_dead_thread_and_readiness_with_its_reasons(server):
    server, state = server
    state["dead"] = ["intake"]
    state["not_ready"] = ["source is disconnected"]
    assert get(server, "/livez") == (503, b'{"ok": false, "reasons": ["thread intake is dead"]}')
    status, body = get(server, "/readyz")
    assert status == 503
    assert json.loads(body)["reasons"] == ["source is disconnected"]


def test_metrics_are_there_and_other_paths_are_not(server):
    server, _ = server
    status, body = get(server, "/metrics")
    assert status == 200
    assert b"virtbus_spool_oldest_unpublished_seconds" in body
    assert get(server, "/etc/passwd")[0] == 404


def test_an_address_that_is_taken_is_one_clear_line(server):
    server, _ = server
    with pytest.raises(ConfigError, match=r"http\.listen = 127\.0\.0\.1:\d+: Address already in use; choose"):
        HttpServer(f"127.0.0.1:{server.port}", dead=list, not_ready=list)


def raw(server, request):
    """What comes back to these bytes, to the end of the connection."""
    with socket.create_connection(("127.0.0.1", server.port), 10) as peer:
        peer.sendall(request)
        answer = b""
        while chunk := peer.recv(65536):
            answer += chunk
        return answer


def test_what_follows_a_request_is_never_another_one(server):
    server, _ = server
    hidden = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(hidden)
    answer = raw(server, head + hidden)
    assert answer.startswith(b"HTTP/1.0 200")
    assert answer.count(b"HTTP/1.0 ") == 1
    assert b"virtbus_spool" not in answer


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"\x16\x03\x01 a TLS hello\r\n\r\n",
        b"GET /livez HTTP/9.9\r\n\r\n",
    ],
    ids=["long path", "long header", "many headers", "TLS", "version"],
)
def test_an_oversized_or_foreign_request_is_refused(server, request_):
    server, _ = server
    answer = raw(server, request_)
    assert b"Error response" in answer
    assert b" 200 " not in answer
    assert get(server, "/livez")[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:9466", "localhost.evil.example", "[::1"])
def test_a_name_of_the_web_that_leads_here_reads_nothing(server, host):
    server, _ = server
    answer = raw(server, f"GET /metrics HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.0 403")
    assert b"virtbus_" not in answer


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9466", "10.0.0.7", "[::1]:9466"])
def test_an_address_is_answered(server, host):
    server, _ = server
    answer = raw(server, f"GET /livez HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.0 200")


@pytest.mark.parametrize("host", ["node7.example:9466", "NODE7.example"])
def test_a_listener_that_the_network_reaches_is_scraped_by_name(host):
    server = HttpServer("0.0.0.0:0", dead=list, not_ready=list)
    server.start()
    try:
        answer = raw(server, f"GET /metrics HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.0 200")
    finally:
        server.close()


def test_a_name_that_is_allowed_is_answered_on_loopback_too_and_no_other():
    server = HttpServer("127.0.0.1:0", dead=list, not_ready=list, allowed_hosts=("Node7.example",))
    server.start()
    try:
        for host, status in (("node7.EXAMPLE:1", b"200"), ("node7.example.evil", b"403")):
            answer = raw(server, f"GET /livez HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert answer.startswith(b"HTTP/1.0 " + status)
    finally:
        server.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_double_colon_listens_on_both_families(address):
    server = HttpServer("[::]:0", dead=list, not_ready=list)
    server.start()
    try:
        with socket.create_connection((address, server.port), 10) as peer:
            peer.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
            assert peer.recv(64).startswith(b"HTTP/1.0 200")
    finally:
        server.close()


def test_a_host_without_ipv6_is_reached_over_ipv4(monkeypatch):
    def none(self):
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(http_server._Server6, "server_bind", none)
    server = HttpServer("[::]:0", dead=list, not_ready=list)
    server.start()
    try:
        assert get(server, "/livez")[0] == 200
    finally:
        server.close()


def test_a_hundred_slow_peers_hold_few_threads_and_keep_no_probe_out(server):
    server, _ = server
    slow = []
    try:
        for _ in range(100):
            peer = socket.create_connection(("127.0.0.1", server.port), 5)
            peer.sendall(b"GET /metrics HTTP/1.1\r\nX-Slow: ")
            slow.append(peer)
            if len(slow) % 10 == 0:
                assert get(server, "/livez")[0] == 200
        wait_until(lambda: threads_of("process_request_thread") <= MAX_HTTP_PEERS)
    finally:
        for peer in slow:
            peer.close()


def threads_of(name):
    return sum(name in thread.name for thread in threading.enumerate())


def test_a_page_that_breaks_is_logged_and_counted():
    def broken():
        raise LookupError("a bug of ours")

    def troubles():
        return METRICS.registry.get_sample_value("virtbus_warnings_total", {"event": "Trouble"}) or 0

    server = HttpServer("127.0.0.1:0", dead=list, not_ready=broken)
    server.start()
    before = troubles()
    assert raw(server, b"GET /readyz HTTP/1.1\r\n\r\n") == b""
    assert troubles() == before + 1
    server.close()


@pytest.fixture
def control(tmp_path):
    taps = Taps()
    control = ControlSocket(tmp_path / "control.sock", status=lambda: {"version": "1"}, taps=taps)
    control.start()
    yield tmp_path / "control.sock", taps
    control.close()


def test_status_is_answered_over_a_socket_that_only_its_owner_may_use(control):
    path, _ = control
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with ask(path, {"command": "status"}) as peer:
        assert json.loads(peer.makefile().readline()) == {"version": "1"}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to connect as somebody else")
def test_another_user_is_refused_even_where_the_file_would_let_him(control):
    path, _ = control
    path.chmod(0o777)
    for folder in list(path.parents)[:-2]:
        folder.chmod(folder.stat().st_mode | 0o111)
    pid = os.fork()
    if pid == 0:
        os.seteuid(65534)
        try:
            with ask(path, {"command": "status"}) as peer:
                os._exit(0 if "error" in json.loads(peer.makefile().readline()) else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("request_", [{"command": "format"}, {"command": "tap", "stage": "x"}, [1], {}])
def test_a_request_that_is_none_gets_an_error_and_the_socket_goes_on(control, request_):
    path, _ = control
    with ask(path, request_) as peer:
        assert "error" in json.loads(peer.makefile().readline())
    with ask(path, {"command": "status"}) as peer:
        assert "version" in json.loads(peer.makefile().readline())


def test_a_tap_sees_what_passes_and_a_lagging_one_is_told_how_much_it_lost(control):
    _, taps = control
    assert not taps.active
    reader = taps.open("raw", "domain-1")
    before = time.time_ns()
    for number in range(TAP_BUFFER + 5):
        taps.offer("raw", RawIoError("domain-1", "guest", 1, "/p", "vda", 1, "", number))
    taps.offer("raw", RawIoError("domain-2", "other", 1, "/p", "vda", 1, "", 1))
    taps.offer("published", RawIoError("domain-1", "guest", 1, "/p", "vda", 1, "", 1))
    passed = time.time_ns()
    lines = [json.loads(line) for line in reader.take(1)]
    assert len(lines) == TAP_BUFFER + 1
    assert before <= lines[0]["at_ns"] <= lines[-2]["at_ns"] <= passed  # when it passed, not when it is read
    assert lines[0]["item"]["alias"] == "vda"
    assert lines[-1] == {"stage": "tap", "lost": 5}
    taps.close(reader)
    assert not taps.active


def test_a_peer_that_sends_nonsense_and_leaves_breaks_nothing(control, monkeypatch):
    path, _ = control
    broke = []
    monkeypatch.setattr(threading, "excepthook", broke.append)
    for number in range(50):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(path))
            peer.sendall(b"nonsense\n" if number % 2 else b'{"command": "tap", "stage": "x"}\n')
        time.sleep(0.02)
    with ask(path, {"command": "status"}) as peer:
        assert "version" in json.loads(peer.makefile().readline())
    wait_until(lambda: not threads_of("virtbus-control-peer"))
    assert broke == []


def test_without_a_thread_for_a_peer_the_socket_goes_on(control, monkeypatch):
    path, _ = control
    start = threading.Thread.start

    def none_left(thread):
        if thread.name == "virtbus-control-peer":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none_left)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(path))
            assert peer.recv(1) == b""
    with ask(path, {"command": "status"}) as peer:
        assert "version" in json.loads(peer.makefile().readline())


def test_a_tap_that_never_reads_is_let_go_and_costs_the_path_nothing(control):
    path, taps = control
    with ask(path, {"command": "tap"}):
        wait_until(lambda: taps.active)
        wait = time.monotonic() + 30
        while taps.active and time.monotonic() < wait:  # an offer that waited for the reader would not return
            for number in range(100):
                taps.offer("raw", RawIoError("d", "guest", 1, "/p" * 500, "vda", 1, "", number))
            time.sleep(0.01)
        assert not taps.active


def test_a_second_agent_does_not_take_a_living_ones_socket(tmp_path):
    first = ControlSocket(tmp_path / "s", status=lambda: {"n": 1}, taps=Taps())
    first.start()
    with pytest.raises(ConfigError, match="another agent answers there"):
        ControlSocket(tmp_path / "s", status=lambda: {"n": 2}, taps=Taps())
    with ask(tmp_path / "s", {"command": "status"}) as peer:
        assert json.loads(peer.makefile().readline()) == {"n": 1}
    first.close()
    assert not (tmp_path / "s").exists()


def test_at_its_end_an_agent_leaves_a_socket_that_is_no_longer_its_own(tmp_path):
    first = ControlSocket(tmp_path / "s", status=dict, taps=Taps())
    (tmp_path / "s").rename(tmp_path / "away")
    second = ControlSocket(tmp_path / "s", status=dict, taps=Taps())
    first.close()
    assert (tmp_path / "s").is_socket()
    second.close()


def test_a_link_in_the_sockets_place_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "s").symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="Address already in use"):
        ControlSocket(tmp_path / "s", status=dict, taps=Taps())
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to listen as somebody else")
def test_a_socket_of_another_user_is_not_believed_to_be_the_agents(tmp_path):
    tmp_path.chmod(0o1777)
    for folder in list(tmp_path.parents)[:-2]:
        folder.chmod(folder.stat().st_mode | 0o111)
    with socket.socket(socket.AF_UNIX) as listener:
        os.seteuid(65534)
        try:
            listener.bind(str(tmp_path / "s"))
            listener.listen()
        finally:
            os.seteuid(0)
        with pytest.raises(AgentDenied, match="uid 65534 answers"):
            ask(tmp_path / "s", {"command": "status"})


def test_a_socket_left_by_a_killed_agent_is_replaced(tmp_path):
    first = ControlSocket(tmp_path / "s", status=dict, taps=Taps())
    first._socket.close()
    second = ControlSocket(tmp_path / "s", status=lambda: {"n": 2}, taps=Taps())
    second.start()
    with ask(tmp_path / "s", {"command": "status"}) as peer:
        assert json.loads(peer.makefile().readline()) == {"n": 2}
    second.close()
    first.close()


def test_folders_made_for_the_socket_may_be_entered_and_the_socket_is_its_owners_alone(tmp_path):
    before = os.umask(0o022)
    try:
        path = tmp_path / "run" / "virtbus" / "control.sock"
        ControlSocket(path, status=dict, taps=Taps())._socket.close()
        modes = [stat.S_IMODE(one.stat().st_mode) for one in (path, path.parent, path.parent.parent)]
        assert modes == [0o600, 0o755, 0o755]
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_without_an_agent_the_line_says_so(tmp_path):
    with pytest.raises(AgentUnavailable, match="no agent answers at"):
        ask(tmp_path / "none", {"command": "status"})
