"""The scheduler of docs/examples is killed at random: python -m tests.faults.scheduler_kills [kills]"""

from __future__ import annotations

import os
import subprocess
import sys


def main() -> None:
    """The test of the normal run with more kills; it prints a line a bus."""
    kills = sys.argv[1] if len(sys.argv) > 1 else "200"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "--timeout", "3600", "tests/consumer/test_example.py"],
        env={**os.environ, "VIRTBUS_TEST_SCHEDULER_KILLS": kills},
        check=False,
    )
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
