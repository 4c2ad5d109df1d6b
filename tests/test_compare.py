"""Paired comparisons of runs written by hand: the intervals against numbers worked out another way."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from test_report import TASKS, write_run

from hf_continual.cli import main
from hf_continual.compare import _T_975, bootstrap, compare_runs, comparison_text, student_t
from hf_continual.errors import InputError
from hf_continual.metrics import METRICS
from hf_continual.run_scores import load_run


def run_of(root: Path, variant: str, seed: int | None, last: float, **queue) -> Path:
    """A finished run whose average performance is `last`, with the hashes a queue keeps."""
    R = [[0.8, 0.3, 0.1], [0.6, 0.9, 0.2], [last, last, last]]
    path = write_run(root / variant / f"seed-{seed}", R=R, variant=variant, seed=seed, **queue)
    state = json.loads((path / "queue.json").read_text())
    for task in state["tasks"]:
        task.setdefault("hash", f"train-{task['name']}")
    state.setdefault("evaluation", [{"task": name, "hash": f"eval-{name}"} for name in state["eval_tasks"]])
    (path / "queue.json").write_text(json.dumps(state))
    return path


def keep_predictions(path: Path, right, cell=None) -> None:
    """Predictions for each cell: `right(index, task)` gives the rows that are answered right; scores follow them."""
    lines = []
    for line in (path / "scores.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows = right(row["after_index"], row["task"])
        folder = "base" if row["after_index"] < 0 else f"tasks/{row['after_index']:02d}-{row['after_task']}"
        file = path / folder / "predictions" / f"{row['task']}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        answers = [
            {"index": i, "prediction": "yes" if ok else "no", "references": ["yes"]} for i, ok in enumerate(rows)
        ]
        file.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
        file.with_suffix(".json").write_text(json.dumps({"settings": {"scorer": "exact_match"}}))
        lines.append(json.dumps(row | {"score": float(np.mean(rows)), "n": len(rows)}))
    (path / "scores.jsonl").write_text("\n".join(lines) + "\n")


def test_quantiles_of_student_t():
    # The density between -t and t holds 95 %; the substitution x = sqrt(n) tan(u) makes the range finite.
    for freedom, quantile in _T_975.items():
        u = np.linspace(-np.pi / 2, np.pi / 2, 400_001)
        density = np.cos(u[1:-1]) ** (freedom - 1)  # the derivative of tan cancels two powers
        inside = np.abs(np.tan(u[1:-1]) * np.sqrt(freedom)) <= quantile
        assert density[inside].sum() / density.sum() == pytest.approx(0.95, abs=2e-4), freedom
    assert student_t(35) == student_t(30) and student_t(10_000) == student_t(120)
    with pytest.raises(ValueError, match="degree of freedom"):
        student_t(0)


def test_mean_interval_and_wins(tmp_path):
    for seed, naive, ewc in ((42, 0.50, 0.60), (43, 0.40, 0.55), (44, 0.60, 0.55)):
        run_of(tmp_path, "naive", seed, naive)
        run_of(tmp_path, "ewc", seed, ewc)
    (found,) = compare_runs([tmp_path], against="naive")
    assert (found.first, found.second, found.wins, found.losses) == ("naive", "ewc", 2, 1)
    assert [pair.seed for pair in found.pairs] == [42, 43, 44]
    d = np.array([0.10, 0.15, -0.05])
    assert found.mean == pytest.approx(d.mean())
    half = 4.303 * np.sqrt(((d - d.mean()) ** 2).sum() / 2 / 3)
    assert found.interval == pytest.approx((d.mean() - half, d.mean() + half))
    text = comparison_text([found])
    line = next(line for line in text.splitlines() if line.startswith("ewc"))
    assert line.split()[:5] == ["ewc", "3", "50.0", "56.7", "+6.7"] and "[-19.2, +32.5]" in line and "2/1" in line
    assert "no interval over seeds" not in text
    # The other way round everything changes its sign.
    (other,) = compare_runs([tmp_path], against="ewc")
    assert other.mean == pytest.approx(-found.mean) and (other.wins, other.losses) == (1, 2)


def test_less_forgetting_wins(tmp_path):
    a, b = run_of(tmp_path, "naive", 42, 0.5), run_of(tmp_path, "ewc", 42, 0.6)
    (found,) = compare_runs([a, b], metric="forgetting")
    assert found.first == "naive" and found.mean == pytest.approx(-0.1) and (found.wins, found.losses) == (1, 0)
    assert "less is better" in comparison_text([found])
    (found,) = compare_runs([a, b], metric="backward_transfer/divide_by_t")
    assert found.mean == pytest.approx(0.2 / 3) and (found.wins, found.losses) == (1, 0)


def test_equal_runs_neither_win_nor_lose(tmp_path):
    (found,) = compare_runs([run_of(tmp_path, "naive", 42, 0.5), run_of(tmp_path, "ewc", 42, 0.5)])
    assert found.mean == 0 and (found.wins, found.losses) == (0, 0)


def test_one_seed_has_no_interval_over_seeds(tmp_path):
    (found,) = compare_runs([run_of(tmp_path, "naive", 42, 0.5), run_of(tmp_path, "ewc", 42, 0.6)])
    assert found.interval is None and found.pairs[0].rows is None
    text = comparison_text([found])
    assert "With one seed no interval over seeds can be given" in text
    assert "no bootstrap over rows" in text and "is not there" in text


def test_what_is_left_out_is_named(tmp_path):
    for seed in (42, 43):
        run_of(tmp_path, "naive", seed, 0.5)
    for seed in (43, 44):
        run_of(tmp_path, "ewc", seed, 0.6)
    run_of(tmp_path, "lwf", 45, 0.7)
    run_of(tmp_path, "agem", 42, 0.7, finished=False, cursor=2)
    found = compare_runs([tmp_path], against="naive")
    assert [c.second for c in found] == ["ewc"] and [p.seed for p in found[0].pairs] == [43]
    text = comparison_text(found)
    assert "Not finished, left out: agem, seed 42 (2 of 3 tasks)" in text
    assert "ewc, not paired: seed 42 (ewc lacks it), seed 44 (naive lacks it)" in text
    assert "Left out: lwf has no seed in common with naive" in text


# Rows answered right after the last task: `naive` row 0 of 4, `ewc` rows 0 to 2.
def right(share):
    def rows(index, task):
        return [i < share for i in range(4)] if index == 2 else [i % 2 == 0 for i in range(4)]

    return rows


def test_bootstrap_over_rows(tmp_path):
    a, b = run_of(tmp_path, "naive", 42, 0.5), run_of(tmp_path, "ewc", 42, 0.6)
    keep_predictions(a, right(1))
    keep_predictions(b, right(3))
    (found,) = compare_runs([a, b])
    assert found.mean == pytest.approx(0.5)
    # A drawn row adds 1/4 of 1/3 where only one run is right: rows 1 and 2 of 4, so 12 draws of probability 1/2.
    generator = np.random.default_rng(1)
    expected = np.quantile(generator.binomial(12, 0.5, 200_000) / 12, [0.025, 0.975])
    assert found.pairs[0].rows == pytest.approx(tuple(expected))
    assert found.pairs[0].rows[0] < 0.5 < found.pairs[0].rows[1]
    # The same rows for both runs: a run against itself does not vary at all.
    run = load_run(a)
    assert bootstrap(run, run, METRICS["backward_transfer"]) == (0.0, 0.0)
    assert compare_runs([a, b], resamples=0)[0].pairs[0].rows is None


def test_bootstrap_uses_the_same_rows_for_every_moment(tmp_path):
    # Both moments of a task answer the same rows right, so backward transfer is 0 whatever is drawn.
    a, b = run_of(tmp_path, "naive", 42, 0.5), run_of(tmp_path, "ewc", 42, 0.6)
    for path in (a, b):
        keep_predictions(path, lambda index, task: [True, False, True, False])
    assert compare_runs([a, b], metric="backward_transfer")[0].pairs[0].rows == (0.0, 0.0)
    low, high = bootstrap(load_run(a), load_run(b), METRICS["average_performance"])
    assert low == high == 0.0


def test_predictions_that_do_not_fit_the_scores_are_named(tmp_path):
    a, b = run_of(tmp_path, "naive", 42, 0.5), run_of(tmp_path, "ewc", 42, 0.6)
    keep_predictions(a, right(1))
    keep_predictions(b, right(3))
    file = a / "tasks" / "02-amazon" / "predictions" / "yelp.jsonl"
    file.write_text(file.read_text().replace('"yes", "ref', '"no", "ref'))
    assert "not the mean over its rows" in compare_runs([a, b])[0].pairs[0].problem
    file.write_text("{")
    assert "cannot be read" in compare_runs([a, b])[0].pairs[0].problem


def test_another_scorer(tmp_path):
    a, b = run_of(tmp_path, "naive", 42, 0.5), run_of(tmp_path, "ewc", 42, 0.6)
    keep_predictions(a, right(1))
    keep_predictions(b, right(3))
    for path in (a, b):  # the scores of the file are of some other kind
        file = path / "scores.jsonl"
        file.write_text(file.read_text().replace("exact_match", "sari"))
    (found,) = compare_runs([a, b], scorer="exact_match")
    assert found.mean == pytest.approx(0.5) and found.pairs[0].rows is not None


def edit(path: Path, change) -> None:
    state = json.loads((path / "queue.json").read_text())
    change(state)
    (path / "queue.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s["evaluation"][1].update(hash="other"),
            "the evaluation rows of yelp differ, hash eval-yelp and ot",
        ),
        (lambda s: s["tasks"][2].update(hash="other"), "the training rows of amazon differ, hash train-amazon and ot"),
        (lambda s: s["tasks"][2].pop("hash"), "has no hash of the training rows of amazon"),
        (lambda s: s.pop("evaluation"), "has no hash of the evaluation rows of agnews"),
    ],
)
def test_other_data_is_refused(tmp_path, change, message):
    a, b = run_of(tmp_path, "naive", 42, 0.5), run_of(tmp_path, "ewc", 42, 0.6)
    edit(b, change)
    with pytest.raises(InputError, match=message) as error:
        compare_runs([a, b])
    assert "cannot be compared" in str(error.value) and "\n" not in str(error.value)


def test_other_tasks_are_refused(tmp_path):
    a = run_of(tmp_path, "naive", 42, 0.5)
    b = run_of(tmp_path, "ewc", 42, 0.6, tasks=TASKS[::-1])
    with pytest.raises(InputError, match="their tasks differ, agnews > yelp > amazon and amazon > yelp > agnews"):
        compare_runs([a, b])
    file = a / "scores.jsonl"
    file.write_text(file.read_text().replace('"exact_match"', '"rouge_l"'))
    c = run_of(tmp_path, "lwf", 42, 0.6)
    with pytest.raises(InputError, match="agnews is scored by rouge_l and exact_match; score both with --scorer"):
        compare_runs([a, c])


def test_a_joint_run_is_compared_by_average_performance(tmp_path):
    a = run_of(tmp_path, "naive", 42, 0.5)
    b = write_run(tmp_path / "joint", R=[[0.9, 0.8, 0.7]], baseline=None, variant=None, joint=True)
    edit(b, lambda s: s.update(evaluation=[{"task": name, "hash": f"eval-{name}"} for name in TASKS]))
    (found,) = compare_runs([a, b])
    assert found.second == "joint" and found.mean == pytest.approx(0.3)
    with pytest.raises(InputError, match="joint: forgetting needs one row for each task"):
        compare_runs([a, b], metric="forgetting")


def test_refusals(tmp_path):
    a = run_of(tmp_path, "naive", 42, 0.5)
    with pytest.raises(InputError, match="compare needs two finished runs; .*naive/seed-42 has 1"):
        compare_runs([a])
    b = run_of(tmp_path, "naive", 43, 0.5)
    with pytest.raises(InputError, match="needs runs of two variants; .* only have naive"):
        compare_runs([a, b])
    twice = run_of(tmp_path / "again", "naive", 42, 0.4)
    with pytest.raises(InputError, match="seed 42 of naive is there 2 times"):
        compare_runs([a, twice])
    assert len(compare_runs([a, a, run_of(tmp_path, "lwf", 42, 0.4)])) == 1  # the same run, named twice
    c = run_of(tmp_path, "ewc", 44, 0.6)
    with pytest.raises(InputError, match="no variant has a seed in common with naive"):
        compare_runs([a, c])
    with pytest.raises(InputError, match="--metric forgeting: it is unknown; did you mean 'forgetting'"):
        compare_runs([a, c], metric="forgeting")
    with pytest.raises(InputError, match="--against ewd: no such variant; did you mean 'ewc'"):
        compare_runs([a, c], against="ewd")
    with pytest.raises(InputError, match="no such directory"):
        compare_runs([tmp_path / "nothing", a])


def test_runs_without_a_seed(tmp_path):
    (found,) = compare_runs([run_of(tmp_path, "naive", None, 0.5), run_of(tmp_path, "ewc", None, 0.6)])
    assert found.mean == pytest.approx(0.1) and found.pairs[0].seed is None


def test_perplexity_is_better_when_smaller(tmp_path):
    paths = [run_of(tmp_path, "naive", 42, 9.0), run_of(tmp_path, "ewc", 42, 8.0)]
    for path in paths:
        file = path / "scores.jsonl"
        file.write_text(file.read_text().replace('"exact_match"', '"perplexity"'))
    (found,) = compare_runs(paths)
    assert found.wins == 1 and found.mean == pytest.approx(math.log(9 / 8))  # in nats, of which more is better
    with pytest.raises(InputError, match="forgetting/mammoth is for scores from 0 to 1"):
        compare_runs(paths, metric="forgetting/mammoth")
    for path in paths:
        lines = (path / "scores.jsonl").read_text().splitlines()
        mixed = [line.replace("perplexity", "accuracy") if '"task": "yelp"' in line else line for line in lines]
        (path / "scores.jsonl").write_text("\n".join(mixed))
    with pytest.raises(InputError, match="some tasks are scored by perplexity, where less is better"):
        compare_runs(paths)


def test_command_line(tmp_path, capsys):
    a, b = run_of(tmp_path, "naive", 42, 0.5), run_of(tmp_path, "ewc", 42, 0.6)
    assert main(["compare", str(a), str(b), "--metric", "forgetting"]) == 0
    assert "forgetting against naive, percent (less is better), paired by seed" in capsys.readouterr().out
    assert main(["compare", str(a), str(b), "--metric", "F"]) == 0
    assert "forgetting against naive" in capsys.readouterr().out
    assert main(["compare", str(tmp_path), "--against", "ewc"]) == 0
    assert "average_performance against ewc" in capsys.readouterr().out
    edit(b, lambda s: s["evaluation"][1].update(hash="other"))
    for command in (
        ["compare", str(a), str(b)], ["compare", str(a)], ["compare", str(a), str(b), "--metric", "APP"],
        ["compare"], ["report", str(a), "--convention", "sept"], ["compare", str(a), str(b), "--alpha", "0.1"],
    ):  # fmt: skip
        assert main(command) == 2, command
        shown = capsys.readouterr()
        assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and not shown.out.strip(), command
    assert main(["report", str(a), "--convention", "sapt-code"]) == 0
    assert "Where conventions differ:" in capsys.readouterr().out
