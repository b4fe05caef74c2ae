"""Proves what a connection has told, and notices when this process stood still: see virtbus.seen."""

from __future__ import annotations

from functools import partial

from virtbus.errors import SourceUnavailable
from virtbus.model import Now
from virtbus.seen import STANDSTILL_SECONDS, stalled_words
from virtbus.sources.crew import Crew
from virtbus.sources.link import Link
from virtbus.sources.session import Closed, Session
from virtbus.telemetry import Trouble, emit
from virtbus.words import GapReason

# Between two questions: a gap begins at most so long, and a margin, before its cause. A question wakes
# libvirt's loop some nine times, so where nothing is heard it is asked less often.
PROVE_SECONDS, QUIET_SECONDS = 2.0, 10.0


class Pulse:
    """When the source thread last came by. Its owner calls `beat` after each wait, before anything else."""

    def __init__(self, now: Now) -> None:
        self.last = now
        self._before = now

    def beat(self, now: Now, waited: float) -> float | None:
        """After a wait of at most `waited` seconds → for how long the process stood still, if it did."""
        self._before, self.last = self.last, now
        stood = self.last.boot - self._before.boot - waited
        return stood if stood >= STANDSTILL_SECONDS else None

    def closed(self, session: Session, stood: float) -> Closed:
        """What a standstill means for a connection: blind since it last answered."""
        since = self._before.boot if session.seen is None else min(session.seen.boot, self._before.boot)
        return Closed(stalled_words(stood), self.last.boot - since, GapReason.AGENT_STANDSTILL)


class Witness:
    """Asks one session's connection again and again, on the crew's threads: a daemon may never answer.

    The source thread reads the time of a question after it has noticed a standstill: what is asked of a
    connection that was deaf meanwhile proves nothing.
    """

    def __init__(self, session: Session, link: Link, crew: Crew, now: Now, quiet: float | None) -> None:
        """`quiet`: seconds between two questions where nothing happens (None: QUIET_SECONDS)."""
        self._session, self._link, self._crew, self._quiet = session, link, crew, quiet
        self._asked = now
        self._asking = False

    def step(self, now: Now) -> float:
        """Ask if it is time to → when to be called again (monotonic)."""
        quiet = QUIET_SECONDS if self._quiet is None else self._quiet
        space = PROVE_SECONDS if self._session.heard else max(quiet, PROVE_SECONDS)
        left = space - (now.boot - self._asked.boot)
        if left > 0:
            return now.monotonic + left
        if not self._asking:
            self._session.heard, self._asked, self._asking = False, now, True
            self._crew.run(partial(self._ask, now))
        return now.monotonic + PROVE_SECONDS

    def _ask(self, asked: Now) -> None:
        try:
            self._link.heard(partial(self._session.saw, asked))
        except SourceUnavailable:
            again = True  # the connection's end is told by its own callback, silence by readiness
        except Exception as error:  # noqa: BLE001 - nobody else would ask
            again = True
            emit(Trouble("question to the connection of the events", error))
        else:
            again = False
        self._asking = False
        if again:
            self._session.hear()
