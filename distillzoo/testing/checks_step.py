"""The points about a step: terms, gradients, batch sizes, pairs, draws, options, compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distillzoo.build import resolve_distiller
from distillzoo.distiller import Distiller
from distillzoo.errors import DistillZooError, OptionError, UnsupportedPairError
from distillzoo.options import option_defaults
from distillzoo.schedules import Schedule
from distillzoo.streams import Stream, forked_generator
from distillzoo.testing.comparing import batch_tensors, marked, trace_tensors, written
from distillzoo.testing.networks import odd_pairs
from distillzoo.testing.subject import ContractError, Loop, Subject, hold, point
from distillzoo.types import Batch, Phase, Progress, StepOutput, Trace

__all__ = [
    "check_batch_sizes",
    "check_compile",
    "check_gradients",
    "check_misspelt_options",
    "check_pairs",
    "check_seed",
    "check_terms",
]

_LONG_TRAINING = 300  # epochs; longer than any warm-up


@point(1, "a step gives finite named terms")
def check_terms(subject: Subject) -> None:
    """(1) A step gives finite scalar terms, the same names as the weights, and a loss that is their weighted sum.

    With the teacher's trace given and without, with fields that the method does not need, and with soft targets unless it
    declares ``hard_labels``. The step writes neither into the batch nor into the student's trace: other members read them too.
    """
    batch = subject.batch()
    outputs = [_watched_step(subject, subject.build(), batch, given_trace=given) for given in (False, True)]
    for out in outputs:
        _check_output(subject, out, subject.build(), len(batch.images))
    hold(
        torch.equal(outputs[0].loss, outputs[1].loss),
        f"the loss is {outputs[0].loss.item()} when the distiller runs its teacher and {outputs[1].loss.item()} when it is given "
        "the teacher's trace; read the teacher through the trace alone.",
    )
    distiller = subject.build()
    with forked_generator(Stream.named(0, "testing", "dropout")):
        full = distiller(batch.images, batch.targets, index=batch.index, second_view=batch.second_view)
    hold(
        torch.equal(full.loss, outputs[0].loss),
        "index and second_view change the loss of a method that does not require them; declare them in requires, or leave them.",
    )
    if not distiller.requires.hard_labels:
        classes = torch.arange(len(batch.targets) * subject.data.num_classes)
        noise = Stream.named(0, "testing", "targets").normal(0, classes).view(len(batch.targets), -1)
        soft = Batch(batch.images, noise.softmax(1), batch.index, batch.second_view)
        try:
            out = _watched_step(subject, subject.build(), soft)
        except ContractError:
            raise
        except (RuntimeError, IndexError, DistillZooError) as error:
            raise ContractError(
                f"soft targets stop it ({error}), and it does not declare hard_labels; declare them in requires."
            ) from error
        _check_output(subject, out, distiller, len(batch.images))


def _watched_step(subject: Subject, distiller: Distiller, batch: Batch, *, given_trace: bool = False) -> StepOutput:
    """Take a step of a distiller that is used for nothing else, and refuse one that writes into what it is given."""
    terms_of, found = distiller.distill_terms, list[str]()

    def watched(student: Trace, teacher: Trace | None, given: Batch) -> dict[str, Tensor]:
        before = marked(trace_tensors(student))
        terms = terms_of(student, teacher, given)
        found.extend(f"the student's {name}" for name in written(before, trace_tensors(student)))
        return terms

    before = marked(batch_tensors(batch))
    vars(distiller)["distill_terms"] = watched
    out = subject.step(distiller, batch, given_trace=given_trace)
    found.extend(f"the batch's {name}" for name in written(before, batch_tensors(batch)))
    hold(not found, f"a step writes into {', '.join(found)}, which other members and the loop read; work on a copy.")
    return out


def _check_output(subject: Subject, out: StepOutput, distiller: Distiller, size: int) -> None:
    names = list(out.terms)
    hold("ce" in names, f"the terms are {names} without 'ce'; leave the cross-entropy to the base.")
    hold(
        set(names) == set(out.weights) == set(distiller.weights),
        f"terms {sorted(names)} and weights {sorted(distiller.weights)} differ; give every term a weight of its name.",
    )
    hold(
        out.logits.shape == (size, subject.data.num_classes),
        f"logits are {tuple(out.logits.shape)} for {size} images and {subject.data.num_classes} classes; return (B, num_classes).",
    )
    for name, term in out.terms.items():
        hold(term.ndim == 0, f"the term {name!r} has the shape {tuple(term.shape)}; reduce it to a scalar.")
        hold(torch.isfinite(term), f"the term {name!r} is {term.item()}; clamp what it divides by or takes a root or logarithm of.")
    expected = sum(float(out.weights[name]) * term.item() for name, term in out.terms.items())
    tolerance = 1e-4 * (1.0 + sum(abs(float(out.weights[name]) * term.item()) for name, term in out.terms.items()))
    hold(
        abs(out.loss.item() - expected) <= tolerance,
        f"the loss is {out.loss.item()} and the weighted sum of the terms {expected}; leave the sum to the base.",
    )


@point(2, "every trainable tensor has a gradient")
def check_gradients(subject: Subject) -> None:
    """(2) A gradient exists (is not None) on every trainable tensor, in at least one of the phases.

    Every term has the largest weight that its schedule ever gives it there: one that begins at 0 trains its adapters later on.
    """
    reached: set[str] = set()
    trainable: set[str] = set()
    for number in range(len(subject.build().phases())):
        distiller = subject.build()
        trainable |= {name for name, p in distiller.named_parameters() if p.requires_grad}
        loop = Loop(subject, distiller)
        phase = distiller.phases()[number]
        loop.enter(phase)
        first = next(progress for planned, progress in loop.plan if planned == phase)
        distiller.override_weights({name: _largest(schedule, phase, first) for name, schedule in distiller.weights.items()})
        distiller.set_progress(first)
        loss = subject.step(distiller, subject.batch()).loss
        hold(loss.requires_grad, f"the loss of phase {phase.name!r} needs no gradient: its terms reach none of its tensors.")
        loss.backward()  # type: ignore[no-untyped-call]
        reached |= {name for name, p in distiller.named_parameters() if p.grad is not None}
    missing = sorted(trainable - reached)
    hold(
        not missing,
        f"no gradient reaches {', '.join(missing)}; use these tensors in a term, freeze them, or keep them as buffers.",
    )


def _largest(schedule: Schedule, phase: Phase, first: Progress) -> float:
    """The largest weight that a schedule gives in a phase, of a long training where the recipe says how long it is."""
    epochs = phase.epochs or _LONG_TRAINING
    done = [replace(first, epoch=epoch, epochs=epochs, step=first.step + epoch * first.steps_per_epoch) for epoch in range(epochs)]
    return max(*map(schedule, done), schedule.final() if phase.name == "main" else 0.0)


@point(8, "any batch size")
def check_batch_sizes(subject: Subject) -> None:
    """(8) Batches of 1, 2 and any other size, one after the other, train: the last batch of an epoch is ragged."""
    distiller = subject.build()
    for number, size in enumerate((5, 3, 2, 1, 5)):
        batch = subject.batch(number, size)
        try:
            loss = subject.step(distiller, batch, given_trace=bool(number % 2)).loss
            loss.backward()  # type: ignore[no-untyped-call]
            distiller.after_step()
        except Exception as error:
            raise ContractError(
                f"a batch of {size} stopped it with {type(error).__name__}: {error} Read the size from the batch."
            ) from error
        hold(torch.isfinite(loss), f"the loss of a batch of {size} is {loss.item()}; guard what needs more samples.")
        bad = [name for name, p in distiller.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        hold(not bad, f"a batch of {size} gives gradients that are not finite on {', '.join(bad)}; guard the square roots.")


@point(9, "student and teacher of different shapes")
def check_pairs(subject: Subject) -> None:
    """(9) Student and teacher differ in width, depth, stages and resolution, or the pair is refused in a sentence."""
    for difference, make_pair in odd_pairs(subject.data).items():
        other = subject.on(make_pair)
        try:
            distiller = _build_odd(other)
            loss = other.step(distiller, other.batch()).loss
            loss.backward()  # type: ignore[no-untyped-call]
        except UnsupportedPairError as error:
            hold(len(str(error).split()) > 3, f"{difference} is refused without a reason ({str(error)!r}); write the sentence.")
            continue
        except Exception as error:
            raise ContractError(
                f"{difference} stopped it with {type(error).__name__}: {error} Take sizes from the measured shapes, or refuse "
                "the pair with UnsupportedPairError."
            ) from error
        hold(torch.isfinite(loss), f"the loss is {loss.item()} for {difference}; it must be finite.")


def _build_odd(subject: Subject) -> Distiller:
    """Build on an odd pair; options of the user that ask for what it lacks, as a stage by name, are a reason to refuse it."""
    try:
        return subject.build()
    except OptionError as error:
        if not subject.options:
            raise
        raise UnsupportedPairError(str(error)) from error


@point(10, "the seed decides, not torch's generator")
def check_seed(subject: Subject) -> None:
    """(10) The same seed gives the same losses, and no draw depends on or disturbs torch's global generator."""
    pairs = [subject.pair(), subject.pair()]
    runs: list[list[Tensor]] = []
    with torch.random.fork_rng(devices=[]):
        for seed, pair in enumerate(pairs):
            torch.default_generator.manual_seed(seed)
            before = torch.get_rng_state()
            runs.append(_losses(subject, subject.build(pair=pair, seed=3)))
            hold(
                torch.equal(before, torch.get_rng_state()),
                "it draws from torch's global generator; draw from self.stream(name) with the distiller's step.",
            )
    hold(
        all(torch.equal(*losses) for losses in zip(*runs, strict=True)),
        f"the same seed gave the losses {[float(loss) for loss in runs[0]]} and then {[float(loss) for loss in runs[1]]}; draw "
        "from self.stream(name) with the distiller's step, never from a generator.",
    )


