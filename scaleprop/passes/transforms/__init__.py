"""The transform engine: T·T⁻¹ on an edge, followed by rules until parameters absorb it."""
