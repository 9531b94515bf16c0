"""Selection policies: which key blocks each query block attends to exactly.

To add one: a file with a frozen dataclass that has ``select``, a line in ``BY_NAME``, a test.
"""

from __future__ import annotations

from uta_fx.policies.base import BUDGETS, Policy, Selection, spend_budget
from uta_fx.policies.low_delta import LowDelta
from uta_fx.policies.random import Random
from uta_fx.policies.threshold import Threshold
from uta_fx.policies.topk import TopK
from uta_fx.policies.topp import TopP

BY_NAME: dict[str, Policy] = {
    "low_delta": LowDelta(),
    "topk": TopK(),
    "topp": TopP(),
    "threshold": Threshold(),
    "random": Random(),
}

__all__ = [
    "BUDGETS",
    "BY_NAME",
    "LowDelta",
    "Policy",
    "Random",
    "Selection",
    "Threshold",
    "TopK",
    "TopP",
    "spend_budget",
]
