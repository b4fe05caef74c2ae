"""Apache Kafka through a kombu transport over librdkafka."""
