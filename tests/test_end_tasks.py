"""End tasks: fine-tuned from every checkpoint, averaged over seeds, and the run's own model untouched."""

import json
import multiprocessing
import signal

import datasets
import pytest
import torch
import yaml
from test_pretraining import gpt2, masked_model, masked_tokenizer, text_task, texts
from toy_runs import assert_same, die, snapshot
from transformers import BertConfig, BertForMaskedLM, set_seed

from hf_continual import InputError, TaskQueue, end_tasks
from hf_continual.cells import make_cell
from hf_continual.cli import main
from hf_continual.data import load_task
from hf_continual.end_tasks import classifier, score_end_task
from hf_continual.evaluation import EvaluationConfig
from hf_continual.report import print_report
from hf_continual.run_scores import load_run
from hf_continual.tasks import EndTask, Task
from hf_continual.testing import equal, tiny_model, toy_queue_options, toy_stream, toy_tokenizer, weights

LABELS = ["low", "high"]
ON_CPU = {"use_cpu": True, "disable_tqdm": True}
TRAINING = {"num_train_epochs": 2, "learning_rate": 5e-3, "per_device_train_batch_size": 8}


def label_rows(domain, count, seed=0):
    """Whether a word is in the first half of its domain's; the second text has no say."""
    generator = torch.Generator().manual_seed(seed + 17 * domain)
    drawn = torch.randint(0, 35, (count,), generator=generator).tolist()
    return [{"text": f"w{35 * domain + i}", "text_pair": "w1 w2", "label": LABELS[i >= 17]} for i in drawn]


def end_task(domain=0, **options):
    given = {"labels": LABELS, "seeds": [1, 2], "training": TRAINING, **options}
    return EndTask("end", label_rows(domain, 32), label_rows(domain, 10, 1), **given)


def make_queue(folder, kind="mlm", lora=True, ends=True, **options):
    settings = toy_queue_options("llama", lora=False, num_train_epochs=1)
    targets = ["q_proj", "v_proj"]
    if kind == "mlm":
        settings |= {"model": masked_model, "processing_class": masked_tokenizer()}
        targets = ["query", "value"]
    if lora:
        settings["peft_config"] = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    settings["data"] |= {"block_size": 12}
    tasks = [text_task(i, kind, end_task=end_task(i) if ends else None) for i in range(2)]
    return TaskQueue(folder, tasks=tasks, **{"methods": ["migu"], **settings, **options})


def readable(end):
    return EndTask(
        end.name, *(datasets.Dataset.from_list([{**row, "references": [row["label"]]} for row in rows])
                    for rows in (end.train_dataset, end.eval_dataset)),
        labels=end.labels, training=end.training, seeds=end.seeds, scorer=end.scorer, kind=end.kind,
    )  # fmt: skip


# -- the cell ----------------------------------------------------------------------------------------------------------


def test_a_classifier_has_the_encoder_of_the_language_model():
    for model, tokenizer in ((masked_model(), masked_tokenizer()), (tiny_model("llama"), toy_tokenizer()),
                             (gpt2(), toy_tokenizer())):  # fmt: skip
        made = classifier(model, ["a", "b", "c"], tokenizer, 1)
        encoder, source = (weights(getattr(m, m.base_model_prefix)) for m in (made, model))
        assert equal(encoder, source)
        assert made.config.num_labels == 3 and made.config.id2label[2] == "c" and made.config.pad_token_id == 0
        assert model.config.num_labels == 2  # that of the language model is its own
        same, other = classifier(model, ["a", "b", "c"], tokenizer, 1), classifier(model, ["a", "b", "c"], tokenizer, 2)
        assert equal(weights(made), weights(same)) and not equal(weights(made), weights(other))


def test_a_pooler_that_the_language_model_lacks_is_drawn():
    set_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                       intermediate_size=48, max_position_embeddings=32))  # fmt: skip
    made = classifier(model, ["a", "b"], masked_tokenizer(), 1)
    assert torch.equal(made.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)
    assert made.bert.pooler is not None


