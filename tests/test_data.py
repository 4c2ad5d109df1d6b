from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_continual.data import TASK_KEYS, content_hash, load_task
from hf_continual.errors import InputError

DATA = Path(os.environ.get("HF_CONTINUAL_DATA", "../shared/data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark data is not here (HF_CONTINUAL_DATA)")


def rows(count: int, prefix: str = "q") -> list[dict[str, str]]:
    return [{"input": f"{prefix}{i}?", "output": f"a{i}"} for i in range(count)]


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        assert isinstance(content, list)
        text = "\n".join(json.dumps(row) for row in content) + "\n"
    else:
        text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def first(dataset: Dataset) -> dict[str, object]:
    assert dataset.column_names == ["prompt", "completion", "references"]
    return dataset[0]


# --- kinds of data ---------------------------------------------------------------------------------------------------


def test_folder_of_split_files(tmp_path: Path) -> None:
    write(tmp_path / "mine" / "train.jsonl", rows(5))
    write(tmp_path / "mine" / "dev.json", [{"input": "x", "output": ["first", "second"]}])
    write(tmp_path / "mine" / "test.json", rows(3, "test"))
    task = load_task({"path": "mine"}, base_dir=tmp_path)
    assert task.name == "mine" and task.labels is None and task.scorer is None
    assert first(task.train_dataset) == {"prompt": "q0?", "completion": "a0", "references": ["a0"]}
    assert task.eval_dataset.to_list() == [{"prompt": "x", "completion": "first", "references": ["first", "second"]}]


def test_eval_split_is_chosen_by_name(tmp_path: Path) -> None:
    write(tmp_path / "t" / "train.json", rows(2))
    write(tmp_path / "t" / "dev.json", rows(1, "dev"))
    write(tmp_path / "t" / "test.json", rows(1, "test"))
    task = load_task({"path": str(tmp_path / "t"), "eval_split": "test"})
    assert task.eval_dataset["prompt"][:] == ["test0?"]


def test_split_template(tmp_path: Path) -> None:
    write(tmp_path / "train" / "news.jsonl", rows(3))
    write(tmp_path / "validation" / "news.jsonl", rows(2, "v"))
    task = load_task({"path": "{split}/news.jsonl"}, base_dir=tmp_path)
    assert task.name == "news" and len(task.train_dataset) == 3
    assert task.eval_dataset["prompt"][:] == ["v0?", "v1?"]


def test_data_files(tmp_path: Path) -> None:
    write(tmp_path / "d" / "one.json", rows(2, "one"))
    write(tmp_path / "d" / "two.json", rows(2, "two"))
    write(tmp_path / "d" / "ev.json", rows(1, "ev"))
    spec = {"data_dir": "d", "data_files": {"train": ["one.json", "two.json"], "eval": "ev.json"}}
    task = load_task(spec, base_dir=tmp_path)
    assert task.name == "one"
    assert task.train_dataset["prompt"][:] == ["one0?", "one1?", "two0?", "two1?"]
    assert task.eval_dataset["prompt"][:] == ["ev0?"]


def test_data_files_within_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "d" / "learn.json", rows(2))
    write(tmp_path / "d" / "score.json", rows(1, "s"))
    task = load_task({"path": "d", "data_files": {"train": "learn.json", "test": "score.json"}}, base_dir=tmp_path)
    assert task.name == "d" and task.eval_dataset["prompt"][:] == ["s0?"]


def test_base_dir_comes_before_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "base" / "x.json", rows(4))
    write(tmp_path / "cwd" / "x.json", rows(8))
    write(tmp_path / "cwd" / "only.json", rows(9))
    monkeypatch.chdir(tmp_path / "cwd")
    base = tmp_path / "base"
    assert len(load_task({"path": "x.json", "eval_rows": 1, "eval_fraction": 0.25}, base_dir=base).train_dataset) == 3
    assert len(load_task({"path": "only.json"}, base_dir=base).train_dataset) == 8


def test_json_lines_in_a_json_file_and_odd_line_breaks(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"input": "a\u2028b", "output": "c"}\n{"input": "d", "output": "e"}\n', encoding="utf-8")
    task = load_task({"path": str(file)})
    assert {*task.train_dataset["prompt"], *task.eval_dataset["prompt"]} == {"a\u2028b", "d"}


