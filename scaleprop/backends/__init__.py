"""Backends: each lowers ``scaleprop::*`` operators; none of them changes what they mean."""

if __name__ != "scaleprop.backends":  # reached through the link at the top of the repository
    raise ImportError(f"import 'scaleprop.backends' instead of {__name__!r}: the folder is a link")
