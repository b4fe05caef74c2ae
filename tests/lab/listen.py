"""A bare libvirt-python listener: prints every I/O-error and lifecycle callback as one JSON line.

    python listen.py URI

It says ``ready`` when the callbacks are registered, and ends when its standard input closes. Keys:
event ("io_error", "io_error_reason" or "lifecycle"), domain, and path, alias, action, reason or
event_code, detail, as libvirt gives them.
"""

from __future__ import annotations

import json
import sys
import threading

import libvirt


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def main(uri: str) -> None:
    libvirt.registerErrorHandler(lambda *_: None, None)
    libvirt.virEventRegisterDefaultImpl()
    connection = libvirt.openReadOnly(uri)

    def io_error(
        _c: object, domain: libvirt.virDomain, path: str, alias: str, action: int, _o: object
    ) -> None:
        say(event="io_error", domain=domain.name(), path=path, alias=alias, action=action)

    def io_error_reason(
        _c: object, domain: libvirt.virDomain, path: str, alias: str, action: int, reason: str, _o: object
    ) -> None:
        say(
            event="io_error_reason",
            domain=domain.name(),
            path=path,
            alias=alias,
            action=action,
            reason=reason,
        )

    def lifecycle(_c: object, domain: libvirt.virDomain, code: int, detail: int, _o: object) -> None:
        say(event="lifecycle", domain=domain.name(), event_code=code, detail=detail)

    for number, callback in (
        (libvirt.VIR_DOMAIN_EVENT_ID_IO_ERROR, io_error),
        (libvirt.VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON, io_error_reason),
        (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle),
    ):
        connection.domainEventRegisterAny(None, number, callback, None)

    ended = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.buffer.read()
        ended.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    # The loop only returns when something happens: a timer lets it see the end.
    libvirt.virEventAddTimeout(100, lambda *_: None, None)
    print("ready", flush=True)
    while not ended.is_set():
        libvirt.virEventRunDefaultImpl()


if __name__ == "__main__":
    main(sys.argv[1])
