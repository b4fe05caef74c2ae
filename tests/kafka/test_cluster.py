"""The Kafka that the tests start never outlives them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.kafka.cluster import Cluster
from tests.waiting import wait_until


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_a_broker_ends_with_the_process_that_started_it_even_by_sigkill(
    kafka_cluster: Cluster, tmp_path: Path
) -> None:
    assert kafka_cluster.brokers  # a real Kafka can run here; this one is left alone
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.kafka.cluster import Cluster\n"
        "cluster = Cluster(Path(sys.argv[1])).start()\n"
        "print(cluster.brokers[0].pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "c")], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    with owner.stdout:
        broker = int(owner.stdout.readline())
    assert alive(broker)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    wait_until(lambda: not alive(broker), "the broker is gone")
