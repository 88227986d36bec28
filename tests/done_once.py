"""What is the same in each test, done once a process: a third of what small models take to compile.

What is compiled is the same.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch._dynamo import guards
from torch._export import utils
from torch._inductor.dtype_propagation import DtypePropagationOpsHandler
from torch._inductor.utils import op_dtype_propagation_rules
from torch.export import decomp_utils, exported_program

_find_composite_operators = utils._collect_all_valid_cia_ops
_found: tuple[Any, set[Any]] = (None, set())
_find_rules_of_dtypes = DtypePropagationOpsHandler.__init__


def arrange() -> None:
    """Call it when modules are imported and before anything is compiled."""
    for module in (utils, decomp_utils, exported_program):
        module._collect_all_valid_cia_ops = composite_operators
    DtypePropagationOpsHandler.__init__ = rules_of_dtypes  # type: ignore[method-assign]
    # flushes the processor's caches to time guards, for a line of a log
    guards.profile_guard_manager = lambda *_: 0.0  # type: ignore[assignment]
    gc.collect()
    gc.freeze()  # modules live as long as the process does: collections need not look at them
    gc.set_threshold(100_000, 10, 10)


def composite_operators() -> set[Any]:
    """What torch looks through all operators for, at each table of decompositions that it makes:
    looked for again when an operator was added."""
    global _found
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
    known = (registered, set(torch.ops._dir))
    if _found[0] != known:
        _found = (known, _find_composite_operators())
    return _found[1]


def rules_of_dtypes(only: Any) -> None:
    """Inductor asks its one table of dtypes for each value of each kernel, which makes it anew."""
    if getattr(only, "made_of", None) != len(op_dtype_propagation_rules):
        _find_rules_of_dtypes(only)
        only.made_of = len(op_dtype_propagation_rules)
