"""For everything that has no integration of its own: run a command, or POST the event.

Both get each event at least once, in the order of its domain, with the same CloudEvents `id` each time.
"""

from __future__ import annotations

import base64
import http.client
import os
import re
import selectors
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from tempfile import TemporaryFile
from typing import Any, ClassVar
from urllib.parse import quote, urlsplit

from virtbus import envelope
from virtbus.bus import is_loopback
from virtbus.config import React, read_secret
from virtbus.consumer import Delivery
from virtbus.errors import ConfigError
from virtbus.integrations.answers import Answer
from virtbus.integrations.base import (
    EVENT,
    REFUSED_STATUS,
    Action,
    ActionRefused,
    Integration,
    TargetUnavailable,
)
from virtbus.model import Check
from virtbus.telemetry import TelemetryEvent, emit
from virtbus.words import Origin

_HEADER_TEXT = re.compile("[ -~]+")
_TOLD_BYTES = 500  # of a command's or server's answer, in messages
_PIPE_BYTES = 1 << 20  # as much as a pipe holds at once
_FIRST_LOOK_SECONDS, _LOOK_SECONDS = 0.0005, 0.05  # between two looks whether a command has ended
_END_SECONDS = 1.0  # for a command that was killed
_VARIABLE_BYTES = 32_768  # Linux starts no command with a variable of 128 KiB


class PlaintextWebhook(TelemetryEvent, level="warning"):
    """PLAINTEXT to the webhook: events and token can be read on the way; use https://"""

    url: str


class _Hook(Integration):
    """What both have in common: which events, and how one is stored."""

    def __init__(self, settings: React) -> None:
        self._types, self._drills = tuple(settings.types), settings.drills

    def wants(self, delivery: Delivery) -> Action | None:
        """The event as it came, when its type is asked for and it is not a drill (or drills are)."""
        if not delivery.type.endswith(self._types):
            return None
        if delivery.data.get("origin") == Origin.REPLAY and not self._drills:
            return None
        body = {"attributes": dict(delivery.attributes)} | _stored(delivery.body)
        return Action(
            key=f"{delivery.source}#{delivery.id}",
            target=delivery.key or delivery.source,
            verb=EVENT,
            why=delivery.type,
            body=body,
        )


def _stored(data: bytes) -> dict[str, Any]:
    """An event's data as the store takes them: text, or base64 for what is none (a foreign event's)."""
    try:
        return {"data": data.decode()}
    except UnicodeDecodeError:
        return {"data_base64": base64.b64encode(data).decode()}


def _data(body: Mapping[str, Any]) -> bytes:
    """What `_stored` was given."""
    return body["data"].encode() if "data" in body else base64.b64decode(body["data_base64"])


class Exec(_Hook):
    """Run `react.exec.command`: the event is its standard input as structured JSON.

    The environment has VIRTBUS_EVENT_TYPE, _ID, _SOURCE, _SUBJECT and _TIME beside ours, but for values above
    32 KiB. It exits with 0: done; with 65: never again (an operator is notified); with anything else, or not
    in time: once more later. What it leaves behind in its session ends with it.
    """

    name: ClassVar[str] = "exec"

    def __init__(self, settings: React) -> None:
        """Raises ConfigError without a command."""
        super().__init__(settings)
        if not settings.exec.command:
            raise ConfigError(
                "no command to run: set react.exec.command, or --option exec.command='[\"/path\"]'"
            )
        self._command, self._timeout = list(settings.exec.command), settings.exec.timeout_seconds

    def execute(self, action: Action) -> str:
        """See Integration."""
        attributes: Mapping[str, str] = action.body["attributes"]
        event = envelope.structured_json(attributes, _data(action.body))
        environment = {
            f"VIRTBUS_EVENT_{name.upper()}": attributes[name]
            for name in ("type", "id", "source", "subject", "time")
            if len(attributes.get(name, "").encode()) in range(1, _VARIABLE_BYTES)
        }
        try:
            with TemporaryFile() as given:
                given.write(event + b"\n")
                given.seek(0)
                process = subprocess.Popen(
                    self._command,
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **environment},
                    start_new_session=True,
                )
        except OSError as error:
            raise TargetUnavailable(f"{self._command[0]} can't be started: {error.strerror}") from error
        try:
            output = _end_of_output(process, self._timeout)
        except subprocess.TimeoutExpired as error:
            raise TargetUnavailable(f"{self._command[0]} ran longer than {self._timeout:g} s") from error
        finally:
            _end_group(process)
        said = output.decode("utf-8", "replace").strip()
        if process.returncode == ActionRefused.exit_code:
            raise ActionRefused(f"{self._command[0]} refused the event: {said}")
        if process.returncode != 0:
            raise TargetUnavailable(f"{self._command[0]} ended with {process.returncode}: {said}")
        return said or "exit 0"

    def probe(self) -> Sequence[Check]:
        """See Integration."""
        from shutil import which

        found = which(self._command[0])
        if found is None:
            return [Check("exec", "failed", f"{self._command[0]} is not a command", "fix react.exec.command")]
        return [Check("exec", "ok", found)]


def _end_of_output(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """The last of what it says until it ends: it may say more than fits into memory.

    What it leaves behind may keep its output open, and is not waited for. Raises subprocess.TimeoutExpired.
    """
    assert process.stdout is not None
    end, said, wait = time.monotonic() + seconds, b"", _FIRST_LOOK_SECONDS
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        while True:
            over = _has_ended(process)  # looked at first: then what is read is all that it said
            left = 0.0 if over else min(wait, max(0.0, end - time.monotonic()))
            if ready.select(left):
                more = os.read(process.stdout.fileno(), _PIPE_BYTES)
                said = (said + more)[-_TOLD_BYTES:]
                if not more:  # as a rule it ends now
                    ready.unregister(process.stdout)
                    wait = _FIRST_LOOK_SECONDS
            else:
                wait = min(2 * wait, _LOOK_SECONDS)
            if over:
                return said
            if time.monotonic() >= end:
                raise subprocess.TimeoutExpired(process.args, seconds)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Without taking its status: until then no other process has its number."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Nothing of its session outlives a command, but what is not ours (sudo), or hangs in the kernel."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)
    if process.stdout is not None:
        process.stdout.close()


