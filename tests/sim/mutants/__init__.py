"""Faults that virtbus had or might have had, as patches; the simulation has to find each of them."""
