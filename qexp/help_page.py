"""The pages of qexp --help, which are made of the comments in the configs."""

from __future__ import annotations

import itertools
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from qexp.composing import conf_dir
from qexp.sections import ConfigError

NESTED = "experiment"  # whose folders hold choices, too; those of other groups hold what choices build on
PARAMS = "hydra.sweeper.params."
HEADER = "qexp: what does quantizing this model cost, what does it buy, and why?"
USAGE = """\
usage: qexp [-m] [options] [KEY=VALUE ...]
       qexp VERB ...
"""
EXAMPLES = {
    "qexp": "the main job: int8 after training, on the digits",
    "qexp quantizer=int4 model=mobilenet": "one experiment, by choices",
    "qexp quantizer.weight.bits=3 seed=1": "and by any other value",
    "qexp -m calibration=minmax,mse seed=0,1": "a sweep: every combination",
    "qexp experiment=granularity_w4": "a whole experiment, from a file",
    "qexp --help calibration": "what each calibration is, and its keys",
}
OPTIONS = {
    "-m, --multirun": "sweep through comma-separated values",
    "--dry-run": "show what would run, and how long it may take; run nothing",
    "--cfg job": "show the configuration that the choices make; run nothing",
    "--config-dir DIR": "configs of your own beside these: DIR/model/mine.yaml is model=mine",
    "--help WORD": "about a GROUP, a GROUP=OPTION or a VERB; may be repeated",
    "--version": "of qexp",
    "-sc install=bash": 'eval "$(qexp -sc install=bash)" completes words on Tab; install=fish for fish',
    "--info, --hydra-help": "what Hydra, which composes the configs, says of itself",
}


class Key(NamedTuple):
    """A line of a config; a section that has a comment has no value."""

    name: str
    value: str | None
    comment: str


@dataclass(frozen=True)
class Option:
    """What a file of a group says."""

    name: str
    path: Path
    about: str
    keys: list[Key]
    builds_on: list[str]  # other files of its group
    chooses: list[str]  # GROUP=OPTION of other groups

    @property
    def title(self) -> str:
        """The first sentence of what it is."""
        return re.split(r"(?<=\.) (?=[A-Z])", self.about, maxsplit=1)[0]


class Configs:
    """The folders of configs: the user's, and those of qexp."""

    def __init__(self, config_dir: str | None = None) -> None:
        if config_dir is not None and not Path(config_dir).is_dir():
            raise ConfigError(f"--config-dir={config_dir}: no such folder")
        self.folders = [Path(folder) for folder in (config_dir, conf_dir()) if folder]
        text = Path(conf_dir(), "config.yaml").read_text(encoding="utf-8")
        root = yaml.compose(text)
        (defaults,) = (value for key, value in root.value if key.value == "defaults")
        self.groups: dict[str, tuple[str, str]] = {}  # group -> its default, and what it is for
        for node in defaults.value:
            if isinstance(node, yaml.MappingNode):
                ((key, value),) = node.value
                group = key.value.removeprefix("override ")
                if self.files(group):
                    self.groups[group] = value.value, _comment(value, text)
        for path in sorted(Path(config_dir).iterdir()) if config_dir else ():  # groups of the user's own
            if path.name != "hydra" and any(path.glob("*.yaml")):
                self.groups.setdefault(path.name, ("null", ""))
        self.keys = [key for key in _leaves(root, "", text) if not key.name.startswith("hydra.")]

    def files(self, group: str) -> dict[str, Path]:
        """Option -> its file."""
        found: dict[str, Path] = {}
        for folder in self.folders:
            for path in sorted((folder / group).rglob("*.yaml"), key=lambda path: (len(path.parents), path)):
                found.setdefault(path.relative_to(folder / group).with_suffix("").as_posix(), path)
        return found

    def options(self, group: str) -> list[str]:
        """What can be chosen, the default first."""
        default = self.groups[group][0]
        names = [name for name in self.files(group) if "/" not in name or group == NESTED]
        return sorted(names, key=lambda name: name != default)

    def option(self, group: str, name: str) -> Option:
        """What a file says. Errors: ConfigError for one that does not exist or cannot be read."""
        files = self.files(group)
        if name not in files:
            raise ConfigError(f"--help {group}={name}: no such option; allowed are {', '.join(self.options(group))}")
        try:
            return _option(group, name, files[name])
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{files[name]}: cannot be read ({' '.join(str(error).split())})") from None


