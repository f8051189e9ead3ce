"""The command `steer-adapter`. Each subcommand is a module with `run(argv)`, imported when it is called."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from steer_adapter.errors import SteerError
from steer_adapter.extras import require


COMMANDS = {
    "demo": ("steer_adapter.demo.command", "train, steer and measure on a small real model; needs no arguments"),
    "train": ("steer_adapter.cli.train", "learn a steering vector from preference pairs"),
    "plan": ("steer_adapter.cli.plan", "say what memory and disk training needs, without loading the model"),
    "generate": ("steer_adapter.cli.generate", "answer a prompt at several multipliers"),
    "inspect": ("steer_adapter.cli.inspect", "say what is in adapters, without loading a model"),
    "push": ("steer_adapter.cli.push", "upload an adapter, or a library of them, to the Hub"),
    "import": ("steer_adapter.cli.import_", "make an adapter of a bare .pt vector"),
}
# Optional packages that a command's module imports, and the extra that brings them.
NEEDS = {"demo": (("trl", "demo"), ("matplotlib", "demo")), "train": (("trl", "train"),), "plan": (("trl", "train"),)}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: steer-adapter COMMAND [options]",
            "",
            "Steering vectors for language models, as PEFT adapters.",
            "",
            "commands:",
            *lines,
            "",
            "steer-adapter COMMAND --help says more. Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage())
        return 0
    if arguments[:1] == ["--version"]:
        from steer_adapter import __version__

        print(__version__)
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        received = f"received {arguments[0]!r}, expected" if arguments else "expected"
        print(f"{usage()}\n\nerror: {received} one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    # PEFT reads an attribute that transformers has renamed; its users can do nothing about it.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    try:
        for package, extra in NEEDS.get(arguments[0], ()):
            require(package, extra, f"steer-adapter {arguments[0]}")
        import_module(COMMANDS[arguments[0]][0]).run(arguments[1:])
    except (SteerError, OSError, ValueError) as error:  # PEFT, TRL and the Hub client report bad input so
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
