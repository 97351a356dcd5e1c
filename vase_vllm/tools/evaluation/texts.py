"""The texts that a model is measured on: a user's own, or some that come with Python.

Python's own documentation and library are on every machine that this command runs on, and its
license lets everybody copy them. They differ between Python versions, so results name the version
and a hash of each text.
"""

import ast
import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from vase_vllm.errors import EvictionError

Half = Literal["choice", "report"]
HALVES: tuple[Half, Half] = ("choice", "report")
"""Methods are chosen by the texts of one half, and what is said of them comes from the other."""

DOCUMENTED = (
    ("_pydecimal", "datetime", "statistics", "threading", "pathlib"),
    ("subprocess", "random", "zipfile", "heapq", "email.message", "unittest.mock"),
)
SOURCES = ("argparse", "tarfile", "logging.handlers", "configparser")


@dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
        name: what the tables and files call it.
        half: which half of the texts it belongs to.
        content: the text.
    """

    name: str
    half: Half
    content: str

    @property
    def sha256(self) -> str:
        """Of the content in UTF-8, in hexadecimal."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def own_texts(count: int | None = None) -> list[Text]:
    """Texts from Python's documentation and library, alternately of one half and the other.

    The language reference as ``help()`` shows it, the sources of modules, and the docstrings of
    others: four pairs, so that the first texts are an even choice of all.

    Args:
        count: the first so many; None: all eight.
    """
    makers: list[tuple[str, Callable[[], str]]] = [
        ("language reference 1", partial(_reference, 0)),
        ("language reference 2", partial(_reference, 1)),
        *((f"{name} source", partial(_source, name)) for name in SOURCES[:2]),
        *((f"{names[0]} docstrings", partial(_docstrings, names)) for names in DOCUMENTED),
        *((f"{name} source", partial(_source, name)) for name in SOURCES[2:]),
    ]
    return [
        Text(name, HALVES[index % 2], make()) for index, (name, make) in enumerate(makers[:count])
    ]


def read_texts(files: Sequence[str]) -> list[Text]:
    """A user's files, alternately of one half and the other.

    Raises:
        EvictionError: a file cannot be read, or two have the same name.
    """
    texts: list[Text] = []
    for index, file in enumerate(files):
        try:
            content = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EvictionError(f"--texts {file}: {error}") from None
        name = Path(file).name
        if name in (text.name for text in texts):
            raise EvictionError(f"--texts {file}: two files have this name; rename one")
        texts.append(Text(name, HALVES[index % 2], content))
    return texts


def _reference(remainder: int) -> str:
    """Every second topic of the language reference, by name."""
    from pydoc_data.topics import topics

    chosen = sorted(topics)[remainder::2]
    return "\n\n".join(topics[name] for name in chosen)


def _source(module: str) -> str:
    """The source of a module of the standard library, which is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise EvictionError(f"this Python has no source of its module {module}: give --texts")
    return Path(spec.origin).read_text(encoding="utf-8")


def _docstrings(modules: Sequence[str]) -> str:
    """The docstrings of modules, in the order in which their sources have them."""
    return "\n\n".join(docstring for name in modules for docstring in _found(_source(name)))


def _found(source: str) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        if docstring := ast.get_docstring(node):
            name = getattr(node, "name", None)
            yield docstring if name is None else f"{name}: {docstring}"
