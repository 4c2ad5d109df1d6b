import datasets
import pytest
from contract import MethodContract

from hf_continual.errors import InputError
from hf_continual.methods.replay import Replay, buffer_size
from hf_continual.testing import tiny_model, toy_rows, train_task


class TestReplay(MethodContract):
    method = {"name": "replay", "ratio": 0.25}


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
        return method.buffer_["input_ids"]

    assert buffer(1) == buffer(1)
    assert buffer(1) != buffer(2)


def test_state_round_trip(tmp_path):
    method = Replay(count=4)
    train_task(tiny_model(), toy_rows(), [method], tmp_path / "t")
    method.save(tmp_path / "s")
    again = Replay(count=4)
    again.load(tmp_path / "s")
    assert (
        again.buffer_.to_dict() == method.buffer_.to_dict() and again.sizes_ == method.sizes_ and again.tasks_done_ == 1
    )


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


@pytest.mark.parametrize("options", [{"ratio": 1.5}, {"ratio": -0.1}, {"count": -1}])
def test_refuses_sizes_that_cannot_be(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Replay(**options)
