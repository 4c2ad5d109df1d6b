"""Stream files: what they may say, what they resolve to, and the hash they are cited by."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_continual.cli import main
from hf_continual.data import answers_outside_labels, load_task
from hf_continual.errors import InputError
from hf_continual.recipes import expand, load_recipe, load_tasks
from hf_continual.report import write_report
from hf_continual.streams import (
    absolute_reference,
    describe_stream,
    find_stream,
    load_stream,
    stream_hash,
    stream_names,
)
from hf_continual.streams.definition import DEFINITIONS, check_sections, split_reference
from hf_continual.testing import tiny_model, toy_tokenizer

DATA = Path(os.environ.get("HF_CONTINUAL_DATA", "not set"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="HF_CONTINUAL_DATA names no folder with the benchmarks")

MINE: dict[str, Any] = {
    "name": "mine",
    "title": "two tasks of mine",
    "source": "https://example.org/mine",
    "licence": "mine",
    "layout": "<task>/{train,test}.json",
    "lengths": {"max_prompt_length": 64},
    "evaluation": {"max_new_tokens": 4},
    "defaults": {
        "layouts": [{"path": "{task}/{split}", "columns": {"completion": "answer"}}],
        "template": "Q: {question}\nA:",
    },
    "tasks": {
        "colours": {"labels": ["red", "blue"], "training": {"num_train_epochs": 2}},
        "sums": {"scorer": "exact_match_plain"},
    },
    "variants": {"bare": {"title": "without cues", "defaults": {"template": "{question}"}}},
}

PINNED = "986c6ea41de60b372984f4520de4a600ce37373aae6b8a4fb42f431cb1ce864a"
PINNED_QUICKSTART = "804d19e8733a"


def write_rows(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def colour_rows(count: int = 6) -> list[dict[str, Any]]:
    return [{"question": f"colour of {i}?", "answer": ("red", "blue")[i % 2]} for i in range(count)]


def sum_rows(count: int = 6) -> list[dict[str, Any]]:
    return [{"question": f"{i} + 1?", "answer": [str(i + 1), f"it is {i + 1}"]} for i in range(count)]


def write_mine(root: Path, definition: dict[str, Any] | None = None) -> Path:
    """A stream file, and its data beside it in `data`."""
    for split, count in (("train", 6), ("test", 4)):
        write_rows(root / "data" / "colours" / f"{split}.json", colour_rows(count))
        write_rows(root / "data" / "sums" / f"{split}.json", sum_rows(count))
    return write_stream(root, definition or MINE)


def write_stream(root: Path, definition: dict[str, Any]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "mine.yaml").write_text(yaml.safe_dump(definition, sort_keys=False))
    return root / "mine.yaml"


def changed(path: str, value: Any) -> dict[str, Any]:
    """MINE with the value at a dotted path; `...` takes the key out."""
    definition = copy.deepcopy(MINE)
    *parents, last = path.split(".")
    inside: Any = definition
    for key in parents:
        inside = inside[int(key)] if key.isdigit() else inside.setdefault(key, {})
    if value is ...:
        del inside[last]
    else:
        inside[last] = value
    return definition


def hash_of(reference: Any, root: Path, **options: Any) -> str:
    stream = find_stream(reference)
    return stream_hash(load_stream(stream, data_dir=root, **options), stream)


# --- what a file resolves to -----------------------------------------------------------------------------------------


def test_a_file_by_its_path(tmp_path: Path) -> None:
    write_mine(tmp_path)
    colours, sums = load_stream("./mine.yaml", data_dir="data", base_dir=tmp_path)
    assert colours.train_dataset[0] == {"prompt": "Q: colour of 0?\nA:", "completion": "red", "references": ["red"]}
    assert sums.eval_dataset[3]["references"] == ["4", "it is 4"] and len(sums.eval_dataset) == 4
    assert (colours.labels, colours.scorer, colours.training) == (["red", "blue"], None, {"num_train_epochs": 2})
    assert sums.scorer == "exact_match_plain" and describe_stream(tmp_path / "mine.yaml")["tasks"] == [
        "colours",
        "sums",
    ]


def test_a_variant_lies_over_its_stream(tmp_path: Path) -> None:
    path = write_mine(tmp_path)
    stream = find_stream(f"{path}:bare")
    assert stream.name == "mine:bare" and stream.title == "two tasks of mine: without cues"
    assert load_stream(stream, data_dir=tmp_path / "data")[0].train_dataset["prompt"][0] == "colour of 0?"
    with pytest.raises(InputError, match="'mine' has no variant 'bear'; did you mean 'bare'"):
        find_stream(f"{path}:bear")


def test_a_file_extends_another_by_its_order(tmp_path: Path) -> None:
    write_mine(tmp_path)
    other = tmp_path / "reversed.yaml"
    other.write_text("extends: ./mine.yaml\norder: [sums, colours]\ntasks: {sums: {scorer: rouge_l}}\n")
    stream = find_stream(other)
    assert list(stream.tasks) == ["sums", "colours"] and stream.tasks["sums"]["scorer"] == "rouge_l"
    assert stream.name == "reversed" and stream.title == MINE["title"] and list(stream.variants) == ["bare"]
    shipped = tmp_path / "own-order.yaml"
    shipped.write_text("extends: standard-order1\norder: [agnews, yahoo]\n")
    assert describe_stream(shipped)["tasks"] == ["agnews", "yahoo"]
    (tmp_path / "a.yaml").write_text("extends: ./b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: ./a.yaml\n")
    with pytest.raises(InputError, match="extend each other in a circle"):
        find_stream(tmp_path / "a.yaml")


def test_layouts_are_tried_in_their_order(tmp_path: Path) -> None:
    places = [{"path": "new/{task}.json"}, {"data_files": {"train": "{task}/train.json", "eval": "{task}/test.json"}}]
    places = [{**place, "columns": {"completion": "answer"}} for place in places]
    path = write_mine(tmp_path, changed("defaults.layouts", places))
    assert [len(task.eval_dataset) for task in load_stream(path, data_dir=tmp_path / "data")] == [4, 4]
    write_rows(tmp_path / "data" / "NEW" / "Colours.json", colour_rows(10))
    tasks = load_stream(path, data_dir=tmp_path / "data")
    assert [len(task.train_dataset) for task in tasks] == [9, 6]  # the first of one file, a tenth of it held out


def test_rows_and_split_of_the_file_are_defaults(tmp_path: Path) -> None:
    definition = changed("defaults.train_rows", 5)
    definition["defaults"]["eval_split"] = "test"
    path = write_mine(tmp_path, definition)
    write_rows(tmp_path / "data" / "colours" / "dev.json", colour_rows(1))
    tasks = load_stream(path, data_dir=tmp_path / "data")
    assert [(len(t.train_dataset), len(t.eval_dataset)) for t in tasks] == [(5, 4), (5, 4)]
    tasks = load_stream(path, data_dir=tmp_path / "data", train_rows=3, order=["colours"], eval_split="dev")
    assert [(t.name, len(t.train_dataset), len(t.eval_dataset)) for t in tasks] == [("colours", 3, 1)]
    with pytest.raises(InputError, match="eval_split=.* must be 'train' or one of dev"):
        load_stream(path, data_dir=tmp_path / "data", eval_split="tset")


def test_end_tasks_are_loaded_with_their_task(tmp_path: Path) -> None:
    write_rows(tmp_path / "d" / "corpus.json", [{"text": f"text {i}"} for i in range(10)])
    write_rows(tmp_path / "d" / "end.json", [{"text": f"t {i}", "label": "ab"[i % 2]} for i in range(10)])
    end = {"name": "end", "layouts": [{"path": "end.json"}], "kind": "classification", "labels": ["a", "b"],
           "seeds": [1, 2], "training": {"num_train_epochs": 3}}  # fmt: skip
    task = {"layouts": [{"path": "corpus.json"}], "kind": "mlm", "end_task": end}
    path = write_stream(tmp_path, {"tasks": {"domain": task}})
    loaded = load_stream(path, data_dir=tmp_path / "d", train_rows=4)[0]
    assert loaded.kind == "mlm" and len(loaded.train_dataset) == 4
    assert loaded.end_task.name == "end" and list(loaded.end_task.seeds) == [1, 2]
    assert len(loaded.end_task.train_dataset) == 9 and loaded.end_task.training == {"num_train_epochs": 3}
    first = hash_of(path, tmp_path / "d")
    write_stream(tmp_path, {"tasks": {"domain": {**task, "end_task": {**end, "seeds": [1, 3]}}}})
    assert hash_of(path, tmp_path / "d") != first
    (tmp_path / "d" / "end.json").unlink()
    with pytest.raises(InputError, match=r"lacks the tasks domain \(end task\)"):
        load_stream(path, data_dir=tmp_path / "d")


def test_the_hub_when_there_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(path: str, subset: str | None = None, **options: Any) -> Any:
        asked.append((path, subset, options))
        if path == "org/gone":
            raise ConnectionError("no route to the hub")
        rows = datasets.Dataset.from_list([{"question": f"q{i}", "answer": "red"} for i in range(4)])
        return datasets.DatasetDict({"train": rows, "test": rows.select([0])})

    monkeypatch.setattr("hf_continual.data_sources.load_dataset", load_dataset)
    hub = {"path": "org/name", "subset": "{task}", "revision": "abc", "columns": {"completion": "answer"}}
    path = write_mine(tmp_path, changed("defaults.hub", hub))
    tasks = load_stream(path)
    assert asked[0] == ("org/name", "colours", {"revision": "abc"}) and len(tasks[0].eval_dataset) == 1
    assert tasks[0].train_dataset["prompt"][0] == "Q: q0\nA:"
    write_stream(tmp_path, changed("defaults.hub", {**hub, "path": "org/gone"}))
    with pytest.raises(InputError, match=r"'org/gone' could not be loaded.*or set data_dir: it should hold <task>/"):
        load_stream(path)


def test_superni_in_both_layouts(tmp_path: Path) -> None:
    """SAPT's folders and plain task folders hold the same rows, so that the hash is the same."""
    hashes = []
    for layout in ("CL_Benchmark/SuperNI", ""):
        root = tmp_path / (layout.split("/")[0] or "plain")
        for number, name in enumerate(describe_stream("superni15-order1")["tasks"]):
            labels = find_stream("superni15-order1").tasks[name].get("labels", ["some text"])
            for split, count in (("train", 4), ("test", 2)):
                rows = [{"id": f"{i}", "input": f"in {i}", "output": labels[0] if number % 2 else [labels[0]]}
                        for i in range(count)]  # fmt: skip
                content = {"Definition": [f"Do {name}."], "Positive Examples": [], "Instances": rows}
                write_rows(root / layout / name / f"{split}.json", content)
        tasks = load_stream("superni15-order1", data_dir=root)
        assert {task.scorer for task in tasks} == {"rouge_l"} and len(tasks[3].eval_dataset) == 2
        assert tasks[0].train_dataset["prompt"][1] == (
            "Definition: Do task1572_samsum_summary.\n\nNow complete the following example -\nInput: in 1\nOutput: "
        )
        hashes.append(hash_of("superni15-order1", root))
        tasl = load_stream("superni15-order1:tasl", data_dir=root)
        assert tasl[1].train_dataset["prompt"][0].endswith("polarity_classification.\n [IN] in 0\n [OUT] ")
        assert [t.name for t in tasl if t.scorer == "exact_match_casefold"] == [
            t.name for t in tasl if t.name.startswith(("task363", "task1687", "task875"))
        ]
    assert hashes[0] == hashes[1]


