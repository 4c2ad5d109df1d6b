import copy
from dataclasses import replace

import pytest
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers import BatchEncoding, DataCollatorForSeq2Seq, DataCollatorWithPadding, Trainer, TrainingArguments

from hf_continual.attention import LayerTarget
from hf_continual.collators import DistillationCollator, LogitTarget, TeacherBatch, make_collator
from hf_continual.errors import InputError
from hf_continual.signals import AttentionSignal, LogitSignal, RowSignals, SignalStore
from hf_continual.testing import tiny_model, toy_tokenizer

PADDINGS = [("right", None), ("left", None), ("right", 8), ("left", 8)]

# Signals say the token they stand at, so that content alone tells whether they are in their place.


def tokens(seed, length):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 80, (length,), generator=generator)


def row_of(seed, length, answers=3):
    ids = tokens(seed, length)
    labels = [-100] * (length - answers) + ids[length - answers :].tolist()
    return {"input_ids": ids.tolist(), "attention_mask": [1] * length, "labels": labels}


def logit_signal(ids, positions, top_k=None):
    at = ids[positions].float()
    values = at[:, None] + torch.arange(5) / 8
    signal = LogitSignal.from_logits(values, torch.tensor(positions), top_k)
    return replace(signal, lse=at)


def attention_signal(query, key, heads, rows, kind="weights", sides=("input", "input")):
    h, at, keys = torch.tensor(heads), query[rows].float(), key.float()
    signal = AttentionSignal(kind, sides, h.short(), torch.tensor(rows, dtype=torch.int32))
    if kind == "weights":
        signal.values = (keys / 100 + h[:, None, None] + torch.zeros(len(rows), 1)).half()
    elif kind == "outputs":
        signal.values = (at[:, None] / 100 + h[:, None, None] + torch.zeros(4)).half()
    else:
        signal.query = (at[:, None] / 100 + h[:, None, None] + torch.zeros(4)).half()
        signal.key = (keys[:, None] / 100 + h[:, None, None] + torch.zeros(4)).half()
    return signal


ROWS = [row_of(0, 9), row_of(1, 5), row_of(2, 7)]
TASKS = [0, 0, 1]
IDS = ["000-0", "000-1", "001-0"]


