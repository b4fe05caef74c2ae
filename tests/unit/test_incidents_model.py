"""Any sequence of errors, pauses, kills, failed commits and set clocks keeps the promises of incidents."""

from hypothesis import HealthCheck, settings

from tests.unit.incidents_machine import IncidentsMachine

TestIncidentsInAnyOrder = IncidentsMachine.TestCase
TestIncidentsInAnyOrder.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
