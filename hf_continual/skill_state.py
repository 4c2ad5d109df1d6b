"""Reading the stored skill units of a run of TaSL or KIF: `tasks/*/methods/{tasl,kif}.{json,safetensors}`.

No model and no GPU. torch is brought in only where a run has such files, so that reports of other runs do without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .errors import InputError
from .run_scores import RunScores, load_run

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("tasl", "kif")
LOW = 0.05
"""Normalised scores below it count as near zero."""
HALF = (0.45, 0.55)
"""Coefficients in it, ends included, count as near one half."""
SHOWN_CASES = ("shared", "past", "current", "neither")


@dataclass(frozen=True)
class TaskUnits:
    """The skill units of one learnt task.

    Attributes:
        task: name of the task.
        index: its place in the stream, from 0.
        method: `tasl` or `kif`.
        scheme: `matrix`, `lora_matrix` or `lora_rank1`.
        keys: names of the units; all vectors below follow their order.
        raw: I_k, the importance to this task as tracked; float64 [units].
        normalised: Norm(I_k) with the run's `normalisation`; float64 [units], in [0, 1].
        before: Ihat_{k-1}, the cumulative importance with which the task was merged; float64 [units], None at the
            first task.
        cumulative: Ihat_k, as stored: not normalised at the first task, where it is I_1; float64 [units].
        coefficients: c, 0 for the weights before the task, 1 for those after it; float64 [units], None at the first
            task, which is merged with nothing.
        cases: index into `skill_fusion.CASES`; int64 [units], None at the first task.
        options: all options of the method.
    """

    task: str
    index: int
    method: str
    scheme: str
    keys: list[str]
    raw: Tensor
    normalised: Tensor
    before: Tensor | None
    cumulative: Tensor
    coefficients: Tensor | None
    cases: Tensor | None
    options: dict[str, Any]

    def case_shares(self) -> dict[str, float]:
        """Share of the units in each case, `shared`, `past`, `current` and `neither`; empty at the first task."""
        from .skill_fusion import CASES

        if self.cases is None:
            return {}
        return {case: float((self.cases == CASES.index(case)).double().mean()) for case in SHOWN_CASES}

    def measures(self) -> dict[str, float]:
        """How peaked the scores and how mixed the coefficients are.

        Returns:
            `low`: share of the normalised scores below 0.05. `top`: share of the sum of the raw scores that the largest
            one holds. From the second task on also `half`: share of the coefficients within [0.45, 0.55], and `min`,
            `median`, `max` of the coefficients.
        """
        values = {"low": float((self.normalised < LOW).double().mean()), "top": float(self.raw.max() / self.raw.sum())}
        if self.coefficients is not None:
            c = self.coefficients
            values["half"] = float(((c >= HALF[0]) & (c <= HALF[1])).double().mean())
            values |= {"min": float(c.min()), "median": float(c.quantile(0.5)), "max": float(c.max())}
        return values


# Reading


def skill_method(run_dir: str | Path) -> str | None:
    """`tasl` or `kif` if the run trains with it, by the files of its tasks or else by its recipe; otherwise None."""
    return trained_with(run_dir, METHODS)


def trained_with(run_dir: str | Path, methods: Sequence[str]) -> str | None:
    """The first of `methods` that the run trains with, by the files of its tasks or else by its recipe; else None."""
    run_dir = Path(run_dir)
    for name in methods:
        if any(run_dir.glob(f"tasks/*/methods/{name}.*")):
            return name
    try:
        listed = yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8"))["methods"]
        names = [method["name"] for method in listed]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None  # reports do not need the recipe
    return next((name for name in methods if name in names), None)


def learnt_tasks(run: RunScores) -> Iterator[tuple[int, str, Path]]:
    """Place, name and folder of the methods' state of each learnt task."""
    for index, task in enumerate(run.tasks):
        folder = run.path / "tasks" / f"{index:02d}-{task}"
        # Behind the cursor every task is learnt; one more may be learnt and not yet scored.
        if index >= run.cursor and not folder.is_dir():
            return
        yield index, task, folder / "methods"


def read_skill_units(run_dir: str | Path) -> list[TaskUnits]:
    """The skill units of a run of TaSL or KIF, one entry a learnt task, in the order of the stream.

    Args:
        run_dir: the run directory; the run need not be finished.

    Raises:
        InputError: if there is no run, it trains with neither method, or a file is missing or cannot be understood.
    """
    run = load_run(run_dir)
    if skill_method(run_dir) is None:
        raise InputError(
            f"{run_dir}: the run has no skill units: it trains with none of the methods {', '.join(METHODS)}"
        )
    return read_run_units(run)


def read_run_units(run: RunScores) -> list[TaskUnits]:
    method = skill_method(run.path)
    if method is None:
        return []
    return [_read_task(folder, method, task, index) for index, task, folder in learnt_tasks(run)]


def _read_task(folder: Path, method: str, task: str, index: int) -> TaskUnits:
    from .importance import normalise
    from .run_state import read_json
    from .skill_fusion import unit_cases
    from .units import SCHEMES

    path = folder / f"{method}.json"
    record = read_json(path)
    try:
        options, state = dict(record["options"]), record["state"]
        quantile, kind = options["quantile"], options["normalisation"]
        keys, scheme = state["unit_keys_"]["value"], state["scheme_"]["value"]
        stored = {name: state[f"{name}_"]["kind"] == "tensor" for name in _VECTORS}
        right = record["method"] == method and scheme in SCHEMES
        right = right and isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        # A first task has nothing to be merged with, a later one has both.
        right = right and stored["raw"] and stored["cumulative"] and stored["before"] == stored["coefficients"]
    except (KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise foreign_state(path, method)
    vectors = _read_vectors(folder / f"{method}.safetensors", [name for name in _VECTORS if stored[name]], len(keys))
    raw, before = vectors["raw"], vectors.get("before")
    try:
        return TaskUnits(
            task=task,
            index=index,
            method=method,
            scheme=scheme,
            keys=keys,
            raw=raw,
            normalised=normalise(raw, kind),
            before=before,
            cumulative=vectors["cumulative"],
            coefficients=vectors.get("coefficients"),
            cases=None if before is None else unit_cases(raw, before, quantile, kind),
            options=options,
        )
    except InputError as error:
        raise InputError(f"{path} and the .safetensors file beside it: {error}") from error


_VECTORS = ("raw", "before", "cumulative", "coefficients")


def _read_vectors(path: Path, names: Iterable[str], units: int) -> dict[str, Tensor]:
    vectors = read_tensors(path, {name: f"{name}_" for name in names})
    for name, vector in vectors.items():
        if list(vector.shape) != [units] or not bool(vector.isfinite().all()):
            raise InputError(
                f"{path} was edited: {name}_ is no vector of finite numbers for the {units} units of the .json file "
                "beside it; restore both"
            )
    return vectors


def foreign_state(path: Path, method: str) -> InputError:
    return InputError(f"{path} is no state of method '{method}' after a task, or was edited; restore it")


def read_tensors(path: Path, keys: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors at `keys` alone, as float64: the file may hold weights as well.

    Raises:
        InputError: if the file is missing, cannot be read or lacks one of them.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise InputError(f"{path} is missing; restore it, or start again in another run directory")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(key).double() for name, key in keys.items()}
    except Exception as error:  # safetensors raises its own, which is no public class in every version
        raise InputError(f"{path} is truncated or was edited ({error}); restore it from a backup") from error
