"""The ledger: published numbers beside ours, generated from small result files that are committed.

`hf-continual ledger add RUN` distils finished runs into result files, `hf-continual ledger write` makes the tables of
METHODS.md from them and from `paper_numbers.yaml`.
"""

from .papers import read_numbers
from .results import add_runs, read_results
from .tables import ledger_text, verdict, write_ledger

__all__ = ["add_runs", "ledger_text", "read_numbers", "read_results", "verdict", "write_ledger"]
