"""Faults that people once found in reviews and on real parts, put back one at a time: each has to be found.

A mutant changes functions by name, so that it survives a move of their lines, and fails aloud when a name or
the words it changes are gone: then the mutant is to be written anew, not left out.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.sim.plan import Fault, Plan, Shape


@dataclass(frozen=True, slots=True)
class Edit:
    """In the function `where` ("module:name") the words `old`, which stand there once, become `new`."""

    where: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault: what it is, in a line, and how it is made."""

    about: str
    edits: tuple[Edit, ...]
    needs: tuple[tuple[str, ...], ...] = ()  # plans without one of each can't show it
    fleet: bool = False  # only plans of fleets can
    messages: bool = False  # only hypervisors that keep messages can

    def chance(self, plan: Plan) -> float:
        """How soon it may show in this plan, a second of it; 0 if it can't, as far as a plan tells."""
        if self.fleet and plan.shape is not Shape.FLEET:
            return 0.0
        if self.messages and all(host.release == "bookworm" for host in plan.hosts):
            return 0.0
        happens = Counter(word for fault in plan.faults for word in _words(fault))
        happens.update(_in_the_dark(plan))
        needed = [sum(happens[word] for word in words) for words in self.needs]
        return math.prod(needed) / plan.faulty_seconds / len(plan.hosts)


def _words(fault: Fault) -> Iterator[str]:
    """What `needs` may name of a fault."""
    yield fault.what
    yield f"{fault.where} {fault.what}"
    if fault.what == "trouble":
        yield "pause" if fault.how["pause"] else "report"
        if fault.how.get("behind") is not None:
            yield "behind"
    if fault.how.get("keeps") is False:
        yield f"{fault.where} without its files"


def _in_the_dark(plan: Plan) -> Iterator[str]:
    """Errors that libvirt alone remembers, of disks that failed before and not soon again."""
    ends = [
        (fault.where, fault.at, fault.at + fault.how.get("after", fault.how.get("seconds", 0.0)))
        for fault in plan.faults
        if fault.what in BLIND
    ]
    reports = [fault for fault in plan.faults if fault.what == "trouble" and not fault.how["pause"]]
    for one in reports:
        disk = (one.where, one.how["guest"], one.how["disk"])
        its = [fault.at for fault in reports if (fault.where, fault.how["guest"], fault.how["disk"]) == disk]
        dark = any(where == one.where and begin < one.at < end for where, begin, end in ends)
        before = [at for at in its if at < one.at]
        if dark and before and not any(one.at < at < one.at + 90.0 for at in its):
            yield "dark report"
            if any(
                fault.what == "step_clock" and fault.how["step"] < -60 and before[-1] < fault.at < one.at
                for fault in plan.faults
                if fault.where == one.where
            ):
                yield "dark report of another clock"


def _one(
    about: str,
    where: str,
    old: str,
    new: str,
    *,
    needs: tuple[tuple[str, ...], ...] = (),
    fleet: bool = False,
    messages: bool = False,
) -> Mutant:
    return Mutant(about, (Edit(where, old, new),), needs, fleet, messages)


ENDS = ("kill", "kill_at", "power_cut", "power_cut_at", "terminate")
BLIND = ("libvirt_restarts", "libvirt_dies", "freeze", *ENDS)
POWER = ("power_cut", "power_cut_at")
CONSUMER = ("consumer kill", "consumer kill_at")
REACTOR = ("reactor kill", "reactor kill_at")


