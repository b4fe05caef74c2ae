"""Every question is asked until it is answered, within bounds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from virtbus.sources.lookups import FIRST_WAIT, LONGEST_WAIT, Asked, Questions, Want

BOTH = Want.DESCRIPTION | Want.TROUBLE


def taken(questions: Questions, now: float) -> Asked:
    asked = questions.take(now, ())
    assert asked is not None
    return asked


def test_wants_of_one_subject_are_asked_together_and_closed_by_their_answer() -> None:
    questions = Questions()
    questions.open("a", Want.DESCRIPTION)
    questions.open("a", Want.TROUBLE)
    asked = taken(questions, 0.0)
    assert (asked.subject, asked.want) == ("a", BOTH)
    questions.answered(asked, Want.NOTHING, 1.0)
    assert len(questions) == 0
    assert questions.next_due() is None


def test_what_was_answered_in_vain_is_asked_again_with_waits_that_double_up_to_a_limit() -> None:
    questions, now, waits = Questions(), 0.0, []
    questions.open("a", BOTH)
    for _ in range(10):
        asked = taken(questions, now)
        questions.answered(asked, Want.TROUBLE, now)
        due = questions.next_due()
        assert due is not None
        assert questions.take(due - 0.001, ()) is None
        waits.append(due - now)
        now = due
    assert waits == [min(FIRST_WAIT * 2**n, LONGEST_WAIT) for n in range(10)]
    assert taken(questions, now).want == Want.TROUBLE


def test_a_new_reason_to_ask_does_not_wait_for_an_old_failure() -> None:
    questions = Questions()
    questions.open("a", Want.DESCRIPTION)
    questions.answered(taken(questions, 0.0), Want.DESCRIPTION, 0.0)
    questions.open("a", Want.TROUBLE)
    assert taken(questions, 0.1).want == BOTH


def test_a_subject_that_is_being_asked_is_not_asked_twice_at_once() -> None:
    questions = Questions()
    questions.open("a", BOTH)
    assert questions.take(0.0, {"a"}) is None
    questions.open("b", BOTH)
    asked = questions.take(0.0, {"a"})
    assert asked is not None
    assert asked.subject == "b"


def test_what_is_asked_while_a_call_is_under_way_is_asked_after_it() -> None:
    questions = Questions()
    questions.open("a", Want.TROUBLE)
    asked = taken(questions, 0.0)
    questions.open("a", Want.TROUBLE)
    questions.answered(asked, Want.NOTHING, 1.0)
    assert taken(questions, 1.0).want == Want.TROUBLE


def test_an_answer_of_an_earlier_connection_closes_nothing() -> None:
    questions = Questions()
    questions.open("a", Want.TROUBLE)
    late = taken(questions, 0.0)
    questions.clear()
    questions.open("a", Want.TROUBLE)
    now_asked = taken(questions, 1.0)
    questions.answered(late, Want.NOTHING, 2.0)
    questions.answered(now_asked, Want.TROUBLE, 2.0)
    assert questions.next_due() == 2.0 + FIRST_WAIT


def test_a_subject_that_is_gone_is_not_asked_again() -> None:
    questions = Questions()
    questions.open("a", Want.TROUBLE)
    asked = taken(questions, 0.0)
    questions.forget("a")
    questions.answered(asked, Want.TROUBLE, 0.0)
    assert len(questions) == 0


def test_what_failed_while_more_was_asked_is_asked_with_it() -> None:
    questions = Questions()
    questions.open("a", Want.TROUBLE)
    asked = taken(questions, 0.0)
    questions.open("a", Want.DESCRIPTION)
    questions.answered(asked, Want.TROUBLE, 1.0)
    asked = taken(questions, 1.0)
    assert asked.want == BOTH
    questions.answered(asked, Want.TROUBLE, 1.0)
    assert questions.take(1.9 + FIRST_WAIT, ()) is None  # its count of failures went on
    assert taken(questions, 1.0 + 2 * FIRST_WAIT).want == Want.TROUBLE


STEPS = st.tuples(
    st.sampled_from(("open", "take", "answer", "fail")),
    st.sampled_from("ab"),
    st.sampled_from((Want.DESCRIPTION, Want.TROUBLE, Want.BASELINE)),
    st.floats(0, 5),
)


@given(st.lists(STEPS, min_size=30, max_size=60))
def test_any_question_is_open_until_it_is_answered(history: list[tuple[str, str, Want, float]]) -> None:
    questions, now = Questions(), 0.0
    unanswered = {"a": Want.NOTHING, "b": Want.NOTHING}
    calls: dict[str, Asked] = {}
    opened = {"a": Want.NOTHING, "b": Want.NOTHING}  # since the call began
    for what, subject, want, wait in [*history, ("answer", "a", BOTH, 0.0), ("answer", "b", BOTH, 0.0)]:
        now += wait
        if what == "open":
            questions.open(subject, want)
            unanswered[subject] |= want
            opened[subject] |= want
        elif what == "take":
            asked = questions.take(now, calls)
            if asked is not None:
                calls[asked.subject], opened[asked.subject] = asked, Want.NOTHING
        elif subject in calls:
            asked = calls.pop(subject)
            failed = asked.want & want if what == "fail" else Want.NOTHING
            questions.answered(asked, failed, now)
            unanswered[subject] &= ~asked.want | failed | opened[subject]
    while len(questions):
        now += LONGEST_WAIT
        asked = taken(questions, now)
        assert asked.want == unanswered.pop(asked.subject)
        questions.answered(asked, Want.NOTHING, now)
    assert not any(unanswered.values())
