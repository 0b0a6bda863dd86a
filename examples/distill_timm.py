"""Distil any teacher into any student on any folder of images, and hand the plain student over.

    python examples/distill_timm.py --data-root PHOTOS --teacher timm/resnet50 --student timm/mobilenetv3_large_100 --pretrained

PHOTOS holds train/ and val/ with a folder for each class, or one tree of class folders (a fifth is then split off), or what
"python -m distillzoo pack" has written. Networks are named as distillzoo.list_models() lists them. A teacher that comes without
--teacher-checkpoint is trained on the folder first. The output folder gets the student's weights and configuration, which
timm.create_model(..., checkpoint_path=...) loads, a model card, and on request torch.export and ONNX files. Ctrl-C stops; the same
command goes on after the last finished epoch. Exit code: 0 done, 1 training failed, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from distillzoo import DataSpec, Distiller, DistillZooError, Teacher, build_distiller, create_model
from distillzoo.build import describe_distiller
from distillzoo.data import DataSet, load_dataset
from distillzoo.engine import EpochReport, Observer, StepReport, TrainConfig, Trainer, evaluate_all
from distillzoo.errors import DataError, MissingDependencyError, OptionError, ShapeError
from distillzoo.export import StudentInfo, export_onnx, export_program, save_student, write_model_card
from distillzoo.models import timm_config
from distillzoo.streams import Stream, forked_generator
from distillzoo.taps import OwnView
from distillzoo.types import Stage

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
PAIRS = ("option", "teacher_option", "student_option")


class FailedError(Exception):
    """Training or an export did not come to its end."""


class Watch(Observer):
    """Shows progress with the time that is left, and saves the state after every epoch."""

    def __init__(self, title: str, state_file: Path, total: int) -> None:
        self.trainer: Trainer | None = None
        self.state_file = state_file
        self.bar = tqdm(total=total, desc=title, unit="step", dynamic_ncols=True, disable=None)

    def on_step(self, report: StepReport) -> None:  # noqa: ARG002 - an observer's interface
        """Move the bar, whose last figure is the time left."""
        self.bar.update()

    def on_epoch(self, report: EpochReport) -> None:
        """Save the state and tell the epoch's figures."""
        if self.trainer is not None:
            partial = self.state_file.with_name(self.state_file.name + ".partial")
            torch.save(self.trainer.state(report.member), partial)
            partial.replace(self.state_file)  # whole or not at all: a stop in between leaves the epoch before
        score = "" if report.accuracy is None else f"accuracy {report.accuracy:.2f} %, "
        self.bar.write(
            f"{report.member}: {report.phase} epoch {report.epoch + 1}, {score}loss {report.loss:.3f}, {report.seconds:.0f} s"
        )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-root", required=True, metavar="DIR", help="folder of images")
    add("--teacher", required=True, metavar="NAME", help="as timm/convnext_tiny")
    add("--student", required=True, metavar="NAME", help="as timm/mobilenetv3_large_100")
    add("--method", default="kd", metavar="NAME", help="as list_distillers() names them, joined by + composed (default: kd)")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="option of the method; can be repeated")
    add(
        "--weight",
        action="append",
        default=[],
        metavar="TERM=VALUE|PRESET",
        help="weight of a term; can be repeated",
    )
    add("--teacher-option", action="append", default=[], metavar="NAME=VALUE", help="option of the network, as img_size=96")
    add("--student-option", action="append", default=[], metavar="NAME=VALUE", help="option of the network, as img_size=96")
    add("--teacher-checkpoint", metavar="FILE", help="trained weights of the teacher, for the classes of the folder")
    add("--teacher-epochs", type=int, default=10, help="to train a teacher that comes without a checkpoint (default: 10)")
    add("--pretrained", action="store_true", help="start both networks from timm's or torchvision's weights, which are downloaded")
    add("--student-checkpoint", metavar="FILE", help="weights to start the student from")
    add("--output", type=Path, default=Path("distilled"), metavar="DIR", help="default: distilled")
    add("--epochs", type=int, default=30)
    add("--batch-size", type=int, default=64)
    add("--lr", type=float, default=0.02, help="peak of a one-cycle schedule (default: 0.02)")
    add("--weight-decay", type=float, default=1e-4)
    add("--precision", choices=("float32", "bf16"), default="float32")
    add("--crop", type=int, default=224, help="height and width of the images in pixels (default: 224)")
    add(
        "--teacher-crop",
        type=int,
        metavar="PIXELS",
        help="size at which the teacher sees the crop (default: --crop, or the one it takes)",
    )
    add(
        "--resize",
        type=int,
        help="short side of evaluation images before the cut (default: 8/7 of --crop; packed: all)",
    )
    add("--workers", type=int, help="processes that read images (default: one a processor, at most 16)")
    add("--skip-bad", action="store_true", help="leave image files out that cannot be used")
    add("--seed", type=int, default=0)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--license", default="unknown", help="licence of the student's weights, for the model card")
    add("--export", action="store_true", help="write a torch.export program too")
    add("--onnx", action="store_true", help="write an ONNX file too (extra onnx)")
    return parser.parse_args(arguments)


