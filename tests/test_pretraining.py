"""Continual pre-training: packing, masking, perplexity against a plain loop, and runs that are killed and continued."""

import json
import math
import multiprocessing
import signal

import datasets
import pytest
import torch
import yaml
from peft import LoraConfig
from test_report import write_run
from tokenizers import processors
from toy_runs import POINTS, assert_same, save_model
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForCausalLM, RobertaForMaskedLM, set_seed

from hf_continual import InputError, TaskQueue
from hf_continual.compare import compare_runs, comparison_text
from hf_continual.data import load_task
from hf_continual.evaluation import EvaluationConfig, evaluate_task
from hf_continual.models import positions_of
from hf_continual.pretraining import AFTER_TRAINING, IN_EVALUATION, MaskingCollator, MaskingEpoch
from hf_continual.report import print_report
from hf_continual.run_scores import load_run, measure
from hf_continual.streams import load_stream
from hf_continual.tasks import Task
from hf_continual.testing import VOCABULARY, tiny_model, toy_queue_options, toy_stream, toy_tokenizer
from hf_continual.tokenization import Packing, tokenize_texts

PACKED = Packing(8)


def masked_model(seed=0):
    set_seed(seed)
    return RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=VOCABULARY, max_position_embeddings=66, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        )
    )  # fmt: skip


def masked_tokenizer():
    tokenizer = toy_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"})
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 1), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def gpt2():
    set_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1,
                   eos_token_id=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    )  # fmt: skip


def encoder_that_writes():
    set_seed(0)
    return RobertaForCausalLM(masked_model().config)


def texts(domain, count, seed=0):
    """Texts in which each word follows from the one before, by another rule in each domain."""
    generator = torch.Generator().manual_seed(100 * domain + seed)
    drawn = torch.randint(0, 35, (count, 2), generator=generator).tolist()
    return [" ".join(f"w{35 * domain + (a + i * (domain + 1)) % 35}" for i in range(5 + b % 6)) for a, b in drawn]


def text_task(domain=0, kind="clm", count=24, scored=8, **options):
    return Task(f"domain{domain}", texts(domain, count), texts(domain, scored, 1), kind=kind, **options)


def make_queue(folder, kind="clm", methods=(), *, lora=False, tasks=2, data=None, evaluation=None, **training):
    options = toy_queue_options("llama", lora=False, **{"learning_rate": 1e-2, **training})
    if kind == "mlm":
        options |= {"model": masked_model, "processing_class": masked_tokenizer()}
    if lora:
        targets = ["query", "value"] if kind == "mlm" else ["q_proj", "v_proj"]
        options["peft_config"] = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    options["data"] |= {"block_size": 12, **(data or {})}
    options["evaluation"] |= evaluation or {}
    return TaskQueue(folder, tasks=[text_task(i, kind) for i in range(tasks)], methods=list(methods), **options)


