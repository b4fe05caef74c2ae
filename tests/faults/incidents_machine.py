"""A hypothesis machine that does to incidents whatever can be done, and keeps its own books.

The books are kept by other means than the state machine's: a ledger of the callbacks that were committed, the
log of the committed events as a consumer would read it, and a few words about which guests stand still.
"""

import itertools
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.model import Device, Domain, Evidence, Host, IoError, IoErrorResolved, Now
from virtbus.observations import (
    Burst,
    Description,
    DeviceRemoved,
    DomainGone,
    DomainResumed,
    DomainState,
    RawIoError,
    SourceLost,
    SourceReady,
)
from virtbus.words import Origin, Phase, Scope

SECOND = 1_000_000_000
PAUSE = 1
GUESTS = ("guest-a", "guest-b", "guest-c")
ALIASES = ("disk0", "disk1", "")
FREE_MESSAGES = 10
A_SECOND = 0.999  # times go through whole nanoseconds

guests = st.sampled_from(GUESTS)
aliases = st.sampled_from(ALIASES)
actions = st.sampled_from((PAUSE, 2, 0, 9))
reasons = st.sampled_from(("", "enospc"))
counts = st.integers(1, 5)
live_origins = st.sampled_from((Origin.EVENT, Origin.EVENT, Origin.EVENT, Origin.LIFECYCLE))


def pending_in(states):
    """Counts by origin that the states hold and no event has told."""
    counter = Counter()
    for key, state in states.items():
        if key.startswith(("incident/", "drill/")):
            for pending in msgspec.json.decode(state).get("pending", ()):
                counter[Origin(pending["origin"])] += pending["count"]
    return counter


def subject(event):
    """What an incident speaks for; a drill's is another one than the live one of the same device."""
    return event.domain.uuid, event.device.alias, event.incident.scope


class Log:
    """Events in order of commit, read as a consumer reads them; every rule of the stream is checked here."""

    def __init__(self):
        self.counts = Counter()
        self.open = {}  # incident id → (subject, drill)
        self.ended = set()
        self.totals = Counter()

    def read(self, event):
        incident = event.incident
        if isinstance(event, IoError):
            self.counts[event.origin] += event.occurrences.count
            self.totals[incident.id] += event.occurrences.count
            assert event.occurrences.count >= (1 if incident.phase is Phase.OPENED else 0)
            assert event.occurrences.first <= event.occurrences.last == event.error.occurred_at
        what = subject(event)
        if incident.phase is Phase.OPENED:
            drill = event.origin is Origin.REPLAY
            assert incident.id not in self.open
            assert incident.id not in self.ended, "an incident opens once"
            assert (what, drill) not in self.open.values(), "incidents of one device never overlap"
            self.open[incident.id] = (what, drill)
        else:
            (uuid, alias, scope), drill = self.open[incident.id]
            if alias is None and scope is Scope.DEVICE and (what, drill) not in self.open.values():
                alias = event.device.alias  # a look named it
                self.open[incident.id] = (what, drill)
            assert (uuid, alias, scope) == what, "it goes on only while it is open, for the same device"
        assert event.occurrences.total == self.totals[incident.id]
        if incident.phase is Phase.RESOLVED:
            assert isinstance(event, IoErrorResolved)
            assert event.resolution.duration_seconds >= 0
            del self.open[incident.id]
            self.ended.add(incident.id)


@dataclass(frozen=True)
class Message:
    """One message of an incident: when it went out, by which observation or tick, and what it said."""

    at: float
    step: int
    origin: Origin
    flapping: bool


