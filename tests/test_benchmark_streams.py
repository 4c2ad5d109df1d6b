"""TRACE, SGD, DAS and code tuning: their definitions, and reading them from small fixtures in the published layouts."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_runs import save_model

from hf_continual import scorers
from hf_continual.cli import main
from hf_continual.data import as_rows, load_task
from hf_continual.data_sources import FORMATS, Table
from hf_continual.errors import InputError
from hf_continual.stream_layouts import READERS, move_rows
from hf_continual.streams import find_stream, load_stream, stream_hash

DATA = Path(os.environ.get("HF_CONTINUAL_DATA", "../shared/data"))
TRACE_1 = "C-STANCE FOMC MeetingBank Py150 ScienceQA NumGLUE-cm NumGLUE-ds 20Minuten"
TRACE_2 = "NumGLUE-cm NumGLUE-ds FOMC 20Minuten C-STANCE Py150 MeetingBank ScienceQA"
SGD = [
    "services_4 flights_1 services_3 flights_3 trains_1 homes_2 rentalcars_2 restaurants_1 music_1 hotels_4 media_2 "
    "hotels_3 rentalcars_3 hotels_1 homes_1",
    "hotels_4 flights_3 rentalcars_2 rentalcars_3 media_2 restaurants_1 music_1 trains_1 services_3 homes_2 hotels_3 "
    "flights_1 services_4 homes_1 hotels_1",
    "services_4 hotels_3 music_1 flights_1 hotels_1 hotels_4 media_2 flights_3 trains_1 homes_1 restaurants_1 "
    "rentalcars_2 services_3 homes_2 rentalcars_3",
    "hotels_1 media_2 homes_1 music_1 services_4 restaurants_1 flights_1 hotels_4 services_3 homes_2 hotels_3 trains_1 "
    "flights_3 rentalcars_2 rentalcars_3",
    "services_4 flights_3 homes_1 flights_1 music_1 services_3 rentalcars_3 media_2 restaurants_1 hotels_1 "
    "rentalcars_2 hotels_4 hotels_3 homes_2 trains_1",
]
ORDERS = {
    "trace-order1": TRACE_1,
    "trace-order2": TRACE_2,
    **{f"sgd-order{i}": order for i, order in enumerate(SGD, 1)},
    "das": "restaurant acl ai phone pubmed camera",
    "das:idrandom1": "phone ai pubmed camera restaurant acl",
    "das:idrandom2": "pubmed camera acl restaurant ai phone",
    "das:idrandom3": "camera acl phone restaurant pubmed ai",
    "das:idrandom4": "ai pubmed camera phone acl restaurant",
    "magicoder-python": "code",
}
NAMES = [name for name in ORDERS if ":" not in name]
REFERENCES = [
    *(f"{name}{variant}" for name in NAMES[:2] for variant in ("", ":reasoning", ":paper-epochs", ":first-letter")),
    *(f"sgd-order{i}{variant}" for i in range(1, 6) for variant in ("", ":llama")),
    *(name for name in ORDERS if name.startswith("das")),
    "magicoder-python",
    "magicoder-python:oss-instruct",
]


# --- fixtures in the published layouts -------------------------------------------------------------------------------


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")


TRACE_ANSWERS = {
    "C-STANCE": ("判断以下文本对指定对象的态度，选择一项：A.支持，B.反对，C.中立。\n文本：甲{}\n态度：", "A"),
    "FOMC": ("What is the stance? A. dovish, B. hawkish, C. neutral.\nText: rates {}\nStance:", "B"),
    "MeetingBank": ("Write a summary.\nMeeting transcripts: item {}\nSummary:", "The council adopts item two."),
    "Py150": ("<s> import os <EOL> x{} = <EOL>", "return <NUM_LIT:1>"),
    "ScienceQA": ("Choose an answer and give your reasons.\nQuestion: {}\nA. no\nB. yes", "B\nBecause it is."),
    "NumGLUE-cm": ("Solve the following math problem.\nQuestion: {} and 4?\nAnswer:", "7"),
    "NumGLUE-ds": ("Solve the following math problem.\nQuestion: {} moles?\nAnswer:", "12"),
    "20Minuten": ("Provide a simplified version in German.\nText {}: Es regnete stark.", "Regen"),
}


def trace_data(root: Path, folder: str = "LLM-CL-Benchmark_5000", reasoned: bool = False) -> Path:
    for task, (prompt, answer) in TRACE_ANSWERS.items():
        for split, count in (("train", 4), ("eval", 3), ("test", 2)):
            learnt = f"It follows from the text.\nAnswer: {answer}" if reasoned and split == "train" else answer
            rows = [{"prompt": prompt.format(f"{split}{i}"), "answer": learnt} for i in range(count)]
            write_json(root / folder / task / f"{split}.json", rows)
    return root


def sgd_rows(service: str, dialogues: int) -> tuple[list[dict[str, str]], list[str]]:
    """Two turns a dialogue, with one and two active slots."""
    rows, index = [], []
    for d in range(dialogues):
        for turn, slots in ((0, ["city"]), (2, ["city", "day"])):
            for slot in slots:
                rows.append({
                    "instruction": f"Track the state of the slot <{service}-{slot}> in the input dialogue.",
                    "input": f"[USER]: {d} at {turn} \n [slot] {service}-{slot}, it indicates {slot}. \n",
                    "output": f"{slot} {d}",
                })  # fmt: skip
                index.append(f"1_{d:05}|||1_{d:05}|||{turn}|||none|||{service}|||{slot}")
    return rows, index


def sgd_data(root: Path, inside: str = "") -> Path:
    for service in SGD[0].split():
        for split, dialogues in (("train", 2), ("test", 2)):
            folder = root / inside / f"SGD_single_service_{split}"
            rows, index = sgd_rows(service, dialogues)
            write_json(folder / f"sgd_{service}-{split}-LLM.json", rows)
            joined = [{"input": f"{r['instruction']}\n{r['input']}", "output": r["output"]} for r in rows]
            write_json(folder / f"sgd_{service}-{split}-LLM_T5.json", joined)
            write_lines(folder / f"sgd_{service}-{split}.idx", index)
    return root


DAS_LABELS = {
    "citation_intent": "Uses Future CompareOrContrast Motivation Extends Background",
    "sciie": "FEATURE-OF CONJUNCTION EVALUATE-FOR HYPONYM-OF USED-FOR PART-OF COMPARE",
    "chemprot": "DOWNREGULATOR SUBSTRATE INDIRECT-UPREGULATOR INDIRECT-DOWNREGULATOR AGONIST ACTIVATOR PRODUCT-OF "
    "AGONIST-ACTIVATOR INHIBITOR UPREGULATOR SUBSTRATE_PRODUCT-OF AGONIST-INHIBITOR ANTAGONIST",
}


def aspects(name: str, polarities: list[str]) -> dict[str, dict[str, str]]:
    return {
        f"{name}{i}": {"term": "screen", "sentence": f"The screen of {name}{i}.", "polarity": polarity}
        for i, polarity in enumerate(polarities)
    }


def das_data(root: Path) -> Path:
    for corpus in ("yelp_restaurant", "acl_anthology", "ai_corpus", "format_pubmed_small", "absa/post_train/phone",
                   "absa/post_train/camera"):  # fmt: skip
        write_lines(root / f"{corpus}.txt", [f"Text {i} of {corpus}." for i in range(40)])
    write_json(root / "SemEval14-res/train.json", aspects("a", ["positive", "neutral", "negative"] * 2))
    write_json(root / "SemEval14-res/test.json", aspects("b", ["negative", "neutral", "positive"]))
    for folder, labels in DAS_LABELS.items():
        for split, times in (("train", 4), ("dev", 1), ("test", 1)):
            rows = [{"text": f"{split} {i} {label}", "label": label} for i in range(times) for label in labels.split()]
            write_lines(root / folder / f"{split}.jsonl", rows)
    for product in ("Bing5Domains/Nokia6610", "Bing9Domains/Nokia6600", "Bing5Domains/CanonG3",
                    "Bing5Domains/NikonCoolpix4300", "Bing9Domains/CanonPowerShotSD500",
                    "Bing9Domains/CanonS100"):  # fmt: skip
        for split in ("train", "dev", "test"):
            write_json(root / f"absa/dat/{product}/{split}.json", aspects(f"{product[-4:]}-{split}-", ["+", "-", "+"]))
    return root


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """The sum of a and b."""\n',
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}


def code_data(root: Path, zipped: bool = False) -> Path:
    evol = [{"instruction": f"Write function {i}.", "response": f"def f{i}(): pass"} for i in range(4)]
    write_lines(root / "data-evol_instruct-decontaminated.jsonl", evol)
    oss = [
        {"lang": lang, "raw_index": i, "problem": f"Problem {i}.", "solution": f"solution {i}"}
        for i, lang in enumerate(["python", "cpp", "python", "rust"])
    ]
    write_lines(root / "data-oss_instruct-decontaminated.jsonl", oss)
    if zipped:
        with gzip.open(root / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write(json.dumps(HUMANEVAL) + "\n")
    else:
        write_lines(root / "HumanEval.jsonl", [HUMANEVAL])
    return root


def write_data(reference: str, root: Path) -> Path:
    name, _, variant = reference.partition(":")
    if name.startswith("trace"):
        reasoning = variant == "reasoning"
        return trace_data(root, f"LLM-CL-Benchmark_{'Reasoning' if reasoning else '5000'}", reasoning)
    maker: Callable[[Path], Path] = {"sgd": sgd_data, "das": das_data, "mag": code_data}[name[:3]]
    return maker(root)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The fixture of a stream, written once."""
    folder, made = tmp_path_factory.mktemp("data"), {}

    def get(reference: str) -> Path:
        key = reference if reference.endswith("reasoning") else reference[:3]
        if key not in made:
            made[key] = write_data(reference, folder / key.replace(":", "-"))
        return made[key]

    return get


