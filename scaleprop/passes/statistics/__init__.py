"""How large the values of a graph are: predicted from the operators' rules, and measured."""

from scaleprop.passes.statistics.depth import attention_entropy, findings
from scaleprop.passes.statistics.lines import listings, module_of, visits
from scaleprop.passes.statistics.measure import Measured, Run, measure
from scaleprop.passes.statistics.predict import Prediction, predict

__all__ = [
    "Measured",
    "Prediction",
    "Run",
    "attention_entropy",
    "findings",
    "listings",
    "measure",
    "module_of",
    "predict",
    "visits",
]
