"""A DPOTrainer that loses no work: whole checkpoints, orderly stops, and an error where training diverges."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import rotate_checkpoints
from trl import DPOTrainer

from steer_adapter.errors import DivergenceError

from .checkpoints import STATE, last_complete, written_beside
from .prefix_cache import keys_of, one_pair
from .stopping import StopAtStep


logger = logging.getLogger(__name__)
EXPLODED = 100.0  # times the first loss of a run, or 1


class SafeTrainer(DPOTrainer):
    """See [`~trl.DPOTrainer`]. `resume_from_checkpoint` takes a folder, or True or `"last"` for the last whole one."""

    _largest_loss: float | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint in (True, "last"):
            found = last_complete(Path(self.args.output_dir))
            if found is None:
                logger.warning("%s: there is no checkpoint to resume from; starting anew.", self.args.output_dir)
            resume_from_checkpoint = None if found is None else str(found)
        self._largest_loss = None
        stop = StopAtStep()
        self.add_callback(stop)
        try:
            with stop.listening():
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.remove_callback(stop)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, name = Path(super()._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        with written_beside(folder, name, self.args.should_save) as beside:
            self._checkpoint_folder = str(beside)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                del self._checkpoint_folder
            if self.state.best_model_checkpoint == str(beside / name):
                self.state.best_model_checkpoint = str(folder / name)
                if self.args.should_save:
                    self.state.save_to_json(str(beside / name / STATE))
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(
                str(folder), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def _get_output_dir(self, trial: Any) -> str:
        return getattr(self, "_checkpoint_folder", None) or super()._get_output_dir(trial)

    def training_step(self, model: nn.Module, inputs: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(model, inputs, *args, **kwargs)
        value = float(loss) * self.current_gradient_accumulation_steps
        if self._largest_loss is None:
            self._largest_loss = EXPLODED * max(abs(value), 1.0)
        if not abs(value) <= self._largest_loss or not self._gradient_is_finite():
            raise DivergenceError(self._divergence(value, inputs))
        return loss

    def _gradient_is_finite(self) -> bool:
        gradients = [p.grad for p in self.model.parameters() if p.requires_grad and p.grad is not None]
        return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)

    def _divergence(self, value: float, inputs: Mapping[str, torch.Tensor]) -> str:
        what = "a gradient that is not finite" if math.isfinite(value) else "a loss that is not finite"
        if math.isfinite(value) and self._largest_loss is not None and abs(value) > self._largest_loss:
            what = f"a loss of {value:.4g}, {EXPLODED:.0f} times what it began with"
        last = last_complete(Path(self.args.output_dir))
        return (
            f"Training diverged at step {self.state.global_step + 1}: {what}, in a batch of {self._rows(inputs)}. The "
            f"last good checkpoint is {last or 'none'}. Look at the rows, or train with a lower learning rate."
        )

    def _rows(self, inputs: Mapping[str, torch.Tensor]) -> str:
        """Where the pairs of a batch stand in the training data, from 1."""
        if not hasattr(self.train_dataset, "__len__"):
            return "a stream of pairs"
        count = len(inputs["input_ids"]) // 2
        wanted = {key for index in range(count) for key in keys_of(one_pair(inputs, index))}
        found = [
            str(number)
            for number, row in enumerate(self.train_dataset, start=1)
            if wanted & set(keys_of(self.data_collator([row])))
        ]
        return f"rows {', '.join(found)} of the training data" if found else "pairs that are not in the training data"
