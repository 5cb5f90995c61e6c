"""From arrays of other programs to a model of ours: ``python -m export from-weights``."""