def test_csv_keeps_none_and_numbers_as_text(tmp_path: Path) -> None:
    write(tmp_path / "x" / "train.csv", 'input,output\n"a, b",None\nc,1\n')
    write(tmp_path / "x" / "test.csv", "input,output\nd,NA\n")
    task = load_task({"path": str(tmp_path / "x")})
    assert task.train_dataset["prompt"][:] == ["a, b", "c"]
    assert task.train_dataset["completion"][:] == ["None", "1"]
    assert task.eval_dataset["completion"][:] == ["NA"]


def test_parquet_with_class_labels(tmp_path: Path) -> None:
    features = Features({"question": Value("string"), "kind": ClassLabel(names=["no", "yes"])})
    data = Dataset.from_dict({"question": ["a", "b", "c"], "kind": [1, 0, 1]}, features=features)
    data.to_parquet(str(tmp_path / "x.parquet"))
    task = load_task(
        {"path": str(tmp_path / "x.parquet"), "columns": {"prompt": "question", "completion": "kind"}, "eval_rows": 1}
    )
    answers = dict(zip(task.train_dataset["prompt"], task.train_dataset["completion"], strict=True))
    assert answers.items() <= {"a": "yes", "b": "no", "c": "yes"}.items() and len(answers) == 2
    assert task.labels == ["no", "yes"]


def test_prompt_completion_and_references(tmp_path: Path) -> None:
    data = [{"prompt": "p", "completion": "c", "references": ["c", "d"]}, {"prompt": "r", "completion": "s"}]
    write(tmp_path / "t" / "train.json", data)
    write(tmp_path / "t" / "dev.json", data)
    task = load_task({"path": str(tmp_path / "t"), "format": "prompt_completion"})
    assert task.train_dataset["references"][:] == [["c", "d"], ["s"]]


def test_conversational(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
    write(tmp_path / "m" / "train.json", [{"messages": [user, answer]}])
    write(tmp_path / "m" / "test.json", [{"prompt": [user], "completion": [answer]}])
    task = load_task({"path": str(tmp_path / "m")})
    expected = {"prompt": [user], "completion": "hello", "references": ["hello"]}
    assert first(task.train_dataset) == expected
    assert first(task.eval_dataset) == expected


def cl_folder(root: Path, group: str = "TC", name: str = "agnews", label: object = "World") -> Path:
    folder = root / group / name
    write(folder / "train.json", [{"sentence": "Title: x", "label": label}, {"sentence": "y", "label": "Sports"}])
    write(folder / "test.json", [{"sentence": "z", "label": "-"}])
    write(folder / "labels.json", ["World", "Sports"])
    return folder


def test_cl_benchmark_prompt(tmp_path: Path) -> None:
    task = load_task({"path": str(cl_folder(tmp_path))})
    assert first(task.train_dataset)["prompt"] == (
        "Task:TC\nDataset:agnews\nWhat is the topic of the following paragraph? Choose one from the option.\n"
        "Option: World, Sports \nTitle: x\nAnswer:"
    )
    assert task.name == "agnews" and task.labels == ["World", "Sports"]
    # No gold label: kept in the evaluation split, where it cannot be answered right.
    assert task.eval_dataset["references"][:] == [["-"]]


def test_cl_benchmark_copa_has_no_instruction(tmp_path: Path) -> None:
    task = load_task({"path": str(cl_folder(tmp_path, "COPA", "COPA"))})
    assert task.train_dataset["prompt"][0] == "Task:COPA\nDataset:COPA\nTitle: x\nAnswer:"


def test_cl_benchmark_prefers_dev(tmp_path: Path) -> None:
    folder = cl_folder(tmp_path)
    write(folder / "dev.json", [{"sentence": "dev", "label": "World"}])
    assert "dev\nAnswer:" in load_task({"path": str(folder)}).eval_dataset["prompt"][0]


def ni(count: int = 4, output: object = None) -> dict[str, object]:
    instances = [{"id": str(i), "input": f"i{i}", "output": output or [f"o{i}", "other"]} for i in range(count)]
    return {"Definition": ["Do it."], "Instances": instances}


def test_natural_instructions_folder_and_file(tmp_path: Path) -> None:
    write(tmp_path / "task001_x" / "train.json", ni())
    folder = load_task({"path": str(tmp_path / "task001_x")})
    file = load_task({"path": str(tmp_path / "task001_x" / "train.json")})
    assert folder.name == file.name == "task001_x"
    assert folder.train_dataset.to_list() == file.train_dataset.to_list()
    row = first(folder.train_dataset)
    number = str(row["completion"])[1:]
    assert row["prompt"] == f"Definition: Do it.\n\nInput: i{number}\nOutput:"
    assert row["references"] == [f"o{number}", "other"]
    assert folder.scorer == "rouge_l"


def test_natural_instructions_raw_file_string_outputs_and_scorer(tmp_path: Path) -> None:
    file = write(tmp_path / "task002_y.json", ni(output="yes"))
    task = load_task({"path": str(file), "scorer": "exact_match", "labels": ["yes", "no"]})
    assert task.name == "task002_y" and task.scorer == "exact_match"
    assert task.train_dataset["references"][0] == ["yes"]


def test_save_to_disk_with_columns(tmp_path: Path) -> None:
    data = Dataset.from_dict({"q": ["a", "b"], "a": ["c", "d"], "image": [b"1", b"2"]})
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "ds"))
    spec = {"path": str(tmp_path / "ds"), "columns": {"prompt": "q", "completion": "a"}}
    task = load_task(spec)
    assert first(task.train_dataset) == {"prompt": "a", "completion": "c", "references": ["c"]}
    assert len(task.eval_dataset) == 1
    with pytest.raises(InputError, match="train_split: .* no split 'trian'; did you mean 'train'"):
        load_task({**spec, "train_split": "trian"})
    with pytest.raises(InputError, match="eval_split: .* no split 'tset'; did you mean 'test'"):
        load_task({**spec, "eval_split": "tset"})


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(path: str, subset: str | None, **options: object) -> DatasetDict:
        calls.append((path, subset, options))
        data = Dataset.from_dict({"question": ["a", "b"], "answer": ["c", "d"]})
        return DatasetDict({"train": data, "validation": data.select([1])})

    monkeypatch.setattr("hf_continual.data_sources.load_dataset", fake)
    columns = {"prompt": "question", "completion": "answer"}
    task = load_task({"path": "user/ds", "subset": "en", "revision": "v1", "columns": columns})
    assert calls == [("user/ds", "en", {"revision": "v1"})]
    assert task.name == "ds" and task.eval_dataset["prompt"][:] == ["b"]


