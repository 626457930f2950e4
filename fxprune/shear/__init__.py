"""LoRAShear (arXiv 2310.18356): LHSPG, an optimizer that brings whole prune units to zero while adapters train the rest."""
