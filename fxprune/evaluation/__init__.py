"""Evaluation: perplexity, latency and generation, the same for dense and pruned models."""

from .latency import Latency, measure_latency
from .perplexity import Perplexity, longest_input, perplexity

__all__ = ["Latency", "Perplexity", "longest_input", "measure_latency", "perplexity"]
