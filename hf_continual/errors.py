"""The errors a user can cause and mend. Each is one sentence: what option, what value, what to do instead."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

LIST = 30
"""So many choices are listed; of more, only the nearest is named."""


class InputError(ValueError):
    """Bad input. The command line prints the sentence alone and exits with code 2."""


class Interrupted(Exception):
    """Training was interrupted (SIGINT) and its state saved. The command line exits with code 130."""


class ForgettingLimit(Exception):
    """A run has forgotten more than its gate allows. What is learnt is kept; the command line exits with code 3."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'threshold'?`` naming the nearest of `choices`, or a list of all of them."""
    choices = [str(choice) for choice in choices]
    cutoff = 0.5 if len(choices) <= LIST else 0.0  # a long list helps nobody
    near = difflib.get_close_matches(str(word), choices, n=1, cutoff=cutoff)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; choose from: {', '.join(sorted(choices))}" if choices else ""


def refuse_unknown(given: Iterable[str], known: Iterable[str], prefix: str) -> None:
    """Raise InputError for the first key of `given` that is not `known`, with the nearest that is."""
    known = list(known)
    for key in given:
        if key not in known:
            raise InputError(f"unknown key '{prefix}{key}'{did_you_mean(str(key), known)}")


def build(cls: Any, options: Any, section: str) -> Any:
    """A config dataclass from a mapping, refusing unknown and missing keys; an instance is returned as it is."""
    if isinstance(options, cls):
        return options
    if not isinstance(options, Mapping):
        raise InputError(f"{section}={options!r} must map options to values")
    fields = dataclasses.fields(cls)
    refuse_unknown(options, [f.name for f in fields], f"{section}.")
    for field in fields:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in options:
            raise InputError(f"{section}: the key {field.name} is missing")
    try:
        return cls(**options)
    except TypeError as error:
        raise InputError(f"{section}: {error}") from error
