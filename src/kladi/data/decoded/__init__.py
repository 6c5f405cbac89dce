"""Hop 1, kept: every image decoded once, in child processes, into a memory-mapped store."""
