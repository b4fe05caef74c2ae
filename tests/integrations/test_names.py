"""Which of the control plane's targets a host is: never another domain's."""

import click.testing
import pytest

from tests.integrations.plane import Plane
from virtbus.commands import react
from virtbus.integrations.base import HOLD, Action, target_of


@pytest.mark.parametrize(
    ("host", "names", "expected"),
    [
        ("c1", {"c1": ()}, "c1"),
        ("c1.a.org", {"c1": ()}, "c1"),
        ("c1", {"c1.a.org": ()}, "c1.a.org"),
        ("c1.a.org", {"c1.a.org": {"c1"}, "c1.b.org": {"c1"}}, "c1.a.org"),
        ("c1", {"c1.a.org": {"c1"}, "c1.b.org": {"c1"}}, None),
        ("c1.b.org", {"c1.a.org": {"c1"}}, None),
        ("c1.b.org", {"c1.a.org": {"c1"}, "c1": ()}, "c1"),
        ("c1.a.org", {"ip-10-0-0-1.internal": {"c1"}}, "ip-10-0-0-1.internal"),
    ],
)
def test_a_host_is_found_by_its_names_and_never_as_another_domains(host, names, expected):
    assert target_of(host, names) == expected


@pytest.mark.parametrize(
    ("said", "held", "released"),
    [
        ("c1", ("c1.a.org",), {"c1.a.org"}),
        ("c1.a.org", ("c1",), {"c1"}),
        ("c1", ("c1", "c1.a.org"), {"c1"}),
        ("c1.b.org", ("c1.a.org",), set()),
        ("c1", ("c1.a.org", "c1.b.org"), None),
        ("c", ("c1",), set()),
    ],
)
def test_a_host_is_given_back_by_hand_under_any_of_its_names(monkeypatch, tmp_path, said, held, released):
    """ "Not held" about a host that is held would be believed."""
    plane = Plane(*held)
    for name in held:
        plane.execute(Action(name, name, HOLD, "host: why", {"since": 1.0, "times": 1, "by": "test"}))
    monkeypatch.setattr(react, "open_integration", lambda name, settings: plane)
    words = ["release", said, "--with", "plane", "--state-dir", str(tmp_path)]
    done = click.testing.CliRunner().invoke(react.command, words)
    if released is None:
        assert "may be c1.a.org, c1.b.org" in str(done.exception)
        assert plane.held == set(held)
    else:
        assert done.exit_code == 0, done.output
        assert plane.held == set(held) - released
        assert ("is not held" in done.output) is (released == set())
