"""What a vector for each of several layers costs in one run, beside a run for each.

    python examples/benchmarks/layer_search.py --data FOLDER [--layers 8 10 12 ...] [--pairs 64] [--epochs 1]

FOLDER holds `train.csv` with the columns question, matching, not_matching, as in the authors' data/wealth-seeking.
Both ways are whole commands, `steer-adapter train`, from start to exit: loading, tokenizing, training, writing. The
one run goes first and last, the separate ones between them. Prints seconds, their ratio, and how far the vectors
differ.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file


def write_pairs(folder: Path, count: int, target: Path) -> None:
    """The first pairs, as JSON lines."""
    with open(folder / "train.csv", encoding="utf-8") as file:
        table = [row for row in csv.DictReader(file) if row["question"].strip()]
    table = [row for row in table if row["matching"] != row["not_matching"]]
    rows = ({"prompt": r["question"], "chosen": r["matching"], "rejected": r["not_matching"]} for r in table[:count])
    target.write_text("\n".join(map(json.dumps, rows)))


def seconds(arguments: argparse.Namespace, layers: str, data: Path, output: Path) -> float:
    """Of one command."""
    command = [
        sys.executable, "-m", "steer_adapter.cli", "train", "--model", arguments.model, "--data", str(data),
        "--layers", layers, "--output", str(output), "--num_train_epochs", str(arguments.epochs), "--dtype",
        arguments.dtype, "--use_cpu", "True", "--disable_tqdm", "True",
    ]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of many vectors in one run.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(8, 24, 2)))
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model")
    arguments = parser.parse_args()
    if arguments.model is None:
        from steer_adapter.demo.model import smollm2

        arguments.model = str(smollm2())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "pairs.jsonl"
        write_pairs(arguments.data, arguments.pairs, data)
        each = "each:" + ",".join(map(str, arguments.layers))
        first = seconds(arguments, each, data, folder / "first")
        print(f"one run: {first:.0f} s", flush=True)
        alone = {}
        for layer in arguments.layers:
            alone[layer] = seconds(arguments, str(layer), data, folder / f"alone-{layer}")
            print(f"layer {layer} alone: {alone[layer]:.0f} s", flush=True)
        last = seconds(arguments, each, data, folder / "last")
        total = sum(alone.values())
        print(f"one run: {last:.0f} s; separate: {total:.0f} s; ratio {first / total:.2f} and {last / total:.2f}")
        for layer in arguments.layers:
            paths = (folder / "first" / f"layer-{layer}", folder / f"alone-{layer}")
            (a,), (b,) = (load_file(path / "adapter_model.safetensors").values() for path in paths)
            print(
                f"layer {layer}: |v| {float(b.norm()):.3g}, relative difference {float((a - b).norm() / b.norm()):.1e}"
            )


if __name__ == "__main__":
    main()