def pairs(given: Sequence[str], option: str) -> dict[str, Any]:
    """Read NAME=VALUE options; a value that is no Python literal is text."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise OptionError(f"{option} takes NAME=VALUE; got {text!r}; write it as {option} temperature=2.")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def weights_of(given: Sequence[str]) -> dict[str, Any] | str:
    """Read --weight: numbers by term, or the name of one of the method's presets."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    return pairs(given, "--weight")


def saved_config(file: Path) -> dict[str, Any]:
    """Return mean, deviation and size of the ``pretrained_cfg`` in a network's configuration, as far as there are such."""
    if not file.is_file():
        return {}
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{str(file)!r}, which says what images its network wants, cannot be read ({error}); mend or remove it."
        ) from error
    said = whole.get("pretrained_cfg") if isinstance(whole, dict) else None
    found = {key: said[key] for key in ("mean", "std", "input_size") if said.get(key)} if isinstance(said, dict) else {}
    for key, value in found.items():
        if not (isinstance(value, list) and all(isinstance(each, int | float) for each in value)):
            raise DataError(f"pretrained_cfg.{key} in {str(file)!r} must be a list of numbers; got {value!r}; mend or remove it.")
    return found


def declared(name: str, checkpoint: Path | None = None) -> dict[str, tuple[Any, ...]]:
    """Return what images a network wants, as far as it says: mean, deviation, and size if it takes no other.

    A config.json beside its checkpoint says so; of what that does not say, timm.
    """
    config = timm_config(name)
    found: dict[str, Any] = asdict(config) if config is not None and len(config.mean) == 3 else {}
    if not found.get("fixed_input_size"):  # it runs at others, the student's among them
        found.pop("input_size", None)
    if checkpoint is not None:
        found |= saved_config(checkpoint.with_name("config.json"))
    wanted: dict[str, tuple[Any, ...]] = {key: tuple(found[key]) for key in ("mean", "std", "input_size") if found.get(key)}
    if "input_size" in wanted:
        wanted["input_size"] = wanted["input_size"][-2:]
    return wanted


def load_images(args: argparse.Namespace) -> DataSet:
    """Load the folder, packed or not, normalised as the student wants it."""
    wanted = declared(args.student)
    views: dict[str, Any] = {key: wanted[key] for key in ("mean", "std") if key in wanted}
    views |= {"crop": args.crop, "resize": args.resize}
    if (Path(args.data_root).expanduser() / "index.json").is_file():
        return load_dataset("packed", root=args.data_root, **views)
    return load_dataset("folder", root=args.data_root, workers=args.workers, skip_bad=args.skip_bad, **views)


