"""Dtypes, offloading, quantized models, TRL's trainers, copies and moves: a vector arrives in all of them."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import hand_logits, layers_of, make_model, make_tokenizer, random_vectors, set_vectors
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from steer_adapter import SteerConfig, SteerLayer, set_multiplier, steering, verify
from steer_adapter.errors import VectorError


LAYERS = [1, 2]


def steered(model=None, **kwargs):
    model = get_peft_model(make_model() if model is None else model, SteerConfig(layers_to_transform=LAYERS, **kwargs))
    set_vectors(model, random_vectors(LAYERS))
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    steered().save_pretrained(tmp_path / "vector")
    return tmp_path / "vector"


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits


def vectors_of(model):
    return [p for n, p in model.named_parameters() if "steer_vector" in n]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_keeps_its_dtype_and_the_vector_its_own(dtype, input_ids):
    model = steered(make_model().to(dtype), multiplier=0.7)
    model.to(dtype)
    assert {p.dtype for p in vectors_of(model)} == {torch.float32}
    hand = make_model().to(dtype)
    deltas = {layer: (0.7 * vector).to(dtype) for layer, vector in random_vectors(LAYERS).items()}
    received = logits(model, input_ids)
    assert received.dtype == dtype and torch.equal(received, hand_logits(hand, input_ids, deltas))
    with steering(model, [0.7, 0.7]):
        assert torch.equal(logits(model, input_ids), received)


def test_autocast_keeps_the_dtype_of_the_hidden_states(input_ids):
    seen = []
    model = steered()
    layers_of(model.get_base_model())[1].register_forward_hook(lambda m, a, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(input_ids)
    assert seen == [torch.float32]


def offloaded(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device="cpu") or model


def test_cpu_offload(saved, input_ids):
    wanted = hand_logits(make_model(), input_ids, random_vectors(LAYERS))
    onto_offloaded = PeftModel.from_pretrained(offloaded(make_model()), saved)
    then_offloaded = offloaded(PeftModel.from_pretrained(make_model(), saved))
    native = make_model()
    native.load_adapter(saved)
    for model in (onto_offloaded, then_offloaded, offloaded(native)):
        assert (logits(model, input_ids) - wanted).abs().max() <= 1e-5
        assert verify(model)
        set_multiplier(model, 0.0)
        assert not verify(model)
    lost = offloaded(make_model())
    lost.load_adapter(saved)
    with pytest.raises(VectorError, match="on the meta device: its weights never arrived"):
        lost(input_ids)


def test_low_cpu_mem_usage(saved, input_ids):
    wanted = hand_logits(make_model(), input_ids, random_vectors(LAYERS))
    native = make_model()
    native.load_adapter(saved, low_cpu_mem_usage=True)
    for model in (PeftModel.from_pretrained(make_model(), saved, low_cpu_mem_usage=True), native):
        assert (logits(model, input_ids) - wanted).abs().max() <= 1e-5


def test_a_state_dict_goes_round(input_ids):
    model = steered()
    other = get_peft_model(make_model(seed=3), SteerConfig(layers_to_transform=LAYERS)).eval()
    assert other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(other, input_ids), logits(model, input_ids))
    wanted = hand_logits(make_model(), input_ids, random_vectors(LAYERS))
    assert (logits(other, input_ids) - wanted).abs().max() <= 1e-5


def test_a_copy_is_one_of_its_own(input_ids):
    model = steered()
    before = logits(model, input_ids)
    other = copy.deepcopy(model)
    set_vectors(other, random_vectors(LAYERS, seed=9))
    set_multiplier(other, 3.0)
    with steering(other, -1.0):
        assert torch.equal(logits(model, input_ids), before)
    wanted = hand_logits(make_model(), input_ids, {k: 3 * v for k, v in random_vectors(LAYERS, seed=9).items()})
    assert (logits(other, input_ids) - wanted).abs().max() <= 1e-5


def test_moving_there_and_back(input_ids):
    model = steered()
    before = logits(model, input_ids)
    model.to(torch.bfloat16).to("cpu").to(torch.float64)
    assert {p.dtype for p in vectors_of(model)} == {torch.float32}
    empty = copy.deepcopy(model).to("meta")
    assert all(module.multipliers["default"].is_meta for module in empty.modules() if isinstance(module, SteerLayer))
    wanted = hand_logits(make_model(), input_ids, random_vectors(LAYERS))
    assert (logits(model.double(), input_ids) - wanted).abs().max() <= 0.2, "the weights went through bfloat16"
    assert torch.equal(before, logits(steered(), input_ids))


def hooked_states(model, layer, input_ids):
    """What leaves a decoder layer."""
    seen = []
    handle = layers_of(model)[layer].register_forward_hook(lambda m, a, out: seen.append(out))
    logits(model, input_ids)
    handle.remove()
    return seen[0]


WIDE = 64  # the block of nf4


def wide():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=WIDE, intermediate_size=WIDE, num_hidden_layers=4, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def check_quantized(base, input_ids, tmp_path):
    vectors = random_vectors(LAYERS, size=WIDE)
    source = get_peft_model(wide(), SteerConfig(layers_to_transform=LAYERS))
    set_vectors(source, vectors)
    source.save_pretrained(tmp_path / "vector")

    plain = hooked_states(base, 1, input_ids)
    model = PeftModel.from_pretrained(base, tmp_path / "vector").eval()
    assert torch.equal(hooked_states(base, 1, input_ids), plain + vectors[1].to(plain.dtype))
    with steering(model, [2.0, 0.0]):
        states = hooked_states(base, 1, input_ids)
    assert torch.equal(states[0], plain[0] + (2 * vectors[1]).to(plain.dtype))
    assert torch.equal(states[1], plain[1])
    model.train()
    for vector in vectors_of(model):
        vector.requires_grad_(True)
    model(input_ids).logits.float().sum().backward()
    assert all(vector.grad is not None and vector.grad.any() for vector in vectors_of(model))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes(kind, tmp_path, input_ids):
    pytest.importorskip("bitsandbytes")
    four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantization = BitsAndBytesConfig(**(four if kind == "nf4" else dict(load_in_8bit=True)))
    wide().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization, device_map="cpu", dtype=torch.float32
    )
    check_quantized(base.eval(), input_ids, tmp_path)


def test_torchao(tmp_path, input_ids):
    quantization = pytest.importorskip("torchao.quantization")
    base = wide()
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    check_quantized(base, input_ids, tmp_path)


def train_with(trainer_class, config_class, rows, tmp_path, **kwargs):
    from datasets import Dataset

    config = config_class(
        output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=2, learning_rate=0.05, bf16=False,
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, **kwargs,
    )  # fmt: skip
    base = make_model()
    weights = {name: parameter.clone() for name, parameter in base.named_parameters()}
    trainer = trainer_class(
        model=base,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        peft_config=SteerConfig(layers_to_transform=LAYERS, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "vector"))
    trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "steer_vector" in n}
    assert len(trained) == 2 and all(vector.any() and vector.dtype == torch.float32 for vector in trained.values())
    for name, parameter in trainer.model.get_base_model().named_parameters():
        if "steering" not in name:
            assert torch.equal(parameter, weights[name])
    again = PeftModel.from_pretrained(make_model(), tmp_path / "vector").eval()
    ids = torch.tensor([[5, 17, 33, 64]])
    deltas = dict(zip(LAYERS, [vector.squeeze() for vector in trained.values()], strict=True))
    assert (logits(again, ids) - hand_logits(make_model(), ids, deltas)).abs().max() <= 1e-5


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_sft_trainer(tmp_path, gradient_checkpointing):
    trl = pytest.importorskip("trl")
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(8)]
    train_with(trl.SFTTrainer, trl.SFTConfig, rows, tmp_path, gradient_checkpointing=gradient_checkpointing)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_dpo_trainer(tmp_path, gradient_checkpointing):
    trl = pytest.importorskip("trl")
    rows = [{"prompt": f"w{i}", "chosen": f" w{i + 2} w{i + 3}", "rejected": f" w{i + 9}"} for i in range(8)]
    train_with(trl.DPOTrainer, trl.DPOConfig, rows, tmp_path, gradient_checkpointing=gradient_checkpointing)
