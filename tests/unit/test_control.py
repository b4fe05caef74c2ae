"""A running agent can be looked into, by those who may, and the look costs it nothing."""

import http.client
import json
import os
import stat

import pytest

from virtbus.control import TAP_BUFFER, ControlSocket, HttpServer, Taps, ask
from virtbus.errors import AgentUnavailable, ConfigError
from virtbus.model import RawIoError


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
    for number in range(TAP_BUFFER + 5):
        taps.offer("raw", RawIoError("domain-1", "guest", 1, "/p", "vda", 1, "", number))
    taps.offer("raw", RawIoError("domain-2", "other", 1, "/p", "vda", 1, "", 1))
    taps.offer("published", RawIoError("domain-1", "guest", 1, "/p", "vda", 1, "", 1))
    lines = [json.loads(line) for line in reader.take(1)]
    assert len(lines) == TAP_BUFFER + 1
    assert lines[0]["item"]["alias"] == "vda"
    assert lines[-1] == {"stage": "tap", "lost": 5}
    taps.close(reader)
    assert not taps.active


def test_a_socket_left_by_a_killed_agent_is_replaced(tmp_path):
    first = ControlSocket(tmp_path / "s", status=dict, taps=Taps())
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
