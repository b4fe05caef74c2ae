"""What each command wires together: one module per command, no options and no help (see `virtbus.cli`)."""
