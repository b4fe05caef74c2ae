"""Real brokers of the tests' own, never the machine's."""
