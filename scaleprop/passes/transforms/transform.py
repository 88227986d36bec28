"""Transforms of channels, each with its inverse in closed form.

For a row vector v of the channels of one block:

    Scale      v·diag(d)              inverse  diag(1/d)
    Shift      v − z                  inverse  v + z
    Permute    v[order]               inverse  v[argsort(order)]
    Rotate     v·Q, Q·Qᵀ = I          inverse  v·Qᵀ; Hadamard, Givens pairs and products of both
    Centre     v − mean(v)            none: for what only norms that subtract the mean read

What a contraction sums over takes the inverse transpose on its other side, so that
(v·T)·(w·T⁻ᵀ)ᵀ = v·wᵀ; of a rotation and of a permutation that is the transform itself.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from scaleprop.errors import ConfigError
from scaleprop.ops.hadamard import hadamard, hadamard_sizes
from scaleprop.rules.channels import Kind


@dataclasses.dataclass(frozen=True, eq=False)
class Scale:
    """v·d: ``values`` [channels] float64, finite and not 0.

    inverse_values: what the other side of a contraction is multiplied with; 1/values by default.
    """

    values: Tensor
    inverse_values: Tensor | None = None

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for factors that have no inverse."""
        if not bool((self.values.isfinite() & (self.values != 0)).all()):
            raise ConfigError("a scale of channels must be finite and not 0, everywhere")

    @property
    def kind(self) -> Kind:
        """Signs need other rules than positive factors."""
        return "scale" if bool((self.values > 0).all()) else "sign"

    @property
    def other(self) -> Tensor:
        """The inverse's factors."""
        return 1.0 / self.values if self.inverse_values is None else self.inverse_values

    def inverse(self) -> Scale:
        """v / d."""
        return Scale(self.other, self.values)


@dataclasses.dataclass(frozen=True, eq=False)
class Shift:
    """v − z: ``values`` [channels] float64."""

    values: Tensor

    kind: Kind = dataclasses.field(default="shift", init=False)

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for NaN or Inf."""
        if not bool(self.values.isfinite().all()):
            raise ConfigError("a shift of channels must be finite")

    def inverse(self) -> Shift:
        """v + z."""
        return Shift(-self.values)


@dataclasses.dataclass(frozen=True, eq=False)
class Permute:
    """v[order] within each block: ``order`` [blocks, n] int64, or [n] for all alike."""

    order: Tensor

    kind: Kind = dataclasses.field(default="permute", init=False)

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` where ``order`` is no permutation."""
        rows = self.order.reshape(-1, self.order.shape[-1])
        if not bool((rows.sort(-1).values == torch.arange(rows.shape[1])).all()):
            raise ConfigError("an order of channels must name each once")

    @property
    def block(self) -> int:
        """n: how many channels are mixed with each other."""
        return self.order.shape[-1]

    def inverse(self) -> Permute:
        """The order that brings everything back."""
        return Permute(self.order.argsort(-1))


