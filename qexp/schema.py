"""Which keys a config may hold and which values they may have; importing this file needs no torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from qexp.data.options import (
    TABLE,
    TOO_LONG,
    require_choice,
    require_factor,
    require_file,
    require_folder,
    require_share,
    require_whole,
)
from qexp.data.pretrained import local_folder
from qexp.sections import ConfigError

# What a config of the user's own may leave out.
OPTIONAL = [
    ("quantizer", "layers", {}), ("calibration", "logits", None), ("engine", "required", False),
    ("trainer", "devices", 1), ("trainer", "precision", "32-true"),
]  # fmt: skip
# The same for whole keys.
OPTIONAL_KEYS = {
    "compiled": False, "flatness": False, "store": "resume", "smoothing": {"name": "none", "alpha": None},
    "bias_correction": 0,
}  # fmt: skip
# Every section with the keys it may hold; None: the keys are those of its _target_.
SECTIONS: dict[str, tuple[str, ...] | None] = {
    "method": ("name",),
    "quantizer": ("weight", "activation", "exclude", "layers"),
    "granularity": ("weight", "activation"),
    "calibration": ("weight", "activation", "logits"),
    "rounding": ("weight", "activation"),
    "smoothing": None,
    "finetune": None,
    "model": None,
    "data": None,
    "engine": ("engines", "required", "threads", "batch_size", "seconds"),
    "trainer": ("epochs", "lr", "weight_decay", "accelerator", "devices", "precision", "threads"),
    "logger": None,
    "paths": ("outputs",),
    "seed": (),
    "channel_spread": (),
    "fold_batchnorm": (),
    "bias_correction": (),
    "compiled": (),
    "flatness": (),
    "progress": (),
    "store": (),
}
# What is done to a trained float network before it is quantized, and what a config may leave out, too.
PREPARED = {"channel_spread": 0, "fold_batchnorm": True}
# Methods without bias correction, and why.
UNCORRECTED = {"fp32": "quantizes nothing", "qat": "trains biases, and its control would have those of another network"}
CHOICES = {
    "method.name": ("fp32", "ptq", "qat", "dynamic"),
    "fold_batchnorm": (True, False),
    "trainer.accelerator": ("cpu", "gpu", "auto"),
    "trainer.precision": ("32-true", "bf16-mixed", "16-mixed"),
    "compiled": (True, False),
    "flatness": (True, False),
    "progress": ("auto", True, False),
    "store": ("resume", "rerun"),
    "engine.required": (True, False),
}
# key -> (type, smallest allowed value, whether that value itself is allowed)
NUMBERS: dict[str, tuple[type, float, bool]] = {
    "seed": (int, 0, True),
    "channel_spread": (int, 0, True),
    "bias_correction": (int, 0, True),
    "engine.threads": (int, 1, True),
    "engine.batch_size": (int, 1, True),
    "engine.seconds": (float, 0, False),
    "trainer.epochs": (int, 1, True),
    "trainer.lr": (float, 0, False),
    "trainer.weight_decay": (float, 0, True),
    "trainer.devices": (int, 1, True),
    "trainer.threads": (int, 1, True),
}
# group -> whole-number option of qexp's own classes -> smallest allowed value
OWN_OPTIONS = {
    "data": dict.fromkeys(("batch_size", "length", "per_class"), 2)
    | dict.fromkeys(("calibration_size", "image_size"), 1)
    | dict.fromkeys(("num_workers", "seed"), 0),
    "model": {"width": 1},
}
# what stands below data.root
FOLDERS = {
    "qexp.data.CIFAR10": "the CIFAR-10 folder cifar-10-batches-bin or cifar-10-batches-py",
    "qexp.data.ImageFolder": "the folders train and val",
}
# key -> largest allowed value; numpy's for the seed
MOST = {"seed": 2**32 - 1, "channel_spread": 16} | dict.fromkeys(
    ("engine.threads", "trainer.devices", "trainer.threads"), 1024
)


def check(plain: dict[str, Any]) -> None:
    """Check keys and values of a resolved config, and what combines; what may be left out is filled in.

    Errors: ConfigError, one sentence.
    """
    for group, name, usual in OPTIONAL:
        if isinstance(plain.get(group), dict):
            plain[group].setdefault(name, usual)
    for key, usual in (OPTIONAL_KEYS | PREPARED).items():
        plain.setdefault(key, copy.copy(usual))
    _check_keys(plain)
    for key, allowed in CHOICES.items():
        _check_choice(plain, key, allowed)
    for key, bounds in NUMBERS.items():
        _check_number(plain, key, *bounds)
    if not isinstance(plain["paths"]["outputs"], str) or not plain["paths"]["outputs"]:
        raise ConfigError(f"paths.outputs={plain['paths']['outputs']!r}: must be the path of a folder")
    for key, most in MOST.items():
        if _lookup(plain, key) > most:
            raise ConfigError(f"{key}={_lookup(plain, key)}: must be at most {most}")
    _refuse_what_does_not_combine(plain)
    _refuse_devices(plain)


def _refuse_devices(plain: dict[str, Any]) -> None:
    trainer, batch_size = plain["trainer"], plain["data"].get("batch_size")
    if trainer["precision"] == "16-mixed" and trainer["accelerator"] == "cpu":
        raise ConfigError("trainer.precision=16-mixed: needs a GPU (trainer.accelerator=gpu); CPUs have bf16-mixed")
    if isinstance(batch_size, int) and batch_size % trainer["devices"]:
        raise ConfigError(
            f"trainer.devices={trainer['devices']}: does not divide data.batch_size={batch_size} into equal parts"
        )


def _refuse_what_does_not_combine(plain: dict[str, Any]) -> None:
    if not plain["fold_batchnorm"] and plain["method"]["name"] == "qat":
        raise ConfigError(
            "fold_batchnorm=false: is for method=ptq; finetune.batchnorm says how BatchNorm is trained in method=qat"
        )
    samples, method = plain["bias_correction"], plain["method"]["name"]
    if samples and method in UNCORRECTED:
        raise ConfigError(f"bias_correction={samples}: method={method} {UNCORRECTED[method]}; choose 0")
    size = plain["data"].get("calibration_size")
    if isinstance(size, int) and samples > size:
        raise ConfigError(f"bias_correction={samples}: must be at most data.calibration_size={size}")
    outlier = plain["data"].get("calibration_outlier", 1)
    if outlier != 1 and plain["method"]["name"] == "dynamic" and plain["smoothing"].get("alpha") is None:
        raise ConfigError(
            f"data.calibration_outlier={outlier}: is for calibration alone, but method=dynamic calibrates no activation"
        )
    if outlier != 1 and plain["finetune"].get("reestimate"):
        raise ConfigError(
            f"data.calibration_outlier={outlier}: is for calibration alone, but finetune.reestimate=true trains on it"
        )


def check_own_options(plain: dict[str, Any]) -> None:
    """Options of qexp's own data and models, which would check them after importing torch."""
    for group, options in OWN_OPTIONS.items():
        section = plain[group]
        for name, least in options.items() if section["_target_"].startswith("qexp.") else ():
            if name in section:
                _own(require_whole, name, section[name], least, group)
    data = plain["data"]
    if not data["_target_"].startswith("qexp."):
        return
    if "train_share" in data:
        _own(require_share, "train_share", data["train_share"])
    if "calibration_outlier" in data:
        _own(require_factor, "calibration_outlier", data["calibration_outlier"])
    if data["_target_"] in FOLDERS and "root" in data:
        _own(require_folder, data["root"], FOLDERS[data["_target_"]])
    if data["_target_"] == "qexp.data.TextCSV" and "path" in data:
        _own(require_file, data["path"], TABLE)
    if "too_long" in data:
        _own(require_choice, "too_long", data["too_long"], TOO_LONG)
    if data.get("vocabulary") is not None:
        # It follows the model unless it is set, and then the mistake is the model's.
        follows = data["vocabulary"] == plain["model"].get("weights")
        _own(local_folder, data["vocabulary"], "tokenizer.json", "model" if follows else "data")


