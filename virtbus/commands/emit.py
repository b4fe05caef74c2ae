"""`virtbus emit`: an alert drill through the running agent, its spool and its broker."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TextIO

from virtbus.commands.status import answers
from virtbus.config import Config
from virtbus.control import Drill
from virtbus.errors import AgentUnavailable, BusUnavailable


def run(config: Config, request: Mapping[str, object], *, timeout: float, out: TextIO) -> None:
    """Make the drill's event and follow it until the broker has confirmed it.

    Raises AgentUnavailable when no agent answers or it commits nothing, AgentDenied, BusUnavailable when
    the broker did not confirm within `timeout` seconds (the spool keeps the event).
    """
    drill = Drill.parse(request)
    path = config.control.socket
    deadline = time.monotonic() + timeout
    event_id = None
    asked = False
    for line in answers(path, {"command": "tap", "domain": drill.domain_uuid}, timeout=5.0, blanks=True):
        if not asked:  # the tap is open: nothing of what follows is missed
            asked = True
            for _ in answers(path, {"command": "drill", **request}, timeout=5.0):
                pass
            out.write(f"drill      {drill.domain_name} ({drill.domain_uuid}), origin replay\n")
        if line.get("stage") == "incident" and event_id is None:
            event_id = line["stamp"]["id"]
            out.write(f"committed  {event_id}\n")
        elif line.get("stage") == "published" and line["item"]["id"] == event_id:
            out.write(f"confirmed  {event_id}\n")
            return
        out.flush()
        if time.monotonic() > deadline:
            break
    if event_id is None:
        why = (
            f"no drill of {drill.domain_name} is open"
            if drill.resolve
            else "an open drill folds repeats into windows (end it with `virtbus emit --resolve`)"
        )
        raise AgentUnavailable(
            f"no event was committed within {timeout:g} s: {why}, or the spool can't be written; "
            "see `virtbus status`"
        )
    raise BusUnavailable(
        f"event {event_id} is in the spool, the broker has not confirmed it after {timeout:g} s; "
        "see `virtbus status` and `virtbus doctor`"
    )
