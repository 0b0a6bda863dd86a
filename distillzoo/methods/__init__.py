"""One paper, one file: the pure loss on top, the distiller below. Importing this package registers them."""

from distillzoo.methods import at, crd, diffkd, dkd, fitnet, gpd, kd, kdiffusion, ofd, pkt, reviewkd, rkd, sp, vanilla, vid

__all__ = [
    "at",
    "crd",
    "diffkd",
    "dkd",
    "fitnet",
    "gpd",
    "kd",
    "kdiffusion",
    "ofd",
    "pkt",
    "reviewkd",
    "rkd",
    "sp",
    "vanilla",
    "vid",
]
