import math

import numpy as np
import pytest
import torch
from torch import distributed, nn

from distillzoo import build_distiller, create_model
from distillzoo.adapters import denoiser
from distillzoo.errors import OptionError, ShapeError, UnsupportedPairError
from distillzoo.functional import diffusion_loss
from distillzoo.schedules import LinearWarmup
from distillzoo.testing import check_distiller
from distillzoo.types import Progress
from tests.methods import oracles
from tests.methods.oracles import TinyNet, sine

CLEAN, NOISE = sine(3, 4, 2, 2, alpha=0.7), sine(3, 4, 2, 2, alpha=1.7, delta=0.2)
TIMES = torch.tensor([0, 400, 999])


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts its networks from the same weights, whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def shrinking(noisy, times):
    return noisy * (0.5 + times.view(-1, 1, 1, 1).to(noisy.dtype) / 1000)


def test_diffusion_loss_written_out():
    total = 0.0
    for h, e, t in zip(CLEAN.numpy(), NOISE.numpy(), TIMES.tolist(), strict=True):
        level = np.prod([1 - (1e-4 + (0.02 - 1e-4) * s / 999) for s in range(t + 1)])
        predicted = (np.sqrt(level) * h + np.sqrt(1 - level) * e) * (0.5 + t / 1000)
        total += ((predicted - e) ** 2).sum()
    expected = total / CLEAN.numel()
    assert diffusion_loss(CLEAN, NOISE, TIMES, shrinking).item() == pytest.approx(expected, rel=1e-9)
    other = diffusion_loss(CLEAN, NOISE, TIMES.clamp(max=49), shrinking, denoiser.alpha_bars(50))
    assert other.item() != pytest.approx(expected, rel=1e-3)


def test_diffusion_loss_is_zero_for_who_knows_the_noise_and_trains_the_predictor_alone():
    assert diffusion_loss(CLEAN, NOISE, TIMES, lambda noisy, times: NOISE).item() == 0.0
    clean, noise = CLEAN.clone().requires_grad_(), NOISE.clone().requires_grad_()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    diffusion_loss(clean, noise, TIMES, lambda noisy, times: scale * noisy).backward()
    assert clean.grad is None
    assert noise.grad is None
    assert scale.grad != 0
    assert diffusion_loss(CLEAN.bfloat16(), NOISE.bfloat16(), TIMES, shrinking).dtype == torch.float32
    oracles.check_compiles(lambda h, e, t: diffusion_loss(h, e, t, shrinking) + h.mean(), CLEAN, NOISE, TIMES)
    for clean, times in ((CLEAN[:2], TIMES), (CLEAN, TIMES[:2])):
        with pytest.raises(ShapeError, match="diffusion_loss"):
            diffusion_loss(clean, NOISE, times, shrinking)


# ---------------------------------------------------------------------------------------------------- the distiller


def learners(distiller, term):
    """The parts of a distiller that a term has a gradient for."""
    value = distiller(*oracles.tiny_batch()).terms[term]
    named = [(name, p) for name, p in distiller.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
    found = {name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is not None and gradient.any()}
    return {".".join(name.split(".")[: {"places": 3, "target": 2}.get(name.split(".")[0], 1)]) for name in found}


def test_who_learns_from_which_term():
    parts = ("projection", "predictor", "adapter", "output")
    assert learners(oracles.tiny_pair("diffkd"), "feature") == {"student", *(f"places.map.{part}" for part in parts)}
    assert learners(oracles.tiny_pair("diffkd"), "logits") == {"student", *(f"places.logits.{part}" for part in parts)}
    assert learners(oracles.tiny_pair("diffkd"), "autoencoder") == {"target.encoder", "target.decoder"}
    assert learners(oracles.tiny_pair("diffkd"), "diffusion") == {"places.map.predictor", "places.logits.predictor"}


@pytest.mark.parametrize("target", ["autoencoder", "normalized", "raw"])
@pytest.mark.parametrize("matching", [True, False])
def test_terms_written_out(target, matching):
    """From the pieces, in the order of the paper; the teacher's map is the larger and is pooled."""
    student, teacher = TinyNet(3), TinyNet(4)
    student.blocks[0][0].stride = (2, 2)
    options = {"target": target, "noise_matching": matching, "temperature": 2.0}
    distiller = oracles.tiny_pair("diffkd", student=student, teacher=teacher, **options)
    images, targets = oracles.tiny_batch()
    with torch.no_grad():
        own, other = distiller.student_net(images), distiller.teacher_net(images)
        source, wanted = own.features["stage3"], other.features["stage3"]
        wanted = wanted.reshape(*wanted.shape[:2], 2, 2, 2, 2).mean((3, 5))
        expected = {}
        if target == "autoencoder":
            latent, restored = distiller.target(wanted)
            expected["autoencoder"] = (restored - wanted).square().mean()
        elif target == "normalized":
            latent = (wanted - wanted.mean((0, 2, 3), keepdim=True)) / (
                wanted.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5
            ).sqrt()
        else:
            latent = wanted
        diffusion = 0.0
        logits = other.logits[:, :, None, None]
        for name, source, latent in (("map", source, latent), ("logits", own.logits[:, :, None, None], logits)):  # noqa: B020
            place = distiller.places[name]
            draws = {
                draw: distiller.stream(f"{name}.{draw}").normal(0, torch.arange(latent.numel())).view(latent.shape)
                for draw in ("matching", "noise")
            }
            times = distiller.stream(f"{name}.time").integers(0, torch.arange(len(latent)), 1000)
            x = place.projection(source)
            if matching:
                share = place.adapter(x)[:, None, None, None]
                x = share * x + (1 - share) * draws["matching"]
            levels = denoiser.alpha_bars()
            for t in (400, 300, 200, 100, 0):
                noise = place.predictor(x, torch.full((len(x),), t))
                a, b = levels[t].item(), levels[t - 100].item() if t else 1.0
                x = math.sqrt(b) * (x - math.sqrt(1 - a) * noise) / math.sqrt(a) + math.sqrt(1 - b) * noise
            x = place.output(x)
            if name == "map":
                expected["feature"] = (x - latent).square().mean()
            else:
                expected["logits"] = 4 * nn.KLDivLoss(reduction="batchmean")(
                    (x.flatten(1) / 2).log_softmax(1), (latent.flatten(1) / 2).softmax(1)
                )
            diffusion = diffusion + diffusion_loss(latent, draws["noise"], times, place.predictor)
        expected["diffusion"] = diffusion
    terms = dict(distiller(images, targets).terms)
    del terms["ce"]
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].detach(), value, rtol=1e-4, atol=1e-5)