def plain_perplexity(model, rows, shift, decoder=False):
    """exp(loss / tokens) by a loop over single rows in float64; rows of (input ids, targets)."""
    lost, count = 0.0, 0
    model = model.double().eval()
    for ids, targets in rows:
        given = {"input_ids": torch.tensor([ids])}
        if decoder:
            given["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id, *targets[:-1]]])
        with torch.no_grad():
            logits = model(**given).logits[0]
        for place, target in enumerate(targets):
            if target != -100:
                lost -= math.log(float(torch.softmax(logits[place - shift], -1)[target]))
                count += 1
    return math.exp(lost / count), count


# -- perplexity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("make", [tiny_model, gpt2])
@pytest.mark.parametrize("packing", [PACKED, Packing(8, drop_last=False), Packing(8, pack=False)])
def test_perplexity_of_text_equals_a_loop_over_tokens(make, packing, batch_size):
    tokenizer, task = toy_tokenizer(), text_task()
    cell = evaluate_task(make(), tokenizer, task, EvaluationConfig(batch_size=batch_size), max_prompt_length=16,
                         packing=packing)  # fmt: skip
    blocks = tokenize_texts(datasets.Dataset.from_dict({"text": task.eval_dataset}), tokenizer, packing, "").rows
    expected, count = plain_perplexity(make(), [(ids, [-100, *ids[1:]]) for ids in blocks["input_ids"]], 1)
    assert cell.metric == "perplexity" and cell.others["tokens"] == count > 30 and cell.n == len(blocks)
    assert cell.score == pytest.approx(expected, rel=1e-6)
    assert not cell.higher_is_better


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_perplexity_of_answers_equals_a_loop_over_tokens(kind):
    tokenizer, task = toy_tokenizer(), toy_stream(1, eval_rows=7)[0]
    task.scorer = "perplexity"
    answers = ["red blue", "green", "blue red red", "red", "green", "blue", "red"]
    prompts = task.eval_dataset["prompt"][:]
    prompts[2] = "w5 w6 Answer :"
    task.eval_dataset = datasets.Dataset.from_dict({"prompt": prompts, "references": [[a, "no"] for a in answers]})
    cell = evaluate_task(tiny_model(kind), tokenizer, task, EvaluationConfig(batch_size=3), max_prompt_length=16)
    ids = [tokenizer(p)["input_ids"] for p in prompts]
    wanted = [[*tokenizer(a)["input_ids"], tokenizer.eos_token_id] for a in answers]
    if kind == "t5":
        rows = list(zip(ids, wanted, strict=True))
    else:
        rows = [(p + a, [-100] * len(p) + a) for p, a in zip(ids, wanted, strict=True)]
    expected, count = plain_perplexity(tiny_model(kind), rows, int(kind == "llama"), kind == "t5")
    assert cell.others["tokens"] == count == 17
    assert cell.score == pytest.approx(expected, rel=1e-6)


def test_perplexity_of_masked_tokens_equals_a_loop_over_them():
    tokenizer, task = masked_tokenizer(), text_task(kind="mlm")
    packing = Packing(6, masked=True)
    cell = evaluate_task(masked_model(), tokenizer, task, EvaluationConfig(batch_size=3), max_prompt_length=16,
                         packing=packing)  # fmt: skip
    rows = tokenize_texts(datasets.Dataset.from_dict({"text": task.eval_dataset}), tokenizer, packing, "").rows
    collator = MaskingCollator(tokenizer)
    collator.epoch = IN_EVALUATION
    masked = [[part.tolist() for part in collator.mask(ids)] for ids in rows["input_ids"]]
    assert any(labels == [-100] * 6 for _, labels in masked)  # such a row has no perplexity and is left out
    expected, count = plain_perplexity(masked_model(), masked, 0)
    assert cell.others["tokens"] == count > 3
    assert cell.score == pytest.approx(expected, rel=1e-6)
    again = evaluate_task(masked_model(), tokenizer, task, EvaluationConfig(), max_prompt_length=16, packing=packing)
    assert again.score == pytest.approx(cell.score, rel=1e-9)  # the same mask, in other batches
    assert cell.settings["mlm_probability"] == 0.15 and cell.settings["block_size"] == 6


def test_logits_are_brought_to_float32_a_few_at_a_time(monkeypatch):
    task = text_task()
    found = []
    for at_once in (2**24, 200):  # two tokens of a vocabulary of 96
        monkeypatch.setattr("hf_continual.perplexity.LOGITS_AT_ONCE", at_once)
        found.append(evaluate_task(tiny_model(), toy_tokenizer(), task, EvaluationConfig(), max_prompt_length=16,
                                   packing=PACKED).predictions)  # fmt: skip
    assert found[0] == found[1]


def test_only_the_logits_of_answers_are_computed():
    task = toy_stream(1)[0]
    task.scorer = "perplexity"
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda module, given, output: seen.append(output.shape[1]))
    evaluate_task(model, toy_tokenizer(), task, EvaluationConfig(), max_prompt_length=16)
    assert seen == [2]  # the answer and the end token, and none of the prompt


def test_domains_of_one_task_are_scored_apart():
    rows = [{"text": text, "domain": name} for i, name in enumerate(("a", "b")) for text in texts(i, 6)]
    task = Task("both", rows, datasets.Dataset.from_list(rows), kind="clm")
    cell = evaluate_task(tiny_model(), toy_tokenizer(), task, EvaluationConfig(), max_prompt_length=16, packing=PACKED)
    for name in "ab":
        own = [{"text": row["text"]} for row in rows if row["domain"] == name]
        alone = evaluate_task(
            tiny_model(), toy_tokenizer(), Task(name, None, datasets.Dataset.from_list(own), kind="clm"),
            EvaluationConfig(), max_prompt_length=16, packing=PACKED,
        )  # fmt: skip
        assert cell.others[f"perplexity/{name}"] == pytest.approx(alone.score, rel=1e-6)