@dataclasses.dataclass(frozen=True, eq=False)
class Rotate:
    """v·Q within each block: ``matrix`` [n, n] for all blocks, or [blocks, n, n]; float64.

    hadamard: (block, signs or None) where Q = diag(signs)·(I ⊗ H/√block), which runs fast.
    givens: the rounds of pairs that Q is made of, which run fast where blocks are large.
    """

    matrix: Tensor
    hadamard: tuple[int, Tensor | None] | None = None
    givens: GivensRounds | None = None

    kind: Kind = dataclasses.field(default="rotate", init=False)

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` where Q·Qᵀ is not I to 1e-9."""
        wide = self.matrix.double()
        error = (wide @ wide.mT - torch.eye(wide.shape[-1], dtype=torch.float64)).abs().max()
        if not float(error) < 1e-9:
            raise ConfigError(f"a rotation must be orthogonal; Q·Qᵀ differs from I by {error:.2g}")

    @property
    def block(self) -> int:
        """n: how many channels are mixed with each other."""
        return self.matrix.shape[-1]

    @property
    def is_shared(self) -> bool:
        """Whether all blocks have the same matrix."""
        return self.matrix.ndim == 2

    def inverse(self) -> Rotate:
        """v·Qᵀ."""
        return Rotate(self.matrix.mT, givens=self.givens and self.givens.inverse())

    def then(self, other: Rotate) -> Rotate:
        """First this, then ``other``: v·Q·R."""
        return Rotate(self.matrix @ other.matrix)


@dataclasses.dataclass(frozen=True, eq=False)
class Centre:
    """v − mean(v) within each block of ``block`` channels."""

    block: int

    kind: Kind = dataclasses.field(default="centre", init=False)


Transform = Scale | Shift | Permute | Rotate | Centre


def hadamard_rotation(size: int, generator: torch.Generator | None = None,
                      block: int | None = None) -> Rotate:
    """diag(s)·(I ⊗ H/√b): random signs (none without ``generator``), b the largest size of a
    Hadamard matrix that divides ``size`` (or ``block``).

    Raises:
        ConfigError: where ``block`` is no such size.
    """
    sizes = [b for b in hadamard_sizes(size) if size % b == 0]
    chosen = max(sizes) if block is None else block
    if chosen not in sizes:
        raise ConfigError(f"no Hadamard matrix of size {chosen} divides {size}; use one of {sizes}")
    signs = None
    if generator is not None:
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    rows = hadamard(torch.eye(size, dtype=torch.float64), chosen, signs)
    return Rotate(rows, (chosen, signs))


def full_rotation(size: int, generator: torch.Generator) -> Rotate:
    """diag(s)·(C ⊗ H/√b): mixes all channels, whatever their number: H as in ``hadamard_rotation``,
    C of the rest, m = size/b, is Hartley's, C[i, j] = (cos + sin)(2π·i·j/m)/√m.

    As flat as can be had for any m: |C| ≤ √(2/m) (R. Bracewell, The Fast Hartley Transform, Proc.
    IEEE 72, 1984).
    """
    blocks = hadamard_rotation(size, generator)
    assert blocks.hadamard is not None
    block, signs = blocks.hadamard
    rest = size // block
    if rest == 1:
        return blocks
    index = torch.arange(rest)
    angle = (index[:, None] * index % rest).double() * (2 * torch.pi / rest)
    hartley = (angle.cos() + angle.sin()) / rest**0.5
    inner = hadamard(torch.eye(block, dtype=torch.float64), block)
    mixed = torch.kron(hartley, inner)
    return Rotate(mixed if signs is None else signs[:, None] * mixed)


def random_rotation(size: int, generator: torch.Generator) -> Rotate:
    """Uniform (Haar) on the orthogonal group: the Q of a Gaussian matrix, signs of R fixed."""
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return Rotate(q * r.diagonal().sign())


@dataclasses.dataclass(frozen=True, eq=False)
class GivensRounds:
    """Rounds of rotations of disjoint pairs: v·cos + v[partner]·sin, one after the other.

    partner: [rounds, K] int64, itself where a channel rests. angle: [rounds, K]: −θ for the first
    of a pair, θ for the second, so that (a, b) → (a·cos θ − b·sin θ, a·sin θ + b·cos θ).
    """

    partner: Tensor
    angle: Tensor

    @classmethod
    def of(cls, size: int, pairs: Tensor, angles: Tensor) -> GivensRounds:
        """pairs: [rounds, m, 2] int64. angles: [rounds, m], differentiable.

        Raises:
            ConfigError: where a round has a channel twice.
        """
        flat = pairs.flatten(1)
        if flat.numel() and not bool((flat.sort(1).values.diff(dim=1) > 0).all()):
            raise ConfigError("the pairs of a round of Givens rotations must be disjoint")
        rest = torch.arange(size).repeat(len(pairs), 1)
        partner = rest.scatter(1, flat, pairs.flip(2).flatten(1))
        signed = torch.stack([-angles, angles], 2).flatten(1)
        angle = torch.zeros(len(pairs), size, dtype=angles.dtype).scatter(1, flat, signed)
        return cls(partner, angle)

    def __call__(self, v: Tensor) -> Tensor:
        """v·Q: [..., K]."""
        for partner, angle in zip(self.partner, self.angle, strict=True):
            v = v * angle.cos() + v[..., partner] * angle.sin()
        return v

    def inverse(self) -> GivensRounds:
        """Back, last round first."""
        return GivensRounds(self.partner.flip(0), -self.angle.flip(0))


def givens_rotation(
    size: int, pairs: Tensor, angles: Tensor, block: int | None = None
) -> Rotate:
    """The rotation that these rounds make; arguments as in ``GivensRounds.of``.

    block: pairs lie within consecutive blocks of so many channels; None: anywhere.

    Raises:
        ConfigError: where a round has a channel twice, or a pair is of two blocks.
    """
    whole = block or size
    if bool((pairs // whole)[..., 0].ne((pairs // whole)[..., 1]).any()):
        raise ConfigError(f"a pair of channels is not within one block of {whole}")
    rounds = GivensRounds.of(size, pairs, angles.double())
    rows = rounds(torch.eye(whole, dtype=torch.float64).repeat(1, size // whole))
    matrices = rows.unflatten(1, (-1, whole)).movedim(1, 0)
    return Rotate(matrices[0] if len(matrices) == 1 else matrices, givens=rounds)


def largest_hadamard(size: int) -> int:
    """The largest size of a Hadamard matrix that divides ``size``."""
    return max(b for b in hadamard_sizes(size) if size % b == 0)


