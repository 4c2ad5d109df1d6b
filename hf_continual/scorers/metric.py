"""Every scorer as an `evaluate.Metric`, chosen by the name of its configuration.

`hf_continual.scorers.load("sari")` makes one, and so does `evaluate.load(hf_continual.scorers.METRIC_FILE, "sari")`.
Neither needs the network. `evaluate` copies this file elsewhere, hence no relative imports.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_continual import scorers

CITATION = "hf_continual, after the sources named in the description"


class ContinualScorer(evaluate.Metric):
    """`compute(predictions=..., references=..., <columns>)` gives the score and its details."""

    def _info(self) -> evaluate.MetricInfo:
        scorer = scorers.get(self.config_name)
        inputs: dict[str, Any] = {}
        if scorer.answers != "tokens":
            inputs["predictions"] = _TEXT
        if scorer.uses_references:
            inputs["references"] = _TEXT
        inputs |= {column: _FEATURES[column] for column in scorer.columns}
        return evaluate.MetricInfo(
            description=f"{scorer.function.__doc__}\n\nSource: {scorer.source}",
            citation=CITATION,
            inputs_description=f"Inputs: {', '.join(inputs)}; optional: {', '.join((*scorer.optional, 'labels'))}.",
            features=_choices(inputs),
        )

    def _compute(self, **inputs: Any) -> dict[str, float]:
        scorer = scorers.get(self.config_name)
        names = {"predictions": "prediction", "references": "references"}
        labels = inputs.pop("labels", None)
        columns = {names.get(key, key): values for key, values in inputs.items() if values is not None}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        found = scorers.score(self.config_name, rows, labels)
        return {scorer.metric or scorer.name: found.value, **found.details}


_TEXT = "text"
_STRING = datasets.Value("string")
_FEATURES = {
    "source": _STRING,
    "prompt": _STRING,
    "dialogue": _STRING,
    "turn": _STRING,
    "test": _STRING,
    "text_log_likelihood": datasets.Value("float64"),
    "tokens": datasets.Value("int64"),
}


def _choices(inputs: dict[str, Any]) -> list[datasets.Features]:
    """Texts may be strings or lists of strings: one choice of features for each, lists first."""
    kinds = {"predictions": [_STRING, datasets.Sequence(_STRING)], "references": [datasets.Sequence(_STRING), _STRING]}
    choices = [datasets.Features()]
    for name, feature in inputs.items():
        options = kinds[name] if feature is _TEXT else [feature]
        choices = [datasets.Features({**choice, name: option}) for choice in choices for option in options]
    return choices
