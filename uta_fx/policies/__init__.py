"""Selection policies: which key blocks each query block attends to exactly.

To add one: a file with a frozen dataclass that has ``select``, a line in ``BY_NAME``, a test.
"""

from __future__ import annotations

from uta_fx.policies.base import BUDGETS, Policy, Selection, spend_budget
from uta_fx.policies.low_delta import LowDelta
from uta_fx.policies.oracle import OracleLowDelta, OracleTopK, OracleTopP
from uta_fx.policies.radial import Radial
from uta_fx.policies.random import Random
from uta_fx.policies.rectified import Rectified
from uta_fx.policies.sliding_tile import SlidingTile
from uta_fx.policies.spatial_temporal import SpatialTemporal
from uta_fx.policies.svg2 import SVG2
from uta_fx.policies.threshold import Threshold
from uta_fx.policies.topk import TopK
from uta_fx.policies.topp import TopP
from uta_fx.policies.window import Window

BY_NAME: dict[str, Policy] = {
    "low_delta": LowDelta(),
    "topk": TopK(),
    "topp": TopP(),
    "threshold": Threshold(),
    "radial": Radial(),
    "sliding_tile": SlidingTile(),
    "spatial_temporal": SpatialTemporal(),
    "window": Window(),
    "rectified": Rectified(),
    "svg2": SVG2(),
    "random": Random(),
    "oracle_topk": OracleTopK(),
    "oracle_topp": OracleTopP(),
    "oracle_low_delta": OracleLowDelta(),
}

__all__ = [
    "BUDGETS",
    "BY_NAME",
    "SVG2",
    "LowDelta",
    "OracleLowDelta",
    "OracleTopK",
    "OracleTopP",
    "Policy",
    "Radial",
    "Random",
    "Rectified",
    "Selection",
    "SlidingTile",
    "SpatialTemporal",
    "Threshold",
    "TopK",
    "TopP",
    "Window",
    "spend_budget",
]
