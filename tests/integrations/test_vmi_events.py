"""What is written on a VirtualMachineInstance, from the XML that KubeVirt makes of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from kubernetes.client.exceptions import ApiException

from tests.integrations.vmis import OWNER, delivered, kubevirt_device, kubevirt_domain
from virtbus.integrations import vmi
from virtbus.integrations.base import ActionRefused, TargetUnavailable
from virtbus.model import Owner
from virtbus.testing import a_domain, a_gap, a_resolved, an_io_error
from virtbus.words import Action, Origin


def an_error(volume: str = "rootdisk", **more: Any) -> Any:
    return an_io_error(domain=kubevirt_domain(), device=kubevirt_device(volume), **more)


def test_an_error_of_a_vmi_becomes_an_event_with_volume_reason_and_count() -> None:
    action = vmi.wanted(delivered(an_error()), drills=False)
    assert action is not None
    assert action.target == "shop/web-1.blue"
    body = action.body
    assert (body["namespace"], body["name"], body["uid"]) == ("shop", "web-1.blue", OWNER.id)
    assert (body["type"], body["reason"], body["count"]) == ("Warning", "IOErrorPaused", 1)
    assert body["message"] == (
        "volume rootdisk (vdb): 1 I/O error (enospc), the guest is paused; seen on compute-1"
    )


def test_an_incident_is_one_event_whatever_becomes_of_it_and_a_newer_word_replaces_one_that_waits() -> None:
    error = vmi.wanted(delivered(an_error()), drills=False)
    over = vmi.wanted(
        delivered(a_resolved(domain=kubevirt_domain(), device=kubevirt_device("rootdisk"))), drills=False
    )
    assert error is not None
    assert over is not None
    assert error.body["event"] == over.body["event"]
    assert (error.topic, error.target) == (over.topic, over.target)
    assert (over.body["type"], over.body["reason"]) == ("Normal", "IOErrorResolved")
    assert over.body["message"] == (
        "volume rootdisk (vdb): 1 I/O error, over after 42 s (resumed); seen on compute-1"
    )


@pytest.mark.parametrize("did", list(Action))
def test_every_action_of_an_error_is_told_in_words(did: Action) -> None:
    event = an_error()
    event = replace(event, error=replace(event.error, action=did))
    action = vmi.wanted(delivered(event), drills=False)
    assert action is not None
    assert action.body["reason"].startswith("IOError")


@pytest.mark.parametrize(
    "event",
    [
        an_io_error(),
        an_io_error(domain=a_domain(owner=Owner("openstack", "i", "web-1", "p", "shop"))),
        an_io_error(domain=a_domain(owner=Owner("kubevirt", None, "web-1", "shop", "shop"))),
        an_io_error(domain=a_domain(owner=Owner("kubevirt", "u", "web-1", "../default", "../default"))),
        an_io_error(domain=a_domain(owner=Owner("kubevirt", "u", "Web 1", "shop", "shop"))),
        an_io_error(domain=a_domain(owner=Owner("kubevirt", "u", None, "shop", "shop"))),
        a_gap(),
    ],
    ids=["no owner", "nova", "no uid", "no namespace", "no name", "nameless", "gap"],
)
def test_what_is_about_no_vmi_is_written_nowhere(event: Any) -> None:
    assert vmi.wanted(delivered(event), drills=False) is None


def test_a_drill_is_written_only_where_drills_are_asked_for() -> None:
    drill = delivered(an_error(origin=Origin.REPLAY))
    assert vmi.wanted(drill, drills=False) is None
    assert vmi.wanted(drill, drills=True) is not None


class Api:
    """An API server that keeps Events, or says `refuses`."""

    def __init__(self, refuses: int | None = None) -> None:
        self.refuses = refuses
        self.kept: dict[str, dict[str, Any]] = {}

    def patch_namespaced_event(self, name: str, namespace: str, told: dict[str, Any], **_: Any) -> Any:
        if self.refuses:
            raise ApiException(status=self.refuses, reason="no")
        if name not in self.kept:
            raise ApiException(status=404, reason="Not Found")
        self.kept[name].update(told)
        return SimpleNamespace(data=b'{"kind": "Event"}')

    def create_namespaced_event(self, namespace: str, whole: dict[str, Any], **_: Any) -> Any:
        self.kept[whole["metadata"]["name"]] = dict(whole)
        return SimpleNamespace(data=b'{"kind": "Event"}')


def test_the_end_of_an_incident_that_has_no_event_writes_none() -> None:
    api = Api()
    over = vmi.wanted(delivered(a_resolved(domain=kubevirt_domain())), drills=False)
    assert over is not None
    assert "not there" in vmi.put(api, over.body, 1.0)
    assert api.kept == {}


@pytest.mark.parametrize(
    ("status", "error"),
    [(403, ActionRefused), (422, ActionRefused), (401, TargetUnavailable), (429, TargetUnavailable),
     (500, TargetUnavailable)],
)  # fmt: skip
def test_a_right_that_is_missing_is_named_and_a_server_in_trouble_is_tried_again(
    status: int, error: type[Exception]
) -> None:
    action = vmi.wanted(delivered(an_error()), drills=False)
    assert action is not None
    with pytest.raises(error, match=f"on VMI shop/web-1.blue: {status}"):
        vmi.put(Api(status), action.body, 1.0)
