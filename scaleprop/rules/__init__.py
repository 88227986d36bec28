"""The algebra of operators: one rule per ATen operator, from which the passes are derived."""

from scaleprop.rules import (
    composites,
    contractions,
    creation,
    elementwise,
    gradients,
    logic,
    moments_movement,
    moments_norms,
    moments_softmax,
    moments_sums,
    movement,
    normalisation,
    products,
)
from scaleprop.rules.base import (
    AxisMap,
    Contraction,
    Coverage,
    Homogeneity,
    Operand,
    Rule,
    contraction_behind,
    contraction_of,
    core_operators,
    coverage,
    register,
    rule_for,
)

__all__ = [
    "AxisMap",
    "Contraction",
    "Coverage",
    "Homogeneity",
    "Operand",
    "Rule",
    "contraction_behind",
    "contraction_of",
    "core_operators",
    "coverage",
    "register",
    "rule_for",
]

# imported for their registrations
del composites
del contractions, creation, elementwise, gradients, logic, movement, normalisation, products
del moments_movement, moments_norms, moments_softmax, moments_sums
