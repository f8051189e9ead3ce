from __future__ import annotations

import hashlib
import json

import pytest
import torch
from conftest import layers_of, make_model, make_tokenizer
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftConfig

from steer_adapter import BiPOConfig, BiPOTrainer, SteerConfig
from steer_adapter.learn.provenance import describe_pairs, pairs_hash


ROWS = [{"prompt": f"w{i} ü", "chosen": f"w{i + 1} w3", "rejected": f"w{i + 2}", "more": i} for i in range(10)]


def trainer(tmp_path, **kwargs):
    return BiPOTrainer(
        model=make_model(),
        args=BiPOConfig(
            output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, seed=5, **kwargs
        ),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:4]),
        processing_class=make_tokenizer(),
        peft_config=SteerConfig(layers_to_transform=[1, 3], provenance={"license": "mit"}),
    )


def test_the_hash_can_be_recomputed_by_hand():
    text = "".join(
        '{"chosen":"%s","prompt":"%s","rejected":"%s"}\n' % (row["chosen"], row["prompt"], row["rejected"])  # noqa: UP031
        for row in ROWS
    )
    assert pairs_hash(ROWS) == hashlib.sha256(text.encode()).hexdigest()
    assert pairs_hash(ROWS) != pairs_hash(ROWS[::-1])


def test_pairs_that_are_read_but_once_are_not_described():
    assert describe_pairs(Dataset.from_list(ROWS).to_iterable_dataset()) == {} == describe_pairs(None)


def test_what_a_trainer_records(tmp_path):
    run = trainer(tmp_path, save_strategy="no")
    run.train()
    run.save_model(str(tmp_path / "out"))
    known = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["provenance"]
    assert known["data"] == {"pairs": 10, "sha256": pairs_hash(ROWS)}
    assert known["held_out"] == {"pairs": 4, "sha256": pairs_hash(ROWS[:4])}
    assert (known["method"], known["seed"], known["chat"], known["license"]) == ("bipo", 5, False, "mit")
    assert known["hyperparameters"]["steps"] == 2 and known["hyperparameters"]["loss_type"] == "sigmoid"
    assert known["hyperparameters"]["learning_rate"] == run.args.learning_rate > 0
    assert {"steer_adapter", "peft", "transformers", "torch", "trl"} == set(known["versions"])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "BiPO" in card.text and card.data.license == "mit" and "bipo" in card.data.tags


def test_every_option_that_differs_is_recorded_and_shown(tmp_path):
    secret = {"hub_token": "hf_secret", "prefix_cache_dir": str(tmp_path / "secret"), "save_strategy": "no"}
    changed = {"max_grad_norm": 0.3, "max_length": 64, "label_smoothing": 0.1, "loss_type": ["sigmoid", "hinge"]}
    run = trainer(tmp_path, **secret, **changed)
    run.train()
    run.args.optim_args = "/home/me/" + "x" * 5000
    run.model.get_base_model().to(torch.bfloat16)
    run.save_model(str(tmp_path / "out"))
    known = PeftConfig.from_pretrained(tmp_path / "out").provenance["hyperparameters"]
    assert known == {
        "beta": 0.1, "loss_type": "sigmoid, hinge", "learning_rate": run.args.learning_rate, "warmup_steps": 0.1,
        "lr_scheduler_type": "cosine", "optim": run.args.optim.value, "weight_decay": 0.0, "steps": 2, "max_steps": 2,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "use_cpu": True, "dtype": "bfloat16",
        "max_grad_norm": 0.3, "max_length": 64, "label_smoothing": 0.1, "optim_args": "x" * 200,
    }  # fmt: skip
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| max_grad_norm | 0.3 |" in text and "| dtype | bfloat16 |" in text
    assert "secret" not in text + (tmp_path / "out" / "adapter_config.json").read_text()


def test_residual_norms_are_those_of_the_unsteered_model(tmp_path):
    run = trainer(tmp_path, save_strategy="no")
    batch = run.data_collator([run.train_dataset[i] for i in range(8)])
    model, seen = make_model(), {}
    for layer in (1, 3):
        layers_of(model)[layer].register_forward_hook(lambda m, a, out, layer=layer: seen.update({layer: out}))
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    run.train()
    for layer, states in seen.items():
        norms = [states[b, t].norm().item() for b, t in batch["attention_mask"].nonzero().tolist()]
        assert run.provenance["residual_norms"][str(layer)] == pytest.approx(sum(norms) / len(norms), rel=1e-5)


def test_what_was_measured_before_training_does_not_hold_after_it(tmp_path):
    run = trainer(tmp_path, save_strategy="no")
    config = run.model.peft_config["default"]
    config.provenance |= {"margins": {"1": {"margin": 1.0}}, "side_effects": {"x": 1}, "imported_from": {}}
    run.train()
    run.save_model(str(tmp_path / "out"))
    known = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["provenance"]
    assert not {"margins", "side_effects", "imported_from"} & known.keys() and known["license"] == "mit"


def test_checkpoints_and_the_folder_above_them(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=1)
    run.train()
    assert not (tmp_path / "README.md").exists(), "TRL's card would stand in the way of ours"
    assert "# A steering vector" in (tmp_path / "checkpoint-1" / "README.md").read_text()


@pytest.mark.parametrize("text", ["---\ntags: [mine]\n---\n# Mine  \n", "---\n{[\n---\n", "---\ntags: 3\n---\n"])
def test_a_card_that_was_edited_survives_byte_for_byte(tmp_path, text):
    run = trainer(tmp_path, save_strategy="no")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text(text)
    run.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").read_text() == text
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