# -- masking -----------------------------------------------------------------------------------------------------------


def rows_of(count=200, length=20):
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": [1, *ids, 2]} for ids in torch.randint(4, 80, (count, length), generator=generator).tolist()]


def test_tokens_are_masked_as_bert_does():
    tokenizer = masked_tokenizer()
    rows = rows_of()
    batch = MaskingCollator(tokenizer)(rows)
    original = torch.tensor([row["input_ids"] for row in rows])
    chosen = batch["labels"] != -100
    assert torch.equal(batch["labels"][chosen], original[chosen])
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    assert not chosen[:, 0].any() and not chosen[:, -1].any()  # special tokens are not
    assert float(chosen.float().sum() / (200 * 20)) == pytest.approx(0.15, abs=0.015)
    shown = batch["input_ids"][chosen]
    assert float((shown == tokenizer.mask_token_id).float().mean()) == pytest.approx(0.8, abs=0.05)
    assert float((shown == original[chosen]).float().mean()) == pytest.approx(0.1, abs=0.04)


def test_a_row_has_one_mask_an_epoch_wherever_it_stands():
    tokenizer, rows = masked_tokenizer(), rows_of(12)
    collator = MaskingCollator(tokenizer, seed=7)
    whole = collator(rows)
    parts = MaskingCollator(tokenizer, seed=7)(rows[5:8])
    assert torch.equal(whole["input_ids"][5:8], parts["input_ids"])
    assert torch.equal(collator(rows)["labels"], whole["labels"])
    for change in ({"epoch": 1}, {"seed": 8}):
        other = MaskingCollator(tokenizer, seed=change.get("seed", 7))
        other.epoch = change.get("epoch", 0)
        assert not torch.equal(other(rows)["labels"], whole["labels"])


def test_the_collator_learns_the_epoch_also_in_the_middle_of_one():
    collator = MaskingCollator(masked_tokenizer())
    callback = MaskingEpoch(collator)

    class State:
        epoch = None

    for epoch, expected in ((None, 0), (1.0, 1), (2.5, 2), (3 - 1e-12, 3)):
        State.epoch = epoch
        callback.on_epoch_begin(None, State, None)
        assert collator.epoch == expected
    callback.on_train_end(None, State, None)
    assert collator.epoch == AFTER_TRAINING


def test_workers_of_a_data_loader_see_the_epoch():
    collator, rows = MaskingCollator(masked_tokenizer()), rows_of(8)
    loader = torch.utils.data.DataLoader(rows, batch_size=8, num_workers=1, collate_fn=collator,
                                         persistent_workers=True)  # fmt: skip
    labels = []
    for epoch in range(2):
        collator.epoch = epoch
        labels.append(next(iter(loader))["labels"])
        assert torch.equal(labels[-1], collator(rows)["labels"])
    assert not torch.equal(*labels)


def test_a_batch_never_lacks_a_masked_token():
    collator = MaskingCollator(masked_tokenizer(), 0.15)
    rows = [{"input_ids": [1, word, 2]} for word in range(4, 40)]
    alone = [collator([row]) for row in rows]
    assert all(int((batch["labels"] != -100).sum()) == 1 for batch in alone)
    assert sum(int(collator.mask(row["input_ids"])[1].max()) == -100 for row in rows) > 20  # most would lack one


# -- runs --------------------------------------------------------------------------------------------------------------

METHODS = {
    "migu": ["migu"],
    "ewc": [{"name": "ewc"}],
    "replay": [{"name": "replay", "count": 4}],
    "after": [{"name": "replay", "count": 4, "mixing": "after"}],
    "lwf": ["lwf"],
    "kif": [{"name": "kif", "replay_count": 4, "fusion": "categorical", "quantile": 0.5}],
    "olora": ["olora"],
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["clm", "mlm"])
def test_methods_learn_text(kind, name, tmp_path):
    lora = name in ("kif", "olora")
    queue = make_queue(tmp_path / "run", kind, METHODS[name], lora=lora, num_train_epochs=1)
    result = queue.run()
    assert result.R.shape == (2, 2) and (result.R[1] > 1).all() and math.isfinite(result.R[1].sum())
    assert result.metrics["average_performance"] == pytest.approx(-float(torch.tensor(result.R[1]).log().mean()))
    meta = json.loads((tmp_path / "run/tasks/01-domain1/predictions/domain0.json").read_text())
    assert meta["metric"] == "perplexity" and meta["settings"]["kind"] == kind


