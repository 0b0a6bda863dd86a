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
        ({"num_classes": 1}, "num_classes must be at least 2, a whole number; got 1"),
        ({"num_classes": "10"}, "a whole number; got '10'"),
        ({"num_classes": 10.0}, r"a whole number; got 10\.0"),
        ({"input_size": (0, 8)}, "input_size"),
        ({"input_size": 32}, r"pixels \(height, width\), as \(32, 32\); got 32"),
        ({"input_size": (32,)}, r"got \(32,\)"),
        ({"input_size": (32.0, 32)}, r"got \(32\.0, 32\)"),
        ({"input_size": "32"}, "got '32'"),
        ({"mean": 0.5}, r"as \(0\.5, 0\.5, 0\.5\), std above 0; got mean=0\.5"),
        ({"mean": "abc"}, "got mean='abc'"),
        ({"std": (1.0, float("nan"), 1.0)}, "nan"),
        ({"mean": (0.0,)}, "one number a channel"),
        ({"mean": (), "std": ()}, "one number a channel"),
        ({"std": (1.0, 0.0, 1.0)}, "std above 0"),
        ({"num_samples": 0}, "num_samples must be at least 1 or None, a whole number; got 0"),
        ({"num_samples": 2.5}, r"got 2\.5"),
        ({"targets": [0, 1]}, r"must be a tensor of integer labels \(N,\); got list: torch\.tensor"),
        ({"targets": torch.tensor([0, 5])}, "labels from 0 to 4, as num_classes is 5; got 0 to 5"),
        ({"targets": torch.tensor([-1, 4])}, "got -1 to 4"),
        ({"targets": torch.zeros(0, dtype=torch.int64)}, r"N at least 1; got \(0,\)"),
        ({"targets": torch.tensor([True, False])}, r"torch\.bool"),
        ({"targets": torch.zeros(4)}, "integer labels"),
        ({"targets": torch.zeros(2, 2, dtype=torch.int64)}, r"got \(2, 2\)"),
        ({"num_samples": 3, "targets": torch.zeros(4, dtype=torch.int64)}, "4 labels but num_samples is 3"),
    ],
)
def test_a_data_spec_refuses_what_is_out_of_range(fields, message):
    with pytest.raises(OptionError, match=message):
        DataSpec(**{"num_classes": 5, "input_size": (8, 8), **fields})


def test_lists_as_of_a_file_are_taken_as_tuples():
    spec = DataSpec(3, [8, 12], [0, 0.5], [1, 0.25])
    assert (spec.input_size, spec.mean, spec.std) == ((8, 12), (0, 0.5), (1, 0.25))


def test_the_main_phase_has_the_length_of_the_training():
    with pytest.raises(OptionError, match=r"The main phase takes its length from the training configuration; got epochs=3"):
        Phase(epochs=3)
    assert Phase("first", 3).epochs == 3


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
