"""What encoding and validating one event costs: `python -m tests.bench.bench_envelope`. Not a timed test.

The aim is 100 µs for encode (which validates), on one core.
"""

from __future__ import annotations

import io
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path

from tests import golden
from virtbus import envelope
from virtbus.commands.schema import validate
from virtbus.model import Binding, Message

ROUNDS, CALLS, LINES = 15, 400, 10_000


def microseconds(call: Callable[[], object]) -> str:
    """Best and median of some rounds, in µs of this process's CPU time a call: other load hardly shows."""
    rounds = timeit.repeat(call, number=CALLS, repeat=ROUNDS, timer=time.process_time)
    each = [seconds / CALLS * 1e6 for seconds in rounds]
    return f"{min(each):7.1f} µs  (median {statistics.median(each):.1f})"


def main() -> None:
    """Print a line a figure."""
    stamp = golden.stamp(1)
    say = sys.stdout.write
    events = {"io_error, full": golden.FULL, "gap": golden.SPOOL_FULL, "heartbeat": golden.HEARTBEAT}
    for name, event in events.items():
        encoded = envelope.encode(event, stamp)
        wire = envelope.to_amqp(*encoded)
        message = Message(
            Binding.AMQP, wire.headers, wire.content_type, wire.body, None, False, None, "bench"
        )
        decoded = envelope.decode(message)
        say(f"{name} ({len(encoded.body)} bytes of data)\n")
        say(f"  encode + validate    {microseconds(lambda e=event: envelope.encode(e, stamp))}\n")
        say(f"  to_amqp              {microseconds(lambda e=encoded: envelope.to_amqp(*e))}\n")
        say(f"  to_kafka             {microseconds(lambda e=encoded: envelope.to_kafka(*e))}\n")
        say(f"  structured           {microseconds(lambda e=encoded: envelope.structured_json(*e))}\n")
        say(f"  decode               {microseconds(lambda m=message: envelope.decode(m))}\n")
        say(f"  to_event + validate  {microseconds(lambda d=decoded: envelope.to_event(d))}\n")
    line = envelope.structured_json(*envelope.encode(golden.FULL, stamp)) + b"\n"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "events.jsonl"
        file.write_bytes(line * LINES)
        validate([str(file)], io.StringIO())
        start = time.process_time()
        validate([str(file)], io.StringIO())
        say(f"virtbus validate: {LINES / (time.process_time() - start):,.0f} lines a second of CPU time\n")


if __name__ == "__main__":
    main()
