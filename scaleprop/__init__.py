"""scaleprop: carry scales through a model's graph so that low-precision numbers just work."""
