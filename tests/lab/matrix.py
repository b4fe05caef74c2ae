"""`make matrix`: what each release of libvirt and QEMU says of the same error (not part of `make test`).

Each test runs once a Debian suite; a suite is installed into a folder at its first use.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import need
from tests.lab import chroot
from tests.lab.lab import PAUSED_IOERROR, Lab, missing

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(params=chroot.SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    need([*missing(inside=False), *chroot.missing()])
    return str(request.param)


@pytest.fixture
def suite_lab(suite: str) -> Iterator[Lab]:
    with Lab(root=chroot.suite_root(suite)) as lab:
        yield lab


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_a_pause_is_reported_once_with_the_suites_own_reason(suite: str, suite_lab: Lab, error: str) -> None:
    with suite_lab.listen() as listener:
        guest = suite_lab.guest(error=error).start()
        guest.fail()
        guest.wait_state(PAUSED_IOERROR)
        heard = listener.heard()
    old = suite in ("bullseye", "bookworm")
    reason = "enospc" if error == "ENOSPC" else "" if old else "message"
    assert guest.injected() == 1
    assert [each["reason"] for each in heard if each["event"] == "io_error_reason"] == [reason]


def test_a_disk_without_a_name_loses_its_error_event_on_old_libvirt_alone(suite: str, suite_lab: Lab) -> None:
    with suite_lab.listen() as listener:
        guest = suite_lab.guest(nbd_name="").start()
        guest.fail()
        guest.wait_state(PAUSED_IOERROR)
        heard = listener.heard()
    events = [each for each in heard if each["event"] == "io_error_reason"]
    assert len(events) == (0 if suite in ("bullseye", "bookworm") else 1)
    assert {"event": "lifecycle", "domain": "guest", "event_code": 3, "detail": 2} in heard
