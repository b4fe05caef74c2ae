"""RabbitMQ (AMQP 0-9-1) through kombu and py-amqp."""
