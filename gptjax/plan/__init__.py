"""Plans a run for hardware that is not on this machine: memory, communication, time, cost."""
