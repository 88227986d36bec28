"""Measurements behind the figures in the README; run from the repository root."""
