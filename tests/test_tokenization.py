from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from hf_continual.collators import make_collator
from hf_continual.data import load_task
from hf_continual.errors import InputError
from hf_continual.testing import toy_tokenizer
from hf_continual.tokenization import (
    Packing,
    default_block_size,
    encode_completion,
    encode_prompt,
    ensure_pad_token,
    tokenize_dataset,
    tokenize_texts,
)

DATA = Path(os.environ.get("HF_CONTINUAL_DATA", "../shared/data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark data is not here (HF_CONTINUAL_DATA)")
TEXTS = [
    "What is the topic? Option: World, Sports.",
    "Text: some words about things\nAnswer: World",
    "good bad Verdict:",
]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make(kind: str = "plain") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer. Kinds: plain, bos (adds one), seq2seq (adds eos), metaspace."""
    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "metaspace":
        # As in Llama 2: a text that begins with a space gets a second one.
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        alphabet = list("▁\n\"'?.,:abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    if kind in ("bos", "seq2seq"):
        template = "<bos> $A" if kind == "bos" else "$A <eos>"
        ids = [(token, tokenizer.token_to_id(token)) for token in specials]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def test_causal_row() -> None:
    tokenizer = make()
    data = Dataset.from_list([{"prompt": "good Verdict:", "completion": "World", "references": ["World"]}])
    row = tokenize_dataset(data, tokenizer, seq2seq=False)[0]
    prompt = encode_prompt("good Verdict:", tokenizer, 512, False)
    assert set(row) == {"input_ids", "attention_mask", "labels"}
    assert row["input_ids"][: len(prompt)] == prompt
    assert tokenizer.decode(row["input_ids"]) == "good Verdict: World<eos>"
    assert row["labels"] == [-100] * len(prompt) + row["input_ids"][len(prompt) :]
    assert row["attention_mask"] == [1] * len(row["input_ids"])


@pytest.mark.parametrize(
    ("prompt", "completion", "joined"),
    [
        ("a:", "b", "a: b"),
        ("a:\n", "b", "a:\nb"),
        ("a: ", "b", "a: b"),
        ("a:", "\nb", "a:\nb"),
        ("a:", " b", "a: b"),
        ("a:", "", "a:"),
    ],
)
def test_separator(prompt: str, completion: str, joined: str) -> None:
    tokenizer = make()
    ids = encode_prompt(prompt, tokenizer, 64, False) + encode_completion(completion, prompt, tokenizer, 64, False)
    assert tokenizer.decode(ids) == joined + "<eos>"


def test_metaspace_tokenizer_gets_no_second_space() -> None:
    tokenizer = make("metaspace")
    tokens = tokenizer.convert_ids_to_tokens(encode_completion("good", "bad", tokenizer, 64, False))
    assert "".join(tokens) == "▁good<eos>"


def test_bos_comes_once() -> None:
    tokenizer = make("bos")
    bos = tokenizer.bos_token_id
    ids = encode_prompt("good", tokenizer, 64, False) + encode_completion("bad", "good", tokenizer, 64, False)
    assert ids[0] == bos and ids.count(bos) == 1
    again = encode_prompt("<bos>good", tokenizer, 64, False)
    assert again.count(bos) == 1
    assert encode_prompt("good " * 100, tokenizer, 20, False).count(bos) == 1


def test_eos_that_a_tokenizer_adds_stays_off_a_causal_prompt() -> None:
    tokenizer = make("seq2seq")
    assert encode_prompt("good", tokenizer, 64, False)[-1] != tokenizer.eos_token_id
    assert encode_prompt("good", tokenizer, 64, True)[-1] == tokenizer.eos_token_id


def test_seq2seq_row() -> None:
    tokenizer = make("seq2seq")
    data = Dataset.from_list([{"prompt": "good Verdict:", "completion": "World"}])
    row = tokenize_dataset(data, tokenizer, seq2seq=True)[0]
    assert row["input_ids"] == tokenizer("good Verdict:")["input_ids"]
    assert row["labels"] == tokenizer("World")["input_ids"]
    assert row["labels"].count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("seq2seq", [False, True])
def test_long_prompt_keeps_head_and_cue(seq2seq: bool) -> None:
    tokenizer = make("seq2seq" if seq2seq else "bos")
    prompt = "What is the topic?\nText: " + "some words about things " * 200 + "\nAnswer:"
    ids = encode_prompt(prompt, tokenizer, 64, seq2seq)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert len(ids) == 64
    assert text.startswith("What is the topic?\nText: some") and text.endswith("\nAnswer:")
    assert (ids[-1] == tokenizer.eos_token_id) == seq2seq
    # Everything cut lies just before the cue: what is left of it is the untouched head.
    assert prompt.startswith(text.removesuffix("\nAnswer:"))


def test_long_prompt_with_a_trailing_line_break_keeps_its_last_line() -> None:
    tokenizer = make()
    ids = encode_prompt("head " + "things " * 300 + "\nthe answer is \n", tokenizer, 80, False)
    assert len(ids) == 80 and tokenizer.decode(ids).endswith("\nthe answer is \n")


def test_long_last_line_keeps_sixteen_tokens() -> None:
    tokenizer = make()
    cue = "\n" + "good bad " * 12 + "Verdict:"
    length = len(encode_prompt(cue, tokenizer, 512, False))
    prompt = "things " * 300 + cue
    full = encode_prompt(prompt, tokenizer, 10_000, False)
    for room, tail in ((4 * length, length), (4 * length - 4, 16)):
        assert encode_prompt(prompt, tokenizer, room, False) == full[: room - tail] + full[-tail:]
    assert length > 16

    prompt = "good " + "some words about things " * 200 + "Verdict:"
    full = encode_prompt(prompt, tokenizer, 10_000, False)
    assert encode_prompt(prompt, tokenizer, 64, False) == full[:48] + full[-16:]
    assert encode_prompt(prompt, tokenizer, 10, False) == full[:5] + full[-5:]
    assert encode_prompt(prompt, tokenizer, len(full), False) == full


def test_slow_tokenizer_keeps_the_cue(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make()
    prompt = "What is the topic?\n" + "things " * 200 + "\nAnswer:"
    expected = encode_prompt(prompt, tokenizer, 64, False)
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    assert encode_prompt(prompt, tokenizer, 64, False) == expected


def test_too_small_lengths_are_refused() -> None:
    with pytest.raises(InputError, match="max_prompt_length: 2 leaves no room"):
        encode_prompt("good bad", make("bos"), 2, False)
    with pytest.raises(InputError, match="max_completion_length: 0 is too short"):
        encode_completion("good", "a", make(), 0, False)


@pytest.mark.parametrize("seq2seq", [False, True])
def test_truncated_completion_has_no_eos(seq2seq: bool) -> None:
    tokenizer = make("seq2seq" if seq2seq else "plain")
    full = encode_completion("some words about things", "a:", tokenizer, 100, seq2seq)
    assert full[-1] == tokenizer.eos_token_id and full.count(tokenizer.eos_token_id) == 1
    cut = encode_completion("some words about things", "a:", tokenizer, len(full) - 1, seq2seq)
    assert cut == full[:-1]


def test_chat_prompt() -> None:
    tokenizer = make("bos")
    messages = [{"role": "user", "content": "good\nVerdict:"}]
    with pytest.raises(InputError, match="has no chat template"):
        encode_prompt(messages, tokenizer, 64, False)
    tokenizer.chat_template = CHAT
    ids = encode_prompt(messages, tokenizer, 64, False) + encode_completion("World", messages, tokenizer, 64, False)
    assert tokenizer.decode(ids) == "<|user|>good\nVerdict:<eos><|assistant|>World<eos>"
    data = Dataset.from_list([{"prompt": messages, "completion": "World"}])
    assert tokenize_dataset(data, tokenizer, seq2seq=False)[0]["input_ids"] == ids


def test_long_chat_prompt_keeps_the_end_of_the_template() -> None:
    tokenizer = make()
    tokenizer.chat_template = CHAT
    end = "<eos><|assistant|>"
    for content, tail in (("words " * 300, end), ("words " * 300 + "\nVerdict:", "\nVerdict:" + end)):
        text = tokenizer.decode(encode_prompt([{"role": "user", "content": content}], tokenizer, 96, False))
        assert text.startswith("<|user|>words words") and text.endswith(tail)
    refusing = "{{ raise_exception('roles must alternate') }}"
    tokenizer.chat_template = refusing
    with pytest.raises(InputError, match="roles must alternate"):
        encode_prompt([{"role": "user", "content": "a"}], tokenizer, 96, False)


def test_training_prompt_is_the_evaluation_prompt() -> None:
    tokenizer = make("bos")
    prompts = ["What is the topic?\nAnswer:", "things " * 100 + "\nAnswer:", "good"]
    data = Dataset.from_dict({"prompt": prompts, "completion": ["World", "Sports", "bad"]})
    for row, prompt in zip(
        tokenize_dataset(data, tokenizer, seq2seq=False, max_prompt_length=40), prompts, strict=True
    ):
        ids = encode_prompt(prompt, tokenizer, 40, False)
        assert row["input_ids"][: len(ids)] == ids and row["labels"][len(ids) - 1] == -100
        assert row["labels"][len(ids)] != -100


def test_errors_of_tokenize_dataset() -> None:
    tokenizer = make()
    with pytest.raises(InputError, match="train_dataset is a list"):
        tokenize_dataset([{"prompt": "a"}], tokenizer, seq2seq=False)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no column 'completion'; did you mean 'completions'"):
        tokenize_dataset(Dataset.from_dict({"prompt": ["a"], "completions": ["b"]}), tokenizer, seq2seq=False)
    with pytest.raises(InputError, match="train_dataset is empty"):
        tokenize_dataset(Dataset.from_dict({"prompt": [], "completion": []}), tokenizer, seq2seq=False)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="has no eos token"):
        tokenize_dataset(Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}), tokenizer, seq2seq=False)


def test_progress_bars_stay_as_they_were() -> None:
    data = Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})
    before = datasets.are_progress_bars_disabled()
    tokenize_dataset(data, make(), seq2seq=False)
    assert datasets.are_progress_bars_disabled() == before


def test_ensure_pad_token() -> None:
    tokenizer = make()
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == "<pad>"
    tokenizer.pad_token = None
    with pytest.raises(InputError, match="has no padding token; set 'pad_token: eos'"):
        ensure_pad_token(tokenizer)
    with pytest.raises(InputError, match="'<nope>' is not in the tokenizer's vocabulary"):
        ensure_pad_token(tokenizer, "<nope>")
    ensure_pad_token(tokenizer, "eos")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    tokenizer.pad_token = None
    ensure_pad_token(tokenizer, "<bos>")
    assert tokenizer.pad_token == "<bos>"
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="'eos' cannot be used"):
        ensure_pad_token(tokenizer, "eos")


def test_causal_collator_pads_right_whatever_the_tokenizer_does() -> None:
    tokenizer = make()
    tokenizer.padding_side = "left"
    collate = make_collator(tokenizer, None, False, pad_to_multiple_of=4)
    assert tokenizer.padding_side == "left"
    batch = collate(
        [
            {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]},
            {"input_ids": [8], "attention_mask": [1], "labels": [8]},
        ]
    )
    pad = tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[5, 6, 7, pad], [8, pad, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [8, -100, -100, -100]]
    assert "decoder_input_ids" not in batch


def test_padding_with_eos_keeps_the_label_of_the_real_eos() -> None:
    tokenizer = make()
    tokenizer.pad_token = tokenizer.eos_token
    data = Dataset.from_dict({"prompt": ["good", "good bad good"], "completion": ["bad", "bad"]})
    tokens = tokenize_dataset(data, tokenizer, seq2seq=False)
    batch = make_collator(tokenizer)([tokens[0], tokens[1]])
    assert [(row == tokenizer.eos_token_id).sum().item() for row in batch["labels"]] == [1, 1]


def test_seq2seq_collator() -> None:
    config = T5Config(
        vocab_size=400, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model = T5ForConditionalGeneration(config)
    batch = make_collator(make("seq2seq"), model, True)(
        [
            {"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [7, 8, 2]},
            {"input_ids": [5], "attention_mask": [1], "labels": [2]},
        ]
    )
    assert batch["labels"].tolist() == [[7, 8, 2], [2, -100, -100]]
    assert batch["decoder_input_ids"].tolist() == [[0, 7, 8], [0, 2, 0]]
    assert torch.isfinite(model(**batch).loss)


@needs_data
def test_real_long_prompts_keep_their_cue() -> None:
    tokenizer = make()
    task = load_task({"path": "long_sequence/{split}/yelp.jsonl", "train_rows": 20}, base_dir=DATA)
    rows = tokenize_dataset(task.train_dataset, tokenizer, seq2seq=False, max_prompt_length=256)
    for row, completion in zip(rows, task.train_dataset["completion"], strict=True):
        text = tokenizer.decode(row["input_ids"])
        assert text.startswith("What is the sentiment") and text.endswith(f"\nAnswer: {completion}<eos>")
        assert len(row["input_ids"]) <= 256 + 50


# -- plain text --------------------------------------------------------------------------------------------------------

EOS = 2


def blocks_of(packing, texts=("w1 w2 w3", "w4", "w5 w6 w7 w8"), tokenizer=None):
    return tokenize_texts(Dataset.from_dict({"text": list(texts)}), tokenizer or toy_tokenizer(), packing, "task 't'")


def with_special_tokens():
    """One that begins texts with 1 and ends them with 2, as RoBERTa's does."""
    tokenizer = toy_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"})
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 1), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def test_packing_by_hand():
    # w1 is token 17. The stream is w1 w2 w3 </s> w4 </s> w5 w6 w7 w8 </s>.
    found = blocks_of(Packing(4))
    assert found.rows["input_ids"][:] == [[17, 18, 19, EOS], [20, EOS, 21, 22]]
    assert found.rows["labels"][:] == found.rows["input_ids"][:]
    assert found.rows["attention_mask"][:] == [[1] * 4] * 2
    assert (found.texts, found.tokens, found.dropped, found.cut) == (3, 8, 3, 0)
    kept = blocks_of(Packing(4, drop_last=False))
    assert kept.rows["input_ids"][2] == [23, 24, EOS] and (kept.tokens, kept.dropped) == (11, 0)
    one_left = blocks_of(Packing(5, drop_last=False))  # a single token predicts nothing
    assert [len(ids) for ids in one_left.rows["input_ids"]] == [5, 5] and one_left.dropped == 1


