"""How well an edit took: one file for each data set or family of metrics."""

DECIMALS = 6
"""Digits after the point in `metrics.json`."""
OWN = "own_"
"""What the key of a metric from the user's own file begins with."""
DETAILS = ("_low", "_high", "_magnitude")
"""What the keys of intervals and magnitudes end in."""
