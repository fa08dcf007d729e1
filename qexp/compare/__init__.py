"""Runs beside each other: read from their folders, grouped by their settings, averaged over their seeds.

Importing this needs no torch.

    records = read([Path("outputs")])
    for group in groups_of(records.runs):
        print(group.name, group.mean("acc"))
"""

from qexp.compare.groups import Group, Mean, groups_of, mean_of, value_of
from qexp.compare.papers import Beside, paper_of
from qexp.compare.pareto import pareto_front
from qexp.compare.records import Records, Run, Sweep, read

__all__ = [
    "Beside", "Group", "Mean", "Records", "Run", "Sweep", "groups_of", "mean_of", "paper_of", "pareto_front", "read",
    "value_of",
]  # fmt: skip
