"""Tiny random models of what transformers ships: shrunk configurations, example inputs, and the list of types."""
