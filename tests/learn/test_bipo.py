from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, hand_logits, make_model, make_tokenizer, random_vectors, set_vectors
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig
from trl import DPOConfig

from steer_adapter import BiPOConfig, BiPOTrainer, SteerConfig
from steer_adapter.errors import ConfigError, DataError, ModelError
from steer_adapter.learn.directions import draw_direction
from steer_adapter.learn.provenance import state_norms


pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
]
LAYERS = [1, 3]


def pairs(count: int = 12, conversational: bool = False) -> Dataset:
    rng = np.random.default_rng(0)

    def text(n: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(0, 80, n))

    rows = []
    for _ in range(count):
        prompt, chosen, rejected = (text(int(rng.integers(2, 6))) for _ in range(3))
        if conversational:
            prompt = [{"role": "user", "content": prompt}]
            chosen, rejected = ([{"role": "assistant", "content": t}] for t in (chosen, rejected))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def config(tmp_path, **kwargs) -> BiPOConfig:
    options = dict(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        learning_rate=0.05,
        seed=3,
    )
    return BiPOConfig(**{**options, **kwargs})


def trainer(tmp_path, model=None, **kwargs) -> BiPOTrainer:
    arguments = {k: kwargs.pop(k) for k in ("train_dataset", "eval_dataset", "peft_config") if k in kwargs}
    arguments.setdefault("train_dataset", pairs())
    if model is None:
        arguments.setdefault("peft_config", SteerConfig(layers_to_transform=LAYERS))
    return BiPOTrainer(
        model=model or make_model(), args=config(tmp_path, **kwargs), processing_class=make_tokenizer(), **arguments
    )


def with_vector(model=None, vectors=None):
    model = get_peft_model(model or make_model(), SteerConfig(layers_to_transform=LAYERS))
    set_vectors(model, vectors or {k: 0.3 * v for k, v in random_vectors(LAYERS).items()})
    return model


def vectors_of(model) -> dict[str, torch.Tensor]:
    return {n.split("model.")[-1]: p.detach().clone() for n, p in model.named_parameters() if "steer_vector" in n}


#################
# The objective #
#################


def sequence_log_probs(batch, deltas, model=None):
    """Written out: Σ over completion tokens of log softmax, one row and one token at a time."""
    model = model or make_model()
    sums = []
    for ids, attention, completion in zip(
        *map(batch.get, ("input_ids", "attention_mask", "completion_mask")), strict=True
    ):
        length = int(attention.sum())
        logits = hand_logits(model, ids[None, :length], deltas)[0].double().numpy()
        total = 0.0
        for t in range(1, length):
            if completion[t]:
                row = logits[t - 1] - logits[t - 1].max()
                total += row[int(ids[t])] - np.log(np.exp(row).sum())
        sums.append(total)
    return np.array(sums)


def written_out_loss(batch, vectors, d, beta=0.1, model=None):
    ratios = sequence_log_probs(batch, {k: d * v for k, v in vectors.items()}, model) - sequence_log_probs(
        batch, {}, model
    )
    chosen, rejected = np.split(ratios, 2)
    z = d * beta * chosen - d * beta * rejected
    return float(np.mean(np.log1p(np.exp(-z)))), chosen, rejected


