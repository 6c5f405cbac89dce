"""Hop 1: one file -> pixels in [0, 1], whatever its format, through the written intensity pipeline."""
