"""Nobody speaks for another host: the broker's proof of the publisher decides."""

from __future__ import annotations

import pytest

from virtbus.fleet import Publishers
from virtbus.integrations.store import ActionStore

MINE, HIS = "/virtbus/agents/mine", "/virtbus/agents/his"
BOUND = ("virtbus-{host}",)


def test_without_patterns_everybody_is_believed():
    assert Publishers().refuses(None, MINE, "c1") is None


def test_with_patterns_a_publisher_must_be_proven():
    assert "does not prove" in (Publishers(("*",)).refuses(None, MINE, "c1") or "")


def test_a_user_of_one_host_speaks_for_no_other_host():
    publishers = Publishers(BOUND)
    assert publishers.refuses("virtbus-c1", MINE, "c1") is None
    assert "may not speak for host c2" in (publishers.refuses("virtbus-c1", HIS, "c2") or "")


def test_an_agent_belongs_to_the_first_user_who_spoke_for_it():
    publishers = Publishers(BOUND)
    assert publishers.refuses("virtbus-c1", MINE, "c1") is None
    assert "may not speak for" in (publishers.refuses("virtbus-evil", MINE, "evil") or "")
    assert publishers.refuses("virtbus-c1", MINE, "c1") is None


def test_an_event_without_a_host_is_bound_to_its_agent_all_the_same():
    publishers = Publishers(BOUND)
    assert publishers.refuses("virtbus-c1", MINE, "c1") is None
    assert publishers.refuses("virtbus-c1", MINE, None) is None
    assert publishers.refuses("virtbus-evil", MINE, None) is not None


def test_what_was_known_before_a_restart_still_holds():
    owners = {MINE: "virtbus-c1"}
    assert Publishers(BOUND, owners).refuses("virtbus-evil", MINE, "evil") is not None
    assert Publishers(BOUND, owners).refuses("virtbus-c1", MINE, "c1") is None


def test_a_fleet_that_is_given_a_user_for_each_host_is_believed_after_it(tmp_path):
    """What the user claimed that all of them had before is void: nobody believes that user any more."""
    store = ActionStore(tmp_path / "store.db")
    shared = Publishers(("virtbus",), store.owners)
    assert shared.refuses("virtbus", MINE, "c1") is None
    store.close()
    store = ActionStore(tmp_path / "store.db")
    bound = Publishers(BOUND, store.owners)
    assert bound.refuses("virtbus-c1", MINE, "c1") is None
    assert bound.refuses("virtbus-evil", MINE, "evil") is not None
    store.close()
    store = ActionStore(tmp_path / "store.db")
    assert Publishers(BOUND, store.owners).refuses("virtbus-evil", MINE, "evil") is not None
    store.close()


def test_a_refused_event_claims_no_agent():
    publishers = Publishers(BOUND)
    assert publishers.refuses("virtbus-evil", MINE, "c1") is not None
    assert publishers.refuses("virtbus-c1", MINE, "c1") is None


def test_a_user_of_one_host_can_claim_only_so_many_agents():
    publishers = Publishers(BOUND)
    claimed = [publishers.refuses("virtbus-evil", f"/virtbus/agents/{n}", "evil") for n in range(100)]
    assert sum(one is None for one in claimed) == 32
    assert publishers.refuses("virtbus-c1", MINE, "c1") is None


def test_a_user_that_all_agents_share_speaks_for_all_of_them():
    publishers = Publishers(("virtbus",))
    claimed = [publishers.refuses("virtbus", f"/virtbus/agents/{n}", f"c{n}") for n in range(1000)]
    assert claimed == [None] * 1000


@pytest.mark.parametrize("name", ["*", "c?", "[abc]", "c1*"])
def test_the_name_of_a_host_is_not_a_pattern(name):
    assert Publishers(BOUND).refuses("virtbus-c1", MINE, name) is not None