MUTANTS = {
    "a_look_asked_once": _one(
        "a question to libvirt that failed is not asked again",
        "virtbus.sources.lookups:Questions.answered",
        "attempts is None or not unanswered",
        "True",
        needs=(("looks_fail", "looks_hang"), BLIND),
    ),
    "a_late_event_counts_again": _one(
        "an event that comes after its finding is counted again",
        "virtbus.sources.crosscheck:CrossCheck.event",
        "finding is not None and mono - finding.at <= LATE_SECONDS",
        "False",
    ),
    "a_loss_begins_when_noticed": _one(
        "the gap of a lost connection begins when the loss is noticed, not at the last proof",
        "virtbus.seen:SeenThrough.lost",
        "earliest(at, self._proven or self.moment)",
        "at",
        needs=(("libvirt_dies",),),
    ),
    "alive_at_the_commit": _one(
        "the sign of life is the commit's clock, not up to when everything is seen",
        "virtbus.agent.intake:Writer.sign_of_life",
        "self._spool.alive(through)",
        "self._spool.alive(Moment.of(begun))",
        needs=(("libvirt_hangs", "libvirt_dies"), ENDS),
    ),
    "a_proof_is_as_new_as_its_answer": _one(
        "everything counts as seen when an answer is taken from the queue, not when its question was asked",
        "virtbus.seen:SeenThrough.take",
        "Moment.of(item.asked, MARGIN_SECONDS + item.undecided)",
        "Moment.of(now)",
        needs=(("slow_host",), ENDS),
    ),
    "epochs_by_the_clock": _one(
        "a run's epoch is made of the wall clock alone: a later run may get an earlier epoch",
        "virtbus.spool.opening:_begin_run",
        ", above=[*mirror.accounts, *([] if before is None else [before])]",
        "",
        needs=(("step_clock",),),
    ),
    "old_disk_errors_forgotten": _one(
        "a disk error that QEMU kept from a pause nobody looked at is blamed for the next one",
        "virtbus.sources.cases:Case.decide",
        "(wrong if looked else self.stale) | _kept(events)",
        "wrong if looked else {}",
    ),
    "a_disk_behind_the_look_is_blamed": _one(
        "an error that came behind the look at its pause is blamed for the next pause too",
        "virtbus.sources.cases:Case.decide",
        "(wrong if looked else self.stale) | _kept(events)",
        "wrong if looked else self.stale | _kept(events)",
        needs=(("behind",),),
    ),
    "a_resume_without_us_is_not_believed": _one(
        "a guest that the listing shows running still counts as paused: its next pause is not told",
        "virtbus.sources.crosscheck:CrossCheck.listed_running",
        "self.resumed(uuid)",
        "pass",
        needs=(
            (
                "libvirt_hangs",
                "libvirt_restarts",
                "freeze",
            ),
        ),
    ),
    "a_standstill_is_not_noticed": _one(
        "the source does not notice that its process stood still",
        "virtbus.sources.crew:Pulse.beat",
        "STANDSTILL_SECONDS",
        "1e9",
        needs=(("freeze",),),
    ),
    "the_newest_message_last": Mutant(
        "of the messages that libvirt keeps of a disk the last counts, not the newest",
        (
            Edit(
                "virtbus.sources.evidence:read_messages",
                "sorted(found, key=lambda each: each.recency(now_ns))",
                "reversed(found)",
            ),
            Edit(
                "virtbus.sources.findings:newer_messages",
                "in look.messages:",
                "in {one.target: one for one in look.messages}.values():",
            ),
        ),
        messages=True,
        needs=(("dark report",),),
    ),
    "the_newest_stamp": _one(
        "of the messages that libvirt keeps of a disk only the newest stamp counts",
        "virtbus.sources.findings:newer_messages",
        "in look.messages:",
        "in {one.target: one for one in sorted(look.messages, key=lambda one: one.at_ns or -1)}.values():",
        messages=True,
        needs=(("dark report of another clock",),),
    ),
    "states_apart_from_events": _one(
        "incident states are committed in a transaction of their own, after the events",
        "virtbus.agent.intake:Writer.commit",
        "stamps = self._spool.commit(batch, self._pending_states)",
        "stamps = self._spool.commit(batch, {}); self._spool.commit((), self._pending_states)",
        needs=(
            (
                "kill_at",
                "power_cut_at",
            ),
        ),
    ),
    "incidents_not_restored": _one(
        "an agent that starts again does not know the incidents that were open",
        "virtbus.agent.intake:Intake.restore",
        "self._incidents.restore(self._spool.states(), self.started)",
        "()",
        needs=(ENDS,),
    ),
    "commits_not_synced": _one(
        "what is committed waits in the disk's cache",
        "virtbus.spool.mirror:Connection._connect",
        "sync=self._sync",
        'sync="OFF"',
        needs=(POWER,),
    ),
    "unconfirmed_is_confirmed": _one(
        "what was unconfirmed when the connection ended counts as confirmed",
        "virtbus.agent.publisher:Publisher._once",
        "self._done(record, outcome)",
        "self._done(record, Confirmed() if isinstance(outcome, Deferred) else outcome)",
        needs=(
            (
                "broker cut",
                "broker stop",
                "broker confirms",
            ),
        ),
    ),
    "marks_never_written": _one(
        "acknowledgements are sent without marks on the disk",
        "virtbus.marks:Marks.write",
        "if database is not None:",
        "if False:",
        needs=(CONSUMER,),
    ),
    "a_bad_message_is_acknowledged": _one(
        "what is not an event is acknowledged, not put aside",
        "virtbus.consumer:Consumer._opened",
        "emit(PoisonMessage(message.position, str(error)))",
        "return subscription.ack(message)",
        needs=(("broker poison",),),
    ),
    "actions_after_acks": Mutant(
        "a reactor acknowledges events before what they call for is stored",
        (
            Edit(
                "virtbus.integrations.reactor:Reactor._stored", "        delivery.ack()\n", "        pass\n"
            ),
            Edit(
                "virtbus.integrations.reactor:Reactor._stored",
                "actions = [action for _, action in batch",
                "[delivery.ack() for delivery, _ in batch]; actions = [action for _, action in batch",
            ),
        ),
        needs=(("reactor kill_at",),),
    ),
    "what_waits_is_forgotten": _one(
        "a reactor that starts again does not take up what its store says is to be done",
        "virtbus.integrations.worker:Worker.take_up",
        "in self._store.waiting():",
        "in ():",
        needs=(REACTOR,),
    ),
    "two_answers": _one(
        "a host of which nothing can be told counts as well",
        "virtbus.integrations.policy:HoldPolicy._answer",
        "return host, host.answer",
        "return host, Answer.WELL if host.answer is Answer.CANT_TELL else host.answer",
        fleet=True,
    ),
    "an_outage_is_a_hosts_fault": _one(
        "other hosts with trouble on the same storage are no reason to doubt",
        "virtbus.fleet.verdict:_judge_host",
        "if any(kin_hosts[word] - {host}",
        "if False and any(kin_hosts[word] - {host}",
        fleet=True,
        needs=(("storage outage",),),
    ),
    "a_mark_is_not_adopted": _one(
        "what is held under our mark and unknown to the store stays held",
        "virtbus.integrations.holds:reconcile",
        "for name, hold in marks.items() if _is_new(rows, name)",
        "for name, hold in ()",
        fleet=True,
        needs=(("reactor without its files",), ("storage host_fault",)),
    ),
    "a_redelivery_opens_again": _one(
        "an event that comes once more opens an incident that was over",
        "virtbus.fleet.agent:Agent.ended_after",
        "return ended is not None and",
        "return False and",
    ),
}


