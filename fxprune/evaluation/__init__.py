"""Evaluation: perplexity, latency and generation, the same for dense and pruned models."""

from .latency import Latency, measure_latency
from .perplexity import Perplexity, perplexity

__all__ = ["Latency", "Perplexity", "measure_latency", "perplexity"]
