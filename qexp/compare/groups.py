"""Runs that belong together, and what their seeds say about a figure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import stdtrit  # Student's quantiles; scipy.stats takes half a second to import

from qexp.compare.differences import ABSENT, at, brief, differences, keys_of, same_word, texts
from qexp.compare.records import Run
from qexp.sections import ConfigError
from qexp.store import NOT_IDENTITY, digest
from qexp.tracking import METRICS

ACC = "acc"
MEANING = {ACC: "accuracy of the int8 engine, of the simulation where none ran", **METRICS}
DEFAULT = [
    "acc/fp32", "acc/control", "acc/ptq", ACC, "acc/drop", "sqnr/output_db", "latency/int8_ms", "latency/speedup",
    "size/packed_bytes",
]  # fmt: skip
SHARE = 0.95  # of the intervals
FIRST = "data", "model"  # settings that stand before the others


@dataclass(frozen=True)
class Mean:
    """A mean over n runs and half its interval by Student's t; `half` is None for n = 1.

    `mean` is None where one of the values is infinite.
    """

    n: int
    mean: float | None
    half: float | None = None


def mean_of(values: Iterable[float | None], share: float = SHARE) -> Mean:
    """The mean of values with its interval.

    >>> mean_of([1.0, 2.0, 3.0])  # 4.303 / sqrt(3)
    Mean(n=3, mean=2.0, half=2.484137...)
    """
    known = list(values)
    n = len(known)
    if not n or None in known:
        return Mean(n, None)
    x = np.asarray(known, dtype=np.float64)
    half = None if n == 1 else float(stdtrit(n - 1, (1 + share) / 2) * x.std(ddof=1) / math.sqrt(n))
    return Mean(n, float(x.mean()), half)


def value_of(run: Run, metric: str) -> float | None:
    """A figure of a run, None where it is infinite. Errors: KeyError where the run has none."""
    if metric == ACC:
        metric = next(name for name in ("acc/engine", "acc/sim", "acc/fp32", ACC) if name in run.metrics or name == ACC)
    value = run.metrics[metric]
    if isinstance(value, (str, list, dict)):
        raise KeyError(metric)
    return float(value) if value is not None and math.isfinite(value) else None


def has(run: Run, metric: str) -> bool:
    """Whether a run has this figure."""
    try:
        value_of(run, metric)
    except KeyError:
        return False
    return True


@dataclass(frozen=True)
class Group:
    """Runs that share their settings; `settings` are those in which it differs from other groups."""

    settings: dict[str, str]
    runs: list[Run]
    _means: dict[str, Mean] = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        """Its settings in a row; a bare number says what it is of.

        >>> Group({"calibration": "MinMax", "quantizer.bits": "8"}, []).name
        'MinMax, bits 8'
        >>> Group({"quantizer.weight.bits": "4", "quantizer.activation.bits": "8"}, []).name
        'weight.bits 4, activation.bits 8'
        """
        last = [key.rpartition(".")[2] for key in self.settings]
        short = [
            key.partition(".")[2] if last.count(end) > 1 else end for key, end in zip(self.settings, last, strict=True)
        ]
        texts_of = zip(short, self.settings.values(), strict=True)
        return ", ".join(f"{key} {text}" if text[:1].isdigit() else text for key, text in texts_of) or "all runs"

    @cached_property
    def choice(self) -> dict[str, str]:
        """What the sweeps say of all its runs alike."""
        first, *others = [run.choice for run in self.runs]
        return {key: word for key, word in first.items() if all(other.get(key) == word for other in others)}

    def mean(self, metric: str) -> Mean:
        """The mean of a figure over the runs that have it; n = 0 where none does."""
        if metric not in self._means:
            self._means[metric] = mean_of([value_of(run, metric) for run in self.runs if has(run, metric)])
        return self._means[metric]


def groups_of(runs: Sequence[Run], by: Sequence[str] = ()) -> list[Group]:
    """Runs by their settings without seeds, or by the settings that are named. Errors: ConfigError for unknown keys.

    The order is that of a sweep, else that of the settings.
    """
    if not runs:
        return []
    identities = [run.group_id for run in runs]
    if by:
        values = {key: values_of(runs, key) for key in by}
        identities = [digest([repr(values[key][i]) for key in by]) for i in range(len(runs))]
    members: dict[str, list[int]] = {}
    for i, identity in enumerate(identities):
        members.setdefault(identity, []).append(i)
    first = [indices[0] for indices in members.values()]
    if by:
        columns = {key: texts([values[key][i] for i in first]) for key in by}
        ordered = False
    else:
        columns, ordered = _columns(runs, list(members.values()))
    groups = [
        Group({key: column[number] for key, column in columns.items()}, [runs[i] for i in indices])
        for number, indices in enumerate(members.values())
    ]
    return groups if ordered else sorted(groups, key=lambda group: [natural(text) for text in group.settings.values()])


def _columns(runs: Sequence[Run], members: list[list[int]]) -> tuple[dict[str, list[str]], bool]:
    """The settings in which groups differ: in the words of the sweep where these tell them apart, else of configs."""
    choices = [{key: word for key, word in run.choice.items() if not is_seed(key)} for run in runs]
    of_groups = [choices[indices[0]] for indices in members]
    alike = all(choices[i] == choice for indices, choice in zip(members, of_groups, strict=True) for i in indices)
    distinct = len({tuple(choice.items()) for choice in of_groups}) == len(of_groups)
    if alike and distinct and all(run.choice for run in runs):
        keys = dict.fromkeys(key for choice in of_groups for key in choice)
        return {key: [choice.get(key, brief(ABSENT)) for choice in of_groups] for key in keys}, True
    found = differences([settings_of(runs[indices[0]]) for indices in members])
    return dict(sorted(found.items(), key=lambda item: item[0].split(".")[0] not in FIRST)), False


def is_seed(key: str) -> bool:
    """Whether a key of the config is a seed."""
    return key.rpartition(".")[2] == "seed"


def settings_of(run: Run) -> dict[str, Any]:
    """The config without seeds and without what cannot change a result."""
    return _seedless({key: value for key, value in run.config.items() if key not in NOT_IDENTITY})


def _seedless(section: Any) -> Any:
    if isinstance(section, dict):
        return {key: _seedless(value) for key, value in section.items() if key != "seed"}
    return section


def values_of(runs: Sequence[Run], key: str) -> list[Any]:
    """A setting of each run: the word of its sweep where all have one, else what the config holds, without seeds.

    Errors: ConfigError for a key that no run has.
    """
    if all(key in run.choice for run in runs):
        return [run.choice[key] for run in runs]
    found = [_seedless(at(run.config, key)) for run in runs]
    if all(value is ABSENT for value in found):
        known = dict.fromkeys(name for run in runs for name in keys_of(run.config))
        raise ConfigError(f"{key}: no run has such a setting; there are {_some(key, known)}")
    return found


def where(runs: Sequence[Run], conditions: Sequence[tuple[str, str]]) -> list[Run]:
    """Those runs which have these values (or one of a,b), as words of the sweep or as a table shows them.

    Errors: ConfigError.
    """
    for key, wanted in conditions:
        values = values_of(runs, key) if runs else []
        shown = [{brief(value), text} for value, text in zip(values, texts(values) if values else [], strict=True)]
        allowed = [wanted, *wanted.split(",")]
        kept = [
            run for run, words in zip(runs, shown, strict=True)
            if any(same_word(word, one) for word in words for one in allowed)
        ]  # fmt: skip
        if not kept:
            there = sorted({max(words, key=len) for words in shown}, key=natural)
            raise ConfigError(f"--where {key}={wanted}: no run has this value; there are {', '.join(there[:12])}")
        runs = kept
    return list(runs)


def metrics_of(runs: Sequence[Run], asked: Sequence[str] = ()) -> list[str]:
    """The figures to show: those asked for, else the usual ones that some run has. Errors: ConfigError."""
    for name in asked:
        if not any(has(run, name) for run in runs):
            known = [ACC, *dict.fromkeys(key for run in runs for key in sorted(run.metrics) if has(run, key))]
            what = "is text, no figure" if any(name in run.metrics for run in runs) else "no run has it"
            raise ConfigError(f"--metric {name}: {what}; there are {_some(name, known)}")
    return list(dict.fromkeys(asked)) or [name for name in DEFAULT if any(has(run, name) for run in runs)]


def _some(key: str, known: Iterable[str], most: int = 24) -> str:
    """What is allowed, that which resembles the key first."""
    from difflib import get_close_matches

    names = list(known)
    near = [name for name in names if key and key in name] + get_close_matches(key, names, 6)
    shown = list(dict.fromkeys([*near, *names]))
    return _first(shown, ", ", most)


def natural(text: str) -> list[tuple[int, float, str]]:
    """A key that sorts numbers in texts as numbers.

    >>> sorted(["int16", "int8", "int4"], key=natural)
    ['int4', 'int8', 'int16']
    """
    parts = re.findall(r"\d+(?:\.\d+)?|\D+", text.casefold())
    return [(0, float(part), "") if part[0].isdigit() else (1, 0.0, part) for part in parts]


def seeds_of(runs: Iterable[Run]) -> list[str]:
    """The seeds of runs, each once."""
    return sorted({brief(run.config.get("seed")) for run in runs}, key=natural)


def mixed(groups: Iterable[Group]) -> bool:
    """Whether some group holds runs that differ in more than their seeds."""
    return any(len({run.group_id for run in group.runs}) > 1 for group in groups)


def origins(runs: Sequence[Run]) -> list[str]:
    """A sentence for each thing besides the config in which runs differ: commit, versions, processor."""
    said = []
    commits = dict.fromkeys(str(run.environment.get("commit") or "unknown")[:7] for run in runs)
    if len(commits) > 1:
        said.append(f"made by {len(commits)} commits ({_first(commits, ', ')})")
    versions: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, version in (run.environment.get("versions") or {}).items():
            versions.setdefault(name, {})[str(version)] = None
    if apart := [f"{name} {', '.join(found)}" for name, found in versions.items() if len(found) > 1]:
        said.append(f"with different versions ({_first(apart)})")
    processors = dict.fromkeys(processor_of(run) for run in runs)
    if len(processors) > 1:
        said.append(f"on {len(processors)} processors ({_first(processors)}), so latencies do not compare")
    return said


def _first(names: Iterable[str], between: str = "; ", most: int = 4) -> str:
    known = list(names)
    return between.join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")


def processor_of(run: Run) -> str:
    """Name of the processor and its instructions for int8."""
    cpu, isa = run.environment.get("cpu"), run.environment.get("isa")
    return f"{cpu}, {isa}" if cpu else "unknown"
