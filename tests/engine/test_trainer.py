import io
import math

import pytest
import torch
from torch import nn

from distillzoo import Distiller, build_distiller
from distillzoo.engine import EpochReport, Observer, TrainConfig, Trainer, evaluate
from distillzoo.errors import OptionError, RecordError
from distillzoo.taps import Teacher
from distillzoo.types import Phase, Requires
from tests.engine.networks import SmallLoader, SmallNet

CONFIG = TrainConfig(epochs=3, batch_size=8, lr=0.05, schedule="onecycle")


class Counting(Distiller):
    """Counts what the loop does to it."""

    requires = Requires(student_taps=("last",), teacher_taps=("last",))
    weight_presets = {"default": {"ce": 1.0, "scale": 0.1}}

    def __init__(self, student, teacher, data, *, poison_at=None, raise_at=None, weights=None, seed=None):
        super().__init__(student, teacher, data, weights=weights, seed=seed)
        self.adapter = nn.Conv2d(student.shapes["stage2"][0], teacher.shapes["stage2"][0], 1)
        self.calls = []
        self.poison_at = poison_at
        self.raise_at = raise_at

    def distill_terms(self, student, teacher, batch):
        step = int(self.step)
        self.calls.append(("forward", step, len(batch.images)))
        if self.raise_at == step:
            raise RuntimeError("no such luck")
        loss = (self.adapter(student.features["stage2"]) - teacher.features["stage2"]).square().mean()
        return {"scale": loss * (math.nan if self.poison_at == step else 1.0)}

    def prepare(self, loader):
        self.calls.append(("prepare", len(loader), 0))

    def after_step(self):
        self.calls.append(("after", int(self.step), 0))


class TwoPhase(Counting):
    """Trains its adapter first."""

    def phases(self):
        return (Phase("adapter", 2, ("adapter.*",), ("scale",)), Phase())


class SecondView(Distiller):
    """Matches the two views."""

    requires = Requires(second_view=True, index=True, student_taps=("pooled",))
    weight_presets = {"default": {"ce": 1.0, "views": 1.0}}

    def distill_terms(self, student, teacher, batch):
        assert teacher.second is not None
        assert batch.index is not None
        return {"views": (student.features["pooled"] - student.second.features["pooled"]).square().mean()}


class Curious(Distiller):
    """Asks for nothing and takes whatever it is handed."""

    requires = Requires(teacher=False)
    weight_presets = {"default": {"ce": 1.0, "found": 1.0}}

    def distill_terms(self, student, teacher, batch):
        found = (teacher is not None) + (batch.second_view is not None) + (student.second is not None)
        return {"found": student.logits.mean() * float(found)}


def make(methods, config=CONFIG, *, seed=0, observer=None, dropout=0.0, samples=30):
    train, evaluation = SmallLoader(samples, config.batch_size, seed=seed), SmallLoader(12, 6, shuffle=False)
    torch.manual_seed(7)
    teacher_net = SmallNet(6)
    student = SmallNet(3, dropout=dropout)
    teacher = Teacher(teacher_net, train.spec)
    members = {}
    for name, (method, options) in methods.items():
        copy = SmallNet(3, dropout=dropout)
        copy.load_state_dict(student.state_dict())
        members[name] = build_distiller(method, copy, teacher, data=train.spec, seed=seed, **options)
    return Trainer(members, teacher, train, evaluation, config, seed=seed, observer=observer)


METHODS = {
    "vanilla": ("vanilla", {}),
    "kd": ("kd", {}),
    "counting": (Counting, {}),
    "view": (SecondView, {}),
    "curious": (Curious, {}),
}


