"""masakari-monitors' callback path, its HTTP client pointed at a sink here: masakari_peer.py EVENTS

Each event runs `Callback.libvirt_event_callback` as its event filter does. The real agent starts a thread for
each; here they come one after another, which costs less. The sink, a process of its own, answers at once.
"""

import json
import subprocess
import sys
import time
from datetime import datetime


def serve() -> None:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Sink(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        seen = 0
        disable_nagle_algorithm = True

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            Sink.seen += 1
            self.answer(202, {"notification": {"id": 1, "notification_uuid": "u"}})

        def do_GET(self):
            if self.path == "/seen":
                self.answer(200, {"seen": Sink.seen})
                return
            version = {"id": "v1.0", "status": "CURRENT", "version": "1.3", "min_version": "1.0", "links": []}
            self.answer(200, {"versions": [version]})

        def answer(self, status, data):
            body = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
    print(server.server_port, flush=True)
    server.serve_forever()


def main(count: int) -> None:
    sink = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        address = f"http://127.0.0.1:{int(sink.stdout.readline())}/v1"
        from keystoneauth1 import session, token_endpoint
        from masakarimonitors.ha import masakari
        from masakarimonitors.instancemonitor.libvirt_handler import callback
        from openstack import connection
        from openstack.instance_ha.v1 import _proxy

        masakari.CONF([], project="bench", default_config_files=[])
        auth = token_endpoint.Token(address, "token")
        under_test = callback.Callback()
        client = _proxy.Proxy(
            session.Session(auth=auth), service_type="instance-ha", endpoint_override=address
        )
        client._connection = connection.Connection(session=session.Session(auth=auth))
        under_test.notifier._masakari_client = client

        def one(number):
            uuid = f"6ba7b810-9dad-11d1-80b4-{number % 1000:012d}"
            under_test.libvirt_event_callback(
                "IO_ERROR", "IO_ERROR_REPORT", uuid, "VM", "host", datetime.utcnow()
            )

        one(0)
        begun = time.perf_counter()
        for number in range(count):
            one(number)
        seconds = time.perf_counter() - begun
        seen = session.Session().get(address.replace("/v1", "/seen")).json()["seen"]
        assert seen == count + 1, f"{seen} of {count + 1} arrived"
        print(json.dumps({"count": count, "seconds": seconds}))
    finally:
        sink.kill()
        sink.wait()


if __name__ == "__main__":
    serve() if sys.argv[1] == "--serve" else main(int(sys.argv[1]))
