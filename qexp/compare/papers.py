"""What a paper found, from `qexp/papers/<experiment>.yaml`, to stand beside what a sweep found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qexp.compare.differences import brief, same_word
from qexp.compare.groups import ACC, Group, has
from qexp.compare.records import Sweep
from qexp.sections import ConfigError

FOLDER = Path(__file__).parent.parent / "papers"


@dataclass(frozen=True)
class Paper:
    """A table of a paper; each row has a choice (key -> word), a network, a value and perhaps that of fp32."""

    experiment: str
    source: str
    trend: str
    metric: str
    unit: str
    note: str
    rows: list[dict[str, Any]]

    @property
    def networks(self) -> list[str]:
        """Its networks, in its order."""
        return list(dict.fromkeys(row["network"] for row in self.rows))

    @property
    def choices(self) -> list[dict[str, str]]:
        """Its choices, in its order, each once."""
        found: list[dict[str, str]] = []
        for row in self.rows:
            if row["choice"] not in found:
                found.append(row["choice"])
        return found

    def value(self, choice: dict[str, str], network: str) -> Any:
        """What it says of a choice and a network; None where it says nothing."""
        return next((r["value"] for r in self.rows if r["choice"] == choice and r["network"] == network), None)

    def fp32(self, network: str) -> Any:
        """What it says of the float network."""
        return next((r["fp32"] for r in self.rows if r["network"] == network and r.get("fp32") is not None), None)

    def ours(self, groups: Sequence[Group], choice: dict[str, str]) -> list[Group]:
        """Those groups whose choices are the same, in all keys of the paper's."""
        return [group for group in groups if _agree(choice, group)]

    def figure(self, groups: Sequence[Group]) -> str:
        """The figure of ours that stands beside the paper's."""
        known = any(has(run, self.metric) for group in groups for run in group.runs)
        return self.metric if known else ACC


def _agree(choice: dict[str, str], group: Group) -> bool:
    said = {**group.settings, **group.choice}
    return bool(choice) and all(key in said and same_word(said[key], word) for key, word in choice.items())


def paper_of(sweep: Sweep, folder: Path = FOLDER) -> Paper | None:
    """The paper that the experiment of a sweep follows, where its figures are known. Errors: ConfigError."""
    if not sweep.experiment:
        return None
    path = folder / f"{sweep.experiment}.yaml"
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        rows = [
            {**row, "choice": {str(k): brief(v) for k, v in row["choice"].items()}, "network": str(row["network"])}
            for row in content["rows"]
        ]
        if any("value" not in row for row in rows):
            raise ValueError("a row has no value")
        words = {key: str(content.get(key) or "") for key in ("source", "trend", "metric", "unit", "note")}
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: is no table of a paper ({' '.join(str(error).split())})") from None
    return Paper(experiment=sweep.experiment, rows=rows, **words)
