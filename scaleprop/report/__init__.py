"""What happened to every tensor: records, and the report that shows, saves and loads them."""

from scaleprop.report.ranges import FormatRange
from scaleprop.report.records import ScaleProvenance, TensorRecord, Values, Variant
from scaleprop.report.report import SCHEMA_VERSION, Report
from scaleprop.report.scales import Finding, ScaleReport, TensorScale

__all__ = [
    "SCHEMA_VERSION",
    "Finding",
    "FormatRange",
    "Report",
    "ScaleProvenance",
    "ScaleReport",
    "TensorRecord",
    "TensorScale",
    "Values",
    "Variant",
]
