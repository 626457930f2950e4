"""Measurements: each script says at its top what it measures and how to run it."""
