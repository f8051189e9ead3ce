"""`steer-adapter train`: preference pairs in, an adapter out."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from trl import TrlParser

from steer_adapter.data import as_conversations, is_conversational, load_pairs
from steer_adapter.errors import ConfigError, DataError, MissingExtraError, SteerError
from steer_adapter.evaluate.plots import plot_margins
from steer_adapter.evaluate.record import record_sweep
from steer_adapter.evaluate.sweep import Sweep, sweep
from steer_adapter.files.card_file import kept_if_edited
from steer_adapter.learn.bipo import BiPOConfig, BiPOTrainer
from steer_adapter.learn.mean_difference import fit_mean_difference
from steer_adapter.learn.provenance import begin_record
from steer_adapter.learn.recipes import RECIPES
from steer_adapter.tuner import SteerConfig
from steer_adapter.tuner.facts import renew_cards

from .models import DTYPES, chat_or_plain, is_adapter, load_model, load_tokenizer
from .output import check_output, remove_if_empty, written_whole
from .processes import all_of, one_speaks
from .run_file import run_options, write_run_file


@dataclass
class TrainArguments:
    """What to train, on what, and where to."""

    model: str = field(metadata={"help": "Folder or Hub id of the model to steer; it may be a LoRA adapter."})
    data: str = field(metadata={"help": "Preference pairs: .jsonl, .json, .csv or .parquet, or a dataset's Hub id."})
    layers: list[int] = field(metadata={"help": "Decoder layers to steer, from 0, or from the end if negative."})
    output: str = field(metadata={"help": "Folder for the adapter."})
    method: str = field(
        default="bipo", metadata={"help": "How to learn the vector.", "choices": ["bipo", "mean-difference"]}
    )
    eval_data: str | None = field(default=None, metadata={"help": "Held-out pairs, as --data."})
    prompt_column: str = field(default="prompt", metadata={"help": "Name of the column with the prompts."})
    chosen_column: str = field(default="chosen", metadata={"help": "Name of the column with the chosen answers."})
    rejected_column: str = field(default="rejected", metadata={"help": "Name of the column with the rejected ones."})
    drop_bad_pairs: bool = field(
        default=False, metadata={"help": "Leave out pairs with an empty text or equal answers, instead of stopping."}
    )
    chat: str = field(
        default="auto",
        metadata={
            "help": "Put plain-text pairs into the model's chat template: on, off, or auto (if it has one).",
            "choices": ["auto", "on", "off"],
        },
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System prompt of every conversation."})
    multiplier: float = field(default=1.0, metadata={"help": "Initial strength of the saved adapter."})
    dtype: str = field(
        default="auto", metadata={"help": "Dtype of the model; the vector is float32.", "choices": list(DTYPES)}
    )
    recipe: str | None = field(
        default=None, metadata={"help": "Start from published settings.", "choices": sorted(RECIPES)}
    )
    overwrite: bool = field(default=False, metadata={"help": "Write into a folder that holds something already."})
    behavior: str | None = field(default=None, metadata={"help": "What the vector is for, in a line, for its card."})
    license: str | None = field(default=None, metadata={"help": "License of the vector, for its card: apache-2.0, …"})
    data_sha256: str | None = field(
        default=None, metadata={"help": "The hash that the pairs must have, as in the card of a vector."}
    )


def parse(argv: Sequence[str]) -> tuple[TrainArguments, BiPOConfig]:
    """Read the command line and its `--config` file. Ends the program with code 2 on wrong usage."""
    parser = TrlParser(
        (TrainArguments, BiPOConfig),
        prog="steer-adapter train",
        description="Learn a steering vector from preference pairs and save it as a PEFT adapter. Every option can "
        "also stand in a YAML file given with --config; the command line wins.",
    )
    recipe = _apply_recipe(argv, parser)
    parser.set_defaults(save_strategy="no", report_to="none")
    for action in parser._actions:
        if action.dest == "output_dir":
            action.help = "Folder for checkpoints (default: the folder 'checkpoints' in --output)."
    try:
        train_arguments, config = parser.parse_args_and_config(list(argv))
    except SteerError:
        raise
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    if train_arguments.recipe != recipe:
        parser.error(
            "recipe: expected on the command line (--recipe NAME); in the config file it would not be applied"
        )
    if "--output_dir" not in argv and "--output-dir" not in argv and config.output_dir == "trainer_output":
        config.output_dir = str(Path(train_arguments.output).expanduser() / "checkpoints")
    return train_arguments, config


def _apply_recipe(argv: Sequence[str], parser: TrlParser) -> str | None:
    """Set a recipe's values as defaults, below those of the config file and of the command line; its name."""
    for index, argument in enumerate(argv):
        name = argument.partition("=")[2] or "".join(argv[index + 1 : index + 2])
        if argument.partition("=")[0] == "--recipe" and name in RECIPES:
            parser.set_defaults_with_config(**RECIPES[name])
            return name
    return None


