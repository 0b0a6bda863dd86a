"""One paper, one file: the pure loss on top, the distiller below. Importing this package registers them."""

from distillzoo.methods import at, fitnet, kd, vanilla, vid

__all__ = ["at", "fitnet", "kd", "vanilla", "vid"]
