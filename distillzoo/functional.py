"""The pure losses under one roof: tensors in, scalar out, usable without any distiller."""

from distillzoo.methods.kd import kd_loss

__all__ = ["kd_loss"]
