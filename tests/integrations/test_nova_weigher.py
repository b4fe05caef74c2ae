"""When the weigher believes its file; how Nova uses it is tried with Nova's own code in test_openstack.py."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture
def weigher(tmp_path, monkeypatch):
    """Nova's base class does nothing that matters here."""
    weights = ModuleType("nova.scheduler.weights")
    weights.BaseHostWeigher = object
    scheduler = ModuleType("nova.scheduler")
    scheduler.weights = weights
    for module in (ModuleType("nova"), scheduler, weights):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "virtbus.integrations.nova_weigher", raising=False)
    monkeypatch.setenv("VIRTBUS_FLEET_FILE", str(tmp_path / "fleet.json"))
    module = importlib.import_module("virtbus.integrations.nova_weigher")
    yield module.HealthWeigher()
    sys.modules.pop("virtbus.integrations.nova_weigher", None)


@pytest.mark.parametrize(
    ("age", "weighs"), [(0, True), (240, True), (600, False), (-600, False), (-86_400 * 365, False)]
)
def test_a_file_of_another_time_weighs_nothing(weigher, tmp_path, age, weighs):
    """One that a clock ahead wrote would weigh for ever, whoever is dead since."""
    file = tmp_path / "fleet.json"
    file.write_text(json.dumps({"hosts": {"c1": {"blame": "host", "guests": 2}}}))
    moment = time.time() - age
    os.utime(file, (moment, moment))
    host = SimpleNamespace(host="c1", nodename="c1")
    assert (weigher._weigh_object(host, None) < 0) is weighs