def _own(check: Callable[..., object], *arguments: Any) -> None:
    try:
        check(*arguments)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None


def _check_keys(plain: dict[str, Any]) -> None:
    for key, value in plain.items():
        if key not in SECTIONS:
            raise ConfigError(f"{key}={value!r}: no such key; allowed are {', '.join(SECTIONS)}")
    for key, allowed in SECTIONS.items():
        if key not in plain:
            raise ConfigError(f"{key}: is missing from the config")
        if allowed != ():
            _check_section(key, plain[key], allowed)


def _check_section(key: str, section: Any, allowed: tuple[str, ...] | None) -> None:
    if not isinstance(section, dict):
        raise ConfigError(f"{key}={section!r}: must be a section of keys")
    if allowed is None:
        return
    for name in section:
        if name not in allowed:
            raise ConfigError(f"{key}.{name}: no such key; allowed are {', '.join(allowed)}")
    for name in allowed:
        if name not in section:
            raise ConfigError(f"{key}.{name}: is missing from the config")


def _lookup(plain: dict[str, Any], key: str) -> Any:
    value: Any = plain
    for name in key.split("."):
        value = value[name]
    return value


def _check_choice(plain: dict[str, Any], key: str, allowed: tuple) -> None:
    value = _lookup(plain, key)
    if not any(value is option or (isinstance(option, str) and value == option) for option in allowed):
        raise ConfigError(f"{key}={value!r}: allowed are {', '.join(map(str, allowed))}")


def _check_number(plain: dict[str, Any], key: str, kind: type, least: float, including: bool) -> None:
    value = _lookup(plain, key)
    fits = isinstance(value, (int, kind)) and not isinstance(value, bool) and value - value == 0
    if not fits or value < least or (value == least and not including):
        noun = "an integer" if kind is int else "a number"
        raise ConfigError(f"{key}={value!r}: must be {noun} {'of at least' if including else 'above'} {least}")
