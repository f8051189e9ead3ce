"""A DPOTrainer for adapters of which everything below a layer is frozen: it runs the layers above alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .forward import PairForward
from .prefix_cache import REFERENCE_COLUMNS, Batch, PrefixCache
from .safe_trainer import SafeTrainer
from .shared_states import SharedStates
from .shortcut import prefix_cache, share_prompts


class PrefixTrainer(SafeTrainer):
    """
    See [`~trl.DPOTrainer`]. While `train` runs, batches go through a [`PrefixCache`] where that is exact.

    Attributes:
        pair_forward: what runs for preference batches, or None for a model that it can't serve. Set by the subclass.
        prefix_cache: the cache, while `train` runs with one.
        shared_states: of a trainer that shares its pass over the data with others; closed by whoever made it.
    """

    pair_forward: PairForward | None = None
    prefix_cache: PrefixCache | None = None
    shared_states: SharedStates | None = None
    adapter_name: str
    precompute_ref_logps: bool

    def train_above(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Train, by way of the cache where that is exact. `model` is the transformers model below all adapters."""
        share_prompts(self, model)
        states = self.shared_states or SharedStates()
        try:
            self.prefix_cache = prefix_cache(self, model, states)
            return super().train(*args, **kwargs)
        finally:
            if self.prefix_cache is not None:
                self.prefix_cache.close()
                self.prefix_cache = None
            if self.shared_states is None:
                states.close()

    def reference_log_probs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Of chosen and rejected, `[B]` each, by a forward with the vector off."""
        return self.compute_ref_log_probs(self.model, batch)

    @contextmanager
    def _above(self, inputs: Batch) -> Iterator[Batch]:
        if self.prefix_cache is None:
            yield inputs
            return
        inputs = self._prepare_inputs(inputs)
        self.prefix_cache.ensure(inputs)
        with self.prefix_cache.replaying():
            yield self.prefix_cache.with_reference(inputs)

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Held through the backward pass: gradient checkpointing runs layers again in there.
        with self._above(inputs) as inputs:
            return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        if not prediction_loss_only:  # logits of whole texts are asked for
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with self._above(inputs) as inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        own = self.precompute_ref_logps
        self.precompute_ref_logps = all(column in inputs for column in REFERENCE_COLUMNS)
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.precompute_ref_logps = own
