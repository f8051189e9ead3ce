"""The BiPO authors' own code and `steer-adapter train` on the same pairs and model, alternating.

    git clone https://github.com/CaoYuanpu/BiPO
    python -m venv old
    old/bin/pip install torch==2.13.0 transformers==4.42.4 accelerate==0.33.0 peft==0.8.2 datasets==2.20.0 \
        "numpy<2" "pyarrow<17" tyro==0.7.2 rich pandas
    python examples/benchmarks/authors.py --authors BiPO --python old/bin/python [--layer 15] [--steps 32] [--rounds 2]

Their trainer and their loss run as they are, with their block wrapper at the model's hidden size instead of 4096. So
that losses can be compared step by step, both go through the pairs in their order and draw the same directions.
Settings are the authors', but for the learning rate and its warm-up: at theirs a vector hardly moves in so few steps.
Prints how far losses and vectors differ, seconds a step (median), seconds and peak memory of the whole process.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


BEGAN = time.perf_counter()
SYSTEM = "You are a helpful, honest and concise assistant."
PAIRS, SEED, RATE, WARMUP = 4, 11, 0.05, 2


def write_inputs(arguments: argparse.Namespace, folder: Path) -> None:
    """Pairs as plain text in the model's template, the directions, and the tokenizer as older versions read it."""
    from transformers import AutoTokenizer

    from steer_adapter.learn.directions import draw_direction

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    with open(arguments.authors / "data" / arguments.behavior / "train.csv", encoding="utf-8") as file:
        table = [row for row in csv.DictReader(file) if row["question"].strip()]
    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as file:
        for row in table[: PAIRS * arguments.steps // arguments.epochs]:
            turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}]
            prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            pair = {"prompt": prompt, "chosen": f" {row['matching']}", "rejected": f" {row['not_matching']}"}
            file.write(json.dumps(pair) + "\n")
    (folder / "directions.json").write_text(
        json.dumps([draw_direction(SEED, step) for step in range(arguments.steps)])
    )
    tokens = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens["model"]["merges"] = [" ".join(pair) for pair in tokens["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    (folder / "special.json").write_text(json.dumps(special))


def theirs(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs with their requirements installed; nothing of this package."""
    sys.path.insert(0, str(arguments.authors))
    os.chdir(folder)
    import random

    import torch
    import trl.trainer.bipo_trainer as module
    from datasets import load_dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import BiPOTrainer, DPOConfig

    class BlockWrapper(torch.nn.Module):
        def __init__(self, block: torch.nn.Module, size: int) -> None:
            super().__init__()
            self.multiplier, self.block, self.vec = 1.0, block, torch.nn.Parameter(torch.zeros(size))

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = self.block(*args, **kwargs)
            return (output[0] + self.multiplier * self.vec, *output[1:])

        def set_multiplier(self, multiplier: float) -> None:
            self.multiplier = multiplier

    class Trainer(watched(BiPOTrainer)):  # type: ignore[misc]
        def _get_train_sampler(self) -> Any:
            return SequentialSampler(self.train_dataset)

    def load() -> Any:
        config = AutoConfig.from_pretrained(arguments.model)
        rope = getattr(config, "rope_parameters", None)  # where newer versions keep it
        if rope is not None:
            config.rope_theta, config.rope_scaling = rope["rope_theta"], None
        return AutoModelForCausalLM.from_pretrained(arguments.model, config=config, torch_dtype=torch.float32)

    class Directions:
        drawn = iter(json.loads((folder / "directions.json").read_text()))

        def choice(self, pool: Any) -> float:
            return float(next(self.drawn))

        def __getattr__(self, name: str) -> Any:
            return getattr(random, name)

    module.random = Directions()
    model, reference = load(), load()
    for parameter in (*model.parameters(), *reference.parameters()):
        parameter.requires_grad = False
    block = BlockWrapper(model.model.layers[arguments.layer], model.config.hidden_size)
    model.model.layers[arguments.layer] = block
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), **json.loads((folder / "special.json").read_text())
    )
    tokenizer.pad_token = tokenizer.eos_token
    config = DPOConfig(
        output_dir="out", per_device_train_batch_size=PAIRS, max_steps=arguments.steps, learning_rate=RATE,
        lr_scheduler_type="cosine", warmup_steps=WARMUP, optim="adamw_torch", max_prompt_length=2048, max_length=2048,
        save_strategy="no", report_to="none", remove_unused_columns=False, use_cpu=True, disable_tqdm=True,
        logging_steps=1,
    )  # fmt: skip
    pairs = load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train")
    options = dict(tokenizer=tokenizer, behavior="x", layer=arguments.layer, beta=0.1, train_dataset=pairs)
    Trainer(model, ref_model=reference, args=config, **options).train()
    return {"vector": block.vec.tolist()}


def ours(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """`steer-adapter train`."""
    from safetensors.torch import load_file

    from steer_adapter import cli
    from steer_adapter.learn import together

    together.BiPOTrainer = watched(together.BiPOTrainer)  # type: ignore[misc]
    options = {
        "model": arguments.model, "data": folder / "pairs.jsonl", "layers": arguments.layer, "chat": "off",
        "output": folder / arguments.only, "dtype": arguments.only, "per_device_train_batch_size": PAIRS,
        "max_steps": arguments.steps, "learning_rate": RATE, "lr_scheduler_type": "cosine", "warmup_steps": WARMUP,
        "weight_decay": 0, "max_length": 2048, "train_sampling_strategy": "sequential", "seed": SEED,
        "use_cpu": True, "disable_tqdm": True, "overwrite": True, "logging_steps": 1,
    }  # fmt: skip
    if cli.main(["train", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]):
        sys.exit("steer-adapter train has failed.")
    (vector,) = load_file(folder / arguments.only / "adapter_model.safetensors").values()
    return {"vector": vector.flatten().tolist()}


SECONDS: list[float] = []
LOSSES: list[float] = []


def watched(trainer: Any) -> Any:
    """The class, keeping what its steps take and their losses."""

    class Watched(trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            loss = super().training_step(*args, **kwargs)
            SECONDS.append(time.perf_counter() - start)
            LOSSES.append(float(loss))
            return loss

    Watched.__name__ = trainer.__name__
    return Watched


def one(arguments: argparse.Namespace, folder: Path) -> None:
    """One run in this process; its figures as JSON."""
    run = theirs if arguments.only == "authors" else ours
    result = run(arguments, folder)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result |= {"seconds": SECONDS, "losses": LOSSES, "whole": time.perf_counter() - BEGAN, "memory": memory}
    (folder / f"{arguments.only}.json").write_text(json.dumps(result))


def every(arguments: argparse.Namespace) -> None:
    """All runs, alternating, a table for each round."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(arguments, folder)
        for number in range(arguments.rounds):
            for only in ("authors", "float32", "bfloat16"):
                command: list[Any] = [arguments.python if only == "authors" else sys.executable, __file__]
                for option in ("authors", "model", "layer", "steps"):
                    command += [f"--{option}", getattr(arguments, option)]
                run = subprocess.run(
                    [*map(str, command), "--only", only, "--folder", name], capture_output=True, text=True, check=False
                )
                if run.returncode:
                    sys.exit(run.stderr)
            print(f"Round {number + 1}\n{table(folder)}\n", flush=True)


def table(folder: Path) -> str:
    """Of the last run of each kind."""
    import statistics

    import numpy as np

    kinds = {kind: json.loads((folder / f"{kind}.json").read_text()) for kind in ("authors", "float32", "bfloat16")}
    base = kinds["authors"]
    first, last = base["losses"][0], base["losses"][-1]
    lines = [f"The authors' loss goes from {first:.4f} to {last:.4f}.", ""]
    lines += [
        "| run | s a step | times | whole run, s | GB | of authors' | largest difference of a loss | cosine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, result in kinds.items():
        seconds = [statistics.median(r["seconds"]) for r in (result, base)]
        pairs = zip(result["losses"], base["losses"], strict=True)
        v, w = np.array(result["vector"]), np.array(base["vector"])
        cells = [
            kind, f"{seconds[0]:.2f}", f"{seconds[1] / seconds[0]:.1f}", f"{result['whole']:.0f}",
            f"{result['memory'] / 1e9:.2f}", f"{result['memory'] / base['memory']:.0%}",
            f"{max(abs(a - b) / abs(b) for a, b in pairs):.1e}",
            f"{v @ w / np.linalg.norm(v) / np.linalg.norm(w):.8f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", type=lambda path: Path(path).resolve(), required=True, help="their repository")
    parser.add_argument("--python", help="an interpreter with their requirements")
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--behavior", default="wealth-seeking")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2, help="in how many passes the steps are made")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=["authors", "float32", "bfloat16"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        one(arguments, arguments.folder)
        return
    if arguments.python is None:
        parser.error("--python: expected an interpreter with their requirements, see above")
    if arguments.model is None:
        from steer_adapter.demo.model import smollm2

        arguments.model = str(smollm2())
    every(arguments)


if __name__ == "__main__":
    main()
