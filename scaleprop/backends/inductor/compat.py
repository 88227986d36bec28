"""Private and unstable parts of torch that the Inductor backend needs, in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.fx
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

# Local to one compilation. Graphs hold weights: caching them on disk would write the model there.
_OPTIONS: Mapping[str, Any] = {"fx_graph_cache": False, "fx_graph_remote_cache": False}


def trace(function: Callable[..., Any], fakes: Sequence[Any],
          mode: FakeTensorMode) -> torch.fx.GraphModule:
    """``function`` on these fakes of ``mode``, as ATen with Inductor's decompositions."""
    with torch.no_grad(), mode:
        return make_fx(function, decomposition_table=select_decomp_table(),
                       tracing_mode="symbolic", _allow_non_fake_inputs=True)(*fakes)


def compile_inference(module: torch.fx.GraphModule,
                      fakes: Sequence[Any]) -> Callable[[list[Any]], Any]:
    """Inductor's code for a flat graph whose weights are attributes; takes a list it may empty."""
    with torch.no_grad(), config.patch(dict(_OPTIONS)):
        joint_graph_passes(module)
        return compile_fx_inner(module, list(fakes), is_inference=True)  # type: ignore[return-value]


def static_fake_mode() -> FakeTensorMode:
    """A mode of its own, for tensors of fixed sizes."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def guard_count(mode: FakeTensorMode) -> int:
    """How many assumptions on symbolic sizes were made so far in this mode."""
    return len(mode.shape_env.guards) if mode.shape_env is not None else 0


def guards_since(mode: FakeTensorMode, count: int) -> list[sympy.Basic]:
    """The assumptions made since then, as boolean expressions."""
    if mode.shape_env is None:
        return []
    return [guard.expr for guard in mode.shape_env.guards[count:]]


def has_vnni() -> bool:
    """Whether the processor sums products of bytes in 32 bits."""
    return torch.cpu._is_vnni_supported()  # pyright: ignore[reportPrivateUsage]
