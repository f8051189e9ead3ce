"""Ctrl-C and SIGTERM: the step is finished and a checkpoint written before training stops."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy


logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopAtStep(TrainerCallback):
    """Stops a run at the end of the step in which a signal came, with a checkpoint if the run writes any.

    It stops by an exception, so that nobody takes what there is for what was to be: `KeyboardInterrupt` for SIGINT,
    `SystemExit` with the usual code for SIGTERM. A second signal stops at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside; elsewhere than in the main thread they are left alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._stop()
        self.received = number
        logger.warning("%s: stopping at the end of this step; once more to stop at once.", signal.Signals(number).name)

    def _stop(self) -> None:
        raise KeyboardInterrupt if self.received == signal.SIGINT else SystemExit(128 + (self.received or 0))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.received is not None:
            if args.save_strategy == SaveStrategy.NO:
                self._stop()
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.received is not None:
            logger.warning("Stopped at step %d. Resume with resume_from_checkpoint.", state.global_step)
            self._stop()
