"""Random bits by counting: the number of an element is a function of where it is, not of when.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
turns a 128-bit counter and a 64-bit key into 128 random bits. Here the key is (seed, stream), and
the counter says column, group of rows, step and width. So a run repeats whatever the batch order,
a resumed one goes on as if it had not stopped, and ranks that hold slices of a matrix draw slices
of its numbers: none has a state.

One call serves a group of neighbouring rows, as many as 128 bits have numbers. Rows and not
columns: neighbouring columns, which CPUs and GPUs work on together, then have counters of their
own, and lie together in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scaleprop.errors import FormatError

MAX_WIDTH = 31  # numbers are int32
MAX_STEP = 1 << 60  # the four bits above keep widths apart
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_SIGNS, _WIDTHS = 0, {8: 1, 16: 2, 32: 3}  # what the counter's topmost bits say


def philox(counter: Sequence[Tensor], key: tuple[int, int | Tensor]) -> list[Tensor]:
    """Four words of 32 random bits, int64, of four words of a counter and two of a key.

    Words are in 0..2^32-1; the counter's broadcast against each other. Products of two words wrap
    around in int64, to the same 64 bits; of the second and the fourth word only the low 32 are
    right between rounds.
    """
    a, b, c, d = counter
    for step in range(_ROUNDS):
        # of sums that pass 32 bits the rest is cut off below
        first, second = (word + step * weyl for word, weyl in zip(key, _WEYL, strict=True))
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = ((right >> 32) ^ b ^ first) & _WORD, right
        c, d = ((left >> 32) ^ d ^ second) & _WORD, left
    return [a, b & _WORD, c, d & _WORD]


def random_bits(shape: Sequence[Any], seed: int, stream: Tensor | int, step: Tensor | int,
                bits: int, first: tuple[Any, Any] = (0, 0),
                device: torch.device | str | None = None) -> Tensor:
    """int32 [rows, columns], uniform on 0..2^bits-1: one number an element.

    The number of element (r, c) is a function of seed, stream, step, bits, first[0] + r and
    first[1] + c alone: whoever draws a slice passes where it begins. seed, stream: 0..2^32-1;
    nodes that must not share numbers have streams of their own. step: 0..2^60-1, an int, or int64
    of one element, which a graph reads when it runs; stream too. device: of the result; step's by
    default.

    Numbers of the same width class (up to 8, 16, 32 bits) are the low bits of the same ones.

    Raises:
        FormatError: for a seed, stream, step, width or shape that is none of these.
    """
    _check(shape, seed, stream, bits, first)
    width = 8 if bits <= 8 else 16 if bits <= 16 else 32
    group = 128 // width
    rows, columns = shape
    start = first[0] // group
    groups = (first[0] + rows + group - 1) // group - start
    counted = _step(step, _WIDTHS[width], device)
    if isinstance(stream, Tensor):
        stream = stream.reshape(())
    words = _words((groups, columns), (start, first[1]), counted, (seed, stream))
    numbers = _split(words, width, bits).reshape(groups * group, columns)
    skipped = first[0] - start * group
    return numbers[skipped : skipped + rows]


def random_signs(size: int, seed: int, stream: int, step: Tensor | int,
                 device: torch.device | str | None = None) -> Tensor:
    """float32 [size] of ±1, each as likely. Arguments as in ``random_bits``, whose numbers these
    do not depend on even for the same seed, stream and step.

    Raises:
        FormatError: as ``random_bits``.
    """
    _check((1, size), seed, stream, 1, (0, 0))
    counted = _step(step, _SIGNS, device)
    column = torch.arange(size, device=counted[0].device)
    words = philox([counted[0], column, counted[1], torch.zeros_like(column)], (seed, stream))
    return 1.0 - 2.0 * (words[0] & 1).to(torch.float32)


def _words(shape: tuple[Any, Any], first: tuple[Any, Any], counted: tuple[Tensor, Tensor],
           key: tuple[int, int | Tensor]) -> Tensor:
    """int32 [groups, 4, columns]: the words of a counter for each column of each group of rows.

    Rows and columns are the words that the first round does not multiply: Inductor would make
    index arithmetic of that, whose steps are 32 bits wide.
    """
    group = torch.arange(shape[0], device=counted[0].device).unsqueeze(1) + first[0]
    column = torch.arange(shape[1], device=counted[0].device) + first[1]
    drawn = [word.to(torch.int32) for word in philox([counted[0], column, counted[1], group], key)]
    return _in_memory(torch.stack(drawn, 1))


def _in_memory(words: Tensor) -> Tensor:
    """The same, as a buffer: fused into what reads them, all rounds would be computed once for
    each of the numbers in a word. Inductor does not fuse through ``as_strided``."""
    return words.as_strided(words.shape, words.stride())


def _split(words: Tensor, width: int, bits: int) -> Tensor:
    """[groups, 4, numbers in a word, columns]: ``bits`` low bits of each ``width`` of a word."""
    mask = (1 << bits) - 1
    if width == 32:
        return (words & mask).unsqueeze(2)
    shift = torch.arange(0, 32, width, dtype=torch.int32, device=words.device).unsqueeze(1)
    return (words.unsqueeze(2) >> shift) & mask


def _step(step: Tensor | int, kind: int,
          device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """The first and the third word of the counter: the step, and in its topmost bits the kind."""
    if isinstance(step, Tensor):
        if step.dtype != torch.int64 or step.numel() != 1:
            raise FormatError(f"step is {step.dtype} {list(step.shape)}: pass one int64")
        counted = step.reshape(()) if device is None else step.reshape(()).to(device)
    elif 0 <= step < MAX_STEP:
        counted = torch.full((), step, dtype=torch.int64, device=device)
    else:
        raise FormatError(f"step {step} is not in 0..2^60-1")
    return counted & _WORD, ((counted >> 32) & (_WORD >> 4)) | (kind << 28)


def _check(shape: Sequence[Any], seed: int, stream: Tensor | int, bits: int,
           first: tuple[Any, Any]) -> None:
    for name, value in (("seed", seed), ("stream", stream)):
        if isinstance(value, Tensor):
            if value.dtype != torch.int64 or value.numel() != 1:
                raise FormatError(f"{name} is {value.dtype} {list(value.shape)}: pass one int64")
        elif not 0 <= value <= _WORD:
            raise FormatError(f"{name} {value} is not in 0..2^32-1: take its low 32 bits")
    if not 1 <= bits <= MAX_WIDTH:
        raise FormatError(f"{bits} random bits: a number has 1 to {MAX_WIDTH}")
    if len(shape) != 2 or len(first) != 2:
        raise FormatError(f"shape {list(shape)}, first {list(first)}: both are of two axes, rows "
                          "and columns; reshape others to that")
    for size in (*shape, *first):
        if isinstance(size, int) and not 0 <= size <= _WORD:
            raise FormatError(f"shape {list(shape)}, first {list(first)}: sizes and offsets lie "
                              "in 0..2^32-1")