def test_one_file_a_task_as_natural_instructions_has_them(tmp_path: Path) -> None:
    for name in describe_stream("superni12-order3")["tasks"]:
        labels = find_stream("superni12-order3").tasks[name].get("labels", ["some text"])
        rows = [{"input": f"in {i}", "output": labels[:1]} for i in range(20)]
        write_rows(tmp_path / "tasks" / f"{name}.json", {"Definition": ["Do."], "Instances": rows})
    tasks = load_stream("superni12-order4", data_dir=tmp_path)
    assert tasks[0].name.startswith("task748_") and (len(tasks[0].train_dataset), len(tasks[0].eval_dataset)) == (18, 2)
    scorers = {task.name.split("_")[0]: task.scorer for task in tasks}
    assert {name for name, scorer in scorers.items() if scorer == "exact_match_seekr"} == {
        "task363",
        "task195",
        "task875",
    }
    assert set(scorers.values()) == {"exact_match_seekr", "rouge_l_seekr"}


def test_superni12_prompts_lie_where_seekrs_script_has_them(tmp_path: Path) -> None:
    for name in describe_stream("superni12-order3")["tasks"]:
        answer = find_stream("superni12-order3").tasks[name].get("labels", ["some text"])[0]
        for split in ("train", "test"):
            write_rows(tmp_path / name.split("_")[0] / f"{split}.json", [{"prompt": "Do: ", "answer": answer}] * 2)
    tasks = load_stream("superni12-order4:prompts", data_dir=tmp_path)
    assert len(tasks) == 12 and tasks[0].name.startswith("task748_") and tasks[0].train_dataset["prompt"][0] == "Do: "


