"""An evaluation that is stopped goes on with the rows it has answered, to the same predictions."""

import json

import datasets
import pytest
import torch
from toy_runs import assert_same, make_queue, run_until_killed

from hf_continual.evaluation import EvaluationConfig, evaluate_task
from hf_continual.generation import Chooser, Writer
from hf_continual.run_state import PartialAnswers
from hf_continual.tasks import Task
from hf_continual.testing import tiny_model, toy_tokenizer

CONFIG = EvaluationConfig(batch_size=2, max_new_tokens=4)
IN_GROUPS = {"evaluation": {"batch_size": 2}}
DRAWN = EvaluationConfig(batch_size=2, max_new_tokens=4, temperature=1.5)


def task(scorer="exact_match", rows=18):
    prompts = [" ".join(f"w{(7 * i + k) % 70}" for k in range(1 + i % 6)) + " Answer :" for i in range(rows)]
    data = datasets.Dataset.from_dict({"prompt": prompts, "references": [["red"]] * rows})
    return Task("t", eval_dataset=data, labels=["red", "blue green", "dog"], scorer=scorer)


class Stopped(Exception):
    pass


class StopsAfter(PartialAnswers):
    """Ends the evaluation once so many groups are kept."""

    def __init__(self, *args, groups):
        super().__init__(*args)
        self.left = groups

    def add(self, found):
        super().add(found)
        self.left -= 1
        if not self.left:
            raise Stopped


def evaluate(log=None, config=CONFIG, given=None, **options):
    return evaluate_task(
        tiny_model(), toy_tokenizer(), given or task(), config, max_prompt_length=16, log=log, **options
    )


@pytest.fixture
def counted(monkeypatch):
    """Rows that go through the model."""
    rows = []
    for owner in (Writer, Chooser):
        original = owner.__call__
        monkeypatch.setattr(
            owner, "__call__", lambda self, asked, done, call=original: rows.extend(asked) or call(self, asked, done)
        )
    return rows


@pytest.mark.parametrize(("scorer", "config"), [("exact_match", CONFIG), ("label_likelihood", CONFIG),
                                                ("exact_match", DRAWN)])  # fmt: skip
def test_goes_on_where_it_was_stopped(scorer, config, tmp_path, counted):
    given = task(scorer)
    whole = evaluate(config=config, given=given)
    assert len(counted) == 18
    with pytest.raises(Stopped):
        evaluate(StopsAfter(tmp_path, "t", "model", 0, groups=2), config, given)
    kept = [json.loads(line) for line in (tmp_path / "t.rank0.partial").read_text().splitlines()[1:]]
    assert 8 <= len(kept) <= 12
    counted.clear()
    log = PartialAnswers(tmp_path, "t", "model", 0)
    cell = evaluate(log, config, given)
    assert cell == whole and cell.tokens == whole.tokens
    assert len(counted) == 18 - len(kept)
    counted.clear()
    assert evaluate(PartialAnswers(tmp_path, "t", "model", 0), config, given) == whole and not counted
    log.drop()
    assert not list(tmp_path.iterdir())


def test_answers_of_something_else_are_dropped(tmp_path, counted):
    with pytest.raises(Stopped):
        evaluate(StopsAfter(tmp_path, "t", "model", 0, groups=2))
    before = (tmp_path / "t.rank0.partial").read_bytes()
    for log, options in [
        (("t", "another model", 0), {}),
        (("t", "model", 0), {"config": EvaluationConfig(batch_size=2, max_new_tokens=3)}),
        (("t", "model", 0), {"config": EvaluationConfig(batch_size=4, max_new_tokens=4)}),
        (("t", "model", 0), {"given": task(rows=17)}),
        (("t", "model", 0), {"autocast_dtype": torch.bfloat16}),
    ]:
        (tmp_path / "t.rank0.partial").write_bytes(before)
        counted.clear()
        evaluate(PartialAnswers(tmp_path, *log), **options)
        assert len(counted) == len(options.get("given", task()).eval_dataset), (log, options)
    (tmp_path / "t.rank0.partial").write_bytes(before)
    counted.clear()
    evaluate(PartialAnswers(tmp_path, "t", "model", 0))
    assert len(counted) < 18  # the control: nothing else, so they count


def test_what_follows_the_last_whole_line_is_dropped(tmp_path):
    log = PartialAnswers(tmp_path, "t", "model", 0)
    assert log.begin("key") == {}
    log.add({3: [[1, 2]], 5: [[4]]})
    path = tmp_path / "t.rank0.partial"
    whole = path.read_bytes()
    for torn in (b"[7, [[1", b"\x00\x00\x00\n", b"[7, [[1\n[8, [[2]]]\n"):
        path.write_bytes(whole + torn)
        log = PartialAnswers(tmp_path, "t", "model", 0)
        assert log.begin("key") == {3: [[1, 2]], 5: [[4]]}
        log.add({9: [[6]]})
        assert PartialAnswers(tmp_path, "t", "model", 0).begin("key") == {3: [[1, 2]], 5: [[4]], 9: [[6]]}
        path.write_bytes(whole)
    path.write_bytes(whole[:5])  # not even the key
    assert PartialAnswers(tmp_path, "t", "model", 0).begin("key") == {}


def test_ranks_find_what_all_have_left_and_drop_it(tmp_path):
    first, second = (PartialAnswers(tmp_path, "t", "model", rank) for rank in range(2))
    for rank, log in enumerate((first, second)):
        log.begin("key")
        log.add({rank: rank})
    assert PartialAnswers(tmp_path, "t", "model", 0).begin("key") == {0: 0, 1: 1}
    assert PartialAnswers(tmp_path, "t", "model", 1).begin("other") == {}  # rank 1's own file is another's now
    assert PartialAnswers(tmp_path, "t", "model", 0).begin("key") == {0: 0}
    other = PartialAnswers(tmp_path, "t2", "model", 0)
    other.begin("key")
    second.drop()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.rank0.partial", "t2.rank0.partial"]
    second.begin("key")
    first.drop()  # rank 0 drops them all
    assert [path.name for path in tmp_path.iterdir()] == ["t2.rank0.partial"]
    away = PartialAnswers(None, "t", "model", 1)  # on a host without the run directory
    assert away.begin("key") == {} and away.add({1: 1}) is None and away.drop() is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    make_queue(folder, options=IN_GROUPS).run()
    torch.set_num_threads(before)
    return folder


def test_a_queue_killed_while_it_scores_goes_on(whole, tmp_path, counted, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    run = tmp_path / "run"
    run_until_killed(run, "naive", "in the answers", options=IN_GROUPS)
    partial = run / "tasks" / "01-toy1" / "predictions" / "toy0.rank0.partial"
    kept = len(partial.read_text().splitlines()) - 1
    assert 0 < kept < 4
    counted.clear()
    make_queue(run, options=IN_GROUPS).run()
    assert len(counted) == 4 - kept + 4  # the rest of this cell, and the next one
    assert_same(run, whole)
    assert not list(run.glob("**/*.partial"))


def test_answers_left_beside_a_written_cell_are_removed(whole, tmp_path):
    run = tmp_path / "run"
    run_until_killed(run, "naive", "before the answers are dropped", options=IN_GROUPS)
    assert list(run.glob("**/toy0.rank0.partial"))
    make_queue(run, options=IN_GROUPS).run()
    assert_same(run, whole)
    assert not list(run.glob("**/*.partial"))
