from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from hf_continual.data import content_hash
from hf_continual.errors import InputError
from hf_continual.streams import describe_stream, load_stream, stream_names
from hf_continual.tasks import check_stream

DATA = Path(os.environ.get("HF_CONTINUAL_DATA", "../shared/data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark data is not here (HF_CONTINUAL_DATA)")
STANDARD = {"dbpedia": "Film", "amazon": "neutral", "yahoo": "Health", "agnews": "World"}


def cl_layout(root: Path, tasks: dict[str, tuple[str, str, list[str]]]) -> None:
    for group, name, labels in tasks.values():
        folder = root / group / name
        folder.mkdir(parents=True)
        rows = [{"sentence": f"s{i}", "label": labels[i % len(labels)]} for i in range(4)]
        (folder / "train.json").write_text(json.dumps(rows))
        (folder / "dev.json").write_text(json.dumps(rows[:2]))
        (folder / "labels.json").write_text(json.dumps(labels))


def jsonl_layout(root: Path, tasks: dict[str, str], splits: tuple[str, ...] = ("train", "dev")) -> None:
    for split in splits:
        (root / split).mkdir(parents=True)
        for task, label in tasks.items():
            lines = [json.dumps({"input": f"{split} {i}", "output": label}) for i in range(6)]
            (root / split / f"{task}.jsonl").write_text("\n".join(lines))


def test_names_and_descriptions() -> None:
    assert stream_names()[-1] == "quickstart" and len(set(stream_names())) == len(stream_names())
    assert {f"standard-order{i}" for i in (1, 2, 3)} | {f"long-order{i}" for i in (4, 5, 6)} < set(stream_names())
    assert describe_stream("standard-order3")["tasks"] == ["yahoo", "amazon", "agnews", "dbpedia"]
    long = [describe_stream(f"long-order{i}")["tasks"] for i in (4, 5, 6)]
    assert all(len(set(tasks)) == 15 and set(tasks) == set(long[0]) for tasks in long)
    assert (long[0][0], long[1][0], long[2][0]) == ("mnli", "multirc", "yelp")
    for name in stream_names():
        assert {"tasks", "source", "note"} <= describe_stream(name).keys()


def test_jsonl_layout(tmp_path: Path) -> None:
    jsonl_layout(tmp_path / "bench", STANDARD)
    tasks = load_stream("standard-order2", data_dir="bench", base_dir=tmp_path, scorer="label_likelihood", eval_rows=2)
    assert [task.name for task in tasks] == ["dbpedia", "amazon", "agnews", "yahoo"]
    assert tasks[2].labels == ["World", "Sports", "Business", "Science or Technology"]
    assert tasks[1].labels[0] == "very negative" and len(tasks[0].labels) == 14 and len(tasks[3].labels) == 10
    assert {task.scorer for task in tasks} == {"label_likelihood"}
    assert [len(task.train_dataset) for task in tasks] == [6] * 4
    assert all(prompt.startswith("dev") for prompt in tasks[0].eval_dataset["prompt"])
    assert len(tasks[0].eval_dataset) == 2


def test_jsonl_layout_without_evaluation_files(tmp_path: Path) -> None:
    jsonl_layout(tmp_path, STANDARD, ("train",))
    task = load_stream("standard-order1", data_dir=tmp_path)[0]
    assert len(task.train_dataset) == 5 and len(task.eval_dataset) == 1


@pytest.mark.parametrize("inside", ["", "cl_benchmark"])
def test_cl_layout_whatever_the_case(tmp_path: Path, inside: str) -> None:
    cl_layout(
        tmp_path / inside,
        {
            "dbpedia": ("tc", "DBpedia", ["Film", "Album"]),
            "amazon": ("SC", "amazon", ["neutral", "negative"]),
            "yahoo": ("tc", "yahoo", ["Health"]),
            "agnews": ("tc", "AGNews", ["World"]),
        },
    )
    tasks = load_stream("standard-order1", data_dir=tmp_path, train_rows=3)
    assert [task.name for task in tasks] == ["dbpedia", "amazon", "yahoo", "agnews"]
    assert tasks[0].train_dataset["prompt"][0].startswith("Task:TC\nDataset:DBpedia\nWhat is the topic")
    assert len(tasks[0].labels) == 14 and len(tasks[0].train_dataset) == 3


def test_unknown_stream() -> None:
    for call in (load_stream, describe_stream):
        with pytest.raises(InputError, match="'standard-order4' is unknown; did you mean 'standard-order"):
            call("standard-order4")


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs its data; set data_dir .*CL_Benchmark"):
        load_stream("standard-order1")
    with pytest.raises(InputError, match="the folder 'nowhere' does not exist; .*CL_Benchmark"):
        load_stream("standard-order1", data_dir="nowhere", base_dir=tmp_path)
    jsonl_layout(tmp_path, {"dbpedia": "Film", "agnews": "World"})
    with pytest.raises(InputError, match="lacks the tasks amazon, yahoo .*<Task>/<Dataset>.*CL_Benchmark"):
        load_stream("standard-order1", data_dir=tmp_path)


def test_answer_outside_the_labels(tmp_path: Path) -> None:
    jsonl_layout(tmp_path, {**STANDARD, "yahoo": "health"})
    with pytest.raises(InputError, match="the answer 'health' in row 0 of .*yahoo.jsonl"):
        load_stream("standard-order1", data_dir=tmp_path)


# --- quickstart ------------------------------------------------------------------------------------------------------


def test_quickstart_is_balanced_and_short() -> None:
    tasks = load_stream("quickstart")
    check_stream(tasks)
    assert [task.name for task in tasks] == describe_stream("quickstart")["tasks"]
    for task in tasks:
        assert len(task.train_dataset) == 96 and len(task.eval_dataset) == 60
        for data in (task.train_dataset, task.eval_dataset):
            assert data.column_names == ["prompt", "completion", "references"]
            counts = Counter(data["completion"])
            assert set(counts) == set(task.labels) and len(set(counts.values())) == 1
            assert all(len(prompt.split()) <= 20 for prompt in data["prompt"])
            assert data["references"][:] == [[completion] for completion in data["completion"]]


def test_quickstart_prompts_do_not_list_the_answers() -> None:
    for task in load_stream("quickstart", train_rows=600):
        for prompt in task.train_dataset["prompt"]:
            assert sum(label in prompt.lower().split() for label in task.labels) <= 1, prompt


def test_quickstart_follows_the_seed() -> None:
    first, again, other = (load_stream("quickstart", seed=seed) for seed in (1, 1, 2))
    for one, two, three in zip(first, again, other, strict=True):
        assert content_hash(one.train_dataset) == content_hash(two.train_dataset)
        assert content_hash(one.eval_dataset) == content_hash(two.eval_dataset)
        assert content_hash(one.train_dataset) != content_hash(three.train_dataset)


def test_quickstart_train_and_eval_never_meet() -> None:
    # Whatever the seeds: no bag of words is in both.
    train, evaluation = set(), set()
    for seed in (1, 2):
        for task in load_stream("quickstart", seed=seed, train_rows=600, eval_rows=300):
            bags = [
                {tuple(sorted(p.lower().split())) for p in d["prompt"]} for d in (task.train_dataset, task.eval_dataset)
            ]
            train |= bags[0]
            evaluation |= bags[1]
    assert len(train) > 1500 and len(evaluation) > 700 and not train & evaluation


def test_quickstart_texts_have_one_label() -> None:
    for task in load_stream("quickstart", train_rows=1200):
        prompts = task.train_dataset["prompt"][:]
        assert len(set(prompts)) == len(prompts) == 1200


def test_quickstart_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data_dir: .* has no use"):
        load_stream("quickstart", data_dir=tmp_path)
    with pytest.raises(InputError, match="train_rows: 0 is not a whole number"):
        load_stream("quickstart", train_rows=0)
    with pytest.raises(InputError, match="eval_rows: 1000000 is more than the stream"):
        load_stream("quickstart", eval_rows=1_000_000)


# --- the real benchmarks ---------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize("name", [name for name in stream_names() if name.startswith(("standard", "long"))])
def test_real_streams(name: str) -> None:
    tasks = load_stream(name, data_dir=DATA / "long_sequence", train_rows=20, eval_rows=10)
    assert [task.name for task in tasks] == describe_stream(name)["tasks"]
    for task in tasks:
        assert len(task.train_dataset) == 20 and len(task.eval_dataset) == 10
        # The prompt lists the options in the order of the labels.
        assert f"Option: {', '.join(task.labels)}." in task.train_dataset["prompt"][0]


@needs_data
def test_real_cl_benchmark_lacks_tasks() -> None:
    with pytest.raises(InputError, match="lacks the tasks dbpedia, amazon, yahoo of"):
        load_stream("standard-order1", data_dir=DATA / "cl_benchmark")
