import copy
import json
import pickle
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from peft import LoraConfig, get_peft_model
from torch.utils.data import BatchSampler, DataLoader
from transformers import PreTrainedTokenizerFast, TrainerState

from hf_continual import ContinualMethod
from hf_continual.distributed import Distributed
from hf_continual.errors import InputError
from hf_continual.interleaving import InterleavedDataset
from hf_continual.replay import (
    ReplayBuffer,
    balanced_rows,
    equal_shares,
    features_of,
    herding_rows,
    keep_rows,
    model_key,
    reservoir_rows,
    row_class,
    tokenizer_key,
)
from hf_continual.signals import LogitSignal, RowSignals, SignalStore
from hf_continual.testing import _StopAfter, equal, tiny_model, toy_rows, toy_tokenizer, train_task, weights


def numbers(rows, **more):
    return datasets.Dataset.from_dict({"input_ids": [[i, i + 1] for i in range(rows)], **more})


def filled(tasks=2, rows=10, **options):
    buffer = ReplayBuffer(**{"count": 3, **options})
    for index in range(tasks):
        buffer.add(index, f"t{index}", numbers(rows, labels=[i % 3 for i in range(rows)]))
    return buffer


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- which rows --------------------------------------------------------------------------------------------------------


def test_random_draws_what_it_always_drew():
    data = [toy_rows(seed=i) for i in range(3)]
    buffer, expected = ReplayBuffer(ratio=0.3, seed=7), None
    for index, rows in enumerate(data):
        buffer.add(index, f"t{index}", rows)
        expected = keep_rows(expected, rows, 4, 7 + index)
    assert buffer.rows.to_dict() == expected.to_dict() and buffer.rows.features == data[0].features
    assert buffer.sizes == {"t0": 4, "t1": 4, "t2": 4} and buffer.tasks == [0] * 4 + [1] * 4 + [2] * 4
    drawn = torch.randperm(16, generator=torch.Generator().manual_seed(8))[:4]
    assert buffer.ids[4:8] == [f"001-{row:07d}" for row in sorted(drawn.tolist())]
    assert buffer.rows_of(1)["input_ids"] == [data[1][row]["input_ids"] for row in sorted(drawn.tolist())]
    assert buffer.rows_of(9) is None


def test_the_choice_depends_on_seed_and_task_alone():
    data = numbers(50)
    for policy in ("random", "reservoir"):
        choices = [ReplayBuffer(count=5, policy=policy, seed=s).choose(data, t) for s, t in [(1, 0), (1, 0), (1, 1)]]
        assert choices[0] == choices[1] != choices[2] and len(set(choices[0])) == 5


def test_first_n():
    buffer = filled(policy="first_n", ratio=0.45, count=None)
    assert buffer.ids == [f"{t:03d}-{i:07d}" for t in range(2) for i in range(4)]


@pytest.mark.parametrize(("count", "size"), [(0, 0), (30, 10)])
def test_none_and_all(count, size):
    for policy in ("random", "first_n", "reservoir", "class_balanced"):
        buffer = filled(1, policy=policy, count=count)
        assert len(buffer) == size and buffer.sizes == {"t0": size} and (buffer.rows is None) == (size == 0)


def test_reservoir_is_algorithm_r():
    """Rows 0 and 1 fill two places; row n then draws one of n + 1."""
    draws = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).tolist()
    places = [0, 1]
    for row in range(2, 6):
        place = int(draws[row] * (row + 1))
        if place < 2:
            places[place] = row
    assert reservoir_rows(6, 2, 3) == places


def test_reservoir_keeps_every_row_as_often():
    """Chi squared over 20 rows: 99.9 % of fair draws are below 43.8."""
    draws, rows, size = 3000, 20, 5
    counts = Counter(row for seed in range(draws) for row in reservoir_rows(rows, size, seed))
    expected = draws * size / rows
    assert sum((counts[row] - expected) ** 2 / expected for row in range(rows)) < 43.8


