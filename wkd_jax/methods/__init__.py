"""Ways to distil, one a file: taps, connectors, memories, losses and their weights."""