@pytest.mark.parametrize("kind", ["clm", "mlm"])
def test_text_is_learnt_and_forgotten(kind, tmp_path):
    queue = make_queue(tmp_path / "run", kind, evaluation={"base_model": True}, num_train_epochs=12)
    result = queue.run()
    run = load_run(tmp_path / "run")
    assert result.R[0, 0] < 0.7 * run.baseline[0]  # learnt
    assert result.R[1, 0] > 1.2 * result.R[0, 0]  # forgotten
    assert result.metrics["backward_transfer"] == pytest.approx(math.log(result.R[0, 0] / result.R[1, 0]))
    assert result.metrics["backward_transfer"] < 0 < result.metrics["forgetting"]


def test_replay_keeps_rows_of_text(tmp_path):
    make_queue(tmp_path / "run", "clm", METHODS["replay"], num_train_epochs=1).run()
    folder = tmp_path / "run/tasks/01-domain1/methods/replay-buffer_"
    (rows,) = [datasets.load_from_disk(str(path.parent)) for path in folder.rglob("dataset_info.json")]
    assert len(rows) == 8 and all(len(ids) == 12 for ids in rows["input_ids"])
    assert rows["labels"][:] == rows["input_ids"][:]


def test_teachers_of_stored_rows_are_for_text_that_stays_the_same(tmp_path):
    make_queue(tmp_path / "clm", "clm", [{"name": "derpp", "count": 4}], num_train_epochs=1).run()
    with pytest.raises(InputError, match="'derpp' keeps what a teacher said .* of kind 'mlm' .* use replay"):
        make_queue(tmp_path / "mlm", "mlm", [{"name": "derpp", "count": 4}]).run()


def test_a_joint_run_learns_all_texts(tmp_path):
    queue = make_queue(tmp_path / "run", "mlm", num_train_epochs=1)
    queue.joint = True
    assert queue.run().R.shape == (1, 2)


def _killed(folder, kind, point, options):
    torch.set_num_threads(1)
    POINTS[point]()
    make_queue(folder, kind, **options).run()


@pytest.mark.parametrize(
    ("kind", "point"),
    [("clm", "in the evaluation"), ("clm", "in the end of a task"), ("mlm", "in a step"), ("mlm", "in a commit")],
)
def test_a_killed_run_goes_on_bit_for_bit(kind, point, tmp_path):
    options = {"methods": METHODS["ewc"], "num_train_epochs": 3}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        make_queue(tmp_path / "whole", kind, **options).run()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["hf_continual.task_queue", "hf_continual.testing"])
        child = context.Process(target=_killed, args=(tmp_path / "run", kind, point, options))
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
        make_queue(tmp_path / "run", kind, **options).run()
    finally:
        torch.set_num_threads(before)
    assert_same(tmp_path / "run", tmp_path / "whole")


# -- from files --------------------------------------------------------------------------------------------------------


