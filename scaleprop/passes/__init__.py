"""Graph passes: one per file. Each inserts ``scaleprop::*`` operators and records why."""

if __name__ != "scaleprop.passes":  # reached through the link at the top of the repository
    raise ImportError(f"import 'scaleprop.passes' instead of {__name__!r}: the folder is a link")
