"""Which stage of the student is compared with which of the teacher: :func:`pair_from_deep_end`."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["pair_from_deep_end"]


def pair_from_deep_end(student: Sequence[str], teacher: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Pair two lists of taps one to one from the deep end; the longer list loses its shallow ones.

    Example:
        >>> pair_from_deep_end(["stage1", "stage2"], ["stage1", "stage2", "stage3"])
        (('stage1', 'stage2'), ('stage2', 'stage3'))
    """
    count = min(len(student), len(teacher))
    return tuple(zip(student[len(student) - count :], teacher[len(teacher) - count :], strict=True))
