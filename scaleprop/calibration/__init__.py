"""Calibration: streaming statistics of a graph's values over example inputs."""

from scaleprop.calibration.statistics import TensorStatistics

__all__ = ["TensorStatistics"]
