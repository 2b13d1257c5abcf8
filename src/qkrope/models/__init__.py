"""The catalogue of released models: which qkrope calls give their q, k and v.

`entries` reads ``catalogue_*.toml`` once and gives frozen values; `problem` says whether the
kernels run a call. Importing reads nothing.
"""

from __future__ import annotations

from .catalogue import Call, Entry, entries, find
from .cover import problem, reason

__all__ = ["Call", "Entry", "entries", "find", "problem", "reason"]
