"""Control planes that act on events; each is an entry point of the group `virtbus.integrations`.

The contract is in `base`, what all have in common in `reactor`. Nothing is imported here: a Nova scheduler
loads `nova_weigher` without what the others need.
"""
