"""In which settings configs differ, in words short enough for a table."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

NONE = "—"  # this config has no such setting


class _Absent:
    def __repr__(self) -> str:
        return NONE


ABSENT = _Absent()


def differences(values: Sequence[Any], path: str = "") -> dict[str, list[str]]:
    """Setting -> its text in each of these configs, for the settings that differ, in the order of the configs.

    A section that describes an object (`_target_`, or a `name`) is one setting where these differ, and where they
    do not, each of its options is one. Settings that say the same of weights and activations are one.

    >>> differences([{"bits": 8, "like": {"_target_": "a.B"}}, {"bits": 4, "like": {"_target_": "a.C"}}])
    {'bits': ['8', '4'], 'like': ['B', 'C']}
    """
    return _merged(_differing(values, path))


def texts(values: Sequence[Any]) -> list[str]:
    """One text for each of these values of one setting, a whole section too."""
    found = differences(values, "it")
    if not found:
        return [brief(value) for value in values]
    if len(found) == 1:
        return next(iter(found.values()))
    keys = [key.removeprefix("it.") for key in found]
    rows = zip(*found.values(), strict=True)
    return [", ".join(f"{key} {text}" for key, text in zip(keys, row, strict=True) if text != NONE) for row in rows]


def brief(value: Any) -> str:
    """A value in a few words.

    >>> brief({"weight": {"_target_": "a.MinMax"}, "activation": {"_target_": "a.MinMax"}})
    'MinMax'
    """
    if value is ABSENT:
        return NONE
    if isinstance(value, dict):
        parts = [head(value)] if head(value) else [brief(part) for part in value.values() if part is not None]
        return ", ".join(dict.fromkeys(parts)) or NONE
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str) if not isinstance(value, list) else ", ".join(map(brief, value)) or "[]"


def head(section: Any) -> str | None:
    """What a section describes: the last name of its class, or its name."""
    if not isinstance(section, dict):
        return None
    if isinstance(section.get("_target_"), str):
        return section["_target_"].rpartition(".")[2]
    return section["name"] if isinstance(section.get("name"), str) else None


def at(config: dict[str, Any], key: str) -> Any:
    """The value below a dotted key, or ABSENT."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return ABSENT
        value = value[part]
    return value


def keys_of(config: dict[str, Any], before: str = "") -> list[str]:
    """All dotted keys of a config, those of sections too."""
    found = []
    for key, value in config.items():
        found += [f"{before}{key}"] + (keys_of(value, f"{before}{key}.") if isinstance(value, dict) else [])
    return found


def same_word(text: str, other: str) -> bool:
    """Whether two texts say the same in another spelling, as percentile_99.9 and Percentile 99.9 do."""
    return _bare(text) == _bare(other)


def _bare(text: str) -> str:
    return re.sub(r"[^\w.+<>/*\[\]-]|_", "", text.casefold())


def _differing(values: Sequence[Any], path: str) -> dict[str, list[str]]:
    first = values[0] if values else None
    if all(value is first or (type(value) is type(first) and value == first) for value in values):
        return {}
    sections = [value for value in values if isinstance(value, dict)]
    heads = {head(value) for value in sections}
    if sections and heads <= {None} and all(isinstance(v, dict) or v is ABSENT for v in values):
        values = [{} if value is ABSENT else value for value in values]
    elif len(sections) < len(values) or len(heads) > 1:
        return {path: _of_objects(values) if sections else [brief(value) for value in values]}
    found = {}
    for key in dict.fromkeys(key for value in values for key in value):
        found |= _differing([value.get(key, ABSENT) for value in values], f"{path}.{key}" if path else key)
    return found


def _of_objects(values: Sequence[Any]) -> list[str]:
    """The head of each, with those options that differ among its like."""
    found = [brief(value) for value in values]
    for name in {head(value) for value in values} - {None}:
        alike = [i for i, value in enumerate(values) if head(value) == name]
        for key, options in differences([values[i] for i in alike]).items():
            said = "" if same_word(key, name) else f"{key} "
            for i, option in zip(alike, options, strict=True):
                if option != NONE:
                    found[i] += f" {said}{option}"
    return found


def _merged(found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Settings which agree in all texts and differ in one part of their names are named by the other parts."""
    if "finetune" in found and "method" in found:  # the method is whether there is a fine-tuning
        del found["method"]
    merged: dict[str, list[str]] = {}
    for key, column in found.items():
        for other in merged:
            common = _common(key, other)
            if merged[other] == column and common:
                merged = {common if name == other else name: texts for name, texts in merged.items()}
                break
        else:
            merged[key] = column
    return merged


def _common(key: str, other: str) -> str | None:
    """calibration of calibration.weight and calibration.activation, and of itself and one of these."""
    ours, theirs = key.split("."), other.split(".")
    if len(ours) == len(theirs) + 1 and any(ours[:i] + ours[i + 1 :] == theirs for i in range(1, len(ours))):
        return other
    if len(ours) != len(theirs) or ours[0] != theirs[0]:
        return None
    apart = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    return ".".join(ours[: apart[0]] + ours[apart[0] + 1 :]) if len(apart) == 1 else None
