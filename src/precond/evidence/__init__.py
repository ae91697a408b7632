"""Each statement of the paper as a measurement on real data."""
