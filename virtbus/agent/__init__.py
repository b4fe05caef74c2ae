"""The per-host agent: the path of one error, thread by thread."""
