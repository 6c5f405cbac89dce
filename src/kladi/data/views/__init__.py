"""Hops 2 and 3: rows of the store -> replayable augmented views -> batches."""
