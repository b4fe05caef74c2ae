"""masakari-monitors' instance monitor on a libvirtd: monitor_peer.py LIBVIRT-URI SINK-URL

Its own manager listens, its own filter and callback run; only its HTTP client is pointed at the sink. Each
I/O-error callback is told on standard output with the time at which it began.
"""

import json
import sys
import time


def main(uri: str, sink: str) -> None:
    from keystoneauth1 import session, token_endpoint
    from masakarimonitors.ha import masakari
    from masakarimonitors.instancemonitor import instance
    from openstack import connection
    from openstack.instance_ha.v1 import _proxy

    masakari.CONF([], project="bench", default_config_files=[])
    address = f"{sink}/v1"
    auth = token_endpoint.Token(address, "token")
    client = _proxy.Proxy(session.Session(auth=auth), service_type="instance-ha", endpoint_override=address)
    client._connection = connection.Connection(session=session.Session(auth=auth))

    manager = instance.InstancemonitorManager()
    manager.evf.callback.notifier._masakari_client = client
    real = manager._my_domain_event_io_error_callback

    def heard(conn, dom, *arguments):
        print(json.dumps([dom.UUIDString(), time.time()]), flush=True)
        real(conn, dom, *arguments)

    manager._my_domain_event_io_error_callback = heard
    print("ready", flush=True)
    manager._virt_event(uri)


if __name__ == "__main__":
    main(*sys.argv[1:])
