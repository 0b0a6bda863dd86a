"""Read networks from outside: multiplications and taps by plain forward hooks."""

import pytest
import torch
from torch import nn


def _count_macs(model, images):
    """Multiplications of convolutions and linear layers in one forward of one image."""
    total = 0

    def add(module, args, output):
        nonlocal total
        per_output = module.weight[0].numel() if isinstance(module, nn.Conv2d) else module.in_features
        total += per_output * output[0].numel()

    handles = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return total


def _read(model, images, paths):
    """Run the network and return {tap path: tensor}; each value is the very tensor, not a copy."""
    values, handles = {}, []
    for path in paths:
        name, _, side = path.partition(":")
        module = model.get_submodule(name)
        if side:
            handles.append(module.register_forward_pre_hook(lambda m, args, path=path: values.__setitem__(path, args[0])))
        else:
            handles.append(module.register_forward_hook(lambda m, args, out, path=path: values.__setitem__(path, out)))
    logits = model(images)
    for handle in handles:
        handle.remove()
    return logits, values


@pytest.fixture
def count_macs():
    return _count_macs


@pytest.fixture
def read_taps():
    return _read
