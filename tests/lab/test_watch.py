"""`virtbus watch` on a real guest: what it prints is what happened, and can be replayed."""

from __future__ import annotations

import io
import json
import threading

import pytest

from tests.lab.lab import PAUSED_IOERROR, Lab, wait_until
from tests.sources.simulated import Seen
from virtbus.commands import watch
from virtbus.errors import SourceUnavailable
from virtbus.observations import Burst
from virtbus.sources.replay import FULL_SPEED, ReplaySource


def watched(lab: Lab, *, as_json: bool) -> list[str]:
    """The lines printed while a guest's disk fails."""
    guest = lab.guest("db1\u202e").start()
    out = io.StringIO()
    thread = threading.Thread(
        target=watch.run, args=(lab.uri_ro,), kwargs={"as_json": as_json, "out": out, "timeout": 4.0}
    )
    thread.start()
    wait_until(lambda: guest.uuid in out.getvalue(), "the guest is listed", 5)
    guest.fail()
    guest.wait_state(PAUSED_IOERROR)
    thread.join(10)
    return out.getvalue().splitlines()


def test_the_json_of_a_failing_guest_can_be_replayed(lab: Lab) -> None:
    lines = watched(lab, as_json=True)
    kinds = [(json.loads(line)["kind"], json.loads(line).get("cb")) for line in lines]
    assert kinds == [
        ("host", None),
        ("domain", None),
        ("callback", "IO_ERROR_REASON"),
        ("callback", "LIFECYCLE"),
    ]
    source, seen, stop = ReplaySource(lines, speed=FULL_SPEED), Seen(), threading.Event()
    thread = threading.Thread(target=source.run, args=(seen, stop))
    thread.start()
    (burst,) = seen.wait(Burst)
    stop.set()
    thread.join(5)
    assert isinstance(burst, Burst)
    known = source.describe(burst.raw.domain_uuid)
    assert known is not None
    assert known.devices[burst.raw.alias].target == "vda"


def test_the_text_of_a_failing_guest_is_plain_whatever_its_name_is(lab: Lab) -> None:
    _host, _guest, error, pause = watched(lab, as_json=False)
    assert "db1\\u202e I/O ERROR device=virtio-disk0 action=pause(1)" in error
    assert pause.endswith("suspended (I/O error)")


def test_a_daemon_that_goes_away_ends_the_watch_with_an_error(lab: Lab) -> None:
    killer = threading.Timer(0.5, lab.kill_libvirtd)
    killer.start()
    # The callback says so, or the question that was under way.
    with pytest.raises(SourceUnavailable, match=r"closed the connection|End of file"):
        watch.run(lab.uri_ro, as_json=False, out=io.StringIO(), timeout=20.0)
    killer.join()
