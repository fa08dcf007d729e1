"""Docstrings of Python's standard library, each to be told by its module; needs no files but Python's own."""

from __future__ import annotations

import ast
import math
import platform
import re
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from qexp.data.options import require_whole
from qexp.data.text import TextDataModule

# Modules that are no library: the tests, programs that merely come along (IDLE, 2to3, the turtle's demos, pip's
# bootstrap), jokes. Names with an underscore are left out as well: they repeat the public ones (_pyio is io).
NO_LIBRARY = {"antigravity", "ensurepip", "idlelib", "lib2to3", "test", "this", "turtledemo"}
TESTS = {"test", "tests"}  # folders of tests inside a package
FEWEST_WORDS = 5  # "Return the result." could be anywhere
SIMILAR = 0.8  # the share of common words from which two texts are one
# Words of a beginning. A model that sees no more of two texts shall not meet one in training and one in the test.
BEGINNING = 25


class StdlibDocs(TextDataModule):
    """Docstrings of modules, classes and functions; the label is the top-level module or package they stand in.

    They are parsed from the sources of the Python that runs, and no module is imported. Left out are docstrings of
    fewer than five words and those that say nearly what an earlier one says, in the same module or another, as a whole
    or in their first 25 words (see `distinct`); then modules with fewer than `per_class`. With `most_per_class`, larger
    ones are thinned out evenly. Another version of Python has other texts and is another data set; `version` says
    which.
    Raises `ValueError` for an option out of range and where the sources are not installed.

    >>> StdlibDocs(per_class=1)
    Traceback (most recent call last):
    ValueError: data.per_class=1: must be a whole number of at least 2
    """

    version = f"{platform.python_implementation()} {platform.python_version()}"

    def __init__(self, per_class: int = 50, most_per_class: int | None = None, **options: Any):
        super().__init__(**options)
        self.per_class = require_whole("per_class", per_class, minimum=2)
        self.most_per_class = most_per_class
        if most_per_class is not None:
            require_whole("most_per_class", most_per_class, minimum=2)

    def read(self) -> tuple[list[str], list[str]]:
        """The texts and their modules, in the order of module, file and line."""
        classes = defaultdict(list)
        for module, text in _told_apart(Path(sysconfig.get_paths()["stdlib"])):
            classes[module].append(text)
        classes = {name: self._thinned(texts) for name, texts in classes.items() if len(texts) >= self.per_class}
        if len(classes) < 2:
            raise ValueError(f"data.per_class={self.per_class}: fewer than 2 modules have so many docstrings")
        pairs = [(text, name) for name, texts in classes.items() for text in texts]
        return [text for text, _ in pairs], [name for _, name in pairs]

    def _thinned(self, texts: list[str]) -> list[str]:
        most = min(len(texts), self.most_per_class or len(texts))
        return [texts[place * len(texts) // most] for place in range(most)]


@cache
def _told_apart(folder: Path) -> tuple[tuple[str, str], ...]:
    found = [(module, text) for module, text in docstrings(folder) if len(words(text)) >= FEWEST_WORDS]
    if not found:
        raise ValueError(f"data: {folder} holds no sources of the standard library, whose docstrings are to be read")
    for most in None, BEGINNING:
        found = [found[place] for place in distinct([" ".join(words(text)[:most]) for _, text in found])]
    return tuple(found)


@cache  # of one process: reading takes seconds
def docstrings(folder: Path) -> tuple[tuple[str, str], ...]:
    """Pairs (module, docstring) below a folder of the standard library, in the order of module, file and line."""
    return tuple(_docstrings(folder))


def _docstrings(folder: Path) -> Iterator[tuple[str, str]]:
    for module in sorted(sys.stdlib_module_names - NO_LIBRARY):
        if module.startswith("_"):
            continue
        inside = [path.relative_to(folder) for path in (folder / module).rglob("*.py")]
        # As texts, because paths compare differently on Windows.
        names = sorted(path.as_posix() for path in inside if not TESTS & set(path.parts))
        for name in [f"{module}.py"] * (folder / f"{module}.py").is_file() + names:
            nodes = ast.walk(ast.parse((folder / name).read_bytes()))
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            nodes = [node for node in nodes if isinstance(node, documented)]
            for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
                if text := ast.get_docstring(node):
                    yield module, text


def words(text: str) -> list[str]:
    """The lower-case words of a text; every number is the same word, and marks are none.

    >>> words("Return  x[0], the FIRST of 12.")
    ['return', 'x', '0', 'the', 'first', 'of', '0']
    """
    return re.findall(r"0|[^\W\d]+", re.sub(r"\d+", "0", text.lower()))


def distinct(texts: list[str], similar: float = SIMILAR) -> list[int]:
    """Indices of the texts that are near no earlier one that was kept.

    Two texts are near if the words that they share are at least `similar` of all the words of both, each counted once
    (Jaccard's index). The search is exact: sets that near have one of their rarest words in common, so that an index of
    these few finds all candidates (prefix filtering; Chaudhuri, Ganti and Kaushik 2006).

    >>> distinct(["Close the file now.", "Close  the FILE, now!", "Open the file now."])
    [0, 2]
    """
    sets = [frozenset(words(text)) for text in texts]
    uses = Counter(word for found in sets for word in found)
    index, kept = defaultdict(list), []
    for place, found in enumerate(sets):
        rarest = sorted(found, key=lambda word: (uses[word], word))
        # Of sets that share k words, k = ceil(similar * size), not all can be among the k - 1 most frequent ones.
        rarest = rarest[: len(found) - math.ceil(similar * len(found) - 1e-9) + 1]
        candidates = {other for word in rarest for other in index[word]}
        if all(len(found & sets[other]) / len(found | sets[other]) < similar for other in candidates):
            kept.append(place)
            for word in rarest:
                index[word].append(place)
    return kept
