"""Which channels are one: a union of signed codes, all at once."""

from __future__ import annotations

import numpy as np

from scaleprop.rules.channels import Codes


class ChannelSet:
    """``count`` channels, some of which have turned out to carry the same transform.

    A code is ``2·channel``, or ``2·channel + 1`` for its inverse; joining a code with another joins
    their inverses too. A channel that is joined with its own inverse is *pinned*: nothing but the
    identity can pass there.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._labels = np.arange(2 * count, dtype=np.int64)  # code → the least code of its class

    def canonical(self, codes: Codes) -> Codes:
        """The least equal code of each; −1 stays."""
        return np.where(codes < 0, codes, self._labels[np.maximum(codes, 0)])

    def join(self, left: Codes, right: Codes) -> bool:
        """Make ``left[i]`` and ``right[i]`` equal, and their inverses; whether that was new."""
        new = False
        for a, b in ((left, right), (left ^ 1, right ^ 1)):
            while True:
                first, second = self._labels[a], self._labels[b]
                if bool((first == second).all()):
                    break
                new = True
                low, high = np.minimum(first, second), np.maximum(first, second)
                np.minimum.at(self._labels, high, low)
                self._flatten()
        return new

    def _flatten(self) -> None:
        while True:
            further = self._labels[self._labels]
            if bool((further == self._labels).all()):
                return
            self._labels = further

    @property
    def pinned(self) -> Codes:
        """[count] bool: channels that must stay as they are."""
        return self._labels[0::2] == self._labels[1::2]

    @property
    def representative(self) -> tuple[Codes, Codes]:
        """[count] each: the channel that stands for each one's class; whether by its inverse."""
        codes = self._labels[0::2]
        return codes >> 1, codes & 1
