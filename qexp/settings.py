"""A composed config, checked and turned into values before any compute. Importing this file needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from qexp import schema
from qexp.finetune.plan import FineTune
from qexp.plans import finetune_plan, smoothing_alphas
from qexp.quant.calibration import Calibration
from qexp.quant.granularity import Granularity
from qexp.quant.grid import Grid, IntegerGrid
from qexp.quant.level_list import Levels
from qexp.quant.recipe import Recipe, Scheme
from qexp.quant.rounding import Rounding
from qexp.sections import ConfigError, build, check_target

UNFOLDED = "BatchNorm is not folded into the layers before it (fold_batchnorm=false), as it is in every int8 engine"


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
        activation = recipe.activation
        ranges = f"dynamic {activation.granularity}" if activation.dynamic else activation.calibration
        schemes = f"{recipe.weight.granularity} {ranges}"
        return f"{choice} {bits} {schemes}{smoothed}{tuned} s{self.seed}"


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
    schema.check(plain)
    _check_targets(plain, made)
    schema.check_own_options(plain)
    recipe = _recipe(plain, made)
    _refuse_formats_that_no_engine_runs(plain, recipe)
    grid = recipe.weight.grid
    if plain["flatness"] and not isinstance(grid, IntegerGrid):
        raise ConfigError(f"flatness=true: needs weights on an integer grid, whose step is the cell, not on {grid}")
    return Settings(
        plain, plain["method"]["name"], recipe, plain["seed"], finetune_plan(plain, recipe), smoothing_alphas(plain)
    )


def _refuse_formats_that_no_engine_runs(plain: dict[str, Any], recipe: Recipe) -> None:
    """An engine that is asked for by name must be able to run the format; `engine=all` goes on in simulation."""
    engine, why = plain["engine"], recipe.simulation_only if plain["fold_batchnorm"] else UNFOLDED
    if engine["required"] and engine["engines"] and plain["method"]["name"] != "fp32" and why:
        names = ", ".join(engine["engines"])
        raise ConfigError(f"engine={names}: cannot run it, because {why}; engine=none simulates it")


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


def require_packages(chosen: Settings) -> None:
    """Refuse a target in a package that is not there, which costs no import. Errors: ConfigError."""
    for group in "model", "data":
        target = chosen.config[group]["_target_"]
        package = target.split(".")[0]
        if find_spec(package) is None:
            raise ConfigError(f"{group}._target_={target}: cannot be imported (No module named {package!r})")


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


def _last_name(target: str) -> str:
    return target.rpartition(".")[2]
