"""Loading what a command names: a base model, a model with a LoRA, or an adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import AutoPeftModelForCausalLM, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from steer_adapter.errors import ConfigError, ModelError


DTYPES = ("auto", "bfloat16", "float16", "float32")


def check_folder(name: str) -> None:
    """Refuse a path to nowhere, before the Hub is asked for a repository of that name.

    Raises:
        ModelError: `name` looks like a path, and there is no folder.
    """
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.sep + os.path.sep in name
    if is_path and not Path(name).expanduser().is_dir():
        raise ModelError(f"{name}: received a path where there is no folder, expected a saved model or a Hub id.")


def is_adapter(name: str) -> bool:
    """Whether a folder or Hub id holds an adapter, such as a LoRA, rather than a model."""
    return find_adapter_config_file(os.path.expanduser(name)) is not None


def load_model(name: str, dtype: str = "auto") -> Any:
    """A causal language model by folder or Hub id; if it is an adapter, such as a LoRA, then a PeftModel."""
    check_folder(name)
    name = os.path.expanduser(name)
    auto_class = AutoPeftModelForCausalLM if is_adapter(name) else AutoModelForCausalLM
    return auto_class.from_pretrained(name, dtype=dtype).eval()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or that of an adapter's base model."""
    name = os.path.expanduser(name)
    if is_adapter(name) and not os.path.exists(os.path.join(name, "tokenizer_config.json")):
        name = PeftConfig.from_pretrained(name).base_model_name_or_path
    return AutoTokenizer.from_pretrained(name)


def chat_or_plain(tokenizer: PreTrainedTokenizerBase, chat: str, system_prompt: str | None) -> bool:
    """Whether to use the chat template: `chat` is `auto` (if the tokenizer has one), `on` or `off`.

    Raises:
        ConfigError: the template is asked for, or needed for a system prompt, and missing or switched off.
    """
    has_template = bool(tokenizer.chat_template)
    if (chat == "on" or system_prompt) and not has_template:
        raise ConfigError("The tokenizer has no chat template, which --chat on and --system-prompt need.")
    if system_prompt and chat == "off":
        raise ConfigError(
            "Received --system-prompt with --chat off, expected one of them: it needs the chat template."
        )
    return chat == "on" or (chat == "auto" and has_template)
