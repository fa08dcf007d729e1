"""A composed config, checked and turned into values before any compute. Importing this file needs no torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

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
from qexp.finetune.plan import FineTune
from qexp.plans import finetune_plan, smoothing_alphas
from qexp.quant.calibration import Calibration
from qexp.quant.granularity import Granularity
from qexp.quant.grid import Grid, IntegerGrid
from qexp.quant.level_list import Levels
from qexp.quant.recipe import Recipe, Scheme
from qexp.quant.rounding import Rounding
from qexp.sections import ConfigError, build, check_target


@dataclass(frozen=True)
class Settings:
    """One run, validated; `config` is the resolved config as plain values."""

    config: dict[str, Any]
    method: str
    recipe: Recipe
    seed: int
    finetune: FineTune | None = None  # of method=qat
    alphas: tuple[float, ...] = ()  # of SmoothQuant: what to choose from, one to use, none to leave all as it is

    @property
    def flatness(self) -> bool:
        """Whether the flatness of the minimum is measured."""
        return self.config["flatness"]

    @property
    def bias_samples(self) -> int:
        """Calibration samples on which biases are corrected; 0 where they are not."""
        return self.config["bias_correction"]

    @property
    def smooths_all(self) -> bool:
        """Whether SmoothQuant serves linear layers, too, that no LayerNorm feeds."""
        return self.config["smoothing"].get("explicit", False)

    @property
    def smoothed(self) -> str:
        """How activations are smoothed, in short; empty where they stay as they are."""
        return f"alpha={self.config['smoothing']['alpha']}{' explicit' * self.smooths_all}" if self.alphas else ""

    @property
    def simulation_only(self) -> str | None:
        """Why no int8 engine can run this; None where one can."""
        return self.recipe.simulation_only if self.config["fold_batchnorm"] else UNFOLDED

    @property
    def label(self) -> str:
        """Short display name: what tells this run from its siblings."""
        recipe, choice = self.recipe, _last_name(self.config["model"]["_target_"])
        grids = recipe.weight.grid, recipe.activation.grid
        bits = "W{}A{}".format(*(grid.bits for grid in grids))
        if not all(isinstance(grid, IntegerGrid) for grid in grids):
            bits = "+".join(grid.format for grid in grids)
        bits += "*" if recipe.layers else ""  # not in all layers
        if self.method == "fp32":
            return f"{choice} fp32 s{self.seed}"
        smoothed = f" {self.smoothed}" if self.smoothed else ""
        smoothed += f" bias_correction={self.bias_samples}" if self.bias_samples else ""
        tuned = "" if self.finetune is None else f" {self.config['finetune']['name']}"
        ranges = "dynamic" if recipe.activation.dynamic else recipe.activation.calibration
        schemes = f"{recipe.weight.granularity} {ranges}"
        return f"{choice} {bits} {schemes}{smoothed}{tuned} s{self.seed}"


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
UNFOLDED = "BatchNorm is not folded into the layers before it (fold_batchnorm=false), as it is in every int8 engine"
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


def settings(config: DictConfig, made: dict[str, Any] | None = None) -> Settings:
    """Check a composed config. Errors: ConfigError, one sentence.

    `made` keeps what sections have become, for the jobs of a sweep that share them.
    """
    made = {} if made is None else made
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: a value must be given") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
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
    _check_targets(plain, made)
    _check_own_options(plain)
    recipe = _recipe(plain, made)
    _refuse_formats_that_no_engine_runs(plain, recipe)
    grid = recipe.weight.grid
    if plain["flatness"] and not isinstance(grid, IntegerGrid):
        raise ConfigError(f"flatness=true: needs weights on an integer grid, whose step is the cell, not on {grid}")
    return Settings(
        plain, plain["method"]["name"], recipe, plain["seed"], finetune_plan(plain, recipe), smoothing_alphas(plain)
    )


def _refuse_devices(plain: dict[str, Any]) -> None:
    trainer, batch_size = plain["trainer"], plain["data"].get("batch_size")
    if trainer["precision"] == "16-mixed" and trainer["accelerator"] == "cpu":
        raise ConfigError("trainer.precision=16-mixed: needs a GPU (trainer.accelerator=gpu); CPUs have bf16-mixed")
    if isinstance(batch_size, int) and batch_size % trainer["devices"]:
        raise ConfigError(
            f"trainer.devices={trainer['devices']}: does not divide data.batch_size={batch_size} into equal parts"
        )


def _refuse_formats_that_no_engine_runs(plain: dict[str, Any], recipe: Recipe) -> None:
    """An engine that is asked for by name must be able to run the format; `engine=all` goes on in simulation."""
    engine, why = plain["engine"], recipe.simulation_only if plain["fold_batchnorm"] else UNFOLDED
    if engine["required"] and engine["engines"] and plain["method"]["name"] != "fp32" and why:
        names = ", ".join(engine["engines"])
        raise ConfigError(f"engine={names}: cannot run it, because {why}; engine=none simulates it")


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


def _check_targets(plain: dict[str, Any], made: dict[str, Any]) -> None:
    """The form of what only torch can build, and the logger, which needs no torch."""
    for key in "model", "data":
        check_target(plain[key], key)
    engines = plain["engine"]["engines"]
    if not isinstance(engines, dict):
        raise ConfigError(f"engine.engines={engines!r}: must hold one section for each engine")
    for name, section in engines.items():
        check_target(section, f"engine.engines.{name}")
    _once(plain["logger"], "logger", made)


def _check_own_options(plain: dict[str, Any]) -> None:
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


def require_packages(chosen: Settings) -> None:
    """Refuse a target in a package that is not there, which costs no import. Errors: ConfigError."""
    for group in "model", "data":
        target = chosen.config[group]["_target_"]
        package = target.split(".")[0]
        if find_spec(package) is None:
            raise ConfigError(f"{group}._target_={target}: cannot be imported (No module named {package!r})")


def _own(check: Callable[..., object], *arguments: Any) -> None:
    try:
        check(*arguments)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None


def _recipe(plain: dict[str, Any], made: dict[str, Any]) -> Recipe:
    schemes = {tensor: _scheme(plain, tensor, made) for tensor in ("weight", "activation")}
    logits = plain["calibration"]["logits"]
    exclude = plain["quantizer"]["exclude"]
    if not isinstance(exclude, list) or not all(isinstance(name, str) for name in exclude):
        raise ConfigError(f"quantizer.exclude={exclude!r}: must be a list of layer names or patterns")
    try:
        return Recipe(
            **schemes,
            exclude=tuple(exclude),
            layers=tuple(_layers(plain, schemes["weight"], made)),
            logits=None if logits is None else _built(plain, "calibration", "logits", Calibration, made),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _layers(plain: dict[str, Any], usual: Scheme, made: dict[str, Any]) -> Iterator[tuple[str, Scheme]]:
    """What quantizer.layers says of single weights: options of quantizer.weight, below the names of layers."""
    section = plain["quantizer"]["layers"]
    if not isinstance(section, dict):
        raise ConfigError(f"quantizer.layers={section!r}: must be a section, as in {{stem.conv: {{bits: 4}}}}")
    for name, options in _leaves(section, ""):
        key = f"quantizer.layers.{name}"
        if not isinstance(options, dict):
            raise ConfigError(f"{key}={options!r}: must name a layer and an option, as in quantizer.layers.stem.bits=4")
        grid = _once(plain["quantizer"]["weight"] | options, key, made)
        if not isinstance(grid, Grid):
            raise ConfigError(f"{key}._target_={options['_target_']}: must be a Grid, not {type(grid).__name__}")
        yield name, replace(usual, grid=grid)


def _leaves(node: dict[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    """Layer -> options, of a section nested by the parts of their names."""
    options = {key: value for key, value in node.items() if not isinstance(value, dict)}
    if options:
        yield (name, options) if name else next(iter(options.items()))
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}.{key}" if name else str(key))


def _scheme(plain: dict[str, Any], tensor: str, made: dict[str, Any]) -> Scheme:
    """One column of the four groups that describe a tensor."""
    scheme = Scheme(
        _built(plain, "quantizer", tensor, Grid, made),
        _built(plain, "granularity", tensor, Granularity, made),
        _built(plain, "calibration", tensor, Calibration, made),
        _built(plain, "rounding", tensor, Rounding, made),
        dynamic=tensor == "activation" and plain["method"]["name"] == "dynamic",
    )
    if isinstance(scheme.grid, Levels):  # what a file says belongs to the identity of a run
        plain["quantizer"][tensor] |= {"values": list(scheme.grid.values), "thresholds": scheme.grid.thresholds}
        if scheme.grid.thresholds is not None:
            plain["quantizer"][tensor]["thresholds"] = list(scheme.grid.thresholds)
    return scheme


def _built(plain: dict[str, Any], group: str, tensor: str, kind: type, made: dict[str, Any]) -> Any:
    value = _once(plain[group][tensor], f"{group}.{tensor}", made)
    if not isinstance(value, kind):
        target = plain[group][tensor]["_target_"]
        raise ConfigError(f"{group}.{tensor}._target_={target}: must be a {kind.__name__}, not {type(value).__name__}")
    return value


def _once(section: dict[str, Any], key: str, made: dict[str, Any]) -> Any:
    """What a section describes, which other jobs of the sweep may have asked for before."""
    told = f"{key}={section}"
    if told not in made:
        made[told] = build(section, key)
    return made[told]


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


def _last_name(target: str) -> str:
    return target.rpartition(".")[2]
