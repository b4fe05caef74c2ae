"""SIGKILL right after `ack` returned: python -m tests.faults.ack_durable [kills]

A consumer with a dedupe file has one effect, acknowledges it and is killed at once; the next one must not see
that event again. On RabbitMQ and the embedded bus.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import tempfile
from pathlib import Path

from tests.faults.amqp_kit import private_broker
from tests.faults.consumer_kit import make_group, one_and_die, publish, say
from virtbus.testing import records


def kills(url: str, folder: Path, number: int) -> tuple[int, int]:
    """How many different effects there were in `number` lives, and how many repeats."""
    make_group(url)
    publish(url, records(number, keys=20))
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["tests.faults.consumer_kit", "virtbus.bus.amqp.subscription"])
    for _ in range(number):
        process = spawn.Process(target=one_and_die, args=(url, str(folder)))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, process.exitcode
    effects = (folder / "effects").read_text().split()
    return len(set(effects)), len(effects) - len(set(effects))


def main() -> None:
    """Both buses, one after the other."""
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with private_broker() as broker, tempfile.TemporaryDirectory() as folder:
        urls = {"amqp": broker.url(broker.vhost()), "embedded": f"embedded://{folder}/bus.db"}
        found = {}
        for name, url in urls.items():
            (Path(folder) / name).mkdir()
            found[name] = kills(url, Path(folder) / name, number)
    repeats = sum(again for _, again in found.values())
    good = repeats == 0 and all(effects == number for effects, _ in found.values())
    say(
        "ack_durable",
        good,
        kills=number * len(found),
        effects=sum(one for one, _ in found.values()),
        repeats=repeats,
    )


if __name__ == "__main__":
    main()
