"""The pure losses under one roof: tensors in, scalar out, usable without any distiller."""

from distillzoo.methods.at import attention_loss, attention_map
from distillzoo.methods.crd import nce_loss
from distillzoo.methods.fitnet import hint_loss
from distillzoo.methods.kd import kd_loss
from distillzoo.methods.ofd import ofd_loss, ofd_margin
from distillzoo.methods.reviewkd import hierarchical_context_loss
from distillzoo.methods.vid import vid_loss

__all__ = [
    "attention_loss",
    "attention_map",
    "hierarchical_context_loss",
    "hint_loss",
    "kd_loss",
    "nce_loss",
    "ofd_loss",
    "ofd_margin",
    "vid_loss",
]
