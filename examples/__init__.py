"""Programs to run and read; from the repository root, ``python -m examples.quickstart``."""
