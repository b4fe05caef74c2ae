"""virtbus: every guest I/O error that libvirt reports, as a durable CloudEvent on RabbitMQ or Kafka.

This package's public names are the consumer SDK; it works where libvirt is not installed.
"""

from __future__ import annotations

__version__ = "0.1.0"