def page(words: list[str], config_dir: str | None, verbs: dict[str, str]) -> str:
    """What --help says; `words` beside it may name groups and options. Errors: ConfigError."""
    configs = Configs(config_dir)
    pages, known = [], {key.name.partition(".")[0] for key in configs.keys}
    for word in words:
        key, equals, value = word.partition("=")
        group = key if key in configs.groups else key.partition(".")[0]  # quantizer.weight.bits
        if equals and key in configs.groups:
            pages += [_option_page(configs, key, name) for name in value.split(",") if name != "null"]
        elif not equals and group in configs.groups:
            pages.append(_group_page(configs, group))
        elif not equals and group in known:
            keys = [key for key in configs.keys if key.name.partition(".")[0] == group]
            pages.append("\n".join(_rows((f"{key.name}={key.value}", key.comment) for key in keys)) + "\n")
        elif not equals:
            there = ", ".join([*configs.groups, *verbs])
            raise ConfigError(f"--help {word}: no such group or verb; there are {there}")
    return "\n".join(pages) or _overview(configs, verbs)


def _overview(configs: Configs, verbs: dict[str, str]) -> str:
    axes = [group for group in configs.groups if not group.startswith("hydra/")]
    of_sweeps = [group for group in configs.groups if group.startswith("hydra/")]
    keys = [(f"{key.name}={key.value}", key.comment) for key in configs.keys if key.value is not None]
    lines = [*_wrapped(HEADER), "", *USAGE.splitlines(), "", *_rows(EXAMPLES.items(), 39), ""]
    lines += ["Verbs (qexp VERB --help says more):", *_rows((f"qexp {verb}", told) for verb, told in verbs.items()), ""]
    lines += _wrapped("Choices, the default first (GROUP=OPTION; qexp --help GROUP says what each is):")
    lines += [line for group in axes for line in _choices(configs, group)]
    lines += ["", *_wrapped("How and where a sweep runs (chosen and explained the same way):")]
    lines += [line for group in of_sweeps for line in _choices(configs, group)]
    lines += ["", *_wrapped("Other keys (KEY=VALUE; qexp --cfg job shows every one there is):"), *_rows(keys), ""]
    return "\n".join([*lines, "Options:", *_rows(OPTIONS.items())]) + "\n"


def _choices(configs: Configs, group: str) -> list[str]:
    """What a group is for, and its options."""
    return [*_rows([(group, configs.groups[group][1])], 14), *_wrapped(", ".join(configs.options(group)), " " * 18)]


def _group_page(configs: Configs, group: str) -> str:
    """Each option with what it is and the values it sets; then what the keys mean, each once."""
    default, purpose = configs.groups[group]
    names = configs.options(group)
    names += [name for name in configs.files(group) if name not in names]  # what others build on
    options = [configs.option(group, name) for name in names]
    shown = {option.name: [key for key in option.keys if _counts(key, option.name)] for option in options}
    common = [key for key in shown[names[0]] if len(names) > 1 and all(key in keys for keys in shown.values())]
    prefix = group.replace("/", ".") + "."
    lines = _wrapped(f"{group}: {purpose}" if purpose else group)
    lines += _wrapped(f"{group}=OPTION chooses one{'' if default == 'null' else f', {default} if nothing is said'}; "
                      f"qexp --help {group}=OPTION shows its file.")  # fmt: skip
    lines += _wrapped(f"{prefix}KEY=VALUE changes a key of it, as they stand below.") if group != NESTED else []
    lines.append("")
    for option in options:
        keys = [key for key in shown[option.name] if key not in common and key.value is not None]
        values = [f"{key.name.removeprefix(prefix)}={key.value}" for key in keys if not key.name.startswith(PARAMS)]
        swept = [f"{key.name.removeprefix(PARAMS)}={key.value}" for key in keys if key.name.startswith(PARAMS)]
        told = {"as": option.builds_on, "with": option.chooses + values, "sweeps": swept}
        lines += [f"  {option.name}", *_wrapped(option.title, " " * 6)]
        for what, words in told.items():
            if words:
                lines += _wrapped(f"{what} {' '.join(words)}", " " * 8, " " * 10)
    lines.append("")
    if common:
        lines += ["Every option has:", *_rows([(f"{key.name}={key.value}", key.comment) for key in common]), ""]
    rows = _meanings(options, shown, common) if group != NESTED else []
    lines += ["What keys mean:", *_rows(rows)] if rows else []
    return "\n".join(lines).rstrip() + "\n"


