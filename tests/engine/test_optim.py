"""What an optimiser step does, against formulae and hand-made steps: averages, clipping, momentum, learning rates, precision."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

from distillzoo import build_distiller
from distillzoo.engine import Observer, TrainConfig
from distillzoo.engine import optim as optim_module
from distillzoo.engine.optim import check_trains, make_averaged, make_optimizer, make_scheduler
from distillzoo.errors import OptionError
from distillzoo.schedules import Cosine
from distillzoo.testing import tiny_data, tiny_pair
from distillzoo.types import Phase
from tests.engine.networks import SmallNet
from tests.engine.test_trainer import Counting, TwoPhase, make, same, weights_of


class Recording(Counting):
    """Keeps weights, running means and gradients as they stand after every optimiser step."""

    def after_step(self):
        self.__dict__.setdefault("kept", []).append(
            {
                "weights": {name: p.detach().clone() for name, p in self.named_parameters()},
                "buffers": {name: b.clone() for name, b in self.named_buffers()},
                "grads": {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None},
            }
        )


def run(config, method=Recording, *, samples=16, **options):
    trainer = make({"it": (method, options)}, config, samples=samples)
    start = weights_of(trainer, "it")
    assert trainer.run()["it"].status == "done"
    return trainer.members["it"], start


# ---------------------------------------------------------------------------------------------------------------- averages


def test_averaged_weights_follow_the_decay():
    member, _ = run(TrainConfig(epochs=1, batch_size=8, ema_decay=0.7))
    first, second = member.distiller.kept  # the average begins with the weights after the first step
    averaged = member.averaged.module
    for kind, tensors in (("weights", averaged.named_parameters()), ("buffers", averaged.named_buffers())):
        for name, value in tensors:
            if value.is_floating_point():
                torch.testing.assert_close(value.detach(), 0.7 * first[kind][name] + 0.3 * second[kind][name], msg=name)
    assert not torch.equal(first["weights"]["student.fc.weight"], second["weights"]["student.fc.weight"])


class Looks(SmallNet):
    """Reads its channels through a table of indices, and some through a mask."""

    def __init__(self):
        super().__init__(4, classes=5)
        self.register_buffer("table", torch.tensor([7, 3, 6, 2, 5, 1, 4, 0]))
        self.register_buffer("mask", torch.tensor([True, False] * 4))

    def forward(self, images):
        maps = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(images))))))
        return self.fc(maps.mean((2, 3))[:, self.table] * self.mask)


def test_tables_of_indices_are_copied_into_the_average():
    torch.manual_seed(0)
    distiller = build_distiller("vanilla", Looks(), data=tiny_data())
    averaged = make_averaged(distiller, TrainConfig(ema_decay=0.9999))
    distiller.eval()
    for step in range(3):
        distiller.step.fill_(step)
        averaged.update_parameters(distiller)  # the weights stay, so the average is the network itself
    student = averaged.module.student
    assert torch.equal(student.table, distiller.student.table)
    assert torch.equal(student.mask, distiller.student.mask)
    assert averaged.module.step == 2
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(averaged.module.eval().predict(images), distiller.predict(images))


# ---------------------------------------------------------------------------------------------------------------- momentum


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_is_that_of_the_formula(nesterov):
    config = TrainConfig(epochs=1, batch_size=8, lr=0.1, momentum=0.8, nesterov=nesterov, weight_decay=0.01)
    member, start = run(config)
    weights, momentum = start, {}
    for kept in member.distiller.kept:
        for name, grad in kept["grads"].items():
            slope = grad + 0.01 * weights[name]
            momentum[name] = slope + 0.8 * momentum.get(name, 0.0)
            update = slope + 0.8 * momentum[name] if nesterov else momentum[name]
            torch.testing.assert_close(kept["weights"][name], weights[name] - 0.1 * update, msg=name)
        weights = kept["weights"]


LATE = {"fitnet.hint": Cosine(0.0, 1.0, 10)}


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_term_that_counts_later_trains_its_adapter_from_then_on(momentum):
    trainer = make({"it": ("fitnet+vid", {"weights": LATE})}, TrainConfig(epochs=3, batch_size=8, momentum=momentum))
    start = weights_of(trainer, "it")
    result = trainer.run()["it"]
    assert (result.status, result.message) == ("done", "")
    moved = {name for name, value in weights_of(trainer, "it").items() if not torch.equal(value, start[name])}
    assert any(name.startswith("members.fitnet.") for name in moved)


def test_a_late_first_gradient_after_a_resume(tmp_path):
    states = []

    class Keep(Observer):
        def on_epoch(self, report):
            torch.save(trainer.state("it"), tmp_path / f"{report.epoch}.pt")
            states.append(tmp_path / f"{report.epoch}.pt")

    config = TrainConfig(epochs=3, batch_size=8)
    trainer = make({"it": ("fitnet+vid", {"weights": LATE})}, config, observer=Keep())
    assert trainer.run()["it"].status == "done"
    resumed = make({"it": ("fitnet+vid", {"weights": LATE})}, config)
    resumed.restore("it", torch.load(states[0], weights_only=True))  # fitnet's adapter has no momentum yet
    assert resumed.run()["it"].status == "done"
    assert same(weights_of(trainer, "it"), weights_of(resumed, "it"))


def test_a_first_step_that_comes_late_is_a_first_step():
    both, alone = ([nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2)] for _ in range(2))
    distiller = build_distiller("vanilla", *tiny_pair()[:1], data=tiny_data())
    optimizer = make_optimizer(distiller, TrainConfig(), Phase())
    optimizer.param_groups[0]["params"][:] = both
    plain = SGD([alone[1]], lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True)
    both[0].grad = torch.ones(7)
    optimizer.step()
    for number in range(3):
        both[0].grad, both[1].grad = torch.ones(7), torch.full((7,), number - 0.5)
        alone[1].grad = both[1].grad.clone()
        optimizer.step()
        plain.step()
        assert torch.equal(both[1], alone[1])


@pytest.mark.parametrize("extra", [{}, {"nesterov": True, "clip_norm": 0.5}])
def test_steps_where_all_have_gradients_are_torchs_own(monkeypatch, extra):
    config = TrainConfig(epochs=2, batch_size=8, **extra)
    ours, _ = run(config, samples=30)
    with monkeypatch.context() as patched:
        patched.setattr(optim_module, "_fill_momentum", lambda *_: None)
        patched.setattr(
            "distillzoo.engine.member.gradient_norm_clipped",
            lambda distiller, _, limit: nn.utils.clip_grad_norm_(distiller.parameters(), limit),
        )
        torchs, _ = run(config, samples=30)
    states = [member.optimizer.state_dict()["state"] for member in (ours, torchs)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key]["momentum_buffer"], states[1][key]["momentum_buffer"]) for key in states[0])
    assert same(ours.distiller.state_dict(), torchs.distiller.state_dict())


# ---------------------------------------------------------------------------------------------------------------- clipping


def norm(grads):
    return torch.linalg.vector_norm(torch.stack([grad.norm() for grad in grads]))


@pytest.mark.parametrize("limit", [0.01, 1e6])
def test_the_norm_of_all_gradients_is_clipped(limit):
    clipped, _ = run(TrainConfig(epochs=1, batch_size=8, clip_norm=limit))
    free, _ = run(TrainConfig(epochs=1, batch_size=8))
    before, after = (norm(member.distiller.kept[0]["grads"].values()) for member in (free, clipped))
    assert before > 0.02
    assert after == pytest.approx(min(limit, float(before)), rel=1e-3)


class Adapts(Recording):
    """Trains its adapter alone first; the student has gradients then as well."""

    phases = TwoPhase.phases


def test_gradients_of_what_does_not_train_do_not_count():
    member, _ = run(TrainConfig(epochs=1, batch_size=8, clip_norm=0.001))
    adapter = {name for name in member.distiller.kept[0]["grads"] if name.startswith("adapter.")}
    member, _ = run(TrainConfig(epochs=1, batch_size=8, clip_norm=0.001), Adapts)
    first = member.distiller.kept[0]["grads"]
    assert float(norm([first[name] for name in adapter])) == pytest.approx(0.001, rel=1e-3)
    assert norm([grad for name, grad in first.items() if name not in adapter]) > 0.001  # as they were


# ---------------------------------------------------------------------------------------------------------- learning rates


def rates(config, samples):
    found = []

    class Watch(Observer):
        def on_step(self, report):
            found.append(trainer.members["it"].lr)

    trainer = make({"it": ("vanilla", {})}, config, samples=samples, observer=Watch())
    trainer.run()
    return found


def cosine(start, end, share):
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))


def test_the_cosine_falls_to_zero_over_the_run():
    found = rates(TrainConfig(epochs=3, batch_size=8, lr=0.2, schedule="cosine"), samples=32)
    assert found == pytest.approx([cosine(0.2, 0.0, step / 12) for step in range(12)])


@pytest.mark.parametrize("warmup", [0.25, 0.5])
def test_one_cycle_rises_to_the_rate_and_falls_to_almost_nothing(warmup):
    found = rates(TrainConfig(epochs=3, batch_size=8, lr=0.2, schedule="onecycle", warmup_fraction=warmup), samples=32)
    low, lowest, top, last = 0.2 / 25, 0.2 / 25 / 1e4, warmup * 12 - 1, 11
    rise = [cosine(low, 0.2, step / top) for step in range(int(top) + 1)]
    fall = [cosine(0.2, lowest, (step - top) / (last - top)) for step in range(int(top) + 1, 12)]
    assert found == pytest.approx(rise + fall)
    assert max(found) == pytest.approx(0.2)


@pytest.mark.parametrize("total", [2, 3, 10, 49])
def test_one_cycle_whose_rise_is_one_step_begins_at_the_top(total):
    distiller = build_distiller("vanilla", *tiny_pair()[:1], data=tiny_data())
    config = TrainConfig(lr=0.2, schedule="onecycle", warmup_fraction=1 / total)
    optimizer = make_optimizer(distiller, config, Phase())
    scheduler = make_scheduler(optimizer, config, epochs=1, steps_per_epoch=total)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx([cosine(0.2, 0.2 / 25e4, step / (total - 1)) for step in range(total)])


# --------------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_precision_is_that_of_the_networks_passes(precision):
    seen = set()

    def spy(role):
        return lambda module, _, out: seen.add((role, module.training, out.dtype))

    trainer = make({"it": (Counting, {})}, TrainConfig(epochs=1, batch_size=8, precision=precision))
    trainer.members["it"].distiller.student.fc.register_forward_hook(spy("student"))
    trainer.teacher.module.fc.register_forward_hook(spy("teacher"))
    trainer.run()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert seen == {("student", True, dtype), ("student", False, dtype), ("teacher", False, dtype)}


# ------------------------------------------------------------------------------------------------------------------ phases


def test_a_phase_that_trains_nothing_is_a_sentence():
    distiller = build_distiller("vanilla", *tiny_pair()[:1], data=tiny_data())
    check_trains(distiller, Phase("first", 1, ("student.*",)))
    with pytest.raises(OptionError, match=r"The phase 'first' of Vanilla trains nothing: no parameter matches \('adapters\.\*',\)"):
        check_trains(distiller, Phase("first", 1, ("adapters.*",)))
