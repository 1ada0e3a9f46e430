"""Small records on disk, as JSON with a checksum: read whole or not at all, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)

LOCK_SECONDS = 10.0  # a record is written in well under a millisecond: whoever holds the lock longer is stuck


def read(path: Path) -> dict[str, object] | None:
    """A record's fields; None for one that is missing, cut off or altered."""
    try:
        stored = json.loads(path.read_text())
        fields = stored["fields"]
        return dict(fields) if stored["sum"] == checksum(fields) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write(path: Path, fields: Mapping[str, object]) -> None:
    """Store a record. A folder that cannot be written costs a warning, no more. Needs filelock."""
    import filelock

    plain = json.loads(json.dumps(dict(fields)))
    text = json.dumps({"fields": plain, "sum": checksum(plain)}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.parent / "lock", timeout=LOCK_SECONDS):
            partial = path.with_suffix(".partial")
            partial.write_text(text)
            os.replace(partial, path)
    except (OSError, filelock.Timeout) as error:
        log.warning("%s is not kept in %s: %s", path.name, path.parent, error)


def checksum(fields: object) -> str:
    """Of a record's fields, whatever their order."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
