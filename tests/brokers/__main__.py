"""`make brokers`: the tests of buses and consumers on every supported release, with a table at the end.

    python -m tests.brokers [NAME…]        rabbitmq-bookworm, rabbitmq-trixie, rabbitmq-forky, kafka-VERSION

RabbitMQ comes from Debian's suites, each in a folder (tests/lab/chroot.py), Kafka from Maven. Ends with 1
when a test failed anywhere. What differs between releases is told in docs/events.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tests.brokers.rabbitmq import SUITE, BrokerError, RabbitMQ
from tests.kafka.cluster import VERSION

KAFKA_OLDEST, KAFKA_NEWEST = "3.5.2", "4.4.0"
AMQP_TESTS = ("tests/brokers", "tests/bus", "tests/consumer", "tests/contract")
KAFKA_TESTS = ("tests/kafka", "tests/consumer", "tests/contract")


@dataclass(frozen=True)
class Release:
    """A broker's release: the tests for it, and what makes them use it."""

    name: str
    marker: str
    tests: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def version(self) -> str:
        """As the broker itself tells it."""
        if VERSION in self.environment:
            return self.environment[VERSION]
        os.environ.update(self.environment)
        with tempfile.TemporaryDirectory(prefix="vbrun-", dir="/tmp", ignore_cleanup_errors=True) as folder:
            try:
                with closing(RabbitMQ.shared(Path(folder) / "rabbitmq")) as broker:
                    return broker.version()
            except BrokerError as error:  # the tests have told of it
                print(f"{self.name}: {error}", file=sys.stderr)
                return "?"
            finally:
                for name in self.environment:
                    del os.environ[name]


RELEASES = (
    Release("rabbitmq-bookworm", "rabbitmq", AMQP_TESTS, {SUITE: "bookworm"}),
    Release("rabbitmq-trixie", "rabbitmq", AMQP_TESTS, {SUITE: "trixie"}),
    Release("rabbitmq-forky", "rabbitmq", AMQP_TESTS, {SUITE: "forky"}),
    Release(f"kafka-{KAFKA_OLDEST}", "kafka", KAFKA_TESTS, {VERSION: KAFKA_OLDEST}),
    Release(f"kafka-{KAFKA_NEWEST}", "kafka", KAFKA_TESTS, {VERSION: KAFKA_NEWEST}),
)
ROW = "{:18} {:9} {:>6} {:>6} {:>7} {:>8}"


@dataclass
class Result:
    """One release's run."""

    release: Release
    version: str
    passed: int
    failed: list[str]
    skipped: int
    seconds: float

    def row(self) -> str:
        """A line of the table."""
        return ROW.format(
            self.release.name,
            self.version,
            self.passed,
            len(self.failed),
            self.skipped,
            f"{self.seconds:.0f}",
        )


def run(release: Release) -> Result:
    """All its tests; nothing may be skipped silently, so the table counts that too."""
    with tempfile.TemporaryDirectory(prefix="vbbrokers-") as folder:
        report = Path(folder) / "report.xml"
        words = ["-q", "-m", release.marker, f"--junit-xml={report}", *release.tests]
        code = subprocess.run(
            [sys.executable, "-m", "pytest", *words], env=os.environ | release.environment, check=False
        ).returncode
        if not report.exists():
            return Result(release, "?", 0, [f"pytest ended with {code}"], 0, 0.0)
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    seconds = sum(float(case.get("time") or 0) for case in cases)
    if code and not failed:
        failed = [f"pytest ended with {code}"]
    return Result(release, release.version(), len(cases) - len(failed) - skipped, failed, skipped, seconds)


def main(names: list[str]) -> int:
    """Run what was asked for, and print the table."""
    unknown = [name for name in names if not any(each.name.startswith(name) for each in RELEASES)]
    if unknown:
        known = ", ".join(each.name for each in RELEASES)
        print(f"no release is called {', '.join(unknown)}; known are {known}", file=sys.stderr)
        return 2
    chosen = [each for each in RELEASES if not names or any(each.name.startswith(name) for name in names)]
    results: list[Result] = []
    for each in chosen:
        results.append(run(each))
        print(results[-1].row(), flush=True)  # for a run that is ended before its table
    print(ROW.format("release", "version", "passed", "failed", "skipped", "seconds"))
    for result in results:
        print(result.row())
    for result in results:
        for name in result.failed:
            print(f"{result.release.name}: {name}", file=sys.stderr)
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