def weights_of(trainer, name):
    return {key: value.clone() for key, value in trainer.members[name].distiller.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_loop_calls_what_the_contract_promises():
    trainer = make({"counting": (Counting, {})})
    results = trainer.run()
    calls = trainer.members["counting"].distiller.calls
    assert calls[0] == ("prepare", 4, 0)
    forwards = [call for call in calls if call[0] == "forward"]
    assert [step for _, step, _ in forwards] == list(range(12))
    assert [size for _, _, size in forwards[:4]] == [8, 8, 8, 6]  # the incomplete last batch is kept
    assert [call[1] for call in calls if call[0] == "after"] == list(range(1, 13))
    assert results["counting"].status == "done"
    assert results["counting"].epochs == 3
    assert [report.epoch for report in results["counting"].history] == [0, 1, 2]


def test_trajectories_do_not_depend_on_the_company_or_its_order():
    together = make(METHODS, dropout=0.3)
    together.run()
    backwards = make(dict(reversed(METHODS.items())), dropout=0.3)
    backwards.run()
    for name, method in METHODS.items():
        alone = make({name: method}, dropout=0.3)
        alone.run()
        assert same(weights_of(alone, name), weights_of(together, name)), name
        assert same(weights_of(alone, name), weights_of(backwards, name)), name


def test_one_teacher_pass_serves_the_group():
    trainer = make(METHODS)
    passes = []
    trainer.teacher.module.register_forward_hook(lambda *_: passes.append(1))
    trainer.run()
    steps = 3 * 4
    assert len(passes) == 2 * steps  # the second view is one more pass, for the member that asks for it
    passes.clear()
    make({"vanilla": ("vanilla", {})}).run()
    assert not passes


def test_training_learns_and_evaluates_each_epoch():
    reports: list[EpochReport] = []

    class Watch(Observer):
        def on_epoch(self, report):
            reports.append(report)

    trainer = make({"kd": ("kd", {"weights": {"ce": 1.0}})}, TrainConfig(epochs=12, batch_size=8, lr=0.1), observer=Watch())
    result = trainer.run()["kd"]
    assert reports[-1].terms["ce"] < 0.7 * reports[0].terms["ce"]
    assert result.last_accuracy == reports[-1].accuracy
    assert result.best_accuracy == max(report.accuracy for report in reports)
    assert reports[result.best_epoch].accuracy == result.best_accuracy
    member = trainer.members["kd"]
    assert evaluate(member.export_student(), trainer.evaluation, CONFIG, torch.device("cpu"))[0] == result.last_accuracy


class Killed(Exception):
    pass


class KillAfter(Observer):
    def __init__(self, epoch, states):
        self.epoch = epoch
        self.states = states
        self.trainer = None

    def on_epoch(self, report):
        buffer = io.BytesIO()
        torch.save(self.trainer.state(report.member), buffer)
        buffer.seek(0)
        self.states[report.member] = torch.load(buffer, weights_only=True)

    def on_step(self, report):
        if report.epoch > self.epoch and report.step == 2:
            raise Killed


def states_of_a_killed_run(methods, config, epoch=0, **options):
    """Return the states that members had when the epoch after this one was cut off."""
    states = {}
    watch = KillAfter(epoch, states)
    watch.trainer = make(methods, config, observer=watch, **options)
    with pytest.raises(Killed):
        watch.trainer.run()
    return states


@pytest.mark.parametrize("schedule", ["step", "cosine", "onecycle"])
@pytest.mark.parametrize("extra", [{}, {"ema_decay": 0.9, "clip_norm": 1.0, "nesterov": True, "decay_norm_bias": False}])
def test_resume_equals_an_unbroken_run_bit_for_bit(schedule, extra):
    config = TrainConfig(epochs=3, batch_size=8, schedule=schedule, milestones=(1, 2), **extra)
    unbroken = make(METHODS, config, dropout=0.2)
    expected = unbroken.run()
    states = states_of_a_killed_run(METHODS, config, dropout=0.2)
    resumed = make(METHODS, config, dropout=0.2)
    for name, state in states.items():
        resumed.restore(name, state)
    results = resumed.run()
    for name in METHODS:
        assert same(weights_of(unbroken, name), weights_of(resumed, name)), name
        assert results[name].last_accuracy == expected[name].last_accuracy
        assert [r.loss for r in results[name].history] == [r.loss for r in expected[name].history]
    assert [epoch for _, epoch in resumed.train.epochs_served] == [1, 2]


def test_members_at_different_epochs_join_at_their_own():
    config = TrainConfig(epochs=4, batch_size=8)
    states = states_of_a_killed_run(METHODS, config, epoch=1)
    resumed = make(METHODS, config)
    resumed.restore("kd", states["kd"])  # the others' files are lost
    resumed.run()
    unbroken = make(METHODS, config)
    unbroken.run()
    for name in METHODS:
        assert same(weights_of(unbroken, name), weights_of(resumed, name)), name


def test_first_phases_have_their_own_views_terms_and_parameters():
    config = TrainConfig(epochs=2, batch_size=8)
    trainer = make({"two": (TwoPhase, {}), "kd": ("kd", {})}, config)
    start = weights_of(trainer, "two")
    member = trainer.members["two"]
    trainer._train_phase([member])
    after_first = weights_of(trainer, "two")
    moved = {key for key in start if not torch.equal(start[key], after_first[key])}
    assert {key for key in moved if not key.startswith("student.bn") and key != "step"} == {"adapter.weight", "adapter.bias"}
    assert member.history[-1].accuracy is None
    trainer = make({"two": (TwoPhase, {}), "kd": ("kd", {})}, config)
    results = trainer.run()
    assert trainer.train.epochs_served == [("adapter", 0), ("adapter", 1), ("main", 0), ("main", 1)]
    assert [report.phase for report in results["two"].history] == ["adapter", "adapter", "main", "main"]
    assert results["two"].epochs == 2


def test_two_phases_resume_bit_for_bit():
    config = TrainConfig(epochs=2, batch_size=8)
    unbroken = make({"two": (TwoPhase, {})}, config)
    unbroken.run()
    states = states_of_a_killed_run({"two": (TwoPhase, {})}, config)
    resumed = make({"two": (TwoPhase, {})}, config)
    resumed.restore("two", states["two"])
    resumed.run()
    assert same(weights_of(unbroken, "two"), weights_of(resumed, "two"))


def test_a_member_that_diverges_or_fails_is_marked_and_the_others_go_on():
    methods = {"good": ("kd", {}), "nan": (Counting, {"poison_at": 2}), "bad": (Counting, {"raise_at": 5})}
    trainer = make(methods)
    results = trainer.run()
    assert results["nan"].status == "diverged"
    assert "scale" in results["nan"].message
    assert results["nan"].last_accuracy is None
    assert results["bad"].status == "failed"
    assert "no such luck" in results["bad"].message
    assert results["good"].status == "done"
    alone = make({"good": ("kd", {})})
    alone.run()
    assert same(weights_of(alone, "good"), weights_of(trainer, "good"))


class FailsToPredict(Counting):
    """Predicts what a test asks for once a number of epochs is over."""

    def predict(self, images):
        if int(self.step) > 4:
            raise RuntimeError("no prediction")
        return super().predict(images)


class Shapeless(Counting):
    def predict(self, images):
        return super().predict(images)[:-1]


@pytest.mark.parametrize(("method", "epochs", "words"), [(FailsToPredict, 1, "no prediction"), (Shapeless, 0, "size")])
def test_a_member_whose_prediction_fails_is_marked_and_the_others_go_on(method, epochs, words):
    trainer = make({"bad": (method, {}), "good": ("kd", {})})
    results = trainer.run()
    assert results["bad"].status == "failed"
    assert words in results["bad"].message
    assert results["bad"].epochs == epochs
    assert results["bad"].last_accuracy is None
    assert (results["good"].status, results["good"].epochs) == ("done", 3)
    alone = make({"good": ("kd", {})})
    assert alone.run()["good"].last_accuracy == results["good"].last_accuracy
    assert same(weights_of(alone, "good"), weights_of(trainer, "good"))


def test_a_group_of_which_no_member_predicts_ends():
    assert make({"bad": (Shapeless, {})}).run()["bad"].status == "failed"


class Freezes(TwoPhase):
    """Has nothing left to train when its first phase is over."""

    def phases(self):
        return (Phase("adapter", 1, ("adapter.*",), ("scale",)), Phase(trainable=("student.*",)))

    def after_step(self):
        self.student.requires_grad_(False)


def test_a_member_that_cannot_begin_its_next_phase_is_marked_and_the_others_go_on():
    results = make({"bad": (Freezes, {}), "good": ("kd", {})}, TrainConfig(epochs=1, batch_size=8)).run()
    assert results["bad"].status == "failed"
    assert "The phase 'main' of Freezes trains nothing" in results["bad"].message
    assert results["good"].status == "done"


class Misspelt(TwoPhase):
    def phases(self):
        return (Phase("first", 1, ("adapter.*",)), Phase("second", 1, ("adaptor.*",)), Phase())


class Long(TwoPhase):
    def phases(self):
        return (Phase(epochs=3),)


@pytest.mark.parametrize(
    ("method", "words"),
    [(Misspelt, r"'second' of Misspelt trains nothing.*'adaptor\.\*'"), (Long, "The main phase takes its length")],
)
def test_phases_that_cannot_be_are_refused_before_the_first_epoch(method, words):
    with pytest.raises(OptionError, match=words):
        make({"bad": (method, {}), "good": ("kd", {})})


def test_evaluation_puts_every_part_back_into_its_own_mode():
    trainer = make({"kd": ("kd", {})})
    network = SmallNet(3).train()
    network.bn1.eval()  # as norms that a user froze
    before = [(name, part.training) for name, part in network.named_modules()]
    evaluate(network, trainer.evaluation, CONFIG, torch.device("cpu"))
    assert [(name, part.training) for name, part in network.named_modules()] == before


def test_teacher_is_untouched():
    trainer = make(METHODS)
    before = {key: value.clone() for key, value in trainer.teacher.module.state_dict().items()}
    trainer.run()
    assert same(before, trainer.teacher.module.state_dict())
    assert not trainer.teacher.module.training
    assert all(parameter.grad is None for parameter in trainer.teacher.module.parameters())


def test_step_schedule_drops_at_the_start_of_its_epochs():
    config = TrainConfig(epochs=4, batch_size=8, lr=0.1, schedule="step", milestones=(1, 3), gamma=0.5)
    history = make({"vanilla": ("vanilla", {})}, config).run()["vanilla"].history
    assert [report.lr for report in history] == pytest.approx([0.1, 0.05, 0.05, 0.025])


def test_precision_and_layout_switches_run():
    config = TrainConfig(epochs=1, batch_size=8, precision="bf16", channels_last=True)
    trainer = make(METHODS, config)
    results = trainer.run()
    assert all(result.status == "done" for result in results.values())
    student = trainer.members["kd"].distiller.student
    assert student.conv1.weight.dtype == torch.float32
    assert student.conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_weight_decay_spares_norms_and_biases_where_the_recipe_says_so():
    config = TrainConfig(epochs=1, batch_size=8, decay_norm_bias=False)
    groups = make({"kd": ("kd", {})}, config).members["kd"].optimizer.param_groups
    assert {(p.ndim <= 1, group["weight_decay"]) for group in groups for p in group["params"]} == {(True, 0.0), (False, 5e-4)}
    everything = make({"kd": ("kd", {})}).members["kd"].optimizer.param_groups
    assert {group["weight_decay"] for group in everything} == {5e-4}


def test_averaged_weights_are_evaluated_and_exported():
    config = TrainConfig(epochs=2, batch_size=8, ema_decay=0.99)
    trainer = make({"kd": ("kd", {})}, config)
    result = trainer.run()["kd"]
    member = trainer.members["kd"]
    exported = member.export_student()
    assert not torch.equal(exported.fc.weight, member.distiller.student.fc.weight)
    assert evaluate(exported, trainer.evaluation, config, torch.device("cpu"))[0] == result.last_accuracy


class Promising(SmallLoader):
    """Says that it has batches, and has none."""

    def epoch(self, *_, **__):
        return iter(())


@pytest.mark.parametrize("split", ["training", "evaluation"])
def test_a_loader_without_images_is_refused(split):
    good = make({"vanilla": ("vanilla", {})})
    members = {"vanilla": good.members["vanilla"].distiller}
    full = SmallLoader()
    for empty, sentence in ((range(0), "an epoch has no batch"), (Promising(), "an epoch had no batch")):
        loaders = {"training": full, "evaluation": full} | {split: empty}
        with pytest.raises(OptionError, match=f"The {split} loader is empty: {sentence}"):
            Trainer(members, good.teacher, loaders["training"], loaders["evaluation"], CONFIG, seed=0).run()


def test_wrong_groups_and_states_are_refused():
    with pytest.raises(OptionError, match="at least one member"):
        make({})
    trainer = make({"kd": ("kd", {})})
    with pytest.raises(OptionError, match="not built on the group's teacher"):
        Trainer({"kd": trainer.members["kd"].distiller}, None, trainer.train, trainer.evaluation, CONFIG, seed=0)
    with pytest.raises(RecordError, match="does not fit"):
        trainer.restore("kd", {"version": 1})
    other = make({"kd": (Counting, {})}).state("kd")
    with pytest.raises(RecordError, match="another method"):
        trainer.restore("kd", other)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": "3"},
        {"epochs": 2.5},
        {"epochs": None},
        {"batch_size": True},
        {"lr": "0.1"},
        {"ema_decay": "0.9"},
        {"nesterov": "no"},
        {"milestones": (1.5, 3)},
        {"milestones": ("1", "2")},
        {"milestones": 3},
        {"milestones": "12"},
        {"lr": 0.0},
        {"lr": math.nan},
        {"momentum": 1.0},
        {"nesterov": True, "momentum": 0.0},
        {"schedule": "linear"},
        {"milestones": (3, 2)},
        {"ema_decay": 1.0},
        {"clip_norm": 0.0},
        {"precision": "fp8"},
    ],
)
def test_a_wrong_configuration_is_refused(wrong):
    with pytest.raises(OptionError, match=next(iter(wrong))):
        TrainConfig(**wrong)
