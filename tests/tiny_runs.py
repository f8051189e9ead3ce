"""BiPO runs on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import make_tokenizer, set_vectors
from datasets import Dataset
from peft import get_peft_model
from torch import nn

from steer_adapter import BiPOConfig, BiPOTrainer, SteerConfig
from steer_adapter.learn.forward import random_parts
from steer_adapter.tuner import SteerModel


LAYER = 1


def pairs(count: int = 12) -> Dataset:
    rng = np.random.default_rng(0)

    def text(least: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(0, 80, int(rng.integers(least, least + 4))))

    return Dataset.from_list(
        [{k: text(n) for k, n in (("prompt", 3), ("chosen", 2), ("rejected", 1))} for _ in range(count)]
    )


def varied(model: nn.Module) -> nn.Module:
    """With weights large enough for each token to matter, and no dropout that DPOTrainer leaves on."""
    torch.manual_seed(0)
    for name in random_parts(model):
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, 0.0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "norm" not in name and "conv" not in name:
            nn.init.normal_(parameter, std=0.15)
    return model


def trainer(
    tmp_path: Path,
    model: nn.Module,
    layers: Any = LAYER,
    vectors: dict[int, torch.Tensor] | None = None,
    train_dataset: Dataset | None = None,
    eval_dataset: Dataset | None = None,
    **options: Any,
) -> BiPOTrainer:
    """A trainer whose checkpoints go to `tmp_path / "out"`; with given vectors, or a new one."""
    if vectors is not None:
        model = get_peft_model(model, SteerConfig(layers_to_transform=layers))
        set_vectors(model, vectors)
    carries = isinstance(getattr(model, "base_model", None), SteerModel)
    arguments = dict(
        output_dir=str(tmp_path / "out"), max_steps=4, logging_steps=1, report_to="none", disable_tqdm=True,
        use_cpu=True, save_strategy="no", learning_rate=0.05, seed=3,
    )  # fmt: skip
    return BiPOTrainer(
        model=model,
        args=BiPOConfig(**{**arguments, **options}),
        train_dataset=train_dataset or pairs(),
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer(),
        peft_config=None if carries else SteerConfig(layers_to_transform=layers),
    )