@pytest.mark.parametrize("scope", ["prompt", "completion"])
@pytest.mark.parametrize("d", [1, -1])
def test_a_vector_that_acts_on_some_tokens_only(tmp_path, scope, d, caplog):
    vectors = {k: 0.3 * v for k, v in random_vectors(LAYERS).items()}
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=LAYERS, token_scope=scope))
    set_vectors(model, vectors)
    run = trainer(tmp_path, model)
    batch = next(iter(run.get_train_dataloader()))
    sums = []
    for row in range(len(batch["input_ids"])):
        one = {key: value[row : row + 1] for key, value in batch.items() if key.endswith(("mask", "ids"))}
        prompt = int(one["attention_mask"].sum() - one["completion_mask"].sum())
        acts = torch.arange(int(one["attention_mask"].sum())) >= prompt - 1
        acts = (acts if scope == "completion" else ~acts).float()[None, :, None]
        steered = sequence_log_probs(one, {layer: d * vector * acts for layer, vector in vectors.items()})
        sums.append(float((steered - sequence_log_probs(one, {}))[0]))
    chosen, rejected = np.split(np.array(sums), 2)
    with run._steered(d):
        loss = run.compute_loss(run.model, batch).item()
    wanted = float(np.mean(np.log1p(np.exp(-0.1 * d * (chosen - rejected)))))
    assert abs(wanted - np.log(2)) > 1e-4 and loss == pytest.approx(wanted, rel=1e-5)
    run.train()
    assert "The prefix cache is off: the vector does not act on all tokens" in caplog.text
    assert "don't share their prompt: a vector does not act on all tokens" in caplog.text


@pytest.mark.parametrize("d", [1, -1])
@pytest.mark.parametrize("conversational", [False, True])
def test_the_loss_equals_written_out_arithmetic(tmp_path, d, conversational):
    vectors = {k: 0.3 * v for k, v in random_vectors(LAYERS).items()}
    run = trainer(tmp_path, with_vector(vectors=vectors), train_dataset=pairs(conversational=conversational))
    batch = next(iter(run.get_train_dataloader()))
    with run._steered(d):
        loss = run.compute_loss(run.model, batch).item()
    wanted, chosen, rejected = written_out_loss(batch, vectors, d)
    assert abs(wanted - np.log(2)) > 1e-3, "a vector that does nothing would pass"
    assert loss == pytest.approx(wanted, rel=1e-5)
    metrics = run._metrics["train"]
    assert metrics["rewards/chosen"] == pytest.approx([0.1 * chosen.mean()], rel=1e-4, abs=1e-6)
    assert metrics["rewards/rejected"] == pytest.approx([0.1 * rejected.mean()], rel=1e-4, abs=1e-6)
    assert metrics["rewards/margins"] == pytest.approx([0.1 * (chosen - rejected).mean()], rel=1e-4, abs=1e-6)
    assert metrics["rewards/accuracies"] == pytest.approx([(chosen > rejected).mean()])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("d", [1, -1])
def test_the_gradient_equals_that_of_written_out_arithmetic(tmp_path, d, checkpointing, monkeypatch):
    monkeypatch.setattr("steer_adapter.learn.bipo.draw_direction", lambda seed, step: d)
    vectors = {k: 0.3 * v for k, v in random_vectors(LAYERS).items()}
    run = trainer(tmp_path, with_vector(vectors=vectors), activation_checkpointing=checkpointing)
    batch = next(iter(run.get_train_dataloader()))
    run.model.train()
    run.current_gradient_accumulation_steps = 1  # what Trainer.train sets
    run.training_step(run.model, batch)
    received = torch.cat([p.grad for n, p in run.model.named_parameters() if "steer_vector" in n])

    model, leaves = make_model(), {k: v.clone().requires_grad_() for k, v in vectors.items()}

    def log_probs(deltas):
        with torch.enable_grad():
            handles = [
                model.model.layers[k].register_forward_hook(lambda _, a, out, delta=delta: out + delta)
                for k, delta in deltas.items()
            ]
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            for handle in handles:
                handle.remove()
        picked = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        return (picked * batch["completion_mask"][:, 1:]).sum(-1)

    ratios = log_probs({k: d * v for k, v in leaves.items()}) - log_probs({}).detach()
    chosen, rejected = ratios.chunk(2)
    (-torch.nn.functional.logsigmoid(d * 0.1 * (chosen - rejected)).mean()).backward()
    wanted = torch.cat([leaf.grad for leaf in leaves.values()])
    assert torch.cosine_similarity(received, wanted, dim=0) >= 0.99999
    assert received.norm() == pytest.approx(float(wanted.norm()), rel=1e-4)