def test_a_map_is_denoised_from_its_neighbourhood_and_logits_each_for_themselves():
    kernels: dict[str, set[tuple[int, ...]]] = {}
    for name, place in oracles.tiny_pair("diffkd").places.items():
        kernels[name] = {layer.kernel_size for layer in place.modules() if isinstance(layer, torch.nn.Conv2d)}
    assert kernels == {"map": {(1, 1), (3, 3)}, "logits": {(1, 1)}}


def test_the_working_width_is_bounded_on_small_images():
    pair = {"student": TinyNet(4, stages=1), "teacher": TinyNet(300, stages=1)}

    def width(size, **options):
        return build_distiller("diffkd", **pair, input_size=size, seed=0, **options).places["map"].projection.out_channels

    assert width(32) == 256
    assert width(64) == 256
    assert width(65) == 300
    pair["teacher"] = TinyNet(1100, stages=1)
    assert width(72) == 1024
    pair["teacher"] = TinyNet(300, stages=1)
    assert width(32, latent_channels=7) == 7
    assert width(32, latent_channels=1) == 1
    assert width(32, target="raw") == 300
    pair["teacher"] = TinyNet(40, stages=1)
    assert width(32) == 40


@pytest.mark.parametrize(
    ("name", "path", "last_stage", "channels"),
    [("wrn_16_1", "relu", (64, 8, 8), 64), ("mobilenetv2", "relu2", (160, 2, 2), 1280)],
)
def test_the_authors_places_are_chosen_by_hand(name, path, last_stage, channels):
    def build(**taps):
        networks = [create_model(name, num_classes=5) for _ in range(2)]
        return build_distiller("diffkd", *networks, input_size=32, seed=0, places="map", latent_channels=8, **taps)

    own, other = build().map_taps
    assert build().teacher_net.shapes[other] == last_stage
    distiller = build(taps={"student": [path], "teacher": [path]})
    own, other = distiller.map_taps
    assert distiller.student_net.shapes[own] == distiller.teacher_net.shapes[other] == (channels, *last_stage[1:])
    images = torch.randn(2, 3, 32, 32)
    assert torch.isfinite(distiller(images, torch.tensor([0, 1])).loss)
    assert (distiller.teacher_net(images).features[other] >= 0).all()


def test_terms_follow_from_the_options():
    def terms(**options):
        distiller = oracles.tiny_pair("diffkd", **options)
        oracles.check_two_steps(distiller)
        return [name for name in distiller.weights if name != "ce"]

    assert terms() == ["feature", "autoencoder", "logits", "diffusion"]
    assert terms(target="raw") == ["feature", "logits", "diffusion"]
    assert terms(places="map") == ["feature", "autoencoder", "diffusion"]
    assert terms(places="logits") == ["logits", "diffusion"]
    distiller = oracles.tiny_pair("diffkd")
    assert [weight.final() for weight in distiller.weights.values()] == [1.0] * 5
    assert [weight(Progress(0, 100, 0, 10)) for weight in distiller.weights.values()] == [1.0] * 5  # no warm-up by default
    slow = oracles.tiny_pair("diffkd", weights="warmup", places="logits").weights
    assert slow["logits"] == LinearWarmup(1.0, 20)
    assert slow["diffusion"].final() == slow["diffusion"](Progress(0, 1, 0, 1)) == 1.0
    assert oracles.tiny_pair("diffkd", weights={"feature": 3.0}).weights["feature"].final() == 3.0
    with pytest.raises(OptionError, match="autoencoder"):
        oracles.tiny_pair("diffkd", target="raw", weights={"autoencoder": 1.0})