def test_a_classification_is_learnt_and_averaged_over_seeds():
    end = readable(end_task(training={**TRAINING, "num_train_epochs": 20}, scorer="micro_f1"))
    args = {"use_cpu": True, "disable_tqdm": True, "learning_rate": 1e9}
    cell = score_end_task(masked_model(), masked_tokenizer(), end, EvaluationConfig(), args, max_prompt_length=16,
                          max_completion_length=4)  # fmt: skip
    assert cell.metric == "micro_f1" and cell.n == 10 and len(cell.predictions) == 20
    each = [cell.others["micro_f1 of seed 1"], cell.others["micro_f1 of seed 2"]]
    assert cell.score == pytest.approx(sum(each) / 2) and min(each) > 0.7  # learnt, at its own learning rate
    assert cell.others["accuracy"] == pytest.approx(cell.score)
    assert {(p["seed"], p["index"]) for p in cell.predictions} == {(s, i) for s in (1, 2) for i in range(10)}
    # Scored again from what is kept, as `report --scorer` does.
    again = make_cell("macro_f1", cell.predictions, {"labels": LABELS})
    by_seed = [make_cell("macro_f1", [{k: v for k, v in p.items() if k != "seed"} for p in cell.predictions
                                      if p["seed"] == seed], {"labels": LABELS}).score for seed in (1, 2)]  # fmt: skip
    assert again.score == pytest.approx(sum(by_seed) / 2) and again.n == 10


def test_one_seed_gives_one_result():
    found = []
    for _ in range(2):
        torch.manual_seed(len(found))
        end = readable(end_task(seeds=[3]))
        found.append(score_end_task(masked_model(), masked_tokenizer(), end, EvaluationConfig(),
                                    {"use_cpu": True, "disable_tqdm": True}, max_prompt_length=16,
                                    max_completion_length=4))  # fmt: skip
    assert found[0] == found[1]


@pytest.mark.parametrize("peft", [None, {"r": 8, "lora_alpha": 32, "target_modules": "all-linear"}])
def test_a_causal_model_may_write_its_answers(peft):
    task = toy_stream(1, rows=32)[0]
    end = EndTask("end", task.train_dataset, task.eval_dataset, kind="completion", scorer="exact_match", seeds=[1],
                  training={**TRAINING, "num_train_epochs": 15, "learning_rate": 2e-2}, peft=peft)  # fmt: skip
    model = tiny_model("llama")
    before = weights(model)
    cell = score_end_task(model, toy_tokenizer(), end, EvaluationConfig(max_new_tokens=2),
                          ON_CPU, max_prompt_length=16, max_completion_length=4)  # fmt: skip
    assert {p["prediction"] for p in cell.predictions} <= {"red", "blue", "green", ""}
    assert cell.score > 0 and set(cell.predictions[0]) >= {"prediction", "references", "seed"}
    assert equal(before, weights(model))


def test_a_classifier_may_be_fine_tuned_with_lora():
    end = readable(end_task(training={**TRAINING, "num_train_epochs": 1}))
    end.peft = {"r": 4, "target_modules": ["query"]}
    cell = score_end_task(masked_model(), masked_tokenizer(), end, EvaluationConfig(),
                          ON_CPU, max_prompt_length=16, max_completion_length=4)  # fmt: skip
    assert cell.metric == "macro_f1" and {p["prediction"] for p in cell.predictions} <= set(LABELS)


# -- in a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "lora"), [("mlm", True), ("mlm", False), ("clm", True)])
def test_the_matrix_has_the_scores_of_the_end_tasks(kind, lora, tmp_path, capsys):
    make_queue(tmp_path / "without", kind, lora, ends=False).run()
    result = make_queue(tmp_path / "run", kind, lora).run()
    run, plain = load_run(tmp_path / "run"), load_run(tmp_path / "without")
    assert set(run.metrics.values()) == {"macro_f1"} and run.unit == "percent" and plain.unit == "nats"
    assert ((result.R[1] >= 0) & (result.R[1] <= 1)).all()
    # The perplexities beside them, and the weights, are those of a run without end tasks.
    assert run.perplexity[1].tolist() == plain.R[1].tolist()
    ours, theirs = (snapshot(tmp_path / name) for name in ("run", "without"))
    names = [name for name in ours if isinstance(ours[name], dict)]
    assert names and all(equal(ours[name], theirs[name]) for name in names)
    print_report(tmp_path / "run")
    shown = capsys.readouterr().out
    assert "macro_f1, percent" in shown
    assert "Perplexity of the texts, whose scores above are those of their end tasks (less is better):" in shown
    assert f"{plain.R[1, 0]:.3f}" in shown and f"{plain.R[1, 0]:.3f}" in (tmp_path / "run/report.md").read_text()


def _in_second_seed():
    original = end_tasks._trained
    done = []

    def replaced(*args):
        trained = original(*args)
        done.append(1)
        if len(done) == 4:  # the cells of the first task, then the second cell's second seed
            die()
        return trained

    end_tasks._trained = replaced


