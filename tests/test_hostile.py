"""Files of strangers: always a clear error or a correct load, and the model as it was."""

from __future__ import annotations

import json
import math
import resource
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HIDDEN, make_model, random_vectors, set_vectors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from steer_adapter import SteerConfig
from steer_adapter.errors import SteerError
from steer_adapter.sharing.inspection import inspect_adapters


LAYERS = [1, 3]
KEYS = [f"base_model.model.model.layers.{layer}.steering.steer_vector" for layer in LAYERS]
ROUTES = ("from_pretrained", "load_adapter", "PeftConfig", "AutoPeftModel")
# Of PEFT and transformers, which find a base model and its class by what the config says; and of PEFT, without a type.
BASE_MODEL = (OSError, ValueError, AttributeError, ImportError)
NO_TYPE = "missing required keys: {'peft_type'}"
FUZZ = settings(
    max_examples=2600,
    deadline=5000,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class Target:
    """A folder with an adapter, a model, and what both must look like."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "adapter"
        make_model().save_pretrained(folder / "base")
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = get_peft_model(model, SteerConfig(layers_to_transform=LAYERS, task_type="CAUSAL_LM"))
        set_vectors(model, random_vectors(LAYERS))
        model.save_pretrained(self.folder)
        self.config = json.loads(self.path("config.json").read_text())
        self.weights = self.path("model.safetensors").read_bytes()
        self.model = make_model()
        beside = SteerConfig(layers_to_transform=[1, 2, 3], task_type="CAUSAL_LM")
        self.steered = get_peft_model(make_model(), beside)
        self.before = self.fingerprint()

    def fingerprint(self) -> list[Any]:
        """Changes with each write to a parameter, with a new one, a hook, an entry in PEFT's books."""
        found: list[Any] = [dict(getattr(self.model, "peft_config", {})), dict(self.steered.peft_config)]
        for model in (self.model, self.steered):
            named = [*model.named_parameters(), *model.named_buffers()]
            found += [(name, tensor.data_ptr(), tensor._version) for name, tensor in named]
            found += [len(module._forward_hooks) for module in model.modules()]
        return found

    def path(self, name: str) -> Path:
        return self.folder / f"adapter_{name}"

    def load(
        self, config: bytes | None = None, weights: bytes | None = None, route: str = "from_pretrained"
    ) -> float | None:
        """Write the files, load them by one of PEFT's routes, and check that the models are whole.

        Returns the multiplier, or `None` after a clear error.
        """
        self.path("config.json").write_bytes(json.dumps(self.config).encode() if config is None else config)
        self.path("model.safetensors").write_bytes(self.weights if weights is None else weights)
        files = sorted(path.name for path in self.folder.iterdir())
        multiplier = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                multiplier = getattr(self, f"_by_{route}")()
        except SteerError as error:
            assert 10 < len(str(error)) < 4000
        except TypeError as error:
            assert NO_TYPE in str(error) and route in ("PeftConfig", "AutoPeftModel")
        except BASE_MODEL:
            assert route == "AutoPeftModel"
        assert self.fingerprint() == self.before
        assert sorted(path.name for path in self.folder.iterdir()) == files
        return multiplier

    def _by_from_pretrained(self) -> float:
        steered = PeftModel.from_pretrained(self.model, self.folder)
        multiplier = arrived(steered, "default")
        steered.unload()
        return multiplier

    def _by_load_adapter(self) -> float:
        self.steered.load_adapter(self.folder, "stranger")
        multiplier = arrived(self.steered, "stranger")
        self.steered.delete_adapter("stranger")
        return multiplier

    def _by_PeftConfig(self) -> float | None:
        config = PeftConfig.from_pretrained(self.folder)
        return config.multiplier if isinstance(config, SteerConfig) else None

    def _by_AutoPeftModel(self) -> float:
        return arrived(AutoPeftModelForCausalLM.from_pretrained(self.folder), "default")


def arrived(steered: PeftModel, adapter: str) -> float:
    vectors = [p for n, p in steered.named_parameters() if n.endswith(f".steer_vector.{adapter}")]
    assert vectors and all(torch.isfinite(v).all() and v.shape == (HIDDEN,) for v in vectors)
    return steered.peft_config[adapter].multiplier


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(autouse=True)
def modest_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024, "kibibytes"


numbers = st.one_of(
    st.integers(-3, 40), st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400, 1e308, -0.0, 1e39]), st.floats()
)
texts = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["../../etc/passwd", "/etc/passwd", "\0", "\ud800", "(a+)+$", "STEER", "LORA", "add", "\x1b[2J"]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)
FIELDS = [
    "auto_mapping", "base_model_name_or_path", "format_version", "hidden_size", "inference_mode", "init_weights",
    "layers_to_transform", "model_type", "multiplier", "num_hidden_layers", "operation", "peft_type", "peft_version",
    "provenance", "revision", "stack", "target_modules", "task_type", "token_scope", "self", "cls", "kwargs",
    "runtime_config", "unknown",
]  # fmt: skip


