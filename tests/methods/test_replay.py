import json

import datasets
import pytest
import torch
from contract import MethodContract

from hf_continual import ContinualMethod
from hf_continual.errors import InputError
from hf_continual.methods.base import MethodList
from hf_continual.methods.replay import Replay
from hf_continual.replay import buffer_size, keep_rows
from hf_continual.testing import equal, tiny_model, toy_rows, toy_tokenizer, train_task, weights


class TestReplay(MethodContract):
    method = {"name": "replay", "ratio": 0.25}


class TestReplayAlternate(MethodContract):
    method = {"name": "replay", "count": 6, "mixing": "alternate", "policy": "herding"}
    kinds = ("llama", "t5")


class TestReplayAfter(MethodContract):
    method = {"name": "replay", "total": 6, "mixing": "after", "after_learning_rate": 0.005, "policy": "reservoir"}
    kinds = ("llama",)


class TestReplayOfClasses(MethodContract):
    method = {"name": "replay", "total": 8, "policy": "class_balanced"}
    kinds = ("bert",)


@pytest.mark.parametrize(
    ("rows", "ratio", "count", "size"),
    [(14000, 0.02, None, 280), (400, 0.02, None, 8), (250, 0.02, None, 5), (30, 0.02, None, 1), (10, 0.0, None, 0),
     (10, 0.5, 3, 3), (2, 0.02, 5, 2), (10, 0.02, 0, 0)],
)  # fmt: skip
def test_buffer_size(rows, ratio, count, size):
    assert buffer_size(rows, ratio, count) == size


def test_later_tasks_train_on_stored_rows_of_every_earlier_task(tmp_path):
    seen = {}

    class Spy(Replay):
        name = "replay"

        def train_dataset(self, ctx, dataset):
            seen[ctx.task.index] = super().train_dataset(ctx, dataset)
            return seen[ctx.task.index]

    model, method = tiny_model(), Spy(count=3)
    data = [toy_rows(seed=i) for i in range(3)]
    for i in range(3):
        train_task(model, data[i], [method], tmp_path / str(i))
    assert [len(seen[i]) for i in range(3)] == [16, 19, 22]
    replayed = seen[2]["input_ids"][16:]
    assert [sum(row in data[i]["input_ids"] for row in replayed) for i in range(2)] == [3, 3]
    assert len({str(row) for row in replayed}) == 6
    assert method.sizes_ == {"task0": 3, "task1": 3, "task2": 3} and len(method.buffer_) == 9


def test_the_draw_is_reproducible_and_random(tmp_path):
    def buffer(seed):
        method = Replay(count=4, seed=seed)
        train_task(tiny_model(), toy_rows(), [method], tmp_path / str(seed))
        return method.buffer_.rows["input_ids"]

    assert buffer(1) == buffer(1)
    assert buffer(1) != buffer(2)


def test_state_round_trip(tmp_path):
    method = Replay(count=4)
    train_task(tiny_model(), toy_rows(), [method], tmp_path / "t")
    method.save(tmp_path / "s")
    again = Replay(count=4)
    again.load(tmp_path / "s")
    assert again.buffer_.rows.to_dict() == method.buffer_.rows.to_dict() and again.buffer_.ids == method.buffer_.ids
    assert again.sizes_ == method.sizes_ and again.tasks_done_ == 1


def test_refuses_other_columns(tmp_path):
    model, method = tiny_model(), Replay(count=2)
    train_task(model, toy_rows(), [method], tmp_path / "0")
    with pytest.raises(InputError, match="columns"):
        train_task(model, toy_rows(seed=1).remove_columns("attention_mask"), [method], tmp_path / "1")


def test_refuses_a_stream_without_length(tmp_path):
    rows = toy_rows().to_iterable_dataset()
    assert isinstance(rows, datasets.IterableDataset)
    with pytest.raises(InputError, match="without length"):
        train_task(tiny_model(), rows, [Replay()], tmp_path, max_steps=1)


