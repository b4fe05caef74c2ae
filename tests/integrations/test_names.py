"""Which of the control plane's targets a host is: never another domain's."""

import pytest

from virtbus.integrations.base import target_of


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
