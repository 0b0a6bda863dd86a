"""Plain classifiers by name: this project's own networks, timm's and torchvision's."""

from distillzoo.models import mobilenetv2, resnet, shufflenetv1, shufflenetv2, tiny, vgg, wrn  # noqa: F401 - this registers them
from distillzoo.models.base import MODELS, Network, register_model
from distillzoo.models.declared import timm_config
from distillzoo.models.factory import create_model, list_models
from distillzoo.models.heads import slice_head
from distillzoo.models.stage_tables import torchvision_stages
from distillzoo.models.weights import load_weights

__all__ = [
    "MODELS",
    "Network",
    "create_model",
    "list_models",
    "load_weights",
    "register_model",
    "slice_head",
    "timm_config",
    "torchvision_stages",
]