# --- what the definitions say ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORDERS)
def test_orders(name: str) -> None:
    assert list(find_stream(name).tasks) == ORDERS[name].split()


def epochs(reference: str, end_tasks: bool = False) -> list[int]:
    tasks = find_stream(reference).tasks.values()
    return [(task["end_task"] if end_tasks else task)["training"]["num_train_epochs"] for task in tasks]


def test_epochs() -> None:
    assert epochs("trace-order1") == [5, 3, 7, 5, 3, 5, 5, 7]  # TRACE's scripts
    assert epochs("trace-order1:paper-epochs") == [1, 1, 5, 5, 1, 5, 5, 5]  # TRACE, appendix .1
    assert epochs("trace-order1:reasoning") == [5, 5, 5, 5, 5, 5, 10, 5]  # SEEKR, tracer1
    assert epochs("trace-order2:reasoning") == [10, 10, 10, 5, 5, 5, 5, 5]  # SEEKR, tracer2
    assert epochs("trace-order2") == [5, 5, 3, 7, 5, 5, 7, 3]
    assert epochs("das", end_tasks=True) == [5, 10, 5, 15, 10, 15]  # ContinualLM, prepare_sequence_finetune
    assert find_stream("das").training == {"max_steps": 640000 // (4 * 62), "warmup_steps": 258}
    end = find_stream("das").tasks["acl"]["end_task"]["training"]
    assert end == {"per_device_train_batch_size": 16, "learning_rate": 3e-5, "lr_scheduler_type": "linear",
                   "weight_decay": 0.01, "num_train_epochs": 10}  # fmt: skip
    assert all(find_stream(f"sgd-order{i}:llama").training == {"num_train_epochs": 5} for i in range(1, 6))
    assert epochs("magicoder-python") == [32]


def test_scorers() -> None:
    naive = [task["scorer"] for task in find_stream("trace-order1").tasks.values()]
    assert naive == ["exact_match_trace", "exact_match_trace", "rouge_l_trace", "edit_similarity_trace",
                     "first_letter", "exact_match_trace", "exact_match_trace", "sari_trace"]  # fmt: skip
    reasoning = [task["scorer"] for task in find_stream("trace-order1:reasoning").tasks.values()]
    assert reasoning == ["first_letter_seekr", "first_letter_seekr", "rouge_l_seekr", "edit_similarity_seekr",
                         "first_letter_seekr", "exact_match_seekr", "exact_match_seekr", "sari_seekr"]  # fmt: skip
    assert {task["scorer"] for task in find_stream("sgd-order4").tasks.values()} == {"joint_goal_accuracy"}
    ends = {name: task["end_task"]["scorer"] for name, task in find_stream("das").tasks.items()}
    assert ends.pop("pubmed") == "micro_f1" and set(ends.values()) == {"macro_f1"}
    assert find_stream("magicoder-python:oss-instruct").tasks["code"]["scorer"] == "pass_at_1"


def test_lengths() -> None:
    for name in ("trace-order1", "trace-order2:reasoning"):
        stream = find_stream(name)
        assert stream.lengths == {"max_prompt_length": 1024, "max_completion_length": 512}
        assert stream.evaluation == {"max_new_tokens": 512}
    assert find_stream("sgd-order5").lengths == {"max_prompt_length": 512, "max_completion_length": 128}
    assert find_stream("das").lengths == {"max_prompt_length": 164, "block_size": 164}


@pytest.mark.parametrize("name", NAMES)
def test_provenance_is_complete(name: str) -> None:
    stream = find_stream(name)
    assert "arXiv:" in stream.paper and "https://" in stream.source and "not shipped" in stream.licence.replace(
        "none are shipped", "not shipped")  # fmt: skip
    assert stream.layout and stream.title and stream.note
    for task in stream.tasks.values():
        assert "hub" not in task and task["layouts"]


def test_published_sizes() -> None:
    sizes = {name: task["published_rows"] for name, task in find_stream("sgd-order2").tasks.items()}
    assert sizes["flights_1"] == {"train": 25258, "eval": 7667} and sizes["media_2"] == {"train": 598, "eval": 189}
    assert sum(size["train"] for size in sizes.values()) == 63335
    ends = [task["end_task"]["published_rows"] for task in find_stream("das").tasks.values()]
    assert [size["train"] for size in ends] == [3452, 1520, 2260, 239, 2667, 230]
    assert [size["eval"] for size in ends] == [1120, 421, 2388, 553, 7398, 626]


def test_readers_are_formats() -> None:
    assert set(READERS) < set(FORMATS)


# --- reading the fixtures --------------------------------------------------------------------------------------------


def perfect(task: Any) -> float:
    """The score of the first right answers."""
    if task.scorer == "perplexity":
        rows = [{**row, "text_log_likelihood": 0.0, "tokens": 3} for row in task.eval_dataset]
    else:
        rows = [{**row, "prediction": row["references"][0]} for row in task.eval_dataset]
    return scorers.score(task.scorer, rows, task.labels).value


@pytest.mark.parametrize("reference", REFERENCES)
def test_resolves_and_reference_answers_are_perfect(
    reference: str, data: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    tasks = load_stream(reference, data_dir=data(reference))
    assert [task.name for task in tasks] == list(find_stream(reference).tasks)
    for task in tasks:
        assert len(task.train_dataset) > 0
        assert perfect(task) == pytest.approx(1.0, abs=1e-6), task.name
        if task.end_task is not None:
            assert perfect(task.end_task) == 1.0, task.name


def test_references_cover_every_variant() -> None:
    for name in NAMES:
        variants = find_stream(name).variants
        assert {r.partition(":")[2] for r in REFERENCES if r.partition(":")[0] == name} - {""} == set(variants)


def test_trace_splits(data: Callable[[str], Path]) -> None:
    task = load_stream("trace-order1", data_dir=data("trace-order1"), order=["FOMC"])[0]
    assert len(task.train_dataset) == 4 and len(task.eval_dataset) == 2
    assert task.eval_dataset["prompt"][0].endswith("rates test0\nStance:") and task.labels == ["A", "B", "C"]
    other = load_stream("trace-order1", data_dir=data("trace-order1"), order=["FOMC"], eval_split="eval")[0]
    assert len(other.eval_dataset) == 3
    held = load_stream("trace-order1", data_dir=data("trace-order1"), order=["FOMC"], eval_split="train")[0]
    assert len(held.train_dataset) == 3 and len(held.eval_dataset) == 1


def test_trace_reads_the_folders_of_the_tasks_too(tmp_path: Path, data: Callable[[str], Path]) -> None:
    published = load_stream("trace-order1", data_dir=data("trace-order1"))
    inside = load_stream("trace-order1", data_dir=data("trace-order1") / "LLM-CL-Benchmark_5000")
    assert stream_hash(inside) == stream_hash(published)
    # A folder of tasks does not tell whether they are reasoned, so the variant wants the archive's name: SEEKR's script
    # gives that folder itself.
    reasoned = data("trace-order1:reasoning")
    own = load_stream("trace-order1:reasoning", data_dir=reasoned / "LLM-CL-Benchmark_Reasoning")
    assert stream_hash(own) == stream_hash(load_stream("trace-order1:reasoning", data_dir=reasoned))
    with pytest.raises(InputError, match="lacks the tasks C-STANCE, .*LLM-CL-Benchmark_Reasoning/<task>"):
        load_stream("trace-order1:reasoning", data_dir=data("trace-order1") / "LLM-CL-Benchmark_5000")


def test_trace_reasoning_is_another_stream(data: Callable[[str], Path]) -> None:
    root = data("trace-order1:reasoning")
    tasks = {task.name: task for task in load_stream("trace-order1:reasoning", data_dir=root)}
    assert tasks["FOMC"].train_dataset["completion"][0].endswith("\nAnswer: B") and tasks["FOMC"].labels is None
    row = tasks["NumGLUE-ds"].eval_dataset[0]
    assert scorers.score("exact_match_seekr", [{**row, "prediction": "2 times 6.\nAnswer: 12"}]).value == 1.0
    assert scorers.score("exact_match_seekr", [{**row, "prediction": "2 times 6.\nAnswer: 13"}]).value == 0.0


def test_sgd_turns_are_scored_together(data: Callable[[str], Path]) -> None:
    task = load_stream("sgd-order2", data_dir=data("sgd-order2"), order=["media_2"])[0]
    rows = [{**row, "prediction": row["references"][0]} for row in task.eval_dataset]
    assert [(row["dialogue"], row["turn"]) for row in rows] == [
        (f"1_{d:05}", turn) for d in (0, 1) for turn in ("0", "2", "2")
    ]
    rows[2]["prediction"] = "another day"
    found = scorers.score(task.scorer, rows)
    assert found.value == 3 / 4 and found.details["slot_accuracy"] == 5 / 6 and found.details["turns"] == 4


def test_the_queue_keeps_what_scorers_read(data: Callable[[str], Path]) -> None:
    task = load_stream("sgd-order2", data_dir=data("sgd-order2"), order=["media_2"])[0]
    kept = as_rows(task.eval_dataset, "eval_dataset of task 'media_2'")
    assert kept[:] == task.eval_dataset[:]
    learnt = [{**row, "dialogue": "1", "turn": "2"} for row in task.train_dataset.remove_columns("references")]
    assert as_rows(learnt, "train_dataset").column_names == ["prompt", "completion", "references"]


def test_sgd_layouts_agree(tmp_path: Path, data: Callable[[str], Path]) -> None:
    inside = load_stream("sgd-order1", data_dir=sgd_data(tmp_path, "data_DST"))
    assert stream_hash(inside) == stream_hash(load_stream("sgd-order1", data_dir=data("sgd-order1")))


def test_sgd_prompts(data: Callable[[str], Path]) -> None:
    one, two = (load_stream(f"sgd-order1{v}", data_dir=data("sgd-order1"))[0] for v in ("", ":llama"))
    assert one.train_dataset["prompt"][0] == (
        "Track the state of the slot <services_4-city> in the input dialogue.\n"
        "[USER]: 0 at 0 \n [slot] services_4-city, it indicates city. \n"
    )
    assert two.train_dataset["prompt"][0] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nTrack the state of the slot <services_4-city> in the input dialogue.\n\n"
        "### Input:\n[USER]: 0 at 0 \n [slot] services_4-city, it indicates city. \n\n\n### Response:\n"
    )
    assert one.train_dataset["completion"][:] == two.train_dataset["completion"][:]


def test_sgd_turns_are_neither_cut_nor_spread_over_both_splits(tmp_path: Path) -> None:
    """20 dialogues of two turns of five slots, in one file."""
    slots = [(d, t, s) for d in range(20) for t in range(2) for s in range(5)]
    write_json(tmp_path / "train" / "sgd_music_1.json", [{"input": f"{d} {t} {s}", "output": "x"} for d, t, s in slots])
    (tmp_path / "train" / "sgd_music_1.idx").write_text(
        "".join(f"sgd_music_1.json|||1_{d:05}|||{t}|||0|||music_1|||slot{s}\n" for d, t, s in slots)
    )
    options = {"order": ["music_1"], "data_dir": tmp_path}
    (task,) = load_stream("sgd-order1", **options)
    assert len(task.train_dataset) == 180 and len(task.eval_dataset) == 20
    learnt = {prompt.split()[0] for prompt in task.train_dataset["prompt"]}
    assert learnt.isdisjoint(prompt.split()[0] for prompt in task.eval_dataset["prompt"])
    (task,) = load_stream("sgd-order1", eval_rows=13, **options)
    turns = [(row["dialogue"], row["turn"]) for row in task.eval_dataset]
    assert len(turns) == 10 and {turns.count(turn) for turn in turns} == {5}
    (task,) = load_stream("sgd-order1", eval_rows=3, **options)  # at least one turn
    assert len(task.eval_dataset) == 5


@pytest.mark.skipif(not (DATA / "sgd").is_dir(), reason="the benchmark data is not here (HF_CONTINUAL_DATA)")
def test_own_stream_file_on_three_services_of_sgd(tmp_path: Path) -> None:
    own = {
        "name": "sgd-three",
        "extends": "sgd-order1",
        "order": ["hotels_4", "media_2", "music_1"],
        "defaults": {"layouts": [{"format": "sgd", "data_files": {"train": "train/sgd_{task}.json"}}]},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    tasks = load_stream("own.yaml", base_dir=tmp_path, data_dir=(DATA / "sgd").resolve())
    assert [task.name for task in tasks] == own["order"]
    for task in tasks:
        assert perfect(task) == 1.0
        published = find_stream("sgd-order1").tasks[task.name]["published_rows"]["train"]
        assert len(task.train_dataset) + len(task.eval_dataset) == published


def test_das_corpora_and_end_tasks(data: Callable[[str], Path]) -> None:
    tasks = {task.name: task for task in load_stream("das", data_dir=data("das"))}
    restaurant = tasks["restaurant"]
    assert restaurant.kind == "mlm" and restaurant.eval_dataset["text"][:] == [
        "Text 0 of yelp_restaurant.", "Text 1 of yelp_restaurant."]  # fmt: skip
    assert restaurant.train_dataset["text"][0] == "Text 2 of yelp_restaurant." and len(restaurant.train_dataset) == 38
    assert restaurant.end_task.train_dataset["text"][0] == "screen </s>The screen of a0."
    assert restaurant.end_task.eval_dataset["label"][:] == ["negative", "neutral", "positive"]
    # SciERC: 28 rows, int(28 * 0.3 // 7) = 1 row of each of 7 labels goes to the end of test, after test and dev.
    ai = tasks["ai"].end_task
    assert len(ai.train_dataset) == 21 and len(ai.eval_dataset) == 21
    assert ai.eval_dataset["text"][6:8] == ["test 0 COMPARE", "dev 0 FEATURE-OF"]
    assert ai.eval_dataset["text"][14:] == [f"train 0 {label}" for label in DAS_LABELS["sciie"].split()]
    assert ai.train_dataset["text"][0] == "train 1 FEATURE-OF"
    # Phone: 9 rows of one telephone, 9 of another; int(9 * 0.3 // 2) = 1 of each polarity moves.
    phone = tasks["phone"].end_task
    assert len(phone.train_dataset) == 7 and len(phone.eval_dataset) == 11
    assert phone.eval_dataset["label"][-2:] == ["positive", "negative"]
    assert len(tasks["camera"].end_task.eval_dataset) == 27  # three cameras; int(9 * 0.2 // 2) = 0 move
    assert {task.end_task.seeds[0] for task in tasks.values()} == {2021}


@pytest.mark.parametrize(
    "rows, labels, share, test, sizes",
    [
        (3219, 7, 0.7, 974 + 455, (2260, 2388)),  # SciERC, as the README of ContinualLM counts it
        (1688, 6, 0.9, 139 + 114, (1520, 421)),  # ACL-ARC
        (341, 2, 0.7, 451, (239, 553)),  # Phone
        (286, 2, 0.8, 570, (230, 626)),  # Camera
    ],
)
def test_moved_rows_give_the_published_sizes(
    rows: int, labels: int, share: float, test: int, sizes: tuple[int, int]
) -> None:
    def table(count: int) -> Table:
        return Table([{"text": "", "label": f"l{i % labels}"} for i in range(count)], "'x'", list(range(count)))

    train, evaluation = move_rows(table(rows), table(test), share, [f"l{i}" for i in range(labels)])
    assert (len(train.rows), len(evaluation.rows)) == sizes
    assert train.indices == list(range(sizes[0])) and evaluation.indices == list(range(sizes[1]))


def test_a_label_with_few_rows_gives_those() -> None:
    rows = [{"label": label} for label in "aaaaaaaab"]
    train, evaluation = move_rows(Table(rows, "'x'", []), Table([], "'y'", []), 0.1)
    assert [row["label"] for row in train.rows] == list("aaaa")  # int(9 * 0.9 // 2) = 4 of a, the only b
    assert [row["label"] for row in evaluation.rows] == list("aaaab")


def test_code_prompts(data: Callable[[str], Path]) -> None:
    head = (
        "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable "
        "responses to user instructions.\n\n@@ Instruction\n"
    )
    task = load_stream("magicoder-python", data_dir=data("magicoder-python"))[0]
    assert task.train_dataset["prompt"][1] == f"{head}Write function 1.\n\n@@ Response\n"
    row = task.eval_dataset[0]
    assert row["prompt"] == (
        f"{head}Write a solution to the following problem:\n```python\ndef add(a, b):\n"
        '    """The sum of a and b."""\n```\n\n@@ Response\n'
    )
    assert row["prefix"] == HUMANEVAL["prompt"] and row["references"] == ["    return a + b\n"]
    oss = load_stream("magicoder-python:oss-instruct", data_dir=data("magicoder-python"))[0]
    assert oss.train_dataset["completion"][:] == ["solution 0", "solution 2"]
    assert oss.train_dataset["prompt"][1] == (
        f"{head}Write a solution to the following coding problem:\nProblem 2.\n\n@@ Response\n"
    )


def test_humaneval_may_stay_zipped(tmp_path: Path, data: Callable[[str], Path]) -> None:
    zipped = load_stream("magicoder-python", data_dir=code_data(tmp_path, zipped=True))
    assert stream_hash(zipped) == stream_hash(load_stream("magicoder-python", data_dir=data("magicoder-python")))
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"HumanEval.jsonl.gz' cannot be read \("):
        load_stream("magicoder-python", data_dir=tmp_path)


def test_files_may_be_zipped(tmp_path: Path) -> None:
    rows = [{"input": f"in {i}", "output": "a"} for i in range(3)]
    files = {
        "rows.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows),
        "rows.json": json.dumps(rows),
        "rows.csv": "input,output\n" + "".join(f"{row['input']},{row['output']}\n" for row in rows),
    }
    for name, content in files.items():
        with gzip.open(tmp_path / f"{name}.gz", "wt", encoding="utf-8") as file:
            file.write(content)
        task = load_task({"path": f"{name}.gz"}, base_dir=tmp_path)
        assert task.name == "rows" and len(task.train_dataset) == 2
    folder = tmp_path / "task"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl.gz").write_bytes((tmp_path / "rows.jsonl.gz").read_bytes())
    task = load_task({"path": "task"}, base_dir=tmp_path)
    assert task.name == "task" and len(task.eval_dataset) == 3
    (tmp_path / "rows.parquet.gz").write_bytes(b"")
    with pytest.raises(InputError, match="the type of '.*rows.parquet.gz' is not supported"):
        load_task({"path": "rows.parquet.gz"}, base_dir=tmp_path)


def test_wrong_program_fails(data: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    task = load_stream("magicoder-python", data_dir=data("magicoder-python"))[0]
    rows = [{**row, "prediction": "    return a - b\n"} for row in task.eval_dataset]
    assert scorers.score("pass_at_1", rows).value == 0.0
    block = "Here you are:\n```python\ndef add(a, b):\n    return a + b\n```\nIt adds."
    assert scorers.score("pass_at_1", [{**row, "prediction": block} for row in task.eval_dataset]).value == 1.0


def test_hashes(tmp_path: Path, data: Callable[[str], Path]) -> None:
    def full(reference: str, folder: Path | None = None) -> str:
        return stream_hash(load_stream(reference, data_dir=folder or data(reference)), find_stream(reference))

    some = [r for r in REFERENCES if r[:10] not in ("sgd-order3", "sgd-order4", "sgd-order5")]
    found = [full(reference) for reference in some]
    assert len(set(found)) == len(found)
    assert full("sgd-order1", sgd_data(tmp_path)) == full("sgd-order1")
    index = tmp_path / "SGD_single_service_test/sgd_media_2-test.idx"
    index.write_text(index.read_text().replace("1_00001|||2", "1_00001|||4"))
    assert full("sgd-order1", tmp_path) != full("sgd-order1")  # other turns, so another score


# --- data in the wrong layout ----------------------------------------------------------------------------------------


def drop(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).unlink()


def put(path: str, content: str) -> Callable[[Path], None]:
    return lambda root: (root / path).write_text(content, encoding="utf-8")


MEDIA = "SGD_single_service_test/sgd_media_2-test"
WRONG = [
    ("trace-order1", drop("LLM-CL-Benchmark_5000/FOMC/test.json"),
     "FOMC .* lacks 'LLM-CL-Benchmark_5000/FOMC/test.json'.*LLM-CL-Benchmark_5000/<task>/{train,eval,test}.json"),
    ("trace-order1", drop("LLM-CL-Benchmark_5000/Py150/train.json"),
     "lacks the tasks Py150 of the stream 'trace-order1'.*LLM-CL-Benchmark_5000/<task>"),
    ("trace-order1", put("LLM-CL-Benchmark_5000/Py150/train.json", '[{"prompt": "x", "output": "y"}]'),
     "Py150/train.json' has no column 'answer' for 'completion'"),
    ("trace-order1", put("LLM-CL-Benchmark_5000/FOMC/train.json", '[{"prompt": "x", "answer": "dovish"}]'),
     "the answer 'dovish' in row 0 of .*FOMC/train.json"),
    ("sgd-order1", drop(f"{MEDIA}.idx"),
     r"sgd_media_2-test-LLM_T5.json' has no index 'sgd_media_2-test.idx' .*json\|\|\|dialogue"),
    ("sgd-order1", put(f"{MEDIA}.idx", "a\nb\n"), "sgd_media_2-test.idx' has 2 lines and .*LLM_T5.json' 6 rows"),
    ("sgd-order1", put(f"{MEDIA}.idx", "1_00000|||0|||none|||media_2|||city\n" * 6),
     r"line 1 of '.*sgd_media_2-test.idx' is '1_00000.*write it as 'json\|\|\|dialogue"),
    ("sgd-order1", put(f"{MEDIA}-LLM_T5.json", json.dumps([{"dialogue": "x", "output": "y"}] * 6)),
     "media_2.*sgd_media_2-test-LLM_T5.json' has no column 'input'"),
    ("das", drop("sciie/dev.jsonl"), r"ai \(end task\) and lacks 'sciie/dev.jsonl'.*dev,test}.jsonl"),
    ("das", drop("format_pubmed_small.txt"), "lacks the tasks pubmed of the stream 'das'.*format_pubmed_small.txt"),
    ("das", put("SemEval14-res/test.json", '[{"term": "x"}]'), "SemEval14-res/test.json' is no object of rows"),
    ("das", put("SemEval14-res/test.json", '{"1": {"term": "x", "sentence": "y"}}'),
     "row '1' of '.*SemEval14-res/test.json' has no 'polarity'"),
    ("das", put("SemEval14-res/test.json", '{"1": {"term": "x", "sentence": "y", "polarity": "conflict"}}'),
     "SemEval14-res/test.json' is 'conflict', which is none of the labels"),
    ("das", put("chemprot/train.jsonl", '{"text": "x", "label": "CATALYST"}'),
     "'CATALYST' in row 0 of '.*chemprot/train.jsonl' is not one of the labels"),
    ("das", put("chemprot/train.jsonl", '{"text": "x"}'), "row 0 of '.*chemprot/train.jsonl' has no string 'label'"),
    ("das", put("ai_corpus.txt", "one\ntwo\n"), "ai_corpus.txt' has 2 texts; .*first 5 % are for validation"),
    ("magicoder-python", drop("HumanEval.jsonl"), "code and lacks 'HumanEval.jsonl'.*HumanEval.jsonl.gz"),
    ("magicoder-python", put("data-evol_instruct-decontaminated.jsonl", '{"prompt": "x", "response": "y"}'),
     "row 0 of '.*data-evol_instruct-decontaminated.jsonl' has no 'instruction'"),
    ("magicoder-python", put("HumanEval.jsonl", '{"prompt": "x", "test": "y", "entry_point": "z"}'),
     "row 0 of '.*HumanEval.jsonl' has no 'instruction'"),
    ("magicoder-python:oss-instruct", put("data-oss_instruct-decontaminated.jsonl", '{"instruction": "x"}'),
     "row 0 of '.*data-oss_instruct-decontaminated.jsonl' has no 'problem'"),
    ("magicoder-python:oss-instruct",
     put("data-oss_instruct-decontaminated.jsonl", '{"lang": "rust", "problem": "x", "solution": "y"}'),
     "data-oss_instruct-decontaminated.jsonl' has no row with lang: python"),
]  # fmt: skip


@pytest.mark.parametrize("reference, spoil, message", WRONG, ids=range(len(WRONG)))
def test_wrong_layout(reference: str, spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    write_data(reference, tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_stream(reference, data_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_no_data_says_what_to_download() -> None:
    for name in NAMES:
        with pytest.raises(InputError, match="needs its data; set data_dir to its folder: it should hold .*https://"):
            load_stream(name)


@pytest.mark.parametrize("value", [0, 1, True, "half"])
def test_train_share_is_a_part(value: Any, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"text": "x", "label": "a"}])
    files = {"train": "rows.jsonl", "test": "rows.jsonl"}
    with pytest.raises(InputError, match="train_share: .* is not a number between 0 and 1"):
        load_task({"data_files": files, "kind": "classification", "labels": ["a"], "train_share": value},
                  base_dir=tmp_path)  # fmt: skip
    with pytest.raises(InputError, match="train_share: 0.5 needs an evaluation split"):
        load_task({"path": "rows.jsonl", "kind": "classification", "labels": ["a"], "train_share": 0.5},
                  base_dir=tmp_path)  # fmt: skip


@pytest.mark.parametrize("reference, order", [("sgd-order1", ["media_2", "music_1"]), ("magicoder-python", ["code"])])
def test_dry_run(
    reference: str,
    order: list[str],
    data: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    recipe = {
        "model": {"name": str(save_model(tmp_path / "model"))},
        "tasks": {"stream": reference, "data_dir": str(data(reference)), "order": order},
        "training": {"max_steps": 1},
        "data": {"max_prompt_length": 64, "max_completion_length": 16},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(tmp_path / "recipe.yaml"), "--dry_run"]) == 0
    assert f"stream: {reference}@" in capsys.readouterr().out


def test_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_dir = trace_data(tmp_path / "data")
    (data_dir / "LLM-CL-Benchmark_5000/NumGLUE-ds/test.json").unlink()
    recipe = {
        "model": {"name": str(save_model(tmp_path / "model"))},
        "tasks": {"stream": "trace-order1", "data_dir": str(data_dir)},
        "training": {"max_steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    capsys.readouterr()
    assert main(["run", str(tmp_path / "recipe.yaml"), "--dry_run"]) == 2
    error = capsys.readouterr().err.strip()
    assert "LLM-CL-Benchmark_5000/NumGLUE-ds/test.json" in error and "should hold" in error and "\n" not in error
