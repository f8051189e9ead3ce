"""How far BiPO vectors move a model on real preference pairs, beside mean difference.

For each behavior it trains a vector on SmolLM2-135M-Instruct and prints, for 80 held-out pairs, the mean change of
log p(chosen) − log p(rejected) per multiplier, in nats, the share of the pairs that move the right way, and |v|.

    python examples/benchmarks/effect.py --data FOLDER [--behavior wealth-seeking power-seeking] [--max-steps 200]

FOLDER holds `<behavior>/train.csv` and `test.csv` with the columns question, matching, not_matching, as in the BiPO
authors' repository (https://github.com/CaoYuanpu/BiPO, data/).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path

import torch

from steer_adapter import BiPOConfig, BiPOTrainer, SteerConfig
from steer_adapter.cli.models import load_model, load_tokenizer
from steer_adapter.data import as_conversations, load_pairs
from steer_adapter.demo.model import smollm2
from steer_adapter.evaluate.report import margins_table
from steer_adapter.evaluate.sweep import sweep
from steer_adapter.learn.mean_difference import fit_mean_difference


COLUMNS = {"prompt": "question", "chosen": "matching", "rejected": "not_matching"}
MULTIPLIERS = (-2.0, -1.0, 1.0, 2.0)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    model, tokenizer = load_model(str(smollm2()), arguments.dtype), load_tokenizer(str(smollm2()))
    files = (str(folder / f"{part}.csv") for part in ("train", "test"))
    train, test = (as_conversations(load_pairs(file, COLUMNS, drop_bad=True)) for file in files)
    config = BiPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=arguments.max_steps,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        per_device_eval_batch_size=8,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=False,
        report_to="none",
    )
    trainer = BiPOTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=test.select(range(arguments.held_out)),
        processing_class=tokenizer,
        peft_config=SteerConfig(layers_to_transform=arguments.layer),
    )
    held_out = list(trainer.get_eval_dataloader())
    (vector,) = [p for n, p in trainer.model.named_parameters() if "steer_vector" in n]
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    sweeps, norms = {"BiPO": sweep(trainer.model, held_out, MULTIPLIERS)}, [float(vector.norm())]
    fit_mean_difference(trainer.model, trainer.get_train_dataloader())
    sweeps["mean difference"] = sweep(trainer.model, held_out, MULTIPLIERS)
    norms.append(float(vector.norm()))
    with torch.no_grad():
        vector.mul_(norms[0] / norms[1])
    sweeps["mean difference, same norm"] = sweep(trainer.model, held_out, MULTIPLIERS)
    print(
        f"\n## {folder.name}: layer {arguments.layer}, {arguments.max_steps} steps of 4 pairs, learning rate "
        f"{trainer.args.learning_rate:.3g}, {seconds / arguments.max_steps:.2f} s a step, {arguments.dtype}\n"
    )
    print(f"|v|: BiPO {norms[0]:.1f}, mean difference {norms[1]:.1f}\n")
    print(margins_table(sweeps), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--behavior", nargs="+", default=["wealth-seeking", "power-seeking"])
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=None, help="default: found by the trainer")
    parser.add_argument("--held-out", type=int, default=80)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for behavior in arguments.behavior:
        measure(arguments.data / behavior, arguments)


if __name__ == "__main__":
    main()