def test_reservoir_with_a_total_is_uniform_over_all_tasks():
    """Tasks of 12, 4 and 24 rows, seen one after another: each of 40 rows stays in 10 of 40 cases."""
    draws, counts = 200, Counter()
    data = [[{"x": i} for i in range(n)] for n in (12, 4, 24)]
    for draw in range(draws):
        buffer = ReplayBuffer(total=10, policy="reservoir", seed=100 * draw)
        for index, rows in enumerate(data):
            buffer.add(index, f"t{index}", rows)
        assert len(buffer) == len(set(buffer.ids)) == len(buffer.rows) == 10
        counts.update(buffer.ids)
    expected = draws * 10 / 40
    assert len(counts) == 40
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 72.1  # 99.9 % of chi squared, 39


def test_class_balance():
    classes = list("aaaaaaaabbbc")
    chosen = [classes[row] for row in balanced_rows(classes, 6, 0)]
    assert Counter(chosen) == {"a": 3, "b": 2, "c": 1} or Counter(chosen) == {"a": 2, "b": 3, "c": 1}
    assert sorted(balanced_rows(classes, 12, 0)) == sorted(balanced_rows(classes, 99, 0)) == list(range(12))
    assert Counter(classes[row] for row in balanced_rows(classes, 9, 0)) == {"a": 5, "b": 3, "c": 1}
    assert len({tuple(balanced_rows(classes, 2, seed)) for seed in range(20)}) > 5
    best = balanced_rows(classes, 9, 0)
    assert best[:6] == balanced_rows(classes, 6, 0)  # so that what evicts the last ones keeps the balance


def test_distinct_answers_are_drawn_as_at_random():
    data = numbers(12, labels=[[-100, i] for i in range(12)])
    assert ReplayBuffer(count=4, policy="class_balanced").choose(data, 1) == ReplayBuffer(count=4).choose(data, 1)


def test_the_class_is_the_answer():
    assert row_class({"input_ids": [1, 2], "labels": [-100, 5, 6, -100]}) == (5, 6)
    assert row_class({"labels": torch.tensor([-100, 5])}) == (5,) and row_class({"labels": np.int64(2)}) == 2
    assert row_class({"label": 2}) == 2 and row_class({"labels": "yes"}) == "yes"
    with pytest.raises(InputError, match="class_balanced.*'labels' or 'label'.*input_ids"):
        ReplayBuffer(count=2, policy="class_balanced").choose(numbers(4), 0)


def naive_herding(features, size):
    features, chosen = features.double().numpy(), []
    for count in range(1, size + 1):
        left = [row for row in range(len(features)) if row not in chosen]
        means = {row: (features[row] + features[chosen].sum(0)) / count for row in left}
        chosen.append(min(left, key=lambda row: np.linalg.norm(features.mean(0) - means[row])))
    return chosen


def test_herding_by_hand():
    # The mean is 3: first 3; then (3 + x) / 2 is nearest with x = 2; then (5 + x) / 3 with x = 4.5.
    assert herding_rows(torch.tensor([[0.0], [2.0], [3.0], [4.5], [5.5]]), 3) == [2, 1, 3]


@pytest.mark.parametrize("seed", range(3))
def test_herding_equals_the_naive_way(seed):
    features = torch.randn(30, 7, generator=torch.Generator().manual_seed(seed))
    assert herding_rows(features, 12) == naive_herding(features, 12)
    buffer = ReplayBuffer(count=12, policy="herding")
    assert buffer.choose(numbers(30), 0, lambda rows: features) == naive_herding(features, 12)
    buffer.add(0, "t", numbers(30), features=features)
    assert buffer.ids == [f"000-{row:07d}" for row in sorted(naive_herding(features, 12))]


