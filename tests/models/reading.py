"""Read networks from outside: multiplications and taps by plain forward hooks."""

import torch
from torch import nn


@torch.no_grad()
def count_macs(model, images):
    """Multiplications of convolutions and linear layers in one forward of one image."""
    total = 0

    def add(module, args, output):
        nonlocal total
        per_output = module.weight[0].numel() if isinstance(module, nn.Conv2d) else module.in_features
        total += per_output * output[0].numel()

    handles = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    model(images)
    for handle in handles:
        handle.remove()
    return total


@torch.no_grad()
def read_taps(model, images, paths, *, clone=False):
    """Run the network and return its logits and {tap path: tensor}; each value is the very tensor, or a copy of it."""
    values, handles = {}, []

    def keep(path, value):
        values[path] = value.clone() if clone else value

    for path in paths:
        name, _, side = path.partition(":")
        module = model.get_submodule(name)
        if side:
            handles.append(module.register_forward_pre_hook(lambda m, args, path=path: keep(path, args[0])))
        else:
            handles.append(module.register_forward_hook(lambda m, args, out, path=path: keep(path, out)))
    logits = model(images)
    for handle in handles:
        handle.remove()
    return logits, values