def test_tasl_prompts_from_either_layout(tmp_path: Path) -> None:
    sentence = "Title: a\nText: b\n"
    prompt = (
        "What is the topic of the following paragraph? Choose one from the option. Option: World, Sports, Business, "
        "Science or Technology.\nTitle: a\nText: b\n\nAnswer:"
    )
    folder = tmp_path / "one" / "TC" / "agnews"
    for split in ("train", "dev"):
        write_rows(folder / f"{split}.json", [{"sentence": sentence, "label": "World"}] * 2)
        write_rows(tmp_path / "two" / split / "agnews_T5.json", [{"id": "0", "input": prompt, "output": "World"}] * 2)
    write_rows(folder / "labels.json", ["World", "Sports", "Business", "Science or Technology"])
    one, two = (
        load_stream("standard-order3:tasl", data_dir=tmp_path / name, order=["agnews"]) for name in ("one", "two")
    )
    assert one[0].train_dataset[0] == two[0].train_dataset[0]
    (tmp_path / "clone").mkdir()
    (tmp_path / "two").rename(tmp_path / "clone" / "data_Long_Sequence_Benchmark")  # data_dir: TaSL's repository
    cloned = load_stream("standard-order3:tasl", data_dir=tmp_path / "clone", order=["agnews"])
    assert cloned[0].train_dataset[:] == two[0].train_dataset[:]
    stream = find_stream("standard-order3:tasl")
    assert stream_hash(one, stream) == stream_hash(two, stream)
    plain = load_stream("standard-order3", data_dir=tmp_path / "one", order=["agnews"])
    assert plain[0].train_dataset["prompt"][0].startswith("Task:TC\nDataset:agnews\nWhat is the topic")


