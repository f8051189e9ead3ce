"""What a trainer knows of where its vector comes from, written into the adapter's config."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import trl
from datasets import IterableDataset

from steer_adapter.data import COLUMNS, is_conversational
from steer_adapter.tuner import SteerLayer
from steer_adapter.tuner.provenance import versions

from .carriers import innermost
from .mean_difference import hidden_states
from .processes import agreed


if TYPE_CHECKING:
    from .bipo import BiPOTrainer

PROBE_PAIRS = 8
MEASURED = ("data", "held_out", "hyperparameters", "imported_from", "margins", "residual_norms", "side_effects")
HYPERPARAMETERS = (
    "beta", "loss_type", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay",
    "per_device_train_batch_size", "gradient_accumulation_steps",
)  # fmt: skip


# They decide where things go and what is shown, not what vector comes out; a token is nobody's business.
_NOT_RECORDED = (
    "hub_", "logging_", "save_", "push_to_hub", "report_to", "run_name", "output_dir", "disable_tqdm",
    "resume_from_checkpoint", "dataloader_", "eval_", "per_device_eval_", "prefix_cache_", "model_init_", "seed",
    "accelerator_config", "pad_to_multiple_of",
)  # fmt: skip
MAX_TEXT = 200


def pairs_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 over the pairs, each as one line of JSON with sorted keys, UTF-8, no spaces and a line feed after it."""
    digest = hashlib.sha256()
    for row in rows:
        pair = {column: row[column] for column in COLUMNS if column in row}
        line = json.dumps(pair, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
        digest.update(line.encode("utf-8", errors="surrogatepass") + b"\n")
    return digest.hexdigest()


def describe_pairs(dataset: Any) -> dict[str, Any]:
    """Number and hash of pairs; nothing of those that can be read but once."""
    if dataset is None or isinstance(dataset, (IterableDataset, dict)):
        return {}
    return {"pairs": len(dataset), "sha256": pairs_hash(dataset)}


def start_record(train_dataset: Any, eval_dataset: Any, seed: int) -> dict[str, Any]:
    """What is known before training."""
    record: dict[str, Any] = {"method": "bipo", "seed": seed}
    if described := describe_pairs(train_dataset):
        record |= {"data": described, "chat": is_conversational(train_dataset[0])}
    if described := describe_pairs(eval_dataset):
        record["held_out"] = described
    return record


def begin_record(trainer: BiPOTrainer) -> dict[str, torch.Tensor]:
    """Drop what was measured of the vector before it is trained, and record how strong the residual stream is.

    Returns:
        see `state_norms`, the same in all processes.
    """
    config = trainer.model.peft_config[trainer.adapter_name]
    config.provenance = {key: value for key, value in (config.provenance or {}).items() if key not in MEASURED}
    norms = agreed(trainer.model, lambda: state_norms(trainer))
    trainer.provenance["residual_norms"] = {_place(name): float(values.mean()) for name, values in norms.items()}
    return norms


def state_norms(trainer: BiPOTrainer) -> dict[str, torch.Tensor]:
    """|h| at the tokens of the first pairs, where it enters the steering of each layer, with the vector off."""
    model, training = trainer.model, trainer.model.training
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SteerLayer) and trainer.adapter_name in module.steer_vector
    }
    batch = trainer.data_collator(list(islice(trainer.train_dataset, PROBE_PAIRS)))
    model.eval()  # dropout would draw from the generator that training draws from
    try:
        with torch.no_grad(), model.disable_adapter():
            states = hidden_states(model, batch, layers)
    finally:
        model.train(training)
    mask = batch["attention_mask"].bool()
    return {name: state[mask.to(state.device)].float().norm(dim=-1).cpu() for name, state in states.items()}


def _place(name: str) -> str:
    """The layer's index, or the path of another module: `name` ends in `.steering`."""
    path = name.rpartition(".")[0].removeprefix("base_model.model.")
    last = path.rpartition(".")[2]
    return last if last.isdecimal() else path


def finish_record(trainer: BiPOTrainer) -> None:
    """Write the record into the config of the adapter that is about to be saved."""
    config = trainer.model.peft_config[trainer.adapter_name]
    record = dict(trainer.provenance)
    if trainer.state.global_step:
        record["hyperparameters"] = {**_hyperparameters(trainer, HYPERPARAMETERS), "steps": trainer.state.global_step}
    elif record["method"] == "mean-difference":
        record["hyperparameters"] = _hyperparameters(trainer)
    record["versions"] = {**versions(), "trl": trl.__version__}
    config.provenance = {**(config.provenance or {}), **record}


def _hyperparameters(trainer: BiPOTrainer, always: Iterable[str] = ()) -> dict[str, Any]:
    """The options named and those that differ from the defaults, and the dtype that the model ran in."""
    # Not compared with a fresh config: making one resets what accelerate knows of the run.
    changed = [
        field.name
        for field in dataclasses.fields(trainer.args)
        if field.init and not field.name.startswith(_NOT_RECORDED) and _differs(field, trainer.args)
    ]
    dtype = str(innermost(trainer.model).dtype).removeprefix("torch.")
    return {**{name: _plain(getattr(trainer.args, name)) for name in (*always, *changed)}, "dtype": dtype}


def _differs(field: dataclasses.Field[Any], config: Any) -> bool:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return (getattr(config, field.name) or None) != (default or None)  # configs make False and [] of None


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)  # of an enum
    if value is None or isinstance(value, (int, float)):
        return value
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return (os.path.basename(text) if os.path.isabs(text) else text)[:MAX_TEXT]