def _killed(folder):
    torch.set_num_threads(1)
    _in_second_seed()
    make_queue(folder).run()


def test_a_run_killed_in_an_end_task_goes_on_bit_for_bit(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        make_queue(tmp_path / "whole").run()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["hf_continual.task_queue", "hf_continual.testing"])
        child = context.Process(target=_killed, args=(tmp_path / "run",))
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
        cells = sorted(path.name for path in (tmp_path / "run/tasks").rglob("predictions/*.json"))
        assert cells == ["domain0.json"]  # the cell it was killed in is not there
        make_queue(tmp_path / "run").run()
    finally:
        torch.set_num_threads(before)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_run_refuses_to_go_on_with_another_end_task(tmp_path):
    make_queue(tmp_path / "run").run()
    queue = make_queue(tmp_path / "run")
    queue.stream[1].end_task.seeds = [1]
    with pytest.raises(InputError, match="the end task of task 'domain1' differ"):
        queue.run()


# -- from files --------------------------------------------------------------------------------------------------------


def write_files(folder, model=None):
    """A recipe of two text files with end tasks in JSON lines, as a user writes it."""
    data = folder / "data"
    data.mkdir(parents=True)
    (model or masked_model()).save_pretrained(folder / "model")
    masked_tokenizer().save_pretrained(folder / "model")
    tasks = []
    for i, name in enumerate(("news", "law")):
        (data / f"{name}.txt").write_text("\n\n".join(texts(i, 24)) + "\n")
        lines = [json.dumps({"sentence": row["text"], "label": row["label"]}) for row in label_rows(i, 40)]
        (data / f"{name}-end.jsonl").write_text("\n".join(lines) + "\n")
        end = {"path": f"data/{name}-end.jsonl", "columns": {"text": "sentence"}, "labels": LABELS, "seeds": [1, 2],
               "training": TRAINING, "eval_fraction": 0.25}  # fmt: skip
        tasks.append({"name": name, "path": f"data/{name}.txt", "kind": "mlm", "eval_fraction": 0.25, "end_task": end})
    recipe = {
        "model": {"name": str(folder / "model")},
        "training": {"per_device_train_batch_size": 4, "num_train_epochs": 1, "use_cpu": True, "disable_tqdm": True},
        "methods": ["migu"], "data": {"block_size": 12}, "tasks": tasks, "run_dir": str(folder / "run"),
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_a_recipe_of_text_files(tmp_path, capsys):
    path = write_files(tmp_path)
    assert main(["run", str(path), "--dry_run"]) == 0
    assert "news: 18 text(s) in" in capsys.readouterr().out
    assert main(["run", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "after law: news macro_f1 = " in shown and "(n=10)" in shown
    assert "Perplexity of the texts" in shown
    assert main(["report", str(tmp_path / "run"), "--scorer", "micro_f1"]) == 0
    assert "micro_f1, percent" in capsys.readouterr().out
    assert main(["run", str(path)]) == 0  # finished
    assert "nothing to do" in capsys.readouterr().out


def test_rows_of_an_end_task():
    made = readable(end_task())
    task = Task("pre", ["w1 w2"], ["w3 w4"], kind="clm", end_task={"labels": LABELS, "train_dataset": [], "seeds": 3})
    assert isinstance(task.end_task, EndTask) and task.end_task.name == "pre" and task.end_task.seeds == [3]
    assert task.end_task.scorer == "macro_f1" and made.kind == "classification"
    assert Task("pre", kind="mlm", end_task=Task("x", kind="classification")).end_task.name == "x"


def test_labels_may_be_numbers_or_class_labels(tmp_path):
    rows = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c", "d"], "label": [0, 1, 1, 0]},
        features=datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=LABELS)}),
    )
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "saved"))
    task = load_task({"path": str(tmp_path / "saved"), "kind": "classification"})
    assert task.labels == LABELS and task.train_dataset["label"][:] == ["low", "high", "high", "low"]
    (tmp_path / "rows.csv").write_text("sentence,other,label\na,b,low\nc,d,high\n")
    spec = {"path": str(tmp_path / "rows.csv"), "kind": "classification", "labels": LABELS, "eval_fraction": 0.5,
            "columns": {"text": "sentence", "text_pair": "other"}}  # fmt: skip
    task = load_task(spec)
    assert task.train_dataset.column_names == ["text", "label", "text_pair", "references"]


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": None}, "needs its labels; add `labels"),
        ({"labels": ["low"]}, "which is none of the labels 'low'"),
        ({"scorer": "rouge_l"}, "scorer 'rouge_l' cannot score labels; use macro_f1"),
        ({"scorer": "macro_f2"}, "scorer='macro_f2' is unknown; did you mean 'macro_f1'"),
        ({"training": {"learning_rat": 1}}, "training.learning_rat is not a training argument; did you mean"),
        ({"training": {"seed": 1}}, "training.seed is set by the queue; remove it"),
        ({"seeds": []}, "seeds=\\[\\] must be a list of whole numbers"),
        ({"seeds": [1, 1]}, "has one seed twice"),
        ({"peft": "lora"}, "peft='lora' must map LoraConfig options"),
        ({"kind": "mlm"}, "kind='mlm' is one of pre-training; choose classification or completion"),
        ({"kind": "completion", "scorer": "exact_match"}, "no column|neither prompt/completion"),
    ],
)
def test_bad_end_tasks_are_refused_in_a_sentence(change, says, tmp_path):
    with pytest.raises(InputError, match=says) as error:
        settings = toy_queue_options("llama", lora=False)
        settings |= {"model": masked_model, "processing_class": masked_tokenizer()}
        TaskQueue(tmp_path / "run", tasks=[text_task(0, "mlm", end_task=end_task(**change))], **settings).check()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_labels_that_scorers_cannot_tell_apart(tmp_path):
    rows = [{"text": "w1", "label": "+"}, {"text": "w2", "label": "-"}]
    end = EndTask("end", rows, rows, labels=["+", "-"])
    settings = toy_queue_options("llama", lora=False)
    settings |= {"model": masked_model, "processing_class": masked_tokenizer()}
    with pytest.raises(InputError, match="the label '\\+' reads like nothing without case and punctuation"):
        TaskQueue(tmp_path / "run", tasks=[text_task(0, "mlm", end_task=end)], **settings).check()


def test_end_tasks_that_do_not_fit_the_model_or_the_run(tmp_path, monkeypatch):
    settings = toy_queue_options("llama", lora=False)
    settings["data"] = {**settings["data"], "block_size": 16}
    written = EndTask("end", *[toy_stream(1)[0].train_dataset] * 2, kind="completion", scorer="exact_match")
    masked = settings | {"model": masked_model, "processing_class": masked_tokenizer()}
    with pytest.raises(InputError, match="'completion' needs a model that writes text, and this is a RobertaForMasked"):
        TaskQueue(tmp_path / "a", tasks=[text_task(0, "mlm", end_task=written)], **masked).check()
    with pytest.raises(InputError, match="end_task is for tasks of pre-training, and this one is of kind 'completion'"):
        Task("x", end_task=end_task())
    with pytest.raises(InputError, match="must be a task: a Task, or a mapping"):
        Task("x", kind="clm", end_task="sst2")
    with pytest.raises(InputError, match="unknown key 'end_task.seed'; did you mean 'seeds'"):
        Task("x", kind="clm", end_task={"seed": 1})
    with pytest.raises(InputError, match="end_task has no train_dataset; give it rows to learn"):
        TaskQueue(tmp_path / "b", tasks=[text_task(0, end_task={"labels": LABELS})], **settings).check()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="this run splits it by fsdp; use one process or DDP"):
        TaskQueue(tmp_path / "c", tasks=[text_task(0, end_task=end_task())], **settings).check()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"end_task": {"path": "rows.jsonl"}}, "a classification needs its labels"),
        ({"end_task": {"path": "rows.jsonl", "labels": LABELS, "seed": 1}}, "end_task option 'seed' is unknown; did"),
        ({"end_task": "rows.jsonl"}, "must be a mapping of a task's options"),
        ({"end_task": {"path": "rows.jsonl", "labels": LABELS, "columns": {"text": "txt"}}}, "has no column 'txt'"),
        ({"end_task": {"path": "rows.jsonl", "labels": ["a", "b"]}}, "is 'low', which is none of the labels 'a', 'b'"),
        ({"end_task": {"path": "none.jsonl", "labels": LABELS}}, "'none.jsonl' does not exist"),
    ],
)
def test_bad_end_tasks_of_files(spec, says, tmp_path):
    (tmp_path / "texts.txt").write_text("a\nb\nc\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": "x", "label": "low"}) + "\n" for _ in range(4)))
    with pytest.raises(InputError, match=says):
        load_task({"path": "texts.txt", "kind": "clm", **spec}, base_dir=tmp_path)
