"""Merging two stored adapters or models unit by unit, with stored importance and without loading a model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import InputError
from .lora import ADAPTER_WEIGHTS, stored_name
from .methods.base import ContinualMethod, make_method, method_class
from .methods.weight_ensemble import WeightEnsemble
from .run_state import disk_full, read_json, write_json
from .skill_fusion import CASES, SkillFusion, unit_cases
from .units import SkillUnits, fuse

ADAPTER_CONFIG = "adapter_config.json"
MERGERS = ("tasl", "kif", "weight_ensemble", "weight_ema", "fisher_merge")
SAME_CONFIG = (
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
)


@dataclass
class Importance:
    """The stored scores of one task.

    Attributes:
        path: of the file.
        method: that stored them.
        keys: of the units, in the order of the scores.
        sizes: weights in each unit.
        scheme: of the units.
        raw: I_k, float64 [units].
        before: Ihat_{k-1} with which the task was merged, or None at the first task.
        cumulative: Ihat_k.
        options: of the method that stored them.
        unmerged: the task's weights before its merge by stored name, if they were kept.
    """

    path: Path
    method: str
    keys: list[str]
    sizes: list[int]
    scheme: str
    raw: Tensor
    before: Tensor | None
    cumulative: Tensor
    options: dict[str, Any]
    unmerged: dict[str, Tensor]


def read_importance(path: str | Path, method: str | None = None) -> Importance:
    """Read the importance that TaSL or KIF has stored.

    Args:
        path: a task's folder in a run directory, its `methods` folder, or the `.json` or `.safetensors` file there.
        method: whose, where a folder holds several.

    Raises:
        InputError: if there is none, or if it is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"--importance {path}: there is no such file or folder; give a task's folder of a tasl or kif run"
        )
    if path.is_dir():
        folder = path / "methods" if (path / "methods").is_dir() else path
        files = [f for f in sorted(folder.glob("*.json")) if "scheme_" in (_json(f).get("state") or {})]
        files = [f for f in files if f.stem == method] or files
        if not files:
            raise InputError(
                f"--importance {path}: it holds no importance of skill units (a .json and a .safetensors file of tasl "
                "or kif); give a task's folder of such a run"
            )
        path = files[0]
    path = path.with_suffix(".json")
    record = _json(path)
    try:
        state = record["state"]
        tensors = load_file(str(path.with_suffix(".safetensors")))
        keys, scheme = state["unit_keys_"]["value"], state["scheme_"]["value"]
        sizes, method = state["unit_sizes_"]["value"], record["method"]
        raw, cumulative, before = tensors["raw_"], tensors["cumulative_"], tensors.get("before_")
        if any(t is not None and t.shape != (len(keys),) for t in (raw, cumulative, before)):
            raise ValueError(f"{len(keys)} units and {len(raw)} scores")
    except FileNotFoundError as error:
        raise InputError(f"--importance: {path.with_suffix('.safetensors')} is missing") from error
    except (KeyError, TypeError, ValueError, SafetensorError, OSError) as error:
        raise InputError(f"--importance: {path} holds no readable importance of skill units ({error})") from error
    unmerged = {k.removeprefix("unmerged_/"): v for k, v in tensors.items() if k.startswith("unmerged_/")}
    adapters = _adapters_in(unmerged)
    unmerged = {stored_name(name, adapters): value for name, value in unmerged.items()}
    options = dict(record.get("options") or {})
    return Importance(path, str(method), list(keys), list(sizes), scheme, raw, before, cumulative, options, unmerged)


def _adapters_in(names: Mapping[str, Any]) -> set[str]:
    """Names of adapters that occur in parameter names."""
    parts = [name.split(".") for name in names]
    containers = {
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "modules_to_save",
        "trainable_tokens_delta",
    }
    return {p[i + 1] for p in parts for i in range(len(p) - 1) if p[i] in containers}


def _json(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} is truncated or was edited; restore it")
    return value


