from __future__ import annotations

import copy
import pickle

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
