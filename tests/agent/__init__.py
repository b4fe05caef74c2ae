"""The agent as a whole: as a process on real parts, and its threads on fakes."""
