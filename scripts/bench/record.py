"""What a benchmark leaves as JSON: its figures, and on which machine with which versions they were measured."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qexp import machine


def write(
    path: Path, figures: dict[str, Any], peers: Sequence[str] = (), default: Callable[[Any], Any] | None = None
) -> None:
    """Write a file; `default` turns into JSON what JSON does not know."""
    rivals = {name: version(name) if find_spec(name) else "missing" for name in peers}
    document = {
        "machine": machine.processor() | {"cores": os.cpu_count()},
        "versions": machine.versions() | rivals,
        **figures,
    }
    path.write_text(json.dumps(document, indent=1, default=default) + "\n")
