"""How large the values of a graph are: predicted from the operators' rules, and measured."""

from scaleprop.passes.statistics.predict import Prediction, predict

__all__ = ["Prediction", "predict"]