def test_texts_that_are_not_packed():
    found = blocks_of(Packing(4, pack=False))
    assert found.rows["input_ids"][:] == [[17, 18, 19, EOS], [20, EOS], [21, 22, 23, 24]] and found.cut == 1
    assert found.rows["labels"][1] == [20, EOS]


def test_packing_with_special_tokens_of_the_tokenizer():
    tokenizer = with_special_tokens()
    found = blocks_of(Packing(4), tokenizer=tokenizer)  # each text between its tokens, the end token once
    assert found.rows["input_ids"][:] == [[1, 17, 18, 19], [EOS, 1, 20, EOS], [1, 21, 22, 23]]
    masked = blocks_of(Packing(6, masked=True), tokenizer=tokenizer)  # each row between them
    assert masked.rows["input_ids"][:] == [[1, 17, 18, 19, EOS, EOS], [1, 20, EOS, 21, 22, EOS]]
    assert masked.dropped == 2 and "labels" not in masked.rows.column_names
    kept = blocks_of(Packing(6, masked=True, drop_last=False), tokenizer=tokenizer)
    assert kept.rows["input_ids"][2] == [1, 23, 24, EOS]
    alone = blocks_of(Packing(5, pack=False, masked=True), tokenizer=tokenizer)
    assert alone.rows["input_ids"][:] == [[1, 17, 18, 19, EOS], [1, 20, EOS], [1, 21, 22, 23, EOS]] and alone.cut == 1