def run(argv: Sequence[str]) -> None:
    """The command."""
    arguments, config = parse(argv)
    speaks = one_speaks()
    output = check_output(arguments.output, arguments.overwrite or config.resume_from_checkpoint is not None)
    PartialState().wait_for_everyone()  # until all have looked, nothing is written there
    try:
        learn(arguments, config, output)
    finally:
        if speaks:
            remove_if_empty(config.output_dir)
            remove_if_empty(output)
    if not speaks:
        return
    # The vector's own config names the base model, without the LoRA that it was trained on.
    model = f" --model {arguments.model}" if is_adapter(arguments.model) else ""
    print(f"The adapter is in {output}. Try it: steer-adapter generate --adapter {output}{model} --prompt '...'")


def learn(arguments: TrainArguments, config: BiPOConfig, output: Path) -> None:
    """Train and write the adapter."""
    trainer = make_trainer(arguments, config)
    if arguments.method == "mean-difference":
        trainer.provenance["method"] = arguments.method
        begin_record(trainer)
        fit_mean_difference(trainer.model, all_of(trainer, trainer.train_dataset), trainer.adapter_name)
    else:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    sweeps = measure(trainer, arguments.method) if arguments.eval_data is not None else {}
    if not PartialState().is_main_process:
        with tempfile.TemporaryDirectory() as nowhere:  # it takes part where a vector is gathered, and writes nothing
            trainer.save_model(nowhere)
        return
    with kept_if_edited(output) as edited:
        with written_whole(output) as beside:
            trainer.save_model(str(beside))
            write_run_file(beside, options(arguments, trainer))
            if sweeps:
                with suppress(MissingExtraError):  # a card without the picture says the same
                    plot_margins(sweeps, beside / "margins.png", "Held-out pairs")
        renew_cards(output)
    if edited:
        print(f"{output}: README.md was edited and is left as it is; delete it for a new one.", file=sys.stderr)


def measure(trainer: BiPOTrainer, method: str) -> dict[str, Sweep]:
    """Evaluate on the held-out pairs and record the margins, for the card."""
    trainer.evaluate()
    progress = not trainer.args.disable_tqdm and PartialState().is_main_process
    result = sweep(trainer.model, all_of(trainer, trainer.eval_dataset), progress=progress)
    record_sweep(trainer.model.peft_config[trainer.adapter_name], result)
    return {method: result}


def options(arguments: TrainArguments, trainer: BiPOTrainer) -> dict[str, Any]:
    """What `run.yaml` holds."""
    found = replace(arguments, data_sha256=trainer.provenance["data"]["sha256"])
    return run_options(found, trainer.args, BiPOConfig(output_dir=trainer.args.output_dir))


def make_trainer(arguments: TrainArguments, config: BiPOConfig) -> BiPOTrainer:
    """Load the data and the model, and put a vector on it."""
    columns = {name: getattr(arguments, f"{name}_column") for name in ("prompt", "chosen", "rejected")}
    drop_bad = arguments.drop_bad_pairs
    train = load_pairs(arguments.data, columns, drop_bad=drop_bad)
    held_out = load_pairs(arguments.eval_data, columns, drop_bad=drop_bad) if arguments.eval_data else None
    if arguments.method == "mean-difference" and config.resume_from_checkpoint:
        raise ConfigError("Received --resume_from_checkpoint with --method mean-difference, which has no checkpoints.")
    model, tokenizer = load_model(arguments.model, arguments.dtype), load_tokenizer(arguments.model)

    def formatted(dataset: Any) -> Any:
        if dataset is None:
            return None
        chat = is_conversational(dataset[0]) or chat_or_plain(tokenizer, arguments.chat, arguments.system_prompt)
        return as_conversations(dataset, arguments.system_prompt) if chat else dataset

    plain = not is_conversational(train[0])
    if plain and chat_or_plain(tokenizer, arguments.chat, arguments.system_prompt) and one_speaks():
        print(
            "The pairs are put into the model's chat template (--chat off leaves them as plain text).", file=sys.stderr
        )
    known = {"license": arguments.license, "behavior": arguments.behavior}
    if is_adapter(arguments.model):
        known["trained_on"] = _name_of(arguments.model)
    steer_config = SteerConfig(
        layers_to_transform=arguments.layers,
        multiplier=arguments.multiplier,
        task_type="CAUSAL_LM",
        provenance={name: value for name, value in known.items() if value is not None},
    )
    trainer = BiPOTrainer(
        model=model,
        args=config,
        train_dataset=formatted(train),
        eval_dataset=formatted(held_out),
        processing_class=tokenizer,
        peft_config=steer_config,
    )
    _name_sources(trainer, arguments)
    return trainer


def _name_sources(trainer: BiPOTrainer, arguments: TrainArguments) -> None:
    data = trainer.provenance["data"]
    data["source"] = _name_of(arguments.data)
    if arguments.eval_data is not None:
        trainer.provenance["held_out"]["source"] = _name_of(arguments.eval_data)
    if arguments.data_sha256 not in (None, data["sha256"]):
        raise DataError(
            f"{arguments.data}: the pairs have the SHA-256 {data['sha256']}, expected {arguments.data_sha256}. They "
            "are not those that the run was made with; leave out --data-sha256 to train on them all the same."
        )


def _name_of(source: str) -> str:
    """A Hub id as it is, and of a path the last part: the rest is nobody's business."""
    return Path(source).name if os.path.exists(os.path.expanduser(source)) else source
