"""What memory and disk a run needs, from the model's config and the lengths of the pairs alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from steer_adapter.decoder import find_decoder
from steer_adapter.errors import ModelError
from steer_adapter.shapes import text_config
from steer_adapter.tuner import SteerConfig

from .head import CHUNK


PROBE_TOKENS = 37  # a number that no width of a model is likely to have
REFERENCE_BYTES = 16  # two float64 a pair


@dataclass(frozen=True)
class Shape:
    """Of a model with vectors, in bytes, in its dtype.

    Attributes:
        weights: all parameters.
        layer: the parameters of the largest decoder layer.
        outside: the parameters outside the decoder layers: embeddings, head.
        above: what a token's activations above the first steered layer take, kept for the backward pass.
        working: what a layer makes of a token while it runs, three of its widest states.
        logits: one chunk of logits, with what is made of them.
        state: one state in the cache.
    """

    weights: int
    layer: int
    outside: int
    above: int
    working: int
    logits: int
    state: int


@dataclass(frozen=True)
class Need:
    """What each process (a GPU, say), its host, and the disk need, in bytes."""

    device: int
    host: int
    disk: int


def shape_of(config: Any, layers: list[int], dtype: torch.dtype) -> Shape:
    """Measured on a model without weights.

    Args:
        config: of a causal language model.
        layers: the decoder layers to steer.
        dtype: of the model.

    Raises:
        ModelError: there are no such layers, or the architecture does not run without weights.
    """
    base = _without_weights(config, dtype)
    decoder = find_decoder(base)
    blocks = [base.get_submodule(name) for name in decoder.names]
    sizes = [_bytes(block) for block in blocks]
    weights = _bytes(base)
    widest = max(size for block in blocks for parameter in block.parameters() for size in parameter.shape)
    get_peft_model(base, SteerConfig(layers_to_transform=layers))
    return Shape(
        weights=weights,
        layer=max(sizes),
        outside=weights - sum(sizes),
        above=_activations(base),
        working=3 * widest * dtype.itemsize,
        # Logits and their gradient in the dtype, and two copies in float32.
        logits=CHUNK * text_config(base).vocab_size * (2 * dtype.itemsize + 8),
        state=decoder.hidden_size * dtype.itemsize,
    )


def _without_weights(config: Any, dtype: torch.dtype) -> Any:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # the architecture's own, for sizes that don't go together
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"{type(config).__name__}: there is no causal language model of it ({reason}).") from error


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _activations(model: Any) -> int:
    """Bytes a token of what autograd keeps of a forward.

    Scores of attention, which grow with the square of the tokens, are left out: kernels for GPUs keep none.
    """
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_score = tensor.shape[-2:] == (PROBE_TOKENS, PROBE_TOKENS)
        if storage._cdata not in weights and not is_score:
            kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)  # so that no other tensor gets its address
        return tensor

    alive: list[torch.Tensor] = []
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta")
    # A whole mask, as prompts that are shared have: of another the model would look at the values.
    mask = torch.ones(1, 1, PROBE_TOKENS, PROBE_TOKENS, dtype=torch.bool, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    except (RuntimeError, NotImplementedError) as error:
        raise ModelError(f"{type(model).__name__}: it does not run without weights ({error}).") from error
    return sum(kept.values()) // PROBE_TOKENS


def plan(shape: Shape, sizes: list[int], batch: int, processes: int, memory: int, vectors: int = 1) -> dict[str, Need]:
    """What runs in three ways need.

    Args:
        shape: of the model.
        sizes: states of each pair.
        batch: pairs a step and process.
        processes: how many, where there are several.
        memory: bytes of the cache that one process holds in memory.
        vectors: how many are trained in one run, each on other layers; all their states are kept.
    """
    cache = vectors * (sum(sizes) * shape.state + REFERENCE_BYTES * len(sizes))
    tokens = sum(sorted(sizes)[-batch:])
    layers = tokens * (shape.above + shape.working)
    step = layers + shape.logits
    # Its logits are not made in chunks; how many of the tokens are an answer's is not known here.
    whole_step = layers + shape.logits * max(tokens, CHUNK) // CHUNK
    # Two layers at a time are whole, and what is outside the layers is so through the step.
    sharded = shape.weights // processes + 2 * shape.layer + shape.outside
    in_memory = cache <= memory
    return {
        "one": Need(shape.weights + step, cache if in_memory else 0, 0 if in_memory else cache),
        "parallel": Need(shape.weights + step, 0, cache),
        "sharded": Need(sharded + whole_step, processes * shape.weights, 0),
    }
