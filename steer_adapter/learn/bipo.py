"""BiPO, bidirectional preference optimization of steering vectors (arXiv 2406.00045), on TRL's DPOTrainer."""

from __future__ import annotations

import functools
import logging
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import HfApi
from torch import nn

from steer_adapter.data import check_pairs, check_tokens
from steer_adapter.errors import ConfigError
from steer_adapter.files.card_file import kept_if_edited
from steer_adapter.log_probs import known_prompts
from steer_adapter.sharing.push import push_adapters
from steer_adapter.tuner import SteerConfig
from steer_adapter.tuner.state_dict import whole

from .bipo_config import BiPOConfig
from .carriers import (
    check_trainable,
    copy_vectors,
    innermost,
    innermost_base,
    steer_layers,
    the_active_vector,
    with_vector,
)
from .directions import DIRECTIONS, auto_learning_rate, draw_direction, exchange, exchange_metrics
from .forward import install
from .prefix_trainer import PrefixTrainer
from .processes import check_processes
from .provenance import begin_record, finish_record, start_record


logger = logging.getLogger(__name__)


class BiPOTrainer(PrefixTrainer):
    """
    Trains steering vectors on preference pairs, in both directions at once.

    In each optimizer step a direction d is drawn; the vector is added d times, and for d = −1 chosen and rejected
    change places. The reference is the same model with only the vector off: no second model is kept. See
    [`~trl.DPOTrainer`] for the arguments; these differ:

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model to steer (which may carry a LoRA), or one that carries the vector to train.
        args ([`BiPOConfig`], *optional*): The configuration.
        peft_config ([`SteerConfig`], *optional*): Needed unless `model` already carries a vector.

    Metrics are those of DPOTrainer, given back to chosen and rejected; those that end in `_positive` and `_negative`
    were measured at d = +1 and d = −1. Evaluation measures both and reports them apart; `eval_loss` is their mean.

    Raises:
        ModelError: there is no single active vector to train.
        ConfigError: an argument that BiPO has no place for.
        DataError: a pair can't be trained on.
    """

    _tag_names = ["steer-adapter", "bipo"]
    _name = "BiPO"
    _paper = {
        "title": "Personalized Steering of Large Language Models: Versatile Steering Vectors Through Bi-directional "
        "Preference Optimization",
        "id": "2406.00045",
        "citation": textwrap.dedent("""\
            @inproceedings{cao2024personalized,
                title        = {{Personalized Steering of Large Language Models: Versatile Steering Vectors Through
                                Bi-directional Preference Optimization}},
                author       = {Yuanpu Cao and Tianrong Zhang and Bochuan Cao and Ziyi Yin and Lu Lin and
                                Fenglong Ma and Jinghui Chen},
                year         = 2024,
                booktitle    = {Advances in Neural Information Processing Systems 37},
            }"""),
    }

    def __init__(
        self,
        model: Any,
        ref_model: None = None,
        args: BiPOConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: SteerConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if ref_model is not None:
            raise ConfigError("`ref_model`: expected None. BiPO's reference is the same model with the vector off.")
        args = args or BiPOConfig(output_dir="bipo")
        if not isinstance(args, BiPOConfig):
            raise ConfigError(f"`args`: received {type(args).__name__}, expected a BiPOConfig.")
        if kwargs.get("compute_metrics") is not None:
            raise ConfigError("`compute_metrics`: expected None. Evaluation runs in both directions and reports both.")
        for name, dataset in _named(train_dataset, eval_dataset):
            check_pairs(dataset, name)
        check_processes()
        self.provenance = start_record(train_dataset, eval_dataset, args.seed)
        self._direction = 1
        model, peft_config = with_vector(model, peft_config, args.seed)
        vectors = {} if isinstance(model, str) else copy_vectors(model)
        with innermost_base(model):
            super().__init__(
                model=model,
                # Any value but None keeps DPOTrainer from making a second adapter; `ref_model` below ignores it.
                ref_model=None if isinstance(model, str) else model.get_base_model(),
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                peft_config=peft_config,
                **kwargs,
            )
        outputs = ("log_probs", "log_sum_sq_probs") if self.use_weighting else ("log_probs",)
        self.pair_forward = install(innermost(self.model), outputs)
        # The objective has no term for the balance of experts, which DPOTrainer adds by the model's own coefficient.
        if args.router_aux_loss_coef is None:
            self.aux_loss_enabled: bool = False
        self._restore_float32(vectors)
        self.adapter_name = the_active_vector(self.model)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(prepared, Dataset):
            check_tokens(prepared, f"The {dataset_name} data")
        return prepared

    @property
    def ref_model(self) -> None:
        """None: the reference is the model itself, with the vector off."""
        return None

    @ref_model.setter
    def ref_model(self, value: Any) -> None:
        pass

    def _restore_float32(self, vectors: dict[str, torch.Tensor]) -> None:
        """On quantized models DPOTrainer casts what is trainable to bfloat16, where a vector hardly trains."""
        for name, parameter in self.model.named_parameters():
            if ".steering.steer_vector." in name and parameter.dtype != torch.float32:
                parameter.data = vectors.get(name, parameter.data).to(parameter.device, torch.float32)

    ############
    # Training #
    ############

    def train(self, *args: Any, **kwargs: Any) -> Any:
        check_trainable(self.model)
        norms = begin_record(self)
        self._mean_norms = {name: float(values.mean()) for name, values in norms.items()}
        if self.args.learning_rate is None:
            self.args.learning_rate = self._find_learning_rate(norms)
        return self.train_above(innermost(self.model), *args, **kwargs)

    def _find_learning_rate(self, norms: dict[str, torch.Tensor]) -> float:
        median = float(torch.cat(list(norms.values())).median())
        steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        hidden_size = next(iter(steer_layers(self.model).values())).hidden_size
        rate = auto_learning_rate(median, hidden_size, steps)
        logger.info("Learning rate %.3g: median |h| %.4g, %d steps.", rate, median, steps)
        return rate

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        direction = draw_direction(self.args.seed, self.state.global_step)
        # Held through the backward pass: gradient checkpointing runs the steered layer again in there.
        with self._steered(direction):
            loss = super().training_step(*args, **kwargs)
        self._metrics["train"]["direction"].append(direction)
        return loss

    @contextmanager
    def _steered(self, direction: int) -> Iterator[None]:
        layers = list(steer_layers(self.model).values())
        previous = [float(layer.multipliers[self.adapter_name]) for layer in layers]
        self._direction = direction
        try:
            for layer in layers:
                layer.set_multiplier(self.adapter_name, direction)
            yield
        finally:
            self._direction = 1
            for layer, multiplier in zip(layers, previous, strict=True):
                layer.set_multiplier(self.adapter_name, multiplier)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mode = "train" if self.model.training else "eval"
        collected, self._metrics[mode] = self._metrics[mode], defaultdict(list)
        try:
            inputs = exchange(inputs) if self._direction == -1 else inputs
            with known_prompts(self.model, inputs):
                loss = super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            measured, self._metrics[mode] = self._metrics[mode], collected
        for key, values in (exchange_metrics(measured) if self._direction == -1 else measured).items():
            if key.startswith("rewards/"):
                self._metrics[mode][f"{key}_{DIRECTIONS[self._direction]}"].extend(values)
            if mode == "train" or not key.startswith("rewards/"):  # evaluation runs both: their mean says nothing
                self._metrics[mode][key].extend(values)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            layers = steer_layers(self.model)
            norms = {
                n: float(whole(layer.steer_vector[self.adapter_name]).detach().norm()) for n, layer in layers.items()
            }
            logs["vector_norm"] = sum(norms.values()) / len(norms)
            logs["dose"] = sum(norm / self._mean_norms[name] for name, norm in norms.items()) / len(norms)
        super().log(logs, start_time)

    ##############
    # Evaluation #
    ##############

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Both directions, one after the other."""
        losses = {}
        for direction, name in DIRECTIONS.items():
            with self._steered(direction):
                output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            losses[f"{metric_key_prefix}_loss_{name}"] = output.metrics[f"{metric_key_prefix}_loss"]
        output.metrics.update(losses)
        output.metrics[f"{metric_key_prefix}_loss"] = sum(losses.values()) / len(losses)
        for key, values in self._metrics["eval"].items():
            if key.startswith("rewards/margins_"):
                output.metrics[f"{metric_key_prefix}_{key}"] = sum(values) / len(values)
        return output

    ##########
    # Saving #
    ##########

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See [`~transformers.Trainer.save_model`]. Of a sharded model the vector alone is gathered."""
        if not self.accelerator.is_fsdp2:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """The adapter and its card: no tokenizer, no pickled arguments, no other adapters."""
        if state_dict == {} and not self.args.should_save:
            return  # DeepSpeed gathers for the first process alone
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        folder = output_dir or self.args.output_dir
        finish_record(self)
        with kept_if_edited(folder):
            model.save_pretrained(
                folder,
                state_dict=state_dict,
                selected_adapters=[self.adapter_name],
                save_embedding_layers=False,
                is_main_process=self.args.should_save,
            )

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the adapter and push it, see [`~steer_adapter.sharing.push.push_adapters`], which takes the rest."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        push = functools.partial(
            push_adapters,
            self.args.output_dir,
            self.hub_model_id,
            private=private,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            **kwargs,
        )
        return push() if blocking else HfApi().run_as_future(push)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the card comes with the adapter that is saved, and TRL's would replace it."""


def _named(train_dataset: Any, eval_dataset: Any) -> Iterator[tuple[str, Any]]:
    """The raw datasets that can be looked through beforehand, with a name for messages."""
    datasets = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        datasets |= {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    else:
        datasets["eval_dataset"] = eval_dataset
    for name, dataset in datasets.items():
        if dataset is not None and not isinstance(dataset, IterableDataset):
            yield name, dataset
