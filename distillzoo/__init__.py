"""Knowledge distillation for image classification in PyTorch."""

__version__ = "0.1.0.dev0"
