"""How large the values of a graph are: predicted from the operators' rules, and measured."""

from scaleprop.passes.statistics.depth import attention_entropy, findings
from scaleprop.passes.statistics.lines import listings, module_of, visits
from scaleprop.passes.statistics.measure import (
    Measured,
    Run,
    Sums,
    Watch,
    measure,
    own_random_state,
)
from scaleprop.passes.statistics.nonfinite import nonfinite_finding, refuse_nonfinite
from scaleprop.passes.statistics.predict import Prediction, predict
from scaleprop.passes.statistics.structure import factors

__all__ = [
    "Measured",
    "Prediction",
    "Run",
    "Sums",
    "Watch",
    "attention_entropy",
    "factors",
    "findings",
    "listings",
    "measure",
    "module_of",
    "nonfinite_finding",
    "own_random_state",
    "predict",
    "refuse_nonfinite",
    "visits",
]
