from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
from peft import mapping
from peft.utils import PeftType

from steer_adapter import SteerConfig, SteerModel
from steer_adapter.errors import SteerError
from steer_adapter.tuner.registration import register


def test_the_type_is_a_full_member_of_the_enum():
    assert PeftType("STEER") is PeftType.STEER is PeftType["STEER"]
    assert PeftType.STEER == "STEER" and isinstance(PeftType.STEER, PeftType)
    assert PeftType.STEER in list(PeftType) and "STEER" in PeftType.__members__
    assert PeftType.STEER.name == PeftType.STEER.value == "STEER"


def test_it_survives_pickling_and_copying():
    assert pickle.loads(pickle.dumps(PeftType.STEER)) is PeftType.STEER
    assert copy.deepcopy(PeftType.STEER) is PeftType.STEER
    config = pickle.loads(pickle.dumps(SteerConfig(layers_to_transform=[1])))
    assert config.peft_type is PeftType.STEER


def test_the_other_members_are_as_before():
    assert PeftType("LORA") is PeftType.LORA
    assert len(list(PeftType)) == len(set(PeftType)) == len(PeftType.__members__)


def test_registering_twice_changes_nothing():
    members = list(PeftType)
    register()
    assert list(PeftType) == members
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.STEER] is SteerConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.STEER] is SteerModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.STEER] == "steer_"


def test_a_foreign_method_of_this_name_is_not_overwritten(monkeypatch):
    foreign = type("ForeignConfig", (), {})
    monkeypatch.setitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.STEER, foreign)
    with pytest.raises(SteerError, match="PEFT already has a method 'STEER'.*ForeignConfig"):
        register()
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.STEER] is foreign


CHANGES = """
import sys, json, peft, transformers

def classes():
    found = {
        value for name, module in list(sys.modules.items()) for value in list(vars(module).values())
        if name.partition(".")[0] in ("peft", "transformers") and isinstance(value, type)
    }
    return {kind: dict(vars(kind)) for kind in found if kind.__module__.partition(".")[0] in ("peft", "transformers")}

before = classes()
import steer_adapter
changed = {}
for kind, values in classes().items():
    names = [n for n, v in values.items() if kind in before and before[kind].get(n) is not v]
    if names:
        changed[kind.__qualname__] = sorted(names)
print(json.dumps(changed))
"""


def test_importing_changes_no_class_but_the_enum_and_who_reads_an_unknown_config():
    result = subprocess.run([sys.executable, "-c", CHANGES], check=True, capture_output=True, text=True)
    changed = json.loads(result.stdout.splitlines()[-1])
    assert set(changed) == {"PeftType", "PeftConfig"}
    assert changed["PeftConfig"] == ["_get_peft_type", "_reads_steering_vectors", "from_json_file"]