# --- the hash --------------------------------------------------------------------------------------------------------


def test_the_hash_is_that_of_content_alone(tmp_path: Path) -> None:
    path = write_mine(tmp_path)
    first = hash_of(path, tmp_path / "data")
    # Other machines: another place, name, layout, and order of keys.
    moved = changed("defaults.layouts", [{"data_files": {"test": "{task}.test.json", "train": "{task}.train.json"},
                                          "columns": {"completion": "answer"}}])  # fmt: skip
    moved |= {"name": "renamed", "title": "t", "licence": "l", "note": "n", "source": "s", "layout": "w"}
    moved = {key: moved[key] for key in sorted(moved, reverse=True)}
    for task, rows in (("colours", colour_rows), ("sums", sum_rows)):
        for split, count in (("train", 6), ("test", 4)):
            turned = [dict(reversed(row.items())) for row in rows(count)]
            write_rows(tmp_path / "elsewhere" / f"{task}.{split}.json", turned)
    assert hash_of(write_stream(tmp_path / "b", moved), tmp_path / "elsewhere") == first
    # Another process has another hash seed.
    code = ("import sys; from hf_continual.streams import *; s = find_stream(sys.argv[1]); "
            "print(stream_hash(load_stream(s, data_dir=sys.argv[2]), s))")  # fmt: skip
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "data")]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == first


def test_the_hash_is_pinned(tmp_path: Path) -> None:
    """It must not change between releases: what was cited would no longer be found."""
    assert hash_of(write_mine(tmp_path), tmp_path / "data") == PINNED
    assert hash_of("quickstart", None).startswith(PINNED_QUICKSTART)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("defaults.template", "Q: {question}\nA: "),
        ("tasks.colours.labels", ["blue", "red"]),
        ("tasks.colours.scorer", "exact_match"),
        ("tasks.colours.training.num_train_epochs", 3),
        ("lengths.max_prompt_length", 65),
        ("evaluation.max_new_tokens", 5),
        ("order", ["sums", "colours"]),
        ("order", ["colours"]),
        ("defaults.train_rows", 5),
        ("training", {"num_train_epochs": 1}),
    ],
)
def test_what_changes_the_hash(tmp_path: Path, path: str, value: Any) -> None:
    first = hash_of(write_mine(tmp_path), tmp_path / "data")
    assert hash_of(write_stream(tmp_path, changed(path, value)), tmp_path / "data") != first


@pytest.mark.parametrize(("split", "column"), [("train", "question"), ("test", "question"), ("test", "answer")])
def test_one_character_of_a_row_changes_the_hash(tmp_path: Path, split: str, column: str) -> None:
    path = write_mine(tmp_path)
    first = hash_of(path, tmp_path / "data")
    rows = sum_rows(6 if split == "train" else 4)
    # The second of two accepted answers.
    rows[-1][column] = [rows[-1][column][0], "it is_4"] if column == "answer" else rows[-1][column] + " "
    write_rows(tmp_path / "data" / "sums" / f"{split}.json", rows)
    assert hash_of(path, tmp_path / "data") != first


def test_every_row_of_a_large_task_counts(tmp_path: Path) -> None:
    """`content_hash` takes every k-th row of more than 20000; a cited hash may not."""
    path = write_mine(tmp_path)
    rows = [{"question": str(i), "answer": "1"} for i in range(20_003)]
    found = set()
    for text in ("1", "one"):
        rows[1]["question"] = text
        write_rows(tmp_path / "data" / "sums" / "train.json", rows)
        found.add(hash_of(path, tmp_path / "data", order=["sums"]))
    assert len(found) == 2


def test_run_options_count(tmp_path: Path) -> None:
    path = write_mine(tmp_path)
    options: list[dict[str, Any]] = [{}, {"train_rows": 3}, {"eval_rows": 2}, {"scorer": "rouge_l"},
                                     {"order": ["sums", "colours"]}, {"eval_split": "train"}]  # fmt: skip
    assert len({hash_of(path, tmp_path / "data", **each) for each in options}) == len(options)
    assert hash_of(path, tmp_path / "data", train_rows=100) == hash_of(path, tmp_path / "data")


def test_a_cited_hash_is_kept(tmp_path: Path) -> None:
    path = write_mine(tmp_path)
    right = hash_of(path, tmp_path / "data")
    assert load_stream(f"{path}@{right[:12]}", data_dir=tmp_path / "data")[0].name == "colours"
    assert load_stream(f"{path}@{right}", data_dir=tmp_path / "data")
    bare = hash_of(f"{path}:bare", tmp_path / "data")
    assert load_stream(f"{path}:bare@{bare[:14]}", data_dir=tmp_path / "data")
    with pytest.raises(InputError, match=f"mine@{'0' * 12} is cited, and the data in .* resolves to mine@{right[:12]}"):
        load_stream(f"{path}@{'0' * 12}", data_dir=tmp_path / "data")
    with pytest.raises(InputError, match="is cited"):
        load_stream(f"{path}@{right[:12]}", data_dir=tmp_path / "data", train_rows=2)
    for wrong in ("latest", "1a2b", "XYZ" * 5, ""):
        with pytest.raises(InputError, match="is no hash; write the 12 hexadecimal digits"):
            find_stream(f"{path}@{wrong}")


