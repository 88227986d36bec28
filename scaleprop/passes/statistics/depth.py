"""How a signal fares through depth: findings with the literature's advice, never a change."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop.errors import source_line
from scaleprop.passes.statistics.measure import Run
from scaleprop.passes.statistics.structure import Residual, Structure, is_softmax, stream
from scaleprop.report.scales import Finding
from scaleprop.rules import contraction_of
from scaleprop.rules.moments import limit

# A stream whose variance grows by more than this has late blocks that add little to it: in a
# pre-norm model of depth L it grows as L at initialisation, so 16 is a depth that trains without
# help (GPT-2's smallest has 24 sums), and each later sum adds below a sixteenth.
GROWTH = 16.0
# A branch below this share of its sum's variance hardly changes it: its block is near the identity.
FADED = 0.01
# Entropy of attention rows, as a share of a uniform row's. Zhai et al. see divergence when it goes
# to 0; a row with half of its weight on 1 of 64 keys, and the rest spread, has 0.66; a tenth is one
# key with 95 % of it.
COLLAPSED = 0.1

_PRE_NORM = ("LayerNorm scaling multiplies a norm's output in block l by 1/√l (Sun et al. 2025, "
             "The Curse of Depth in Large Language Models, arXiv:2502.05795); peri-LN also "
             "normalises what a branch returns (Kim et al. 2025, Peri-LN, arXiv:2502.02732); "
             "residual scaling multiplies branches by 1/√(2L) (Radford et al. 2019, GPT-2; Yang et "
             "al. 2023, Depth-µP, arXiv:2310.02244)")
_ENTROPY = ("QK-norm normalises queries and keys (Henry et al. 2020, arXiv:2010.04245; Dehghani et "
            "al. 2023, ViT-22B, arXiv:2302.05442); σReparam bounds their weights' spectral norm "
            "(Zhai et al. 2023, Stabilizing Transformer Training by Preventing Attention Entropy "
            "Collapse, arXiv:2303.06296)")
_PLACED = {
    "pre": "the stream is never normalised: its variance grows with depth. " + _PRE_NORM,
    "post": "gradients are large near the output at initialisation: use warm-up, or pre-norm "
            "(Xiong et al. 2020, On Layer Normalization in the Transformer Architecture, "
            "arXiv:2002.04745), or DeepNorm (Wang et al. 2022, DeepNet, arXiv:2203.00555)",
    "pre and branch": "peri-LN: variance grows linearly at most, gradients are bounded (Kim et al. "
                      "2025, Peri-LN, arXiv:2502.02732)",
    "branch": "each branch adds a variance that its norm's gain sets (Liu et al. 2022, Swin "
              "Transformer V2, arXiv:2111.09883)",
    "none": "branches without norms double the variance per block unless they start small: scale "
            "them by 1/√L or start them at 0 (Zhang et al. 2019, Fixup, arXiv:1901.09321; De & "
            "Smith 2020, SkipInit, arXiv:2002.10444)",
}


def attention_entropy(
    node: torch.fx.Node, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[float, ...] | None:
    """Per head, the mean entropy of attention's rows, as a share of a uniform row's.

    Of a softmax's own result; of an attention operator from its q, k and mask, since no kernel
    returns weights. Rows with fewer than two keys have none. None for other operators.
    """
    contraction = contraction_of(node)
    if contraction is not None and contraction.kind == "attention":
        return _entropy(_scores(node, args, kwargs))
    if not is_softmax(node) or value.ndim < 3:
        return None
    scores, dim, *_ = args
    return _entropy(_unmasked(scores)) if dim in (-1, value.ndim - 1) else None


def _unmasked(scores: torch.Tensor) -> torch.Tensor:
    """The same in float64, −∞ in place of what stands for it."""
    hidden = scores <= -limit(scores.dtype)
    return scores.double().masked_fill(hidden, -math.inf)


def _scores(
    node: torch.fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """q·kᵀ·scale + mask, float64."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    q, k = given["query"].double(), given["key"].double()
    if q.shape[-3] != k.shape[-3]:  # queries share keys
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scores = q @ k.mT * (given.get("scale") or q.shape[-1] ** -0.5)
    mask = given.get("attn_mask", given.get("attn_bias"))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool \
            else scores + _unmasked(mask)
    if given.get("is_causal"):
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(ones.triu(1), -math.inf)
    return scores