# --- choosing rows ---------------------------------------------------------------------------------------------------


def test_held_out_rows_are_disjoint_and_seeded(tmp_path: Path) -> None:
    file = write(tmp_path / "x.json", rows(50))
    task = load_task({"path": str(file)})
    train, held = set(task.train_dataset["prompt"]), set(task.eval_dataset["prompt"])
    assert len(train) == 45 and len(held) == 5 and not train & held
    assert task.train_dataset["prompt"][:] == [row["input"] for row in rows(50) if row["input"] in train]
    assert load_task({"path": str(file)}).eval_dataset["prompt"][:] == task.eval_dataset["prompt"][:]
    assert set(load_task({"path": str(file)}, seed=1).eval_dataset["prompt"]) != held
    assert len(load_task({"path": str(file), "eval_fraction": 0.5}).eval_dataset) == 25
    assert len(load_task({"path": str(file), "eval_fraction": 0.001}).eval_dataset) == 1


def test_options_can_be_chosen_on_held_out_training_rows(tmp_path: Path) -> None:
    """`eval_split: train` never shows the rows whose scores are reported."""
    write(tmp_path / "t" / "train.json", rows(50))
    write(tmp_path / "t" / "dev.json", rows(60)[50:])
    reported = load_task({"path": str(tmp_path / "t")})
    tuning = load_task({"path": str(tmp_path / "t"), "eval_split": "train", "eval_fraction": 0.2})
    train, held = set(tuning.train_dataset["prompt"]), set(tuning.eval_dataset["prompt"])
    assert len(held) == 10 and len(train) == 40 and not train & held
    assert held <= set(reported.train_dataset["prompt"]) and not held & set(reported.eval_dataset["prompt"])


