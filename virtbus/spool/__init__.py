"""The durable outbox between the agent's threads: what is committed is delivered, or named in a gap event.

`outbox` is the spool as others see it. `opening` begins a run, `committing` commits what `draft` has drawn
up, `settling` takes and settles; they share `state`. `files` knows the SQLite file, `contents` reads it and
rescues what is damaged, `ledger` counts which sequences are settled, `index` knows what may be taken next,
`wishes` are an operator's, `faults` is where tests kill it.
"""

from __future__ import annotations

from virtbus.spool.contents import Loss
from virtbus.spool.files import prepare_state_dir
from virtbus.spool.mirror import SpoolLimits
from virtbus.spool.opening import Opening
from virtbus.spool.outbox import Spool, SpoolStats

__all__ = ["Loss", "Opening", "Spool", "SpoolLimits", "SpoolStats", "prepare_state_dir"]
