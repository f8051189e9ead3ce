"""Seconds a training step: the BiPO authors' procedure, this package without its cache, and with it.

For each layer and length of prompt, three kinds of run alternate, each in a process of its own, so that neither memory
nor a busy machine favors one of them:

    (a) the authors' procedure, written out: two models, logits of whole sequences, chosen and rejected in rows of
        their own (https://github.com/CaoYuanpu/BiPO); float32
    (b) BiPOTrainer with prefix_cache=False
    (c) BiPOTrainer

    python examples/benchmarks/train_speed.py --data FOLDER [--layers 5 15 25] [--prompts short long] [--rounds 3]

FOLDER holds `train.csv` with the columns question, matching, not_matching, as in the authors' data/wealth-seeking.
Long prompts are eight questions with their answers before the one that is asked. FLOPs are those of the matrix
products that (c) can't do without: forward and gradient of the layers above, for each token of a pair once (of the
last feed-forward part: for the tokens that predict), and of the vocabulary projection of completion tokens. Memory is
the peak while training, after loading.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch


PAIRS, WARMUP = 4, 2


def rows(folder: Path, count: int, prompts: str) -> list[dict[str, Any]]:
    """Conversational pairs."""
    import csv

    with open(folder / "train.csv", encoding="utf-8") as file:
        table = [row for row in csv.DictReader(file) if row["question"].strip()]
    table = [row for row in table if row["matching"] != row["not_matching"]]
    before = 8 if prompts == "long" else 0
    result = []
    for index in range(count):
        shots = [table[(index * 7 + k + 100) % len(table)] for k in range(before)]
        turns = [t for s in shots for t in (("user", s["question"]), ("assistant", s["matching"]))]
        turns.append(("user", table[index]["question"]))
        result.append(
            {
                "prompt": [{"role": role, "content": text} for role, text in turns],
                "chosen": [{"role": "assistant", "content": table[index]["matching"]}],
                "rejected": [{"role": "assistant", "content": table[index]["not_matching"]}],
            }
        )
    return result


def reset_peak() -> None:
    """From here on, `peak` counts anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Peak resident memory in GB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e6


def matrix_peak(dtype: torch.dtype) -> float:
    """FLOPs a second of the fastest of some large matrix products."""
    best = 0.0
    for size in (1024, 2048):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        for _ in range(8):
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def needed_flops(model: torch.nn.Module, layout: Any, layer: int) -> float:
    """Of one step of (c), by the model's shapes."""
    config = model.config
    above = model.model.layers[layer + 1 :]
    weights = sum(m.weight.numel() for block in above for m in block.modules() if isinstance(m, torch.nn.Linear))
    tokens, predicted = len(layout.take), len(layout.targets)
    seen = int(sum(mask.sum() for mask in layout.tree_masks()))
    width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    attention = len(above) * 3 * 2 * 2 * seen * width
    last = sum(m.weight.numel() for m in above[-1].mlp.modules() if isinstance(m, torch.nn.Linear)) if above else 0
    spared = last * (tokens - len(layout.sources.unique()))
    return 4 * (weights * tokens - spared + config.vocab_size * config.hidden_size * predicted) + attention


