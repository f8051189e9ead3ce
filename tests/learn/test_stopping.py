from __future__ import annotations

import os
import signal
import threading

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from steer_adapter.learn.stopping import StopAtStep


def arguments(tmp_path, strategy: str) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), save_strategy=strategy, use_cpu=True, report_to="none")


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_after_the_checkpoint(tmp_path, number, error):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    stop, control, args = StopAtStep(), TrainerControl(), arguments(tmp_path, "steps")
    with pytest.raises(error), stop.listening():
        stop.on_step_end(args, TrainerState(), control)
        assert not control.should_save
        os.kill(os.getpid(), number)
        stop.on_step_end(args, TrainerState(), control)
        assert control.should_save
        stop.on_save(args, TrainerState(), control)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_without_checkpoints_at_the_end_of_the_step(tmp_path):
    stop = StopAtStep()
    with pytest.raises(SystemExit) as info, stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        stop.on_step_end(arguments(tmp_path, "no"), TrainerState(), TrainerControl())
    assert info.value.code == 143


def test_a_second_signal_stops_at_once():
    with pytest.raises(KeyboardInterrupt), StopAtStep().listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_in_another_thread_signals_are_left_alone():
    def run() -> None:
        with StopAtStep().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    seen: list = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
