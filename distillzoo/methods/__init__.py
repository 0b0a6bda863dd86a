"""One paper, one file: the pure loss on top, the distiller below. Importing this package registers them."""

from distillzoo.methods import kd, vanilla

__all__ = ["kd", "vanilla"]
