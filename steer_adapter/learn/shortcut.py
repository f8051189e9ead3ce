"""Whether a trainer may skip the frozen layers and share prompts, and the cache for it if so."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn
from trl.trainer.dpo_trainer import DataCollatorForPreference

from steer_adapter.data import token_counts
from steer_adapter.decoder import find_decoder
from steer_adapter.errors import ModelError
from steer_adapter.shapes import text_config
from steer_adapter.tuner import SteerLayer
from steer_adapter.tuner.layer import steer_layers

from .cache import StateCache, fingerprint
from .forward import random_parts
from .prefix import Prefix
from .prefix_cache import PrefixCache
from .processes import agreed, is_sharded
from .shared_states import SharedStates


if TYPE_CHECKING:
    from .bipo import BiPOTrainer

logger = logging.getLogger(__name__)
# Of reference log-probabilities by way of the cache: a side channel between layers makes far larger errors.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_TOLERANCE = 2e-2


def prefix_cache(trainer: BiPOTrainer, model: Any, states: SharedStates) -> PrefixCache | None:
    """The cache for a run of `trainer`, filled if the run meets all its pairs; None, with a line saying why, if a run
    by way of it would not be exact.

    Args:
        trainer: about to train.
        model: the transformers model below all adapters.
        states: where entries live, also those of trainers that come later.
    """
    if not trainer.args.prefix_cache:
        return None
    reason = why_not(trainer, model)
    if reason is not None:
        if trainer.accelerator.is_main_process:
            logger.warning("The prefix cache is off: %s.", reason)
        return None
    depth, forward = len(frozen_layers(model)), trainer.pair_forward
    if forward is None:  # one of the reasons
        return None
    _open(trainer, model, states, depth)
    layers = decoder_layers(model)
    recorded = {count: (Prefix(layers[:count]), cache) for count, cache in states.caches.items()}
    own = recorded.pop(depth)
    cached = PrefixCache(forward, *own, trainer.reference_log_probs, list(recorded.values()))
    try:
        if _is_exact(trainer, model, cached):
            _fill(trainer, cached)
            return cached
    except BaseException:
        cached.close()
        raise
    cached.close()
    return None


def _is_exact(trainer: BiPOTrainer, model: Any, cached: PrefixCache) -> bool:
    batch = trainer.data_collator(list(islice(trainer.train_dataset, 2)))
    batch = {name: value.to(trainer.accelerator.device) for name, value in batch.items()}
    error = cached.disagreement(batch)
    exact = error <= TOLERANCE.get(model.dtype, HALF_TOLERANCE)
    if not exact:
        logger.warning(
            "The prefix cache is off: with %s the numbers are others (relative error %.1g).",
            type(model).__name__,
            error,
        )
    return exact


def share_prompts(trainer: BiPOTrainer, model: Any) -> None:
    """Let prompts be computed once for both answers, and take other shortcuts, where that is exact; a line says why
    if prompts are not shared."""
    forward = trainer.pair_forward
    if forward is None or not isinstance(trainer.train_dataset, Dataset):
        return
    if not isinstance(trainer.data_collator, DataCollatorForPreference):
        return
    batch = trainer.data_collator(list(islice(trainer.train_dataset, 2)))
    device = trainer.accelerator.device
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    args = trainer.args
    runs_again = bool(args.gradient_checkpointing or getattr(args, "activation_checkpointing", False))
    if any(layer.is_scoped for layer in steer_layers(model)):
        reason: str | None = "a vector does not act on all tokens"
    elif _random(model):
        reason = f"{_random(model)} draws random numbers"
    elif is_sharded(model):
        reason = "the model is sharded"
    else:

        def look() -> tuple[str | None, bool, bool, bool]:
            found = forward.find_out_what_is_exact(model, inputs, runs_again)
            # A model that is yet to be sharded runs elsewhere than it is now.
            return found, forward.shares, forward.by_pair and device.type == "cpu", forward.narrows

        states = trainer.shared_states or SharedStates()
        states.exact = states.exact or agreed(model, look)  # the same for all trainers of a model
        reason, forward.shares, forward.by_pair, forward.narrows = states.exact
    if not trainer.accelerator.is_main_process:
        return
    if reason is not None:
        logger.warning("Chosen and rejected don't share their prompt: %s.", reason)
    elif forward.window < (trainer.args.max_length or float("inf")):
        logger.info("Texts of more than %d tokens, the model's window, don't share their prompt.", forward.window)


def why_not(trainer: BiPOTrainer, model: Any) -> str | None:
    """What stands against a run by way of the cache, in a few words; None if nothing does."""
    args, active = trainer.args, trainer.model.peft_config[trainer.adapter_name]
    checks = {
        "the model's forward is not served (a device map, or statistics for use_weighting)": (
            trainer.pair_forward is None
        ),
        "the pairs come in a stream": not isinstance(trainer.train_dataset, Dataset),
        "the data collator is not TRL's": not isinstance(trainer.data_collator, DataCollatorForPreference),
        "the model is sharded": trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or is_sharded(model),
        "router_aux_loss_coef asks for the routers of all layers": trainer.aux_loss_enabled,
        f"{_random(model)} draws random numbers": bool(_random(model)),
        "the vector does not act on all tokens": active.token_scope != "all",
        "rotary frequencies depend on the batch": not _fixed_positions(model, args.max_length),
    }
    reasons = (text for text, holds in checks.items() if holds)
    try:
        return next(reasons, None) or _trains_below(model)
    except ModelError as error:
        return str(error).rstrip(".")


def frozen_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers up to and including the first one with a vector that is trained.

    Raises:
        ModelError: the vector is not on a decoder layer.
    """
    modules, layers = dict(model.named_modules()), decoder_layers(model)
    steered = {id(layer): i for i, layer in enumerate(layers) if _trains(getattr(layer, "steering", None))}
    everywhere = [m for m in modules.values() if _trains(getattr(m, "steering", None))]
    if not everywhere or any(id(module) not in steered for module in everywhere):
        raise ModelError("the vector is not on a decoder layer")
    return layers[: min(steered.values()) + 1]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """All of them, in their order."""
    return [model.get_submodule(name) for name in find_decoder(model).names]