@given(
    changes=st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3),
    without=st.sets(st.sampled_from(FIELDS), max_size=1),
    route=st.sampled_from(ROUTES),
)
@FUZZ
@pytest.mark.slow
def test_values_of_the_config(target: Target, changes: dict[str, Any], without: set[str], route: str):
    config = {key: value for key, value in {**target.config, **changes}.items() if key not in without}
    loaded = target.load(config=json.dumps(config).encode(), route=route)
    assert loaded in (None, config.get("multiplier", 1.0))


@st.composite
def mutated(draw: Any, original: bytes) -> bytes:
    """Bytes cut, repeated, overwritten."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        piece = draw(
            st.one_of(
                st.binary(max_size=4),
                st.sampled_from([b"[", b"]", b"{", b"}", b'"', b",", b":", b"-1", b"NaN", b"1e999", b"\\ud800", b"0"]),
            )
        )
        length = draw(st.sampled_from([0, len(piece), 1, 8, 60]))
        data[at : at + length] = piece
    return bytes(data)


@given(data=st.data(), route=st.sampled_from(ROUTES))
@FUZZ
@pytest.mark.slow
def test_bytes_of_the_config(target: Target, data: Any, route: str):
    target.load(config=data.draw(mutated(json.dumps(target.config).encode())), route=route)


sizes = st.one_of(st.integers(-1, 200), st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**30]))
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F64", "BF16", "F8_E4M3", "I64", "BOOL", "X", 3, None, ["F32"]]),
        "shape": st.one_of(st.lists(sizes, max_size=3), st.sampled_from([[32], [1, 32], [0], [2**62, 4], 32, "32"])),
        "data_offsets": st.one_of(
            st.lists(sizes, max_size=3), st.sampled_from([[0, 128], [128, 256], [0, 256], [128, 0], [1.0, 128.0]])
        ),
        "more": st.none(),
    },
)
good = st.sampled_from([{"dtype": "F32", "shape": [32], "data_offsets": [i, i + 128]} for i in (0, 128, 256)])
keys = st.sampled_from(
    [
        *KEYS,
        KEYS[0].replace("base_model.model.", "base_model.model.base_model.model."),
        KEYS[0].replace(".1.", ".01."),
        KEYS[0].replace(".1.", ".7."),
        "base_model.model.lm_head.weight",
        "base_model.model.model.norm.weight",
        "base_model.model.../../x.1.steering.steer_vector",
        "__metadata__",
        "",
    ]
)


@given(
    pairs=st.lists(st.tuples(keys, st.one_of(good, good, entries)), max_size=3),
    length=st.one_of(st.none(), st.none(), st.integers(0, 2**64 - 1)),
    body=st.sampled_from([0, 1, 128, 256, 257, 384]),
    route=st.sampled_from(ROUTES[:2]),
)
@FUZZ
@pytest.mark.slow
def test_headers(target: Target, pairs: list[tuple[str, Any]], length: int | None, body: int, route: str):
    # Written by hand: a key may stand there twice.
    header = "{" + ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in pairs) + "}"
    start = struct.pack("<Q", len(header) if length is None else length)
    target.load(weights=start + header.encode() + bytes(body), route=route)


@given(data=st.data(), route=st.sampled_from(ROUTES[:2]))
@FUZZ
@pytest.mark.slow
def test_bytes_of_the_weights(target: Target, data: Any, route: str):
    target.load(weights=data.draw(mutated(target.weights)), route=route)


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_whole_loads(target: Target, route: str):
    assert target.load(route=route) == 1.0


#####################
# Cases by their name #
#####################


def header_only(entries: dict[str, Any], body: bytes = b"") -> bytes:
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + body


def entry(start: int, shape: list[int], dtype: str = "F32", size: int = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + math.prod(shape) * size]}


VECTORS = {KEYS[0]: entry(0, [HIDDEN]), KEYS[1]: entry(4 * HIDDEN, [HIDDEN])}
BODY = struct.pack(f"<{2 * HIDDEN}f", *[0.5] * (2 * HIDDEN))


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param(
            header_only({**VECTORS, "base_model.model.model.norm.weight": entry(256, [32])}, BODY + bytes(128)),
            id="foreign key",
        ),
        pytest.param(header_only(VECTORS, BODY[:-4] + struct.pack("<f", float("nan"))), id="NaN"),
        pytest.param(header_only(VECTORS, struct.pack("<f", float("inf")) + BODY[4:]), id="infinity"),
        pytest.param(
            header_only(
                {k: entry(i * 256, [HIDDEN], "F64", 8) for i, k in enumerate(KEYS)}, struct.pack("<64d", *[1e300] * 64)
            ),
            id="too large for float32",
        ),
        pytest.param(header_only(dict.fromkeys(KEYS, entry(0, [HIDDEN])), BODY[:128]), id="one place for two"),
        pytest.param(header_only(VECTORS, BODY + b"more"), id="more bytes"),
        pytest.param(struct.pack("<Q", 2**63), id="a header of 2**63 bytes"),
        pytest.param(header_only({KEYS[0]: entry(0, [2**40])}), id="4 TB"),
        pytest.param(header_only({KEYS[0]: entry(0, [2**20] * 8)}), id="2**160 numbers"),
        pytest.param(b'\x10\x00\x00\x00\x00\x00\x00\x00{"a":' + b"[" * 11, id="brackets"),
        pytest.param(struct.pack("<Q", 400_000) + b"[" * 400_000, id="deep"),
        pytest.param(b"\x80\x04cos\nsystem\n(S'touch /tmp/never'\ntR.", id="pickle"),
    ],
)  # fmt: skip
def test_weights_that_are_refused(target: Target, weights: bytes):
    assert target.load(weights=weights) is None


def test_a_head_that_came_along_does_not_overwrite_the_model(target: Target):
    entries = {**VECTORS, "base_model.model.lm_head.weight": entry(256, [96, HIDDEN])}
    assert target.load(weights=header_only(entries, BODY + bytes(4 * 96 * HIDDEN))) is not None


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"[]",
        b"null",
        b"{" * 100_000,
        b'{"peft_type": "STEER", "a": ' + b"[" * 100_000,
        b'{"peft_type": "STEER", "a": ' + b"[" * 200 + b"]" * 200 + b"}",
        b'{"peft_type": "STEER", "peft_type": "STEER"}',
        b'{"peft_type": "STEER", "hidden_size": ' + b"9" * 5000 + b"}",
        b'{"peft_type": "STEER", "self": 1}',
        b'{"peft_type": "STEER", "x": "' + b"x" * (1 << 21) + b'"}',
        b'{"peft_type": ["STEER"]}',
        b'{"peft_type": "STEER"}',
        b"\xff\xfe{}",
    ],
)
def test_configs_that_are_refused(target: Target, config: bytes):
    for route in ROUTES[:2]:
        assert target.load(config=config, route=route) is None
        with pytest.raises(SteerError):
            getattr(target, f"_by_{route}")()
    with pytest.raises(SteerError):
        SteerConfig.from_pretrained(str(target.folder))
    (inspected,) = inspect_adapters(str(target.folder))[:1]
    assert "error" in inspected


STEER = b'{"peft_type": "STEER", "a": '


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"[1]", id="no object"),
        pytest.param(b"null", id="nothing"),
        pytest.param(b"\xff\xfe{}", id="not UTF-8"),
        pytest.param(b'{"a": ' * 100_000, id="deep, of nobody"),
        pytest.param(STEER + b"[" * 100_000 + b"]" * 100_000 + b"}", id="deep"),
        pytest.param(STEER + b"[" * 40 + b"]" * 40 + b"}", id="deeper than we go"),
        pytest.param(b'{"a": [' + b"[]," * 4_000_000 + b'1], "peft_type":"STEER"}', id="large"),
        pytest.param(b'{"a":[' + b"[]," * 4_000_000 + rb'1],"peft\u005Ftype":"\u0053TEER"}', id="large, in escapes"),
        pytest.param(STEER + b"9" * 5000 + b"}", id="integer"),
        pytest.param(STEER + b'1, "a": 1}', id="twice"),
        pytest.param(STEER + b'1, "self": 1}', id="self"),
        pytest.param(STEER + b'1, "cls": 1}', id="cls"),
        pytest.param(b'{"self": 1}', id="self, of nobody"),
        pytest.param(b'{"cls": 1, "unknown": 2}', id="cls, of nobody"),
        pytest.param(b'{"peft_type": ["STEER"]}', id="no name"),
        pytest.param(b'{"peft_type": null}', id="null"),
        pytest.param(b'{"peft_type": "STEERING"}', id="unknown"),
    ],
)
def test_every_route_of_peft_refuses_them_with_an_error_of_ours(target: Target, config: bytes, route: str):
    assert target.load(config=config, route=route) is None
    with pytest.raises(SteerError, match=r"adapter_config\.json: received"):
        getattr(target, f"_by_{route}")()


@pytest.mark.parametrize(
    "changes",
    [
        dict(layers_to_transform=None, target_modules="(a+)+$"),
        dict(layers_to_transform=None, target_modules=["lm_head"]),
        dict(layers_to_transform=None),
        dict(layers_to_transform=[1]),
        dict(layers_to_transform=[-3, -1]),
        dict(layers_to_transform=list(range(100_000))),
        dict(hidden_size=10**11, layers_to_transform=None, target_modules=["layers.1", "layers.3"]),
        dict(multiplier=10**400),
        dict(multiplier=1e39),
        dict(base_model_name_or_path="a\nb"),
        dict(base_model_name_or_path=3),
        dict(provenance={"margins": {"1": {"margin": "much"}}}),
        dict(provenance={"a": {"b": {"c": {"d": {"e": 1}}}}}),
        dict(auto_mapping={}),
        dict(stack="x" * 100_000),
        dict(stack="a\nb"),
        dict(token_scope={}),
        dict(auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": 3}),
    ],
)
def test_values_that_are_refused(target: Target, changes: dict[str, Any]):
    for route in ROUTES[:2]:
        assert target.load(config=json.dumps({**target.config, **changes}).encode(), route=route) is None
        with pytest.raises(SteerError):
            getattr(target, f"_by_{route}")()


@pytest.mark.parametrize("native", [False, True])
def test_what_the_config_shows_is_checked_on_the_native_route_too(target: Target, native: bool):
    changes = dict(hidden_size=10**11, layers_to_transform=None, target_modules=["layers.1", "layers.3"])
    target.path("config.json").write_text(json.dumps({**target.config, **changes}))
    model = make_model()
    with pytest.raises(SteerError, match="hidden_size"):
        model.load_adapter(str(target.folder)) if native else PeftModel.from_pretrained(model, target.folder)
    assert not any("steering" in name for name, _ in model.named_modules())


def test_special_files(target: Target, tmp_path: Path):
    import os

    (tmp_path / "adapter_config.json").write_text(json.dumps(target.config))
    os.mkfifo(tmp_path / "adapter_model.safetensors")
    with pytest.raises(SteerError, match="no regular file"):
        PeftModel.from_pretrained(make_model(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(SteerError, match="no regular file"):
        PeftModel.from_pretrained(make_model(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.safetensors").symlink_to("adapter_model.safetensors")
    with pytest.raises(SteerError, match="without adapter_model.safetensors"):
        PeftModel.from_pretrained(make_model(), tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_pipe_is_not_opened_on_the_native_route(target: Target, tmp_path: Path, name: str):
    import os

    (tmp_path / "adapter_config.json").write_text(json.dumps(target.config))
    os.mkfifo(tmp_path / name)
    model = make_model()
    with pytest.raises(SteerError, match=f"{name}: received something that is no regular file"):
        model.load_adapter(str(tmp_path), use_safetensors=not name.endswith("bin"))
    assert not any("steering" in name for name, _ in model.named_modules())


def test_pickled_weights_are_refused(target: Target, tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(target.config))
    torch.save({key: torch.zeros(HIDDEN) for key in KEYS}, tmp_path / "adapter_model.bin")
    model = make_model()
    with pytest.raises(SteerError, match="pickled weights"):
        PeftModel.from_pretrained(model, tmp_path)
    assert not any("steering" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "a\\b", "a\0b"])
def test_names_with_path_parts(name: str):
    with pytest.raises(SteerError, match="without dots and slashes"):
        get_peft_model(make_model(), SteerConfig(layers_to_transform=1), adapter_name=name)
