"""Scorers: from kept predictions to a score, each named, with formula and source, and without the network.

`score(name, rows)` scores rows with `prediction` and `references` (and what `SCORERS[name].columns` names): one value
for the task and, where it has a meaning, one for each row. All lie in [0, 1] but for perplexity. `load(name)` gives
the same scorer as an `evaluate.Metric`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, did_you_mean
from .base import Row, Scorer, Scores, check_rows, each_row, outside_labels, references_of
from .classification import joint_goal_accuracy, macro_f1, micro_f1
from .code_tests import code_ready, pass_at
from .exact_match import (
    exact_match,
    exact_match_casefold,
    exact_match_olora,
    exact_match_plain,
    exact_match_seekr,
    exact_match_squad,
    exact_match_tasl,
    exact_match_trace,
    extract_answer,
    first_letter,
    first_letter_seekr,
    label_likelihood,
    normalize_answer,
    normalize_squad,
    normalize_tasl,
    of_extracted_answer,
    plain,
)
from .likelihood import perplexity
from .sari import sari, sari_trace
from .text_overlap import edit_ready, edit_similarity, edit_similarity_trace, rouge_l, rouge_l_trace, rouge_ready

__all__ = ["METRIC_FILE", "SCORERS", "Scorer", "Scores", "check_rows", "get", "load", "lower_is_better", "of_metric",
           "references_of", "score"]  # fmt: skip

METRIC_FILE = str(Path(__file__).with_name("metric.py"))
"""The file `evaluate.load(METRIC_FILE, name)` takes."""

SCORERS: dict[str, Scorer] = {
    scorer.name: scorer
    for scorer in (
        Scorer(
            "exact_match",
            each_row(exact_match),
            "O-LoRA and MIGU, src/compute_metrics.py, but for MNLI's rows without a label",
            same=normalize_answer,
        ),
        *(
            Scorer(name, each_row(exact_match_olora), f"{paper}, src/compute_metrics.py", same=normalize_answer)
            for name, paper in (
                ("exact_match_olora", "O-LoRA"),
                ("exact_match_migu", "MIGU"),
                ("exact_match_sapt", "SAPT"),
            )
        ),
        Scorer("exact_match_plain", each_row(exact_match_plain), "string equality", same=plain),
        Scorer(
            "exact_match_squad",
            each_row(exact_match_squad),
            "SQuAD, Rajpurkar et al. 2016, evaluation script v1.1",
            same=normalize_squad,
        ),
        Scorer("exact_match_tasl", each_row(exact_match_tasl), "TaSL, eval_avgJGA.py", same=normalize_tasl),
        Scorer("exact_match_casefold", each_row(exact_match_casefold), "AimMerging, SuperNI", same=str.casefold),
        Scorer("exact_match_trace", each_row(exact_match_trace), "TRACE, metrics.py: accuracy", same=plain),
        Scorer(
            "exact_match_seekr",
            each_row(exact_match_seekr),
            "SEEKR, answer extraction of re_eval.py, then TRACE's accuracy",
            same=extract_answer,
        ),
        Scorer("first_letter", each_row(first_letter), "TRACE, eval_ScienceQA.py"),
        Scorer("first_letter_seekr", each_row(first_letter_seekr), "SEEKR, re_eval.py: C-STANCE, FOMC and ScienceQA"),
        Scorer(
            "label_likelihood",
            each_row(label_likelihood),
            "Brown et al. 2020, section 2.4, without normalisation",
            metric="accuracy",
            answers="labels",
            same=plain,
        ),
        Scorer(
            "rouge_l",
            each_row(rouge_l),
            "Lin 2004; the package rouge-score, as in Super-NaturalInstructions, O-LoRA and SAPT",
            ready=rouge_ready,
        ),
        Scorer("rouge_l_trace", each_row(rouge_l_trace), "TRACE, metrics.py, with the package rouge 1.0.1"),
        Scorer(
            "rouge_l_seekr",
            of_extracted_answer(each_row(rouge_l_trace)),
            "SEEKR, answer extraction of re_eval.py, then TRACE's ROUGE-L",
        ),
        Scorer(
            "sari",
            sari,
            "Xu et al. 2016, with 0/0 = 1 and the corrected recall of the metric in `evaluate`",
            columns=("source",),
        ),
        Scorer("sari_trace", sari_trace, "TRACE, eval_20Minuten.py", columns=("prompt",)),
        Scorer(
            "sari_seekr",
            of_extracted_answer(sari_trace),
            "SEEKR, answer extraction of re_eval.py, then TRACE's SARI",
            columns=("prompt",),
        ),
        Scorer("edit_similarity", each_row(edit_similarity), "rapidfuzz, fuzz.ratio", ready=edit_ready),
        Scorer(
            "edit_similarity_trace",
            each_row(edit_similarity_trace),
            "TRACE, eval_Py150.py, with fuzzywuzzy's fuzz.ratio",
            ready=edit_ready,
        ),
        Scorer(
            "edit_similarity_seekr",
            of_extracted_answer(each_row(edit_similarity_trace)),
            "SEEKR, answer extraction of re_eval.py, then TRACE's edit similarity",
            ready=edit_ready,
        ),
        Scorer(
            "joint_goal_accuracy",
            joint_goal_accuracy,
            "TaSL, eval_avgJGA.py, on Schema-Guided Dialogue",
            columns=("dialogue", "turn"),
            together=("dialogue", "turn"),
        ),
        Scorer("macro_f1", macro_f1, "scikit-learn, f1_score(average='macro'); DAS", same=normalize_answer),
        Scorer("micro_f1", micro_f1, "scikit-learn, f1_score(average='micro'); DAS", same=normalize_answer),
        Scorer(
            "perplexity",
            perplexity,
            "Jelinek et al. 1977, over tokens",
            columns=("text_log_likelihood",),
            optional=("tokens", "domain"),
            answers="tokens",
            uses_references=False,
            bounded=False,
            higher_is_better=False,
        ),
        *(
            Scorer(
                f"pass_at_{k}",
                pass_at(k),
                "Chen et al. 2021 (Codex, HumanEval), Eq. 1",
                columns=("test",),
                optional=("prefix", "entry_point"),
                answers="code",
                uses_references=False,
                samples=k,
                ready=code_ready,
            )
            for k in (1, 10, 100)
        ),
    )
}


def get(name: str, where: str = "scorer") -> Scorer:
    """The scorer of that name.

    Args:
        where: the option that names it, for the message.

    Raises:
        InputError: if there is none, with the nearest name.
    """
    if not isinstance(name, str) or name not in SCORERS:
        raise InputError(f"{where}={name!r} is unknown{did_you_mean(str(name), SCORERS)}")
    return SCORERS[name]


def of_metric(metric: str) -> Scorer | None:
    """The scorer whose number has this name; None if it is of no scorer here."""
    return next((scorer for scorer in SCORERS.values() if (scorer.metric or scorer.name) == metric), None)


def lower_is_better(metric: str) -> bool:
    """Whether less of this number is better; of a name that no scorer here has, more."""
    scorer = of_metric(metric)
    return scorer is not None and not scorer.higher_is_better


def score(name: str, rows: Sequence[Row], labels: Sequence[str] | None = None, where: str = "") -> Scores:
    """Score rows with predictions.

    Args:
        labels: the possible answers, if they are known. Answers outside them are counted in the details and shown by
            `predictions_outside_labels` and `references_outside_labels`; they are no error.
        where: the file or the task the rows are of, for messages.

    Raises:
        InputError: for an unknown scorer, no rows, or a row it cannot score.
    """
    scorer = get(name)
    if not rows:
        raise InputError(f"{f'{where}: ' if where else ''}there are no predictions to score; give the task "
                         "evaluation rows")  # fmt: skip
    checked = check_rows(scorer, rows, where)
    scorer.ready()
    found = scorer.function(checked, labels)
    if labels and scorer.same is not None:
        found.details |= outside_labels(checked, labels, scorer.same)
    return found


def load(name: str, **options: Any) -> Any:
    """The scorer as an `evaluate.Metric`, made here: `load("sari").compute(predictions=..., references=..., ...)`.

    Args:
        options: as of `evaluate.load`, such as `cache_dir` or `experiment_id`; `keep_in_memory` is on.
    """
    get(name)
    from .metric import ContinualScorer  # brings evaluate and datasets, which scoring does without

    return ContinualScorer(config_name=name, **{"keep_in_memory": True, **options})
