"""One section of a config becomes one object; what goes wrong becomes one sentence. Importing this needs no torch."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from hydra._internal.utils import _locate
from hydra.errors import InstantiationException
from hydra.utils import instantiate


class ConfigError(Exception):
    """Something the user asked for cannot be; the message is one sentence that names the key."""


def build(section: dict[str, Any], key: str, **more: Any) -> Any:
    """Make the object that a section describes by `_target_`. Errors: ConfigError naming the key."""
    check_target(section, key)
    try:
        return instantiate(section, **more, _convert_="all")
    except InstantiationException as error:
        raise ConfigError(_reason(error, section, key)) from error


def _reason(error: InstantiationException, section: dict[str, Any], key: str) -> str:
    cause = error.__cause__ or error
    text = " ".join(str(cause).split())
    if isinstance(cause, TypeError) and "unexpected keyword argument" in text:
        option = text.split("'")[1]
        return f"{key}.{option}={section.get(option)!r}: {section['_target_']} has no such option"
    if isinstance(cause, (ValueError, OSError)) and re.match(rf"({re.escape(key)}\.)?\w+=", text):
        return text if text.startswith(f"{key}.") else f"{key}.{text}"
    return f"{key}._target_={section['_target_']}: cannot be made ({type(cause).__name__}: {text})"


def check_target(section: Any, key: str) -> None:
    target = section.get("_target_") if isinstance(section, dict) else None
    if not isinstance(target, str) or not re.fullmatch(r"\w+(\.\w+)+", target):
        raise ConfigError(f"{key}: must hold a _target_, the import path of a class or function, but is {section!r}")


@dataclass(frozen=True)
class Target:
    """A factory that is made when it is called, because making it imports torch."""

    section: dict[str, Any]
    key: str

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The object. Errors: ConfigError naming the key."""
        return build({**self.section, "_args_": list(args)}, self.key, **options)

    def offered(self, **options: Any) -> dict[str, Any]:
        """Those options that its constructor has names for and the section leaves open."""
        known = inspect.signature(_locate(self.section["_target_"])).parameters
        return {name: value for name, value in options.items() if name in known and name not in self.section}