def make_network(args: argparse.Namespace, role: str, number: int, checkpoint: str | None) -> nn.Module:
    """Create the teacher or the student; initial weights depend on the seed and the role alone."""
    options = args.given[f"{role}_option"]
    pretrained = args.pretrained and checkpoint is None
    with forked_generator(Stream.named(args.seed, role)):
        return create_model(getattr(args, role), num_classes=number, pretrained=pretrained, checkpoint_path=checkpoint, **options)


def fit(
    title: str, distiller: Distiller, teacher: Teacher | None, data: DataSet, config: TrainConfig, args: argparse.Namespace
) -> nn.Module:
    """Train to the end, from where an interrupted call stopped; return the plain network."""
    train = data.train_loader(config.batch_size, seed=args.seed, device=args.device, channels_last=config.channels_last)
    evaluation = data.eval_loader(config.eval_batch_size, device=args.device, channels_last=config.channels_last)
    epochs = sum(config.epochs if phase.epochs is None else phase.epochs for phase in distiller.phases())
    watch = Watch(title, args.output / f"{title}.last.pt", epochs * len(train))
    trainer = Trainer({title: distiller}, teacher, train, evaluation, config, seed=args.seed, device=args.device, observer=watch)
    watch.trainer = trainer
    if watch.state_file.is_file():
        trainer.restore(title, torch.load(watch.state_file, map_location="cpu", weights_only=True))
        watch.bar.update(trainer.members[title].step)
        watch.bar.write(f"{title}: going on after {trainer.members[title].step} of {epochs * len(train)} steps")
    try:
        result = trainer.run()[title]
    finally:
        watch.bar.close()
    if result.status != "done":
        raise FailedError(f"Training of the {title} {result.status}: {result.message}")
    return trainer.members[title].export_student()


class Seeing(nn.Module):
    """A network with its own view of the images, to be trained alone: it declares no feature maps."""

    def __init__(self, network: nn.Module, view: OwnView) -> None:
        super().__init__()
        self.network, self.view = network, view
        self.stages: tuple[Stage, ...] = ()
        self.classifier_path = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits ``(B, num_classes)``."""
        logits: torch.Tensor = self.network(self.view(images))
        return logits


def teacher_view(args: argparse.Namespace, data: DataSet) -> DataSpec:
    """Return what the teacher sees of a crop: the size that it wants, and if it was trained elsewhere its normalisation."""
    checkpoint = None if args.teacher_checkpoint is None else Path(args.teacher_checkpoint)
    wanted = declared(args.teacher, checkpoint)
    if "img_size" in args.given["teacher_option"]:
        wanted.pop("input_size", None)
    if args.teacher_crop is not None:
        wanted["input_size"] = (args.teacher_crop, args.teacher_crop)
    normalised = wanted if checkpoint is not None else {}
    return replace(
        data.spec,
        input_size=wanted.get("input_size", data.spec.input_size),
        mean=normalised.get("mean", data.spec.mean),
        std=normalised.get("std", data.spec.std),
    )


def make_teacher(args: argparse.Namespace, data: DataSet, own: DataSpec) -> tuple[nn.Module, Distiller | None]:
    """Return the teacher's network, from its checkpoint, from an earlier call or fresh, and what trains it where it has to be."""
    kept = args.output / "teacher" / "model.safetensors"
    file = args.teacher_checkpoint or (str(kept) if kept.is_file() else None)
    network = make_network(args, "teacher", data.spec.num_classes, file)
    if file is not None:
        return network, None
    if args.teacher_epochs == 0:
        print("Note: the teacher is taken as it is; without training on these classes it has little to teach.")
        return network, None
    seeing = Seeing(network, OwnView(data.spec, own))
    return network, build_distiller("vanilla", seeing, data=data.spec, seed=args.seed)


