"""What can stand at the cursor of a command line: Hydra's script asks for it in bash, zsh and fish."""

from __future__ import annotations

import os
import re

from hydra._internal.core_plugins.bash_completion import BashCompletion
from hydra.core.global_hydra import GlobalHydra

from qexp.composing import parsed, start_hydra
from qexp.help_page import Configs
from qexp.sections import ConfigError

OPTIONS = ("--cfg", "--config-dir", "--dry-run", "--help", "--hydra-help", "--info", "--multirun", "--version")
COMPOSING = ("flatness", "levels")  # the verbs that take KEY=VALUE


def query(shell: str, verbs: list[str]) -> int:
    """Print the candidates for COMP_LINE, of which those before COMP_POINT count; nothing where it makes no sense."""
    line = os.environ.get("COMP_LINE", "")
    point = os.environ.get("COMP_POINT", "")
    try:
        found = candidates(line[: int(point)] if point.isdigit() else line, verbs)
    except ConfigError:  # of words that are not whole yet
        found = []
    print(*found, sep="\n" if shell == "fish" else " ")
    return 0


def candidates(line: str, verbs: list[str]) -> list[str]:
    """The words that the last word of a line may become.

    Errors: ConfigError.
    """
    before, word = line.split()[1:], ""
    if not line.endswith(" "):
        word = before.pop() if before else ""
    verb = before[0] if before and before[0] in verbs else None
    if verb and verb not in COMPOSING:
        return []  # the shell's own: names of files
    if word.startswith("-"):
        return [option for option in OPTIONS if option.startswith(word)]
    folder = re.search(r"(?:--config-dir|-cd)[= ](\S+)", " ".join(before))
    configs = Configs(folder[1] if folder else None)
    if {"--help", "-h"} & set(before) and "=" not in word:
        return [known for known in (*configs.groups, *verbs) if known.startswith(word)]
    key, equals, value = word.partition("=")
    if equals and key in configs.groups:
        *others, part = value.split(",")  # a sweep through several
        head = f"{key}=" + "".join(f"{other}," for other in others)
        return [head + name for name in configs.options(key) if name.startswith(part) and name not in others]
    first = [] if before or equals else [known for known in verbs if known.startswith(word)]
    groups = [] if equals else [f"{group}=" for group in configs.groups if group.startswith(word)]
    return [*first, *dict.fromkeys([*groups, *_keys(before[1:] if verb else before, word, folder and folder[1])])]


def _keys(before: list[str], word: str, config_dir: str | None) -> list[str]:
    """Hydra's answer: keys of the configuration that the words before make, a key's value, and files."""
    start_hydra(config_dir)
    chosen = [text for text in before if "=" in text and not text.startswith("-")]
    chosen = [text for text, override in zip(chosen, parsed(chosen), strict=True) if not override.is_sweep_override()]
    plugin = BashCompletion(GlobalHydra.instance().config_loader())
    found = plugin._query(config_name="config", line=" ".join([*chosen, word or ""]) + ("" if word else " "))
    return [name for name in found if name.endswith((".", "=")) or "=" in name]