class StoredWeights:
    """The weights of an adapter or a model on disk, read as they are needed.

    Args:
        folder: in PEFT's or transformers' layout, or a task's folder in a run directory.
        option: named in errors.
    """

    def __init__(self, folder: str | Path, option: str) -> None:
        self.option, self.given = option, Path(folder)
        root = self.given
        homes = [f for f in (root, root.parent) if (f / "model.json").is_file() and (f / "methods").is_dir()]
        self.task: Path | None = homes[0] if homes else None
        """The task's folder of a run that this is, or lies in."""
        if self.task == root:
            root = root / "adapter" if (root / "adapter").is_dir() else root / "model"
        self.folder = root
        index = root / "model.safetensors.index.json"
        if (root / ADAPTER_WEIGHTS).is_file():
            names = [ADAPTER_WEIGHTS]
        elif index.is_file():
            names = sorted(set(_json(index).get("weight_map", {}).values()))
        else:
            names = ["model.safetensors"]
        self.files = [root / name for name in names]
        for file in self.files:
            if not file.is_file():
                raise InputError(
                    f"{option} {folder}: '{file.name}' is not there; give a folder with an adapter "
                    f"({ADAPTER_WEIGHTS}) or a model (model.safetensors)"
                )
        self.config = _json(root / ADAPTER_CONFIG) if (root / ADAPTER_CONFIG).is_file() else {}
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}
        try:
            for file in self.files:
                handle = self._stack.enter_context(safe_open(str(file), framework="pt"))
                self._where |= dict.fromkeys(handle.keys(), handle)
        except SafetensorError as error:
            raise InputError(f"{option} {file}: it is no readable safetensors file ({error})") from error

    def __enter__(self) -> StoredWeights:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._where.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)  # type: ignore[no-any-return]


def merge_offline(
    method: Any,
    previous: str | Path,
    current: str | Path,
    importance: Sequence[str | Path],
    out: str | Path,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Merge two adapters, or two models, as TaSL, KIF or the weight ensemble would after a task.

    Args:
        method: `tasl`, `kif` or `weight_ensemble`.
        previous: folder with the weights before the task: an adapter, a model, or a task's folder of a run.
        current: folder with the weights learnt from there, not yet merged; a task's folder if its method had
            `keep_unmerged`.
        importance: where the scores of the task are and, if those hold none of the past, where those of the task before
            are; see `read_importance`. Empty for `weight_ensemble`.
        out: a new folder; it appears whole or not at all.
        options: of the method; by default those that are stored with the importance.

    Returns:
        What is also written to `merge.json`: method, options, units, shares of the four cases.

    Raises:
        InputError: if anything does not fit, naming the first key that differs.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"-o {out}: it is a file or a folder that is not empty; give a new folder")
    name = method if isinstance(method, str) else str(method)
    scores = [read_importance(path, name) for path in importance]
    made = _method(name, scores, dict(options or {}))
    with StoredWeights(previous, "--previous") as before, StoredWeights(current, "--current") as after:
        unmerged = _unmerged(after, scores)
        shapes = before.shapes()
        own = {**after.shapes(), **{k: tuple(v.shape) for k, v in unmerged.items()}}
        _check_fit(before, after, shapes, own)
        units, coefficients, aliases, summary = _coefficients(made, scores, before, after, unmerged, own)
        unmerged |= {key: unmerged[other] for key, other in aliases.items() if other in unmerged}
        temporary = out.with_name(f".{out.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            for file in after.folder.iterdir():  # configuration, tokenizer; no weights and no checkpoints
                if file.is_file() and file.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
                    shutil.copy(file, temporary)
            for file in after.files:
                _merge_file(made, units, coefficients, before, file, unmerged, temporary / file.name)
            write_json(temporary / "merge.json", summary)
            if out.exists():
                out.rmdir()
            temporary.replace(out)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) and not disk_full(error):
                raise InputError(f"-o {out}: it cannot be written ({error.strerror}); give another folder") from error
            raise
    return summary


def _method(name: str, scores: Sequence[Importance], options: dict[str, Any]) -> ContinualMethod[Any]:
    if name not in ("tasl", "kif", "weight_ensemble"):
        raise InputError(f"--method {name}: only tasl, kif and weight_ensemble can merge stored weights")
    if (name == "weight_ensemble") == bool(scores):
        wants = "takes no --importance" if scores else "needs --importance, the scores of the task"
        raise InputError(f"--method {name} {wants}")
    known = vars(method_class(name).config_class())
    for option in options:
        if option in known and option not in FUSION_OPTIONS:
            raise InputError(
                f"--options: {option} acts while a task is learnt and not on the merge of stored weights; leave it out "
                f"(what can be given: {', '.join(o for o in FUSION_OPTIONS if o in known)})"
            )
    if scores:
        stored = scores[0].options if scores[0].method == name else {}
        options = {**stored, "units": scores[0].scheme, **options}
    return make_method({"name": name, **options})