def test_row_limits_take_the_rows_of_a_seeded_shuffle(tmp_path: Path) -> None:
    write(tmp_path / "t" / "train.json", rows(30))
    write(tmp_path / "t" / "dev.json", rows(20, "dev"))
    spec = {"path": str(tmp_path / "t"), "train_rows": 7, "eval_rows": 3}
    task = load_task(spec, seed=5)
    expected = Dataset.from_list(rows(30)).shuffle(seed=5).select(range(7))["input"][:]
    assert task.train_dataset["prompt"][:] == expected
    assert len(task.eval_dataset) == 3
    assert len(load_task({**spec, "train_rows": 99}).train_dataset) == 30


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trian_rows": 3}, "'trian_rows' is unknown; did you mean 'train_rows'"),
        ({"path": None}, "has no data: set 'path'"),
        ({"path": 3}, "path: 3 is not a string"),
        ({"path": "nowhere.json"}, "'nowhere.json' does not exist"),
        ({"path": "train.doc"}, "type of .*train.doc' is not supported"),
        ({"format": "input-output"}, "format: .* did you mean 'input_output'"),
        ({"format": "conversational"}, "no column 'messages', which 'conversational' needs"),
        ({"format": "natural_instructions"}, "is not a Natural-Instructions object"),
        ({"format": "cl_benchmark"}, "'cl_benchmark' needs a folder"),
        ({"train_rows": 0}, "train_rows: 0 is not a whole number above 0"),
        ({"eval_rows": True}, "eval_rows: True is not a whole number"),
        ({"eval_fraction": 1.5}, "eval_fraction: 1.5 is not a number between"),
        ({"labels": [True, "no"]}, "labels: True is not a string"),
        ({"labels": "yes"}, "labels: 'yes' is not a list"),
        ({"labels": ["a1", "b"]}, "the answer 'a[023]' in row [023] of .* is not one of the labels 'a1', 'b'"),
        ({"columns": {"prompt": "inptu", "completion": "output"}}, "no column 'inptu' .* did you mean 'input'"),
        ({"columns": {"question": "input"}}, "'question' is not a column of a task"),
        ({"columns": {"prompt": "input"}}, "'completion' is missing"),
        ({"columns": ["input"]}, "columns: .* is not a mapping"),
        ({"training": 3}, "training: 3 is not a mapping"),
        ({"eval_split": "test"}, "eval_split: 'test' cannot be found in the single file"),
        ({"name": "a/b"}, "'a/b' cannot name a folder"),
        ({"labels": ["good", "bad", "good"]}, "labels holds 'good' twice"),
        ({"path": None, "data_files": {"eval": "x.json"}}, "the split 'train' is missing"),
        (
            {"path": None, "data_files": {"train": "x.json", "tset": "x.json"}},
            "'tset' is unknown; did you mean 'test'",
        ),
        ({"path": None, "data_files": {"train": "gone.json"}}, "data_files: train: 'gone.json' does not exist"),
        ({"path": "no/{split}.json"}, "path: 'no/train.json' does not exist"),
    ],
)
def test_errors_in_a_spec(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write(tmp_path / "x.json", rows(4))
    write(tmp_path / "train.doc", "text")
    with pytest.raises(InputError, match=message) as caught:
        load_task({"path": "x.json", **change}, base_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "the train split .* is empty"),
        (rows(1), "has one row and there is no evaluation split"),
        ("[{", "is not valid JSON"),
        ("3", "holds a int; write a list"),
        ('{"rows": [{"input": "a", "output": "b"}]}', "is an object whose 'rows' holds the rows; write the list alone"),
        ([1, 2], "row 0 of .* is 1; write each row as an object"),
        ([{"input": "a", "output": 1}] * 2, "column 'output' in row [01] of .* is 1, not a string"),
        ([{"input": "a", "output": None}] * 2, "column 'output' in row [01] of .* is None"),
        ([{"input": "a", "output": []}] * 2, "column 'output' in row [01]"),
        ([{"input": 7, "output": "a"}] * 2, "column 'input' in row [01] of .* is 7, not a string"),
        ([{"input": "", "output": "a"}] * 2, "column 'input' in row [01] of .* is empty"),
        ([{"question": "a", "answer": "b"}] * 2, "has the columns 'question', 'answer', neither"),
        ([{"sentence": "a", "label": "b"}] * 2, "give the folder that holds labels.json"),
        ([{"messages": [{"role": "user", "content": "a"}]}] * 2, "does not end in an assistant message"),
        (
            [{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}] * 2,
            "a string 'role' and 'content'",
        ),
        (
            [
                {"prompt": "a", "completion": "b"},
                {"prompt": "a", "completion": "b"},
                {"prompt": [{"role": "user", "content": "x"}], "completion": "b"},
                {"prompt": [{"role": "user", "content": "x"}], "completion": "b"},
            ],
            "is not of the same kind as before",
        ),
        ({"Instances": []}, "has no 'Definition'"),
        ({"Definition": "d", "Instances": {}}, "'Instances' of .* is not a list"),
        ({"Definition": "d", "Instances": []}, "the train split .* is empty"),
    ],
)
def test_errors_in_a_file(tmp_path: Path, content: object, message: str) -> None:
    file = write(tmp_path / "x.json", content)
    with pytest.raises(InputError, match=message) as caught:
        load_task({"path": str(file)})
    assert "x.json" in str(caught.value)