def apply(name: str) -> None:
    """Put this fault back, in this process. LookupError when what it changes is not there any more."""
    for where, function in changed(name).items():
        owner, last = _place(where)
        before = inspect.getattr_static(owner, last)
        setattr(owner, last, function)
        for other in [other for key, other in sys.modules.items() if key.startswith("virtbus")]:
            for key, value in list(vars(other).items()):
                if value is before:
                    setattr(other, key, function)


def changed(name: str) -> dict[str, Any]:
    """The functions of this fault, made and not put in place: by "module:name". LookupError as in `apply`."""
    sources: dict[str, str] = {}
    for edit in MUTANTS[name].edits:
        owner, last = _place(edit.where)
        source = sources.get(edit.where) or textwrap.dedent(
            inspect.getsource(inspect.getattr_static(owner, last))
        )
        if source.count(edit.old) != 1:
            raise LookupError(
                f"mutant {name}: {edit.where} has {edit.old!r} {source.count(edit.old)} times: write it anew"
            )
        sources[edit.where] = source.replace(edit.old, edit.new)
    made = {}
    for where, source in sources.items():
        owner, last = _place(where)
        names: dict[str, Any] = {}
        code = compile(f"from __future__ import annotations\n{source}", f"mutant {name}", "exec")
        exec(code, inspect.getattr_static(owner, last).__globals__, names)
        made[where] = names[last]
    return made


def _place(where: str) -> tuple[Any, str]:
    module, _, path = where.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, last = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, last