@pytest.mark.parametrize(
    "options",
    [{"ratio": 1.5}, {"ratio": -0.1}, {"count": -1}, {"total": 0}, {"total": 4, "count": 2}, {"policy": "best"},
     {"mixing": "both"}, {"seed": "a"}, {"after_epochs": 0, "mixing": "after"}, {"after_epochs": 2},
     {"after_learning_rate": 0.1}, {"after_learning_rate": "a", "mixing": "after"}],
)  # fmt: skip
def test_refuses_options_that_cannot_be(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Replay(**options)


class _Before(ContinualMethod):
    """Replay as it was before it had options: the same rows, in the same order."""

    def __init__(self):
        super().__init__()
        self.rows_ = None

    def train_dataset(self, ctx, dataset):
        self._own = dataset
        return dataset if self.rows_ is None else datasets.concatenate_datasets([dataset, self.rows_])

    def on_task_end(self, ctx):
        self.rows_ = keep_rows(self.rows_, self._own, 3, 42 + ctx.task.index)


def test_the_default_trains_as_it_always_did(tmp_path):
    def run(method):
        model = tiny_model(lora=True)
        for index in range(3):
            train_task(model, toy_rows(seed=index), [method], tmp_path / f"{method.name}{index}")
        return weights(model)

    assert equal(run(_Before()), run(Replay(count=3)))


class _Batches(ContinualMethod):
    """Writes down the rows of each micro-batch."""

    counts_micro_batches = True

    def __init__(self):
        super().__init__()
        self._seen = {}

    def forward_kwargs(self, ctx, batch):
        self._seen.setdefault(ctx.task.index, []).append(batch["input_ids"].tolist())
        return {}


def kinds_of(batches, data):
    """The tasks of the rows of each micro-batch."""
    task = {str(row): index for index, rows in enumerate(data) for row in rows["input_ids"]}
    return [sorted({task[str(row)] for row in batch}) for batch in batches]


def test_alternate_gives_stored_rows_micro_batches_of_their_own(tmp_path):
    model, spy, data = tiny_model(), _Batches(), [toy_rows(seed=i) for i in range(3)]
    method = Replay(count=4, mixing="alternate")
    steps = []
    for index in range(3):
        trainer = train_task(model, data[index], [method, spy], tmp_path / str(index), gradient_accumulation_steps=2)
        steps.append(trainer.state.global_step)
    assert steps == [2, 3, 3]
    assert kinds_of(spy._seen[0], data) == [[0]] * 4
    assert kinds_of(spy._seen[1], data) == [[1]] * 4 + [[0]]
    stored = kinds_of(spy._seen[2], data)
    assert [kind == [2] for kind in stored] == [True, True, False, True, True, False]
    rows = [str(row) for number in (2, 5) for row in spy._seen[2][number]]
    assert sorted(rows) == sorted(str(row) for row in method.buffer_.rows["input_ids"][:8])


def test_alternate_takes_more_stored_rows_than_new_ones(tmp_path):
    model, spy, method = tiny_model(), _Batches(), Replay(ratio=1.0, mixing="alternate")
    data = [toy_rows(rows=20), toy_rows(rows=8, seed=1)]
    for index in range(2):
        train_task(model, data[index], [method, spy], tmp_path / str(index))
    assert kinds_of(spy._seen[1], data) == [[1], [0], [0], [1], [0], [0], [0]]


def test_after_trains_on_the_stored_rows_alone(tmp_path):
    spy, data, method = (
        _Batches(),
        [toy_rows(seed=i) for i in range(2)],
        Replay(count=6, mixing="after", after_epochs=2),
    )
    model = tiny_model()
    first = train_task(model, data[0], [method, spy], tmp_path / "0")
    assert not [entry for entry in first.state.log_history if "phase" in entry]
    second = train_task(model, data[1], [method, spy], tmp_path / "1")
    assert kinds_of(spy._seen[1], data) == [[1]] * 4
    phase = [entry for entry in second.state.log_history if entry.get("phase") == "replay/after" and "loss" in entry]
    assert len(phase) == 2 * 2 and {entry["learning_rate"] for entry in phase} == {0.01}
    assert method.sizes_ == {"task0": 6, "task1": 6}

    # The same by hand: the task, then the rows that were stored before it.
    plain = tiny_model()
    train_task(plain, data[0], None, tmp_path / "2")
    train_task(plain, data[1], None, tmp_path / "3")
    train_task(plain, method.buffer_.rows_of(0), None, tmp_path / "4", num_train_epochs=2)
    assert equal(weights(plain), weights(model))


def test_after_has_a_learning_rate_of_its_own(tmp_path):
    model, method = tiny_model(), Replay(count=4, mixing="after", after_learning_rate=0.002)
    for index in range(2):
        trainer = train_task(model, toy_rows(seed=index), [method], tmp_path / str(index))
    rates = {entry["learning_rate"] for entry in trainer.state.log_history if "phase" in entry and "loss" in entry}
    assert rates == {0.002}


def test_a_total_is_never_exceeded(tmp_path):
    for policy in ("random", "first_n", "reservoir", "class_balanced", "herding"):
        model, method = tiny_model(), Replay(total=5, policy=policy)
        for index in range(3):
            train_task(model, toy_rows(seed=index), [method], tmp_path / f"{policy}{index}")
            assert len(method.buffer_) == sum(method.sizes_.values()) == 5
        assert policy == "reservoir" or method.sizes_ == {"task0": 2, "task1": 2, "task2": 1}


def test_herding_asks_the_model_that_has_just_learnt(tmp_path):
    model, method, data = tiny_model(lora=True), Replay(count=3, policy="herding"), toy_rows()
    train_task(model, data, [method], tmp_path / "0")
    model.eval()
    with torch.no_grad():
        outputs = model(input_ids=torch.tensor(data["input_ids"]), output_hidden_states=True)
    features = torch.nn.functional.normalize(outputs.hidden_states[-1].mean(1), dim=1)
    means = {row: features[row] for row in range(16)}
    best = min(means, key=lambda row: float((means[row] - features.mean(0)).norm()))
    assert f"000-{best:07d}" in method.buffer_.ids and len(method.buffer_) == 3


def test_refuses_rows_of_another_tokenizer(tmp_path):
    from hf_continual import ContinualTrainer, ContinualTrainingArguments

    def train(index, tokenizer):
        args = ContinualTrainingArguments(
            str(tmp_path / str(index)), use_cpu=True, report_to="none", max_steps=1, disable_tqdm=True
        )
        trainer = ContinualTrainer(
            model, args, train_dataset=toy_rows(seed=index), methods=[method], processing_class=tokenizer
        )
        trainer.train()

    model, method, other = tiny_model(), Replay(count=2), toy_tokenizer()
    other.add_tokens(["new"])
    train(0, toy_tokenizer())
    with pytest.raises(InputError, match="another tokenizer"):
        train(1, other)
    train(1, toy_tokenizer())
    assert method.sizes_ == {"task0": 2, "task1": 2}


def test_only_one_method_replays():
    with pytest.raises(InputError, match="'replay' and 'er' cannot be combined.*role 'replay'"):
        MethodList(["replay", "er"])
    MethodList(["replay", {"name": "kif", "replay_count": 2}])


def test_other_options_are_refused_when_the_state_is_read(tmp_path):
    method = Replay(count=4)
    train_task(tiny_model(), toy_rows(), [method], tmp_path / "t")
    method.save(tmp_path / "s")
    with pytest.raises(InputError, match="state of method 'replay'.*count=4 and now it is 5"):
        Replay(count=5).load(tmp_path / "s")


@pytest.mark.parametrize("rows", [None, 4])
def test_the_state_of_an_older_version_is_refused_by_name(tmp_path, rows):
    """Version 0.1 kept a dataset, or None before the first task had ended."""
    state = {"buffer_": {"kind": "value", "value": None}, "sizes_": {"kind": "value", "value": {}}}
    if rows:
        toy_rows(rows=rows).save_to_disk(str(tmp_path / "replay-buffer_"))
        state["buffer_"] = {"kind": "dataset"}
    (tmp_path / "replay.json").write_text(json.dumps({"method": "replay", "options": {}, "state": state}))
    method = Replay(count=4)
    with pytest.raises(InputError, match=r"method 'replay'.*continue with that version"):
        method.load(tmp_path)
    train_task(tiny_model(), toy_rows(), [Replay(count=4)], tmp_path / "t")
    assert len(method.buffer_) == 0
