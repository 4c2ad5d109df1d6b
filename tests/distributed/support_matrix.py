"""The table method x backend of METHODS.md, from what the methods declare and what a test run has shown."""

import re
from pathlib import Path

from hf_continual.distributed import BACKENDS
from hf_continual.methods.base import method_class, method_names

BEGIN, END = "<!-- support-matrix:begin -->", "<!-- support-matrix:end -->"
RESULTS = {}
"""(method, backend) -> whether every test of the pair has passed in this run."""
COLUMNS = [b for b in BACKENDS if b != "zero0"]


def record(methods, backend, passed):
    for method in methods:
        RESULTS[method, backend] = RESULTS.get((method, backend), True) and passed


def table(results=None):
    """Markdown. Without results, what the methods declare."""
    lines = [f"| method | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    reasons = {}
    for name in method_names():
        cls = method_class(name)
        cells = []
        for backend in COLUMNS:
            if backend not in cls.supports:
                reasons[name] = cls.unsupported.get(backend, "not tried")
                cells.append("-")
            elif results is None or backend == "single" or results.get((name, backend)):
                cells.append("yes")
            else:
                cells.append("**failed**" if (name, backend) in results else "not run")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- `{name}`: {reason}." for name, reason in reasons.items())])


def written(path):
    text = Path(path).read_text()
    found = re.search(f"{re.escape(BEGIN)}\n(.*?)\n{re.escape(END)}", text, re.S)
    assert found, f"{path} has no {BEGIN}"
    return found[1]


def write(path, results):
    text = Path(path).read_text()
    Path(path).write_text(text.replace(written(path), table(results)))
