"""librdkafka's own mock cluster, for faults that a real broker does not make to order.

confluent-kafka shows it only as a producer option (`test.mock.num.brokers`), without a way to push errors;
so this goes to the C library that the wheel brings along (rdkafka_mock.h).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import confluent_kafka

PRODUCE, METADATA, OFFSET_COMMIT, INIT_PRODUCER_ID = 0, 3, 8, 22  # Kafka's protocol guide, "API keys"

_ERROR_TEXT = 512
_PRODUCER = 0  # RD_KAFKA_PRODUCER
_TOPIC, _PARTITION, _VALUE, _FLAGS, _HEADERS = 1, 3, 4, 7, 10  # RD_KAFKA_VTYPE_…
_COPY = 2  # RD_KAFKA_MSG_F_COPY


def _library() -> ctypes.CDLL:
    """The very librdkafka that confluent_kafka uses."""
    folder = Path(confluent_kafka.__file__).parent.with_name("confluent_kafka.libs")
    library = ctypes.CDLL(str(next(folder.glob("librdkafka*"))))
    pointers = ("rd_kafka_new", "rd_kafka_conf_new", "rd_kafka_headers_new", "rd_kafka_mock_cluster_new")
    for name in pointers:
        getattr(library, name).restype = ctypes.c_void_p
    library.rd_kafka_mock_get_requests.restype = ctypes.POINTER(ctypes.c_void_p)
    library.rd_kafka_mock_request_api_key.restype = ctypes.c_int16
    library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    return library


def produce_with_header(hosts: str, topic: str, name: bytes) -> None:
    """One record of partition 0 whose header has a name that confluent-kafka would not write."""
    library = _library()
    config = ctypes.c_void_p(library.rd_kafka_conf_new())
    library.rd_kafka_conf_set(config, b"bootstrap.servers", hosts.encode(), None, ctypes.c_size_t(0))
    producer = ctypes.c_void_p(library.rd_kafka_new(_PRODUCER, config, None, ctypes.c_size_t(0)))
    headers = ctypes.c_void_p(library.rd_kafka_headers_new(ctypes.c_size_t(1)))
    library.rd_kafka_header_add(headers, name, ctypes.c_ssize_t(len(name)), b"x", ctypes.c_ssize_t(1))
    words: list[Any] = [_TOPIC, ctypes.c_char_p(topic.encode()), _PARTITION, ctypes.c_int32(0)]
    words += [_FLAGS, ctypes.c_int(_COPY), _VALUE, ctypes.c_char_p(b"x"), ctypes.c_size_t(1)]
    assert library.rd_kafka_producev(producer, *words, _HEADERS, headers, 0) == 0
    assert library.rd_kafka_flush(producer, 10_000) == 0
    library.rd_kafka_destroy(producer)


class MockCluster:
    """Mock brokers on loopback with one topic; errors are answered to the next requests of a kind."""

    def __init__(self, topic: str, *, brokers: int = 1, partitions: int = 4) -> None:
        """Start it with `topic` already there: the mock answers no CreateTopics."""
        self._library = _library()
        text = ctypes.create_string_buffer(_ERROR_TEXT)
        handle = self._library.rd_kafka_new(_PRODUCER, None, text, ctypes.c_size_t(_ERROR_TEXT))
        assert handle, text.value
        self._handle = ctypes.c_void_p(handle)
        self._cluster = ctypes.c_void_p(self._library.rd_kafka_mock_cluster_new(self._handle, brokers))
        self._library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, ctypes.c_int32(0))
        # Topics are described by the controller, which the mock has only when told.
        self._library.rd_kafka_mock_set_controller_id(self._cluster, ctypes.c_int32(1))
        error = self._library.rd_kafka_mock_topic_create(self._cluster, topic.encode(), partitions, brokers)
        assert error == 0, error
        self._library.rd_kafka_mock_start_request_tracking(self._cluster)
        self.hosts: str = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    @property
    def url(self) -> str:
        """The cluster as a bus URL."""
        return f"kafka://{self.hosts}"

    def push_errors(self, api: int, *codes: int) -> None:
        """Answer the next `len(codes)` requests of kind `api` with these error codes."""
        array = (ctypes.c_int * len(codes))(*codes)
        self._library.rd_kafka_mock_push_request_errors_array(
            self._cluster, ctypes.c_int16(api), ctypes.c_size_t(len(codes)), array
        )

    def requests(self, api: int) -> int:
        """How many requests of kind `api` have come so far."""
        size = ctypes.c_size_t()
        found = self._library.rd_kafka_mock_get_requests(self._cluster, ctypes.byref(size))
        kinds = [
            self._library.rd_kafka_mock_request_api_key(ctypes.c_void_p(found[number]))
            for number in range(size.value)
        ]
        self._library.rd_kafka_mock_request_destroy_array(found, size)
        return kinds.count(api)

    def delay(self, milliseconds: int) -> None:
        """Answer every request of every broker so much later."""
        self._library.rd_kafka_mock_broker_set_rtt(
            self._cluster, ctypes.c_int32(-1), ctypes.c_int(milliseconds)
        )

    def lead(self, topic: str, partition: int, broker: int) -> None:
        """Give a partition another leader; -1: none."""
        self._library.rd_kafka_mock_partition_set_leader(
            self._cluster, topic.encode(), ctypes.c_int32(partition), ctypes.c_int32(broker)
        )

    def down(self, broker: int) -> None:
        """Take a broker (1…) down: connections break, none is accepted."""
        self._library.rd_kafka_mock_broker_set_down(self._cluster, ctypes.c_int32(broker))

    def up(self, broker: int) -> None:
        """Bring it back."""
        self._library.rd_kafka_mock_broker_set_up(self._cluster, ctypes.c_int32(broker))

    def close(self) -> None:
        """End it."""
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._handle)
