"""Losses on logits and what DER++ and SEEKR share, against hand-made and independent numbers."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForTokenClassification

from hf_continual import ContinualTrainer, ContinualTrainingArguments
from hf_continual.distillation import logit_kl, logit_mse, query_rows, row_layout, teacher_forward, trainable_copy
from hf_continual.distributed import Distributed
from hf_continual.errors import InputError
from hf_continual.methods.base import make_method
from hf_continual.signals import LogitSignal
from hf_continual.testing import tiny_model, toy_rows, toy_tokenizer, train_task, weights


def softmax(rows):
    e = np.exp(rows - rows.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_kl_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    student = torch.zeros(1, 2, dtype=torch.float64)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(logit_kl(student, teacher, teacher.logsumexp(-1))) == pytest.approx(expected, abs=1e-12)


def test_kl_of_all_logits_equals_numpy():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = softmax(teacher.numpy()), softmax(student.numpy())
    expected = (p * (np.log(p) - np.log(q))).sum(-1).mean()
    assert float(logit_kl(student, teacher, teacher.logsumexp(-1))) == pytest.approx(expected, rel=1e-10)


def test_kl_of_the_top_k_has_one_outcome_for_the_rest():
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(5, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    signal = LogitSignal.from_logits(teacher, torch.arange(5), top_k=6, dtype=torch.float64)
    p, q = softmax(teacher.numpy()), softmax(student.numpy())
    total = 0.0
    for row in range(5):
        top = signal.indices[row].tolist()
        rest_p, rest_q = 1 - p[row, top].sum(), 1 - q[row, top].sum()
        total += sum(p[row, i] * math.log(p[row, i] / q[row, i]) for i in top) + rest_p * math.log(rest_p / rest_q)
    found = logit_kl(student, signal.values, signal.lse.double(), signal.indices.long())
    assert float(found) == pytest.approx(total / 5, rel=1e-5)


@pytest.mark.parametrize("top_k", [None, 8])
def test_kl_of_equal_logits_is_zero_without_gradient(top_k):
    logits = torch.randn(4, 30, requires_grad=True)
    signal = LogitSignal.from_logits(logits, torch.arange(4), top_k)
    indices = None if signal.indices is None else signal.indices.long()
    loss = logit_kl(logits, signal.values, signal.lse, indices)
    loss.backward()
    assert abs(float(loss)) < 1e-6 and float(logits.grad.abs().max()) < 1e-6


def test_gradient_of_kl_is_that_of_the_soft_cross_entropy():
    student, teacher = torch.randn(6, 20, requires_grad=True), torch.randn(6, 20)
    logit_kl(student, teacher, teacher.logsumexp(-1)).backward()
    other = student.detach().clone().requires_grad_()
    F.cross_entropy(other, teacher.softmax(-1)).backward()
    assert torch.allclose(student.grad, other.grad, atol=1e-7)


def test_mse_by_hand():
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[0.0, 2.0], [3.0, 2.0]])
    assert float(logit_mse(student, teacher)) == pytest.approx((1 + 0 + 9 + 4) / 4)
    assert float(logit_mse(student, teacher[:, 1:], torch.tensor([[1], [1]]))) == pytest.approx((0 + 4) / 2)


# -- rows --------------------------------------------------------------------------------------------------------------


def test_layout_of_a_padded_decoder_row():
    batch = {
        "input_ids": torch.zeros(1, 8, dtype=torch.long),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, -100, -100, -100, 7, 8, 2, -100]]),
    }
    layout = row_layout(tiny_model(), batch)
    assert layout.lengths == {"input": 5} and layout.starts == {"input": 2}
    assert layout.logits == [1, 2, 3]  # without padding: the tokens before the labels at 2, 3, 4
    assert row_layout(tiny_model(), batch, shift=False).logits == [2, 3, 4]


def test_layout_of_a_seq2seq_row_and_of_a_classified_one():
    batch = {
        "input_ids": torch.zeros(1, 4, dtype=torch.long),
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
        "labels": torch.tensor([[-100, 5, 2]]),
    }
    layout = row_layout(tiny_model("t5"), batch)
    assert layout.lengths == {"input": 4, "decoder": 2} and layout.starts["decoder"] == 1 and layout.logits == [0, 1]
    assert row_layout(tiny_model("bert"), {**batch, "labels": torch.tensor([2])}).logits == [0]


def test_layout_of_a_row_with_a_hole_in_its_mask_and_of_token_labels():
    batch = {
        "input_ids": torch.zeros(1, 6, dtype=torch.long),
        "attention_mask": torch.tensor([[0, 1, 1, 0, 1, 1]]),
        "labels": torch.tensor([[-100, 1, -100, -100, 0, 2]]),
    }
    assert row_layout(tiny_model(), batch).lengths == {"input": 5}
    config = BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    tagger = BertForTokenClassification(config)
    assert row_layout(tagger, batch).logits == [0, 3, 4]  # the logits of a token are its own label's
    assert row_layout(tiny_model("bert"), {**batch, "labels": torch.tensor([[0.0, 1.0, 1.0]])}).logits == [0]


def test_layout_refuses_packed_rows_and_classified_encoder_decoders():
    two = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "labels": torch.zeros(2, 4, dtype=torch.long)}
    with pytest.raises(InputError, match="packing"):
        row_layout(tiny_model(), two)
    one = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "labels": torch.tensor([1])}
    with pytest.raises(InputError, match="encoder-decoder"):
        row_layout(tiny_model("t5"), one)


def test_query_rows_are_drawn_once_and_for_all():
    assert query_rows(7, 0, 1, "000-0000001") == query_rows(7, 9, 1, "000-0000001") == list(range(7))
    drawn = query_rows(50, 10, 1, "000-0000001")
    assert drawn == query_rows(50, 10, 1, "000-0000001") and len(set(drawn)) == 10 and drawn == sorted(drawn)
    assert len({str(query_rows(50, 10, 1, f"000-{i:07d}")) for i in range(20)}) == 20


@pytest.mark.parametrize("method", ["derpp", "seekr"])
def test_refuses_a_collator_that_masks_anew(tmp_path, method):
    from transformers import DataCollatorForLanguageModeling

    tokenizer = toy_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "w0"})
    args = ContinualTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = ContinualTrainer(
        tiny_model(), args, train_dataset=toy_rows(), methods=[method],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=True),
    )  # fmt: skip
    with pytest.raises(InputError, match="masks other tokens"):
        trainer.train()


# -- the teacher -------------------------------------------------------------------------------------------------------


def test_teacher_by_exchanged_weights_equals_a_merged_copy(tmp_path):
    from hf_continual.methods.base import MethodContext

    model = tiny_model(lora=True, dropout=0.3)
    train_task(model, toy_rows(seed=0), ["naive"], tmp_path / "0")
    before, merged = trainable_copy(model, Distributed()), None
    import copy

    merged = copy.deepcopy(model).merge_and_unload().eval()
    trainer = train_task(model, toy_rows(seed=1), ["naive"], tmp_path / "1")
    ctx = trainer.ctx
    assert isinstance(ctx, MethodContext)
    model.train()
    state, ids = torch.get_rng_state(), torch.tensor([[5, 9, 30, 41]])
    now = weights(model)
    found = teacher_forward(ctx, before, {"input_ids": ids}).logits
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(torch.equal(v, now[n]) for n, v in weights(model).items())
    assert torch.allclose(found, merged(ids).logits, atol=1e-5)
    assert not torch.allclose(found, model.eval()(ids).logits, atol=1e-3)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["derpp", "seekr"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": 0}, "ratio=0"),
        ({"ratio": 1.5}, "ratio=1.5"),
        ({"ratio": -0.1}, "ratio=-0.1"),
        ({"count": 0}, "count=0"),
        ({"total": 0}, "total=0"),
        ({"policy": "best"}, "policy='best'"),
        ({"teacher": "oracle"}, "teacher='oracle'"),
        ({"loss_mix": "mixed"}, "loss_mix='mixed'"),
        ({"replay_batch_size": 4}, "replay_batch_size=4"),
        ({"top_k": 0}, "top_k=0"),
        ({"seed": "x"}, "seed='x'"),
        ({"teacher": "previous", "top_k": 3}, "top_k=3"),
        ({"loss_mix": "summed", "replay_weight": -1}, "replay_weight=-1"),
    ],
)
def test_refuses_options_that_cannot_be(method, options, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        make_method({"name": method, **options})
