"""Ports for servers of the tests' own."""

from __future__ import annotations

import random
import socket


def free_ports(number: int) -> list[int]:
    """Ports on 127.0.0.1 that are free now, below the range that outgoing connections take theirs from."""
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 500):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == number:
            return found
    raise OSError("no free ports between 20000 and 32000 on 127.0.0.1")