def test_herding_refuses_what_are_no_features():
    buffer = ReplayBuffer(count=2, policy="herding")
    for features in (None, torch.zeros(3, 2), torch.full((4, 2), torch.nan)):
        with pytest.raises(InputError, match="herding.*features"):
            buffer.choose(numbers(4), 0, features)


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_features_are_means_over_tokens_whatever_the_padding(kind):
    model = tiny_model(kind, dropout=0.5)
    model.train()
    rows = toy_rows(kind, rows=5)

    def make_batch(rows, collator=None, extra=0):
        ids = [row["input_ids"] + [0] * extra for row in rows]
        mask = [row["attention_mask"] + [0] * extra for row in rows]
        labels = [row["labels"] for row in rows]
        if kind == "llama":
            labels = [row + [-100] * extra for row in labels]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}

    def features(extra, size):
        ctx = SimpleNamespace(
            model=model, state=TrainerState(train_batch_size=size), dist=Distributed(), autocast=nullcontext,
            make_batch=lambda rows: make_batch(rows, extra=extra),
        )  # fmt: skip
        return features_of(ctx, rows)

    plain = features(0, 2)
    assert model.training and plain.shape == (5, 32)
    torch.testing.assert_close(plain.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(features(4, 3), plain, atol=1e-5, rtol=1e-4)
    model.eval()
    core = model.get_encoder() if kind == "t5" else model.base_model
    with torch.no_grad():
        hidden = core(input_ids=torch.tensor([rows[3]["input_ids"]])).last_hidden_state.mean(1)[0]
    torch.testing.assert_close(plain[3], hidden / hidden.norm(), atol=1e-5, rtol=1e-4)


# -- a total -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("available", "total", "shares"),
    [([5, 5], 4, [2, 2]), ([5, 5, 5], 7, [3, 2, 2]), ([1, 5, 5], 7, [1, 3, 3]), ([2, 5, 5], 8, [2, 3, 3]),
     ([1, 1], 9, [1, 1]), ([0, 3], 2, [0, 2]), ([9, 9, 9], 2, [1, 1, 0]), ([], 3, [])],
)  # fmt: skip
def test_equal_shares(available, total, shares):
    assert equal_shares(available, total) == shares


def test_tasks_share_a_total_equally():
    buffer = ReplayBuffer(total=7, policy="first_n")
    assert buffer.add(0, "a", numbers(10)) == []
    assert buffer.add(1, "b", numbers(10)) == ["000-0000004", "000-0000005", "000-0000006"]
    assert buffer.add(2, "c", numbers(10)) == ["000-0000003", "001-0000002"]
    assert buffer.sizes == {"a": 3, "b": 2, "c": 2} and len(buffer.rows) == 7
    assert buffer.rows["input_ids"] == [[0, 1], [1, 2], [2, 3], [0, 1], [1, 2], [0, 1], [1, 2]]


def test_a_small_task_leaves_its_share_to_the_others():
    buffer = ReplayBuffer(total=8)
    for index, rows in enumerate((2, 10, 10)):
        buffer.add(index, f"t{index}", numbers(rows))
    assert buffer.sizes == {"t0": 2, "t1": 3, "t2": 3}


def test_who_came_last_in_the_choice_leaves_first():
    buffer, best = ReplayBuffer(total=6, seed=3), {}
    for index in range(3):
        best[index] = buffer.choose(numbers(20), index)
        buffer.add(index, f"t{index}", numbers(20), best[index])
    assert buffer.ids == [f"{t:03d}-{row:07d}" for t in range(3) for row in sorted(best[t][:2])]
    balanced = ReplayBuffer(total=6, policy="class_balanced")
    data = numbers(20, labels=[i % 3 for i in range(20)])
    for index in range(2):
        balanced.add(index, f"t{index}", data)
    assert sorted(balanced.rows["labels"]) == [0, 0, 1, 1, 2, 2]


def test_evicted_rows_take_their_signals_with_them():
    dropped = []
    buffer = ReplayBuffer(total=4)
    buffer.signals = SimpleNamespace(drop=dropped.extend)
    evicted = [buffer.add(index, f"t{index}", numbers(10)) for index in range(3)]
    assert dropped == evicted[1] + evicted[2] and len(dropped) == 2 + 1 and not set(dropped) & set(buffer.ids)


def test_given_indices_are_kept():
    buffer = ReplayBuffer(count=1)
    buffer.add(0, "a", [{"input_ids": [i]} for i in range(5)], indices=[4, 0])
    assert buffer.ids == ["000-0000000", "000-0000004"] and buffer.rows["input_ids"] == [[0], [4]]
    with pytest.raises(InputError, match="already holds task 0"):
        buffer.add(0, "a", numbers(3))
    for wrong in ([1, 1], [5], [-1]):
        with pytest.raises(ValueError, match="different rows"):
            buffer.add(1, "b", numbers(5), indices=wrong)