def test_references() -> None:
    assert split_reference("a:b@0123456789ab") == ("a", "b", "0123456789ab")
    assert split_reference("x@y/s.yaml:b") == ("x@y/s.yaml", "b", None)
    with pytest.raises(InputError, match="the file 'nowhere.yaml' does not exist"):
        find_stream("nowhere.yaml")
    with pytest.raises(InputError, match="'standard-order1' has no variant 'tals'; did you mean 'tasl'"):
        find_stream("standard-order1:tals")
    with pytest.raises(InputError, match="'quickstart' has no variants"):
        find_stream("quickstart:tasl")
    with pytest.raises(InputError, match="3 is unknown"):
        find_stream(3)  # type: ignore[arg-type]


# --- bad files and bad data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sorce", "x", "sorce is no key of a stream file; did you mean 'source'"),
        ("tasks.sums.scorers", "rouge_l", "tasks.sums.scorers is no key .* did you mean 'scorer'"),
        ("tasks.sums.scorer", "rogue_l", "tasks.sums.scorer='rogue_l' is unknown; did you mean 'rouge_l'"),
        ("tasks.sums.kind", "completions", "tasks.sums.kind: 'completions' is unknown; did you mean 'completion'"),
        ("tasks.colours.labels", [True, False], "tasks.colours.labels: True is no list of strings"),
        ("tasks.colours.labels", "red", "tasks.colours.labels: 'red' is no list of strings"),
        ("tasks.sums.train_rows", 0, "tasks.sums.train_rows: 0 is not a whole number above 0"),
        ("tasks.sums.published_rows", {"train": "many"}, "published_rows.train: 'many' is not a whole number"),
        ("tasks.sums", 3, "tasks.sums: 3 is not a mapping"),
        ("tasks.a/b", {}, "tasks.a/b: task name 'a/b' cannot name a folder"),
        ("defaults.layouts", [{"pth": "x"}], "layouts.0.pth is no key .* did you mean 'path'"),
        ("defaults.layouts", [{"path": "/x.json"}], "layouts.0.path: '/x.json' is no path below data_dir"),
        ("defaults.layouts", [{}], "layouts.0: give either path or data_files"),
        ("defaults.layouts", [{"data_files": {"test": "x.json"}}], "data_files: .* names no train file"),
        ("defaults.layouts", [{"path": "x", "format": "cl_bench"}], "format: 'cl_bench' is unknown; did you mean"),
        ("defaults.layouts", ..., "tasks.colours.layouts: the task has no data"),
        ("defaults.hub", {"subset": "x"}, "hub.path is missing"),
        ("order", ["colours", "sum"], "order: there is no task 'sum' in `tasks`; did you mean 'sums'"),
        ("order", ["sums", "sums"], "order: 'sums' stands there twice"),
        ("order", "sums", "order: 'sums' is not a list"),
        ("name", "my stream", "name: 'my stream' cannot be cited"),
        ("title", 3, "title: 3 is not a string"),
        ("tasks", {}, "tasks: there are none"),
        ("extends", "standard-order9", "extends: there is no stream 'standard-order9'; did you mean 'standard-order"),
        ("variants.bare.tasks", {"sum": {}}, "variants.bare: tasks: the stream has no task 'sum'; did you mean 'sums'"),
        ("variants.bare.name", "x", "variants.bare: name is no key"),
        ("variants.bare", 3, "variants.bare: 3 is not a mapping"),
        ("variants", [1], r"variants: \[1\] is not a mapping"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, path: str, value: Any, message: str) -> None:
    file = write_stream(tmp_path, changed(path, value))
    with pytest.raises(InputError, match=message) as caught:
        find_stream(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_sections_and_yaml(tmp_path: Path) -> None:
    write_mine(tmp_path, changed("evaluation", {"max_new_token": 3}))
    with pytest.raises(InputError, match=r"evaluation.max_new_token is no key .* did you mean 'max_new_tokens'"):
        load_stream(tmp_path / "mine.yaml", data_dir=tmp_path / "data")
    write_stream(tmp_path, changed("lengths.max_prompt_length", 2))
    with pytest.raises(InputError, match=r"mine.yaml: lengths: .*max_prompt_length=2 must be a whole number"):
        load_stream(tmp_path / "mine.yaml", data_dir=tmp_path / "data")
    (tmp_path / "mine.yaml").write_text("tasks: {a: {}, a: {}}\n")
    with pytest.raises(InputError, match=r"mine.yaml is not valid YAML: .*'a' stands there twice"):
        find_stream(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("- a\n")
    with pytest.raises(InputError, match=r"mine.yaml is no mapping"):
        find_stream(tmp_path / "mine.yaml")


def test_bad_templates(tmp_path: Path) -> None:
    for template, message in (
        ("{question", "cannot be read"),
        ("{question.__class__}", "no plain {column}"),
        ("{question!r}", "no plain {column}"),
        ("{}", "no plain {column}"),
        ("always the same", "names no column"),
        ("{qestion}", r"train.json' has no column 'qestion'; did you mean 'question'"),
    ):
        path = write_mine(tmp_path, changed("defaults.template", template))
        with pytest.raises(InputError, match=message):
            load_stream(path, data_dir=tmp_path / "data")
    spec = {"path": str(tmp_path / "data" / "sums"), "columns": {"prompt": "question", "completion": "answer"}}
    with pytest.raises(InputError, match=r"which columns.prompt names too"):
        load_task({**spec, "template": "{question}"})
    rows = sum_rows()
    rows[2]["question"] = None
    write_rows(tmp_path / "data" / "sums" / "train.json", rows)
    with pytest.raises(InputError, match=r"column 'question' in row 2 of .*sums/train.json' is None, and the template"):
        load_stream(write_stream(tmp_path, MINE), data_dir=tmp_path / "data")


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    files = {"train": "{task}/train.json", "test": "{task}/test.json"}
    layouts = [{"data_files": files, "columns": {"completion": "answer"}}]
    path = write_mine(tmp_path, changed("defaults.layouts", layouts))
    (tmp_path / "data" / "sums" / "test.json").unlink()
    with pytest.raises(InputError, match=r"has the training rows of sums and lacks 'sums/test.json', its split 'test'; "
                                         r"it should hold <task>/\{train,test\}.json, published as https"):  # fmt: skip
        load_stream(path, data_dir=tmp_path / "data")
    (tmp_path / "data" / "sums" / "train.json").unlink()
    with pytest.raises(
        InputError,
        match=r"lacks the tasks sums of the stream 'mine' \(there is no sums/train.json\); it should hold <task>/",
    ):
        load_stream(path, data_dir=tmp_path / "data")
    # With a template of splits, one that is demanded must be there.
    write_mine(tmp_path)
    with pytest.raises(InputError, match="eval_split: 'validation' is not in data_files"):
        load_stream(path, data_dir=tmp_path / "data", eval_split="validation")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "is None, not a string or a list of strings"),
        ([], "is \\[\\], not a string or a list of strings"),
        (["4", 4], "mixes int and str in \\['4', 4\\]; write each accepted answer as a string"),
    ],
)
def test_rows_without_references_and_mixed_ones(tmp_path: Path, answer: Any, message: str) -> None:
    path = write_mine(tmp_path)
    rows = sum_rows(4)
    rows[3]["answer"] = answer
    write_rows(tmp_path / "data" / "sums" / "test.json", rows)
    with pytest.raises(
        InputError, match=f"stream 'mine', task 'sums': column 'answer' in row 3 of .*test.json' {message}"
    ):
        load_stream(path, data_dir=tmp_path / "data")


