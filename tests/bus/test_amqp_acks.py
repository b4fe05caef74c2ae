"""A few hundred random ack schedules, and proof that the harness sees a publisher that believes lies."""

from __future__ import annotations

import kombu
import pytest

from tests.faultkit import FakeAmqpConnection, FakeAmqpPeer, Published
from tests.faults import amqp_acks
from virtbus.bus.amqp import bus as amqp_module


def test_no_schedule_of_acks_makes_the_publisher_confirm_what_was_not() -> None:
    schedules, false_confirms = amqp_acks.run(200)
    assert schedules >= 200
    assert false_confirms == 0


def test_the_harness_catches_a_publisher_that_ignores_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amqp_module._Publisher, "_on_return", lambda self, *anything: None)
    with pytest.raises(BaseException):  # noqa: B017 - hypothesis wraps it in groups of many kinds
        amqp_acks.run(500)
    assert amqp_acks.AckSchedule.false_confirms > 0


def test_the_peer_sees_that_py_amqps_own_confirm_believes_a_late_ack() -> None:
    def late(connection: FakeAmqpConnection, published: Published) -> None:
        if published.tag == 2:
            connection.ack(1)  # the ack of the first message, which the caller gave up on

    with FakeAmqpPeer(late) as peer, kombu.Connection(peer.url) as connection:
        channel = connection.channel()
        channel.confirm_select()
        for number in (1, 2):
            message = channel.prepare_message(b"", properties={"message_id": f"message-{number}"})
            if number == 1:
                with pytest.raises(TimeoutError):
                    channel.basic_publish_confirm(message, exchange="x", confirm_timeout=0.2)
            else:
                channel.basic_publish_confirm(message, exchange="x", confirm_timeout=2)  # "confirmed"
        assert not peer.vouches_for("message-2")
        connection.collect()
