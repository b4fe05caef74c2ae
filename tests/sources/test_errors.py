"""libvirt's errors become ours by what the caller does next."""

from __future__ import annotations

from unittest.mock import Mock

import libvirt
import pytest

from virtbus.errors import SourceDenied, SourceUnavailable
from virtbus.sources.libvirt import _translated


def an_error(text: str, code: int = libvirt.VIR_ERR_RPC) -> Mock:
    error = Mock(spec=libvirt.libvirtError)
    error.get_error_code.return_value = code
    error.get_error_message.return_value = text
    error.get_int1.return_value = 0
    return error


@pytest.mark.parametrize("kind", ["user", "group"])
def test_a_uid_that_the_host_does_not_know_is_a_matter_of_rights_with_its_remedy(kind: str):
    found = _translated(an_error(f"Failed to find {kind} record for uid '65532': Success"), "qemu:///system")
    assert isinstance(found, SourceDenied)
    assert "account on the host" in str(found)


def test_a_daemon_that_is_away_may_come_back():
    assert isinstance(_translated(an_error("Failed to connect socket"), "qemu:///system"), SourceUnavailable)
