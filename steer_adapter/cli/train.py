"""`steer-adapter train`: preference pairs in, an adapter out."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

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
from steer_adapter.learn.processes import check_processes
from steer_adapter.learn.provenance import begin_record
from steer_adapter.learn.recipes import RECIPES
from steer_adapter.learn.together import trainers_together
from steer_adapter.tuner import SteerConfig
from steer_adapter.tuner.facts import renew_cards

from .models import DTYPES, chat_or_plain, is_adapter, load_model, load_tokenizer
from .output import check_output, remove_if_empty, written_whole
from .processes import all_of, end_processes, one_speaks
from .run_file import run_options, write_run_file
from .vectors import Vector, comparison, vectors_of


@dataclass
class TrainArguments:
    """What to train, on what, and where to."""

    model: str = field(metadata={"help": "Folder or Hub id of the model to steer; it may be a LoRA adapter."})
    data: list[str] = field(
        metadata={
            "help": "Preference pairs: .jsonl, .json, .csv or .parquet, or a dataset's Hub id; each makes a vector."
        }
    )
    layers: list[str] = field(
        metadata={
            "help": "Decoder layers to steer, from 0, or from the end if negative; each:8-20 makes a vector for each."
        }
    )
    output: str = field(metadata={"help": "Folder for the adapter; of several, each gets a folder in it."})
    method: str = field(
        default="bipo", metadata={"help": "How to learn the vector.", "choices": ["bipo", "mean-difference"]}
    )
    eval_data: list[str] | None = field(default=None, metadata={"help": "Held-out pairs, one for each in --data."})
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
    eval_data_sha256: str | None = field(default=None, metadata={"help": "The same for the held-out pairs."})


def parse(argv: Sequence[str]) -> tuple[TrainArguments, BiPOConfig, list[Vector]]:
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
    try:
        vectors = vectors_of(train_arguments.data, train_arguments.layers, train_arguments.eval_data)
    except ConfigError as error:
        parser.error(str(error))
    return train_arguments, config, vectors


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
    _defaults()
    arguments, config, vectors = parse(argv)
    check_processes()
    speaks = one_speaks()
    _check(arguments, config, vectors)
    output = check_output(arguments.output, arguments.overwrite or config.resume_from_checkpoint is not None)
    PartialState().wait_for_everyone()  # until all have looked, nothing is written there
    try:
        learn_all(arguments, config, output, vectors)
    finally:
        if speaks:
            for folder in (*(Path(config.output_dir) / vector.name for vector in vectors), config.output_dir, output):
                remove_if_empty(folder)
    end_processes()
    if not speaks:
        return
    if len(vectors) > 1:
        print(f"{comparison(output)}\nThe adapters are in {output}, each in a folder of its name.")
        return
    # The vector's own config names the base model, without the LoRA that it was trained on.
    model = f" --model {arguments.model}" if is_adapter(arguments.model) else ""
    print(f"The adapter is in {output}. Try it: steer-adapter generate --adapter {output}{model} --prompt '...'")


def _check(arguments: TrainArguments, config: BiPOConfig, vectors: list[Vector]) -> None:
    if arguments.method == "mean-difference" and config.resume_from_checkpoint:
        raise ConfigError("Received --resume_from_checkpoint with --method mean-difference, which has no checkpoints.")
    if len(vectors) > 1 and config.resume_from_checkpoint not in (None, "last", "True", "true"):
        raise ConfigError(
            f"--resume_from_checkpoint: received {config.resume_from_checkpoint!r} for {len(vectors)} vectors, "
            "expected 'last': a checkpoint is of one vector."
        )
    hashes = (arguments.data_sha256, arguments.eval_data_sha256)
    if hashes != (None, None) and len({vector.data for vector in vectors}) > 1:
        raise ConfigError("Received --data-sha256 with several --data, expected one: it is the hash of one file.")


def learn_all(arguments: TrainArguments, config: BiPOConfig, output: Path, vectors: list[Vector]) -> None:
    """Train and write each adapter; those of the same pairs share what is frozen."""
    loaded = {vector.data: _load_data(arguments, vector) for vector in vectors}
    model, tokenizer = load_model(arguments.model, arguments.dtype), load_tokenizer(arguments.model)
    for source, pairs in loaded.items():
        own = {vector.name: vector for vector in vectors if vector.data == source}
        if config.resume_from_checkpoint and len(vectors) > 1:
            own = {name: vector for name, vector in own.items() if not _is_done(output / name)}
        chat = chat_or_plain(tokenizer, arguments.chat, arguments.system_prompt)
        if chat and not is_conversational(pairs[0][0]) and one_speaks():
            print(f"{source}: put into the model's chat template (--chat off leaves it as it is).", file=sys.stderr)
        train, held_out = (_formatted(dataset, chat, arguments.system_prompt) for dataset in pairs)
        configs = {name: _steer_config(arguments, vector.layers) for name, vector in own.items()}
        datasets = dict(train_dataset=train, eval_dataset=held_out, processing_class=tokenizer)
        for name, trainer in trainers_together(model, configs, config, **datasets) if own else ():
            if len(vectors) > 1 and one_speaks():
                print(f"{name}:", file=sys.stderr)
            _name_sources(trainer, own[name], arguments)
            learn(trainer, _arguments_of(arguments, own[name]), output / name)


def _arguments_of(arguments: TrainArguments, vector: Vector) -> TrainArguments:
    """Those that make one of the vectors alone."""
    held_out = None if vector.eval_data is None else [vector.eval_data]
    return replace(arguments, layers=cast(Any, vector.layers), data=[vector.data], eval_data=held_out)


def _is_done(folder: Path) -> bool:
    """Whether an interrupted run has finished the vector of this folder: its config is written last."""
    done = (folder / "adapter_config.json").exists()
    if done:
        print(f"{folder}: it is there already and is left as it is.", file=sys.stderr)
    return done


def learn(trainer: BiPOTrainer, arguments: TrainArguments, output: Path) -> None:
    """Train and write one adapter."""
    if arguments.method == "mean-difference":
        trainer.provenance["method"] = arguments.method
        begin_record(trainer)
        fit_mean_difference(trainer.model, all_of(trainer, trainer.train_dataset), trainer.adapter_name)
    else:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
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
    hashes = [trainer.provenance.get(key, {}).get("sha256") for key in ("data", "held_out")]
    found = replace(arguments, data_sha256=hashes[0], eval_data_sha256=hashes[1])
    return run_options(found, trainer.args, _defaults())


@cache
def _defaults() -> BiPOConfig:
    """Made before any other: one that is made later changes what accelerate knows of the processes."""
    return BiPOConfig(output_dir="defaults")


def _load_data(arguments: TrainArguments, vector: Vector) -> tuple[Any, Any]:
    columns = {name: getattr(arguments, f"{name}_column") for name in ("prompt", "chosen", "rejected")}
    drop_bad = arguments.drop_bad_pairs
    train = load_pairs(vector.data, columns, drop_bad=drop_bad)
    return train, load_pairs(vector.eval_data, columns, drop_bad=drop_bad) if vector.eval_data else None


def _formatted(dataset: Any, chat: bool, system_prompt: str | None) -> Any:
    if dataset is None or not (chat or is_conversational(dataset[0])):
        return dataset
    return as_conversations(dataset, system_prompt)


def _steer_config(arguments: TrainArguments, layers: list[int]) -> SteerConfig:
    known = {"license": arguments.license, "behavior": arguments.behavior}
    if is_adapter(arguments.model):
        known["trained_on"] = _name_of(arguments.model)
    return SteerConfig(
        layers_to_transform=layers,
        multiplier=arguments.multiplier,
        task_type="CAUSAL_LM",
        provenance={name: value for name, value in known.items() if value is not None},
    )


def _name_sources(trainer: BiPOTrainer, vector: Vector, arguments: TrainArguments) -> None:
    wanted = {"data": (vector.data, arguments.data_sha256), "held_out": (vector.eval_data, arguments.eval_data_sha256)}
    for key, (source, sha256) in wanted.items():
        if source is None:
            continue
        record = trainer.provenance[key]
        record["source"] = _name_of(source)
        if sha256 not in (None, record["sha256"]):
            option = "--data-sha256" if key == "data" else "--eval-data-sha256"
            raise DataError(
                f"{source}: the pairs have the SHA-256 {record['sha256']}, expected {sha256}. They "
                f"are not those that the run was made with; leave out {option} to take them all the same."
            )


def _name_of(source: str) -> str:
    """A Hub id as it is, and of a path the last part: the rest is nobody's business."""
    return Path(source).name if os.path.exists(os.path.expanduser(source)) else source
