"""`steer-adapter generate`: the same prompt at several multipliers."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from steer_adapter.errors import ModelError
from steer_adapter.tuner import SteerConfig
from steer_adapter.tuner.strength import set_multiplier

from .models import DTYPES, chat_or_plain, check_folder, load_model, load_tokenizer


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="steer-adapter generate", description="Answer a prompt at several multipliers of a steering vector."
    )
    result.add_argument("--adapter", required=True, help="folder or Hub id of the steering adapter")
    result.add_argument("--prompt", required=True, help="what to ask")
    result.add_argument("--multiplier", type=float, nargs="+", default=[-1.0, 0.0, 1.0], help="default: -1 0 1")
    result.add_argument("--max-new-tokens", type=int, default=80, help="length of an answer, default 80")
    result.add_argument("--model", help="load the vector on this model instead of the one it was made for")
    result.add_argument("--chat", choices=["auto", "on", "off"], default="auto", help="use the chat template")
    result.add_argument("--system-prompt", help="system prompt of the conversation")
    result.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    result.add_argument("--seed", type=int, default=0, help="of the sampling, default 0")
    result.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the model")
    return result


def run(argv: Sequence[str]) -> None:
    """The command."""
    arguments = parser().parse_args(argv)
    model, tokenizer = load_steered(arguments.adapter, arguments.model, arguments.dtype)
    chat = chat_or_plain(tokenizer, arguments.chat, arguments.system_prompt)
    inputs = encode(tokenizer, [arguments.prompt], chat, arguments.system_prompt)
    options = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.sample}
    for multiplier, (text,) in answers(model, tokenizer, inputs, arguments.multiplier, arguments.seed, **options):
        print(f"[{multiplier:+g}] {text}\n", flush=True)


def load_steered(adapter: str, base: str | None, dtype: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """An adapter on its base model, or on another.

    Raises:
        ModelError: the adapter is not a steering vector, or does not say what it was made for.
    """
    from peft import PeftModel

    check_folder(adapter)
    config = SteerConfig.from_pretrained(adapter)
    if not isinstance(config, SteerConfig):
        raise ModelError(f"{adapter}: received an adapter of type {config.peft_type}, expected a steering vector.")
    name = base or config.base_model_name_or_path
    if name is None:
        raise ModelError(f"{adapter}: the adapter does not name its base model. Pass one with --model.")
    return PeftModel.from_pretrained(load_model(name, dtype), adapter), load_tokenizer(name)


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], chat: bool, system_prompt: str | None) -> Any:
    """Token ids and attention mask of prompts, padded on the left."""
    padding = {"padding": True, "padding_side": "left"} if len(prompts) > 1 else {}
    if not chat:
        return tokenizer(list(prompts), return_tensors="pt", **padding)
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return tokenizer.apply_chat_template(
        [[*system, {"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        padding=bool(padding),
        tokenizer_kwargs={"padding_side": "left"} if padding else {},
    )


def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Any,
    multipliers: Iterable[float],
    seed: int = 0,
    **options: Any,
) -> Iterator[tuple[float, list[str]]]:
    """Generate once for each multiplier; the answers to all prompts."""
    inputs = inputs.to(model.device)
    for multiplier in multipliers:
        set_multiplier(model, multiplier)
        torch.manual_seed(seed)
        with torch.no_grad():
            output = model.generate(**inputs, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id, **options)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        yield multiplier, [text.strip() for text in texts]
