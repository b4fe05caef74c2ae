"""A deterministic simulation of the whole of virtbus in virtual time: see docs/reliability.md."""
