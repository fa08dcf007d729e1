"""qexp sync: the records that W&B keeps on disk, uploaded with all their files, wherever the folder lies now."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from qexp.sections import ConfigError
from qexp.tracking.offline import relocate

USAGE = """\
qexp sync: upload what W&B keeps on disk

usage: qexp sync [OUTPUTS ...]

  qexp sync                  the records in outputs/wandb that were not uploaded before
  qexp sync /mnt/a/outputs   those of an outputs folder that was copied from another place or machine

It is `wandb sync`, after the records have been told where the files of their artifacts lie now. A key is needed:
`wandb login`, or WANDB_API_KEY.
"""


def main(arguments: list[str]) -> int:
    """Upload outputs folders; the exit code is that of `wandb sync`. Errors: ConfigError."""
    if {"--help", "-h"} & set(arguments):
        print(USAGE, end="")
        return 0
    for argument in arguments:
        if argument.startswith("-"):
            raise ConfigError(f"qexp sync {argument}: no such option; qexp sync --help shows what can be said")
    return max(_sync(Path(argument)) for argument in arguments or ["outputs"])


def _sync(outputs: Path) -> int:
    folder = outputs / "wandb"
    if not folder.is_dir():
        raise ConfigError(f"qexp sync {outputs}: {folder} is no folder of W&B's records")
    records = [path for path in sorted(folder.glob("offline-run-*/*.wandb")) if not Path(f"{path}.synced").exists()]
    missing = [file for record in records for file in relocate(record, outputs)]
    if missing:  # wandb would go on without them, without a word
        raise ConfigError(f"qexp sync {outputs}: {len(missing)} files of artifacts are missing, such as {missing[0]}")
    if not records:
        print(f"{folder}: nothing to upload")
        return 0
    # Not the home directory, nor the one where the command is given.
    places = {"WANDB_DIR": outputs, "WANDB_DATA_DIR": folder / "data", "WANDB_CACHE_DIR": folder / "cache"}
    environment = os.environ | {name: str(place.resolve()) for name, place in places.items()}
    return subprocess.run([sys.executable, "-m", "wandb", "sync", *records], env=environment, check=False).returncode