FUSION_OPTIONS = ("fusion", "temperature", "quantile", "shared", "normalisation", "space", "coefficient")
"""What a merge of stored weights depends on; all other options act while a task is learnt."""


def _unmerged(after: StoredWeights, scores: Sequence[Importance]) -> dict[str, Tensor]:
    """What was learnt before the merge, where `--current` belongs to a task of a run that merged it."""
    if after.task is None:
        return {}
    records = [_json(file) for file in (after.task / "methods").glob("*.json")]
    own = [r for r in records if scores and r.get("method") == scores[0].method and "scheme_" in (r.get("state") or {})]
    if own and not torch.equal(scores[0].raw, read_importance(after.task, scores[0].method).raw):
        raise InputError(
            f"--importance {scores[0].path}: it is not the importance of the task in --current {after.given}; name "
            "that task's folder"
        )
    mergers = [r["method"] for r in records if r.get("method") in MERGERS and _tasks_done(r) > 1]
    if not mergers:
        return {}  # learnt without a merging method, or the first task
    given = scores[0] if scores and scores[0].unmerged and scores[0].method in mergers else None
    if given is not None:
        return given.unmerged
    raise InputError(
        f"--current {after.given}: its weights were merged by '{mergers[0]}' already; give the weights from before the "
        "merge, or run with keep_unmerged: true, which stores them with the importance"
    )


def _tasks_done(record: Mapping[str, Any]) -> int:
    return int((record.get("state", {}).get("tasks_done_") or {}).get("value") or 0)


def _check_fit(
    before: StoredWeights, after: StoredWeights, shapes: Mapping[str, Any], own: Mapping[str, tuple[int, ...]]
) -> None:
    if bool(before.config) != bool(after.config):
        raise InputError(
            f"{before.option} {before.given} and {after.option} {after.given}: one holds an adapter and the other a "
            "whole model; give two of a kind"
        )
    for name in sorted({*shapes, *own}):
        if shapes.get(name) != own.get(name):
            sides = [f"{list(s[name])}" if name in s else "nothing" for s in (shapes, own)]
            raise InputError(
                f"{before.option} and {after.option} do not fit: '{name}' is {sides[0]} in {before.given} and "
                f"{sides[1]} in {after.given}; merge weights of the same model, rank and target modules"
            )
    for key in SAME_CONFIG:
        if before.config.get(key) != after.config.get(key):
            raise InputError(
                f"{before.option} and {after.option} do not fit: '{key}' of {ADAPTER_CONFIG} is "
                f"{before.config.get(key)!r} and {after.config.get(key)!r}"
            )
    if before.config.get("use_dora"):
        raise InputError(f"{before.option} {before.given}: DoRA cannot be split into skill units; use plain LoRA")


