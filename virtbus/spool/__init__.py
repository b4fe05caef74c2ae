"""The durable outbox between the agent's threads: what is committed is delivered, or named in a gap event.

`outbox` is the spool as others see it. `opening` begins a run on the file (`rescue` where it is damaged),
`committing` commits what `draft` has drawn up; `settling` takes and settles.
Both write to one file (`files`) and share one memory of it (`mirror`: `index` knows what may be taken next,
`missing` what was settled and what is to be named). `requests` are an operator's; at `faults` tests kill it.
"""

from __future__ import annotations

from virtbus.config import SpoolLimits
from virtbus.spool.files import prepare_state_dir
from virtbus.spool.opening import Opening
from virtbus.spool.outbox import Spool, SpoolStats

__all__ = ["Opening", "Spool", "SpoolLimits", "SpoolStats", "prepare_state_dir"]
