"""Any encoder of the transformers library, as a module that takes ids alone."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qexp.models.encoder import TextClassifier
from qexp.models.minilm import weight_file


class IdsAlone(nn.Module):
    """Hidden states of a transformers encoder, with id 0 as padding that no token attends to.

    Shapes: (N, T) int64 -> (N, T, hidden).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=ids.ne(0).long()).last_hidden_state

    def extra_repr(self) -> str:
        """What else decides the result beside weights and layers."""
        from transformers import __version__

        said = hashlib.sha256(self.model.config.to_json_string().encode()).hexdigest()
        return f"transformers={__version__}, config={said[:12]}"


def hugging_face_encoder(num_classes: int, weights: str, trains_head_alone: bool = True) -> TextClassifier:
    """An encoder of the transformers library with its trained weights, mean pooling and a linear head.

    `weights` is a folder with config.json and model.safetensors, or a name on the hub; code from there is not executed.
    Its linear layers can be quantized; attention multiplies and adds by functions, which stay in float and are listed.
    Shapes: (N, T) int64 -> (N, num_classes).
    Errors: ValueError, one sentence, for a missing library and for what is no such encoder.

    >>> hugging_face_encoder(2, weights="/no/such")
    Traceback (most recent call last):
    ValueError: model.weights=/no/such: must be package, a folder that exists, or owner/name on the hub
    """
    folder = weight_file(weights, ("model.safetensors",)).parent
    try:
        from transformers import AutoModel
    except ImportError:
        raise ValueError(
            f"model.weights={weights}: needs transformers; install it with: pip install 'qexp[transformers]'"
        ) from None
    try:
        with _quiet():
            model, told = AutoModel.from_pretrained(
                folder,
                attn_implementation="eager",  # products and sums are seen where they are
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # whatever the library raises about config.json and the weights
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"model.weights={weights}: transformers cannot load it ({why})") from None
    # It reads the first token alone and nobody reads it: a layer that is never called has nothing to calibrate.
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    if refused := _refused(model, told):
        raise ValueError(f"model.weights={weights}: {refused}")
    return TextClassifier(IdsAlone(model), model.config.hidden_size, num_classes, trains_head_alone)


def _refused(model: nn.Module, told: dict[str, Any]) -> str | None:
    """Why this is no encoder with all its weights whose padding is id 0; None where it is one."""
    config, kind = model.config, type(model).__name__
    missing = sorted(name for name in told["missing_keys"] if not name.startswith("pooler."))
    if missing:
        return f"model.safetensors misses {len(missing)} tensors of {kind}, of which the first is {missing[0]}"
    if config.is_encoder_decoder or not isinstance(getattr(config, "hidden_size", None), int):
        return f"{kind} is no encoder of text alone"
    if getattr(config, "pad_token_id", None) not in (None, 0):
        return f"{kind} pads with id {config.pad_token_id}, but here id 0 is padding"
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without its report of tensors that the file holds besides, and its progress bar."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
