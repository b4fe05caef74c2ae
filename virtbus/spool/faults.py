"""Named points of the spool where tests kill or fail it; in production each is a call that does nothing.

`before_rescue`, `during_open`, `before_commit`, `after_commit`, `during_settle`, `after_settle`,
`during_compaction`. A harness sets `hook` in the process that it is going to kill.
"""

from __future__ import annotations

from collections.abc import Callable


def _nothing(point: str) -> None:
    """What happens at every point when nobody tests."""


hook: Callable[[str], None] = _nothing


def reach(point: str) -> None:
    """Call the hook: the point is reached."""
    hook(point)
