"""What can go wrong, told to a person: what, where, and what to do about it."""

from __future__ import annotations

from os import PathLike

SHOWN = 120  # characters of a foreign name that a message shows


def shown(name: object, limit: int = SHOWN) -> str:
    """A name from a file, safe to print: unprintable characters escaped, cut to so many characters.

    Names in files are written by strangers: a newline, an escape code or a bidi mark in one would forge
    log lines.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name)[: 2 * limit])
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


class LoraOpsError(Exception):
    """Base of every error this package raises on purpose.

    `what` went wrong, in which `file` and `module`, and the `remedy`; `facts` carries the data behind the
    words, for callers and tests.
    """

    def __init__(
        self,
        what: str,
        *,
        file: str | PathLike[str] | None = None,
        module: str | None = None,
        remedy: str = "",
        **facts: object,
    ) -> None:
        self.what = what
        self.file = None if file is None else str(file)
        self.module = module
        self.remedy = remedy
        self.facts = facts
        super().__init__(what)

    def __init_subclass__(cls) -> None:
        cls.__module__ = "lora_ops"  # the host shows it to people, else with the pack's folder in front

    def __str__(self) -> str:
        places = [
            *([f"file '{shown(self.file)}'"] if self.file is not None else []),
            *([f"module '{shown(self.module)}'"] if self.module is not None else []),
        ]
        where = f"{', '.join(places)}: " if places else ""
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"{where}{self.what}{remedy}"


class FileError(LoraOpsError):
    """A file cannot be read or written as what it claims to be."""


class ShapeError(LoraOpsError):
    """Factors do not fit each other or the weight they are meant for."""


class AdapterError(LoraOpsError):
    """A module's tensors do not make an adapter that this version can apply."""


class TargetError(LoraOpsError):
    """Names of a file and places of a model do not meet."""


class StackError(LoraOpsError):
    """A stack's text or values cannot be understood."""


class TrainingError(LoraOpsError):
    """A training run cannot start as it is described, or cannot go on."""
