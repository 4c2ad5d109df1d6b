import datasets
import pytest
import torch
from transformers import GenerationConfig

from hf_continual.errors import InputError
from hf_continual.evaluation import (
    EvaluationConfig,
    evaluate_task,
    evaluating,
    exact_match,
    make_cell,
    normalize_answer,
    rouge_l,
)
from hf_continual.tasks import Task
from hf_continual.testing import tiny_model, toy_stream, toy_tokenizer
from hf_continual.tokenization import encode_completion, encode_prompt


def rows(n=9):
    """Prompts of different lengths, so that batches need padding."""
    prompts = [" ".join(f"w{(7 * i + k) % 70}" for k in range(1 + i % 5)) + " Answer :" for i in range(n)]
    return datasets.Dataset.from_dict({"prompt": prompts, "references": [["red"]] * n})


def sharp_model(kind):
    """A random model whose greedy answers are no near-ties."""
    model = tiny_model(kind).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return model.eval()


def test_normalize_answer_and_exact_match():
    assert normalize_answer("  The Educational,  Institution. ") == "the educational institution"
    assert exact_match("Very Positive!", ["negative", "very positive"]) == 1.0
    assert exact_match("very", ["very positive"]) == 0.0
    assert exact_match("a dog", ["dog"]) == 0.0  # articles stay
    assert exact_match("", ["-"]) == 0.0  # MNLI's rows without a label are never right


def test_rouge_l_by_hand_and_best_reference():
    # LCS of "the cat sat" and "the cat ran" is 2: precision = recall = F = 2/3.
    assert rouge_l("the cat sat", ["the cat ran"]) == pytest.approx(2 / 3)
    assert rouge_l("the cat sat", ["nothing here", "the cat sat"]) == 1.0
    assert rouge_l("", ["word"]) == 0.0


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_batched_generation_equals_one_row_at_a_time(kind):
    model, tokenizer = sharp_model(kind), toy_tokenizer()
    data = rows()
    cell = evaluate_task(
        model,
        tokenizer,
        Task("t", eval_dataset=data),
        EvaluationConfig(batch_size=4, max_new_tokens=5),
        max_prompt_length=32,
    )
    for prediction, row in zip(cell.predictions, data, strict=True):
        ids = torch.tensor([encode_prompt(row["prompt"], tokenizer, 32, kind == "t5")])
        start = model.config.decoder_start_token_id if kind == "t5" else None
        answer = [start] if kind == "t5" else []
        for _ in range(5):  # greedy by hand, without a cache
            if kind == "t5":
                logits = model(input_ids=ids, decoder_input_ids=torch.tensor([answer])).logits
            else:
                logits = model(input_ids=torch.cat([ids, torch.tensor([answer], dtype=torch.long)], 1)).logits
            answer.append(int(logits[0, -1].argmax()))
            if answer[-1] == tokenizer.eos_token_id:
                break
        text = tokenizer.decode(answer[kind == "t5" :], skip_special_tokens=True).strip()
        assert prediction["prediction"] == text
    assert [p["index"] for p in cell.predictions] == list(range(9)) and cell.n == 9
    assert cell.settings["do_sample"] is False and cell.settings["max_new_tokens"] == 5


def test_the_models_own_sampling_settings_do_not_reach_the_evaluation():
    model, tokenizer = sharp_model("llama"), toy_tokenizer()
    task, config = Task("t", eval_dataset=rows()), EvaluationConfig(batch_size=4, max_new_tokens=4)
    plain = evaluate_task(model, tokenizer, task, config, max_prompt_length=32).predictions
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, eos_token_id=2)
    assert evaluate_task(model, tokenizer, task, config, max_prompt_length=32).predictions == plain
    assert model.generation_config.temperature == 5.0


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_label_likelihood_equals_a_full_forward_for_each_label(kind):
    model, tokenizer = sharp_model(kind), toy_tokenizer()
    labels, data = ["red", "blue green", "dog cat bird"], rows()
    task = Task("t", eval_dataset=data, labels=labels, scorer="label_likelihood")
    cell = evaluate_task(model, tokenizer, task, EvaluationConfig(batch_size=7), max_prompt_length=32)
    for prediction, row in zip(cell.predictions, data, strict=True):
        prompt = encode_prompt(row["prompt"], tokenizer, 32, kind == "t5")
        totals = []
        for label in labels:
            answer = encode_completion(label, row["prompt"], tokenizer, 20, kind == "t5")
            assert answer[-1] == tokenizer.eos_token_id  # the end is part of the answer
            if kind == "t5":
                decoder = torch.tensor([[model.config.decoder_start_token_id, *answer[:-1]]])
                logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0]
            else:
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            scores = logits.log_softmax(-1)
            totals.append(sum(float(scores[k, token]) for k, token in enumerate(answer)))
        assert prediction["log_likelihood"] == pytest.approx(totals, rel=1e-5, abs=1e-4)
        assert prediction["prediction"] == labels[max(range(3), key=totals.__getitem__)]
    assert cell.metric == "accuracy" and cell.score == sum(p["prediction"] == "red" for p in cell.predictions) / 9


def test_each_prompt_is_encoded_once_for_all_its_labels():
    model, tokenizer = tiny_model(), toy_tokenizer()
    tokens = []
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: tokens.append(args[0].numel()))
    texts = ["w1 w2 w3 w4 w5 w6 Answer :", "w7 w2 w3 w4 w5 w6 Answer :"]
    data = datasets.Dataset.from_dict({"prompt": [*texts, texts[0]], "references": [["red"]] * 3})
    task = Task("t", eval_dataset=data, labels=["red", "blue", "green"], scorer="label_likelihood")
    cell = evaluate_task(model, tokenizer, task, EvaluationConfig(batch_size=6), max_prompt_length=32)
    prompt = len(encode_prompt(data[0]["prompt"], tokenizer, 32, False))
    assert {**cell.predictions[0], "index": 2} == cell.predictions[2] and cell.n == 3
    assert tokens == [
        2 * prompt,
        6 * 1,
    ]  # two prompts once, also the one that is there twice; then a token for each answer (the end is not fed)


def test_scores_can_be_computed_later_from_kept_predictions():
    stream = toy_stream(1)
    cell = evaluate_task(
        tiny_model(), toy_tokenizer(), stream[0], EvaluationConfig(max_new_tokens=4), max_prompt_length=16
    )
    later = make_cell("rouge_l", cell.predictions, cell.settings)
    assert later.metric == "rouge_l" and later.n == 6 and later.others["exact_match"] == cell.score


def test_evaluating_restores_the_model():
    model = tiny_model().train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not model.training and model.config.use_cache
        raise RuntimeError
    assert model.training and model.config.use_cache is False
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_evaluation_leaves_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    evaluate_task(
        tiny_model(), toy_tokenizer(), toy_stream(1)[0], EvaluationConfig(max_new_tokens=3), max_prompt_length=16
    )
    torch.manual_seed(3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("options", [{"scorer": "exact"}, {"batch_size": 0}, {"max_new_tokens": "many"}])
def test_settings_that_cannot_be_are_refused(options):
    with pytest.raises(InputError, match=f"evaluation.{next(iter(options))}"):
        EvaluationConfig(**options)


def test_likelihood_without_labels_is_refused():
    task = Task("t", eval_dataset=rows(), scorer="label_likelihood")
    with pytest.raises(InputError, match="labels"):
        evaluate_task(tiny_model(), toy_tokenizer(), task, EvaluationConfig(), max_prompt_length=16)
