import errno
import json
import multiprocessing
import os
import pickle
import shutil

import pytest
import torch
from torch.utils.data import DataLoader

from hf_continual import signals as module
from hf_continual.errors import InputError
from hf_continual.signals import AttentionSignal, LogitSignal, RowSignals, SignalStore, teacher_hash

KEY = {"tokenizer": "t", "model": "m", "kind": "weights", "teacher:000": "abc"}


def made(seed=0, length=7, vocabulary=11, top_k=None, kind="weights"):
    """Signals of a row with answers at the last three positions and two attention modules."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(length - 3, length, dtype=torch.int32)
    logits = LogitSignal.from_logits(torch.randn(3, vocabulary, generator=generator), positions, top_k)
    attention = {}
    for number, name in enumerate(("model.layers.1.self_attn", "model.layers.0.self_attn")):
        heads, rows = torch.tensor([1, 3], dtype=torch.int16), torch.tensor([0, 2, length - 1], dtype=torch.int32)
        signal = AttentionSignal(kind, ("input", "input"), heads[: 2 - number], rows)
        n = len(signal.heads)
        if kind == "qk":
            signal.query = torch.randn(n, 3, 4, generator=generator).bfloat16()
            signal.key = torch.randn(n, length, 4, generator=generator).bfloat16()
        else:
            signal.values = torch.rand(n, 3, length if kind == "weights" else 4, generator=generator).half()
        attention[name] = signal
    return RowSignals({"input": length}, logits, attention)


def flat(signals):
    """Everything in it, by name."""
    found = {"lengths": signals.lengths, "modules": sorted(signals.attention)}
    parts = {f"attention/{name}": vars(part) for name, part in signals.attention.items()}
    if signals.logits is not None:
        parts["logits"] = vars(signals.logits)
    return found | {f"{name}/{field}": value for name, part in parts.items() for field, value in part.items()}


def assert_same(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        if torch.is_tensor(value):
            assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name
        else:
            assert value == b[name], name


def store_of(folder, rows=3, key=KEY):
    store = SignalStore(folder, key)
    for row in range(rows):
        store.write(f"000-{row}", made(row, length=6 + row))
    return store


def spoil(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.unlink()  # a new file: a hard link to it elsewhere stays as it was
    path.write_bytes(content)


def truncate(path):
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("kind", ["weights", "outputs", "qk"])
@pytest.mark.parametrize("top_k", [None, 4])
def test_a_row_is_read_as_it_was_written(tmp_path, kind, top_k):
    store, signals = SignalStore(tmp_path), made(kind=kind, top_k=top_k)
    store.write("a", signals)
    assert_same(store.read("a"), signals)
    assert store.ids == ["a"] and store.bytes() == (tmp_path / "a.safetensors").stat().st_size


def test_a_row_may_have_no_logits_or_no_attention_or_nothing(tmp_path):
    store, whole = SignalStore(tmp_path), made()
    for row_id, signals in {
        "a": RowSignals({"input": 7}, None, whole.attention),
        "b": RowSignals({"input": 7, "decoder": 7}, whole.logits),
        "c": RowSignals({"input": 7}),
        "d": RowSignals({"input": 7}, LogitSignal.from_logits(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int32))),
    }.items():
        store.write(row_id, signals)
        assert_same(store.read(row_id), signals)


def test_logits_keep_the_largest_and_the_sum_over_all():
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0]], dtype=torch.bfloat16)
    full = LogitSignal.from_logits(logits, torch.tensor([5]))
    assert full.indices is None and full.values.dtype == torch.float32 and full.positions.dtype == torch.int32
    top = LogitSignal.from_logits(logits, torch.tensor([5]), top_k=2, dtype=torch.float16)
    assert top.values.tolist() == [[4.0, 3.0]] and top.indices.tolist() == [[1, 3]]
    assert top.values.dtype == torch.float16 and top.lse.dtype == torch.float32
    assert torch.equal(top.lse, full.lse) and torch.allclose(top.lse, logits.float().logsumexp(-1))
    assert LogitSignal.from_logits(logits, torch.tensor([5]), top_k=9).indices is None


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.attention["model.layers.0.self_attn"].values.resize_(1, 3, 6),
        lambda s: s.attention["model.layers.1.self_attn"].rows.add_(1),
        lambda s: s.logits.positions.add_(1),
        lambda s: setattr(s.logits, "lse", s.logits.lse[1:]),
        lambda s: setattr(s.logits, "values", None),
        lambda s: setattr(s.attention["model.layers.0.self_attn"], "values", None),
    ],
)
def test_signals_that_fit_no_batch_are_not_written(tmp_path, change):
    store, signals = SignalStore(tmp_path), made()
    change(signals)
    with pytest.raises(ValueError, match="row 'a'"):
        store.write("a", signals)
    assert list(tmp_path.iterdir()) == []


def test_parts_of_larger_tensors_take_only_their_own_space(tmp_path):
    signals, large = made(), torch.rand(2, 3, 7000).half()
    signals.attention["model.layers.1.self_attn"].values = large[..., 70:77]
    store = SignalStore(tmp_path)
    store.write("a", signals)
    assert store.bytes() < 4000
    assert_same(store.read("a"), signals)


def test_modules_may_share_their_tensors(tmp_path):
    store, signals = SignalStore(tmp_path), made()
    first, second = signals.attention.values()
    second.rows, second.values = first.rows, first.values[:1]
    store.write("a", signals)
    assert_same(store.read("a"), signals)


def test_a_row_is_written_once(tmp_path):
    store = store_of(tmp_path)
    before = (tmp_path / "000-0.safetensors").stat().st_mtime_ns
    store.write("000-0", made(seed=99))
    assert (tmp_path / "000-0.safetensors").stat().st_mtime_ns == before
    assert store.has("000-0") and not store.has("000-9")


def test_two_runs_write_the_same_bytes(tmp_path):
    for name, order in (("a", 1), ("b", -1)):
        store = SignalStore(tmp_path / name, dict(list(KEY.items())[::order]))
        for row in range(3)[::order]:
            signals = made(row)
            signals.attention = dict(list(signals.attention.items())[::order])
            store.write(f"000-{row}", signals)
        store.save(tmp_path / f"{name}-saved")
    for path in (tmp_path / "a-saved").iterdir():
        assert path.read_bytes() == (tmp_path / "b-saved" / path.name).read_bytes()


def test_a_store_is_saved_and_loaded(tmp_path):
    store = store_of(tmp_path / "work")
    store.save(tmp_path / "saved")
    shutil.rmtree(tmp_path / "work")
    loaded = SignalStore()
    loaded.load(tmp_path / "saved")
    assert loaded.key == KEY and loaded.ids == store.ids and loaded.bytes() == store.bytes()
    for row in range(3):
        assert_same(loaded.read(f"000-{row}"), made(row, length=6 + row))
    with pytest.raises(RuntimeError, match="work_in"):
        loaded.write("001-0", made())


def test_an_empty_store_is_saved_and_loaded(tmp_path):
    SignalStore().save(tmp_path)
    store = SignalStore()
    store.load(tmp_path)
    assert store.ids == [] and store.bytes() == 0


def test_copies_are_hard_links(tmp_path):
    store = store_of(tmp_path / "work")
    for step in (1, 2):
        store.save(tmp_path / f"checkpoint-{step}")
    store.save(tmp_path / "checkpoint-2")  # a second time: nothing happens
    for row in store.ids:
        assert (tmp_path / "work" / f"{row}.safetensors").stat().st_nlink == 3
    files = [p for p in tmp_path.rglob("*.safetensors")]
    assert len(files) == 9
    assert sum({p.stat().st_ino: p.stat().st_blocks for p in files}.values()) * 512 <= 3 * 8192
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_another_file_system_gets_a_copy(tmp_path, monkeypatch, number):
    store = store_of(tmp_path / "work")

    def refuse(source, target):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    store.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "000-0.safetensors").stat().st_nlink == 1
    loaded = SignalStore()
    loaded.load(tmp_path / "saved")
    assert_same(loaded.read("000-2"), made(2, length=8))


def test_a_full_disk_is_not_hidden_and_leaves_nothing(tmp_path, monkeypatch):
    store = store_of(tmp_path, rows=1)

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write("000-1", made())
    assert [p.name for p in tmp_path.iterdir()] == ["000-0.safetensors"] and not store.has("000-1")


@pytest.mark.parametrize("harm", [lambda p: p.unlink(), truncate, spoil, lambda p: spoil(p, 20)])
def test_a_harmed_row_is_refused_by_name(tmp_path, harm):
    store_of(tmp_path / "work").save(tmp_path / "saved")
    harm(tmp_path / "saved" / "000-1.safetensors")
    with pytest.raises(InputError, match=r"000-1\.safetensors is (missing|truncated or was edited); restore it"):
        SignalStore().load(tmp_path / "saved")


@pytest.mark.parametrize("content", [None, "", "[]", '{"schema": 1}', '{"schema": 1, "key": {}, "rows": {"a": 3}}'])
def test_a_harmed_index_is_refused_by_name(tmp_path, content):
    store_of(tmp_path)
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(InputError, match=r"index\.json is (missing|truncated or was edited); restore it"):
        SignalStore().load(tmp_path)


def test_an_index_of_another_version_is_refused(tmp_path):
    (tmp_path / "index.json").write_text('{"schema": 2, "key": {}, "rows": {}}')
    with pytest.raises(InputError, match="schema version 2"):
        SignalStore().load(tmp_path)


def test_a_failed_load_changes_nothing(tmp_path):
    store = store_of(tmp_path / "work")
    store.save(tmp_path / "saved")
    truncate(tmp_path / "saved" / "000-2.safetensors")
    store.drop(["000-0"])
    with pytest.raises(InputError):
        store.load(tmp_path / "saved")
    assert store.ids == ["000-1", "000-2"]
    assert_same(store.read("000-2"), made(2, length=8))


def test_a_row_that_is_harmed_after_loading_does_not_touch_others(tmp_path):
    store_of(tmp_path / "work").save(tmp_path / "saved")
    store = SignalStore()
    store.load(tmp_path / "saved")
    truncate(tmp_path / "saved" / "000-1.safetensors")
    (tmp_path / "saved" / "000-2.safetensors").unlink()
    assert_same(store.read("000-0"), made(0, length=6))
    with pytest.raises(InputError, match=r"000-1\.safetensors is truncated"):
        store.read("000-1")
    with pytest.raises(InputError, match=r"000-2\.safetensors is missing"):
        store.read("000-2")
    with pytest.raises(KeyError):
        store.read("000-3")


def test_what_was_read_outlives_its_file(tmp_path):
    store = store_of(tmp_path / "work")
    signals = store.read("000-0")
    shutil.rmtree(tmp_path / "work")
    assert_same(signals, made(0, length=6))


def test_another_key_is_refused(tmp_path):
    store = store_of(tmp_path / "work")
    store.save(tmp_path / "saved")
    with pytest.raises(InputError, match="tokenizer='t' and now it is 'other'"):
        SignalStore(key={"tokenizer": "other"}).load(tmp_path / "saved")
    SignalStore(key={"tokenizer": "t", "teacher:001": "new"}).load(tmp_path / "saved")
    store.check({"tokenizer": "t", "teacher:000": "abc"})
    for key in ({"teacher:000": "abd"}, {"teacher:001": "abc"}):
        with pytest.raises(InputError, match="start again in another run directory"):
            store.check(key)


# -- processes that die ------------------------------------------------------------------------------------------------


def test_a_killed_process_keeps_its_whole_rows(tmp_path):
    store_of(tmp_path)
    truncate(tmp_path / "000-1.safetensors")
    (tmp_path / ".000-3.safetensors.tmp").write_bytes(b"half of a row")
    (tmp_path / "other.safetensors").write_bytes(b"")
    again = SignalStore(tmp_path, KEY)
    assert again.ids == ["000-0", "000-2"]
    again.write("000-1", made(1, length=7))
    again.write("000-3", made(3, length=9))
    assert_same(again.read("000-1"), made(1, length=7))
    again.save(tmp_path / "saved")
    loaded = SignalStore()
    loaded.load(tmp_path / "saved")
    assert loaded.ids == [f"000-{row}" for row in range(4)]


@pytest.mark.parametrize("place", [-1, 60, 200, 900])
def test_a_flipped_bit_in_a_row_without_index_is_seen(tmp_path, place):
    store_of(tmp_path, rows=1)
    spoil(tmp_path / "000-0.safetensors", place)
    assert SignalStore(tmp_path, KEY).ids == []


def test_a_row_under_another_name_does_not_count(tmp_path):
    store_of(tmp_path, rows=1)
    os.rename(tmp_path / "000-0.safetensors", tmp_path / "000-7.safetensors")
    assert SignalStore(tmp_path, KEY).ids == []


def test_rows_of_another_teacher_are_written_again(tmp_path):
    store_of(tmp_path)
    other = SignalStore(tmp_path, {**KEY, "teacher:000": "retrained"})
    assert other.ids == []
    other.write("000-0", made(seed=5))
    assert_same(other.read("000-0"), made(seed=5))
    assert SignalStore(tmp_path, KEY).ids == ["000-1", "000-2"]


def test_a_later_task_takes_up_its_rows_once_its_teacher_is_known(tmp_path):
    store_of(tmp_path / "first").save(tmp_path / "saved")
    killed = SignalStore()
    killed.load(tmp_path / "saved")
    killed.work_in(tmp_path / "work")
    killed.key["teacher:001"] = "def"
    killed.write("001-0", made(10))

    again = SignalStore()
    again.load(tmp_path / "saved")
    again.work_in(tmp_path / "work")
    assert not again.has("001-0") and again.ids == ["000-0", "000-1", "000-2"]
    again.key["teacher:001"] = "def"
    assert again.has("001-0") and len(again.ids) == 4
    assert_same(again.read("001-0"), made(10))


def _write_until_killed(folder, started):
    store = SignalStore(folder, KEY)
    for row in range(10_000):
        store.write(f"000-{row}", made(row))
        if row == 3:
            started.set()


def test_a_process_killed_while_it_writes_leaves_only_whole_rows(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_write_until_killed, args=(tmp_path, started))
    process.start()
    assert started.wait(60)
    process.kill()
    process.join()
    names = [p.name.removesuffix(".safetensors") for p in tmp_path.glob("*.safetensors")]
    store = SignalStore(tmp_path, KEY)
    assert len(names) >= 4 and store.ids == sorted(names)
    for name in names:
        assert_same(store.read(name), made(int(name[4:])))


# -- folders that come and go ------------------------------------------------------------------------------------------


def test_a_working_folder_outlives_the_checkpoint(tmp_path):
    store_of(tmp_path / "old").save(tmp_path / "checkpoint-2")
    store = SignalStore()
    store.load(tmp_path / "checkpoint-2")
    store.work_in(tmp_path / "work")
    store.load(tmp_path / "checkpoint-2")  # as the Trainer does once more when it resumes
    shutil.rmtree(tmp_path / "checkpoint-2")
    shutil.rmtree(tmp_path / "old")
    store.write("001-0", made(10))
    assert len(store.ids) == 4
    assert_same(store.read("000-1"), made(1, length=7))
    assert store.folder == tmp_path / "work"


def test_loading_replaces_what_the_working_folder_has_under_the_same_name(tmp_path):
    store_of(tmp_path / "a").save(tmp_path / "saved")
    other = SignalStore(tmp_path / "work", KEY)
    other.write("000-0", made(seed=42))
    other.load(tmp_path / "saved")
    assert_same(other.read("000-0"), made(0, length=6))
    assert other._files["000-0"].path == tmp_path / "work" / "000-0.safetensors"


def test_a_working_folder_that_is_gone_is_not_made_again(tmp_path):
    store = store_of(tmp_path / "work")
    store.save(tmp_path / "saved")
    shutil.rmtree(tmp_path / "work")
    store.load(tmp_path / "saved")
    assert not (tmp_path / "work").exists() and store.folder is None
    assert_same(store.read("000-0"), made(0, length=6))


def test_files_known_by_their_inode_are_not_hashed_again(tmp_path, monkeypatch):
    store = store_of(tmp_path / "work")
    store.save(tmp_path / "saved")
    looked = []
    look = module._look
    monkeypatch.setattr(module, "_look", lambda path: looked.append(path.name) or look(path))
    store.load(tmp_path / "saved")
    assert looked == []
    spoil(tmp_path / "saved" / "000-1.safetensors")
    with pytest.raises(InputError):
        store.load(tmp_path / "saved")
    assert looked == ["000-1.safetensors"]


def test_rows_are_dropped_from_the_working_folder_alone(tmp_path):
    store = store_of(tmp_path / "work")
    store.save(tmp_path / "saved")
    store.drop(["000-1", "never-there"])
    assert store.ids == ["000-0", "000-2"] and not store.has("000-1")
    assert not (tmp_path / "work" / "000-1.safetensors").exists()
    assert (tmp_path / "saved" / "000-1.safetensors").exists()
    loaded = SignalStore()
    loaded.load(tmp_path / "saved")
    loaded.drop(["000-1"])
    assert loaded.ids == ["000-0", "000-2"] and (tmp_path / "saved" / "000-1.safetensors").exists()


def test_row_ids_must_be_file_names(tmp_path):
    for row_id in ("", "../a", "a/b", ".a"):
        with pytest.raises(ValueError, match="use letters"):
            SignalStore(tmp_path).write(row_id, made())


def _sum(signals):
    return signals.lengths["input"], float(signals.logits.values.sum())


class Rows(torch.utils.data.Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(self.store.ids)

    def __getitem__(self, index):
        return _sum(self.store.read(self.store.ids[index]))


def test_a_store_goes_to_worker_processes(tmp_path):
    store = store_of(tmp_path, rows=4)
    copied = pickle.loads(pickle.dumps(store))
    expected = [_sum(made(row, length=6 + row)) for row in range(4)]
    assert [_sum(copied.read(row)) for row in store.ids] == expected
    store.read("000-0")  # nothing stays open that a fork would share
    loader = DataLoader(Rows(store), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [tuple(row) for row in loader] == expected


# -- hashes and sizes --------------------------------------------------------------------------------------------------


def test_a_teacher_is_its_names_types_shapes_and_bytes():
    tensors = {"a": torch.tensor([1.0, 2.0]).bfloat16(), "b": torch.tensor(3)}
    value = teacher_hash(tensors)
    assert value == teacher_hash(dict(reversed(tensors.items()))) and len(value) == 64
    others = [
        {**tensors, "a": torch.tensor([1.0, 2.015625]).bfloat16()},
        {**tensors, "a": torch.tensor([1.0, 2.0])},
        {**tensors, "a": torch.tensor([[1.0, 2.0]]).bfloat16()},
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"]},
    ]
    assert len({value, *map(teacher_hash, others)}) == 6
    matrix = torch.arange(6.0).view(2, 3)
    assert teacher_hash({"a": matrix.T}) == teacher_hash({"a": matrix.T.contiguous()})
    assert teacher_hash({"a": torch.zeros(0)}) != teacher_hash({})


def test_a_row_of_a_7b_model_takes_what_it_must(tmp_path):
    heads, rows, keys = 128, 100, 1536
    positions = torch.arange(keys - rows, keys, dtype=torch.int32)
    attention = {
        f"model.layers.{layer}.self_attn": AttentionSignal(
            "weights",
            ("input", "input"),
            torch.arange(8, dtype=torch.int16),
            positions,
            torch.full((8, rows, keys), 0.5, dtype=torch.float16),
        )
        for layer in range(heads // 8)
    }
    logits = LogitSignal.from_logits(torch.zeros(rows, 320), positions, top_k=64)
    store = SignalStore(tmp_path)
    store.write("a", RowSignals({"input": keys}, logits, attention))
    assert heads * rows * keys * 2 <= store.bytes() <= 40 * 2**20
    assert (tmp_path / "a.safetensors").stat().st_size == store.bytes()
    assert json.dumps(store.read("a").lengths) == '{"input": 1536}'


def test_a_file_that_changed_after_it_was_loaded_is_refused(tmp_path):
    """By its stamp, which costs a look at the file; the same content with another time is fine."""
    store = SignalStore(tmp_path)
    signal = RowSignals({"input": 3}, LogitSignal.from_logits(torch.randn(2, 5), torch.tensor([0, 1])))
    store.write("000-0000001", signal)
    path = tmp_path / "000-0000001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content)
    assert torch.equal(store.read("000-0000001").logits.values, signal.logits.values)
    path.write_bytes(content[:-4] + b"\x00\x00\xc0\x7f")
    with pytest.raises(InputError, match="000-0000001.safetensors is truncated or was edited"):
        store.read("000-0000001")
