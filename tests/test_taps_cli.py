"""``python -m distillzoo taps MODEL``."""

from __future__ import annotations

import pytest

from distillzoo.__main__ import _main
from distillzoo.stages import Probe, complete_stage
from distillzoo.testing import TinyNet
from distillzoo.types import DataSpec, Stage


def test_stages_shapes_and_what_stands_before_the_activation_are_listed(capsys):
    assert _main(["taps", "timm/test_resnet", "--num-classes", "7", "--input-size", "64"]) == 0
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title == "timm/test_resnet, 64x64 pixels, 7 classes"
    assert rows[0].split()[:3] == ["tap", "path", "shape"]
    assert [row.split()[0] for row in rows[1:]] == ["stage1", "stage2", "stage3", "stage4", "pooled"]
    assert rows[4].split()[1] == "layer4"
    assert "layer4.0.act3:input" in rows[4] or "layer4.0.act2:input" in rows[4]
    assert rows[5].split()[1] == "fc:input"


def test_the_size_is_what_the_network_declares(capsys):
    assert _main(["taps", "resnet8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("resnet8, 32x32 pixels, 1000 classes\n")
    assert "64 x 8 x 8" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["resnt8"], "Did you mean 'resnet8'"),
        (["timm/test_vit", "--input-size", "40"], "does not run on images of 40x40"),
        (["resnet8", "--num-classes", "1"], "num_classes"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(capsys, arguments, sentence):
    assert _main(["taps", *arguments]) == 2
    streams = capsys.readouterr()
    assert sentence in streams.err
    assert len(streams.err.splitlines()) == 1
    assert streams.out == ""


def test_what_is_declared_stays():
    net = TinyNet()
    declared = Stage("groups.0.0", pre="groups.0.0.conv")
    assert complete_stage(Probe(net, DataSpec(5, (16, 16))).dry_run, declared) is declared