def test_only_the_autoencoder_adds_parameters_to_the_target():
    trained = {target: list(oracles.tiny_pair("diffkd", target=target).target.parameters()) for target in ("normalized", "raw")}
    assert trained == {"normalized": [], "raw": []}


def test_an_ensemble_teaches_by_its_logits():
    distiller = oracles.tiny_pair("diffkd", teacher=[TinyNet(4), TinyNet(6)], places="logits")
    oracles.check_two_steps(distiller)
    with pytest.raises(UnsupportedPairError):
        oracles.tiny_pair("diffkd", teacher=[TinyNet(4), TinyNet(6)])


def test_draws_change_with_the_step_and_come_back_with_it():
    distiller = oracles.tiny_pair("diffkd")
    batch = oracles.tiny_batch()

    def terms(step):
        distiller.set_progress(Progress(0, 1, step, 10))
        return {name: term.item() for name, term in distiller(*batch).terms.items()}

    first, second = terms(0), terms(1)
    assert {name for name in first if first[name] != second[name]} == {"feature", "logits", "diffusion"}
    assert terms(0) == first
    roots = [stream.root for streams in distiller._streams.values() for stream in streams]
    assert len(set(roots)) == 6


def test_processes_of_a_distributed_run_draw_what_one_would_for_all(monkeypatch):
    distiller = oracles.tiny_pair("diffkd")
    stream, whole = distiller.stream("map.noise"), torch.zeros(6, 4, 2, 2)
    drawn = distiller._normal(stream, whole)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        parts.append(distiller._normal(stream, whole[:3]))
    assert torch.equal(torch.cat(parts), drawn)


def test_a_student_of_double_precision_has_levels_of_double_precision():
    assert torch.equal(oracles.tiny_pair("diffkd").levels, denoiser.alpha_bars().float())
    double = oracles.tiny_pair("diffkd", student=TinyNet(4).double(), teacher=TinyNet(8).double())
    assert torch.equal(double.levels, denoiser.alpha_bars())


def test_eval_mode_normalises_by_the_batch_too():
    """Autoencoder and noise predictors read the teacher alone, so their terms are those of training mode."""
    distiller = oracles.tiny_pair("diffkd")
    batch = oracles.tiny_batch()
    distiller.eval()
    evaluated = distiller(*batch).terms
    distiller.train()
    trained = distiller(*batch).terms
    for name in ("autoencoder", "diffusion"):
        torch.testing.assert_close(evaluated[name], trained[name])


@pytest.mark.parametrize("size", [1, 2])
def test_finite_for_zero_features_certain_teachers_and_wide_gaps(size):
    def zeroed(network):
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
        return network

    def gaps(network):
        nn.init.zeros_(network.fc.weight)
        network.fc.bias.data = torch.tensor([1e4, 0.0, -1e4, 0.0, 0.0])
        return network

    class Certain(TinyNet):
        def forward(self, images):
            return super().forward(images) * 0 + torch.tensor([0.0, -math.inf, -math.inf, -math.inf, -math.inf])

    pairs = [(zeroed(TinyNet(4)), TinyNet(8)), (TinyNet(4), zeroed(TinyNet(8))), (gaps(TinyNet(4)), gaps(TinyNet(8)))]
    for student, teacher in [*pairs, (TinyNet(4), Certain(8))]:
        for options in ({}, {"target": "raw"}):
            distiller = oracles.tiny_pair("diffkd", student=student, teacher=teacher, **options)
            out = distiller(*oracles.tiny_batch(size))
            out.loss.backward()
            assert all(torch.isfinite(term) for term in out.terms.values())
            assert all(torch.isfinite(p.grad).all() for p in distiller.parameters() if p.grad is not None)


def test_the_modules_are_adapters_and_gone_on_export():
    distiller = oracles.tiny_pair("diffkd")
    groups = {name: group.owner for group in distiller.param_groups() for name in group.names}
    assert {owner for name, owner in groups.items() if name.startswith(("places.", "target."))} == {"adapters"}
    assert distiller.export_student().state_dict().keys() == TinyNet(4).state_dict().keys()
    assert "levels" not in distiller.state_dict()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"target": "latent"}, "target"),
        ({"places": "all"}, "places"),
        ({"latent_channels": 0}, "latent_channels"),
        ({"latent_channels": 2.0}, "latent_channels"),
        ({"latent_channels": 8, "target": "raw"}, "latent_channels"),
        ({"latent_channels": 8, "places": "logits"}, "latent_channels"),
        ({"temperature": 0.0}, "temperature"),
        ({"denoise_steps": 0}, "denoise_steps"),
        ({"train_steps": 2000}, "train_steps"),
    ],
)
def test_bad_options_are_refused(options, word):
    with pytest.raises(OptionError, match=word):
        oracles.tiny_pair("diffkd", **options)


@pytest.mark.parametrize("options", [{"places": "logits", "noise_matching": False}, {"places": "map", "target": "normalized"}])
def test_the_contract_holds_with_options(options):
    check_distiller("diffkd", options=options, skip={"check_compile": "the default options are traced by the contract tests"})
