"""Reports read run directories: `queue.json` and `scores.jsonl`, written here by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hf_continual.errors import InputError
from hf_continual.metrics import CONVENTIONS
from hf_continual.report import (
    convention_table,
    differences_table,
    find_runs,
    load_run,
    matrix_table,
    plot_comparison,
    plot_matrix,
    print_report,
    summary_table,
    write_report,
)

TASKS = ["agnews", "yelp", "amazon"]
R = [[0.8, 0.3, None], [0.6, 0.9, 0.2], [0.5, 0.7, 0.6]]
BASE = [0.2, 0.1, 0.1]


def write_run(
    path: Path, R=R, baseline=BASE, tasks=TASKS, variant="naive", seed=42, finished=True, cursor=None, **queue
):
    path.mkdir(parents=True)
    train = ["joint"] if queue.get("joint") else tasks
    state = {
        "tasks": [{"name": name} for name in train],
        "eval_tasks": tasks,
        "seed": seed,
        "variant": variant,
        "finished": finished,
        "cursor": len(train) if cursor is None else cursor,
        **queue,
    }
    (path / "queue.json").write_text(json.dumps(state))
    rows = ([(-1, "base", baseline)] if baseline else []) + [(i, train[i], row) for i, row in enumerate(R)]
    with open(path / "scores.jsonl", "w") as file:
        for index, after, scores in rows:
            for j, score in enumerate(scores):
                cell = {"after_task": after, "after_index": index, "task": tasks[j], "task_index": j}
                cell |= {"metric": "exact_match", "score": score, "n": 100, "others": {}}
                if score is not None:
                    file.write(json.dumps(cell) + "\n")
    return path


def write_comparison(root: Path):
    write_run(root / "naive" / "seed-42")
    write_run(root / "naive" / "seed-43", R=[[0.8, 0.3, None], [0.6, 0.9, 0.2], [0.7, 0.9, 0.8]], seed=43)
    write_run(root / "joint" / "seed-42", R=[[0.9, 0.8, 0.7]], variant=None, joint=True)
    write_run(root / "ewc" / "seed-42", R=[[0.8]], variant="ewc", finished=False, cursor=1)
    return root


def words(line):
    return line.split()


def image(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return imread(path)


def test_load_run(tmp_path):
    run = load_run(write_run(tmp_path / "run", versions={"torch": "2.13"}))
    np.testing.assert_array_equal(run.R, np.array(R, dtype=float))
    np.testing.assert_array_equal(run.baseline, BASE)
    assert (run.variant, run.seed, run.tasks, run.eval_tasks) == ("naive", 42, TASKS, TASKS)
    assert run.metrics == dict.fromkeys(TASKS, "exact_match") and run.sizes == dict.fromkeys(TASKS, 100)
    assert run.finished and run.cursor == 3 and not run.joint and run.versions == {"torch": "2.13"}


def test_load_joint_run(tmp_path):
    run = load_run(write_run(tmp_path / "run", R=[[0.9, 0.8, 0.7]], baseline=None, joint=True, variant=None))
    assert run.joint and run.tasks == ["joint"] and run.eval_tasks == TASKS
    assert run.R.shape == (1, 3) and run.baseline is None and run.label == "joint"


def test_columns_follow_the_training_order(tmp_path):
    path = write_run(tmp_path / "run")
    queue = json.loads((path / "queue.json").read_text())
    (path / "queue.json").write_text(json.dumps(queue | {"eval_tasks": TASKS[::-1]}))
    np.testing.assert_array_equal(load_run(path).R, np.array(R, dtype=float))


def test_later_line_of_a_cell_counts(tmp_path):
    path = write_run(tmp_path / "run")
    line = (path / "scores.jsonl").read_text().splitlines()[-1]
    with open(path / "scores.jsonl", "a") as file:
        file.write(json.dumps(json.loads(line) | {"score": 0.65}) + "\n")
    assert load_run(path).R[2, 2] == 0.65


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"unreadable line 12 \(not JSON"),
        ("[1, 2]", "unreadable line 12"),
        ('{"after_task": "yelp"}', r"unreadable line 12 \(no key 'task'\)"),
        ({"score": None}, "unreadable line 12"),
        ({"task": "dbpedia"}, "unreadable line 12: queue.json has no task 'dbpedia'"),
        ({"after_index": 3}, "after_index is 3, but the run has 3 tasks"),
        ({"after_index": 0}, "after_task is 'amazon', but task 0 of queue.json is 'agnews'"),
    ],
)
def test_unreadable_scores(tmp_path, line, message):
    path = write_run(tmp_path / "run")
    good = (path / "scores.jsonl").read_text().splitlines()
    assert len(good) == 11
    with open(path / "scores.jsonl", "a") as file:
        file.write((line if isinstance(line, str) else json.dumps(json.loads(good[-1]) | line)) + "\n")
    with pytest.raises(InputError, match=message):
        load_run(path)


def test_no_run(tmp_path):
    with pytest.raises(InputError, match="no such run"):
        load_run(tmp_path / "nothing")
    with pytest.raises(InputError, match="no such directory"):
        find_runs(tmp_path / "nothing")
    with pytest.raises(InputError, match="no run here"):
        write_report(tmp_path)
    path = write_run(tmp_path / "run")
    (path / "scores.jsonl").unlink()
    with pytest.raises(InputError, match="finished but has no scores.jsonl"):
        load_run(path)
    (path / "queue.json").write_text('{"tasks": []}')
    with pytest.raises(InputError, match="queue.json"):
        load_run(path)
    (path / "queue.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load_run(path)


def test_find_runs(tmp_path):
    deep = [write_run(tmp_path / name) for name in ("a/b/c", "a/d", "e")]
    write_run(tmp_path / "x/y/z/too-deep")
    assert find_runs(tmp_path) == sorted(deep)
    assert find_runs(deep[0]) == [deep[0]]


def test_matrix_table(tmp_path):
    lines = matrix_table(load_run(write_run(tmp_path / "run"))).splitlines()
    assert words(lines[0]) == ["after", "training", *TASKS]
    assert words(lines[2]) == ["base", "model", "20.0", "10.0", "10.0"]
    assert words(lines[3]) == ["agnews", "80.0", "30.0", "-"]
    assert words(lines[5]) == ["amazon", "50.0", "70.0", "60.0"]


def test_matrix_table_numbers_many_long_names(tmp_path):
    tasks = [f"task{i}_with_a_long_name" for i in range(5)]
    run = load_run(write_run(tmp_path / "run", R=[[0.5] * 5] * 5, baseline=None, tasks=tasks))
    lines = matrix_table(run).splitlines()
    assert words(lines[0]) == ["after", "training", "0", "1", "2", "3", "4"]
    assert lines[2].startswith("0 task0_with_a_long_name") and max(map(len, lines)) < 80


def test_summary_table(tmp_path):
    text = summary_table([load_run(path) for path in find_runs(write_comparison(tmp_path))])
    rows = {words(line)[0]: line for line in text.splitlines() if line}
    assert words(rows["variant"]) == ["variant", "seeds", "AP", "BWT", "F", "LA", "FWT"]
    # AP is 60 and 80, BWT -25 and -5; the sample standard deviation of two values is |a - b| / sqrt 2.
    assert words(rows["naive"])[1] == "2"
    assert "70.0 ± 14.1" in rows["naive"] and "-15.0 ± 14.1" in rows["naive"] and "15.0 ± 0.0" in rows["naive"]
    assert words(rows["joint"]) == ["joint", "1", "80.0", "-", "-", "-", "-"]
    assert words(rows["ewc"]) == ["ewc", "0", "-", "-", "-", "-", "-"]
    assert "Not finished, not in the means: ewc, seed 42 (1 of 3 tasks)" in text


def test_summary_keeps_orders_apart_and_names_double_seeds(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    write_run(tmp_path / "c", tasks=TASKS[::-1])
    text = summary_table([load_run(path) for path in find_runs(tmp_path)])
    assert "naive (order 1)" in text and "naive (order 2)" in text
    assert "Order of naive (order 2): amazon > yelp > agnews" in text
    assert "naive (order 1): seed 42 is there 2 times" in text


def test_a_missing_cell_is_reported_and_hides_no_other_metric(tmp_path):
    ends = [[0.8, None, None], [None, 0.9, None], [0.5, 0.7, 0.6]]
    text = summary_table([load_run(write_run(tmp_path / "run", R=ends))])
    assert "-25.0" in text and "60.0" in text
    assert "forgetting needs R[1, 0]" in text


def test_plot_matrix(tmp_path):
    import matplotlib

    # Past the lookup of rcParams, which would choose a backend itself.
    backend = dict.__getitem__(matplotlib.rcParams, "backend")
    path = plot_matrix(load_run(write_run(tmp_path / "run")), tmp_path / "plots" / "matrix.png")
    pixels = image(path)
    assert min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.1
    assert dict.__getitem__(matplotlib.rcParams, "backend") is backend


def test_plot_shows_the_scores(tmp_path):
    good = plot_matrix(load_run(write_run(tmp_path / "a")), tmp_path / "a.png")
    other = plot_matrix(load_run(write_run(tmp_path / "b", R=[*R[:2], [0.5, 0.7, 0.1]])), tmp_path / "b.png")
    assert (image(good) != image(other)).any()


def test_plot_comparison(tmp_path):
    runs = [load_run(path) for path in find_runs(write_comparison(tmp_path / "runs"))]
    pixels = image(plot_comparison(runs, tmp_path / "all.png"))
    assert pixels[..., :3].std() > 0.1
    # One panel beside the other: wider than a single variant, and nothing at all is still a sentence.
    assert pixels.shape[1] > image(plot_comparison(runs[-2:], tmp_path / "one.png")).shape[1]
    assert image(plot_comparison([run for run in runs if not run.finished], tmp_path / "none.png")).min() < 1
    with pytest.raises(InputError, match="no runs"):
        plot_comparison([], tmp_path / "empty.png")


def test_report_of_one_run(tmp_path):
    path = write_run(tmp_path / "run", versions={"torch": "2.13", "peft": "0.21"})
    (path / "tasks" / "00-agnews" / "predictions").mkdir(parents=True)
    (path / "tasks" / "00-agnews" / "predictions" / "agnews.jsonl").write_text("{}\n")
    report = write_report(path)
    assert report == path / "report.md" and image(path / "matrix.png").size
    text = report.read_text(encoding="utf-8")
    assert "# naive, seed 42" in text and "![score matrix](matrix.png)" in text
    assert "exact_match, n = 100" in text and "torch 2.13, peft 0.21" in text
    assert f"`{path / 'tasks' / '00-agnews' / 'predictions'}` (1)" in text
    assert "`backward_transfer/lower_triangle`" in text and "(1/(T-1)) sum_{j<T-1} (R[T-1, j] - R[j, j])" in text
    assert "average performance (AP)" in text and "60.0" in text


def test_report_of_a_comparison(tmp_path):
    report = write_report(write_comparison(tmp_path / "runs"), tmp_path / "out")
    assert report == tmp_path / "out" / "report.md" and image(tmp_path / "out" / "comparison.png").size
    assert not (tmp_path / "runs" / "report.md").exists()
    text = report.read_text(encoding="utf-8")
    assert "# Comparison: runs" in text and "70.0 ± 14.1" in text and "not finished: 1 of 3 tasks" in text
    assert "no prediction files" in text and "## Versions" not in text


@pytest.mark.parametrize("cursor", [0, 1, 2])
def test_report_of_an_unfinished_run(tmp_path, cursor):
    path = write_run(tmp_path / "run", R=R[:cursor], finished=False, cursor=cursor)
    text = write_report(path).read_text(encoding="utf-8")
    assert f"**Not finished**: {cursor} of 3 tasks" in text
    expected = {0: "No task is finished yet.", 1: "80.0", 2: "75.0"}
    assert expected[cursor] in text


def test_report_before_the_first_score(tmp_path):
    path = write_run(tmp_path / "run", R=[], baseline=None, finished=False, cursor=0)
    (path / "scores.jsonl").unlink()
    assert "No scores yet." in write_report(path).read_text(encoding="utf-8")


def test_print_report(tmp_path, capsys):
    path = write_run(tmp_path / "run")
    print_report(path)
    shown = capsys.readouterr().out
    assert "naive, seed 42: exact_match, percent" in shown and "backward transfer (BWT)" in shown
    assert shown.rstrip().endswith(f"Report: {path / 'report.md'}")
    print_report(write_comparison(tmp_path / "runs"))
    shown = capsys.readouterr().out
    assert "70.0 ± 14.1" in shown and "ewc, seed 42 (not finished: 1 of 3 tasks)" in shown


def runs_at(path: Path):
    return [load_run(each) for each in find_runs(path)]


def test_convention_of_one_run(tmp_path):
    runs = runs_at(write_run(tmp_path / "run"))
    text = convention_table(runs, "sapt-code")
    # AP (50 + 70 + 60) / 3; F.Ra (80 - 50 + 90 - 70) / 2; BWT -(30 + 20) / 3; FWT (80 + 90 + 60) / 3 - 50.94.
    shown = {words(line)[0]: words(line)[1] for line in text.splitlines() if line[:3] in ("Cl ", "Fgt", "Fwt", "Bwt")}
    assert shown == {"Cl": "60.0", "Fgt": "25.0", "Bwt": "-16.7", "Fwt": "25.7"}
    assert words(text)[:2] == ["sapt-code", "percent"] and "score.py" in text and "Note: Fwt subtracts" in text
    assert "-25.0" in convention_table(runs, "trace") and "OP" in convention_table(runs, "trace")
    with pytest.raises(InputError, match="--convention mamoth: it is unknown; did you mean 'mammoth'"):
        convention_table(runs, "mamoth")


def test_convention_says_what_is_missing(tmp_path):
    runs = runs_at(write_run(tmp_path / "run", R=[[0.8, None, None], [0.6, 0.9, None], [0.5, 0.7, 0.6]]))
    text = convention_table(runs, "sapt")
    assert "no F.Ra" not in text and words(next(x for x in text.splitlines() if x.startswith("F.Ra")))[1] == "25.0"
    assert "no FWT: forward_transfer/diagonal needs the scores of models trained on one task each" in text
    kif = next(line for line in convention_table(runs, "kif").splitlines() if line.startswith("F.Ra"))
    assert words(kif)[1] == "25.0"
    text = convention_table(runs, "chaudhry")
    assert "no F: forgetting needs R[0, 1]" in text and "evaluation.unseen scores tasks before" in text
    line = next(line for line in text.splitlines() if line.startswith("F "))
    assert words(line)[1] == "-" and "nan" not in text.lower()
    assert "no forward transfer: forward_transfer needs R[0, 1]" in convention_table(runs, "mammoth")


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("cursor", [0, 1, 2])
def test_every_convention_of_an_unfinished_run(tmp_path, convention, cursor):
    runs = runs_at(write_run(tmp_path / "run", R=R[:cursor], baseline=None, finished=False, cursor=cursor))
    text = convention_table(runs, convention)
    assert "nan" not in text.lower()
    if cursor == 0:
        assert "needs a finished task" in text
    elif "AP" in CONVENTIONS[convention].metrics:
        line = next(line for line in text.splitlines() if line.startswith("AP "))
        assert words(line)[1] == {1: "80.0", 2: "75.0"}[cursor]


def test_convention_of_several_runs(tmp_path):
    text = convention_table(runs_at(write_comparison(tmp_path)), "seekr-code", "github")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    # BWT -50 / 3 and -10 / 3; a joint run has no row for every task; ewc is not finished.
    assert "-10.0 ± 9.4" in rows["bwt"] and "70.0 ± 14.1" in rows["avg"]
    header = [cell.strip() for cell in rows["seekr-code"].split("|")]
    joint, ewc = header.index("joint"), header.index("ewc")
    assert [rows[name].split("|")[joint].strip() for name in ("avg", "bwt")] == ["80.0", "-"]
    assert [rows[name].split("|")[ewc].strip() for name in ("avg", "bwt")] == ["-", "-"]
    assert "Not finished, not in the means: ewc, seed 42 (1 of 3 tasks)" in text
    assert "joint: no bwt: backward_transfer needs one row for each task" in text


def test_where_conventions_differ(tmp_path):
    cells = [[0.8, 0.3, 0.1], [0.6, 0.9, 0.2], [0.9, 0.7, 0.6]]
    text = differences_table(runs_at(write_run(tmp_path / "run", R=cells)), "github")
    rows = {}
    for line in text.splitlines():
        if line.startswith("|"):
            name, value, reason, names = (cell.strip() for cell in line.split("|")[1:5])
            rows[name] = (value, reason, names.split(", "))
    # Task 0 went from 80 to 90, task 1 from 90 to 70.
    assert rows["backward_transfer"][:2] == ("-5.0", "the default here") and "trace BWT" in rows["backward_transfer"][2]
    assert rows["backward_transfer/divide_by_t"][0] == "-3.3"
    assert "seekr-code bwt" in rows["backward_transfer/divide_by_t"][2]
    assert rows["backward_transfer/lower_triangle"][0] == "-10.0"  # (-20 + 10 - 20) / 3
    assert rows["forgetting"][0] == "5.0" and rows["forgetting/mammoth"][0] == "10.0"
    assert "never below 0" in rows["forgetting/mammoth"][1]
    assert rows["forward_transfer"][0] == "15.0" and rows["forward_transfer/zero_shot"][0] == "25.0"
    assert rows["average_performance/incremental"][0] == "76.1"  # (80 + 75 + 73.3) / 3
    assert "Not computed: forward_transfer/diagonal needs the scores of models" in text and "sapt FWT" in text
    for convention in CONVENTIONS.values():  # every reported metric is in the table or said to be missing
        for name in convention.metrics:
            if convention.metrics[name] != "learning_accuracy":
                assert f"{convention.id} {name}" in text


def test_where_conventions_agree(tmp_path):
    one = runs_at(write_run(tmp_path / "one", R=[[0.5]], tasks=["a"], baseline=None))
    assert "backward_transfer needs two tasks, and" in differences_table(one)  # and is no 0.0
    flat = runs_at(write_run(tmp_path / "run", R=[[0.5, None], [0.5, 0.5]], tasks=["a", "b"], baseline=None))
    text = differences_table(flat)
    assert "The same here by 3 definitions: backward transfer" in text
    assert "backward_transfer/divide_by_t" not in text.split("Not computed")[0]
    joint = runs_at(write_run(tmp_path / "joint", R=[[0.9, 0.8, 0.7]], baseline=None, joint=True, variant=None))
    assert differences_table(joint) == "No run with a row for every task."


def test_report_with_a_convention(tmp_path, capsys):
    path = write_run(tmp_path / "run")
    print_report(path, convention="trace")
    shown = capsys.readouterr().out
    assert "Where conventions differ:" in shown and "OP" in shown and "backward_transfer/divide_by_t" in shown
    text = (path / "report.md").read_text(encoding="utf-8")
    assert "## Convention: trace" in text and "## Where conventions differ" in text
    print_report(path)
    assert "Where conventions differ" not in capsys.readouterr().out
    before = (path / "report.md").read_bytes()
    with pytest.raises(InputError, match="--convention tracee"):
        print_report(path, convention="tracee")
    assert (path / "report.md").read_bytes() == before


def write_single_runs(root: Path) -> Path:
    for task, score in zip(TASKS, (0.7, 0.8, 0.9), strict=True):
        write_run(root / task, R=[[score]], baseline=None, tasks=[task], variant=None)
    return root


def test_single_task_runs_give_the_forward_transfer_of_sapt(tmp_path, capsys):
    path, singles = write_run(tmp_path / "run"), write_single_runs(tmp_path / "alone")
    print_report(path, convention="sapt", single_task=singles)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("FWT"))
    assert words(line)[1] == "-3.3"  # (80 + 90 + 60) / 3 - 80
    assert "(1/T) sum_j (R[j, j] - single_task[j])" in (path / "report.md").read_text(encoding="utf-8")
    # A second seed of one task: the mean of 70 and 100.
    write_run(singles / "again", R=[[1.0]], baseline=None, tasks=["agnews"], variant=None, seed=43)
    print_report(path, convention="sapt", single_task=singles)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("FWT"))
    assert words(line)[1] == "-8.3"


def test_single_task_runs_must_fit(tmp_path):
    path, singles = write_run(tmp_path / "run"), write_single_runs(tmp_path / "alone")
    file = singles / "yelp" / "scores.jsonl"
    file.write_text(file.read_text().replace("exact_match", "rouge_l"))
    with pytest.raises(InputError, match="scores yelp by rouge_l, and .* by exact_match; score both with --scorer"):
        write_report(path, single_task=singles)
    queue = singles / "agnews" / "queue.json"
    hashed = json.loads(queue.read_text()) | {"evaluation": [{"task": "agnews", "hash": "other"}]}
    queue.write_text(json.dumps(hashed))
    with pytest.raises(InputError, match="evaluates agnews on other rows"):
        write_report(path, single_task=singles)
    queue.unlink()
    with pytest.raises(InputError, match="no finished run there has agnews as its only task"):
        write_report(path, single_task=singles)
    assert not (path / "report.md").exists()