def test_labels_bind_training_rows_and_are_counted_in_evaluation(tmp_path: Path) -> None:
    path = write_mine(tmp_path)
    rows = colour_rows(4)
    rows[1]["answer"] = "-"
    write_rows(tmp_path / "data" / "colours" / "test.json", rows)
    assert [answers_outside_labels(task) for task in load_stream(path, data_dir=tmp_path / "data")] == [1, 0]
    write_rows(tmp_path / "data" / "colours" / "train.json", rows)
    with pytest.raises(
        InputError, match=r"answer '-' in row 1 of .*train.json' is not one of the labels 'red', 'blue'"
    ):
        load_stream(path, data_dir=tmp_path / "data")
    write_stream(tmp_path, changed("tasks.colours.extra_answers", ["-"]))
    task = load_stream(path, data_dir=tmp_path / "data")[0]
    assert task.labels == ["red", "blue"] and "-" in task.train_dataset["completion"]
    with pytest.raises(InputError, match="extra_answers: there are no labels"):
        load_task({"path": str(tmp_path / "data" / "sums"), "columns": {"prompt": "question", "completion": "answer"},
                   "extra_answers": ["x"]})  # fmt: skip


# --- shipped files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in stream_names() if name != "quickstart"])
def test_shipped_files(name: str) -> None:
    stream = find_stream(name)
    check_sections(stream)
    assert stream.name == name == (DEFINITIONS / f"{name}.yaml").stem
    for key in ("title", "paper", "source", "licence", "layout"):
        assert getattr(stream, key), key
    for variant in stream.variants:
        other = find_stream(f"{name}:{variant}")
        check_sections(other)
        assert other.name == f"{name}:{variant}" and len(other.tasks) == len(stream.tasks)
    with pytest.raises(InputError, match="needs its data") as caught:
        load_stream(name)
    assert stream.source.split(",")[0] in str(caught.value)


