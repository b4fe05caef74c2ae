"""The exception hierarchy: each class says what the caller does next.

`retryable` says whether trying again can help; `exit_code` is what the command line ends with
(sysexits.h). Third-party exceptions are translated into these once, at the adapter's edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from virtbus import redaction


class VirtbusError(Exception):
    """Base of all errors that virtbus raises on purpose; its text is one line a person can act on.

    It holds no secret, whatever it was made of: libvirt's, a broker's or a server's words, a URL, a path.
    """

    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 70

    def __init__(self, text: object = "") -> None:
        super().__init__(redaction.text(text))


class ConfigError(VirtbusError):
    """The configuration or an argument can't be used: fix it (EX_CONFIG). One problem per line."""

    exit_code = 78


class SchemaError(VirtbusError):
    """Data does not fit its schema, or a schema is unknown (EX_DATAERR)."""

    exit_code = 65


class RecordRefused(VirtbusError):
    """The broker will never take this one record (too large, malformed for it): dead-letter it."""

    exit_code = 65


class AgentBroken(VirtbusError):
    """A thread of the agent ended by an error that nobody expected: a supervisor starts it again."""


class RestartNeeded(VirtbusError):
    """The agent can't go on as it was started: a supervisor starts it again (EX_TEMPFAIL)."""

    retryable = True
    exit_code = 75


class InputMissing(VirtbusError):
    """A file or folder that was named can't be read (EX_NOINPUT)."""

    exit_code = 66


class ConsumerClosed(VirtbusError):
    """A consumer, or a delivery of one, was used after `close`: a mistake of the caller's."""


class _Unavailable(VirtbusError):
    """It can't be reached or does not answer now; it may come back (EX_UNAVAILABLE)."""

    retryable = True
    exit_code = 69


class SourceUnavailable(_Unavailable):
    """The hypervisor can't be reached now."""


class AgentUnavailable(_Unavailable):
    """No agent answers at its control socket now."""


class BusUnavailable(_Unavailable):
    """The broker can't be reached or does not answer now."""


class _Denied(VirtbusError):
    """It refuses us: an operator has to act (EX_NOPERM)."""

    exit_code = 77


class SourceDenied(_Denied):
    """The hypervisor refuses us."""


class AgentDenied(_Denied):
    """The agent's control socket is not for this user."""


class BusDenied(_Denied):
    """The broker refuses our identity, certificate or permissions."""


class GroupTakenOver(BusDenied):
    """A newer exclusive member of the group took over: this one is out, and waiting does not help."""


class _Disk(VirtbusError):
    """A file can't be read or written (EX_IOERR)."""

    exit_code = 74


class SpoolFull(_Disk):
    """The spool can't be written now (its disk is full, read-only or broken): keep observing, try again.

    Not the gap reason `spool_full`, which is eviction at `spool.max_bytes`.
    """

    retryable = True


class DedupeUnavailable(_Disk):
    """A consumer's dedupe file is locked, or its disk full: nothing is lost, call again."""

    retryable = True


class StateUnavailable(_Disk):
    """What a reactor keeps can't be read or written: it ends, and a supervisor starts it again."""


class SpoolCorrupt(_Disk):
    """The spool's file is damaged or from an unknown future release."""


class SpoolBusy(_Disk):
    """Another process holds the spool; the message names it."""


Translations = Mapping[type[BaseException], Callable[[Any], VirtbusError]]
"""What a third party's exceptions mean: the first class that fits decides, so narrower ones come first."""


@contextmanager
def translating(table: Translations) -> Iterator[None]:
    """Raise what the block raises as one of ours, as `table` says; what it does not name passes as it is."""
    try:
        yield
    except tuple(table) as error:
        raise translated(error, table) from error


def translated(error: BaseException, table: Translations) -> VirtbusError:
    """`error` as one of ours: for those who keep it instead of raising it."""
    return next(make for kind, make in table.items() if isinstance(error, kind))(error)
