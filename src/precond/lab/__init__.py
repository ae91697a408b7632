"""Measurements: real data and trainings, the paper's statements, reports, the command line. The library imports nothing of it."""
