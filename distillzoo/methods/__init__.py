"""One paper, one file: the pure loss on top, the distiller below. Importing this package registers them."""

from distillzoo.methods import at, crd, fitnet, kd, ofd, reviewkd, vanilla, vid

__all__ = ["at", "crd", "fitnet", "kd", "ofd", "reviewkd", "vanilla", "vid"]
