from __future__ import annotations

import dataclasses

import pytest
import torch

from distillzoo.errors import OptionError
from distillzoo.types import Batch, DataSpec, ParamGroup, Phase, Progress, Requires, Stage, StepOutput, Trace


def test_a_data_spec_knows_its_channels_and_keeps_what_it_is_given():
    spec = DataSpec(3, (8, 12), (0.5,), (0.2,), num_samples=4, targets=torch.tensor([0, 1, 2, 0]))
    assert spec.channels == 1
    assert spec.input_size == (8, 12)
    assert spec.num_samples == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2; got 1"),
        ({"input_size": (0, 8)}, "input_size"),
        ({"mean": (0.0,)}, "one number a channel"),
        ({"mean": (), "std": ()}, "one number a channel"),
        ({"std": (1.0, 0.0, 1.0)}, "std above 0"),
        ({"num_samples": 0}, "num_samples must be at least 1 or None; got 0"),
        ({"targets": torch.zeros(4)}, "integer labels"),
        ({"targets": torch.zeros(2, 2, dtype=torch.int64)}, r"got \(2, 2\)"),
        ({"num_samples": 3, "targets": torch.zeros(4, dtype=torch.int64)}, "4 labels but num_samples is 3"),
    ],
)
def test_a_data_spec_refuses_what_is_out_of_range(fields, message):
    with pytest.raises(OptionError, match=message):
        DataSpec(**{"num_classes": 5, "input_size": (8, 8), **fields})


@pytest.mark.parametrize("kind", [Batch, DataSpec, ParamGroup, Phase, Progress, Requires, Stage, StepOutput, Trace])
def test_the_records_are_frozen_dataclasses(kind):
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen


def test_records_of_tensors_compare_by_identity_and_can_be_set_members():
    one, other = (Batch(torch.zeros(1), torch.zeros(1)) for _ in range(2))
    assert one != other
    assert len({one, other}) == 2


def test_a_param_group_is_named_by_owner_and_kind():
    assert ParamGroup("adapters", "norm_bias", (), ()).name == "adapters.norm_bias"