@pytest.mark.parametrize(
    ("column", "values"), [("output", [["a"], "b"]), ("output", ["a", ["b"]]), ("references", [["a"], None, "b"])]
)
def test_references_of_mixed_type(tmp_path: Path, column: str, values: list[object]) -> None:
    content = [{"input": f"q{i}", "output": "a", **({} if v is None else {column: v})} for i, v in enumerate(values)]
    path = write(tmp_path / "mine.json", content)
    row = len(values) - 1
    with pytest.raises(InputError, match=rf"column '{column}' in row {row} of .*mine.json' is a .* alike in all rows"):
        load_task({"path": str(path)})


def test_error_names_the_line_of_a_jsonl_file(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"input": "a", "output": "b"}\n{"input": \n')
    with pytest.raises(InputError, match="line 2 of .*x.jsonl"):
        load_task({"path": str(file)})


def test_errors_of_csv_parquet_and_encoding(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 2 of .* another number of fields"):
        load_task({"path": str(write(tmp_path / "x.csv", "input,output\na,b,c\n"))})
    with pytest.raises(InputError, match="not a valid parquet file"):
        load_task({"path": str(write(tmp_path / "x.parquet", "nothing"))})
    (tmp_path / "latin.json").write_bytes('[{"input": "é", "output": "x"}]'.encode("latin-1"))
    with pytest.raises(InputError, match="save it as UTF-8"):
        load_task({"path": str(tmp_path / "latin.json")})


def test_errors_of_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no train.json"):
        load_task({"path": str(tmp_path / "empty")})
    write(tmp_path / "wrong" / "trian.json", rows(2))
    with pytest.raises(InputError, match="no file 'train'; did you mean 'trian'"):
        load_task({"path": str(tmp_path / "wrong")})
    write(tmp_path / "t" / "train.json", rows(2))
    write(tmp_path / "t" / "dev.json", [])
    with pytest.raises(InputError, match="the evaluation split .*dev.json' is empty"):
        load_task({"path": str(tmp_path / "t")})
    with pytest.raises(InputError, match="eval_split: .* no file 'dve'; did you mean 'dev'"):
        load_task({"path": str(tmp_path / "t"), "eval_split": "dve"})


def test_errors_of_cl_benchmark(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'label' in row 0 of .* is 1, not a string"):
        load_task({"path": str(cl_folder(tmp_path / "a", label=1))})
    with pytest.raises(InputError, match="the answer 'Wrold' in row 0 of .* is not one of the labels"):
        load_task({"path": str(cl_folder(tmp_path / "b", label="Wrold"))})
    with pytest.raises(InputError, match="the answer '-' in row 0 of .*train"):
        load_task({"path": str(cl_folder(tmp_path / "c", label="-"))})
    with pytest.raises(InputError, match="lies in 'TD', which is no task group .* did you mean 'TC'"):
        load_task({"path": str(cl_folder(tmp_path / "d", group="TD"))})
    folder = cl_folder(tmp_path / "e")
    write(folder / "labels.json", [0, 1])
    with pytest.raises(InputError, match="labels.json' is not a list of strings"):
        load_task({"path": str(folder)})
    (folder / "labels.json").unlink()
    with pytest.raises(InputError, match="labels.json' is missing"):
        load_task({"path": str(folder), "format": "cl_benchmark"})


def test_unlabelled_class_is_refused(tmp_path: Path) -> None:
    features = Features({"prompt": Value("string"), "completion": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"prompt": ["a", "b"], "completion": [-1, -1]}, features=features).save_to_disk(tmp_path / "ds")
    with pytest.raises(InputError, match="is -1, which is no class"):
        load_task({"path": str(tmp_path / "ds")})


def test_hub_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach the hub.\nTraceback and more")

    monkeypatch.setattr("hf_continual.data_sources.load_dataset", fake)
    with pytest.raises(InputError, match="the dataset 'user/ds' could not be loaded .*Couldn't reach") as caught:
        load_task({"path": "user/ds"})
    assert "\n" not in str(caught.value)


def test_spec_must_be_a_mapping() -> None:
    with pytest.raises(InputError, match="'agnews' is not a mapping"):
        load_task("agnews")  # type: ignore[arg-type]
    assert "eval_fraction" in TASK_KEYS


# --- content_hash ----------------------------------------------------------------------------------------------------


class ListDataset(torch.utils.data.Dataset):
    def __init__(self, items: list[object]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([1])


def test_content_hash_depends_on_rows_and_order_alone() -> None:
    data = Dataset.from_list(rows(6))
    assert len(content_hash(data)) == 64
    assert content_hash(data) == content_hash(Dataset.from_list(rows(6)))
    assert content_hash(data) == content_hash(ListDataset(rows(6)))
    assert content_hash(data) == content_hash(data.with_format("torch"))
    assert content_hash(data) != content_hash(data.select([1, 0, 2, 3, 4, 5]))
    assert content_hash(data) != content_hash(Dataset.from_list(rows(5)))


def test_content_hash_of_tensors_objects_and_streams() -> None:
    tensors = [{"ids": torch.tensor([1, 2])}, {"ids": torch.tensor([3, 4])}]
    assert content_hash(ListDataset(tensors)) == content_hash([{"ids": [1, 2]}, {"ids": [3, 4]}])
    assert content_hash([{"a": 1, "b": 2}]) == content_hash([{"b": 2, "a": 1}])
    assert content_hash([object()]) == content_hash([object()])
    assert content_hash(Stream()) == "unhashed"
    assert content_hash(Dataset.from_list(rows(2)).to_iterable_dataset()) == "unhashed"
    assert content_hash(iter([1])) == "unhashed"


def test_content_hash_of_long_data_samples_rows() -> None:
    seen = []

    class Counting(ListDataset):
        def __getitem__(self, index: int) -> object:
            seen.append(index)
            return self.items[index]

    long = content_hash(Counting(list(range(50_000))))
    assert len(seen) <= 20_000 and seen[-1] > 49_000
    assert long != content_hash(list(range(50_001)))


def test_content_hash_is_the_same_in_another_process() -> None:
    data = [{"b": {"x", "y"}.__len__(), "a": "é", "c": [1.5, None]}]
    code = f"from hf_continual.data import content_hash; print(content_hash({data!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == content_hash(data)


# --- the real benchmarks ---------------------------------------------------------------------------------------------


@needs_data
def test_real_long_sequence() -> None:
    task = load_task({"path": "long_sequence/{split}/yahoo.jsonl", "train_rows": 40}, base_dir=DATA)
    assert task.name == "yahoo" and len(task.train_dataset) == 40 and len(task.eval_dataset) == 500
    assert all(prompt.endswith("Answer:") for prompt in task.train_dataset["prompt"])


@needs_data
@pytest.mark.parametrize("folder", ["TC/agnews", "SC/SST-2", "NLI/RTE", "NLI/CB", "WiC/WiC", "COPA/COPA"])
def test_real_cl_benchmark(folder: str) -> None:
    task = load_task({"path": f"cl_benchmark/{folder}"}, base_dir=DATA)
    group, name = folder.split("/")
    prompt = task.train_dataset["prompt"][0]
    assert prompt.startswith(f"Task:{group}\nDataset:{name}\n") and prompt.endswith("\nAnswer:")
    assert (f"Option: {', '.join(task.labels)} \n" in prompt) == (group != "COPA")


@needs_data
def test_real_superni() -> None:
    folders = sorted((DATA / "superni").iterdir())
    assert len(folders) == 15
    for folder in folders:
        task = load_task({"path": str(folder), "train_rows": 20, "eval_rows": 5})
        assert task.scorer == "rouge_l" and len(task.train_dataset) == 20 and len(task.eval_dataset) == 5
        assert task.train_dataset["prompt"][0].endswith("\nOutput:")


@needs_data
def test_real_sgd() -> None:
    task = load_task({"path": "sgd/train/sgd_music_1.json"}, base_dir=DATA)
    assert task.name == "sgd_music_1" and len(task.train_dataset) == 941 and len(task.eval_dataset) == 104
