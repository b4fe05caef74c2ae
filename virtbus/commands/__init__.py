"""What each command wires together: one module a command, no options and no help (see `virtbus.cli`)."""