def test_texts_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\nfour\n\n\nfive\n")
    (tmp_path / "rows.csv").write_text("body,domain\nx,a\ny,b\nz,a\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t, "other": 1}) + "\n" for t in "abcd"))
    datasets.Dataset.from_dict({"text": list("abcd")}).to_parquet(str(tmp_path / "rows.parquet"))

    def read(**spec):
        task = load_task({"kind": "clm", "eval_fraction": 0.25, **spec}, base_dir=tmp_path)
        assert task.kind == "clm" and task.scorer == "perplexity" and task.labels is None
        return sorted([*task.train_dataset["text"], *task.eval_dataset["text"]])

    assert read(path="a.txt") == ["five", "four", "one", "three", "two"]
    assert read(path="a.txt", format="lines") == read(path="a.txt")
    assert read(path="a.txt", format="paragraphs") == ["five", "one\ntwo", "three\nfour"]
    assert (
        read(data_files={"train": ["a.txt"], "eval": "a.txt"}, format="document")
        == ["one\ntwo\n\nthree\nfour\n\n\nfive"] * 2
    )
    assert read(path="rows.csv", columns={"text": "body"}) == ["x", "y", "z"]
    assert read(path="rows.jsonl") == read(path="rows.parquet") == ["a", "b", "c", "d"]
    task = load_task({"kind": "mlm", "path": "rows.csv", "columns": {"text": "body"}}, base_dir=tmp_path)
    assert task.train_dataset.column_names == ["text", "domain"]


def test_a_stream_file_may_have_tasks_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"text {i}\n" for i in range(8)))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x", "label": "low"}) + "\n" for _ in range(8)))
    end = {"layouts": [{"path": "a.jsonl"}], "kind": "classification", "labels": ["low", "high"], "seeds": [1, 2]}
    stream = {"tasks": {"a": {"kind": "mlm", "layouts": [{"path": "a.txt"}], "end_task": end}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(stream))
    (task,) = load_stream(str(tmp_path / "mine.yaml"), data_dir=tmp_path)
    assert task.kind == "mlm" and task.end_task.seeds == [1, 2] and task.end_task.kind == "classification"


# -- reports -----------------------------------------------------------------------------------------------------------

PERPLEXITIES = [[10.0, None, None], [12.0, 20.0, None], [15.0, 25.0, 30.0]]


def perplexity_run(path, R=PERPLEXITIES, mixed=False, **state):
    run = write_run(path, R=R, baseline=[40.0, 50.0, 60.0], **state)
    file = run / "scores.jsonl"
    file.write_text(file.read_text().replace('"exact_match"', '"perplexity"'))
    if mixed:
        lines = file.read_text().splitlines()
        file.write_text("".join(
            (line.replace('"perplexity"', '"macro_f1"') if '"task": "yelp"' in line else line) + "\n" for line in lines
        ))  # fmt: skip
    return run


def test_a_report_says_that_less_is_better(tmp_path, capsys):
    folder = perplexity_run(tmp_path / "run")
    run = load_run(folder)
    values, problems = measure(run)
    assert not problems and run.less_is_better and run.unit == "nats"
    backward = (math.log(10 / 15) + math.log(20 / 25)) / 2
    assert values["backward_transfer"] == pytest.approx(backward)  # below 0: worse
    assert values["forgetting"] == pytest.approx(-backward)
    assert values["average_performance"] == pytest.approx(-(math.log(15) + math.log(25) + math.log(30)) / 3)
    print_report(folder)
    shown = capsys.readouterr().out
    assert "perplexity (less is better)" in shown and "percent" not in shown
    assert "15.000" in shown and "40.000" in shown and f"{backward:.3f}" in shown
    assert "In nats: perplexity is better when smaller" in shown
    text = (folder / "report.md").read_text()
    assert "Of perplexity, which is no percentage, less is better." in text and "Percent" not in text
    assert (folder / "matrix.png").stat().st_size > 5000
    print_report(folder, convention="sapt-code")
    assert "forgetting/sapt is for scores from 0 to 1, and here they are perplexities" in capsys.readouterr().out


def test_no_mean_over_scores_of_two_directions(tmp_path, capsys):
    folder = perplexity_run(tmp_path / "run", mixed=True)
    print_report(folder)
    shown = capsys.readouterr().out
    assert "macro_f1, percent, perplexity (less is better)" in shown
    assert shown.count("some tasks are scored by perplexity, where less is better, and some by macro_f1") == 1
    assert "average performance" not in shown and "15.000" in shown and "2500.0" in shown
    assert (folder / "matrix.png").exists()


def test_a_table_of_runs_with_and_without_perplexity(tmp_path):
    perplexity_run(tmp_path / "text" / "seed-42", variant="text")
    write_run(tmp_path / "rows" / "seed-42", variant="rows")
    print_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "In nats of text: perplexity is better when smaller" in text


def test_perplexities_are_compared_in_nats(tmp_path):
    for variant, last in (("naive", 30.0), ("migu", 25.0)):
        run = perplexity_run(tmp_path / variant, variant=variant, R=[*PERPLEXITIES[:2], [15.0, 25.0, last]])
        state = json.loads((run / "queue.json").read_text())
        for task in state["tasks"]:
            task["hash"] = "same"
        state["evaluation"] = [{"task": name, "hash": "same"} for name in state["eval_tasks"]]
        (run / "queue.json").write_text(json.dumps(state))
    (found,) = compare_runs([tmp_path / "naive", tmp_path / "migu"], against="naive")
    assert found.wins == 1 and found.mean == pytest.approx(math.log(30 / 25) / 3)
    text = comparison_text([found])
    assert "average_performance against naive, nats (more is better)" in text and f"+{found.mean:.3f}" in text
    assert "Perplexities enter the formulas as -ln PPL" in text


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"path": "rows.jsonl", "kind": "clm"}, "no column 'text' for the role 'text'; it has 'body'.*columns: {text"),
        ({"path": "rows.jsonl", "kind": "clm", "columns": {"text": "bod"}}, "no column 'bod'.*did you mean 'body'"),
        ({"path": "rows.jsonl", "kind": "clm", "columns": {"prompt": "body"}}, "'prompt' is no column of this kind"),
        (
            {"path": "empty.jsonl", "kind": "mlm"},
            "column 'text' in row 1 of .*empty.jsonl' is empty; leave",
        ),
        ({"path": "number.jsonl", "kind": "mlm"}, "column 'text' in row 0 of .*number.jsonl' is 7, not a string"),
        ({"path": "a.txt", "kind": "lm"}, "kind: 'lm' is unknown; did you mean"),
        ({"path": "a.txt", "kind": "clm", "labels": ["a"]}, "labels: \\['a'\\] has no use for a task of kind 'clm'"),
        ({"path": "a.txt", "kind": "clm", "template": "{text}"}, "template: .* has no use for a task of kind 'clm'"),
        ({"path": "a.txt", "kind": "clm", "scorer": "rouge_l"}, "scorer 'rouge_l' needs answers, and a task of kind"),
        ({"path": "a.txt", "kind": "clm", "format": "input_output"}, "is plain text, which 'input_output' is not"),
        ({"path": "rows.jsonl", "kind": "clm", "format": "lines"}, "format: 'lines' is for .txt files"),
        ({"path": "a.txt"}, "has the columns 'text', neither prompt/completion"),
    ],
)
def test_bad_text_is_refused_in_a_sentence(spec, says, tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n")
    (tmp_path / "rows.jsonl").write_text('{"body": "a"}\n{"body": "b"}\n')
    (tmp_path / "empty.jsonl").write_text('{"text": "a"}\n{"text": " "}\n')
    (tmp_path / "number.jsonl").write_text('{"text": 7}\n{"text": 8}\n')
    with pytest.raises(InputError, match=says) as error:
        load_task(spec, base_dir=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "model", "data", "says"),
    [
        ("mlm", tiny_model, {}, "kind 'mlm' needs a masked language model such as RoBERTa, and this is a LlamaForCau"),
        (
            "clm",
            lambda: tiny_model("t5"),
            {},
            "kind 'clm' needs a decoder-only model, and T5ForConditional.* an encoder",
        ),
        ("clm", masked_model, {}, "kind 'clm' needs a model that writes text, and RobertaForMaskedLM fills in masked"),
        ("completion", masked_model, {}, "kind 'completion' needs a model that writes text, and RobertaForMaskedLM"),
        ("clm", encoder_that_writes, {}, "needs a model that reads from left to right, and this RobertaForCausalLM is"),
        ("clm", tiny_model, {"block_size": 129}, "data.block_size=129 is more than the 128 positions of this model"),
        ("mlm", masked_model, {"block_size": 66}, "data.block_size=66 is more than the 65 positions of this model"),
        ("clm", tiny_model, {"block_size": 128}, "its 118 tokens are less than one row of data.block_size=128"),
        ("clm", tiny_model, {"block_size": 3}, "data.block_size=3 must be a whole number of tokens, at least 4"),
        ("clm", tiny_model, {"pack": "no"}, "data.pack='no' must be true or false"),
        ("mlm", masked_model, {"mlm_probability": 15}, "data.mlm_probability=15 must be a number between 0 and 1"),
    ],
)
def test_models_and_options_that_do_not_fit(kind, model, data, says, tmp_path):
    options = toy_queue_options("llama", lora=False)
    options |= {"model": model, "processing_class": masked_tokenizer()}
    options["data"] |= data
    task = toy_stream(1)[0] if kind == "completion" else text_task(kind=kind, count=12)
    with pytest.raises(InputError, match=says) as error:
        TaskQueue(tmp_path / "run", tasks=[task], **options).run()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "tasks").exists()


