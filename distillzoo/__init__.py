"""Knowledge distillation for image classification in PyTorch: every method behind one interface."""

from distillzoo.build import build_distiller, list_distillers
from distillzoo.distiller import Distiller
from distillzoo.errors import DistillZooError
from distillzoo.models import create_model, list_models
from distillzoo.registry import register_distiller
from distillzoo.taps import Teacher
from distillzoo.types import DataSpec

__version__ = "0.1.0.dev0"

__all__ = [
    "DataSpec",
    "DistillZooError",
    "Distiller",
    "Teacher",
    "__version__",
    "build_distiller",
    "create_model",
    "list_distillers",
    "list_models",
    "register_distiller",
]
