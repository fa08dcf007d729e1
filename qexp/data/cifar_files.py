"""The two file formats in which CIFAR-10 is distributed."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

PIXELS = 3 * 32 * 32


class UnsafePickle(ValueError):
    """A pickle names something other than an array, which loading it would run."""


class ByteType:
    """Stand-in for `numpy.dtype` that takes the type uint8 alone."""

    def __init__(self, code: bytes | str, *_: Any):
        if code not in ("u1", b"u1"):
            raise ValueError(f"array type {code!r}")

    def __setstate__(self, state: Any) -> None:
        # Byte order and alignment, which mean nothing for single bytes.
        pass


class ByteArray:
    """Stand-in for a pickled `numpy.ndarray`: its bytes and their shape.

    numpy itself trusts the shapes and types that a pickle gives it, so it gets no say here.
    """

    def __init__(self, *_: Any):
        self.values = np.empty((0, PIXELS), np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, _, column_major, content = state
        order = "F" if column_major else "C"
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order=order)


ALLOWED = {
    ("numpy", "ndarray"): ByteArray,
    ("numpy", "dtype"): ByteType,
    # The older and the newer home of the same function in numpy.
    ("numpy.core.multiarray", "_reconstruct"): ByteArray,
    ("numpy._core.multiarray", "_reconstruct"): ByteArray,
}


class ArrayUnpickler(pickle.Unpickler):
    """Unpickler that rebuilds plain containers and byte arrays, and refuses every other name.

    Raises `UnsafePickle` before anything that the file names is imported.

    >>> import io
    >>> ArrayUnpickler(io.BytesIO(pickle.dumps(print))).load()
    Traceback (most recent call last):
    qexp.data.cifar_files.UnsafePickle: it asks for builtins.print, and only arrays are allowed
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UnsafePickle(f"it asks for {module}.{name}, and only arrays are allowed")
        return ALLOWED[module, name]


def read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read records of one label byte and 3072 pixel bytes.

    Shapes: images (N, 3, 32, 32) uint8 and labels (N,) int64; `ValueError` if damaged.
    """
    content = np.fromfile(path, dtype=np.uint8)
    if content.size % (1 + PIXELS):
        raise damaged(path, f"its {content.size} bytes are no multiple of {1 + PIXELS}")
    records = content.reshape(-1, 1 + PIXELS)
    return checked(path, records[:, 1:], records[:, 0])


def read_pickled(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a pickled dictionary of `data` and `labels`, without running what it names.

    Shapes: images (N, 3, 32, 32) uint8 and labels (N,) int64; `ValueError` if damaged or unsafe.
    """
    with path.open("rb") as file:
        try:
            batch = ArrayUnpickler(file, encoding="bytes").load()
            pixels, labels = batch[b"data"].values, np.asarray(batch[b"labels"]).reshape(-1)
        except UnsafePickle as error:
            raise ValueError(f"data.root: {path} was refused, {error}") from None
        except Exception as error:
            # A malformed pickle can fail in any of its instructions.
            raise damaged(path, f"unpickling failed ({type(error).__name__})") from error
    return checked(path, pixels, labels)


def checked(path: Path, pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shape the pixels as images, or raise `ValueError` if they or the labels cannot be right.

    Shapes: (N, 3072) uint8 and (N,) -> (N, 3, 32, 32) uint8 and (N,) int64.
    """
    count = len(labels)
    if count == 0 or pixels.shape != (count, PIXELS):
        raise damaged(path, f"{count} labels come with pixels of shape {pixels.shape}")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 9:
        raise damaged(path, "a label lies outside 0 to 9")
    return pixels.reshape(count, 3, 32, 32), labels.astype(np.int64)


def require_file(path: Path) -> Path:
    """Return the path; `FileNotFoundError` if there is no such file.

    >>> require_file(Path("/no/such"))
    Traceback (most recent call last):
    FileNotFoundError: data.root: /no/such is missing
    """
    if not path.is_file():
        raise FileNotFoundError(f"data.root: {path} is missing")
    return path


def damaged(path: Path, reason: str) -> ValueError:
    """Return the error for a file that is no CIFAR-10 batch."""
    return ValueError(f"data.root: {path} is no CIFAR-10 batch, {reason}")
