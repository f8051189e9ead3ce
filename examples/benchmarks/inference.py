"""What steering costs at run time, beside the unsteered model and two other packages.

On SmolLM2-135M-Instruct, for a prefill of 64 tokens and for decoding with a cache, at batch 1 and 16: one vector of
this package, of repeng and of steering-vectors. A package that is missing is left out; both are had with

    pip install "numpy<2" "scikit-learn<1.6" "scipy<1.14" && pip install --no-deps repeng steering-vectors

At batch 32: rows that each have a vector and a multiplier of their own, out of 10,000. Then how long it takes to load
10,000 saved vectors, and to choose others.

    python examples/benchmarks/inference.py [--rounds 200] [--layer 15] [--dtype bfloat16] [--vectors 10000]

Timings of one machine drift, so each round times every variant once, in random order, and what is printed is the
median over the rounds of the ratio to the unsteered model in the same round, with a 95 % interval (bootstrap).
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from steer_adapter import SteerConfig, load_library, steering
from steer_adapter.cli.models import load_model
from steer_adapter.demo.model import smollm2


Variant = Callable[[], AbstractContextManager[object]]
PREFILL, ROWS = 64, 32


def ours(model: nn.Module, layer: int, vector: torch.Tensor) -> Variant:
    config = SteerConfig(layers_to_transform=layer)

    @contextmanager
    def enabled() -> Iterator[None]:
        steered = get_peft_model(model, config)
        with torch.no_grad():
            next(p for n, p in steered.named_parameters() if "steer_vector" in n).copy_(vector)
        steered.requires_grad_(False)
        try:
            yield
        finally:
            steered.unload()

    return enabled


def repeng(model: nn.Module, layer: int, vector: torch.Tensor) -> Variant:
    from repeng.control import ControlModel

    @contextmanager
    def enabled() -> Iterator[None]:
        control = ControlModel(model, [layer])
        control.set_raw_control({layer: vector.to(model.dtype)})
        try:
            yield
        finally:
            control.unwrap()

    return enabled


def steering_vectors(model: nn.Module, layer: int, vector: torch.Tensor) -> Variant:
    from steering_vectors import SteeringVector

    return lambda: SteeringVector({layer: vector.to(model.dtype)}).apply(model)


def variants_of(model: nn.Module, layer: int, vector: torch.Tensor) -> dict[str, Variant]:
    """By name, a context in which the bare model is steered by that package."""
    found: dict[str, Variant] = {"unsteered": nullcontext}
    for name, make in (("steer_adapter", ours), ("repeng", repeng), ("steering-vectors", steering_vectors)):
        try:
            found[name] = make(model, layer, vector)
        except (ImportError, AttributeError) as error:  # repeng does not know NumPy 2
            print(f"{name} is left out: {error}")
    return found


@torch.no_grad()
def prefill(model: nn.Module, batch: int) -> Callable[[], None]:
    ids = torch.randint(100, 10000, (batch, PREFILL))
    positions = torch.arange(PREFILL).expand(batch, PREFILL)  # repeng needs one of each row
    return lambda: model(ids, position_ids=positions)


@torch.no_grad()
def decode(model: nn.Module, batch: int) -> Callable[[], None]:
    """One more token after a prompt; the cache is cut back afterwards."""
    ids = torch.randint(100, 10000, (batch, PREFILL))
    cache = model(ids, use_cache=True).past_key_values

    positions = torch.full((batch, 1), PREFILL)

    def step() -> None:
        model(ids[:, -1:], position_ids=positions, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def paired(variants: dict[str, Variant], run: Callable[[], None], rounds: int, what: str) -> dict[str, list[float]]:
    """By variant, its time over that of the unsteered model, for each round."""
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    for index in tqdm(range(rounds + 3), desc=what, leave=False):
        seconds = {}
        for name in random.sample(list(variants), len(variants)):
            with variants[name](), torch.no_grad():
                run()  # warm: the variant before left its traces in the caches
                seconds[name] = best(run)
        if index >= 3:
            for name in variants:
                ratios[name].append(seconds[name] / seconds["unsteered"])
    return ratios


def best(run: Callable[[], None], budget: float = 0.4) -> float:
    """The shortest of a few runs, at least one: interruptions only ever add."""
    seconds: list[float] = []
    while not seconds or (sum(seconds) < budget and len(seconds) < 10):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def summary(ratios: list[float]) -> str:
    resampled = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(1000))
    low, high = resampled[25], resampled[974]
    return f"{statistics.median(ratios):.4f}  [{low:.4f}, {high:.4f}]"


def report(what: str, ratios: dict[str, list[float]]) -> None:
    for name, values in ratios.items():
        if name != "unsteered":
            print(f"{what:24} {name:18} {summary(values)}", flush=True)


def saved_vectors(folder: Path, count: int, config: SteerConfig) -> None:
    """As many saved adapters, as PEFT writes them; the config is the same for all."""
    config.save_pretrained(str(folder / "00000"))
    text = (folder / "00000" / "adapter_config.json").read_text()
    key = f"base_model.model.model.layers.{config.layers_to_transform[0]}.steering.steer_vector"
    for number in range(count):
        directory = folder / f"{number:05}"
        directory.mkdir(exist_ok=True)
        (directory / "adapter_config.json").write_text(text)
        save_file({key: torch.randn(config.hidden_size)}, directory / "adapter_model.safetensors")


def many(model: nn.Module, layer: int, count: int, rounds: int) -> None:
    """Rows of their own out of a library: what loading, choosing and running cost."""
    shape = dict(hidden_size=model.config.hidden_size, num_hidden_layers=model.config.num_hidden_layers)
    with tempfile.TemporaryDirectory() as folder:
        saved_vectors(Path(folder), count, SteerConfig(layers_to_transform=[layer], **shape))
        start = time.perf_counter()
        library = load_library(folder)
        print(f"{'load':24} {len(library)} vectors      {time.perf_counter() - start:.2f} s")

    @contextmanager
    def rows() -> Iterator[None]:
        library.attach(model)
        try:
            with steering(model, torch.rand(ROWS).tolist(), adapter_names=random.sample(library.names, ROWS)):
                yield
        finally:
            library.detach(model)

    for what, make in (("prefill", prefill), ("decode", decode)):
        title = f"{what}, batch {ROWS}"
        report(title, paired({"unsteered": nullcontext, f"{ROWS} of {count}": rows}, make(model, ROWS), rounds, title))
    library.attach(model)
    print(f"{'choose':24} {ROWS} of {count}        {choosing(model, library.names) * 1000:.3f} ms")
    library.detach(model)


def choosing(model: nn.Module, names: tuple[str, ...]) -> float:
    """Median seconds from asking for other rows to having their vectors at hand."""
    (layer,) = {m for m in model.modules() if getattr(m, "library", None) is not None}
    states = torch.zeros(ROWS, 1, model.config.hidden_size, dtype=model.dtype)
    seconds = []
    for _ in range(200):
        wanted, values = random.sample(names, ROWS), torch.rand(ROWS).tolist()
        start = time.perf_counter()
        with torch.no_grad(), steering(model, values, adapter_names=wanted):
            layer(states)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--vectors", type=int, default=10_000)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = load_model(str(smollm2()), arguments.dtype).eval()
    variants = variants_of(model, arguments.layer, torch.randn(model.config.hidden_size))
    print(f"time over that of the unsteered model, {arguments.rounds} rounds, {arguments.dtype}")
    for batch in (1, 16):
        for what, make in (("prefill", prefill), ("decode", decode)):
            title = f"{what}, batch {batch}"
            report(title, paired(variants, make(model, batch), arguments.rounds, title))
    many(model, arguments.layer, arguments.vectors, max(arguments.rounds // 4, 10))


if __name__ == "__main__":
    main()
