"""Vectors that are trained in one run against those trained alone."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_runs import pairs, trainer

from steer_adapter import BiPOConfig, SteerConfig
from steer_adapter.errors import ConfigError, SteerError
from steer_adapter.learn.forward import PairForward
from steer_adapter.learn.together import trainers_together
from steer_adapter.tuner import SteerLayer


OPTIONS = dict(
    max_steps=6, logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", seed=3,
)  # fmt: skip
CONFIGS = {f"layer-{i}": SteerConfig(layers_to_transform=i) for i in (2, 1, 3)}
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")


def together(model, tmp_path, configs=CONFIGS, **options):
    args = BiPOConfig(output_dir=str(tmp_path / "all"), **{**OPTIONS, **options})
    data = dict(train_dataset=pairs(), processing_class=make_tokenizer())
    return trainers_together(model, configs, args, **data)


def count_runs(module) -> list[int]:
    runs: list[int] = []
    module.register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("options", [{}, {"max_steps": 2}, {"prefix_cache": False}], ids=["pass", "short", "uncached"])
def test_each_vector_is_the_one_trained_alone(tmp_path, options):
    for _, run in together(make_model(), tmp_path, **options):
        run.train()
        run.save_model()
    for name, config in CONFIGS.items():
        settings = {"learning_rate": None, **OPTIONS, **options}
        alone = trainer(tmp_path / name, make_model(), layers=config.layers_to_transform, **settings)
        alone.train()
        alone.save_model(str(tmp_path / name))
        (wanted,), (received,) = (
            load_file(folder / name / "adapter_model.safetensors").values() for folder in (tmp_path, tmp_path / "all")
        )
        assert wanted.norm() > 0.01
        assert torch.allclose(received, wanted, rtol=0, atol=1e-6)


def test_what_is_frozen_is_computed_once(tmp_path):
    model = make_model()
    below, above = count_runs(model.model.layers[0].mlp), count_runs(model.model.layers[3].mlp)
    seen = []
    for _, run in together(model, tmp_path):
        run.train()
        assert run.prefix_cache is None and run.shared_states.depths
        assert sorted(run.shared_states.caches) == [2, 3, 4]
        assert {len(cache) for cache in run.shared_states.caches.values()} == {12}
        seen.append((len(below), len(above)))
        below.clear()
    recorded, *later = (count for count, _ in seen)
    # The later ones look at a few pairs: how strong the states are, and what is exact.
    assert all(count < recorded for count in later)
    folders = [path for path in (tmp_path / "all").iterdir() if path.name.startswith((".prefix", "prefix"))]
    assert not folders


def test_what_is_exact_is_found_out_once(tmp_path, monkeypatch):
    asked = []
    find = PairForward.find_out_what_is_exact
    monkeypatch.setattr(PairForward, "find_out_what_is_exact", lambda *a: asked.append(1) or find(*a))
    for _, run in together(make_model(), tmp_path, max_steps=1):
        run.train()
        assert run.pair_forward.shares
    assert len(asked) == 1


def test_the_model_is_left_as_it_was(tmp_path):
    model = make_model()
    ids = torch.tensor([[5, 6, 7, 8]])
    wanted = model(ids).logits
    for _, run in together(model, tmp_path, max_steps=3):
        run.train()
        assert not torch.equal(run.model(ids).logits, wanted)
    assert torch.equal(model(ids).logits, wanted)
    assert "forward" not in vars(model) and not any(isinstance(m, SteerLayer) for m in model.modules())


def test_on_a_lora(tmp_path):
    def tuned():
        torch.manual_seed(0)
        lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        return get_peft_model(make_model(), lora)

    vectors = {}
    for name, run in together(tuned(), tmp_path):
        run.train()
        (vectors[name],) = (p.detach().clone() for n, p in run.model.named_parameters() if "steer_vector" in n)
    alone = trainer(tmp_path / "alone", tuned(), layers=3, **{"learning_rate": None, **OPTIONS})
    alone.train()
    (wanted,) = (p for n, p in alone.model.named_parameters() if "steer_vector" in n)
    assert wanted.norm() > 0.01 and torch.allclose(vectors["layer-3"], wanted, rtol=0, atol=1e-6)


def test_a_loop_that_is_left_cleans_up(tmp_path):
    model = make_model()
    for _, run in together(model, tmp_path, prefix_cache_memory=1e-6):
        run.train()
        assert list((tmp_path / "all").rglob("prefix-*"))
        break
    del run
    assert not list((tmp_path / "all").rglob("prefix-*"))
    assert not any(isinstance(module, SteerLayer) for module in model.modules())


@pytest.mark.parametrize(
    ("configs", "error"),
    [
        ({}, ConfigError),
        ({"a/b": SteerConfig(layers_to_transform=1)}, ConfigError),
        ({"..": SteerConfig(layers_to_transform=1)}, ConfigError),
        ({"a": SteerConfig(layers_to_transform=1), "b": SteerConfig(layers_to_transform=40)}, SteerError),
    ],
)
def test_bad_input(tmp_path, configs, error):
    with pytest.raises(error):
        next(together(make_model(), tmp_path, configs))
