"""Recomputes one step of a run and reports it."""
