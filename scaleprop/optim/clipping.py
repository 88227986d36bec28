"""Gradients kept in the bounds of their own history: Stable-SPAM's clipping, for any optimizer.

    clip = optim.StableClip(model.parameters(), optimizer)
    for batch in data:
        optimizer.zero_grad()
        loss(batch).backward()
        clip.step()                 # with a GradScaler: after scaler.unscale_(optimizer)
        optimizer.step()

T. Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam",
arXiv:2502.17055. For each parameter's gradient g, in this order:

    AdaClip   T ← θ·T + (1-θ)·max|g|;  T̂ = T/(1-θᵗ);  gᵢ ← gᵢ·T̂/max|g| where |gᵢ| > T̂
    AdaGN     m ← γ₁·m + (1-γ₁)·‖g‖;  v ← γ₂·v + (1-γ₂)·‖g‖²;  g ← g/‖g‖ · m̂/(√v̂ + ε)
    MoRet     every ``reset_every`` steps the optimizer forgets its moments, and their count

so that a spike ends where others begin, and a norm beyond what is usual becomes usual. t counts the
gradients that a parameter had. One with NaN or Inf is left as it is, and not learned from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from scaleprop.errors import ConfigError

_TORCH: Any = torch  # its foreach operators, public in all but name
_STATE = ("threshold", "mean", "square", "count")


class StableClip:
    """Clips the gradients of one list of parameters in place; see the module."""

    def __init__(self, parameters: Iterable[Tensor],
                 optimizer: torch.optim.Optimizer | None = None, *, reset_every: int = 1000,
                 theta: float = 0.999, gamma1: float = 0.7, gamma2: float = 0.9,
                 eps: float = 1e-8) -> None:
        """Clip ``parameters``; forget the moments of ``optimizer``, if one is given, every
        ``reset_every`` steps, of whatever it steps. Nothing waits for the device.

        theta, gamma1, gamma2: θ, γ₁, γ₂; 0 for θ and 0 for both γ leave gradients as they are.

        Raises:
            ConfigError: no parameters, several devices, tensor subclasses, options out of range,
                an optimizer whose state cannot be made anew (Adagrad).
        """
        self.parameters, self.optimizer = list(parameters), optimizer
        self.reset_every, self.steps = reset_every, 0
        self.theta, self.gamma1, self.gamma2, self.eps = theta, gamma1, gamma2, eps
        self._check()
        count, device = len(self.parameters), self.parameters[0].device
        self.threshold, self.mean, self.square, self.count = (
            torch.zeros(count, dtype=torch.float64, device=device) for _ in _STATE)

    def _check(self) -> None:
        if not self.parameters or not all(isinstance(p, Tensor) for p in self.parameters):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError("StableClip clips gradients of parameters: pass at least one, "
                              "such as model.parameters()")
        if self.optimizer is not None and not isinstance(self.optimizer, torch.optim.Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"StableClip resets a torch.optim.Optimizer, not a "
                              f"{type(self.optimizer).__name__}")
        devices = {p.device for p in self.parameters}
        if len(devices) != 1:
            raise ConfigError(f"StableClip clips parameters of one device, not of {len(devices)}: "
                              "make one for each")
        if any(type(p.detach()) is not Tensor for p in self.parameters):
            raise ConfigError("StableClip takes plain tensors: norms of sharded ones are not those "
                              "of a shard")
        decays = (self.theta, self.gamma1, self.gamma2)
        if not all(0 <= decay < 1 for decay in decays) or self.reset_every < 1 or self.eps < 0:
            raise ConfigError(f"theta, gamma1, gamma2 = {decays}, reset_every={self.reset_every}, "
                              f"eps={self.eps}: decays are in [0, 1), reset_every at least 1")
        if isinstance(self.optimizer, torch.optim.Adagrad):
            raise ConfigError("Adagrad makes its state once, when it is constructed: StableClip "
                              "cannot reset it; leave the optimizer out")

    @torch.no_grad()
    def step(self) -> None:
        """Clip the gradients that there are; reset the optimizer when it is time.

        Raises ``ConfigError`` for sparse gradients.
        """
        chosen = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        grads = [g for p in self.parameters if (g := p.grad) is not None]
        if any(grad.layout != torch.strided for grad in grads):
            raise ConfigError("StableClip needs dense gradients")
        self.steps += 1
        if grads:
            self._clip(grads, torch.tensor(chosen, device=grads[0].device))
        if self.optimizer is not None and self.steps % self.reset_every == 0:
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    self.optimizer.state.pop(param, None)

    def _clip(self, grads: list[Tensor], chosen: Tensor) -> None:
        """Both, of the parameters that are ``chosen`` (their numbers)."""
        largest = _norms(grads, math.inf)
        finite = largest.isfinite()
        self.count.index_add_(0, chosen, finite.to(torch.float64))
        count = self.count[chosen]
        limit = self._learn(self.threshold, chosen, largest, self.theta, count, finite)
        shrink = torch.where(finite & (largest > limit), limit / largest, 1.0)
        narrow = (x.to(torch.float32).unbind() for x in (limit, shrink))
        for grad, top, factor in zip(grads, *narrow, strict=True):
            grad.mul_(torch.where(grad.abs() > top, factor, 1.0))
        norm = _norms(grads, 2.0)
        mean = self._learn(self.mean, chosen, norm, self.gamma1, count, finite)
        square = self._learn(self.square, chosen, norm.square(), self.gamma2, count, finite)
        usual = mean / (square.sqrt() + self.eps)
        usual = torch.where(finite & (norm > 0), usual / norm, 1.0)
        _TORCH._foreach_mul_(grads, usual.to(torch.float32).unbind())

    def _learn(self, known: Tensor, chosen: Tensor, new: Tensor, decay: float, count: Tensor,
               finite: Tensor) -> Tensor:
        """The average without its bias: x̂ₜ = x̂ₜ₋₁ + (xₜ - x̂ₜ₋₁)·(1-β)/(1-βᵗ)."""
        weight = (1.0 - decay) / (1.0 - decay**count)
        old = known[chosen]
        mean = torch.where(finite, torch.lerp(old, new, weight.clamp(max=1.0)), old)
        known[chosen] = mean
        return mean

    def state_dict(self) -> dict[str, Any]:
        """What ``step`` has learned; tensors are not copied."""
        return {"steps": self.steps, **{name: getattr(self, name) for name in _STATE}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the one that was saved.

        Raises ``ConfigError`` where it clipped another number of parameters.
        """
        for name in _STATE:
            own, saved = getattr(self, name), state[name]
            if own.shape != saved.shape:
                raise ConfigError(f"the loaded state is of {saved.numel()} parameters, here are "
                                  f"{own.numel()}: pass the same ones")
            own.copy_(saved)
        self.steps = state["steps"]


def _norms(grads: list[Tensor], order: float) -> Tensor:
    """float64 [gradients], computed in float32; 0 of an empty one."""
    filled = [grad if grad.numel() else grad.new_zeros(1) for grad in grads]
    norms = _TORCH._foreach_norm(filled, order, dtype=torch.float32)
    return torch.stack(norms).to(torch.float64)
