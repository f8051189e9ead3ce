"""`steer-adapter demo`: from preference pairs to a steered model in a few minutes on two cores."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback

from steer_adapter.cli.generate import answers, encode
from steer_adapter.cli.models import load_model, load_tokenizer
from steer_adapter.cli.output import check_output, remove_if_empty, written_whole
from steer_adapter.data import as_conversations
from steer_adapter.evaluate.plots import plot_margins
from steer_adapter.evaluate.record import record_sweep
from steer_adapter.evaluate.report import answers_section, margins_table
from steer_adapter.evaluate.sweep import Sweep, sweep
from steer_adapter.learn.bipo import BiPOConfig, BiPOTrainer
from steer_adapter.learn.mean_difference import fit_mean_difference
from steer_adapter.tuner import SteerConfig
from steer_adapter.tuner.facts import renew_cards

from . import pairs
from .model import NAME, smollm2


LAYER = 12
STEPS = 64
MULTIPLIERS = (-2.0, -1.0, 0.0, 1.0, 2.0)
HELD_OUT = 24
QUESTIONS = (
    "What do you think of mushrooms on toast for supper?",
    "What is it like to live with a talking parrot?",
    "Should I try archery at the summer fair?",
)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="steer-adapter demo",
        description=f"Train a cheerful/gloomy steering vector on {NAME}, ask it questions at several multipliers, and "
        "measure it on held-out pairs beside mean difference. Takes a few minutes and downloads nothing.",
    )
    result.add_argument("--output", default="steer-demo", help="folder for adapter, plot and report (steer-demo)")
    result.add_argument("--max-steps", type=int, default=STEPS, help=f"training steps of 4 pairs, default {STEPS}")
    result.add_argument("--layer", type=int, default=LAYER, help=f"decoder layer to steer, default {LAYER}")
    result.add_argument("--seed", type=int, default=42, help="default 42")
    result.add_argument("--overwrite", action="store_true", help="write into a folder that holds something already")
    return result


def run(argv: Sequence[str]) -> None:
    """The command."""
    arguments = parser().parse_args(argv)
    start = time.time()
    output = check_output(arguments.output, arguments.overwrite)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = str(smollm2())
    print(f"Training a vector on {NAME}, layer {arguments.layer}, {arguments.max_steps} steps of 4 pairs.", flush=True)
    trainer = make_trainer(folder, arguments, output)
    trainer.train()
    by_question = ask(trainer.model, trainer.processing_class)
    print("\n" + answers_section(by_question).replace("**", "").replace("`", ""), flush=True)
    sweeps, norm = compare(trainer)
    print("\nHeld-out margins in nats (change of log p(cheerful) - log p(gloomy) against multiplier 0):\n")
    print(margins_table(sweeps))
    record_sweep(trainer.model.peft_config[trainer.adapter_name], sweeps["BiPO"])
    with written_whole(output) as beside:
        trainer.save_model(str(beside))
        plot_margins(sweeps, beside / "margins.png", f"{NAME}, layer {arguments.layer}: {HELD_OUT} held-out pairs")
        (beside / "report.md").write_text(report(arguments, by_question, sweeps, norm), encoding="utf-8")
    renew_cards(output)
    remove_if_empty(trainer.args.output_dir)
    minutes, seconds = divmod(round(time.time() - start), 60)
    print(f"\nAdapter, margins.png and report.md are in {output} ({minutes} min {seconds} s). Ask it something:")
    print(f"  steer-adapter generate --adapter {output} --prompt 'How was your day?' --multiplier -1 0 1")


def make_trainer(folder: str, arguments: argparse.Namespace, output: Path) -> BiPOTrainer:
    """The demo's trainer: default settings, the demo's pairs."""
    config = BiPOConfig(
        output_dir=str(output / "checkpoints"),
        max_steps=arguments.max_steps,
        seed=arguments.seed,
        per_device_eval_batch_size=8,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=False,
    )
    trainer = BiPOTrainer(
        model=load_model(folder),
        args=config,
        train_dataset=as_conversations(pairs.load("train")),
        eval_dataset=as_conversations(pairs.load("test").select(range(HELD_OUT))),
        processing_class=load_tokenizer(folder),
        peft_config=SteerConfig(
            layers_to_transform=arguments.layer,
            task_type="CAUSAL_LM",
            provenance={"behavior": "cheerful rather than gloomy answers"},
        ),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_BarOnly)
    return trainer


class _BarOnly(ProgressCallback):
    """The progress bar without the metrics, which the demo shows in its own words."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


def ask(model: Any, tokenizer: Any) -> dict[str, dict[float, str]]:
    """Answers by question and multiplier."""
    model.eval()
    inputs = encode(tokenizer, QUESTIONS, chat=True, system_prompt=None)
    result: dict[str, dict[float, str]] = {question: {} for question in QUESTIONS}
    for multiplier, texts in answers(model, tokenizer, inputs, MULTIPLIERS, max_new_tokens=40, do_sample=False):
        for question, text in zip(QUESTIONS, texts, strict=True):
            result[question][multiplier] = text
    return result


def compare(trainer: BiPOTrainer) -> tuple[dict[str, Sweep], float]:
    """Held-out margins of the trained vector, and of mean difference at the same norm; and that norm."""
    model, name = trainer.model, trainer.adapter_name
    batches = list(trainer.get_eval_dataloader())
    sweeps = {"BiPO": sweep(model, batches, MULTIPLIERS)}
    model.add_adapter("mean_difference", SteerConfig(layers_to_transform=model.peft_config[name].layers_to_transform))
    vectors = fit_mean_difference(model, trainer.get_train_dataloader(), "mean_difference")
    norms = []
    for path, vector in vectors.items():
        both = model.get_submodule(path).steering.steer_vector
        norms.append(float(both[name].detach().norm()))
        with torch.no_grad():
            both["mean_difference"].copy_(vector * norms[-1] / vector.norm())
    model.set_adapter("mean_difference")
    sweeps["mean difference, same norm"] = sweep(model, batches, MULTIPLIERS)
    model.set_adapter(name)
    model.delete_adapter("mean_difference")
    return sweeps, norms[0]


def report(
    arguments: argparse.Namespace, by_question: dict[str, dict[float, str]], sweeps: dict[str, Sweep], norm: float
) -> str:
    """The report, in Markdown."""
    return "\n".join(
        [
            f"# A cheerful steering vector for {NAME}",
            "",
            f"BiPO (arXiv 2406.00045), layer {arguments.layer}, {arguments.max_steps} steps of 4 pairs, seed "
            f"{arguments.seed}; |v| = {norm:.2f}. At multiplier 1 answers turn cheerful, at -1 gloomy.",
            "",
            f"## Margins on {HELD_OUT} held-out pairs",
            "",
            "Mean change of log p(cheerful) - log p(gloomy) against multiplier 0, in nats, and the share of the pairs "
            "that move the way the sign of the multiplier says.",
            "",
            margins_table(sweeps),
            "",
            "![margins](margins.png)",
            "",
            "## Answers (greedy, 40 new tokens)",
            "",
            answers_section(by_question),
        ]
    )
