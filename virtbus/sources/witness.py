"""Proves what a connection has told, and notices when this process stood still: see virtbus.seen."""

from __future__ import annotations

import threading
from functools import partial
from threading import Event as StopEvent

from virtbus.errors import SourceUnavailable
from virtbus.model import Now
from virtbus.seen import STANDSTILL_SECONDS, stalled_words
from virtbus.sources.link import Link
from virtbus.sources.session import Closed, Session, Shared
from virtbus.telemetry import Trouble, emit
from virtbus.words import GapReason

# Between two questions: a gap begins at most so long, and a margin, before its cause. A question wakes
# libvirt's loop some nine times, so where nothing is heard it is asked less often, and this thread sleeps.
PROVE_SECONDS, QUIET_SECONDS = 2.0, 10.0


class Witness:
    """Asks one session's connection again and again, on a thread of its own: a daemon may never answer.

    A question is not asked, and so proves nothing, between a standstill of this process and the moment in
    which the source thread notices it.
    """

    def __init__(self, session: Session, shared: Shared, link: Link) -> None:
        self._session, self._shared, self._link = session, shared, link
        self._over = StopEvent()
        self._thread = threading.Thread(target=self._run, name="virtbus-witness", daemon=True)

    def __enter__(self) -> Witness:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._session.heard.set()

    def stalled(self, waited: float) -> Closed | None:
        """Called by the source thread after each wait of at most `waited` seconds: did it take far longer?"""
        now, before = self._shared.clock(), self._session.tick
        stood = _stood(before, now, waited)
        if stood < STANDSTILL_SECONDS:
            self._session.tick = now
            return None
        since = self._session.seen or before
        return Closed(
            stalled_words(stood), now.boot - min(since.boot, before.boot), GapReason.AGENT_STANDSTILL
        )

    def _run(self) -> None:
        heard = self._session.heard
        while True:
            heard.wait(QUIET_SECONDS)
            if self._over.wait(PROVE_SECONDS if heard.is_set() else 0.0):
                return
            asked = self._shared.clock()
            if _stood(self._session.tick, asked, PROVE_SECONDS) >= STANDSTILL_SECONDS:
                continue  # the source thread is about to notice
            heard.clear()
            try:
                self._link.heard(partial(self._session.saw, asked))
            except SourceUnavailable:
                # The connection's end is told by its own callback, silence by readiness. Until then: again.
                heard.set()
            except Exception as error:  # noqa: BLE001 - nobody else would ask
                heard.set()
                emit(Trouble("question to the connection of the events", error))


def _stood(before: Now, now: Now, waited: float) -> float:
    return now.boot - before.boot - waited
