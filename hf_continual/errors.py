"""The errors a user can cause and mend. Each is one sentence: what option, what value, what to do instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input. The command line prints the sentence alone and exits with code 2."""


class Interrupted(Exception):
    """Training was interrupted (SIGINT) and its state saved. The command line exits with code 130."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'threshold'?`` naming the nearest of `choices`, or a list of all of them."""
    choices = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.5)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; choose from: {', '.join(sorted(choices))}" if choices else ""
