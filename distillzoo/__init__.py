"""Knowledge distillation for image classification in PyTorch: every method behind one interface."""

from distillzoo.build import build_distiller, list_distillers
from distillzoo.distiller import Distiller
from distillzoo.errors import DistillZooError
from distillzoo.registry import register_distiller

__version__ = "0.1.0.dev0"

__all__ = [
    "DistillZooError",
    "Distiller",
    "__version__",
    "build_distiller",
    "list_distillers",
    "register_distiller",
]
