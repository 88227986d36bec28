"""Low precision in joint forward and backward graphs.

``roles`` tells the products of a training step apart, ``statistics`` says where their operands lie,
``lower`` casts them, each held at an exponent that its format is good at.
"""

from scaleprop.passes.training.lower import Formats, Lowered, lower_products
from scaleprop.passes.training.roles import Product, find_products

__all__ = ["Formats", "Lowered", "Product", "find_products", "lower_products"]