def authors_run(arguments: argparse.Namespace, model: Any, tokenizer: Any, data: list[dict[str, Any]]) -> dict:
    """(a): float32, a second model as the reference, every logit of every row."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    vector = torch.nn.Parameter(torch.zeros(model.config.hidden_size))
    multiplier = 1.0
    for parameter in (*model.parameters(), *reference.parameters()):
        parameter.requires_grad_(False)
    model.model.layers[arguments.layer].register_forward_hook(lambda _, args, output: output + multiplier * vector)
    optimizer = torch.optim.AdamW([vector], lr=5e-4, weight_decay=0.05)

    def tokens(row: dict[str, Any], answer: str) -> tuple[list[int], list[int]]:
        options = dict(tokenize=True, return_dict=False)
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template(row["prompt"] + row[answer], **options)
        return whole, [-100] * len(prompt) + whole[len(prompt) :]

    def batch_of(index: int) -> tuple[torch.Tensor, ...]:
        chunk = [data[(index * PAIRS + k) % len(data)] for k in range(PAIRS)]
        texts = [tokens(row, answer) for answer in ("chosen", "rejected") for row in chunk]
        width = max(len(ids) for ids, _ in texts)
        padded = [
            (
                ids + [0] * (width - len(ids)),
                [1] * len(ids) + [0] * (width - len(ids)),
                labels + [-100] * (width - len(labels)),
            )
            for ids, labels in texts
        ]
        return tuple(torch.tensor(part) for part in zip(*padded, strict=True))

    def log_probs(which: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = which(input_ids=ids, attention_mask=mask, use_cache=False).logits
        shifted, targets = logits[:, :-1], labels[:, 1:]
        picked = shifted.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
        chosen = slice(None, PAIRS)
        torch.nn.functional.cross_entropy(logits[chosen, :-1].flatten(0, 1), targets[chosen].flatten())
        return (picked * (targets != -100)).sum(-1), logits

    generator = torch.Generator().manual_seed(0)
    seconds, count = [], []
    for step in range(WARMUP + arguments.steps):
        ids, mask, labels = batch_of(step)
        if step == WARMUP:
            reset_peak()
        start = time.perf_counter()
        d = multiplier = 1.0 if torch.rand(1, generator=generator) < 0.5 else -1.0
        policy, logits = log_probs(model, ids, mask, labels)
        with torch.no_grad():
            constant, _ = log_probs(reference, ids, mask, labels)
        chosen, rejected = (policy - constant).chunk(2)
        loss = -torch.nn.functional.logsigmoid(d * 0.1 * (chosen - rejected)).mean()
        float(logits.detach().mean())
        loss.backward()
        torch.nn.utils.clip_grad_norm_([vector], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        count.append(int(mask.sum()))
    return result_of(seconds, count)


def our_run(arguments: argparse.Namespace, model: Any, tokenizer: Any, data: list[dict[str, Any]]) -> dict:
    """(b) and (c)."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from steer_adapter import BiPOConfig, BiPOTrainer, SteerConfig

    seconds: list[float] = []
    layouts: list[Any] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARMUP:
                reset_peak()
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.start)
            layouts.append(trainer.pair_forward.layout)

    with tempfile.TemporaryDirectory() as folder:
        config = BiPOConfig(
            output_dir=folder, max_steps=WARMUP + arguments.steps, per_device_train_batch_size=PAIRS, max_length=None,
            prefix_cache=arguments.only == "c", learning_rate=5e-4, save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = BiPOTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            peft_config=SteerConfig(layers_to_transform=arguments.layer),
            callbacks=[Clock()],
        )
        began = time.perf_counter()
        trainer.train()
        whole = time.perf_counter() - began
    texts = [sum(2 * tree.stem + tree.first + tree.second + 2 for tree in layout.trees) for layout in layouts]
    result = result_of(seconds, texts)
    base = trainer.model.get_base_model()
    result["cache"] = whole - sum(seconds)
    if layouts[0].position_ids is not None:
        flops = [needed_flops(base, layout, arguments.layer) for layout in layouts[WARMUP:]]
        result["flops"] = statistics.mean(flops)
        result["rate"] = statistics.median(f / s for f, s in zip(flops, seconds[WARMUP:], strict=True))
        result["peak_rate"] = matrix_peak(base.dtype)
    return result


def result_of(seconds: list[float], tokens: list[int]) -> dict[str, float]:
    kept = seconds[WARMUP:]
    return {
        "seconds": statistics.median(kept),
        "tokens": sum(tokens[WARMUP:]) / sum(kept),
        "memory": peak(),
    }


def one(arguments: argparse.Namespace) -> None:
    """One run, in this process; its figures as JSON."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    data = rows(arguments.data, PAIRS * (arguments.steps + WARMUP), arguments.prompts[0])
    run = authors_run if arguments.only == "a" else our_run
    print(json.dumps(run(arguments, model, tokenizer, data)))


def every(arguments: argparse.Namespace) -> None:
    """All runs, alternating, and the table."""
    kinds = [("a", "float32"), ("b", "float32"), ("c", "float32"), ("b", "bfloat16"), ("c", "bfloat16")]
    print("| prompts | layer | run | s a step | times (a) | tokens a second | GB | GFLOP | of the peak | caching, s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for prompts in arguments.prompts:
        for layer in arguments.layers:
            runs: dict[tuple[str, str], list[dict[str, float]]] = {kind: [] for kind in kinds}
            for _ in range(arguments.rounds):
                for kind, dtype in kinds:
                    command = [
                        sys.executable, __file__, "--data", arguments.data, "--model", arguments.model, "--only", kind,
                        "--dtype", dtype, "--layer", layer, "--prompts", prompts, "--steps", arguments.steps,
                    ]  # fmt: skip
                    output = subprocess.run(map(str, command), capture_output=True, text=True, check=False)
                    if output.returncode:
                        sys.exit(output.stderr)
                    runs[kind, dtype].append(json.loads(output.stdout.splitlines()[-1]))
                    print(prompts, layer, kind, dtype, runs[kind, dtype][-1], file=sys.stderr, flush=True)
            slowest = statistics.median(r["seconds"] for r in runs["a", "float32"])
            for (kind, dtype), results in runs.items():
                mean = {key: statistics.median(r[key] for r in results) for key in results[0]}
                cells = [prompts, layer, f"({kind}) {dtype}", f"{mean['seconds']:.2f}"]
                cells += [f"{slowest / mean['seconds']:.1f}", f"{mean['tokens']:.0f}", f"{mean['memory']:.2f}"]
                if kind == "c" and "flops" in mean:
                    share = mean["rate"] / mean["peak_rate"]
                    cells += [f"{mean['flops'] / 1e9:.0f}", f"{share:.0%}", f"{mean['cache']:.1f}"]
                print("| " + " | ".join(map(str, cells)) + " |" * (11 - len(cells)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 15, 25])
    parser.add_argument("--prompts", nargs="+", default=["short", "long"], choices=["short", "long"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", choices=["a", "b", "c"], help=argparse.SUPPRESS)
    parser.add_argument("--layer", type=int, default=15, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.model is None:
        from steer_adapter.demo.model import smollm2

        arguments.model = str(smollm2())
    (one if arguments.only else every)(arguments)


if __name__ == "__main__":
    main()
