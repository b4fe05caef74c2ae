"""A record of Kafka as a message, and back to its bytes."""

from __future__ import annotations

import operator
from typing import Any

from virtbus.model import Binding, Message

Headers = list[tuple[str, bytes | None]]

# Not `message.headers()`: for a name that is not UTF-8 confluent-kafka gives a broken list beside its
# exception, and an interpreter that has specialised the call goes on with the list, into a crash.
_give_headers = operator.methodcaller("headers")


def headers_of(polled: Any) -> Headers:
    """A record's headers; none when confluent-kafka can't give them (a name not in UTF-8): no event.

    To be called once a record: after such a name the next call ends the interpreter.
    """
    try:
        return list(_give_headers(polled) or ())
    except (SystemError, UnicodeDecodeError):
        return []


def message_of(polled: Any, headers: Headers, *, redelivered: bool = False, handle: object = None) -> Message:
    """A polled record with its headers as a message; `handle` is the record itself where none is given.

    A header that has two values is there as the list of them, so that whoever reads it has to refuse it.
    """
    values: dict[str, list[bytes | None]] = {}
    for name, value in headers:
        known = values.setdefault(name, [])
        if value not in known:
            known.append(value)
    fields: dict[str, object] = {
        name: found[0] if len(found) == 1 else found for name, found in values.items()
    }
    content_type = next((v for name, v in fields.items() if name.lower() == "content-type"), None)
    key = polled.key()
    return Message(
        binding=Binding.KAFKA,
        headers=fields,
        content_type=content_type.decode("utf-8", "replace") if isinstance(content_type, bytes) else None,
        body=polled.value() or b"",
        key=None if key is None else key.decode("utf-8", "replace"),
        redelivered=redelivered,
        user_id=None,
        position=f"{polled.topic()}[{polled.partition()}]@{polled.offset()}",
        handle=polled if handle is None else handle,
    )
