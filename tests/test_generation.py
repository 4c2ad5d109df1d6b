"""The loops behind evaluation give what one row at a time gives, whoever else is in the batch."""

import random

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

from hf_continual import generation
from hf_continual.generation import (
    Choice,
    Chooser,
    Draw,
    LabelTree,
    Prompt,
    Writer,
    has_plain_cache,
    reads_trees,
    work_groups,
)
from hf_continual.testing import VOCABULARY, tiny_model, toy_tokenizer

SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": lambda: tiny_model("llama"),
    "llama, eager": lambda: _eager(tiny_model("llama")),
    "lora": lambda: get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj"])),
    "t5": lambda: tiny_model("t5"),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SMALL)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**LAYERS, **SMALL)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
                  max_position_embeddings=64, **SMALL)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=8, num_key_value_heads=2, **LAYERS, **SMALL)),
    "gpt_neo, local": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64, window_size=6,
                     attention_types=[[["global", "local"], 1]], **SMALL)
    ),
    "falcon, alibi": lambda: FalconForCausalLM(
        FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, **SMALL)
    ),
    "sliding": lambda: MistralForCausalLM(MistralConfig(num_key_value_heads=2, sliding_window=6, **LAYERS, **SMALL)),
}  # fmt: skip
NO_TREE = ("t5", "sliding", "gpt_neo, local", "falcon, alibi")
CAUSAL = [name for name in FAMILIES if name not in ("t5", "falcon, alibi")]  # Falcon at random repeats itself


def _eager(model):
    model.set_attn_implementation("eager")
    return model


def make(family, ends=()):
    """A random model in double precision, whose greedy answers are no near-ties; `ends` end an answer too."""
    set_seed(0)
    model = FAMILIES[family]().eval()
    if "eager" not in family:  # whose mask of a padded row is no number in double precision
        model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4.0)
    model.generation_config.eos_token_id = sorted({2, *ends})
    return model


def prompts(count, longest=12, seed=0):
    rng = random.Random(seed)
    return [tuple(rng.randrange(4, VOCABULARY) for _ in range(rng.randint(1, longest))) for _ in range(count)]


def one_by_one(model, ids, length):
    """Greedy answers of `generate`, each row alone."""
    ends = model.generation_config.eos_token_id
    seq2seq = model.config.is_encoder_decoder
    found = []
    for prompt in ids:
        output = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            generation_config=GenerationConfig(max_new_tokens=length, eos_token_id=ends, pad_token_id=0,
                                               decoder_start_token_id=0 if seq2seq else None),
        )[0].tolist()  # fmt: skip
        found.append(output[1 if seq2seq else len(prompt) :])
    return found


ENDS = range(30, 55)  # a quarter of the vocabulary, so that answers are of one token or of many


@pytest.mark.parametrize("family", [*CAUSAL, "t5"])
@torch.no_grad()
def test_answers_are_those_of_each_row_alone(family):
    model, ids = make(family, ENDS), prompts(23)
    expected = one_by_one(model, ids, 9)
    assert len({len(answer) for answer in expected}) >= 3 and max(map(len, expected)) == 9
    ended = []
    writer = Writer(model, toy_tokenizer(), batch_size=4, max_new_tokens=9)
    assert writer([Prompt(prompt) for prompt in ids], ended.append) == expected
    assert sum(ended) == 23
    assert writer.own_loop == (family != "sliding")


@torch.no_grad()
def test_rows_that_have_ended_leave_and_others_come_in(monkeypatch):
    """Two answers of 30 tokens and many of one: a step never has many more rows than still write."""
    model, ids = make("llama"), prompts(40)
    alone = one_by_one(model, ids, 30)
    assert sum(len(answer) == 30 for answer in alone) >= 2
    fed, read = [], []
    step, prefill = Writer._step, Writer._read
    monkeypatch.setattr(Writer, "_step", lambda self, live: fed.append(len(live.rows)) or step(self, live))
    monkeypatch.setattr(Writer, "_read", lambda self, rows, p: read.append(len(rows)) or prefill(self, rows, p))
    # All but two rows end at their first token.
    stop = {alone[row][0] for row in range(40)} - {alone[row][k] for row in (3, 17) for k in range(30)}
    model.generation_config.eos_token_id = sorted({2, *stop})
    writer = Writer(model, toy_tokenizer(), batch_size=8, max_new_tokens=30)
    answers = writer([Prompt(prompt) for prompt in ids], lambda rows: None)
    assert answers == one_by_one(model, ids, 30)
    tokens = sum(len(answer) - 1 for answer in answers)
    assert sum(read) == 40 and max(read) <= 8
    assert sum(fed) <= 1.5 * tokens < 0.5 * 8 * 30 * 5  # five batches of eight would each feed 30 x 8


