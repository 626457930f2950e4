"""``python -m fxprune``, and ``torchrun -m fxprune``."""

from .cli import main

raise SystemExit(main())
