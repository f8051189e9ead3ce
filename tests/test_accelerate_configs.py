"""The configs for accelerate in examples/: as far as they can be looked at without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import layers_of, make_model
from peft import get_peft_model

from steer_adapter import SteerConfig


FOLDER = Path(__file__).parent.parent / "examples" / "accelerate"
NAMES = ("fsdp2.yaml", "zero3.yaml")
SIMPLE = ("--mixed_precision", "no", "--num_processes", "8", "--num_machines", "1", "--dynamo_backend", "no")


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_knows_every_key(name):
    config = load_config_from_file(str(FOLDER / name))  # refuses keys of the first level that it doesn't know
    arguments = launch_command_parser().parse_args(["--config_file", str(FOLDER / name), "script.py"])
    for key in (*config.fsdp_config, *config.deepspeed_config):
        assert hasattr(arguments, key), key
    # Autocast would take float32 from the vector; DeepSpeed keeps a copy of it, and loads by this.
    assert config.mixed_precision == ("no" if name == "fsdp2.yaml" else "bf16")
    assert config.distributed_type == (DistributedType.FSDP if name == "fsdp2.yaml" else DistributedType.DEEPSPEED)
    assert "NOT RUN HERE" in (FOLDER / name).read_text()


def test_a_key_that_is_not_known_is_refused(tmp_path):
    values = yaml.safe_load((FOLDER / "fsdp2.yaml").read_text())
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**values, "shard_everything": True}))
    with pytest.raises(ValueError, match="shard_everything"):
        load_config_from_file(str(tmp_path / "bad.yaml"))


def test_each_decoder_layer_is_a_shard(monkeypatch):
    for key, value in _environment().items():
        if key.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(key, value)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin would look for a GPU
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    model = get_peft_model(make_model().to(torch.bfloat16), SteerConfig(layers_to_transform=1))
    plugin.set_auto_wrap_policy(model)
    is_shard = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert [m for m in model.modules() if is_shard(m)] == list(layers_of(model.base_model.model))


def _environment() -> dict[str, str]:
    """What accelerate launch would tell the processes."""
    values = yaml.safe_load((FOLDER / "fsdp2.yaml").read_text())
    options = [part for key, value in values["fsdp_config"].items() for part in (f"--{key}", str(value).lower())]
    options[options.index("--fsdp_auto_wrap_policy") + 1] = values["fsdp_config"]["fsdp_auto_wrap_policy"]
    arguments = launch_command_parser().parse_args(["--use_fsdp", *SIMPLE, *options, "script.py"])
    return prepare_multi_gpu_env(arguments)
