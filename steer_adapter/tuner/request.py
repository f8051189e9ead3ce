"""What the calls inside a `steering` block ask for.

A request travels with the context of its caller, thread or task, and never on the model: requests that run at the same
time on one model can't disturb each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any, TypeAlias

import torch
from torch import nn

from steer_adapter.errors import ModelError


# In `adapter_names`, PEFT's name for a row without any adapter.
BASE = "__base__"
# Among multipliers by name, that of all other vectors. No adapter can have this name.
OTHERS = ""
Value: TypeAlias = "float | torch.Tensor"


@dataclass(frozen=True, eq=False)
class Request:
    """What a block asks of the vectors of some layers; checked by whoever makes it.

    Attributes:
        layers: the [`SteerLayer`]s that it is for.
        multiplier: a float, one float32 value per row `[B]`, or either of them by name; `None` for the live one.
        names: the vector of each row, or `None` for the active ones in every row.
        prompt_lengths: tokens in the prompt of each row, `[B]` int64.
        copies: how many consecutive rows of the model stand for one row of the caller (beams).
    """

    layers: frozenset[nn.Module]
    multiplier: Value | dict[str, Value] | None = None
    names: tuple[str, ...] | None = None
    prompt_lengths: torch.Tensor | None = None
    copies: int = 1
    _made: dict[object, torch.Tensor] = field(default_factory=dict)

    @property
    def by_row(self) -> bool:
        """Whether the rows of a batch are told apart."""
        values = self.multiplier.values() if isinstance(self.multiplier, dict) else [self.multiplier]
        return self.names is not None or any(isinstance(value, torch.Tensor) for value in values)

    def strength(self, name: str, live: torch.Tensor, rows: int) -> torch.Tensor:
        """The multiplier of a vector: a scalar, or `[rows]`; `live` is the one that holds without a request."""
        value = self._value_of(name)
        if value is None:
            strength = live
        else:
            strength = self.once(
                (name, live.device), lambda: torch.as_tensor(value, dtype=torch.float32).to(live.device)
            )
        if self.names is not None:
            strength = strength * self.once(("rows", name, live.device), lambda: self._rows_of(name).to(live.device))
        return self.by_model_row(strength, rows)

    def value(self, name: str, row: int, live: torch.Tensor) -> torch.Tensor:
        """The multiplier of a vector in one row of the caller, a scalar; `live` without a request."""
        value = self._value_of(name)
        if isinstance(value, torch.Tensor):
            return value[row].detach().cpu()
        return live if value is None else torch.tensor(value)

    def by_model_row(self, values: torch.Tensor, rows: int) -> torch.Tensor:
        """`[B, ...]` as `[rows, ...]`; scalars stay.

        Raises:
            ModelError: the model runs another number of rows.
        """
        if values.ndim == 0 or len(values) == rows:
            return values
        if len(values) * self.copies == rows:
            return values.repeat_interleave(self.copies, dim=0)
        self.check_names(rows)
        raise ModelError(
            f"steering: received values for {len(values)} rows, but the model runs {rows}; expected one for each row "
            "of the batch (with beams, or several sequences a prompt, on a plain transformers model: one for each of "
            "those; packed sequences and continuous batching have no rows of their own)."
        )

    def check_names(self, rows: int) -> None:
        """Raises a ModelError if the model runs another number of rows than there are names."""
        if self.names is not None and rows not in (len(self.names), len(self.names) * self.copies):
            raise ModelError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.names)} and {rows} respectively (with beams, or several sequences a prompt, on a plain "
                "transformers model: a name for each of those; packed sequences and continuous batching have no rows "
                "of their own)."
            )

    def once(self, key: object, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor that was made for this key before, or is made now."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _value_of(self, name: str) -> Value | None:
        values = self.multiplier
        return values.get(name, values.get(OTHERS)) if isinstance(values, dict) else values

    def _rows_of(self, name: str) -> torch.Tensor:
        return torch.tensor([float(name == wanted) for wanted in self.names or ()])


_requests: ContextVar[tuple[Request, ...]] = ContextVar("steering", default=())


def request_for(layer: nn.Module) -> Request | None:
    """The innermost request of this thread or task that is for the layer."""
    for request in reversed(_requests.get()):
        if layer in request.layers:
            return request
    return None


@contextmanager
def requested(request: Request) -> Iterator[None]:
    """Make a request for the calls inside. What it leaves open, an enclosing one for the same layers decides."""
    requests = _requests.get()
    outer = next((outer for outer in reversed(requests) if outer.layers & request.layers), None)
    if outer is not None:
        request = replace(
            request,
            multiplier=_over(outer.multiplier, request.multiplier),
            names=outer.names if request.names is None else request.names,
            prompt_lengths=outer.prompt_lengths if request.prompt_lengths is None else request.prompt_lengths,
            copies=max(outer.copies, request.copies),
        )
    _hand_to_threads()
    token = _requests.set((*requests, request))
    try:
        yield
    finally:
        _requests.reset(token)


def _over(outer: Value | dict[str, Value] | None, inner: Value | dict[str, Value] | None) -> Any:
    """The multipliers of a block inside another: values by name leave those of the other vectors alone."""
    if inner is None:
        return outer
    if outer is None or not isinstance(inner, dict):
        return inner
    return {**(outer if isinstance(outer, dict) else {OTHERS: outer}), **inner}


# A thread does not inherit the context of the one that starts it, and `Thread(target=model.generate, ...)` with a
# streamer is how transformers streams. From the first request on, threads start with those of their starter.

# The workers of these live on and serve other callers.
_POOLS = {"anyio", "concurrent", "multiprocessing"}
_lock = threading.Lock()
_handed = False


def _hand_to_threads() -> None:
    global _handed
    with _lock:
        if not _handed:
            threading.Thread.start = _inheriting(threading.Thread.start)  # type: ignore[method-assign,assignment]
            _handed = True


def _inheriting(start: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    @wraps(start)
    def start_with_requests(thread: threading.Thread) -> None:
        requests = _requests.get()
        origin = getattr(thread, "_target", None) or type(thread)
        if requests and str(getattr(origin, "__module__", "")).partition(".")[0] not in _POOLS:
            thread.run = partial(_run, requests, thread.run)  # type: ignore[method-assign]
        start(thread)

    return start_with_requests


def _run(requests: tuple[Request, ...], run: Callable[[], None]) -> None:
    _requests.set(requests)
    run()
