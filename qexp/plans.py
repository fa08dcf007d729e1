"""The sections `finetune` and `smoothing` as plans, checked against what they go with; importing needs no torch."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from qexp.finetune.plan import FineTune
from qexp.quant.estimators import Estimator
from qexp.quant.grid import IntegerGrid
from qexp.quant.recipe import Recipe
from qexp.quant.rounding import Rounding
from qexp.sections import ConfigError, Target, build, check_target

ALPHAS = tuple(step / 10 for step in range(11))  # what a search chooses from where it is not said


def smoothing_alphas(plain: dict[str, Any]) -> tuple[float, ...]:
    """The migration strengths to choose from: none where nothing is smoothed, one where it is given."""
    section, method = plain["smoothing"], plain["method"]["name"]
    for key in section:
        if key not in ("name", "alpha", "explicit", "candidates"):
            raise ConfigError(f"smoothing.{key}: no such key; allowed are name, alpha, explicit, candidates")
    name, alpha, candidates = (section.get(key) for key in ("name", "alpha", "candidates"))
    if not isinstance(section.get("explicit", False), bool):
        raise ConfigError(f"smoothing.explicit={section['explicit']!r}: allowed are True, False")
    if not isinstance(name, str):
        raise ConfigError(f"smoothing.name={name!r}: must be a name")
    if alpha is None:
        return ()
    if name == "none":
        raise ConfigError(f"smoothing.alpha={alpha}: smoothing=none has none; choose smoothing=smoothquant")
    if method == "fp32":
        raise ConfigError(f"smoothing={name}: method=fp32 quantizes nothing; choose smoothing=none")
    if alpha != "search":
        if candidates is not None:
            raise ConfigError(f"smoothing.candidates={candidates}: are for smoothing.alpha=search, not for {alpha!r}")
        if not _is_share(alpha):
            raise ConfigError(f"smoothing.alpha={alpha!r}: must be a number from 0 to 1, search, or null for none")
        return (float(alpha),)
    found = list(ALPHAS) if candidates is None else candidates
    if not isinstance(found, list) or not all(map(_is_share, found)) or not 1 < len(set(found)) == len(found):
        raise ConfigError(f"smoothing.candidates={found!r}: must be a list of at least two different numbers, 0 to 1")
    return tuple(map(float, found))


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def finetune_plan(plain: dict[str, Any], recipe: Recipe) -> FineTune | None:
    """The plan of method=qat; the other methods have none."""
    section, method = dict(plain["finetune"]), plain["method"]["name"]
    name = section.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"finetune.name={name!r}: must be a name")
    if method != "qat":
        if name != "none":
            raise ConfigError(f"finetune={name}: method={method} does not train after quantization; choose method=qat")
        return None
    if name == "none":
        raise ConfigError("finetune=none: method=qat needs one that trains, such as finetune=ste or finetune=lsq")
    known = [field.name for field in fields(FineTune)]
    for key in section:
        if key not in known:
            raise ConfigError(f"finetune.{key}: no such key; allowed are {', '.join(known)}")
    for key in "weight", "activation":
        section[key] = _part(section, key, Estimator)
    section["update"] = _part(section, "update", Rounding)
    for key in "optimizer", "scheduler":
        if section.get(key) is not None:
            check_target(section[key], f"finetune.{key}")
            section[key] = Target(section[key], f"finetune.{key}")
    for key in "gradual", "frozen":
        value = section.setdefault(key, [])
        if not isinstance(value, list):
            raise ConfigError(f"finetune.{key}={value!r}: must be a list")
        section[key] = tuple(value)
    try:
        plan = FineTune(**section)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from None
    _refuse_estimators(plan, recipe)
    return plan


def _refuse_estimators(plan: FineTune, recipe: Recipe) -> None:
    if plan.optimizer is None:
        raise ConfigError("finetune.optimizer=null: must hold a _target_, the import path of an optimizer")
    parts = ("weight", plan.weight, recipe.weight, True), ("activation", plan.activation, recipe.activation, False)
    for tensor, estimator, scheme, is_weight in parts:
        why = None if estimator is None else estimator.refusal(scheme, is_weight)
        if why is not None:
            raise ConfigError(f"finetune.{tensor}={estimator}: {why}")
        if plan.gradual and not isinstance(scheme.grid, IntegerGrid):
            raise ConfigError(f"finetune.gradual={list(plan.gradual)}: needs integer grids, not {scheme.grid}")


def _part(section: dict[str, Any], key: str, kind: type) -> Any:
    """The object of fine-tuning under this key, None where there is none. Errors: ConfigError."""
    if section.get(key) is None:
        return None
    made = build(section[key], f"finetune.{key}")
    if not isinstance(made, kind):
        target = section[key]["_target_"]
        raise ConfigError(f"finetune.{key}._target_={target}: must be of kind {kind.__name__}")
    return made