def _losses(subject: Subject, distiller: Distiller) -> list[Tensor]:
    losses = []
    for number in range(3):
        losses.append(subject.feed(distiller, subject.batch(number)).loss.detach())
        distiller.after_step()
    return losses


@point(12, "a misspelt option is an error")
def check_misspelt_options(subject: Subject) -> None:
    """(12) A misspelt option, and a misspelt weight, is an error that names the right one."""
    methods = resolve_distiller(subject.method)
    for member, method in methods.items():
        for option in option_defaults(method) or ("",):
            misspelt = _misspell(option)
            options: dict[str, Any] = {misspelt: 1} if len(methods) == 1 else {member: {misspelt: 1}}
            _must_refuse(partial(subject.build, **options), "option", misspelt, option)
    for term in subject.build().weights:
        _must_refuse(partial(subject.build, weights={_misspell(term): 1.0}), "weight", _misspell(term), term)


def _misspell(name: str) -> str:
    return f"{name}e" if name else "no_such_option"


def _must_refuse(build: Callable[[], object], kind: str, misspelt: str, right: str) -> None:
    try:
        build()
    except DistillZooError as error:
        named = repr(right) in str(error) or not right
        hold(named, f"the error for the {kind} {misspelt!r} does not name {right!r}: {error}")
        return
    except TypeError as error:
        raise ContractError(
            f"the {kind} {misspelt!r} is refused by Python ({error}), not in a sentence; raise OptionError."
        ) from error
    raise ContractError(f"the {kind} {misspelt!r} is swallowed; take options by name, never as **kwargs.")


