"""Triton kernels. They need the package ``triton``, and equal the reference bit for bit.

Rounding is integer arithmetic on the bits of float32: a compiler may fuse a product into a sum, and
Triton's interpreter casts to float8 and bfloat16 wrongly, but neither touches integers.
"""
