"""What differs between kinds of problems: inputs, hard-label losses, metrics."""