def get_teacher(
    args: argparse.Namespace, data: DataSet, own: DataSpec, config: TrainConfig, network: nn.Module, training: Distiller | None
) -> Teacher:
    """Return the teacher as it is, or trained now on what it will see."""
    if training is not None:
        config = replace(config, epochs=args.teacher_epochs)
        network = fit("teacher", training, None, data, config, args).get_submodule("network")
        save_student(network, args.output / "teacher", describe(args, "teacher", data, own))
        (args.output / "teacher.last.pt").unlink(missing_ok=True)
    return Teacher(network.to(args.device), data.spec, own_data=own)


def describe(args: argparse.Namespace, role: str, data: DataSet, seen: DataSpec) -> StudentInfo:
    """Return what the configuration and the card of a network say that was trained on what ``seen`` describes."""
    views: Any = data.augment
    return StudentInfo(
        architecture=getattr(args, role),
        class_names=data.class_names,
        input_size=seen.input_size,
        mean=seen.mean,
        std=seen.std,
        crop_share=round(views.crop / views.resize, 4),
        license=args.license,
        options=args.given[f"{role}_option"],
    )


def check_output(args: argparse.Namespace, data: DataSet, config: TrainConfig) -> dict[str, Any]:
    """Refuse an output folder that belongs to another run: a resumed one must be the same. Returns the settings of this one."""
    free = ("data_root", "output", "workers", "device", "license", "export", "onnx", "given")  # what does not change the student
    settings: dict[str, Any] = {name: value for name, value in vars(args).items() if name not in free}
    training = {name: value for name, value in asdict(config).items() if name != "channels_last"}  # which follows the device
    settings |= {"data": data.digest, "views": repr(data.augment), "training": training}
    settings = json.loads(json.dumps(settings))
    file = args.output / "settings.json"
    with output_errors(args.output):
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else settings
        other = [name for name in settings if before.get(name) != settings[name]]
    if other:
        raise OptionError(
            f"The output folder {str(args.output)!r} holds another run (different: {', '.join(other)}); a call goes on "
            "only with the same settings; name another --output, or remove the folder."
        )
    return settings