def test_texts_that_are_too_few_are_refused_before_anything_is_trained(tmp_path):
    options = toy_queue_options("llama", lora=False)
    options["data"] |= {"block_size": 40}
    tasks = [text_task(0, count=24, scored=12), text_task(1, count=24, scored=2)]
    with pytest.raises(InputError, match="'domain1', evaluation texts: its .* tokens are less than one row"):
        TaskQueue(tmp_path / "run", tasks=tasks, **options).run()
    tasks[1] = text_task(1, count=2, scored=12)
    with pytest.raises(InputError, match="task 'domain1': its .* tokens are less than one row"):
        TaskQueue(tmp_path / "run", tasks=tasks, **options).run()
    assert not (tmp_path / "run" / "work").exists() and not (tmp_path / "run" / "tasks").exists()
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[5, 6, 7]]})
    with pytest.raises(InputError, match="eval_dataset of task 'x' has no column 'text', which kind: clm reads"):
        TaskQueue(tmp_path / "run", tasks=[Task("x", rows, rows, kind="clm")], **options).run()


def test_a_tokenizer_without_a_mask_token(tmp_path):
    options = toy_queue_options("llama", lora=False) | {"model": masked_model}
    with pytest.raises(InputError, match="has no mask token, which kind: mlm needs"):
        TaskQueue(tmp_path / "run", tasks=[text_task(kind="mlm")], **options).check()


