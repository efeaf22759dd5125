"""The machine: memory, network, processes, progress, events."""
