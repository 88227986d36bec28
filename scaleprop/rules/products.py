"""scaleprop's own operators of training graphs."""

from __future__ import annotations

from scaleprop import ops
from scaleprop.rules import axes
from scaleprop.rules.base import Contraction, Homogeneity, Operand, Rule, register

# not homogeneous as numbers: where data is held decides what rounding loses, and that is the point
register(Rule(op=ops.cast, family="product", homogeneity=Homogeneity({0: 1}), axes=axes.identity))
register(
    Rule(
        op=ops.gemm,
        family="product",
        homogeneity=Homogeneity({0: 1, 1: 1}),
        axes=axes.all_but_last,
        contraction=Contraction(
            "matmul", (Operand(0, "activation", (-1,)), Operand(1, "activation", (-2,)))
        ),
    )
)
# of zeros it is 1, whatever scale they had: their products are zeros too
register(Rule(op=ops.power_scale, family="product", homogeneity=Homogeneity({0: 1})))