@pytest.mark.parametrize("loss_type", ["hinge", "ipo", "robust", "nca_pair", "apo_zero", "discopop", "sigmoid_norm"])
def test_other_loss_types_are_those_of_trl_on_the_exchanged_pair(tmp_path, loss_type):
    """At d = −1 with −v in place of v: the plain loss on pairs whose sides are exchanged beforehand."""
    vectors = {k: 0.3 * v for k, v in random_vectors(LAYERS).items()}
    data = pairs()
    exchanged = data.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    kwargs = dict(loss_type=[loss_type], label_smoothing=0.1)
    ours = trainer(tmp_path, with_vector(vectors=vectors), train_dataset=data, **kwargs)
    plain = trainer(
        tmp_path, with_vector(vectors={k: -v for k, v in vectors.items()}), train_dataset=exchanged, **kwargs
    )
    with ours._steered(-1):
        received = ours.compute_loss(ours.model, next(iter(ours.get_train_dataloader()))).item()
    wanted = plain.compute_loss(plain.model, next(iter(plain.get_train_dataloader()))).item()
    assert received == pytest.approx(wanted, rel=1e-5)
    with plain.model.disable_adapter():
        unsteered = plain.compute_loss(plain.model, next(iter(plain.get_train_dataloader()))).item()
    assert abs(unsteered - wanted) > 1e-4, "a vector that does nothing would pass"