class IncidentsMachine(RuleBasedStateMachine):
    """Errors, pauses, resumes, removals, kills, failed commits and set clocks, in any order."""

    @initialize(
        fold=st.booleans(),
        max_open=st.sampled_from((1, 3, 5, 8, 1000)),
        quiet=st.sampled_from((5.0, 300.0)),
    )
    def start(self, fold, max_open, quiet):
        self.limits = IncidentLimits(fold=fold, max_open=max_open, quiet_seconds=quiet)
        self.ids = map(str, itertools.count(1))
        self.wall_ns, self.monotonic = 1_795_353_029 * SECOND, 100.0
        self.incidents = Incidents(self.limits, new_id=lambda: next(self.ids), host=Host("h"))
        self.store, self.log, self.ledger = {}, Log(), Counter()
        # What no commit has taken yet: of the batch under way, and of commits that failed.
        self.events, self.states, self.applied = [], {}, Counter()
        self.paused = {False: set(), True: set()}  # guests that an error has stopped: live, drill
        self.blind = False
        self.sighted = set()  # guests that were seen running since the source was lost
        self.kills = 0
        self.scopes = Counter()  # of the incidents that were opened
        self.step = 0  # counts observations and ticks
        self.jumped = 0  # the step of the last time that the wall clock was set forward
        self.sent = defaultdict(list)  # incident id → its messages
        self.shown = {}  # incident id → action, reason and whether it flaps
        self.news = {}  # incident id → the last step in which that changed
        self.owed = {}  # incident id → since when no message has told such a change
        self.committed_sent, self.committed_shown, self.committed_news = {}, {}, {}
        self.committed_owed = set()
        self.committed_paused = {False: set(), True: set()}

    # ------------------------------------------------------------------------------- how to do things

    @property
    def now(self):
        return Now(self.wall_ns, self.monotonic)

    def describe(self, uuid):
        if uuid == "guest-c":
            return None
        return Description(Domain(uuid, uuid), {"disk0": Device("disk0", "vda"), "disk1": Device("disk1")})

    def take(self, events):
        self.step += 1
        self.events += events
        self.note_news()
        ending = {event.incident.id for event in events if isinstance(event, IoErrorResolved)}
        for event in events:
            if not isinstance(event, IoError):
                self.check_cause(event)
            elif event.incident.id not in ending:
                self.check_rate(event)
            self.owed.pop(event.incident.id, None)
            if event.incident.phase is Phase.OPENED:
                self.scopes[event.incident.scope] += 1

    def note_news(self):
        for one in self.incidents.open_incidents(limit=2000):
            shown = one.action, one.reason, one.flapping
            before = self.shown.get(one.id)
            if before != shown:
                self.shown[one.id], self.news[one.id] = shown, self.step
                flaps = one.flapping and not any(sent.flapping for sent in self.sent[one.id][-1:])
                if before is None or before[:2] != shown[:2] or flaps:
                    self.owed.setdefault(one.id, self.monotonic)

    def check_rate(self, event):
        """One message a window of an incident and origin, but for news; and in the end one a second."""
        sent = self.sent[event.incident.id]
        sent.append(Message(self.monotonic, self.step, event.origin, event.incident.flapping))
        if not self.limits.fold:
            return
        if len(sent) > FREE_MESSAGES:
            assert sent[-1].at - sent[-2].at >= A_SECOND, "after ten messages one a second at most"
        before = next((one for one in reversed(sent[:-1]) if one.origin is event.origin), None)
        if before is not None and self.monotonic - before.at < A_SECOND:
            news = self.news[event.incident.id]
            assert news > before.step or news == before.step == self.step, "only news goes out in a window"

    def check_cause(self, event):
        if event.resolution.cause in ("quiet", "resumed"):
            whole_host = event.incident.scope is Scope.HOST
            seen = not self.blind or (not whole_host and event.domain.uuid in self.sighted)
            assert seen, "nothing resolves while its guest is not seen"
            if not whole_host:
                drill = self.is_drill(event.incident.id)
                assert event.domain.uuid not in self.paused[drill], "never while its guest stands still"

    def is_drill(self, incident_id):
        """Whether the incident was opened by a drill, as its first event says."""
        for event in self.events:
            if event.incident.id == incident_id and event.incident.phase is Phase.OPENED:
                return event.origin is Origin.REPLAY
        return self.log.open[incident_id][1]

    def error(self, guest, alias, action, reason, count, origin):
        raw = RawIoError(guest, guest, 1, "/p", alias, action, reason, self.wall_ns)
        if action == PAUSE:
            self.paused[origin is Origin.REPLAY].add(guest)
        self.applied[origin] += count
        burst = Burst(raw, count, self.wall_ns, self.wall_ns, origin)
        self.take(self.incidents.apply(burst, self.now, self.describe))

    # ------------------------------------------------------------------------------------------ rules

    @rule(guest=guests, alias=aliases, action=actions, reason=reasons, count=counts, origin=live_origins)
    def an_error_comes(self, guest, alias, action, reason, count, origin):
        self.error(guest, alias, action, reason, count, origin)

    @rule(guest=guests, alias=aliases, action=actions, reason=reasons, count=counts)
    def a_drill_comes(self, guest, alias, action, reason, count):
        self.error(guest, alias, action, reason, count, Origin.REPLAY)

    @rule(guest=guests, alias=aliases, action=actions, reason=reasons, origin=live_origins)
    def a_look_finds_something_out(self, guest, alias, action, reason, origin):
        before = self.incidents.open_count
        raw = RawIoError(guest, guest, 1, "/p", alias, action, reason, self.wall_ns)
        evidence = (Evidence("state", "confirms"),)
        burst = Burst(raw, 0, self.wall_ns, self.wall_ns, origin, evidence=evidence)
        self.take(self.incidents.apply(burst, self.now, self.describe))
        assert self.incidents.open_count == before

    @rule(guest=guests, alias=aliases, times=st.integers(2, 30), step=st.sampled_from((0.001, 0.3, 1.1)))
    def a_storm_of_changing_errors_comes(self, guest, alias, times, step):
        for number in range(times):
            self.error(guest, alias, 2, ("", "enospc")[number % 2], 3, Origin.EVENT)
            self.let_time_pass(step)

    @rule(guest=guests, alias=aliases, seconds=st.sampled_from((30, 70)))
    def a_steady_storm_comes(self, guest, alias, seconds):
        before = Counter({incident: len(sent) for incident, sent in self.sent.items()})
        for _ in range(2 * seconds):
            self.error(guest, alias, 2, "", 3, Origin.EVENT)
            self.let_time_pass(0.5)
        if self.limits.fold:
            # Windows of 1, 2, 4 … seconds; and what other origins and an earlier change had left over.
            most = math.ceil(math.log2(seconds + 1)) + 4
            assert all(len(sent) - before[incident] <= most for incident, sent in self.sent.items())

    @rule(guest=guests)
    def a_guest_resumes(self, guest):
        self.wall_ns += 1
        for paused in self.paused.values():
            paused.discard(guest)
        self.sighted.add(guest)
        self.take(self.incidents.apply(DomainResumed(guest, self.wall_ns), self.now, self.describe))
        self.wall_ns += 1

    @rule(guest=guests, cause=st.sampled_from(("domain_stopped", "migrated", "undefined")))
    def a_guest_goes(self, guest, cause):
        for paused in self.paused.values():
            paused.discard(guest)
        self.sighted.discard(guest)
        self.take(self.incidents.apply(DomainGone(guest, self.wall_ns, cause), self.now, self.describe))
        assert not any(one.domain_uuid == guest for one in self.incidents.open_incidents(limit=2000))

    @rule(guest=guests, alias=st.sampled_from(("disk0", "disk1")))
    def a_device_is_removed(self, guest, alias):
        before = {one.id for one in self.open_of(guest) if one.paused or one.device.alias != alias}
        observation = DeviceRemoved(guest, alias, self.wall_ns)
        self.take(self.incidents.apply(observation, self.now, self.describe))
        assert {one.id for one in self.open_of(guest)} == before, "but a standstill is told until its end"
        self.let_go_of(guest)

    def open_of(self, guest):
        return [one for one in self.incidents.open_incidents(limit=2000) if one.domain_uuid == guest]

    def let_go_of(self, guest):
        """With its last incident gone nothing remembers that the guest stands still; a later look does."""
        open_ones = self.incidents.open_incidents(limit=2000)
        for drill, paused in self.paused.items():
            holders = [one for one in open_ones if one.domain_uuid == guest or one.scope is Scope.HOST]
            if not any(self.is_drill(one.id) == drill for one in holders):
                paused.discard(guest)

    @rule()
    def the_source_is_lost(self):
        self.blind, self.sighted = True, set()
        self.take(self.incidents.apply(SourceLost(self.wall_ns, "cut"), self.now, self.describe))

    @rule(
        stopped=st.sets(guests, max_size=1),
        paused=st.sets(guests),
        unplugged=st.sampled_from((None, "disk0")),
        find=st.booleans(),
    )
    def the_source_comes_back(self, stopped, paused, unplugged, find):
        self.wall_ns += 1
        paused -= stopped
        have = frozenset({"disk0", "disk1"} - {unplugged})
        states = tuple(
            DomainState(guest, guest, "paused" if guest in paused else "running", guest in paused, have)
            for guest in GUESTS
            if guest not in stopped
        )
        drills = {one.id for one in self.incidents.open_incidents(limit=2000) if self.is_drill(one.id)}
        told = {
            (one.domain_uuid, one.device.alias)
            for one in self.incidents.open_incidents(limit=2000)
            if one.paused and one.scope is Scope.DEVICE and one.id not in drills
        }
        findings = tuple(
            Burst(
                RawIoError(guest, guest, 1, "", "disk1", PAUSE, "", self.wall_ns),
                1,
                self.wall_ns,
                self.wall_ns,
                Origin.RECONCILE,
            )
            for guest in sorted(paused)
            if find
        )
        for drill in (False, True):
            self.paused[drill] &= paused
        self.blind = False
        ready = SourceReady(Host("h"), self.wall_ns, states, findings)
        before = self.counts_in_memory()[Origin.RECONCILE]
        self.take(self.incidents.apply(ready, self.now, self.describe))
        new = self.counts_in_memory()[Origin.RECONCILE] - before
        untold = [one for one in findings if (one.raw.domain_uuid, "disk1") not in told]
        if not find:  # what stands still and nothing tells of is told without its device
            untold = [guest for guest in paused if not any(guest == told_of for told_of, _ in told)]
        assert new <= len(untold), "no error is told twice"
        self.note_found()
        for guest in paused:
            if not all(self.is_drill(one.id) for one in self.open_of(guest)):
                self.paused[False].add(guest)
        for guest in GUESTS:
            self.let_go_of(guest)

    def note_found(self):
        """Which findings are new is for the state machine to say; their count must not change later."""
        in_memory = self.counts_in_memory()
        self.applied[Origin.RECONCILE] = in_memory[Origin.RECONCILE] - self.ledger[Origin.RECONCILE]

    @rule(seconds=st.sampled_from((0.001, 0.5, 1.0, 3.0, 61.0, 301.0, 4000.0)))
    def time_passes(self, seconds):
        self.let_time_pass(seconds)

    def let_time_pass(self, seconds):
        end = self.monotonic + seconds
        while (due := self.incidents.next_due()) is not None and due <= end:
            self.move_to(max(due, self.monotonic))
            self.take(self.incidents.tick(self.now, self.describe))
            after = self.incidents.next_due()
            assert after is None or after > self.monotonic, "a tick at its time leaves nothing due"
        self.move_to(end)
        assert all(end - since <= 1.001 for since in self.owed.values()), "news goes out within a second"

    @rule(seconds=st.sampled_from((2.0, 100.0, 1000.0)))
    def a_tick_comes_late(self, seconds):
        self.move_to(self.monotonic + seconds)
        self.take(self.incidents.tick(self.now))

    def move_to(self, monotonic):
        self.wall_ns += round((monotonic - self.monotonic) * SECOND)
        self.monotonic = monotonic

    @rule(seconds=st.sampled_from((-100_000, -1, 1, 100_000)))
    def somebody_sets_the_wall_clock(self, seconds):
        self.wall_ns += seconds * SECOND
        if seconds > 0:
            self.jumped = self.step

    @rule()
    def a_commit_fails(self):
        self.states.update(self.incidents.changes())

    @rule()
    def a_commit_succeeds(self):
        self.states.update(self.incidents.changes())
        for key, state in self.states.items():
            if state is None:
                self.store.pop(key, None)
            else:
                self.store[key] = state
        for event in self.events:
            self.log.read(event)
        self.ledger += self.applied
        self.events, self.states, self.applied = [], {}, Counter()
        self.committed_paused = {drill: set(paused) for drill, paused in self.paused.items()}
        self.committed_sent = {incident: list(sent) for incident, sent in self.sent.items()}
        self.committed_shown, self.committed_news = dict(self.shown), dict(self.news)
        self.committed_owed = set(self.owed)
        in_store = {key for key in self.store if key.startswith(("incident/", "drill/"))}
        assert len(in_store) == self.incidents.open_count == len(self.log.open)

    @rule(
        down=st.sampled_from((0.0, 0.3, 5.0, 1000.0)),
        jump=st.sampled_from((0, 0, 0, -5000, 5000)),
        after_a_commit=st.booleans(),
    )
    def the_agent_is_killed_and_starts_again(self, down, jump, after_a_commit):
        if after_a_commit:
            self.a_commit_succeeds()
        self.events, self.states, self.applied = [], {}, Counter()
        self.paused = {drill: set(paused) for drill, paused in self.committed_paused.items()}
        self.wall_ns += round((down + jump) * SECOND)
        self.shown, self.news = dict(self.committed_shown), dict(self.committed_news)
        self.sent.clear()
        for incident, sent in self.committed_sent.items():
            # A wall clock that was set forward since the last message looks like time that has passed.
            known = jump <= 0 and all(one.step > self.jumped for one in sent[-1:])
            shift = 7.0 - down - self.monotonic if known else -math.inf
            self.sent[incident] = [replace(one, at=one.at + shift) for one in sent]
        self.committed_sent = {incident: list(sent) for incident, sent in self.sent.items()}
        self.monotonic = 7.0
        self.owed = dict.fromkeys(self.committed_owed, self.monotonic)
        self.kills += 1
        self.incidents = Incidents(self.limits, new_id=lambda: next(self.ids))
        assert self.incidents.restore(self.store, self.now) == ()
        self.blind, self.sighted = True, set()
        assert self.incidents.open_count == len(self.log.open)

    # ------------------------------------------------------------------------------------- invariants

    def counts_in_memory(self):
        told = Counter(self.log.counts)
        for event in self.events:
            if isinstance(event, IoError):
                told[event.origin] += event.occurrences.count
        return told + pending_in(self.in_memory())

    def in_memory(self):
        """The states as a commit would leave them now."""
        self.states.update(self.incidents.changes())
        states = {**self.store, **self.states}
        return {key: state for key, state in states.items() if state is not None}

    @invariant()
    def committed_callbacks_are_exactly_those_told_and_those_pending_in_the_store(self):
        assert self.log.counts + pending_in(self.store) == self.ledger

    @invariant()
    def applied_errors_are_exactly_those_told_and_those_pending(self):
        assert self.counts_in_memory() == self.ledger + self.applied

    @invariant()
    def what_is_pending_is_told_within_the_widest_window(self):
        if sum(pending_in(self.in_memory()).values()):
            assert self.limits.fold, "without folding each callback is told at once"
            assert self.incidents.next_due() <= self.monotonic + self.limits.max_window_seconds

    @invariant()
    def no_more_are_open_than_allowed(self):
        # A drill of the whole host may come on top of the smallest limit.
        assert self.incidents.open_count <= max(self.limits.max_open, 2)

    def teardown(self):
        if not hasattr(self, "store"):
            return
        self.the_source_comes_back(set(), set(), None, False)
        self.let_time_pass(self.limits.quiet_seconds + self.limits.max_window_seconds)
        self.a_commit_succeeds()
        assert self.log.open == {}, "everything that opened was resolved in the end"
        assert self.incidents.next_due() is None
        assert self.log.counts == self.ledger
