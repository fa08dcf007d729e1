"""What stays on disk: run identity, atomic results, the cache of float networks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

# Where a run writes, how it is logged and what it prints do not change its result.
NOT_IDENTITY = ("paths", "logger", "progress")


class StoreError(Exception):
    """A folder or file that cannot be used; the message is one sentence."""


def run_id(config: dict) -> str:
    """Twelve hexadecimal digits that identify a resolved config, without what cannot change a result.

    >>> run_id({"seed": 0, "paths": {"outputs": "a"}}) == run_id({"seed": 0, "paths": {"outputs": "b"}})
    True
    """
    return digest({key: value for key, value in config.items() if key not in NOT_IDENTITY})


def digest(content: object) -> str:
    """Twelve hexadecimal digits of the SHA-256 of anything that JSON can say."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def writable(folder: Path) -> Path:
    """Make a folder and prove that it can be written. Errors: StoreError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        raise StoreError(f"paths.outputs: cannot write to {folder}: {error.strerror or error}") from None
    return folder


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a folder beside `folder` that takes its place when the block ends well, and vanishes when it does not.

    A reader sees the old content or the new one, never a part of it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        yield aside
        os.chmod(aside, 0o755)
        with FileLock(folder.parent / f".{folder.name}.swap"):
            if folder.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
                os.replace(folder, old)
                shutil.rmtree(old, ignore_errors=True)
            os.replace(aside, folder)
    except OSError as error:
        raise StoreError(f"paths.outputs: cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_metrics(run_folder: Path) -> dict | None:
    """The metrics of a finished run, or None where there is none."""
    path = run_folder / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else None


def write_json(path: Path, content: dict) -> None:
    """Write sorted, indented JSON. Infinite values become null, which JSON can say."""
    finite = {k: None if isinstance(v, float) and v in (float("inf"), -float("inf")) else v for k, v in content.items()}
    path.write_text(json.dumps(finite, indent=2, sort_keys=True, allow_nan=False) + "\n")


class FloatCache:
    """Trained float networks by the hash of all that determined them; each is trained once, whoever comes first."""

    def __init__(self, root: Path, determined_by: dict) -> None:
        self.root = root
        self.determined_by = determined_by
        self.folder = root / digest(determined_by)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a network is looked up or trained, so that processes which start together train it once."""
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / f".{self.folder.name}.lock"):
            yield

    def load(self) -> dict | None:
        """The state_dict, or None where there is none. Errors: StoreError when the file is damaged."""
        import torch

        weights, note = self.folder / "weights.pt", self.folder / "cache.json"
        if not self.folder.exists():
            return None
        try:
            if hashlib.sha256(weights.read_bytes()).hexdigest() != json.loads(note.read_text())["sha256"]:
                raise ValueError("its checksum differs")
            return torch.load(weights, weights_only=True, map_location="cpu")
        except Exception as error:  # whatever a damaged file makes the readers raise
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise StoreError(f"float cache {weights} is damaged ({why}); delete {self.folder} to train again") from None

    def save(self, state: dict) -> None:
        """Store a state_dict."""
        import torch

        with replacing(self.folder) as folder:
            torch.save(state, folder / "weights.pt")
            sha256 = hashlib.sha256((folder / "weights.pt").read_bytes()).hexdigest()
            write_json(folder / "cache.json", {"sha256": sha256, "determined_by": self.determined_by})