def decoder_only_store(folder, top_k=None, kind="weights"):
    """Three stored rows of two tasks, which chose different heads and layers."""
    store = SignalStore(folder)
    for row, task, row_id in zip(ROWS, TASKS, IDS, strict=True):
        ids = torch.tensor(row["input_ids"])
        n = len(ids)
        attention = {"layer1": attention_signal(ids, ids, [0, 2] if task == 0 else [3], [0, n - 1, n // 2], kind)}
        if task == 1:
            attention["layer0"] = attention_signal(ids, ids, [1, 2, 3], [1, 2], kind)
        store.write(row_id, RowSignals({"input": n}, logit_signal(ids, [n - 4, n - 3, n - 2], top_k), attention))
    return store


def inner(side="right", multiple=None, model=None):
    tokenizer = toy_tokenizer()
    tokenizer.padding_side = side
    return DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=multiple)


def stored(*numbers):
    return [{**ROWS[number], "replay_row": number} for number in numbers]


def new(seed=50, length=11):
    return row_of(seed, length)


def check_logits(target, ids):
    """Each position holds the token that its logits name."""
    at = ids[target.batch, target.position].float()
    assert torch.equal(target.lse, at)
    if target.indices is None:
        assert torch.equal(target.values, at[:, None] + torch.arange(5) / 8)
    else:
        assert torch.equal(target.values, at[:, None] + target.indices / 8)


def check_layer(target, kind, query_ids, key_ids, size):
    """Heads, rows and keys are in their places and everything else is zero. Padding has the id 0."""
    batch = torch.arange(size) if target.batch is None else target.batch
    h, at = target.heads, query_ids[batch[:, None], target.rows].float()
    valid = target.head_mask[:, :, None, None] & target.row_mask[:, None, :, None]
    keys = key_ids[batch].float()
    if kind == "weights":
        expected = keys[:, None, None, :] / 100 + h[:, :, None, None]
        valid = valid & (keys != 0)[:, None, None, :]
        assert target.values.shape[-1] == key_ids.shape[1]
    else:
        expected = at[:, None, :, None] / 100 + h[:, :, None, None]
    found = target.query if kind == "qk" else target.values
    assert torch.equal(found, torch.where(valid, expected, 0).expand(found.shape).half())
    if kind == "qk":
        expected = keys[:, None, :, None] / 100 + h[:, :, None, None]
        valid = target.head_mask[:, :, None, None] & (keys != 0)[:, None, :, None]
        assert torch.equal(target.key, torch.where(valid, expected, 0).expand(target.key.shape).half())
        assert target.values is None
    assert not at[target.row_mask].eq(0).any()


@pytest.mark.parametrize("kind", ["weights", "outputs", "qk"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("top_k", [None, 2])
def test_signals_stand_at_their_tokens_under_any_padding(tmp_path, kind, padding, top_k):
    store = decoder_only_store(tmp_path, top_k, kind)
    batch = DistillationCollator(inner(*padding), store, IDS, TASKS)([new(), *stored(2, 0), new(51, 6), *stored(1)])
    teacher, ids = batch["teacher"], batch["input_ids"]
    assert "replay_row" not in batch
    assert (teacher.rows, teacher.size, teacher.tasks, teacher.all_stored) == ([1, 2, 4], 5, [1, 0, 0], False)
    check_logits(teacher.logits, ids)
    assert teacher.logits.batch.tolist() == [1, 1, 1, 2, 2, 2, 4, 4, 4]
    assert (teacher.logits.indices is None) == (top_k is None)

    layer1, layer0 = teacher.attention["layer1"], teacher.attention["layer0"]
    assert layer1.batch.tolist() == [1, 2, 4] and layer0.batch.tolist() == [1]
    assert layer1.head_mask.tolist() == [[True, False], [True, True], [True, True]]
    assert layer1.heads[layer1.head_mask].tolist() == [3, 0, 2, 0, 2]
    assert layer0.heads.tolist() == [[1, 2, 3]] and layer0.row_mask.tolist() == [[True, True]]
    for target in (layer1, layer0):
        check_layer(target, kind, ids, ids, 5)


def test_padding_moves_targets_and_changes_nothing_else(tmp_path):
    store = decoder_only_store(tmp_path)
    found = []
    for padding in PADDINGS:
        batch = DistillationCollator(inner(*padding), store, IDS, TASKS)(stored(0, 1, 2))
        starts = batch["attention_mask"].argmax(1)
        logits, layer = batch["teacher"].logits, batch["teacher"].attention["layer1"]
        assert layer.batch is None
        real = batch["attention_mask"].bool()
        found.append(
            [
                logits.values,
                logits.position - starts[logits.batch],
                layer.rows - starts[:, None],
                torch.cat([layer.values[i][..., real[i]].flatten() for i in range(3)]),
            ]
        )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_different_numbers_of_query_rows_are_padded(tmp_path):
    store = SignalStore(tmp_path)
    for number, rows in enumerate(([0], [1, 2, 3])):
        ids = torch.tensor(ROWS[number]["input_ids"])
        store.write(IDS[number], RowSignals({"input": len(ids)}, None, {"a": attention_signal(ids, ids, [1], rows)}))
    batch = DistillationCollator(inner("left"), store, IDS, TASKS)(stored(0, 1))
    target = batch["teacher"].attention["a"]
    assert target.row_mask.tolist() == [[True, False, False], [True, True, True]]
    assert target.rows[target.row_mask].tolist() == [0, 5, 6, 7]
    assert batch["teacher"].logits is None and batch["teacher"].all_stored
    check_layer(target, "weights", batch["input_ids"], batch["input_ids"], 2)


@pytest.mark.parametrize("absent", [{}, {"replay_row": -1}, {"replay_row": None}])
def test_a_batch_of_new_rows_is_left_as_it_is(tmp_path, absent):
    collator = inner()
    batch = DistillationCollator(collator, decoder_only_store(tmp_path), IDS, TASKS)([{**new(), **absent}, new(1, 4)])
    plain = collator([new(), new(1, 4)])
    assert batch.keys() == plain.keys() and all(torch.equal(batch[name], plain[name]) for name in plain)


def test_features_stay_as_they_were(tmp_path):
    features = stored(0, 1)
    before = copy.deepcopy(features)
    DistillationCollator(inner(), decoder_only_store(tmp_path), IDS, TASKS)(features)
    assert features == before


def test_only_the_signals_in_use_are_given(tmp_path):
    store = decoder_only_store(tmp_path)
    logits = DistillationCollator(inner(), store, IDS, TASKS, use=("logits",))(stored(0))["teacher"]
    assert logits.logits is not None and logits.attention == {}
    attention = DistillationCollator(inner(), store, IDS, TASKS, column="from", use=("attention",))
    teacher = attention([{**ROWS[2], "from": 2}])["teacher"]
    assert teacher.logits is None and set(teacher.attention) == {"layer0", "layer1"}


def test_without_signals_it_says_which_rows_are_stored():
    teacher = DistillationCollator(inner(), None, IDS, TASKS)([new(), *stored(2)])["teacher"]
    assert teacher == TeacherBatch([1], 2, [1], None, {})


def test_a_plan_without_values_gives_targets_without_values():
    class Planned:
        def read(self, row_id):
            plan = AttentionSignal("weights", ("input", "input"), torch.tensor([1, 2]), torch.tensor([0, 3]))
            return RowSignals({"input": 9}, LogitSignal(torch.tensor([5, 6])), {"a": plan})

    batch = DistillationCollator(inner("left"), Planned(), IDS, TASKS)([new(), *stored(0)])
    logits, target = batch["teacher"].logits, batch["teacher"].attention["a"]
    assert logits.position.tolist() == [7, 8] and logits.values is None and logits.lse is None
    assert target.rows.tolist() == [[2, 5]] and target.values is None and target.query is None
    assert batch["teacher"].to("meta").logits.position.device.type == "meta"


@pytest.mark.parametrize("side", ["right", "left"])
def test_without_an_attention_mask_rows_are_found_by_their_tokens(tmp_path, side):
    def collate(features):
        width = max(len(f["input_ids"]) for f in features)
        rows = [f["input_ids"] for f in features]
        pads = [[0] * (width - len(row)) for row in rows]
        ids = [p + r if side == "left" else r + p for p, r in zip(pads, rows, strict=True)]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}

    batch = DistillationCollator(collate, decoder_only_store(tmp_path), IDS, TASKS)([new(), *stored(0, 1, 2)])
    check_logits(batch["teacher"].logits, batch["input_ids"])
    check_layer(batch["teacher"].attention["layer1"], "weights", batch["input_ids"], batch["input_ids"], 4)


# -- other models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("with_model", [True, False])
def test_sequence_to_sequence_has_two_sides(tmp_path, padding, with_model):
    sources, answers = [tokens(1, 9), tokens(2, 4), tokens(3, 6)], [tokens(4, 3), tokens(5, 7), tokens(6, 5)]
    pairs = {
        "encoder": ("input", "input"),
        "decoder": ("decoder", "decoder"),
        "cross": ("decoder", "input"),
    }
    store, ids = SignalStore(tmp_path), ["a", "b"]
    for row_id, source, answer in zip(ids, sources, answers, strict=False):
        sides = {"input": source, "decoder": answer}
        attention = {
            name: attention_signal(sides[q], sides[k], [1, 2], [0, 2], sides=(q, k)) for name, (q, k) in pairs.items()
        }
        lengths = {side: len(value) for side, value in sides.items()}
        store.write(row_id, RowSignals(lengths, logit_signal(answer, list(range(len(answer)))), attention))
    features = [
        {
            "input_ids": s.tolist(),
            "attention_mask": [1] * len(s),
            "labels": a.tolist(),
            "replay_row": i if i < 2 else -1,
        }
        for i, (s, a) in enumerate(zip(sources, answers, strict=True))
    ]
    model = tiny_model("t5") if with_model else None
    batch = DistillationCollator(inner(*padding, model=model), store, ids, [0, 1])(features[::-1])
    by_side = {"input": batch["input_ids"], "decoder": batch["labels"].clamp(min=0)}
    teacher = batch["teacher"]
    assert teacher.rows == [1, 2] and teacher.tasks == [1, 0]
    check_logits(teacher.logits, by_side["decoder"])
    assert len(teacher.logits.position) == 10
    for name, (query, key) in pairs.items():
        check_layer(teacher.attention[name], "weights", by_side[query], by_side[key], 3)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("label", [2, [0.0, 1.0, 0.0]])
def test_a_classifier_has_one_row_of_logits(tmp_path, side, label):
    store, row = SignalStore(tmp_path), ROWS[1]
    ids = torch.tensor(row["input_ids"])
    logits = LogitSignal.from_logits(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0]))
    store.write("a", RowSignals({"input": len(ids)}, logits, {"layer": attention_signal(ids, ids, [1], [0, 4])}))
    tokenizer = toy_tokenizer()
    tokenizer.padding_side = side
    features = [
        {"input_ids": new()["input_ids"], "label": label},
        {"input_ids": row["input_ids"], "label": label, "replay_row": 0},
    ]
    batch = DistillationCollator(DataCollatorWithPadding(tokenizer), store, ["a"], [0])(features)
    teacher = batch["teacher"]
    assert teacher.logits.batch.tolist() == [1] and teacher.logits.position.tolist() == [0]
    assert teacher.logits.values.tolist() == [[1.0, 2.0, 3.0]]
    check_layer(teacher.attention["layer"], "weights", batch["input_ids"], batch["input_ids"], 2)


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_a_row_of_another_length_is_refused(tmp_path):
    collator = DistillationCollator(inner(), decoder_only_store(tmp_path), IDS, TASKS)
    with pytest.raises(InputError, match="row 1 of the buffer has 9 input tokens in the batch .* made of 5"):
        collator([{**ROWS[0], "replay_row": 1}])


def test_a_row_that_the_collator_cuts_off_is_refused(tmp_path):
    def cutting(features):
        return inner()([{name: value[:6] for name, value in f.items()} for f in features])

    collator = DistillationCollator(cutting, decoder_only_store(tmp_path), IDS, TASKS)
    assert len(collator(stored(1))["teacher"].logits.values) == 3
    with pytest.raises(InputError, match="row 0 of the buffer has 6 input tokens"):
        collator(stored(1, 0))


def test_an_answer_of_another_length_is_refused(tmp_path):
    store, ids = SignalStore(tmp_path), tokens(0, 5)
    store.write("a", RowSignals({"input": 5, "decoder": 4}, logit_signal(ids, [0])))
    row = {"input_ids": ids.tolist(), "attention_mask": [1] * 5, "labels": [5, 6, 7], "replay_row": 0}
    with pytest.raises(InputError, match="row 0 of the buffer has 3 decoder tokens"):
        DistillationCollator(inner(), store, ["a"], [0])([row])


def test_signals_of_different_kinds_are_refused(tmp_path):
    store = SignalStore(tmp_path)
    for number, (top_k, kind) in enumerate(((2, "weights"), (3, "weights"), (2, "outputs"))):
        ids = torch.tensor(ROWS[number]["input_ids"])
        attention = {"a": attention_signal(ids, ids, [0], [1], kind)}
        store.write(IDS[number], RowSignals({"input": len(ids)}, logit_signal(ids, [1], top_k), attention))
    collator = DistillationCollator(inner(), store, IDS, TASKS)
    with pytest.raises(InputError, match="different numbers of logits"):
        collator(stored(0, 1))
    with pytest.raises(InputError, match=r"signals of a are of different kinds \(outputs, weights\)"):
        collator(stored(0, 2))


# -- on the way to the model -------------------------------------------------------------------------------------------


def tensors_of(teacher):
    parts = [teacher.logits, *teacher.attention.values()]
    return [value for part in parts if part is not None for value in vars(part).values() if torch.is_tensor(value)]


@pytest.mark.parametrize("move", ["dict", "BatchEncoding", "accelerate of BatchEncoding", "itself"])
def test_a_batch_takes_its_teacher_to_the_device(tmp_path, move):
    batch = DistillationCollator(inner(), decoder_only_store(tmp_path), IDS, TASKS)([new(), *stored(2)])
    assert isinstance(batch, BatchEncoding)
    before = batch["teacher"]
    if move == "dict":
        moved = send_to_device(dict(batch), torch.device("meta"), non_blocking=True)["teacher"]
    elif move == "BatchEncoding":
        moved = batch.to("meta")["teacher"]
    elif move == "accelerate of BatchEncoding":
        moved = send_to_device(batch, torch.device("meta"), non_blocking=True)["teacher"]
    else:
        moved = before.to("meta")
    assert isinstance(moved.logits, LogitTarget) and isinstance(moved.attention["layer1"], LayerTarget)
    assert len(tensors_of(moved)) == len(tensors_of(before)) == 4 + 2 * 6
    assert all(tensor.device.type == "meta" for tensor in tensors_of(moved))
    assert all(tensor.device.type == "cpu" for tensor in tensors_of(before))
    assert (moved.rows, moved.size, moved.tasks) == ([1], 2, [1])


def assert_equal(a, b):
    assert (a.rows, a.size, a.tasks, a.attention.keys()) == (b.rows, b.size, b.tasks, b.attention.keys())
    assert all(torch.equal(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_worker_processes_give_the_same_teacher(tmp_path, start, workers):
    collator = DistillationCollator(inner("left"), decoder_only_store(tmp_path), IDS, TASKS)
    rows = [new(), *stored(2, 0), new(51, 6), *stored(1, 2)]
    loader = DataLoader(rows, batch_size=2, collate_fn=collator, num_workers=workers, multiprocessing_context=start)
    for batch, features in zip(loader, (rows[0:2], rows[2:4], rows[4:6]), strict=True):
        expected = collator(features)
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert_equal(batch["teacher"], expected["teacher"])


def test_the_trainer_of_transformers_passes_it_on(tmp_path):
    collator = DistillationCollator(make_collator(toy_tokenizer()), decoder_only_store(tmp_path / "s"), IDS, TASKS)
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
    )
    rows = [*stored(0), new(), *stored(1, 2)]
    trainer = Trainer(tiny_model("llama"), args, train_dataset=rows, data_collator=collator)
    seen = 0
    for batch in trainer.get_train_dataloader():
        prepared = trainer._prepare_inputs(batch)
        assert isinstance(prepared["teacher"], TeacherBatch)
        check_logits(prepared["teacher"].logits, prepared["input_ids"])
        seen += len(prepared["teacher"].rows)
    assert seen == 3
