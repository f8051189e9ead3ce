"""Tiny models that see images: the text decoder by default, the vision tower by choice, vectors across a family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from steer_adapter import SteerConfig, verify
from steer_adapter.decoder import find_decoder
from steer_adapter.errors import ConfigError, ModelError, VectorError


HIDDEN, LAYERS, STEERED, WIDTH, IMAGE = 32, 3, 1, 16, 90
IDS = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
TEXT = dict(
    IDS, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48,
)  # fmt: skip
GEMMA = dict(TEXT, head_dim=8, sliding_window=4)
VISION = dict(
    hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=4
)
PROMPT = torch.tensor([[5, 17, 33, 64, 8], [7, 7, 40, 3, 29]])


def gemma3_text() -> nn.Module:
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)).eval()


def gemma3() -> nn.Module:
    torch.manual_seed(0)
    images = dict(mm_tokens_per_image=4, image_token_id=IMAGE, boi_token_index=91, eoi_token_index=92)
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=GEMMA, vision_config=VISION, **images)).eval()
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # as made, it is zero
    return model


def llava() -> nn.Module:
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**VISION), image_token_index=IMAGE,
        vision_feature_layer=-1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


def qwen2_vl() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config=dict(TEXT, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]}),
        vision_config=dict(
            depth=2, embed_dim=WIDTH, hidden_size=HIDDEN, num_heads=2, patch_size=4, mlp_ratio=2,
            spatial_merge_size=2, temporal_patch_size=2,
        ),
        image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config).eval()


def with_images(tokens: int, **images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Token ids with one image of so many tokens in each row."""
    ids = torch.cat([PROMPT[:, :2], torch.full((2, tokens), IMAGE), PROMPT[:, 2:]], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}


PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
PATCHES = torch.randn(32, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(2))
GRID = torch.tensor([[1, 4, 4], [1, 4, 4]])
QWEN = with_images(4, pixel_values=PATCHES, image_grid_thw=GRID)
QWEN["mm_token_type_ids"] = (QWEN["input_ids"] == IMAGE).int()

# How to make it, an input with images, and the path of the vision tower and of its blocks.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, torch.Tensor], str, str]] = {
    "gemma3": (gemma3, with_images(4, pixel_values=PIXELS), "model.vision_tower", "encoder.layers"),
    "llava": (llava, with_images(16, pixel_values=PIXELS), "model.vision_tower", "encoder.layers"),
    "qwen2_vl": (qwen2_vl, QWEN, "model.visual", "blocks"),
}


