"""The pure losses under one roof: tensors in, scalar out, usable without any distiller."""

from distillzoo.methods.at import attention_loss, attention_map
from distillzoo.methods.fitnet import hint_loss
from distillzoo.methods.kd import kd_loss
from distillzoo.methods.vid import vid_loss

__all__ = [
    "attention_loss",
    "attention_map",
    "hint_loss",
    "kd_loss",
    "vid_loss",
]