def test_equality_is_of_options_keys_and_rows():
    assert filled() == filled() and ReplayBuffer() == ReplayBuffer()
    assert filled() != filled(1) and filled() != filled(seed=1) and filled() != filled(rows=9) and filled() != 3
    bound, other = filled(), ReplayBuffer(count=3)
    bound.bind("m", None)
    for index in range(2):
        other.add(index, f"t{index}", numbers(10, labels=[7] * 10))
    assert other.ids == filled().ids and filled() not in (bound, other)


def test_a_shallow_copy_keeps_the_rows_from_before():
    buffer = filled(1, total=4, count=None)
    before = copy.copy(buffer)
    buffer.bind("m", "t")
    buffer.add(1, "t1", numbers(10, labels=[1] * 10))
    assert before == filled(1, total=4, count=None) != buffer and len(before.rows) == len(before.ids) == 4


@pytest.mark.parametrize(
    "options",
    [{"ratio": 1.5}, {"ratio": -0.1}, {"ratio": float("nan")}, {"count": -1}, {"count": 1.5}, {"total": 0},
     {"total": True}, {"policy": "newest"}, {"seed": None}, {"total": 4, "count": 2}],
)  # fmt: skip
def test_refuses_options_that_cannot_be(options):
    with pytest.raises(InputError, match=next(iter(options))):
        ReplayBuffer(**options)


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"total": 5, "count": None}, {"policy": "class_balanced"}, {"count": 0}])
def test_state_round_trip(tmp_path, options):
    buffer = filled(3, **options)
    buffer.bind("m", "t")
    buffer.save(tmp_path / "a")
    again = ReplayBuffer(**buffer.options())
    again.load(tmp_path / "a")
    again.save(tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    for name in ("ids", "tasks", "sizes"):
        assert getattr(again, name) == getattr(buffer, name)
    assert again == buffer and (again.rows is None) == (len(buffer) == 0)
    # What follows is the same too, and the folder is no longer needed.
    for path in (tmp_path / "a").iterdir():
        path.unlink()
    for each, folder in ((buffer, "c"), (again, "d")):
        each.add(3, "t3", numbers(9, labels=[1] * 9))
        each.save(tmp_path / folder)
    assert content(tmp_path / "c") == content(tmp_path / "d")


def test_rows_without_and_with_a_history_are_written_alike(tmp_path):
    """Whether rows came from a file, through a filter or from memory: equal states are equal bytes."""
    path = tmp_path / "rows.jsonl"
    numbers(10).to_json(path)
    stored = datasets.load_dataset("json", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")
    stored = stored.cast(numbers(10).features)
    for name, rows in {"memory": numbers(10), "file": stored, "filter": numbers(11).select(range(10))}.items():
        buffer = ReplayBuffer(count=4)
        buffer.add(0, "a", rows)
        buffer.save(tmp_path / name)
    assert content(tmp_path / "memory") == content(tmp_path / "file") == content(tmp_path / "filter")


def test_saving_replaces_what_a_killed_process_left(tmp_path):
    buffer = filled()
    buffer.save(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "data-00000-of-00002.arrow").write_bytes(b"half")
    (tmp_path / "b" / "other").mkdir()
    buffer.save(tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def _cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _edit(path):
    record = json.loads(path.read_text())
    record["ids"][0] = "000-0000099"
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [("data-00000-of-00001.arrow", _cut, "data-00000-of-00001.arrow is truncated"),
     ("data-00000-of-00001.arrow", _flip, "data-00000-of-00001.arrow is truncated or was edited"),
     ("data-00000-of-00001.arrow", lambda p: p.unlink(), "data-00000-of-00001.arrow is missing"),
     ("state.json", _flip, "state.json is truncated or was edited"),
     ("more.arrow", lambda p: p.write_text("?"), "more.arrow is not part of the buffer"),
     ("buffer.json", _cut, "buffer.json is truncated"), ("buffer.json", _edit, "buffer.json was edited"),
     ("buffer.json", lambda p: p.unlink(), "buffer.json is missing"),
     ("buffer.json", lambda p: p.write_text("{}"), "buffer.json is truncated or was edited"),
     ("buffer.json", lambda p: p.write_text('{"schema": 2, "sha256": ""}'), "schema version 2")],
)  # fmt: skip
def test_refuses_damaged_files(tmp_path, name, damage, said):
    buffer = filled()
    buffer.save(tmp_path / "a")
    damage(tmp_path / "a" / name)
    again = ReplayBuffer(count=3)
    with pytest.raises(InputError, match=said):
        again.load(tmp_path / "a")
    assert len(again) == 0 and again.rows is None and again.sizes == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [({"count": 4}, "count=3 and now it is 4"), ({"seed": 1}, "seed=42 and now it is 1"),
     ({"policy": "first_n"}, "policy='random' and now it is 'first_n'"),
     ({"ratio": 0.5}, "ratio=0.02 and now it is 0.5")],
)  # fmt: skip
def test_refuses_other_options(tmp_path, options, said):
    filled().save(tmp_path / "a")
    with pytest.raises(InputError, match=said):
        ReplayBuffer(**{"count": 3, **options}).load(tmp_path / "a")


def signal():
    return RowSignals({"input": 2}, LogitSignal.from_logits(torch.zeros(1, 5), torch.tensor([0])))


def test_signals_are_stored_beside_the_rows(tmp_path):
    buffer = filled(1)
    buffer.signals = SignalStore(tmp_path / "work", {"model": "m"})
    for row_id in buffer.ids:
        buffer.signals.write(row_id, signal())
    buffer.save(tmp_path / "a")
    again = ReplayBuffer(count=3)
    again.signals = SignalStore(None)
    again.load(tmp_path / "a")
    assert again.signals.ids == buffer.ids
    again.save(tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    _flip(tmp_path / "a" / "signals" / f"{buffer.ids[0]}.safetensors")  # hard links: it is damaged everywhere
    fresh = ReplayBuffer(count=3)
    fresh.signals = SignalStore(None)
    with pytest.raises(InputError, match=f"{buffer.ids[0]}.safetensors"):
        fresh.load(tmp_path / "a")
    with pytest.raises(InputError, match="has signals of a teacher"):
        ReplayBuffer(count=3).load(tmp_path / "a")
    filled(1).save(tmp_path / "c")
    with pytest.raises(InputError, match="has no signals"):
        again.load(tmp_path / "c")


# -- whose rows --------------------------------------------------------------------------------------------------------


def test_refuses_rows_of_another_tokenizer_or_model(tmp_path):
    buffer = filled()
    buffer.bind(None, None)
    buffer.bind("model", "tokenizer")
    buffer.bind(None, "tokenizer")
    buffer.save(tmp_path / "a")
    again = ReplayBuffer(count=3)
    again.bind("other", "other")  # an empty buffer is anyone's
    again.load(tmp_path / "a")
    again.bind("model", "tokenizer")
    with pytest.raises(InputError, match="rows of another tokenizer.*empty buffer"):
        again.bind("model", "other")
    with pytest.raises(InputError, match="rows of another model"):
        again.bind("other", "tokenizer")


def test_the_tokenizer_key_is_of_the_ids():
    key = tokenizer_key(toy_tokenizer())
    used = toy_tokenizer()
    used.padding_side, used.truncation_side, used.model_max_length = "left", "left", 7
    used.chat_template = "{{ messages }}"
    used(["w1 w2 w3", "w1"], padding="max_length", truncation=True, max_length=2)
    assert tokenizer_key(used) == key == tokenizer_key(pickle.loads(pickle.dumps(used)))
    assert tokenizer_key(SimpleNamespace(tokenizer=used)) == key
    more, other = toy_tokenizer(), toy_tokenizer()
    more.add_tokens(["new"])
    other.pad_token = "</s>"
    assert len({key, tokenizer_key(more), tokenizer_key(other)}) == 3
    assert tokenizer_key(None) is None and tokenizer_key(object()) is None


def test_the_tokenizer_key_survives_saving(tmp_path):
    toy_tokenizer().save_pretrained(tmp_path)
    assert tokenizer_key(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == tokenizer_key(toy_tokenizer())


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_the_model_key_is_of_the_base_model(kind):
    key = model_key(tiny_model(kind))
    assert len({key, *(model_key(tiny_model(kind, lora=True, rank=r)) for r in (2, 8))}) == 1
    stacked = tiny_model(kind, lora=True)
    stacked.add_adapter("second", LoraConfig(r=3, target_modules=["q", "q_proj", "query"]))
    assert model_key(stacked) == key
    with torch.device("meta"):
        assert model_key(type(tiny_model(kind))(tiny_model(kind).config)) == key
    assert key != model_key(tiny_model("roberta"))


def test_the_model_key_leaves_out_whatever_peft_adds():
    key = model_key(tiny_model())
    for more in ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}, {"use_dora": True}):
        peft = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], **more))
        assert model_key(peft) == key
        assert model_key(peft.merge_and_unload()) == key
    larger = tiny_model()
    larger.resize_token_embeddings(100)
    assert model_key(larger) != key