def leaving(model: nn.Module, path: str, arguments: dict[str, Any]) -> torch.Tensor:
    """The hidden states that leave a layer, after every hook that was there before."""
    seen: list[torch.Tensor] = []

    def record(_: nn.Module, args: tuple, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = model.get_submodule(path).register_forward_hook(record)
    try:
        with torch.no_grad():
            model(**arguments)
    finally:
        handle.remove()
    return seen[-1]


def logits(model: nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**arguments).logits


def by_hand(model: nn.Module, path: str, delta: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """Logits of the model with `delta` added to what one layer gives out."""
    handle = model.get_submodule(path).register_forward_hook(lambda _, args, output: output + delta)
    try:
        return logits(model, arguments)
    finally:
        handle.remove()


def steer(model: nn.Module, width: int = HIDDEN, **config: Any) -> tuple[PeftModel, torch.Tensor]:
    steered = get_peft_model(model, SteerConfig(layers_to_transform=STEERED, multiplier=-1.5, **config))
    vector = torch.randn(width, generator=torch.Generator().manual_seed(1))
    (parameter,) = [p for n, p in steered.named_parameters() if ".steering." in n]
    with torch.no_grad():
        parameter.copy_(vector)
    return steered, vector


@pytest.mark.parametrize("name", list(MODELS))
def test_the_text_decoder_by_default(name: str, tmp_path) -> None:
    build, images, _, _ = MODELS[name]
    model, path = build(), "model.language_model.layers"
    decoder = find_decoder(model)
    assert decoder.names == tuple(f"{path}.{i}" for i in range(LAYERS))
    assert (decoder.hidden_size, decoder.model_type) == (HIDDEN, model.config.text_config.model_type)
    steered, vector = steer(build())
    assert verify(steered)
    for arguments in ({"input_ids": PROMPT}, images):
        layer = f"{path}.{STEERED}"
        assert torch.equal(
            leaving(steered.get_base_model(), layer, arguments), leaving(model, layer, arguments) - 1.5 * vector
        )
        expected = by_hand(model, layer, -1.5 * vector, arguments)
        assert (expected - logits(model, arguments)).abs().max() > 0.01
        assert torch.equal(logits(steered, arguments), expected)
        shown = steered(**arguments, output_hidden_states=True).hidden_states[STEERED + 1]
        assert torch.equal(shown, leaving(model, layer, arguments) - 1.5 * vector)

    steered.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(logits(again, images), logits(steered, images))
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    cached, uncached = (again.generate(**images, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_the_vision_tower_by_choice(name: str, tmp_path) -> None:
    build, images, tower, blocks = MODELS[name]
    steered, vector = steer(build(), WIDTH, stack=tower)
    config = steered.peft_config["default"]
    assert (config.stack, config.hidden_size, config.num_hidden_layers) == (tower, WIDTH, 2)
    expected = by_hand(build(), f"{tower}.{blocks}.{STEERED}", -1.5 * vector, images)
    assert (expected - logits(build(), images)).abs().max() > 1e-3
    assert torch.equal(logits(steered, images), expected)
    assert verify(steered, images) and not verify(steered)  # no image, no vision tower

    steered.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(logits(again, images), expected)
    native = build()
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native, images), expected)
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    cached, uncached = (again.generate(**images, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)


def test_a_vision_block_by_its_name() -> None:
    images = MODELS["llava"][1]
    name = f"model.vision_tower.encoder.layers.{STEERED}"
    steered = get_peft_model(llava(), SteerConfig(target_modules=[name], init_weights=False))
    assert steered.peft_config["default"].hidden_size == WIDTH
    (vector,) = [p.detach() for n, p in steered.named_parameters() if ".steering." in n]
    assert torch.equal(logits(steered, images), by_hand(llava(), name, vector, images))


def test_a_vision_tower_without_a_batch_dimension() -> None:
    steered, _ = steer(qwen2_vl(), WIDTH, stack="model.visual")
    assert steered.peft_config["default"].num_hidden_layers == 2
    with pytest.raises(ModelError, match=r"shape \[32, 16\], expected \[batch, tokens, 16\]"):
        logits(steered, QWEN)


def test_a_vision_vector_on_a_text_model(tmp_path) -> None:
    steer(gemma3(), WIDTH, stack="model.vision_tower")[0].save_pretrained(tmp_path)
    model = gemma3_text()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ModelError, match="'model.vision_tower', which names no module in Gemma3ForCausalLM"):
        PeftModel.from_pretrained(model, tmp_path)
    assert [name for name, _ in model.named_modules()] == before


def test_vectors_on_two_stacks_at_once(tmp_path) -> None:
    images = MODELS["llava"][1]
    text, first = steer(llava())
    text.save_pretrained(tmp_path / "text")
    vision, second = steer(llava(), WIDTH, stack="model.vision_tower")
    vision.save_pretrained(tmp_path / "vision")

    both = PeftModel.from_pretrained(llava(), tmp_path / "text", adapter_name="text")
    both.load_adapter(tmp_path / "vision", adapter_name="vision")
    both.base_model.set_adapter(["text", "vision"])
    model = llava()
    tower = model.get_submodule(f"model.vision_tower.encoder.layers.{STEERED}")
    tower.register_forward_hook(lambda _, args, output: output - 1.5 * second)
    expected = by_hand(model, f"model.language_model.layers.{STEERED}", -1.5 * first, images)
    assert torch.equal(logits(both, images), expected)
    with pytest.raises(ConfigError, match=r"stacks are \['None', 'model.vision_tower'\]"):
        both.add_weighted_adapter(["text", "vision"], [1.0, 1.0], "sum")


FAMILY = pytest.mark.parametrize(("source", "target"), [(gemma3_text, gemma3), (gemma3, gemma3_text)])


@FAMILY
def test_across_a_family_by_layer_index(
    source: Callable[[], nn.Module], target: Callable[[], nn.Module], tmp_path
) -> None:
    trained, vector = steer(source())
    trained.save_pretrained(tmp_path)
    arguments = {"input_ids": PROMPT}
    layer = find_decoder(target()).names[STEERED]
    expected = by_hand(target(), layer, -1.5 * vector, arguments)
    assert torch.equal(logits(PeftModel.from_pretrained(target(), tmp_path), arguments), expected)


@FAMILY
def test_across_a_family_natively_is_an_error(
    source: Callable[[], nn.Module], target: Callable[[], nn.Module], tmp_path
) -> None:
    steer(source())[0].save_pretrained(tmp_path)
    model = target()
    model.load_adapter(str(tmp_path))
    with pytest.raises(VectorError, match=r"never arrived.*only PeftModel.from_pretrained finds them"):
        model(PROMPT)
    with pytest.raises(VectorError, match="never arrived"):
        model.generate(PROMPT, max_new_tokens=2)
    assert not verify(model)
    with pytest.raises(VectorError, match="never arrived"):
        model.save_pretrained(tmp_path / "again")
