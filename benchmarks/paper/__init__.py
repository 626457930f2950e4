"""The experiments of LLM-Pruner's paper (arXiv 2305.11627) as benchmarks, on any causal language model."""
