"""Layouts that library products want: one function each, and its inverse."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS, _COLUMNS = 128, 4  # scales in a tile
_TILES = 4  # scales of 128×128 lie in groups of so many


def swizzled(scales: Tensor) -> Tensor:
    """Block scales [R, C] in tiles of 128 rows and 4 columns, flat, as cuBLASLt reads them.

    A tile is 512 bytes; what is missing in the last ones is 0. In a tile, four strips of 32 rows
    lie side by side, so that 16 neighbours are the scales of rows i, i+32, i+64 and i+96:

        byte     0 .. 3       4 .. 7       8 .. 11      12 .. 15
               row 0        row 32       row 64       row 96        columns 0..3 of each
        16..   row 1        row 33       row 65       row 97
        ...
        496..  row 31       row 63       row 95       row 127

    Tiles follow each other along the columns, then along the rows. (NVIDIA, cuBLAS documentation,
    "1D Block Scaling Factors Layout"; torch calls it SWIZZLE_32_4_4.)
    """
    rows, columns = scales.shape
    padded = torch.nn.functional.pad(scales.view(torch.uint8),
                                     (0, -columns % _COLUMNS, 0, -rows % _ROWS))
    tiles = padded.reshape(-(-rows // _ROWS), 4, 32, -(-columns // _COLUMNS), _COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scales.dtype)


def unswizzled(flat: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of ``swizzled``: [rows, columns]."""
    tiles = flat.view(torch.uint8).reshape(-(-rows // _ROWS), -(-columns // _COLUMNS), 32, 4,
                                           _COLUMNS)
    grid = tiles.permute(0, 3, 2, 1, 4).reshape(-(-rows // _ROWS) * _ROWS, -1)
    return grid[:rows, :columns].contiguous().view(flat.dtype)


def columns_first(scales: Tensor) -> Tensor:
    """Scales of 1×128 blocks [R, C], the same, as the library reads them: neighbours in memory are
    of neighbouring rows.

        s[0,0] s[1,0] … s[R-1,0] | s[0,1] s[1,1] … s[R-1,1] | …        strides (1, R)
    """
    strides = 1, max(len(scales), 1)  # also of one row, which counts as contiguous any way
    return torch.empty_strided(scales.shape, strides, dtype=scales.dtype,
                               device=scales.device).copy_(scales)


def padded_tiles(scales: Tensor) -> Tensor:
    """Scales of 128×128 tiles [R, C] as the library reads them: [⌈C/4⌉·4, R], a column for each row
    of tiles, filled up with 0.

        s[0,0] s[0,1] … s[0,C-1] 0 0 | s[1,0] s[1,1] … s[1,C-1] 0 0 | …     strides (1, ⌈C/4⌉·4)
    """
    return torch.nn.functional.pad(scales, (0, -scales.shape[1] % _TILES)).t()
