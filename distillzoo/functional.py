"""The pure losses under one roof: tensors in, scalar out, usable without any distiller."""

from distillzoo.methods.at import attention_loss, attention_map
from distillzoo.methods.crd import nce_loss
from distillzoo.methods.diffkd import diffusion_loss
from distillzoo.methods.dkd import dkd_loss, nckd_loss, tckd_loss
from distillzoo.methods.fitnet import hint_loss
from distillzoo.methods.gpd import dynamic_teacher_loss
from distillzoo.methods.kd import kd_loss
from distillzoo.methods.kdiffusion import progressive_loss
from distillzoo.methods.ofd import ofd_loss, ofd_margin
from distillzoo.methods.pkt import pkt_loss
from distillzoo.methods.reviewkd import hierarchical_context_loss
from distillzoo.methods.rkd import rkd_angle_loss, rkd_distance_loss
from distillzoo.methods.sp import sp_loss
from distillzoo.methods.vid import vid_loss

__all__ = [
    "attention_loss",
    "attention_map",
    "diffusion_loss",
    "dkd_loss",
    "dynamic_teacher_loss",
    "hierarchical_context_loss",
    "hint_loss",
    "kd_loss",
    "nce_loss",
    "nckd_loss",
    "ofd_loss",
    "ofd_margin",
    "pkt_loss",
    "progressive_loss",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "sp_loss",
    "tckd_loss",
    "vid_loss",
]
