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


def test_the_cross_entropy_of_the_oracle_inputs():
    torch.testing.assert_close(F.cross_entropy(oracles.student_logits(), oracles.LABELS).item(), 2.54031791, rtol=0, atol=1e-8)


def test_two_steps_train():
    oracles.check_two_steps(build_distiller("vanilla", oracles.TinyNet(), input_size=16, seed=0))


def test_an_unneeded_teacher_is_allowed_and_not_run():
    with_teacher = oracles.tiny_pair("vanilla", student=oracles.TinyNet(), teacher=oracles.TinyNet(8))
    assert list(with_teacher(*oracles.tiny_batch()).terms) == ["ce"]