class Webhook(_Hook):
    """POST to `react.webhook.url` in the CloudEvents HTTP binding (1.0), over one kept connection.

    2xx: done. 400, 413, 415, 422, 431: never again (an operator is notified). Anything else, also a redirect:
    once more later; nothing is lost by a wrong path or an expired token. Where status and headers are not
    there within `react.webhook.timeout_seconds`, it is given up; the text after them changes no verdict, and
    only what a message shows of it is read.
    """

    name: ClassVar[str] = "webhook"

    def __init__(self, settings: React) -> None:
        """Raises ConfigError for a URL or CA file that can't be used."""
        super().__init__(settings)
        self._settings = settings.webhook
        parts = urlsplit(self._settings.url or "")
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ConfigError("no address to POST to: set react.webhook.url to http://… or https://…")
        if parts.username or parts.password:
            raise ConfigError("react.webhook.url holds a user: put a token into react.webhook.token_file")
        self._host, self._port, self._tls = parts.hostname, port, parts.scheme == "https"
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._name = f"{parts.scheme}://{parts.netloc}{parts.path}"
        if not re.fullmatch(r"[!-~]+", self._path):  # http.client would show the whole of it, query and all
            raise ConfigError(f"{self._name!r}: percent-encode blanks and other signs in react.webhook.url")
        self._context: ssl.SSLContext | None = None
        if self._tls:
            try:
                self._context = ssl.create_default_context(cafile=self._settings.ca_file)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"react.webhook.ca_file {self._settings.ca_file}: {error}") from error
        elif not is_loopback(self._host):
            emit(PlaintextWebhook(self._name))
        made = (
            partial(http.client.HTTPSConnection, context=self._context)
            if self._tls
            else http.client.HTTPConnection
        )
        self._connection: http.client.HTTPConnection = made(
            self._host, self._port, timeout=self._settings.timeout_seconds
        )
        self._connection.response_class = Answer

    def execute(self, action: Action) -> str:
        """See Integration."""
        attributes: Mapping[str, str] = action.body["attributes"]
        data = _data(action.body)
        if self._settings.content_mode == "structured":
            headers = {"Content-Type": "application/cloudevents+json"}
            data = envelope.structured_json(attributes, data)
        else:
            headers = {f"ce-{name}": _header(value) for name, value in attributes.items()}
            headers["Content-Type"] = headers.pop("ce-datacontenttype", "application/json")
        if self._settings.token_file is not None:
            headers["Authorization"] = f"Bearer {self._token(self._settings.token_file)}"
        try:
            status, reason, said = self._post(data, headers)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise TargetUnavailable(f"{self._name}: {error or type(error).__name__}") from error
        if 200 <= status < 300:
            return f"{status} {reason}"
        text = f"{self._name} answered {status} {reason}: {said}"
        if status in REFUSED_STATUS:
            raise ActionRefused(text)
        if 300 <= status < 400:
            text += "; a redirect is not followed: put the right address into react.webhook.url"
        raise TargetUnavailable(text)

    def _token(self, path: str) -> str:
        try:
            token = read_secret(path, "react.webhook.token_file")
        except ConfigError as error:  # it may be in the middle of being replaced
            raise TargetUnavailable(str(error)) from error
        if not _HEADER_TEXT.fullmatch(token):  # never the text itself, as http.client would show it
            raise TargetUnavailable(f"react.webhook.token_file: a header does not take what {path} holds")
        return token

    def _post(self, data: bytes, headers: Mapping[str, str]) -> tuple[int, str, str]:
        connection = self._connection
        for kept in (connection.sock is not None, False):
            try:
                connection.request("POST", self._path, data, dict(headers))  # connects when it is closed
                answer = connection.getresponse()
            except (ConnectionError, http.client.RemoteDisconnected):
                connection.close()
                if not kept:
                    raise
                # The server had closed the idle connection: once more on a new one.
            else:
                return answer.status, answer.reason, self._said(answer)
        raise AssertionError("a second failure is raised")

    def _said(self, answer: http.client.HTTPResponse) -> str:
        """The beginning of its text; the verdict stands in its status, whatever becomes of the rest."""
        said = b""
        with suppress(OSError, http.client.HTTPException):
            said = answer.read(_TOLD_BYTES)
        if not answer.isclosed():  # it says more than anybody reads, perhaps without an end
            answer.close()
            self._connection.close()
        return said.decode("utf-8", "replace").strip()

    def probe(self) -> Sequence[Check]:
        """See Integration. Connects (and checks TLS), sends nothing."""
        try:
            with socket.create_connection(
                (self._host, self._port or (443 if self._tls else 80)), self._settings.timeout_seconds
            ) as plain:
                if self._context is not None:
                    with self._context.wrap_socket(plain, server_hostname=self._host):
                        pass
        except OSError as error:
            return [Check("webhook", "failed", f"{self._name}: {error}", "fix react.webhook.url", 69)]
        return [Check("webhook", "ok", self._name)]

    def close(self) -> None:
        """See Integration."""
        self._connection.close()


def _header(value: str) -> str:
    """A header's value as the HTTP binding wants it: printable ASCII, the rest percent-encoded."""
    return quote(value, safe="".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%'))
