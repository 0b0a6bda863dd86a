"""The CUDA path without a GPU: a step on tensors that have the device, shape and type of CUDA ones and no values.

Torch raises where operands lie on different devices, and where a value would have to come back to the host, as with ``.item()``.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from distillzoo import build_distiller, list_distillers
from distillzoo.data import load_dataset
from distillzoo.distiller import Distiller
from distillzoo.testing.networks import tiny_data, tiny_pair

OPTIONS = {"crd": {"negatives": 8}}
BATCH = 8


@pytest.fixture
def overwritten():
    """Let modules take tensors without values in place of their own."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(before)


def step(method, **options):
    data = tiny_data()
    distiller = build_distiller(method, *tiny_pair(), data=data, seed=0, **options).train()
    with FakeTensorMode(allow_non_fake_inputs=True):  # what is not moved counts as what it is: a tensor of the CPU
        distiller.to("cuda")
        tensors = (*distiller.named_parameters(), *distiller.named_buffers())
        assert [name for name, tensor in tensors if tensor.device.type != "cuda"] == []
        images = torch.randn(BATCH, data.channels, *data.input_size, device="cuda")
        labels, index = (torch.zeros(BATCH, dtype=torch.int64, device="cuda") for _ in range(2))
        return distiller(images, labels, index=index, second_view=images)


@pytest.mark.parametrize("method", [*list_distillers(), "crd+kd"])
def test_a_step_stays_on_the_device_and_never_waits_for_it(method, overwritten):
    options = {"crd": OPTIONS["crd"]} if "+" in method else OPTIONS.get(method, {})
    out = step(method, **options)
    assert out.loss.device.type == "cuda"
    assert {term.device.type for term in out.terms.values()} == {"cuda"}


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "average"},
        {"objective": "teacher_forced", "noise": "gaussian", "schedule": "ddpm"},
        {"start": "shared_noise", "layers": "all", "guide": True, "bridge": "per_branch"},
        {"noise": "zero", "guide": True, "guide_on": "final", "shuffle": False},
    ],
    ids=str,
)
def test_kdiffusions_options_on_the_device(options, overwritten):
    assert step("kdiffusion", **options).loss.device.type == "cuda"


@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_are_made_on_the_device(channels_last):
    data = load_dataset("synthetic")
    with FakeTensorMode(allow_non_fake_inputs=True):
        settings = {"device": torch.device("cuda"), "channels_last": channels_last}
        for loader in (data.train_loader(BATCH, seed=0, **settings), data.eval_loader(BATCH, **settings)):
            batches = list(loader.epoch(1))
            assert len(batches) == len(loader)
            assert {tensor.device.type for batch in batches for tensor in (batch.images, batch.targets, batch.index)} == {"cuda"}


class _Reads(Distiller):
    weight_presets = {"cifar": {"ce": 1.0, "other": 1.0}}

    def distill_terms(self, student, teacher, batch):
        return {"other": student.logits.mean() * student.logits.max().item()}


class _Leaves(Distiller):
    weight_presets = {"cifar": {"ce": 1.0, "other": 1.0}}

    def distill_terms(self, student, teacher, batch):
        return {"other": (student.logits + torch.ones(student.logits.shape[1])).mean()}


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [(_Reads, DataDependentOutputException, "_local_scalar_dense"), (_Leaves, RuntimeError, "device")],
)
def test_what_waits_or_lies_elsewhere_is_found(method, error, words, overwritten):
    with pytest.raises(error, match=words):
        step(method)