def test_experts_add_nothing_to_the_objective(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(
        **dict(ARCHITECTURES["llama"][0].to_diff_dict(), model_type="mixtral"),
        num_local_experts=4,
        router_aux_loss_coef=0.5,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    run = trainer(tmp_path, get_peft_model(model, SteerConfig(layers_to_transform=1)))
    loss = run.compute_loss(run.model, next(iter(run.get_train_dataloader()))).item()
    assert loss == pytest.approx(np.log(2), rel=1e-5), "a zero vector"


############
# Training #
############


def test_d_is_drawn_once_a_step_and_logged(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "steer_adapter.learn.bipo.draw_direction", lambda seed, step: drawn.append(step) or draw_direction(seed, step)
    )
    run = trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=6)
    run.train()
    assert drawn == [step for step in range(6) for _ in range(3)]
    logged = [entry["direction"] for entry in run.state.log_history if "direction" in entry]
    assert logged == [draw_direction(3, step) for step in range(6)] and set(logged) == {1, -1}
    assert [entry["vector_norm"] > 0 for entry in run.state.log_history if "direction" in entry][1:] == [True] * 5
    assert {key for entry in run.state.log_history for key in entry} >= {
        "rewards/margins_positive", "rewards/margins_negative", "rewards/chosen", "logps/rejected",
    }  # fmt: skip


def test_accumulation_equals_a_large_batch(tmp_path):
    results = []
    for batch, accumulation in ((4, 1), (2, 2)):
        run = trainer(
            tmp_path, max_steps=3, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        run.train()
        results.append(vectors_of(run.model))
    for key in results[0]:
        assert results[0][key].any()
        assert torch.allclose(results[0][key], results[1][key], atol=1e-5)


def test_training_learns_both_directions_and_changes_nothing_else(tmp_path):
    run = trainer(tmp_path, eval_dataset=pairs(), max_steps=30, learning_rate=0.05)
    before = {k: v.clone() for k, v in run.model.state_dict().items() if "steer" not in k}
    first = run.evaluate()
    run.train()
    last = run.evaluate()
    assert first["eval_loss"] == pytest.approx(np.log(2), rel=1e-5), "a new vector is zero"
    assert last["eval_loss_positive"] < 0.65 and last["eval_loss_negative"] < 0.65
    assert last["eval_loss"] == pytest.approx((last["eval_loss_positive"] + last["eval_loss_negative"]) / 2)
    assert last["eval_rewards/margins_positive"] > 0 > last["eval_rewards/margins_negative"]
    after = run.model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [float(m["default"]) for n, m in run.model.named_modules() if n.endswith(".multipliers")] == [1.0, 1.0]


def test_the_same_seed_gives_the_same_vector(tmp_path):
    results = []
    for seed in (3, 3, 4):
        run = trainer(tmp_path, seed=seed)
        run.train()
        results.append(torch.cat(list(vectors_of(run.model).values())))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_the_learning_rate_is_found(tmp_path):
    short, long = (trainer(tmp_path, learning_rate=None, max_steps=steps) for steps in (4, 16))
    short.train()
    assert short.args.learning_rate == pytest.approx(2 * long._find_learning_rate(state_norms(long)), rel=1e-5)


def test_a_stream_of_pairs(tmp_path):
    run = trainer(tmp_path, train_dataset=pairs().to_iterable_dataset(), learning_rate=None, max_steps=2)
    run.train()
    assert run.args.learning_rate > 0 and run.state.global_step == 2


def test_a_copy_of_the_model_runs_itself(tmp_path):
    run = trainer(tmp_path, with_vector())
    clone = copy.deepcopy(run.model)
    clone.set_multiplier(0.0)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(clone(ids).logits, make_model()(ids).logits)


def test_a_checkpoint_resumes_bitwise(tmp_path):
    whole = trainer(tmp_path / "whole", max_steps=6)
    whole.train()
    cut = trainer(tmp_path / "cut", max_steps=6, save_strategy="steps", save_steps=3)
    cut.train()
    resumed = trainer(tmp_path / "cut", max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "out" / "checkpoint-3"))
    for key, value in vectors_of(whole.model).items():
        assert value.any()
        assert torch.equal(value, vectors_of(cut.model)[key])
        assert torch.equal(value, vectors_of(resumed.model)[key])


def test_the_adapter_is_saved_alone(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert len(load_file(tmp_path / "saved" / "adapter_model.safetensors")) == len(LAYERS)
    again = PeftModel.from_pretrained(make_model(), tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, run.model.eval()(ids).logits)


#########################
# Models and references #
#########################


def with_lora():
    torch.manual_seed(5)
    return get_peft_model(make_model(), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))


def test_on_a_lora_the_reference_keeps_the_lora(tmp_path):
    torch.manual_seed(5)
    merged = with_lora().merge_and_unload().eval()
    vectors = {k: 0.3 * v for k, v in random_vectors(LAYERS).items()}
    run = trainer(tmp_path, with_vector(with_lora(), vectors))
    batch = next(iter(run.get_train_dataloader()))
    run.model.eval()
    with run._steered(-1):
        loss = run.compute_loss(run.model, batch).item()
    wanted, _, _ = written_out_loss(batch, vectors, -1, model=merged)
    assert loss == pytest.approx(wanted, rel=1e-5)


def test_training_on_a_lora_leaves_it_alone(tmp_path):
    tuned = with_lora()
    loras = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    run = trainer(tmp_path, tuned, peft_config=SteerConfig(layers_to_transform=1), max_steps=2)
    run.train()
    assert all(torch.equal(p, loras[n]) for n, p in tuned.named_parameters() if n in loras)
    assert vectors_of(run.model)["layers.1.steering.steer_vector.default"].norm() > 0
    run.save_model(str(tmp_path / "saved"))
    assert list(load_file(tmp_path / "saved" / "adapter_model.safetensors")) == [
        "base_model.model.model.layers.1.steering.steer_vector"
    ]


def test_a_loaded_vector_trains_on_without_a_copy_of_it(tmp_path):
    with_vector().save_pretrained(tmp_path / "start")
    model = PeftModel.from_pretrained(make_model(), tmp_path / "start", is_trainable=True)
    run = trainer(tmp_path, model, max_steps=1)
    run.train()
    assert list(run.model.peft_config) == ["default"], "no adapter 'ref'"
    assert run.ref_model is None


def test_reference_log_probs_beforehand(tmp_path):
    vectors = {k: 0.3 * v for k, v in random_vectors(LAYERS).items()}
    losses = []
    for precompute in (False, True):
        run = trainer(tmp_path, with_vector(vectors=vectors), precompute_ref_log_probs=precompute)
        with run._steered(-1):
            losses.append(run.compute_loss(run.model, next(iter(run.get_train_dataloader()))).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_vector_cast_to_bfloat16_is_restored(tmp_path, monkeypatch):
    model = with_vector()
    exact = vectors_of(model)
    model.is_loaded_in_4bit = True  # what makes DPOTrainer cast everything trainable
    run = trainer(tmp_path, model)
    assert all(torch.equal(value, exact[key]) for key, value in vectors_of(run.model).items())
    assert all(value.dtype == torch.float32 for value in vectors_of(run.model).values())


#############
# Bad input #
#############


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"prompt": "w1", "chosen": "w2", "rejected": "w2"}], "row 1: `chosen` equals `rejected`"),
        ([{"prompt": " ", "chosen": "w2", "rejected": "w3"}], "row 1: `prompt` is ' '"),
        ([{"prompt": "w1", "chosen": "w2"}], "row 1: .*expected a column 'rejected'"),
    ],
)
def test_bad_pairs(tmp_path, rows, message):
    with pytest.raises(DataError, match=f"train_dataset.*{message}"):
        trainer(tmp_path, train_dataset=Dataset.from_list(rows))


