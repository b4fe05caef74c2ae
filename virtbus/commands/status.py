"""`virtbus status` and `virtbus tap`: ask the running agent over its control socket."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from virtbus.config import Config
from virtbus.control import ask
from virtbus.errors import ConfigError, SourceUnavailable
from virtbus.telemetry import printable


def answers(
    path: str, request: Mapping[str, object], *, timeout: float, blanks: bool = False
) -> Iterator[dict[str, Any]]:
    """What the agent answers, a JSON object a line; `blanks` gives a tap's signs of life as empty ones.

    Raises ConfigError when no agent answers, SourceUnavailable when it does not go on.
    """
    if not path:
        raise ConfigError("control.socket is empty: this agent has no control socket")
    with ask(Path(path), request) as peer:
        peer.settimeout(timeout)
        try:
            for line in peer.makefile("rb"):
                if blanks and not line.strip():
                    yield {}
                elif line.strip():
                    answer = json.loads(line)
                    if "error" in answer:
                        raise ConfigError(f"{path}: {answer['error']}")
                    yield answer
        except OSError as error:
            raise SourceUnavailable(f"{path}: the agent does not answer: {error}") from error


def status(config: Config, *, as_json: bool, watching: bool, out: TextIO) -> None:
    """Print the agent's status, once or every second."""
    while True:
        for answer in answers(config.control.socket, {"command": "status"}, timeout=5.0):
            if as_json:
                out.write(json.dumps(answer, sort_keys=True) + "\n")
            else:
                out.write(_table(answer))
        out.flush()
        if not watching:
            return
        time.sleep(1.0)


def _table(answer: Mapping[str, Any]) -> str:
    spool, source, bus = answer["spool"], answer["source"], answer["bus"]
    oldest = spool["oldest_seconds"]
    rows = [
        ("agent", f"{answer['agent_id']}  virtbus {answer['version']}"),
        ("host", answer["host"] or "not known yet"),
        ("started", answer["started_at"]),
        ("libvirt", f"{source['state']} since {source['since']}"),
        ("broker", f"{bus['url']}  {bus['error'] or 'no error'}"),
        ("waiting", f"{spool['pending']} events, {spool['bytes']} bytes"
                    + (f", oldest {oldest:.0f} s" if oldest is not None else "")),
        ("parked", f"{spool['parked_keys']} keys that nobody is bound for"),
        ("set aside", f"{spool['dead']} events"),
        ("sequence", f"{spool['committed_sequence']} committed, {spool['confirmed_sequence']} confirmed"),
        ("incidents", f"{answer['incidents']['open']} open"),
        ("ready", "yes" if not answer["not_ready"] else "NO: " + "; ".join(answer["not_ready"])),
    ]  # fmt: skip
    wrap = textwrap.TextWrapper(
        80, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False
    )
    return "".join(wrap.fill(f"{name:<10} {printable(text)}") + "\n" for name, text in rows)


def tap(config: Config, *, stage: str | None, domain: str | None, out: TextIO) -> None:
    """Print what passes until interrupted."""
    for answer in answers(
        config.control.socket, {"command": "tap", "stage": stage, "domain": domain}, timeout=30
    ):
        out.write(json.dumps(answer, sort_keys=True) + "\n")
        out.flush()