def test_many_texts_make_one_stream():
    texts = [f"w{i % 70} w{(i * 7) % 70}" for i in range(2500)]  # more than are tokenised at once
    found = blocks_of(Packing(8), texts)
    stream = [token for ids in found.rows["input_ids"] for token in ids]
    expected = [token for text in texts for token in [*toy_tokenizer()(text)["input_ids"], EOS]]
    assert stream == expected[: len(stream)] and len(stream) == 7496 and found.dropped == 4


def test_default_block_size_is_that_of_run_clm():
    tokenizer = toy_tokenizer()
    assert default_block_size(tokenizer, 128) == 128 and default_block_size(tokenizer, None) == 1024
    assert default_block_size(tokenizer, 4096) == 1024
    tokenizer.model_max_length = 512
    assert default_block_size(tokenizer, 2048) == 512 and default_block_size(tokenizer, 128) == 128


def test_texts_that_make_no_row():
    with pytest.raises(InputError, match="task 't': its 11 tokens are less than one row of data.block_size=12; set"):
        blocks_of(Packing(12))
    with pytest.raises(InputError, match="task 't': its texts have no tokens"):
        blocks_of(Packing(4), ["\u200b"], tokenizer=nothing_known())
    with pytest.raises(InputError, match="data.block_size=3 leaves no room for text"):
        blocks_of(Packing(3, masked=True), tokenizer=with_special_tokens())
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="has no eos token, so texts could not be told apart"):
        blocks_of(Packing(4), tokenizer=tokenizer)


def nothing_known():
    """A tokenizer that leaves out what it does not know."""
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "</s>": 1}, unk_token="</s>"))
    tokenizer.normalizer = normalizers.Replace("\u200b", "")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
