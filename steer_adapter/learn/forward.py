"""The forward of preference batches, in the place of DPOTrainer's: prompts shared, prefixes from a cache."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from steer_adapter.decoder import find_decoder
from steer_adapter.errors import ModelError
from steer_adapter.shapes import text_config

from .head import STATISTICS, Head, completion_fields, find_backbone, replaced_forward, run_backbone
from .prefix import Prefix
from .processes import is_sharded
from .sharing import Layout, in_fixed_order, plain_layout, shared_layout
from .tree_attention import NotServed, TreeMasks, attending_within_trees


# Attention whose mask may be any boolean or additive one; the others know causal masks alone.
MASKED_ATTENTION = ("eager", "sdpa")
# Where a layer sees less than all that came before, it is only fully masked texts of this many tokens that agree.
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest log-probability; half precision has 3e-2


class PairForward:
    """What runs when DPOTrainer asks `model` for log-probabilities.

    Attributes:
        prefix: the frozen part of the model, recorded or replayed while the trainer asks for it; or None.
        shares: whether prompts are computed once for both answers.
        narrows: whether the last layer's feed-forward part runs at the tokens that predict alone.
        by_pair: whether attention runs for each pair by itself, see [`tree_attention`].
        layout: of the last batch.
    """

    def __init__(self, model: PreTrainedModel, backbone: nn.Module) -> None:
        self.backbone = backbone
        self.hidden_size: int = text_config(model).hidden_size
        self.window = shortest_window(model)
        self.last_feed_forward = feed_forward_of_last(model)
        self.prefix: Prefix | None = None
        self.shares = self.by_pair = self.narrows = False
        self.layout: Layout | None = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        **kwargs: Any,
    ) -> FusedCausalLMOutput:
        """Fields of the completion tokens, `[2B, T − 1]`, of a batch `[2B, T]` padded on the right."""
        order = in_fixed_order(input_ids.cpu(), attention_mask.cpu())
        layout = self.layout = self._lay_out(*(t.cpu()[order] for t in (input_ids, attention_mask, labels)))
        device = input_ids.device
        inputs = {name: value.to(device) for name, value in layout.model_inputs().items()}
        if layout.position_ids is not None and model.config._attn_implementation == "eager":
            inputs["attention_mask"] = additive(inputs["attention_mask"], model.dtype)
        if self.prefix is not None:
            self.prefix.prepare(layout)
        states, head = self._run(model, {**kwargs, **inputs}, layout)
        picked = states.flatten(0, 1)[layout.sources.to(states.device)]
        # Of a sharded model all processes run each module equally often: its weights are gathered from all of them.
        targets, in_chunks = layout.targets.to(states.device), not is_sharded(model)
        fields = completion_fields(head, picked, targets, in_chunks)
        rows, columns = order[layout.rows].to(states.device), layout.columns.to(states.device)
        shape = (labels.shape[0], labels.shape[1] - 1)
        placed = {n: value.new_zeros(shape).index_put((rows, columns), value) for n, value in fields.items()}
        return FusedCausalLMOutput(loss=None, aux_loss=None, **placed)

    def _run(self, model: PreTrainedModel, inputs: dict[str, Any], layout: Layout) -> tuple[torch.Tensor, Head]:
        with ExitStack() as stack:
            if self.narrows:
                stack.enter_context(running_at(self.last_feed_forward, layout.sources))
            if not self.by_pair or layout.position_ids is None:
                return run_backbone(model, self.backbone, inputs)
            masks = TreeMasks(layout.tree_masks())
            stack.enter_context(attending_within_trees(text_config(model)))
            result = run_backbone(model, self.backbone, {**inputs, "tree_masks": masks})
        self.by_pair = masks.used
        return result

    def _lay_out(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Layout:
        if self.shares and int(attention_mask.sum(dim=1).max()) <= self.window:
            hidden_size = None if self.by_pair else self.hidden_size
            return shared_layout(input_ids, attention_mask, labels, hidden_size)
        return plain_layout(input_ids, attention_mask, labels)

    @torch.no_grad()
    def find_out_what_is_exact(
        self, model: PreTrainedModel, batch: dict[str, torch.Tensor], runs_again: bool = False
    ) -> str | None:
        """Try every shortcut on a batch, and keep those that give the same numbers.

        Args:
            batch: `input_ids`, `attention_mask`, each `[2B, T]`; only what fits into the model's window is looked at.
            runs_again: whether layers run again in the backward pass (gradient checkpointing), when shortcuts within
                layers are no longer there.

        Returns:
            why prompts are not shared, or None if they are.
        """
        self.shares = self.by_pair = self.narrows = False
        batch = {name: value[:, : int(min(self.window, value.shape[1]))] for name, value in batch.items()}
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, : batch["labels"].shape[1] // 2] = -100
        wanted = model(**batch, fused_lm_head=True).log_probs
        if self.last_feed_forward is not None and not runs_again:
            self._keep_if_exact(model, batch, wanted, "narrows")
        reason = cannot_share(model)
        if reason is None and not self._keep_if_exact(model, batch, wanted, "shares"):
            reason = f"with {type(model).__name__} the numbers are others"
        # On a GPU, one kernel with a mask beats many small ones.
        if reason is None and model.device.type == "cpu" and not runs_again:
            self._keep_if_exact(model, batch, wanted, "by_pair")
        return reason

    def _keep_if_exact(
        self, model: PreTrainedModel, batch: dict[str, torch.Tensor], wanted: torch.Tensor, shortcut: str
    ) -> bool:
        """Switch a shortcut on, and leave it on if the log-probabilities are those `wanted`."""
        setattr(self, shortcut, True)
        try:
            received = model(**batch, fused_lm_head=True).log_probs
            error = (received - wanted).abs().max() / wanted.abs().max()
            exact = bool(error <= TOLERANCE.get(model.dtype, 3e-2))
        except (NotServed, TypeError):
            exact = False
        if not exact:
            setattr(self, shortcut, False)
        return exact


def feed_forward_of_last(model: PreTrainedModel) -> nn.Module | None:
    """The part of the last decoder layer that goes by the usual name, if there is one."""
    try:
        last = model.get_submodule(find_decoder(model).names[-1])
    except ModelError:
        return None
    part = getattr(last, "mlp", None)
    return part if isinstance(part, nn.Module) else None


@contextmanager
def running_at(module: nn.Module, places: torch.Tensor) -> Iterator[None]:
    """Let a module that treats each token by itself, `[R, N, H]` in and out, run at some places; zeros elsewhere.

    Raises:
        NotServed: inside, if it is called or answers in another way.
    """
    own = module.forward

    def run(states: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not isinstance(states, torch.Tensor) or states.ndim != 3:
            raise NotServed(type(module).__name__)
        some = places.unique().to(states.device)
        result = own(states.flatten(0, 1)[some][None])
        if not isinstance(result, torch.Tensor) or result.shape[1] != len(some):
            raise NotServed(type(module).__name__)
        whole = result.new_zeros(states.shape[0] * states.shape[1], result.shape[-1])
        return whole.index_copy(0, some, result[0]).view(*states.shape[:2], -1)

    with replaced_forward(module, run):
        yield


def install(model: PreTrainedModel, outputs: tuple[str, ...]) -> PairForward | None:
    """Put the forward in the place of TRL's, on a model that TRL has patched; None for a model that it can't serve.

    Those include models that accelerate has spread over devices, whose forward is not that of their class, and those
    whose load-balancing loss is wanted.
    """
    if set(outputs) - set(STATISTICS) or hasattr(model, "_hf_hook"):
        return None
    backbone = find_backbone(model)
    if backbone is None:
        return None
    forward, pair_forward = type(model).forward, PairForward(model, backbone)
    theirs = model.forward

    @functools.wraps(forward)
    def run(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        prefix = pair_forward.prefix
        if not fused_lm_head or labels is None:
            if prefix is not None and prefix.replays:
                raise ModelError("Received a plain forward while the frozen layers are replayed from the cache.")
            labels_argument = {} if labels is None else {"labels": labels}
            return forward(self, *args, **labels_argument, **kwargs)
        if args or "input_ids" not in kwargs or "attention_mask" not in kwargs or kwargs.get("output_router_logits"):
            return theirs(*args, fused_lm_head=True, labels=labels, **kwargs)
        kwargs.pop("use_cache", None)
        return pair_forward(self, labels=labels, **kwargs)

    model.forward = types.MethodType(run, model)  # a method, so that a copy of the model runs itself
    return pair_forward


def cannot_share(model: PreTrainedModel) -> str | None:
    """What in the model stands against a mask of one's own, in a few words; None if nothing does."""
    attention = model.config._attn_implementation
    if attention not in MASKED_ATTENTION:
        return f"its attention is {attention!r}, expected one of {MASKED_ATTENTION}"
    if "position_ids" not in inspect.signature(type(model.base_model).forward).parameters:
        return f"{type(model).__name__} takes no positions"
    return None


def shortest_window(model: PreTrainedModel) -> float:
    """How many tokens the layer sees that sees the fewest; infinity if all see everything."""
    config = text_config(model)
    found = [getattr(config, name, None) for name in WINDOWS]
    return min((size for size in found if isinstance(size, int) and size > 0), default=float("inf"))


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as numbers to add to scores: 0, and the least of `dtype`."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def random_parts(model: nn.Module) -> list[str]:
    """Modules that draw random numbers in training: dropout, dropped layers, noise on routers."""
    found = []
    for name, module in model.named_modules():
        values = {"p": module.p} if isinstance(module, nn.modules.dropout._DropoutNd) else vars(module)
        for key, value in values.items():
            if (key == "p" or any(word in key for word in ("dropout", "layerdrop", "jitter"))) and (
                isinstance(value, float) and value > 0
            ):
                found.append(f"{name}.{key}")
    return found