def test_a_tokenizer_that_knows_no_word(tmp_path):
    make_model("gpt_neox").config.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)  # made of no files
    config = BiPOConfig(output_dir=str(tmp_path), use_cpu=True)
    arguments = dict(train_dataset=pairs(), processing_class=tokenizer, peft_config=SteerConfig(layers_to_transform=1))
    with pytest.raises(DataError, match="The train data.*: the tokenizer makes .*all its files"):
        BiPOTrainer(make_model(), args=config, **arguments)


def test_bad_models(tmp_path):
    with pytest.raises(ModelError, match="LlamaForCausalLM without a steering vector"):
        trainer(tmp_path, make_model())
    with pytest.raises(ModelError, match="without a steering vector"):
        trainer(tmp_path, with_lora())
    with pytest.raises(ConfigError, match="received LoraConfig"):
        trainer(tmp_path, make_model(), peft_config=LoraConfig())
    with pytest.raises(ConfigError, match="expected a SteerConfig that says which layers"):
        trainer(tmp_path, "some/model")
    with pytest.raises(ConfigError, match="received DPOConfig, expected a BiPOConfig"):
        BiPOTrainer(make_model(), args=DPOConfig(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ConfigError, match="`compute_metrics`"):
        BiPOTrainer(make_model(), compute_metrics=lambda prediction: {})
    with pytest.raises(ConfigError, match="`ref_model`"):
        BiPOTrainer(make_model(), make_model())
    two = with_vector()
    two.add_adapter("second", SteerConfig(layers_to_transform=1))
    two.base_model.set_adapter(["default", "second"])
    with pytest.raises(ModelError, match="expected exactly one"):
        trainer(tmp_path, two)


def test_what_may_not_be_trained(tmp_path):
    with_vector().save_pretrained(tmp_path / "start")
    frozen = trainer(tmp_path, PeftModel.from_pretrained(make_model(), tmp_path / "start"))
    with pytest.raises(ModelError, match=r"received nothing.*is_trainable=True"):
        frozen.train()
    model = with_vector()
    model.base_model.model.lm_head.weight.requires_grad = True
    with pytest.raises(ModelError, match="lm_head"):
        trainer(tmp_path, model).train()
    model = with_vector()
    run = trainer(tmp_path, model)
    for name, parameter in model.named_parameters():
        if "steer_vector" in name:
            parameter.data = parameter.data.bfloat16()
    with pytest.raises(ModelError, match="must be float32"):
        run.train()


def test_a_config_from_json(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    assert json.loads(run.args.to_json_string())["learning_rate"] == 0.05
