"""When the cache is off, and that a line says why."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import make_model, random_vectors
from peft import LoraConfig, get_peft_model
from tiny_runs import LAYER, pairs, trainer, varied
from transformers import AutoModelForCausalLM, MixtralConfig, OPTConfig, Phi3Config
from trl.trainer.dpo_trainer import DataCollatorForPreference

from steer_adapter import SteerConfig
from steer_adapter.errors import OutputError
from steer_adapter.learn import shortcut
from steer_adapter.learn.carriers import innermost
from steer_adapter.learn.shared_states import SharedStates
from steer_adapter.learn.shortcut import frozen_layers, prefix_cache, why_not


pytestmark = pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
TINY = dict(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, pad_token_id=0)
GQA = dict(TINY, intermediate_size=48, num_key_value_heads=2)


def vector() -> dict[int, torch.Tensor]:
    return random_vectors([LAYER])


def off(run, caplog) -> str:
    with caplog.at_level("WARNING"):
        assert prefix_cache(run, innermost(run.model), SharedStates()) is None
    (line,) = [r.getMessage() for r in caplog.records if "prefix cache is off" in r.getMessage()]
    return line


def test_dropout_that_is_left_on(tmp_path, caplog):
    model = AutoModelForCausalLM.from_config(OPTConfig(**TINY, ffn_dim=48, word_embed_proj_dim=32))
    assert "dropout draws random numbers" in off(trainer(tmp_path, model, vectors=vector()), caplog)


def test_routers_asked_for(tmp_path, caplog):
    model = AutoModelForCausalLM.from_config(MixtralConfig(**GQA, num_local_experts=4))
    assert "routers" in off(trainer(tmp_path, model, vectors=vector(), router_aux_loss_coef=0.1), caplog)


def test_statistics_that_are_not_served(tmp_path, caplog):
    assert "not served" in off(trainer(tmp_path, make_model(), vectors=vector(), use_weighting=True), caplog)


def test_a_stream(tmp_path, caplog):
    run = trainer(tmp_path, make_model(), vectors=vector(), train_dataset=pairs().to_iterable_dataset())
    assert "stream" in off(run, caplog)


def test_another_collator(tmp_path, caplog):
    run = trainer(tmp_path, make_model(), vectors=vector())
    run.data_collator = lambda rows: DataCollatorForPreference(0)(rows)
    assert "data collator" in off(run, caplog)


def test_frequencies_that_change_with_the_batch(tmp_path, caplog):
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(
        Phi3Config(**GQA, rope_parameters=rope, max_position_embeddings=64, original_max_position_embeddings=16)
    )
    run = trainer(tmp_path, model, vectors=vector(), max_length=32)
    assert "rotary frequencies" in off(run, caplog)
    run.args.max_length = 16
    assert why_not(run, innermost(run.model)) is None


def test_a_lora_that_is_trained(tmp_path):
    run = trainer(tmp_path, make_model(), vectors=vector())
    inner = innermost(run.model)
    inner.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    assert why_not(run, inner) == "model.layers.0.mlp.up_proj.weight is trained"


def test_a_frozen_lora_is_part_of_the_model(tmp_path, monkeypatch):
    results = []
    for cached in (False, True):
        torch.manual_seed(5)
        lora = get_peft_model(
            make_model(), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        )
        run = trainer(tmp_path, lora, prefix_cache=cached)
        run.train()
        results.append(torch.cat([p.detach() for n, p in run.model.named_parameters() if "steer_vector" in n]))
    assert torch.cosine_similarity(*results, dim=0) >= 0.9999 and results[0].norm() > 0


def test_a_vector_elsewhere(tmp_path, caplog):
    model = get_peft_model(make_model(), SteerConfig(target_modules=["mlp"], hidden_size=32))
    run = trainer(tmp_path, model)
    assert "not on a decoder layer" in off(run, caplog)


def test_a_side_channel_between_layers_is_found_out(tmp_path, caplog):
    """A layer that keeps something for a later one, which would be stale."""
    model = varied(make_model())
    kept = []
    model.model.layers[0].register_forward_hook(lambda _, args, output: kept.append(output.std()))
    model.model.layers[2].mlp.register_forward_hook(lambda _, args, output: output * kept[-1])
    assert "the numbers are others" in off(trainer(tmp_path, model, vectors=vector()), caplog)


def test_it_can_be_switched_off_without_a_word(tmp_path, caplog):
    run = trainer(tmp_path, make_model(), vectors=vector(), prefix_cache=False)
    assert prefix_cache(run, innermost(run.model), SharedStates()) is None and "prefix" not in caplog.text


def test_the_layers_end_at_the_first_vector(tmp_path):
    run = trainer(tmp_path, make_model(), layers=[3, 1])
    layers = frozen_layers(innermost(run.model))
    assert layers == list(innermost(run.model).model.layers[:2])


def test_room_is_asked_for_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
    run = trainer(tmp_path, make_model(), vectors=vector(), prefix_cache_memory=1e-6)
    monkeypatch.setattr(shortcut.PrefixCache, "disagreement", lambda *_: pytest.fail("computed"))
    with pytest.raises(OutputError, match="needs .* GB, and the disk has 1e-06 GB free"):
        run.train()
