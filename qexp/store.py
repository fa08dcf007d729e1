"""What stays on disk: run identity, atomic results, failures, the cache of float networks.

Below paths.outputs: runs/<run_id> is a result, failed/<run_id>.json what went wrong at the last attempt,
logs/<run_id>.txt what that attempt said, sweeps/<sweep_id> a sweep, cache/ what is made once, .unfinished/ the rest.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

# Where a run writes, how it is logged, what it prints, how fast it is and whether it is made again do not change its
# result.
NOT_IDENTITY = ("paths", "logger", "progress", "compiled", "store")


class StoreError(Exception):
    """A folder or file that cannot be used; the message is one sentence."""


def run_id(config: dict) -> str:
    """Twelve hexadecimal digits that identify a resolved config, without what cannot change a result.

    >>> run_id({"seed": 0, "paths": {"outputs": "a"}}) == run_id({"seed": 0, "paths": {"outputs": "b"}})
    True
    """
    return digest({key: value for key, value in config.items() if key not in NOT_IDENTITY})


def group_id(config: dict) -> str:
    """The same for runs that differ in nothing but their seeds: every key named "seed" is left out.

    >>> group_id({"seed": 0, "data": {"seed": 0}}) == group_id({"seed": 1, "data": {"seed": 1}})
    True
    """
    return run_id(_without_seeds(config))


def _without_seeds(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_seeds(value) for key, value in content.items() if key != "seed"}
    return [_without_seeds(value) for value in content] if isinstance(content, list) else content


def digest(content: object) -> str:
    """Twelve hexadecimal digits of the SHA-256 of anything that JSON can say."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
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
    """Yield an empty folder that takes the place of `folder` when the block ends well, and vanishes when it does not.

    A reader of `folder` sees the old content or the new one, and beside it nothing but its like.
    """
    aside, old = (_unfinished(folder) / f"{folder.name}.{state}" for state in ("new", "old"))
    try:
        for parent in folder.parent, aside.parent:
            parent.mkdir(parents=True, exist_ok=True)
        with _held(_unfinished(folder) / f"{folder.name}.lock"):
            _remove(aside, old)  # while the lock is held, these are what a killed run left
            aside.mkdir()
            try:
                yield aside
                if folder.exists():
                    os.replace(folder, old)
                os.replace(aside, folder)
            finally:
                _remove(aside, old)
    except OSError as error:
        raise StoreError(f"paths.outputs: cannot write {folder}: {error.strerror or error}") from None


def _unfinished(folder: Path) -> Path:
    """Where the parts of a folder and its locks are: on the same disk, and where nobody looks for results."""
    return folder.parent.parent / ".unfinished"


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def running(outputs: Path, identity: str, patient: bool = True) -> Iterator[bool]:
    """Be the only process that is at this run; yields whether that is so, which it always is after patience."""
    with _held(writable(outputs / ".unfinished") / f"{identity}.running", timeout=-1 if patient else 0) as alone:
        yield alone


@contextmanager
def _held(path: Path, timeout: float = -1) -> Iterator[bool]:
    """Hold a lock; yields whether it was to be had in time.

    The system drops it when its holder ends, however that is: on no account is it a file that a killed process leaves.
    """
    lock = FileLock(path, timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    except OSError as error:
        raise StoreError(f"paths.outputs: cannot lock {path}: {error.strerror or error}") from None
    try:
        yield True
    finally:
        lock.release()


def run_folder(outputs: Path, identity: str) -> Path:
    """Where the result of a run is."""
    return outputs / "runs" / identity


def log_file(outputs: Path, identity: str) -> Path:
    """What the last attempt at a run has said."""
    return outputs / "logs" / f"{identity}.txt"


def finished(outputs: Path, identity: str) -> dict | None:
    """The metrics of a run that is there, whole; None where it is not. Errors: StoreError for a damaged record."""
    return read_metrics(run_folder(outputs, identity))


def record_failure(outputs: Path, identity: str, label: str, sentence: str) -> None:
    """Keep what went wrong until the next attempt."""
    failed = {"run_id": identity, "label": label, "sentence": sentence, "log": str(log_file(outputs, identity))}
    replace_text(_failure(outputs, identity), json.dumps(failed, indent=2) + "\n")


def failure(outputs: Path, identity: str) -> str | None:
    """The sentence of the last attempt, where it failed."""
    path = _failure(outputs, identity)
    return json.loads(path.read_text())["sentence"] if path.exists() else None


def forget_failure(outputs: Path, identity: str) -> None:
    """Before a new attempt."""
    _failure(outputs, identity).unlink(missing_ok=True)


def _failure(outputs: Path, identity: str) -> Path:
    return outputs / "failed" / f"{identity}.json"


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Errors: StoreError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        raise StoreError(f"paths.outputs: cannot write {path}: {error.strerror or error}") from None


def read_metrics(run_folder: Path) -> dict | None:
    """The metrics of a finished run, or None where there is none. Errors: StoreError for a damaged file."""
    path = run_folder / "metrics.json"
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        why = f"{path} is damaged ({str(error).splitlines()[0]})"
        raise StoreError(f"{why}; delete {run_folder} to make the run again") from None


def write_json(path: Path, content: dict) -> None:
    """Write sorted, indented JSON. Infinite values and NaN become null, which JSON can say."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
    path.write_text(json.dumps(finite, indent=2, sort_keys=True, allow_nan=False) + "\n")


class TensorCache:
    """Tensors by the hash of all that determined them; each set is made once, whoever comes first.

    `remedy` is what happens when a damaged entry is deleted, as in "train again".
    """

    def __init__(self, root: Path, determined_by: dict, remedy: str) -> None:
        self.root, self.determined_by, self.remedy = root, determined_by, remedy
        self.folder = root / digest(determined_by)

    @property
    def name(self) -> str:
        """What holds it, for a sentence: "float cache"."""
        return f"{self.root.name} cache"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while tensors are looked up or made, so that processes which start together make them once.

        Errors: StoreError.
        """
        place = writable(_unfinished(self.folder))
        with _held(place / f"{self.folder.name}.making"):
            yield

    def load(self) -> dict | None:
        """The dict of tensors, or None where there is none. Errors: StoreError when the file is damaged."""
        import torch

        tensors, note = self.folder / "tensors.pt", self.folder / "cache.json"
        if not self.folder.exists():
            return None
        try:
            if hashlib.sha256(tensors.read_bytes()).hexdigest() != json.loads(note.read_text())["sha256"]:
                raise ValueError("its checksum differs")
            state = torch.load(tensors, weights_only=True, map_location="cpu")
            if not isinstance(state, dict):
                raise ValueError("it holds no tensors")
            return state
        except Exception as error:  # whatever a damaged file makes the readers raise
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            remedy = f"delete {self.folder} to {self.remedy}"
            raise StoreError(f"{self.name} {tensors} is damaged ({why}); {remedy}") from None

    def save(self, state: dict) -> None:
        """Store a dict of tensors."""
        import torch

        tensors = io.BytesIO()  # torch reports a full disk as a RuntimeError without a reason
        torch.save(state, tensors)
        with replacing(self.folder) as folder:
            (folder / "tensors.pt").write_bytes(tensors.getvalue())
            sha256 = hashlib.sha256(tensors.getvalue()).hexdigest()
            note = {"sha256": sha256, "determined_by": self.determined_by}
            (folder / "cache.json").write_text(json.dumps(note, indent=2) + "\n")
