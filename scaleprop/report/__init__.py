"""What happened to every tensor: records, and the report that shows, saves and loads them."""

from scaleprop.report.records import TensorRecord
from scaleprop.report.report import SCHEMA_VERSION, Report
from scaleprop.report.scales import Finding, ScaleReport, TensorScale

__all__ = ["SCHEMA_VERSION", "Finding", "Report", "ScaleReport", "TensorRecord", "TensorScale"]
