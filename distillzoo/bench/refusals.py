"""Why a method has no result on a pair, kept beside the records: a table made from these alone says so too."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from distillzoo.bench.records import REFUSED, Record, RecordStore, content_id

__all__ = ["read_refusals", "write_refusal"]


def write_refusal(record: Record, identity: Mapping[str, object], reason: str) -> None:
    """Write down that a method cannot work on a pair.

    Args:
        record: The record that the run would have.
        identity: What its id hashes.
        reason: Why.
    """
    record.path.mkdir(parents=True, exist_ok=True)
    body = {"id": record.id, "identity": dict(identity), "reason": reason}
    record.write_json(REFUSED, {**body, "checksum": content_id(body)})


def read_refusals(store: RecordStore, ids: Iterable[str]) -> dict[str, str]:
    """Return why runs have no result, by id, of those of which that was written down; a damaged file counts as none.

    Args:
        store: Where records are kept.
        ids: Runs without a result.
    """
    reasons = {}
    for run_id in ids:
        try:
            found = json.loads((store.record(run_id).path / REFUSED).read_text(encoding="utf-8"))
            body = {key: value for key, value in found.items() if key != "checksum"}
            if body["id"] == run_id and found["checksum"] == content_id(body):
                reasons[run_id] = str(body["reason"])
        except (OSError, ValueError, KeyError, AttributeError, RecursionError):
            continue
    return reasons