def _entropy(scores: torch.Tensor) -> tuple[float, ...] | None:
    """[…, heads, rows, keys] → one figure per head."""
    keys = (scores > -math.inf).sum(-1)
    entropy = torch.special.entr(scores.softmax(-1).nan_to_num(0.0)).sum(-1)
    counted = keys > 1
    share = torch.where(counted, entropy / keys.clamp_min(2).double().log(), 0.0)
    if scores.ndim < 4:
        return (float(share.sum() / counted.sum()),) if bool(counted.any()) else None
    order = [axis for axis in range(share.ndim) if axis != share.ndim - 2]
    total, number = share.sum(order), counted.sum(order)
    return tuple((total[number > 0] / number[number > 0]).tolist()) or None


def findings(
    graph: torch.fx.Graph, run: Run, parameters: Mapping[torch.fx.Node, Any]
) -> tuple[Finding, ...]:
    """What there is to say of the residual stream, its norms, and attention."""
    structure = Structure(graph, parameters, run.backward)
    residuals = structure.residuals()
    chains = stream(residuals, structure)
    longest = max(chains, key=len, default=[])
    found = [*_growth(longest, run), *_placement(residuals)]
    weighted = {*structure.attention_weights(), *structure.attentions()}
    found += _collapse([(node, entropy) for node, entropy in run.extra.items() if node in weighted])
    return tuple(found)


def _growth(chain: Sequence[Residual], run: Run) -> list[Finding]:
    """Variance of the stream after each of its sums, and each branch's share."""
    if not chain or any(node not in run.measured for r in chain for node in (r.total, r.branch)):
        return []
    start = _variance(run, chain[0].skip)
    stream_ = [start, *(_variance(run, r.total) for r in chain)]
    shares = [_variance(run, r.branch) / max(_variance(run, r.total), 1e-300) for r in chain]
    growth = stream_[-1] / max(start, 1e-300)
    faded = [r for r, share in zip(chain, shares, strict=True) if share < FADED]
    where = tuple(source_line(r.total) for r in chain)
    result = [Finding(
        name="residual-growth", warning=growth > GROWTH,
        message=f"the stream's variance is {growth:.3g}× after {len(chain)} residual sums "
                f"({start:.3g} → {stream_[-1]:.3g}); more than {GROWTH:g}× is reported",
        figures={"variance": tuple(stream_), "branch_share": tuple(shares)},
        advice=_PRE_NORM, where=where)]
    if faded:
        result.append(Finding(
            name="fading-blocks", warning=True,
            message=f"{len(faded)} of {len(chain)} branches make less than {FADED:.0%} of the "
                    "variance of the stream they add to: they hardly change it",
            figures={"branch_share": tuple(shares)}, advice=_PRE_NORM,
            where=tuple(source_line(r.total) for r in faded)))
    return result


def _variance(run: Run, node: torch.fx.Node) -> float:
    seen = run.measured[node]
    return max(seen.rms**2 - seen.mean**2, 0.0)


def _placement(residuals: Sequence[Residual]) -> list[Finding]:
    """Where norms are, by how many sums have them there."""
    counts = Counter(residual.placement for residual in residuals)
    return [Finding(
        name="norm-placement", warning=placement == "none",
        message=f"{count} of {len(residuals)} residual branches: norm placement {placement!r}",
        figures={"branches": (float(count), float(len(residuals)))}, advice=_PLACED[placement],
        where=tuple(source_line(r.total) for r in residuals if r.placement == placement))
        for placement, count in counts.most_common()]


def _collapse(found: Sequence[tuple[torch.fx.Node, tuple[float, ...]]]) -> list[Finding]:
    """Heads whose rows look at one key."""
    if not found:
        return []
    every = [share for _, shares in found for share in shares]
    low = [(node, share) for node, shares in found for share in shares if share < COLLAPSED]
    return [Finding(
        name="attention-entropy", warning=bool(low),
        message=f"entropy of attention rows, ÷ a uniform row's: {min(every):.3g} to "
                f"{max(every):.3g} over {len(every)} heads; {len(low)} below {COLLAPSED:g}",
        figures={"by_head": tuple(every)}, advice=_ENTROPY,
        where=tuple(dict.fromkeys(source_line(node) for node, _ in low or found)))]
