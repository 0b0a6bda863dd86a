import torch
from torch.nn import functional as F

from distillzoo import build_distiller
from tests.methods import oracles


def test_the_loss_is_cross_entropy_alone_and_no_teacher_is_asked():
    distiller = build_distiller("vanilla", oracles.TinyNet(), input_size=16, seed=0)
    images, targets = oracles.tiny_batch()
    out = distiller(images, targets)
    assert list(out.terms) == ["ce"]
    assert not distiller.requires.teacher
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, targets))


def test_an_unneeded_teacher_is_allowed_and_not_run():
    with_teacher = oracles.tiny_pair("vanilla", student=oracles.TinyNet(), teacher=oracles.TinyNet(8))
    assert list(with_teacher(*oracles.tiny_batch()).terms) == ["ce"]