def test_orders_of_superni() -> None:
    def ids(name: str) -> str:
        return " ".join(task.split("_")[0].removeprefix("task") for task in describe_stream(name)["tasks"])

    assert ids("superni15-order1") == "1572 363 1290 181 002 1510 639 1729 073 1590 748 511 591 1687 875"
    assert ids("superni15-order2") == "748 073 1590 639 1572 1687 591 363 1510 1729 181 511 002 1290 875"
    assert ids("superni12-order3") == "1572 363 1290 181 002 1510 073 748 511 591 195 875"
    assert ids("superni12-order4") == "748 073 1572 195 591 363 1510 181 511 002 1290 875"
    assert find_stream("superni12-order3").training == {"num_train_epochs": 10}


# --- recipes and the command line ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return str(folder)


def write_recipe(root: Path, model: str, **sections: Any) -> Path:
    recipe = {
        "model": model,
        "training": {"learning_rate": 1e-3, "use_cpu": True, "max_steps": 1, "disable_tqdm": True},
        "tasks": {"stream": "mine.yaml", "data_dir": "data"},
        **sections,
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return root / "recipe.yaml"


def test_a_recipe_takes_the_defaults_of_its_stream(
    tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r").mkdir()
    write_mine(tmp_path / "r", changed("training", {"num_train_epochs": 7, "weight_decay": 0.5}))
    monkeypatch.chdir(tmp_path)  # the stream's path starts from the recipe
    path = write_recipe(tmp_path / "r", model_folder, training={"use_cpu": True, "weight_decay": 0.25})
    run = expand(load_recipe(path), path.parent.resolve())[0]
    assert run.recipe["data"]["max_prompt_length"] == 64 and run.recipe["evaluation"]["max_new_tokens"] == 4
    assert run.recipe["training"]["num_train_epochs"] == 7 and run.recipe["training"]["weight_decay"] == 0.25
    assert [task.training for task in run.tasks()] == [{"num_train_epochs": 2}, {}]
    again = expand(dict(run.recipe), path.parent.resolve())[0]  # as a run directory is opened
    assert [task.training for task in again.tasks()] == [{"num_train_epochs": 2}, {}]
    options = {"data.max_prompt_length": 32, "training.num_train_epochs": 1, "evaluation.max_new_tokens": 9}
    run = expand(load_recipe(path), path.parent.resolve(), options)[0]
    assert run.recipe["data"]["max_prompt_length"] == 32 and run.recipe["evaluation"]["max_new_tokens"] == 9
    assert [task.training for task in run.tasks()] == [{}, {}]  # what the recipe says holds for every task
    tasks = {**run.recipe["tasks"], "training": {"sums": {"num_train_epochs": 5}}}
    own = load_tasks(tasks, path.parent, 42, run.recipe["training"])
    assert [task.training for task in own] == [{}, {"num_train_epochs": 5}]


def test_scorers_of_a_recipe_and_of_its_stream(tmp_path: Path, model_folder: str) -> None:
    write_mine(tmp_path, changed("defaults.scorer", "exact_match_squad"))
    path = write_recipe(tmp_path, model_folder, evaluation={"scorer": "rouge_l"})
    with pytest.raises(InputError, match=r"evaluation.scorer='rouge_l' has no effect.*write tasks.scorer='rouge_l'"):
        expand(load_recipe(path), tmp_path)
    path = write_recipe(tmp_path, model_folder, tasks={"stream": "mine.yaml", "data_dir": "data", "scorer": "rouge_l"})
    assert {task.scorer for task in expand(load_recipe(path), tmp_path)[0].tasks()} == {"rouge_l"}


def test_ls_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_mine(tmp_path)
    assert main(["ls", "streams"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in stream_names()) and "tasl" in listed
    assert main(["ls", "streams", "superni15-order1:tasl"]) == 0
    shown = capsys.readouterr().out
    for word in ("TaSL", "circle-hit/SAPT", "licence:", "max_new_tokens: 128", "exact_match_casefold", "POS, NEG",
                 "160 + 20", "[INS] {definition}", "dev or test, else held out", "With --data_dir DIR"):  # fmt: skip
        assert word in shown, word
    (tmp_path / "data" / "sums" / "test.json").unlink()
    assert main(["ls", "streams", str(path), "--data_dir", str(tmp_path / "data")]) == 0
    shown = capsys.readouterr().out
    assert f"stream: mine@{hash_of(path, tmp_path / 'data')[:12]}" in shown
    assert "held out of train" in shown and "test" in shown.split("scored split")[1]
    assert main(["ls", "streams", "quickstart"]) == 0
    assert f"quickstart@{PINNED_QUICKSTART}" in capsys.readouterr().out
    assert main(["ls", "streams", "standrad-order1"]) == 2
    assert "did you mean 'standard-order1'" in capsys.readouterr().err
    assert main(["ls", "methods", "--data_dir", "x"]) == 2
    assert "--data_dir x is for one stream" in capsys.readouterr().err


def test_dry_run_shows_the_stream(
    tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_mine(tmp_path)
    rows = colour_rows(4)
    rows[0]["answer"] = "green"
    write_rows(tmp_path / "data" / "colours" / "test.json", rows)
    recipe = write_recipe(tmp_path, model_folder)
    assert main(["run", str(recipe), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    cited = f"mine@{hash_of(path, tmp_path / 'data')[:12]}"
    assert f"stream: {cited}" in shown and "colours: 1 of 4 evaluation rows are answered outside its labels" in shown
    assert main(["run", str(recipe), "--dry_run", "--tasks.stream", f"mine.yaml@{cited.split('@')[1]}"]) == 0
    capsys.readouterr()
    assert main(["run", str(recipe), "--dry_run", "--tasks.stream", "mine.yaml@000000000000"]) == 2
    error = capsys.readouterr().err
    assert f"resolves to {cited}" in error and error.count("\n") == 1
    assert main(["run", str(recipe), "--dry_run", "--tasks.data_dir", "nowhere"]) == 2
    assert "the folder 'nowhere' does not exist; it should hold <task>" in capsys.readouterr().err


def test_runs_record_their_stream_and_are_not_mixed(
    tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_mine(tmp_path)
    rows = colour_rows(4)
    rows[0]["answer"] = "green"
    write_rows(tmp_path / "data" / "colours" / "test.json", rows)
    recipe = str(write_recipe(tmp_path, model_folder))
    first = hash_of(path, tmp_path / "data")
    assert main(["run", recipe, "--run_dir", "runs/a"]) == 0
    assert json.loads((tmp_path / "runs/a/queue.json").read_text())["stream"] == {"name": "mine", "hash": first}
    report = (tmp_path / "runs/a/report.md").read_text()
    assert (
        f"`mine@{first[:12]}`" in report and "answered outside the labels, which are wrong: colours 1 of 4." in report
    )
    assert main(["run", str(tmp_path / "runs/a")]) == 0  # a run directory is continued by itself
    # Other training of a task by the definition: the rows agree, and the hashes do not.
    write_stream(tmp_path, changed("tasks.colours.training.num_train_epochs", 3))
    second = hash_of(path, tmp_path / "data")
    assert main(["run", recipe, "--run_dir", "runs/b"]) == 0
    capsys.readouterr()
    assert main(["compare", "runs/a", "runs/b"]) == 2
    error = capsys.readouterr().err
    for word in (f"mine@{first[:12]}", f"mine@{second[:12]}", "their rows agree", "with the `tasks:` of the other"):
        assert word in error, word
    assert main(["compare", "runs/a", "runs/b", "--scorer", "exact_match"]) == 2  # their training differs
    with pytest.raises(InputError, match=f"mine@{first[:12]} and of the other mine@{second[:12]}"):
        write_report(tmp_path / "runs")
    # Fewer rows: the difference is named.
    assert main(["run", recipe, "--run_dir", "other/c", "--tasks.eval_rows", "3"]) == 0
    capsys.readouterr()
    assert main(["compare", "runs/b", "other/c", "--scorer", "exact_match"]) == 2
    error = capsys.readouterr().err
    assert f"mine@{second[:12]}" in error and "the evaluation rows of colours differ" in error
    # Runs from before hashes were recorded are compared by their rows.
    for run in ("a", "b"):
        queue = json.loads((tmp_path / f"runs/{run}/queue.json").read_text())
        queue.pop("stream")
        (tmp_path / f"runs/{run}/queue.json").write_text(json.dumps(queue))
    assert main(["compare", "runs/a", "runs/b"]) == 0


def test_absolute_references(tmp_path: Path) -> None:
    path = write_mine(tmp_path)
    assert absolute_reference("mine.yaml:bare@0123456789ab", tmp_path) == f"{path.resolve()}:bare@0123456789ab"
    assert absolute_reference("standard-order1:tasl", tmp_path) == "standard-order1:tasl"


# --- the real benchmarks ---------------------------------------------------------------------------------------------


@needs_data
def test_real_superni() -> None:
    tasks = load_stream("superni15-order2", data_dir=DATA / "superni")
    sizes = {task.name: (len(task.train_dataset), len(task.eval_dataset)) for task in tasks}
    assert sizes["task1590_diplomacy_text_generation"] == (113, 13)
    assert sizes["task002_quoref_answer_generation"] == (900, 100)
    assert not any(answers_outside_labels(task) for task in tasks)
    with pytest.raises(InputError, match="lacks the tasks task195_sentiment140_classification of"):
        load_stream("superni12-order3", data_dir=DATA / "superni")
    assert len(load_stream("superni12-order3:sapt-files", data_dir=DATA / "superni")) == 12


@needs_data
def test_real_tasl_prompts_are_made_from_the_cl_benchmark() -> None:
    """TaSL's own prompts, which the jsonl files hold, from O-LoRA's folder."""
    order = ["cb", "wic", "copa", "rte", "sst-2", "agnews"]
    made = load_stream("long-order4:tasl", data_dir=DATA / "cl_benchmark", order=order)
    theirs = load_stream("long-order4:tasl", data_dir=DATA / "long_sequence", order=order)
    for one, two in zip(made, theirs, strict=True):
        assert set(two.train_dataset["prompt"]) <= set(one.train_dataset["prompt"]), one.name
