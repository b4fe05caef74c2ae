"""What a control plane answers over HTTP: read within one time, and not taken for what it is not.

A socket's own timeout begins again with each byte, so that a server that says one every few seconds would
hold whoever asked for hours; and a gateway, a login page or a captive portal answers 200 to everything.
"""

from __future__ import annotations

import http.client
import io
import json
import socket
import time
from typing import Any, ClassVar

from virtbus.integrations.base import TargetUnavailable

WHOLE_SECONDS = 60.0  # a list of ten thousand nodes takes a few
_SHOWN_BYTES = 200


class _Deadline(io.RawIOBase):
    """What a socket reads, until one moment."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, *, long: bool) -> None:
        """`long`: WHOLE_SECONDS for all of it, else as long as the socket waits for one byte."""
        self._raw, self._sock, self._each = raw, sock, sock.gettimeout() or WHOLE_SECONDS
        self._seconds = WHOLE_SECONDS if long else self._each
        self._end = time.monotonic() + self._seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._end - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            self._sock.settimeout(min(left, self._each))
            return self._raw.readinto(buffer)
        except TimeoutError as error:
            raise TimeoutError(f"no whole answer within {self._seconds:g} s") from error

    def close(self) -> None:
        if not self.closed:
            self._sock.settimeout(self._each)  # a kept connection's next request begins with it
            self._raw.close()
        super().close()


class Answer(http.client.HTTPResponse):
    """An answer that is read within the connection's timeout, as a whole."""

    _long: ClassVar[bool] = False

    def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        raw: Any = self.fp.detach()
        self.fp = io.BufferedReader(_Deadline(raw, sock, long=self._long))


class _LongAnswer(Answer):
    _long = True


def bound(manager: Any) -> None:
    """Have every answer that a urllib3 PoolManager reads end within WHOLE_SECONDS."""
    import urllib3

    class HTTPConnection(urllib3.connection.HTTPConnection):
        response_class = _LongAnswer

    class HTTPSConnection(urllib3.connection.HTTPSConnection):
        response_class = _LongAnswer

    class HTTPConnectionPool(urllib3.HTTPConnectionPool):
        ConnectionCls = HTTPConnection

    class HTTPSConnectionPool(urllib3.HTTPSConnectionPool):
        ConnectionCls = HTTPSConnection

    manager.pool_classes_by_scheme = {"http": HTTPConnectionPool, "https": HTTPSConnectionPool}


def kubernetes_object(text: bytes, kind: str, doing: str) -> dict[str, Any]:
    """The object in an answer that reports success. Raises TargetUnavailable for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("kind") != kind:
        shown = " ".join(text[:_SHOWN_BYTES].decode("utf-8", "replace").split())
        raise TargetUnavailable(
            f"{doing}: the answer is not of kind {kind}: {shown!r}: is a gateway in between?"
        )
    return found