def test_kinds_that_no_model_learns_together(tmp_path):
    options = toy_queue_options("llama", lora=False)
    with pytest.raises(InputError, match="'domain1' is of kind 'mlm' and 'domain0' of kind 'clm'; one model cannot"):
        TaskQueue(tmp_path / "run", tasks=[text_task(0), text_task(1, "mlm")], **options)
    with pytest.raises(InputError, match="kind 'classification' is for end tasks"):
        TaskQueue(tmp_path / "run", tasks=[Task("x", kind="classification")], **options)
    queue = TaskQueue(tmp_path / "run", tasks=[text_task(0), toy_stream(1)[0]], joint=True, **options)
    with pytest.raises(InputError, match="joint: task 'toy0' is of kind 'completion' and 'domain0' of kind 'clm'"):
        queue.run()


def test_text_and_completions_may_follow_each_other(tmp_path):
    options = toy_queue_options("llama", lora=False, num_train_epochs=1)
    options["data"] |= {"block_size": 12}
    queue = TaskQueue(tmp_path / "run", tasks=[text_task(0), toy_stream(1)[0]], methods=METHODS["replay"], **options)
    result = queue.run()
    assert result.R[1, 0] > 1 >= result.R[1, 1] and result.metrics == {}


def test_a_model_of_a_hub_name_gets_the_head_its_tasks_need(tmp_path):
    masked_model().save_pretrained(tmp_path / "roberta")
    masked_tokenizer().save_pretrained(tmp_path / "roberta")
    save_model(tmp_path / "llama")
    options = toy_queue_options("llama", lora=False, num_train_epochs=1)
    options.pop("processing_class")
    options["data"] |= {"block_size": 12}
    options["model"] = str(tmp_path / "roberta")
    queue = TaskQueue(tmp_path / "run", tasks=[text_task(kind="mlm")], **options)
    assert type(queue.model.fresh()) is RobertaForMaskedLM
    options["model"] = str(tmp_path / "llama")
    with pytest.raises(InputError, match="tasks of kind 'mlm' need a masked language model .* of type 'llama'"):
        TaskQueue(tmp_path / "run", tasks=[text_task(kind="mlm")], **options).check()


def test_positions_of_models():
    assert (positions_of(tiny_model()), positions_of(gpt2()), positions_of(masked_model())) == (128, 64, 65)
    assert positions_of(tiny_model("t5")) is None
    ids = torch.full((1, 65), 5)
    assert masked_model()(input_ids=ids).logits.shape[1] == 65  # as many as are said to fit
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        masked_model()(input_ids=torch.full((1, 66), 5))
