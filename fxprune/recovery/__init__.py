"""Recovery: training a pruned model until it knows again what it knew, with adapters, whole, or from the dense model."""