@point(13, "torch.compile accepts forward")
def check_compile(subject: Subject) -> None:
    """(13) ``torch.compile(fullgraph=True, backend="eager")`` accepts ``forward`` and gives the same loss.

    What is refused here is what a CUDA graph cannot capture: host syncs, ``.item()``, branches on data, generator objects.
    """
    batch = subject.batch()
    for given in (False, True):
        losses = {compiled: _compiled_loss(subject, batch, compiled, given) for compiled in (False, True)}
        hold(
            torch.allclose(losses[False], losses[True], rtol=1e-5, atol=1e-7),
            f"the compiled loss is {float(losses[True])} and the eager one {float(losses[False])}; "
            "keep state that Python changes out of forward.",
        )


def _compiled_loss(subject: Subject, batch: Batch, compiled: bool, given_trace: bool) -> Tensor:
    distiller = subject.build()
    distiller.set_progress(Progress(0, 1, 0, 2))
    trace = subject.trace(distiller, batch) if given_trace else None
    with forked_generator(Stream.named(0, "testing", "dropout")):
        if not compiled:
            return subject.feed(distiller, batch, trace).loss.detach()
        torch.compiler.reset()
        try:
            module = torch.compile(distiller, fullgraph=True, backend="eager")
            return subject.feed(module, batch, trace, like=distiller).loss.detach()
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ContractError(
                f"torch.compile stops with {type(error).__name__}: {reason} Take host syncs and data-dependent branches out."
            ) from error
        finally:
            torch.compiler.reset()