def _counts(key: Key, option: str) -> bool:
    """Whether a key is worth showing: not its name once more, nor what it is made of, unless that is left open."""
    if key.name.endswith("._target_"):
        return key.value == "???"
    return key.name != "hydra.mode" and not (key.name.endswith(".name") and key.value == option)


def _meanings(options: list[Option], shown: dict[str, list[Key]], common: list[Key]) -> list[tuple[str, str]]:
    """The comments of keys; where options say different things, or add to what they build on, who says which."""
    found: dict[str, dict[str, list[Option]]] = {}
    for option in options:
        for key in shown[option.name]:
            if key.comment and key not in common:
                found.setdefault(key.name, {}).setdefault(key.comment, []).append(option)
    rows = []
    for name, comments in found.items():
        for comment, saying in comments.items():
            told = len(comments) > 1 or all(option.builds_on for option in saying)
            rows.append((name, f"{comment} ({', '.join(option.name for option in saying)})" if told else comment))
    return rows


def _option_page(configs: Configs, group: str, name: str) -> str:
    """The file as it is: its comments say more than a list of its keys."""
    path = configs.option(group, name).path
    lines = [f"{group}={name}  ({path})", ""]
    return "\n".join([*lines, textwrap.indent(path.read_text(encoding="utf-8").rstrip(), "  ")]) + "\n"


def _option(group: str, name: str, path: Path) -> Option:
    text = path.read_text(encoding="utf-8")
    head = [line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())]
    is_global = any(line.startswith("@package _global_") for line in head)
    root = yaml.compose(text) or yaml.MappingNode("", [])
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: must hold keys")
    builds_on, chooses = [], []
    for key, value in root.value:
        for node in value.value if key.value == "defaults" else ():
            if isinstance(node, yaml.MappingNode):  # override /method@_global_.method: qat
                ((what, choice),) = node.value
                chooses.append(f"{what.value.split()[-1].lstrip('/').partition('@')[0]}={choice.value}")
            elif node.value != "_self_":
                builds_on.append(node.value.partition("@")[0])
    keys = list(_leaves(root, "" if is_global else group.replace("/", "."), text))
    about = " ".join(line for line in head if not line.startswith("@"))
    return Option(name, path, about, keys, builds_on, chooses)


def _leaves(node: yaml.Node, prefix: str, text: str) -> Iterator[Key]:
    """The keys that have values, and sections that have comments."""
    for key, value in node.value:
        name = f"{prefix}.{key.value}" if prefix else key.value
        if key.value == "defaults":
            continue
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            if comment := _comment(key, text):
                yield Key(name, None, comment)
            yield from _leaves(value, name, text)
        else:
            told = text[value.start_mark.index : value.end_mark.index]
            yield Key(name, " ".join(told.split()), _comment(value, text))


def _comment(node: yaml.Node, text: str) -> str:
    """What stands behind a value, or behind the name of a section, on its line."""
    rest = text[node.end_mark.index :].partition("\n")[0].lstrip(": ")
    return rest.lstrip("# ").strip() if rest.startswith("#") else ""


def _width() -> int:
    return min(shutil.get_terminal_size((120, 24)).columns, 120)


def _wrapped(text: str, indent: str = "", further: str | None = None) -> list[str]:
    further = indent if further is None else further
    return textwrap.wrap(
        text, max(_width(), 40), initial_indent=indent, subsequent_indent=further, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _rows(rows: Iterable[tuple[str, str]], column: int | None = None) -> list[str]:
    """Two columns; a word too long for the first has a line of its own."""
    rows = list(rows)
    column = column or min(max(len(word) for word, _ in rows), _width() // 3)
    indent = " " * (column + 4)
    lines = []
    for word, text in rows:
        if len(word) > column:
            lines += [f"  {word}", *_wrapped(text, indent)]
        else:
            lines += _wrapped(text, f"  {word:<{column}}  ", indent) or [f"  {word}"]
    return lines
