"""Sweeps over training recipes: every combination trained, its loss compared with a baseline's, and
put beside what it costs.

``axes`` says what a sweep changes, ``overhead`` what recipes cost, ``store`` how runs are kept.
"""

from scaleprop.sweeps.effects import Effect
from scaleprop.sweeps.overhead import Gemm, Overhead, linear_gemms, overhead
from scaleprop.sweeps.results import Mean, Point, Sweep
from scaleprop.sweeps.running import sweep
from scaleprop.sweeps.shapes import gemms_of

__all__ = ["Effect", "Gemm", "Mean", "Overhead", "Point", "Sweep", "gemms_of", "linear_gemms",
           "overhead", "sweep"]  # fmt: skip