# -- interleaving ------------------------------------------------------------------------------------------------------


def epoch(new, stored, batch_size, processes=1, **options):
    sampler = InterleavedDataset(range(new), range(stored)).sampler(batch_size, processes, **options)
    order = list(sampler)
    assert len(order) == len(sampler)
    return order


@pytest.mark.parametrize(
    ("new", "stored", "batch_size", "processes", "order"),
    [
        # one stored after each floor(4 / 2) new
        (8, 4, 2, 1, [0, 1, 2, 3, 8, 9, 4, 5, 6, 7, 10, 11]),
        # floor(5 / 2) = 2: what is left over comes last
        (10, 4, 2, 1, [0, 1, 2, 3, 10, 11, 4, 5, 6, 7, 12, 13, 8, 9]),
        # incomplete ones of both
        (5, 3, 2, 1, [0, 1, 5, 6, 2, 3, 7, -1, 4, -1]),
        # more stored than new: 3 of 5 after the second, 2 after the first
        (4, 9, 2, 1, [0, 1, 4, 5, 6, 7, 2, 3, 8, 9, 10, 11, 12, -1]),
        (1, 3, 1, 1, [0, 1, 2, 3]),
        # two ranks: 9 new are two units and one row, which both get; 3 stored are two and one
        (9, 3, 2, 2, [0, 1, 2, 3, 4, 5, 6, 7, 8, -1, 8, -1, 9, 10, 11, -1]),
        # three ranks and one row each
        (3, 2, 2, 3, [0, -1, 1, -1, 2, -1, 3, -1, 4, -1, 3, -1]),
        (4, 0, 2, 1, [0, 1, 2, 3]),
        (0, 3, 2, 1, [0, 1, 2, -1]),
        (0, 0, 2, 1, []),
    ],
)
def test_the_order_by_hand(new, stored, batch_size, processes, order):
    assert epoch(new, stored, batch_size, processes, shuffle=False) == order


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_every_rank_has_rows_of_one_kind_in_every_step(processes, drop_last):
    for new, stored, size in [(13, 5, 3), (7, 22, 2), (4, 1, 4), (31, 31, 2), (2, 2, 1)]:
        dataset = InterleavedDataset(range(new), range(stored))
        sampler = dataset.sampler(size, processes, seed=5)
        ranks = [
            list(BatchSamplerShard(BatchSampler(sampler, size, drop_last), processes, rank))
            for rank in range(processes)
        ]
        unit = size * processes
        assert {len(rank) for rank in ranks} == {-(-new // unit) + -(-stored // unit)}
        for step in zip(*ranks, strict=True):
            rows = [[i for i in batch if i >= 0] for batch in step]
            assert all(rows) and len({i < new for batch in rows for i in batch}) == 1
        seen = Counter(i for rank in ranks for batch in rank for i in batch if i >= 0)
        assert set(seen) == set(range(new + stored)) and max(seen.values()) <= processes
        assert sum(n > 1 for n in seen.values()) <= 2 * (processes - 1)


def test_each_epoch_has_an_order_of_its_own_from_the_seed():
    sampler, other = [InterleavedDataset(range(20), range(6)).sampler(2, 2, seed=3) for _ in range(2)]
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    other.set_epoch(1)
    assert list(sampler) == list(other)
    sampler.set_epoch(0)
    assert list(sampler) == first != epoch(20, 6, 2, 2, seed=4)


def test_rows_fillers_and_columns():
    new, stored = toy_rows(rows=5, seed=0), toy_rows(rows=3, seed=1)
    dataset = InterleavedDataset(new, stored)
    assert len(dataset) == 8 and dataset[-1] is None and dataset.column_names == new.column_names
    assert dataset[4] == new[4] and dataset[5] == stored[0] and dataset[7] == stored[2]
    for index in (8, -2):
        with pytest.raises(IndexError):
            dataset[index]
    assert not hasattr(InterleavedDataset([1], [2]), "column_names")


def test_the_collator_leaves_fillers_out():
    collator = pickle.loads(pickle.dumps(InterleavedDataset([1], [2]).collator(sum)))
    assert collator([1, None, 3]) == 4
    with pytest.raises(InputError, match="split_batches"):
        collator([None, None])


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_can_be_skipped_in_a_later_epoch(processes):
    """As the Trainer resumes in epoch 1, on each rank; with worker processes too."""
    dataset = InterleavedDataset(list(range(14)), list(range(100, 105)))

    def loader(rank, workers=0):
        plain = DataLoader(
            dataset, 2, sampler=dataset.sampler(2, processes, seed=1), collate_fn=dataset.collator(torch.tensor),
            num_workers=workers,
        )  # fmt: skip
        return prepare_data_loader(plain, num_processes=processes, process_index=rank, put_on_device=False)

    for rank in range(processes):
        whole = loader(rank)
        epochs = []
        for number in range(2):
            whole.set_epoch(number)
            epochs.append([batch.tolist() for batch in whole])
        assert epochs[0] != epochs[1] and len(epochs[0]) == len(whole)
        dataset.set_epoch(0)  # as in a new process
        rest = skip_first_batches(loader(rank, workers=rank), 2)
        rest.set_epoch(1)
        assert [batch.tolist() for batch in rest] == epochs[1][2:]


class Interleave(ContinualMethod):
    """Gives every task the same stored rows, and writes down what is trained on."""

    counts_micro_batches = True

    def __init__(self):
        super().__init__()
        self._seen = []

    def train_dataset(self, ctx, dataset):
        return InterleavedDataset(dataset, toy_rows(rows=7, seed=99))

    def forward_kwargs(self, ctx, batch):
        self._seen.append(batch["input_ids"].tolist())
        return {}


def test_a_run_resumed_within_the_second_epoch_ends_the_same(tmp_path):
    """18 new and 7 stored rows in fours: 5 + 2 micro-batches an epoch; in pairs, 4 steps an epoch."""

    def run(folder, method=None, **options):
        method = method or Interleave()
        model = tiny_model(lora=True, dropout=0.1)
        data = toy_rows(rows=18)
        trainer = train_task(
            model, data, [method], tmp_path / folder, num_train_epochs=2, save_strategy="steps", save_steps=3,
            gradient_accumulation_steps=2, **options,
        )  # fmt: skip
        return weights(model), method._seen, trainer.state.global_step

    whole, seen, steps = run("whole")
    assert steps == 8 and len(seen) == 14
    assert [len(batch) for batch in seen[:7]] == [4, 4, 4, 4, 4, 3, 2]
    stored = [tuple(row) for row in toy_rows(rows=7, seed=99)["input_ids"]]
    for number, batches in enumerate((seen[:7], seen[7:])):
        kinds = [{tuple(row) in stored for row in batch} for batch in batches]
        assert kinds == [{False}, {False}, {True}, {False}, {False}, {True}, {False}], number
        rows = [tuple(row) for batch in batches for row in batch]
        assert len(rows) == len(set(rows)) == 25
    assert seen[:7] != seen[7:]
    run("part", callbacks=[_StopAfter(6)])
    again, rest, _ = run("part", resume=str(tmp_path / "part" / "checkpoint-6"))
    assert rest == seen[-3:] and equal(whole, again)


@pytest.mark.parametrize("options", [{"dataloader_drop_last": True}, {"dataloader_num_workers": 1}])
def test_options_of_the_loader_change_nothing(tmp_path, options):
    results = []
    for number, more in enumerate(({}, options)):
        model, method = tiny_model(), Interleave()
        train_task(model, toy_rows(rows=10), [method], tmp_path / str(number), **more)
        results.append((weights(model), method._seen))
    assert results[0][1] == results[1][1] and equal(results[0][0], results[1][0])


def test_sequential_sampling_keeps_the_order(tmp_path):
    method, data = Interleave(), toy_rows(rows=8)
    train_task(tiny_model(), data, [method], tmp_path, train_sampling_strategy="sequential")
    stored = toy_rows(rows=7, seed=99)["input_ids"]
    assert method._seen == [data["input_ids"][:4], stored[:4], data["input_ids"][4:], stored[4:]]