@torch.no_grad()
def test_a_prompt_with_several_answers_is_read_once():
    model = make("llama")
    tokens = []
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: tokens.append(args[0].numel()))
    draw, ids = Draw(0.7), prompts(1, longest=6)[0]
    asked = [Prompt(ids, draw.numbers(0, sample, 3)) for sample in range(5)]
    answers = Writer(model, toy_tokenizer(), batch_size=5, max_new_tokens=3, draw=draw)(asked, lambda rows: None)
    assert tokens[0] == len(ids) and len({tuple(answer) for answer in answers}) > 1


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    for number, plain, top in ((0.0, 1, 1), (0.49, 1, 1), (0.51, 2, 1), (0.79, 2, 2), (0.81, 0, 2), (0.999, 0, 2)):
        u = torch.tensor([number], dtype=torch.float64)
        assert Draw(1.0).choose(logits, u).tolist() == [plain], number
        # The two likeliest make 0.8 of the probability, so 0.5 / 0.8 = 0.625 divides them.
        assert Draw(1.0, top_p=0.6).choose(logits, u).tolist() == [top], number
    # At temperature 0.5 the probabilities are squared: 4, 25 and 9 of 38.
    for number, token in ((0.65, 1), (0.67, 2), (0.89, 2), (0.9, 0)):
        assert Draw(0.5).choose(logits, torch.tensor([number], dtype=torch.float64)).tolist() == [token]
    many = Draw(1.0, seed=3)
    drawn = torch.stack([many.numbers(row, 0, 50) for row in range(40)]).flatten()
    assert 0.45 < float(drawn.mean()) < 0.55 and float(drawn.min()) >= 0 and float(drawn.max()) < 1
    assert not torch.equal(many.numbers(0, 0, 5), many.numbers(0, 1, 5))
    assert not torch.equal(many.numbers(0, 0, 5), Draw(1.0, seed=4).numbers(0, 0, 5))


@pytest.mark.parametrize("family", ["llama", "t5"])
@torch.no_grad()
def test_drawn_answers_do_not_depend_on_the_batch_or_on_the_loop(family, monkeypatch):
    model, draw = make(family, ENDS), Draw(1.5, top_p=0.9, seed=1)
    asked = [Prompt(ids, draw.numbers(row, 0, 6)) for row, ids in enumerate(prompts(11))]

    def answers(size):
        return Writer(model, toy_tokenizer(), batch_size=size, max_new_tokens=6, draw=draw)(asked, lambda rows: None)

    expected = answers(1)
    assert answers(4) == expected != one_by_one(model, [prompt.ids for prompt in asked], 6)
    monkeypatch.setattr(generation, "has_plain_cache", lambda model: False)
    assert answers(4) == expected


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 64, 70, 1000, 5000])
def test_groups_hold_every_row_once_and_all_lengths(rows):
    order = list(range(rows))
    groups = work_groups(order, 4)
    assert sorted(i for group in groups for i in group) == order
    batches = -(-rows // 4)
    assert len(groups) == max(min(4, batches), -(-batches // 16))
    assert all(group == sorted(group) and len(group) <= 64 for group in groups)
    assert max(map(len, groups)) - min(map(len, groups)) <= 4
    if rows >= 1000:  # each has long prompts, which come first, and short ones
        assert all(group[0] < rows / 10 and group[-1] > rows * 0.9 for group in groups)


# -- label likelihood --------------------------------------------------------------------------------------------------

LABELS = ((5, 2), (5, 6, 2), (5, 6, 7, 2), (8, 2), (9, 6, 2))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_likelihoods_are_those_of_a_forward_for_each_label(family):
    model, ids = make(family), prompts(9)
    other = ((10, 2), (11, 12, 2))  # rows with other labels between them
    choices = [Choice(prompt, other if row in (3, 4) else LABELS) for row, prompt in enumerate(ids)]
    chooser, counted = Chooser(model, toy_tokenizer(), batch_size=7), []
    found = chooser(choices, counted.append)
    assert sum(counted) == 9 and chooser.in_a_tree == (family not in NO_TREE)
    for choice, scores in zip(choices, found, strict=True):
        for label, score in zip(choice.labels, scores, strict=True):
            if family == "t5":
                given = {"input_ids": torch.tensor([choice.ids]), "decoder_input_ids": torch.tensor([[0, *label[:-1]]])}
                logits = model(**given).logits[0]
            else:
                logits = model(input_ids=torch.tensor([[*choice.ids, *label]])).logits[0, len(choice.ids) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(label)[:, None]).sum()
            assert score == pytest.approx(float(expected), rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_trees_give_what_rows_of_their_own_give(family, monkeypatch):
    model = make(family)
    choices = [Choice(prompt, LABELS) for prompt in prompts(6)]
    whole = Chooser(model, toy_tokenizer(), batch_size=16)(choices, lambda rows: None)
    monkeypatch.setattr(generation, "reads_trees", lambda model: False)
    rows = Chooser(model, toy_tokenizer(), batch_size=16)(choices, lambda rows: None)
    assert torch.allclose(torch.tensor(whole), torch.tensor(rows), rtol=1e-5)


@torch.no_grad()
def test_what_labels_share_is_read_once():
    tree = LabelTree.of(LABELS)
    # 5 | 5 6 | 5 6 7 | 8 | 9 | 9 6: inner nodes, none for the end tokens.
    assert tree.tokens == [5, 6, 7, 8, 9, 6] and tree.parents == [-1, 0, 1, -1, -1, 4]
    assert tree.depths() == [0, 1, 2, 0, 0, 1]
    assert tree.sees().int().tolist()[2] == [1, 1, 1, 0, 0, 0] and tree.sees().int().tolist()[5] == [0, 0, 0, 0, 1, 1]
    model, tokens = make("llama"), []
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: tokens.append(args[0].numel()))
    ids = prompts(1)[0]
    Chooser(model, toy_tokenizer(), batch_size=8)([Choice(ids, LABELS)], lambda rows: None)
    assert tokens == [len(ids), 6]


def test_models_with_another_cache_or_a_way_of_their_own_use_generate():
    assert has_plain_cache(make("llama")) and reads_trees(make("llama, eager"))
    assert not has_plain_cache(make("sliding"))
    assert has_plain_cache(make("t5")) and not reads_trees(make("t5"))
    assert has_plain_cache(make("lora"))
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert not has_plain_cache(get_peft_model(tiny_model("llama"), config))
    llama = make("llama")
    llama.config._attn_implementation = "flash_attention_2"  # takes no mask of this kind
    assert has_plain_cache(llama) and not reads_trees(llama)
