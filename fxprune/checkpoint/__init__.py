"""Checkpoints: the surgery on the eager model, configurations that are solved for, saving, loading."""