def _coefficients(
    method: ContinualMethod[Any],
    scores: Sequence[Importance],
    before: StoredWeights,
    after: StoredWeights,
    unmerged: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[SkillUnits, Tensor, dict[str, str], dict[str, Any]]:
    """The units of the files, their coefficients, other names of tied weights, and a summary."""
    summary: dict[str, Any] = {"method": method.name, "options": method.options()}
    summary |= {"previous": str(before.given), "current": str(after.given)}
    if isinstance(method, WeightEnsemble):
        units = SkillUnits.of_shapes(shapes, "matrix", method=method.name)
        return units, torch.full((len(units),), float(method.config.coefficient), dtype=torch.float64), {}, summary
    assert isinstance(method, SkillFusion)
    record = scores[0]
    past, past_keys = record.before, record.keys
    if len(scores) > 1:
        past, past_keys = scores[1].cumulative, scores[1].keys
    if past is None:
        raise InputError(
            f"--importance {record.path}: it belongs to the first task of its run and holds no importance of the past; "
            "name the file of the task before as well: --importance CURRENT PREVIOUS"
        )
    units = SkillUnits.of_shapes(shapes, record.scheme, method=method.name, min_ndim=method.config.min_ndim)
    known = dict(zip(record.keys, record.sizes, strict=True))
    mine = dict(zip(units.keys, units.sizes, strict=True))
    # What has no score is frozen, the same in both, or another name of tied weights.
    aliases: dict[str, str | None] = {}
    tied = bool(after.config.get("ensure_weight_tying"))
    for key in [k for k in mine if k not in known]:
        aliases[key] = _alias(key, known, shapes, before, after, unmerged)
        frozen = key in shapes and torch.equal(before[key], unmerged[key] if key in unmerged else after[key])
        if aliases[key] is None and not frozen:
            raise InputError(
                f"--importance {record.path} belongs to another model: it has no score of '{key}', which "
                f"{after.given} has"
                + ("; tied adapters (ensure_weight_tying) cannot be merged offline" if tied else "")
            )
    for keys, path in ((record.keys, record.path), (past_keys, scores[-1].path)):
        missing = next((k for k in keys if k not in mine), None) or next((k for k in known if k not in set(keys)), None)
        if missing is not None:
            raise InputError(
                f"--importance {path} belongs to another model: '{missing}' is in only one of it and {after.given}"
            )
    for key, size in known.items():
        if mine[key] != size:
            raise InputError(
                f"--importance {record.path} belongs to another model: '{key}' has {size} weights there and "
                f"{mine[key]} in {after.given}"
            )
    if len(scores) > 1 and record.before is not None:
        order = torch.tensor([past_keys.index(key) for key in record.keys])
        if not torch.equal(record.before, past[order]):
            raise InputError(
                f"--importance {scores[1].path}: its cumulative importance is not the one that {record.path} was "
                "merged with; give the task before that one, or leave it out"
            )
    place = {key: i for i, key in enumerate(past_keys)}
    raw, past = record.raw, past[torch.tensor([place[key] for key in record.keys])]
    try:
        c = method.fusion_coefficients(raw, past)
        cases = unit_cases(raw, past, method.config.quantile, method.config.normalisation)
    except InputError as error:
        raise InputError(f"--importance {record.path}: {error}") from error
    counts = torch.bincount(cases, minlength=len(CASES)).tolist()
    place = {key: i for i, key in enumerate(record.keys)}
    values = {}
    for key in units.keys:
        scored = aliases.get(key, key)
        values[key] = c[place[scored]].item() if scored is not None else 1.0  # frozen: makes no difference
    coefficients = torch.tensor(list(values.values()), dtype=c.dtype)
    summary |= {"importance": [str(s.path) for s in scores], "units": len(units), "scheme": units.scheme}
    summary |= {"hash": units.digest, "shares": dict(zip(CASES, [n / len(cases) for n in counts], strict=True))}
    return units, coefficients, {key: other for key, other in aliases.items() if other is not None}, summary


def _alias(
    key: str,
    known: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    before: StoredWeights,
    after: StoredWeights,
    unmerged: Mapping[str, Tensor],
) -> str | None:
    """The scored weight of which `key` is another name, as of tied embeddings."""
    if key not in shapes:
        return None
    for other in known:
        if other != key and shapes.get(other) == shapes[key] and torch.equal(before[other], before[key]):
            mine, theirs = (unmerged[k] if k in unmerged else after[k] for k in (key, other))
            if torch.equal(mine, theirs) or (other in unmerged and key not in unmerged):
                return other
    return None


def _merge_file(
    method: ContinualMethod[Any],
    units: SkillUnits,
    coefficients: Tensor,
    before: StoredWeights,
    file: Path,
    unmerged: Mapping[str, Tensor],
    target: Path,
) -> None:
    """Merge the weights of one file; a model of many files is never in memory as a whole."""
    with safe_open(str(file), framework="pt") as handle:
        metadata = handle.metadata()
        names = list(handle.keys())
        current = {name: unmerged[name] if name in unmerged else handle.get_tensor(name) for name in names}
    part = SkillUnits(units.scheme, [p for p in units.pieces if p.name in current], units.keys)
    previous = {name: before[name] for name in names}
    merge = method.fuse if isinstance(method, SkillFusion) else fuse
    merged = merge(part, previous, current, coefficients)
    save_file({name: merged[name].contiguous() for name in names}, str(target), metadata=metadata)


def describe(summary: Mapping[str, Any]) -> str:
    """One line on a merge."""
    shares = summary.get("shares")
    text = ", ".join(f"{case} {100 * share:.0f} %" for case, share in shares.items()) if shares else "one coefficient"
    options = summary["options"]
    replays = options.get("replay_ratio") or options.get("replay_count")
    note = "; the replay phase that follows a merge in a run is not part of this" if replays else ""
    return f"{summary['method']}: {summary.get('units', 'all')} units ({text}){note}"
