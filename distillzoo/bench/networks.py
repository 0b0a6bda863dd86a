"""Make the networks and distillers of a group, always in the same way: equal students, one shared teacher."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase

import torch
from torch import nn

from distillzoo.bench.plan import Group
from distillzoo.bench.recipe import Pair, Recipe
from distillzoo.bench.views import view_spec
from distillzoo.build import build_distiller
from distillzoo.data import DataSet
from distillzoo.distiller import Distiller
from distillzoo.errors import DistillZooError, OptionError, ShapeError, failure_of, unknown_name
from distillzoo.models import MODELS, create_model
from distillzoo.streams import Stream, forked_generator
from distillzoo.taps import Teacher
from distillzoo.types import DataSpec

__all__ = ["build_members", "check_networks", "count_parameters", "make_network", "make_teacher"]


def check_networks(recipe: Recipe) -> None:
    """Refuse networks that do not exist, and settings for networks that nothing here trains.

    A recipe may carry settings for networks of other pairs than those that are run (``--pairs``), so a pattern of its file must
    fit some network that there is; one from the command line must fit a network of the pairs.

    Args:
        recipe: What is to be run.
    Raises:
        DistillZooError: If a name is unknown; near matches are named.
    """
    pairs = [Pair.parse(text) for text in recipe.pairs]
    networks = {who: sorted({getattr(pair, who) for pair in pairs}) for who in ("teacher", "student")}
    named = sorted({*networks["teacher"], *networks["student"]})
    for name in recipe.taps:
        if name not in named and f"taps.{name}" in recipe.changed:
            raise OptionError(unknown_name("network under taps", name, named, listed="The pairs name"))
    for who, own in networks.items():
        for pattern in getattr(recipe, f"{who}_overrides"):
            typed = any(path.startswith(f"{who}_overrides.{pattern}.") for path in recipe.changed)
            foreign = pattern.startswith(("timm/", "torchvision/"))
            known = own if typed else [*own, *MODELS.names()]
            if not any(fnmatchcase(name, pattern) for name in known) and (typed or not foreign):
                listed = f"The {who}s of the pairs are" if typed else "Networks are"
                raise OptionError(unknown_name(f"network under {who}_overrides", pattern, known, listed=listed))
    for name in named:
        if "/" not in name and name not in MODELS:
            create_model(name, num_classes=10)  # raises, with near matches


def make_network(
    name: str, data: DataSet, seed: int, role: str, *, num_classes: int | None = None, pretrained: bool = False
) -> nn.Module:
    """Create a network on the CPU, initialised from the stream of its role: the same weights on every device.

    Args:
        name: Name of the network.
        data: Whose classes it tells apart.
        seed: Seed of the run.
        role: ``"student"`` or ``"teacher"``.
        num_classes: Width of the logits; ``None`` takes the number of classes.
        pretrained: Whether to fetch published weights.
    """
    with forked_generator(Stream.named(seed, role)):
        return create_model(name, num_classes=num_classes or data.spec.num_classes, pretrained=pretrained)


def count_parameters(network: nn.Module) -> int:
    """Return the number of a network's parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def make_teacher(group: Group, network: nn.Module) -> Teacher:
    """Wrap a trained network as the teacher that the whole group shares.

    Args:
        group: The group.
        network: The network.
    Raises:
        ShapeError: If it does not run on images of this size.
    """
    view = {} if group.teacher is None else group.teacher.view
    own = view_spec(view, group.data.spec)
    try:
        return Teacher(network, group.data.spec, stages=group.taps.get(group.pair.teacher), own_data=own)
    except DistillZooError:
        raise
    except Exception as error:  # a network may raise anything at a size that it cannot take
        raise _wrong_size("teacher", group.pair.teacher, own or group.data.spec, error) from error


def _wrong_size(role: str, name: str, data: DataSpec, error: BaseException) -> ShapeError:
    height, width = data.input_size
    return ShapeError(
        f"The {role} {name} does not run on images of {height}x{width} ({failure_of(error)}); choose another network or another "
        "size of the images (--data.crop)."
    )


def build_members(group: Group, teacher: Teacher | None) -> dict[str, Distiller]:
    """Build the distillers of a group by run id, every one on a student of the same initial weights.

    Args:
        group: The group.
        teacher: Its shared teacher.
    Raises:
        DistillZooError: If a method cannot work on the pair, or an option or a tap is wrong.
    """
    student = make_network(group.pair.student, group.data, group.seed, "student")
    members: dict[str, Distiller] = {}
    for run in group.runs:
        options, weights = run.row.settings(group.pair)
        stages = group.taps.get(group.pair.student)
        try:
            members[run.id] = build_distiller(
                run.row.method,
                copy.deepcopy(student),
                teacher if run.teacher is not None else None,
                data=group.data.spec,
                weights=weights,
                taps=None if stages is None else {"student": stages},
                seed=group.seed,
                **options,
            )
        except ShapeError as error:
            if error.__cause__ is None:
                raise
            raise _wrong_size("student", group.pair.student, group.data.spec, error.__cause__) from error
    return members


def pick_device(asked: str) -> torch.device:
    """Return the device that was asked for; ``"auto"`` takes CUDA where there is one.

    Raises:
        OptionError: If CUDA was asked for and there is none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda was asked for, but this machine has no usable CUDA device; use --device cpu or auto.")
    return torch.device("cuda" if asked in ("auto", "cuda") and torch.cuda.is_available() else "cpu")
