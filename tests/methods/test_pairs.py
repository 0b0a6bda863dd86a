"""Every method on every pair of the CIFAR-100 comparisons takes a step."""

import copy
import os
import warnings
from functools import cache

import pytest
import torch

from distillzoo import build_distiller, create_model, list_distillers
from distillzoo.data import load_dataset
from distillzoo.streams import Stream, forked_generator

PAIRS = (
    ("wrn_40_2", "wrn_16_2"),
    ("wrn_40_2", "wrn_40_1"),
    ("resnet56", "resnet20"),
    ("resnet110", "resnet20"),
    ("resnet110", "resnet32"),
    ("resnet32x4", "resnet8x4"),
    ("vgg13", "vgg8"),
    ("vgg13", "mobilenetv2"),
    ("resnet50", "mobilenetv2"),
    ("resnet50", "vgg8"),
    ("resnet32x4", "shufflenetv1"),
    ("resnet32x4", "shufflenetv2"),
    ("wrn_40_2", "shufflenetv1"),
)


@cache
def data_and_batch():
    """A batch of four: of CIFAR-100 where DISTILLZOO_DATA names its folder, else of noise."""
    root = os.environ.get("DISTILLZOO_DATA")
    if root:
        data = load_dataset("cifar100", root=root)
    else:
        data = load_dataset("synthetic", num_classes=100, size=32, num_train=1000, num_test=100)
    return data.spec, next(iter(data.train_loader(4, seed=0).epoch(0, second_view=True)))


@cache
def network(name):
    with forked_generator(Stream.named(0, name)):
        return create_model(name, num_classes=100)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*list_distillers(), "crd+kd"])
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_one_step(teacher, student, method):
    spec, batch = data_and_batch()
    given = {"index": batch.index, "second_view": batch.second_view}
    networks = (create_model(student, num_classes=100), copy.deepcopy(network(teacher)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # crd has fewer negatives here
        distiller = build_distiller(method, *networks, data=spec, seed=0).train()
    optimizer = torch.optim.SGD(
        [p for p in distiller.parameters() if p.requires_grad], lr=1e-4
    )  # an untrained teacher of large values asks for care
    before = {name: parameter.detach().clone() for name, parameter in distiller.student_net.module.named_parameters()}
    out = distiller(batch.images, batch.targets, **given)
    assert out.terms.keys() == out.weights.keys()
    assert all(torch.isfinite(term) for term in out.terms.values())
    out.loss.backward()
    missing = [name for name, p in distiller.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    optimizer.step()
    distiller.after_step()
    after = dict(distiller.student_net.module.named_parameters())
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    again = distiller(batch.images, batch.targets, **given)
    assert torch.isfinite(again.loss)
    distiller.eval()
    exported = distiller.export_student().eval()
    torch.testing.assert_close(exported(batch.images), distiller.predict(batch.images), rtol=1e-4, atol=1e-4)
