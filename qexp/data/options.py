"""Checks of the options that the data modules take."""

from pathlib import Path

TOO_LONG = ("truncate", "refuse")  # what becomes of a text of more than data.length tokens
TABLE = "a csv or tsv file in UTF-8 whose first line names the columns"


def require_whole(name: str, value: int, minimum: int, group: str = "data") -> int:
    """Return `value`, or raise `ValueError` unless it is a whole number of at least `minimum`.

    >>> require_whole("batch_size", 0, minimum=2)
    Traceback (most recent call last):
    ValueError: data.batch_size=0: must be a whole number of at least 2
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{group}.{name}={value!r}: must be a whole number of at least {minimum}")
    return value


def require_factor(name: str, value: float) -> float:
    """Return `value`, or raise `ValueError` unless it is a finite number of at least 1.

    >>> require_factor("calibration_outlier", 0)
    Traceback (most recent call last):
    ValueError: data.calibration_outlier=0: must be a number of at least 1
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value < float("inf"):
        raise ValueError(f"data.{name}={value!r}: must be a number of at least 1")
    return value


def require_share(name: str, value: float) -> float:
    """Return `value`, or raise `ValueError` unless it is a share that leaves something on both sides.

    >>> require_share("train_share", 1.0)
    Traceback (most recent call last):
    ValueError: data.train_share=1.0: must be between 0.01 and 0.99
    """
    if not (isinstance(value, float) and 0.01 <= value <= 0.99):
        raise ValueError(f"data.{name}={value!r}: must be between 0.01 and 0.99")
    return value


def require_folder(root: str | Path | None, expected: str) -> Path:
    """Return `root` as a path; `ValueError` if unset, `FileNotFoundError` if there is no folder.

    >>> require_folder("/no/such", "the images")
    Traceback (most recent call last):
    FileNotFoundError: data.root=/no/such: no such folder; expected the images below it
    """
    if root is None:
        raise ValueError(f"data.root=null: must name the folder that holds {expected}")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"data.root={root}: no such folder; expected {expected} below it")
    return Path(root)


def require_choice(name: str, value: object, allowed: tuple[str, ...]) -> str:
    """Return `value`, or raise `ValueError` unless it is one of the allowed words.

    >>> require_choice("too_long", "cut", ("truncate", "refuse"))
    Traceback (most recent call last):
    ValueError: data.too_long='cut': allowed are truncate, refuse
    """
    if value not in allowed:
        raise ValueError(f"data.{name}={value!r}: allowed are {', '.join(allowed)}")
    return value


def require_file(path: str | Path | None, expected: str) -> Path:
    """Return `path` as a path; `ValueError` if unset, `FileNotFoundError` if there is no file.

    >>> require_file("/no/such.csv", "a csv file")
    Traceback (most recent call last):
    FileNotFoundError: data.path=/no/such.csv: no such file; must name a csv file
    """
    if path is None:
        raise ValueError(f"data.path=null: must name {expected}")
    if not Path(str(path)).is_file():
        raise FileNotFoundError(f"data.path={path}: no such file; must name {expected}")
    return Path(str(path))
