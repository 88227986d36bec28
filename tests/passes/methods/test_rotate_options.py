"""rotate: queries and keys, bounded blocks at run time, sizes that no Hadamard matrix has."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import scaleprop
from scaleprop.errors import ConfigError
from scaleprop.passes.methods.rotate import RotateChannels
from scaleprop.passes.transforms.transform import full_rotation, hadamard_rotation


class Attending(nn.Module):
    """Attention by SDPA or by hand; with a rotary embedding of queries and keys, or without."""

    def __init__(self, rotary: bool, by_hand: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rotary, self.by_hand = rotary, by_hand
        self.into, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 12)).transpose(1, 2) for t in self.into(x).chunk(3, -1))
        if self.rotary:
            angle = torch.arange(x.shape[1])[:, None] / torch.arange(1, 13)
            q, k = (t * angle.cos() + torch.cat([-t[..., 6:], t[..., :6]], -1) * angle.sin()
                    for t in (q, k))
        if self.by_hand:
            y = torch.softmax(q @ k.transpose(-1, -2) / 12**0.5, -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def compiled(model: nn.Module, x: torch.Tensor, *passes: str) -> scaleprop.CompiledModel:
    return scaleprop.compile(model, (x,), recipe="int8-token", backend="reference", passes=passes,
                             verify=True)


ONLY_KEYS = "rotate{residual=false, values=false, online=false, keys=true}"


@pytest.mark.parametrize("by_hand", [False, True])
def test_queries_and_keys_are_rotated_after_rotary_embeddings(by_hand: bool) -> None:
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    made = compiled(Attending(True, by_hand).eval(), x, ONLY_KEYS).program
    (record,) = made.transforms
    assert len(record.runtime) == 2 and not record.absorbed
    rotated = [node for node in made.module.graph.nodes if "hadamard" in str(node.target)]
    assert len(rotated) == 2 and all(node.args[1] == 12 for node in rotated)


@pytest.mark.parametrize("by_hand", [False, True])
def test_without_rotary_embeddings_parameters_absorb_it(by_hand: bool) -> None:
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    made = compiled(Attending(False, by_hand).eval(), x, ONLY_KEYS).program
    (record,) = made.transforms
    assert not record.runtime and len(record.absorbed) > 0
    refused = compiled(Attending(True, by_hand).eval(), x,
                       ONLY_KEYS.replace("}", ", runtime=false}")).program
    assert "2 operators" in (refused.transforms[0].refused or "")


def test_blocks_bound_what_runs() -> None:
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Linear(48, 8).eval()
    for block, used in ((None, 48), (20, 16), (8, 8), (1000, 48)):
        made = compiled(model, x, "rotate" if block is None else f"rotate{{block={block}}}").program
        (node,) = [node for node in made.module.graph.nodes if "hadamard" in str(node.target)]
        assert node.args[1] == used


@pytest.mark.parametrize("size", [1, 7, 12, 44, 50, 86])
def test_all_channels_are_mixed_whatever_their_number(size: int) -> None:
    q = full_rotation(size, torch.Generator().manual_seed(0)).matrix
    torch.testing.assert_close(q @ q.T, torch.eye(size).double(), rtol=0, atol=1e-12)
    assert float(q.abs().max()) <= (2 / size) ** 0.5 + 1e-12  # an outlier spreads over all
    blocks = hadamard_rotation(size, torch.Generator().manual_seed(0))
    assert blocks.hadamard is not None
    if blocks.hadamard[0] == size:
        assert torch.equal(q, blocks.matrix)
    else:
        assert float(blocks.matrix.abs().max()) > float(q.abs().max())


def test_bad_blocks() -> None:
    with pytest.raises(ConfigError, match="block=0"):
        RotateChannels(block=0)
