"""What low precision does to a training run, measured while it runs: see ``Monitor``."""

from scaleprop.monitors.monitor import Monitor
from scaleprop.monitors.plots import plot_scales
from scaleprop.monitors.records import GradientRecord, Measurement, OperandRecord
from scaleprop.monitors.writers import CsvWriter, TensorBoardWriter, Writer, read_csv

__all__ = ["CsvWriter", "GradientRecord", "Measurement", "Monitor", "OperandRecord",
           "TensorBoardWriter", "Writer", "plot_scales", "read_csv"]
