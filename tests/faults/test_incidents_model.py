"""Any sequence of errors, pauses, kills, failed commits and set clocks keeps the promises of incidents."""

from collections import Counter

from hypothesis import HealthCheck, settings

from tests.faults.incidents_machine import IncidentsMachine
from virtbus.words import Scope

opened = Counter()


class CountingMachine(IncidentsMachine):
    def teardown(self):
        super().teardown()
        opened.update(self.scopes)


class TestIncidentsInAnyOrder(CountingMachine.TestCase):
    settings = settings(
        max_examples=200,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )

    def runTest(self):
        opened.clear()
        super().runTest()
        # The histories went through every level of folding, and often.
        assert min(opened[scope] for scope in (Scope.DEVICE, Scope.DOMAIN, Scope.HOST)) > 50, opened