def _trains(steering: Any) -> bool:
    return isinstance(steering, SteerLayer) and any(p.requires_grad for p in steering.parameters())


def _trains_below(model: nn.Module) -> str | None:
    first = frozen_layers(model)[-1]
    vectors = {id(p) for module in model.modules() if isinstance(module, SteerLayer) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in vectors:
            return f"{name} is trained"
    other = [m for m in model.modules() if isinstance(m, SteerLayer) and m is not first.steering and not _trains(m)]
    return "another steering vector is active" if any(_steers(layer) for layer in other) else None


def _steers(layer: SteerLayer) -> bool:
    return not layer.disable_adapters and any(name in layer.steer_vector for name in layer.active_adapters)


def _random(model: nn.Module) -> str:
    return next(iter(random_parts(model)), "")


def _fixed_positions(model: nn.Module, longest: int | None) -> bool:
    """Whether a text's positions mean the same in every batch: some frequencies change with the longest text."""
    config = text_config(model)
    rope = getattr(config, "rope_parameters", None) or {}
    if not {"dynamic", "longrope"} & {rope.get("rope_type"), rope.get("type")}:
        return True
    limit = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return longest is not None and longest <= (limit or config.max_position_embeddings)


def _open(trainer: BiPOTrainer, model: Any, states: SharedStates, depth: int) -> None:
    """Open what is not open yet: for the trainer's own depth, and for those of trainers that come later."""
    depths = sorted({depth, *states.depths})
    missing = [count for count in depths if count not in states.caches]
    for count in missing:
        memory = int(trainer.args.prefix_cache_memory * 1e9) // len(depths)
        states.caches[count] = _open_cache(trainer, model, count, memory)
    if missing and _meets_all(trainer):
        tokens = sum(lengths(trainer.train_dataset, trainer.args.max_length))
        size = tokens * text_config(model).hidden_size * model.dtype.itemsize
        for count in missing:
            states.caches[count].check_room(size, size * (len(missing) - 1))


def _open_cache(trainer: BiPOTrainer, model: Any, depth: int, memory: int) -> StateCache:
    args = trainer.args
    output = Path(args.output_dir)
    folder = None
    if args.prefix_cache_dir or trainer.accelerator.num_processes > 1:
        precision = trainer.accelerator.mixed_precision
        name = fingerprint(model, layer=depth, autocast=precision, ld_alpha=args.ld_alpha)
        # Processes share what they record by way of a folder, which is gone at the end unless it was asked for.
        kept = args.prefix_cache_dir
        folder = Path(kept).expanduser() / name if kept else output / f".prefix-{name}"
    output.mkdir(parents=True, exist_ok=True)
    return StateCache(folder, memory, output, keeps=args.prefix_cache_dir is not None)


def _meets_all(trainer: BiPOTrainer) -> bool:
    """Whether the run goes through its data at least once; if not, pairs are recorded as they come."""
    values = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return values[-1] >= values[1]


def lengths(dataset: Dataset, longest: int | None) -> Iterator[int]:
    """How many states each pair has in the cache at most, of a dataset that DPOTrainer has tokenized."""
    for prompt, chosen, rejected in token_counts(dataset):
        room = float("inf") if longest is None else max(longest - prompt, 0)
        yield prompt + int(min(chosen, room)) + int(min(rejected, room))


def _fill(trainer: BiPOTrainer, cached: PrefixCache) -> None:
    if not _meets_all(trainer):
        return
    size = trainer.args.precompute_ref_batch_size or trainer.args.per_device_train_batch_size
    accelerator, rows = trainer.accelerator, trainer.train_dataset
    starts = range(0, len(rows), size)[accelerator.process_index :: accelerator.num_processes]

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for start in starts:
            batch = trainer.data_collator([rows[i] for i in range(start, min(start + size, len(rows)))])
            yield {name: value.to(accelerator.device) for name, value in batch.items()}

    cached.build(batches(), len(starts), trainer.args.disable_tqdm or not accelerator.is_local_main_process)
    if accelerator.num_processes > 1:
        for _, cache in cached.recorded:
            cache.flush()
        accelerator.wait_for_everyone()
        for _, cache in cached.recorded:
            cache.look_again()
