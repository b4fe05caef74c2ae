"""Control planes that act on events; each is an entry point of the group `virtbus.integrations`."""