def claim_output(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Make the output folder this run's: what was asked for can be done, so that a call with the same settings may go on."""
    file = args.output / "settings.json"
    with output_errors(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            file.write_text(json.dumps(settings, indent=2), encoding="utf-8")


@contextmanager
def output_errors(output: Path) -> Iterator[None]:
    """Say what is wrong with the output folder where a file of it cannot be read or written."""
    try:
        yield
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"The output folder {str(output)!r} cannot be used ({error}); name another with --output.") from error


def measure(predict: Callable[[torch.Tensor], torch.Tensor], args: argparse.Namespace, data: DataSet, config: TrainConfig) -> float:
    """Return the top-1 accuracy on the evaluation images, in per cent."""
    evaluation = data.eval_loader(config.eval_batch_size, device=args.device)
    return evaluate_all({"it": predict}, evaluation, config, torch.device(args.device))["it"][0]


def hand_over(
    student: nn.Module, teacher_accuracy: float, args: argparse.Namespace, data: DataSet, own: DataSpec, config: TrainConfig
) -> None:
    """Write weights, configuration, card, and the exported programs that were asked for."""
    info = describe(args, "student", data, data.spec)
    accuracy = measure(student.eval(), args, data, config)
    student = student.cpu().to(memory_format=torch.contiguous_format).eval()
    weights = save_student(student, args.output, info)
    print(f"Student {args.student}: {accuracy:.2f} % (teacher {teacher_accuracy:.2f} %). Weights: {weights}")
    files, problems = {}, []
    batches = [batch.images for batch in islice(data.eval_loader(4).epoch(0), 3)]
    for wanted, name, export in ((args.export, "student.pt2", export_program), (args.onnx, "student.onnx", export_onnx)):
        if not wanted:
            continue
        try:
            files[name] = f"differs from the network by at most {export(student, args.output / name, batches):.2g} in any logit"
            print(f"{name}: {files[name]}")
        except DistillZooError as error:
            problems.append(str(error))
    described = describe_distiller(args.method, weights=args.given["weight"], **args.given["option"])  # the defaults may change
    height, width = own.input_size
    recipe = {
        "method": args.method,
        **{what: ", ".join(f"{name}={value}" for name, value in values.items()) or "none" for what, values in described.items()},
        "teacher": f"{args.teacher}, which sees {height} x {width} pixels: {teacher_accuracy:.2f} %",
        "started from": args.student_checkpoint or ("published weights" if args.pretrained else "random weights"),
        **{name: getattr(config, name) for name in ("epochs", "batch_size", "lr", "schedule", "weight_decay", "precision")},
        "seed": args.seed,
        "views": data.augment,
    }
    card = write_model_card(args.output, student, info, accuracy=accuracy, data=data.description, recipe=recipe, files=files)
    print(f"Model card: {card}")
    if problems:
        raise FailedError(" ".join(["The weights stand, but an export failed.", *problems]))


def run(args: argparse.Namespace) -> None:
    """Do everything."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda was asked for, but this machine has no usable CUDA device; use --device cpu or auto.")
    if args.onnx and not all(find_spec(package) for package in ("onnxruntime", "onnxscript")):
        raise MissingDependencyError(
            '--onnx needs packages that are not installed; run pip install "distillzoo[onnx]", or do without.'
        )
    if args.teacher_epochs < 0:
        raise OptionError(f"--teacher-epochs must be 0 (take the teacher as it is) or more; got {args.teacher_epochs}.")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    config = TrainConfig(
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        weight_decay=args.weight_decay,
        decay_norm_bias=False,
        schedule="onecycle",
        precision=args.precision,
        channels_last=args.device == "cuda",
        eval_batch_size=args.batch_size,
    )
    args.given = {name: pairs(getattr(args, name), f"--{name.replace('_', '-')}") for name in PAIRS}
    args.given["weight"] = weights_of(args.weight)
    options, weights = args.given["option"], args.given["weight"]
    data = load_images(args)
    print(f"Data: {data.description}; {data.spec.num_classes} classes.")
    settings = check_output(args, data, config)
    student = make_network(args, "student", data.spec.num_classes, args.student_checkpoint)
    stand_in = make_network(argparse.Namespace(**vars(args) | {"pretrained": False}), "teacher", data.spec.num_classes, None)
    own = teacher_view(args, data)
    try:  # before anything is trained or written: method, options and networks fit
        arguments = {"data": data.spec, "teacher_data": own, "weights": weights, "seed": args.seed}
        build_distiller(args.method, copy.deepcopy(student), stand_in, **arguments, **options)
    except ShapeError as error:
        raise OptionError(f"{error} Here --crop is the student's size and --teacher-crop the teacher's.") from error
    del stand_in
    network, training = make_teacher(args, data, own)
    claim_output(args, settings)
    teacher = get_teacher(args, data, own, config, network, training)
    accuracy = measure(lambda images: teacher(images).logits, args, data, config)
    print(f"Teacher {args.teacher}: {accuracy:.2f} % on the evaluation images.")
    kept = args.output / "model.safetensors"
    if kept.is_file():  # trained by an earlier call: only what is asked for beside the weights is made
        student = make_network(args, "student", data.spec.num_classes, str(kept)).to(args.device)
    else:
        distiller = build_distiller(args.method, student, teacher, data=data.spec, weights=weights, seed=args.seed, **options)
        student = fit("student", distiller, teacher, data, config, args)
    hand_over(student, accuracy, args, data, own, config)
    (args.output / "student.last.pt").unlink(missing_ok=True)


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    args = parse(arguments)
    try:
        run(args)
    except DistillZooError as error:
        print(f"distill_timm.py: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_INPUT
    except FailedError as error:
        print(f"distill_timm.py: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on after the last finished epoch.", file=sys.stderr)
        return INTERRUPTED
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
