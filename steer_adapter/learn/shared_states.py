"""Recorded states of several layers, for trainers that run one after the other on the same model."""

from __future__ import annotations

from collections.abc import Iterable

from .cache import StateCache


class SharedStates:
    """
    A cache for each number of frozen layers.

    Args:
        depths: how many layers are frozen for each of the trainers that will use it. The first one's pass over the
            data records them all.

    Attributes:
        caches: those that are open, by number of layers.
        exact: what the first trainer found: why prompts are not shared, and which shortcuts are exact.
    """

    def __init__(self, depths: Iterable[int] = ()) -> None:
        self.depths = tuple(depths)
        self.exact: tuple[str | None, bool, bool, bool] | None = None
        self.caches: dict[int, StateCache] = {}

    def close(self) -> None:
        """Write what is to be kept, and remove what is not."""
        for cache in self.caches.values():
            cache.close()
        self.caches.clear()
