"""LoRAShear (arXiv 2310.18356): `fxprune.shear`, and its optimizer LHSPG, which brings whole prune units to zero."""
