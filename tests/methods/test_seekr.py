"""SEEKR against an independent float64 version that looks at eager attention maps."""

import copy
import dataclasses

import datasets
import numpy as np
import pytest
import torch
from contract import MethodContract, check_exact
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq

from hf_continual import ContinualTrainer, ContinualTrainingArguments
from hf_continual.collators import TeacherBatch
from hf_continual.errors import InputError
from hf_continual.methods.base import MethodList
from hf_continual.methods.seekr import SEEKR, attention_kl, combined_importance, head_sensitivity, select_heads
from hf_continual.testing import close, equal, tiny_model, toy_rows, toy_tokenizer, train_task, weights

SMALL = {"layers": 2, "heads": 3, "query_rows": 4}


class TestSEEKR(MethodContract):
    method = {"name": "seekr", "ratio": 0.25, **SMALL}


class TestSEEKRSummed(MethodContract):
    # A small weight: with equal teacher and student the outputs differ by rounding alone, which 1e3 would magnify.
    method = {"name": "seekr", "ratio": 0.25, "loss_mix": "summed", "attention": "outputs", "attention_weight": 10}
    kinds = ("llama",)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"teacher": "previous", "head_plan": "global"}, "t5"),
        ({"teacher": "tasks", "recompute": True}, "llama"),
        ({"attention_store": "qk", "query_rows": 0}, "llama"),
    ],
)
def test_other_variants_are_exact(options, kind, tmp_path):
    check_exact({"name": "seekr", "count": 4, **SMALL, **options}, kind, tmp_path)


# -- the equations by hand ---------------------------------------------------------------------------------------------


def test_attention_kl_by_hand():
    teacher = torch.tensor([[[[0.75, 0.25], [1.0, 0.0]]]], dtype=torch.float64)
    student = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]]]], dtype=torch.float64)
    first, second = 0.75 * np.log(1.5) + 0.25 * np.log(0.5), np.log(2.0)
    both, one = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[True, False]])
    assert float(attention_kl(teacher, student, both)) == pytest.approx((first + second) / 2)
    assert float(attention_kl(teacher, student, one)) == pytest.approx(first)


def test_sensitivity_by_hand():
    g, v = torch.tensor([[1.0, 2.0], [0.0, 1.0]]).double(), torch.tensor([[1.0, 0.0], [3.0, 1.0]]).double()
    # g v^T = [[1, 5], [0, 1]]
    assert float(head_sensitivity(g, v)) == pytest.approx((1 + 25 + 0 + 1) / 4)


def test_selection_by_hand():
    importance = torch.tensor([[5.0, 0.0, 0.0], [2.0, 2.0, 2.0], [0.0, 0.0, 4.0]])
    assert select_heads(importance, 2, 3).tolist() == [[True, False, False], [True, True, False], [False] * 3]


def test_importance_rules_by_hand():
    s, f = [torch.tensor([[1.0]]), torch.tensor([[2.0]])], [torch.tensor([[3.0]]), torch.tensor([[5.0]])]
    sums = {"sensitivity": s[0] + s[1], "change": f[0] + f[1], "product": s[0] * f[0] + s[1] * f[1]}
    assert float(combined_importance(sums, "sum_of_products")) == 13
    assert float(combined_importance(sums, "product_of_sums")) == 24


# -- a naive version ---------------------------------------------------------------------------------------------------


def eager(kind, lora, state):
    """The model in float64 with eager attention and these weights."""
    model = tiny_model(kind, lora=lora)
    (model.get_base_model() if lora else model).set_attn_implementation("eager")
    model = model.eval().double()
    model.load_state_dict({k: v.double() for k, v in state.items()}, strict=False)
    return model


def maps(outputs, kind):
    """[modules][1, heads, rows, keys] in the order of the modules."""
    if kind != "t5":
        return list(outputs.attentions)
    decoder = [m for pair in zip(outputs.decoder_attentions, outputs.cross_attentions, strict=True) for m in pair]
    return [*outputs.encoder_attentions, *decoder]


def naive_scores(kind, lora, before, after, rows):
    """S and F of one task from whole maps: [modules, heads] each."""
    old, new = eager(kind, lora, before), eager(kind, lora, after)
    for p in new.parameters():
        p.requires_grad_(True)
    sensitivity, change = 0, 0
    for row in rows:
        batch = {k: torch.tensor([v]) for k, v in row.items()}
        out = new(**batch, output_attentions=True)
        attentions = maps(out, kind)
        gradients = torch.autograd.grad(out.loss, attentions)
        sensitivity += np.array([g[0].square().mean((-1, -2)).numpy() for g in gradients])
        with torch.no_grad():
            earlier = maps(old(**batch, output_attentions=True), kind)
        change += np.array(
            [(a.detach() - b)[0].square().mean((-1, -2)).numpy() for a, b in zip(attentions, earlier, strict=True)]
        )
    sensitivity, change = sensitivity / len(rows), change / len(rows)
    return sensitivity / sensitivity.sum(1, keepdims=True), change


@pytest.mark.parametrize(
    ("kind", "lora"),
    [("llama", True), ("llama", False), ("t5", True), ("t5", False), ("bert", True), ("roberta", False)],
)
def test_scores_importance_and_plan_equal_a_naive_version(tmp_path, kind, lora):
    method = SEEKR(count=3, query_rows=0, layers=2, heads=5)
    model, sums = tiny_model(kind, lora=lora), 0
    for index in range(2):
        rows, before = toy_rows(kind, seed=index), weights(model)
        train_task(model, rows, [method], tmp_path / str(index), kind=kind)
        kept = [rows[int(row_id[4:])] for row_id in method.buffer_.ids if row_id.startswith(f"00{index}")]
        s, f = naive_scores(kind, lora, before, weights(model), kept)
        sums = sums + s * f
        np.testing.assert_allclose(method.sensitivity_.numpy(), s, rtol=2e-4)
        np.testing.assert_allclose(method.forgettability_.numpy(), f, rtol=2e-3, atol=1e-12)
        np.testing.assert_allclose(method.importance_.numpy(), sums, rtol=3e-3, atol=1e-14)
        best = np.argsort(-method.importance_.numpy().sum(1), kind="stable")[:2]
        inside = [(-method.importance_[m, h].item(), m, h) for m in sorted(best) for h in range(4)]
        chosen = {(m, h) for _, m, h in sorted(inside)[:5]}
        plan = method.plans_[f"00{index}"]
        assert chosen == {(method.modules_.index(name), h) for name, heads in plan.items() for h in heads}
    assert len(method.modules_) == (6 if kind == "t5" else 2)


class Spy(SEEKR):
    """Keeps each batch of stored rows with the weights it met and what was logged for it."""

    name = "seekr"

    def extra_loss(self, ctx, batch, outputs):
        losses = super().extra_loss(ctx, batch, outputs)
        if not hasattr(self, "seen"):
            self.seen = []
        if losses:
            inputs = {k: v for k, v in batch.items() if k not in ("teacher", "replay_row")}
            ids = [row["input_ids"] for row in self.buffer_.rows]
            rows = [ids.index(row.tolist()) for row in inputs["input_ids"]]
            plans = copy.deepcopy(self.plans_)
            self.seen.append((inputs, weights(ctx.model), {k: float(v) for k, v in losses.items()}, rows, plans))
        return losses


def naive_attention_loss(method, kind, inputs, rows, plans, old, new, reduction):
    """L_ad of one micro-batch from whole maps; `old` by row of the batch."""
    names, total = method.modules_, {}
    task_plans = [plans[f"00{number // 3}"] for number in rows]
    for row, plan in enumerate(task_plans):
        for name, heads in plan.items():
            m = names.index(name)
            t, s = old[row][m][0, heads], new[row][m][0, heads]
            kl = torch.where(t > 0, t * (t.clamp_min(1e-300).log() - s.clamp_min(1e-300).log()), 0.0).sum(-1)
            value = float(kl.mean() if reduction == "mean_rows" else kl.sum())
            total[name] = total.get(name, 0.0) + value / len(rows)
    return sum(total.values()) / (len(total) if reduction == "mean_rows" else 1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"kl_reduction": "sum"}),
        ("llama", {"teacher": "tasks"}),
        ("llama", {"attention_store": "qk"}),
        ("llama", {"recompute": True}),
        ("t5", {}),
        ("bert", {}),
    ],
)
def test_losses_of_a_run_equal_a_naive_version(tmp_path, kind, options):
    method = Spy(count=3, query_rows=0, layers=2, heads=5, logit_weight=0.3, attention_weight=50.0, **options)
    model, after = tiny_model(kind, lora=True), []
    for index in range(3):
        train_task(model, toy_rows(kind, seed=index), [method], tmp_path / str(index), kind=kind)
        after.append(weights(model))
    assert len(method.seen) == 3
    for inputs, now, logged, rows, plans in method.seen:
        student, old, new, logits = eager(kind, True, now), [], [], []
        for row, number in enumerate(rows):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            with torch.no_grad():
                t = eager(kind, True, after[number // 3])(**one, output_attentions=True)
                s = student(**one, output_attentions=True)
            old.append(maps(t, kind))
            new.append(maps(s, kind))
            p, q = F.log_softmax(t.logits[0], -1), F.log_softmax(s.logits[0], -1)
            if kind == "llama":
                p, q = p[:-1], q[:-1]
            logits += (p.exp() * (p - q)).sum(-1).reshape(-1).tolist()
        reduction = options.get("kl_reduction", "mean_rows")
        expected = naive_attention_loss(method, kind, inputs, rows, plans, old, new, reduction)
        # Maps are stored in half precision.
        assert logged["seekr/attention"] == pytest.approx(50 * expected, rel=6e-3, abs=1e-7)
        assert logged["seekr/logits"] == pytest.approx(0.3 * sum(logits) / len(logits), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(("kind", "lora"), [("llama", True), ("t5", False)])
def test_everything_in_double_precision_within_1e_6(tmp_path, kind, lora):
    """A float64 run with an online teacher, of which nothing is rounded: S, F, I, L_ld and L_ad."""
    method = Spy(count=3, query_rows=0, layers=2, heads=5, teacher="previous", attention_weight=20.0)
    model = tiny_model(kind, lora=lora).double()
    before, sums = [], 0
    for index in range(2):
        rows = toy_rows(kind, seed=index)
        before.append(weights(model))
        train_task(model, rows, [method], tmp_path / str(index), kind=kind)
        kept = [rows[int(row_id[4:])] for row_id in method.buffer_.ids if row_id.startswith(f"00{index}")]
        s, f = naive_scores(kind, lora, before[index], weights(model), kept)
        sums = sums + s * f
        np.testing.assert_allclose(method.sensitivity_.numpy(), s, rtol=1e-6)
        # Eager attention rounds its maps to float32, and F is a difference of two.
        np.testing.assert_allclose(method.forgettability_.numpy(), f, rtol=1e-5)
        np.testing.assert_allclose(method.importance_.numpy(), sums, rtol=1e-5)
    ((inputs, now, logged, rows, plans),) = method.seen
    old, new, logits = [], [], []
    for row in range(len(rows)):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        with torch.no_grad():
            t = eager(kind, lora, before[1])(**one, output_attentions=True)
            s = eager(kind, lora, now)(**one, output_attentions=True)
        old.append(maps(t, kind))
        new.append(maps(s, kind))
        p, q = F.log_softmax(t.logits[0], -1), F.log_softmax(s.logits[0], -1)
        if kind == "llama":
            p, q = p[:-1], q[:-1]
        logits += (p.exp() * (p - q)).sum(-1).tolist()
    expected = naive_attention_loss(method, kind, inputs, rows, plans, old, new, "mean_rows")
    rounded = 1e-4 if kind == "llama" else 1e-6  # its eager attention takes the softmax in float32, T5's does not
    assert logged["seekr/attention"] == pytest.approx(20 * expected, rel=rounded)
    assert logged["seekr/logits"] == pytest.approx(0.5 * sum(logits) / len(logits), rel=1e-6)


def test_no_loss_and_no_gradient_while_the_student_is_the_teacher(tmp_path):
    """At a learning rate of 0 the student stays its own teacher: nothing but the task loss has a gradient."""
    seen = []

    class Watch(SEEKR):
        name = "seekr"

        def extra_loss(self, ctx, batch, outputs):
            losses = super().extra_loss(ctx, batch, outputs)
            if losses:
                learning = [p for p in ctx.model.parameters() if p.requires_grad]
                gradients = torch.autograd.grad(sum(losses.values()), learning, retain_graph=True, allow_unused=True)
                seen.append((losses, max(float(g.abs().max()) for g in gradients if g is not None)))
            return losses

    for teacher in ("cached", "previous", "tasks"):
        method, model = Watch(count=3, teacher=teacher, query_rows=0), tiny_model(lora=True)
        train_task(model, toy_rows(seed=0), [method], tmp_path / f"{teacher}0", learning_rate=1e-2)
        train_task(model, toy_rows(seed=1), [method], tmp_path / f"{teacher}1", learning_rate=0.0)
    assert len(seen) == 3
    for losses, gradient in seen:
        assert all(abs(float(v)) < 2e-3 for v in losses.values()), losses  # half precision maps times 1e3
        assert gradient < 1e-2
    assert all(abs(float(v)) < 1e-4 for losses, _ in seen[1:] for v in losses.values())


def test_attention_distillation_lowers_drift_on_old_tasks(tmp_path):
    """Three tasks, the same run with and without L_ad."""

    def drift(weight):
        method, model = SEEKR(count=8, attention_weight=weight, query_rows=0), tiny_model(lora=True)
        for index in range(3):
            train_task(
                model, toy_rows(seed=index, rows=32), [method], tmp_path / f"{weight}-{index}", num_train_epochs=3
            )
        assert list(method.drift_) == ["task1", "task2"] and list(method.drift_["task2"]) == ["task0", "task1"]
        return method.drift_["task2"]

    without, distilled = drift(0.0), drift(1e3)
    for task in ("task0", "task1"):
        assert distilled[task] < 0.6 * without[task], (distilled, without)


class Watch(SEEKR):
    """Keeps what was logged and the targets of each batch of stored rows."""

    name = "seekr"

    def extra_loss(self, ctx, batch, outputs):
        losses = super().extra_loss(ctx, batch, outputs)
        if losses:
            self.seen = [*getattr(self, "seen", []), ({k: float(v.detach()) for k, v in losses.items()}, self._teacher)]
        return losses


def uneven_rows(seed):
    """Rows of different lengths with prompts that carry no loss."""
    rows = [dict(row) for row in toy_rows(seed=seed, length=14)]
    for number, row in enumerate(rows):
        length = 7 + number % 7
        for name in row:
            row[name] = row[name][:length]
        row["labels"] = [-100] * 3 + row["labels"][3:]
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("attention", ["weights", "outputs"])
def test_padding_on_either_side_gives_the_same_losses(tmp_path, attention):
    """Also where the batch of one row, from which signals are taken, is padded: to a multiple of 8."""

    def losses(side):
        tokenizer = toy_tokenizer()
        tokenizer.padding_side = side
        collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
        method, model = Watch(count=4, query_rows=5, attention=attention), tiny_model(lora=True)
        for index in range(2):
            args = ContinualTrainingArguments(
                output_dir=str(tmp_path / f"{side}{index}"), per_device_train_batch_size=4, use_cpu=True,
                learning_rate=1e-2, report_to="none", save_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            trainer = ContinualTrainer(
                model, args, train_dataset=uneven_rows(index), data_collator=collator, methods=[method]
            )
            trainer.train()
        starts = {int(target.rows.min()) for target in method.seen[0][1].attention.values()}
        return [logged for logged, _ in method.seen], method.importance_, starts

    right, importance, _ = losses("right")
    left, other, starts = losses("left")
    assert len(right) == 3 and starts != {0}  # one batch of stored rows an epoch
    for name in ("seekr/attention", "seekr/logits"):
        assert left[0][name] == pytest.approx(right[0][name], rel=2e-2) and right[0][name] > 1e-5
    assert torch.allclose(importance, other, rtol=1e-3)


def test_signals_are_taken_without_dropout(tmp_path):
    method, model = SEEKR(count=2, query_rows=0), tiny_model(lora=True, dropout=0.5)
    train_task(model, toy_rows(), [method], tmp_path)
    row_id = method.buffer_.ids[0]
    signal, ids = method.buffer_.signals.read(row_id), torch.tensor([method.buffer_.rows[0]["input_ids"]])
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits[0, :-1]
    assert torch.allclose(signal.logits.values, expected, atol=1e-6)
    attentions = eager("llama", True, weights(model))(input_ids=ids, output_attentions=True).attentions
    for name, found in signal.attention.items():
        expected = attentions[method.modules_.index(name)][0, found.heads.long()]
        assert torch.allclose(found.values.double(), expected, atol=1e-3)


def test_scores_are_taken_without_dropout(tmp_path):
    method, model = SEEKR(count=3, query_rows=0), tiny_model(lora=True, dropout=0.5)
    rows, before = toy_rows(), weights(model)
    train_task(model, rows, [method], tmp_path)
    kept = [rows[int(row_id[4:])] for row_id in method.buffer_.ids]
    s, f = naive_scores("llama", True, before, weights(model), kept)
    np.testing.assert_allclose(method.sensitivity_.numpy(), s, rtol=2e-4)
    np.testing.assert_allclose(method.forgettability_.numpy(), f, rtol=2e-3, atol=1e-12)


def test_a_global_plan_is_that_of_the_newest_task(tmp_path):
    plans = {}
    for plan in ("per_task", "global"):
        method, model = Watch(count=3, teacher="previous", head_plan=plan, layers=1, heads=1), tiny_model(lora=True)
        for index in range(3):
            train_task(model, toy_rows(seed=index), [method], tmp_path / f"{plan}{index}")
            if index == 1:  # so that the newest plan is another than the first
                ((name, heads),) = method.plans_["001"].items()
                method.plans_["001"] = {name: [(heads[0] + 1) % 4]}
        found = {}
        for _, teacher in method.seen[-2:]:  # six stored rows in batches of four
            for name, target in teacher.attention.items():
                rows = range(teacher.size) if target.batch is None else target.batch.tolist()
                found |= {teacher.tasks[row]: (name, target.heads[i].tolist()) for i, row in enumerate(rows)}
        plans[plan] = found | {"plans": [next(iter(method.plans_[key].items())) for key in ("000", "001")]}
    assert plans["global"][0] == plans["global"][1] == plans["global"]["plans"][1] != plans["global"]["plans"][0]
    assert [plans["per_task"][task] for task in (0, 1)] == plans["per_task"]["plans"]


def test_stored_rows_weigh_what_distillation_leaves():
    method = SEEKR(logit_weight=0.3)
    assert method.task_loss_weight(None, {"teacher": object()}) == pytest.approx(0.7)
    assert method.task_loss_weight(None, {}) == 1


def test_summed_losses_are_weighed(tmp_path):
    """At a learning rate of 0 every loss on stored rows is proportional to `replay_weight`; default: stored / new."""

    def logged(**options):
        method, model = Watch(count=4, loss_mix="summed", **options), tiny_model(lora=True)
        train_task(model, toy_rows(seed=0), [method], tmp_path / f"{options}0")
        train_task(model, toy_rows(seed=1), [method], tmp_path / f"{options}1", learning_rate=0.0)
        return method.seen[0][0]["seekr/replay"]

    whole = logged(replay_weight=1.0)
    assert whole > 1
    assert logged(replay_weight=0.125) == pytest.approx(0.125 * whole, rel=1e-5)
    assert logged() == pytest.approx(4 / 16 * whole, rel=1e-5)


def test_stored_rows_are_drawn_in_turn_and_in_a_new_order_each_time(tmp_path):
    method = SEEKR(count=5, loss_mix="summed")
    trainer = train_task(tiny_model(), toy_rows(), [method], tmp_path)
    ctx = dataclasses.replace(trainer.ctx, task=dataclasses.replace(trainer.ctx.task, index=1))
    method._drawn_from = method.buffer_.rows  # as at the beginning of a task
    drawn = [row["replay_row"] for _ in range(10) for row in method._draw(ctx, 2)]
    passes = [drawn[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(one) == list(range(5)) for one in passes) and len({tuple(one) for one in passes}) > 1
    assert method.drawn_ == 20 and len(method._draw(ctx, 9)) == 5


def test_options_reach_the_loss_and_the_signals(tmp_path):
    request = SEEKR(recompute=True, kl_epsilon=1e-8, kl_reduction="sum")._distil(TeacherBatch([0], 1, [0]))
    assert (request.recompute, request.epsilon, request.reduction, request.kind) == (True, 1e-8, "sum", "weights")
    method = SEEKR(count=1, top_k=5, attention="outputs")
    train_task(tiny_model(lora=True), toy_rows(), [method], tmp_path)
    assert method._distil(TeacherBatch([0], 1, [0])).kind == "outputs"
    signals = method.buffer_.signals.read(method.buffer_.ids[0])
    assert signals.logits.values.shape == (9, 5) == signals.logits.indices.shape
    assert all(a.kind == "outputs" and a.values.shape[1:] == (10, 8) for a in signals.attention.values())


def test_refuses_signals_of_other_options(tmp_path):
    method, model = SEEKR(count=2, top_k=5), tiny_model(lora=True)
    train_task(model, toy_rows(), [method], tmp_path / "0")
    other = SEEKR(count=2, top_k=6)
    method.save(tmp_path / "s")
    other.load(tmp_path / "s")
    with pytest.raises(InputError, match="top_k=5"):
        train_task(model, toy_rows(seed=1), [other], tmp_path / "1")


# -- options -----------------------------------------------------------------------------------------------------------


def test_random_heads_and_single_factors(tmp_path):
    plans = {}
    for choice in ("importance", "sensitivity", "forgettability", "random"):
        method = SEEKR(count=3, layers=1, heads=2, head_choice=choice)
        train_task(tiny_model(lora=True), toy_rows(), [method], tmp_path / choice)
        plans[choice] = method.plans_["000"]
        scores = {"importance": method.importance_, "sensitivity": method.sums_["raw"],
                  "forgettability": method.sums_["change"]}  # fmt: skip
        if choice in scores:
            chosen = select_heads(scores[choice], 1, 2).nonzero().tolist()
            assert [[method.modules_.index(m), h] for m, heads in plans[choice].items() for h in heads] == chosen
        assert sum(len(heads) for heads in plans[choice].values()) == 2 and len(plans[choice]) <= 1
    again = SEEKR(count=3, layers=1, heads=2, head_choice="random")
    train_task(tiny_model(lora=True), toy_rows(seed=5), [again], tmp_path / "again")
    assert again.plans_["000"] == plans["random"]


def test_masked_and_normalised_scores(tmp_path):
    plain, other = SEEKR(count=3), SEEKR(count=3, masked_scores=True, normalise_scores=True)
    for name, method in (("plain", plain), ("other", other)):
        train_task(tiny_model(lora=True), toy_rows(), [method], tmp_path / name)
    assert float(other.forgettability_.sum()) == pytest.approx(1)
    assert torch.allclose(plain.sensitivity_.sum(1), torch.ones(2).double())
    assert not torch.allclose(plain.sensitivity_, other.sensitivity_, rtol=1e-2)


def test_the_reference_distils_one_position_too_far(tmp_path):
    for shift, first in (("correct", 0), ("reference", 0)):
        method = SEEKR(count=1, logit_shift=shift)
        train_task(tiny_model(lora=True), toy_rows(), [method], tmp_path / shift)
        positions = method.buffer_.signals.read(method.buffer_.ids[0]).logits.positions.tolist()
        assert positions == list(range(first, 9 if shift == "correct" else 10))


def test_state_round_trip(tmp_path):
    method = SEEKR(count=3)
    train_task(tiny_model(lora=True), toy_rows(), [method], tmp_path / "t")
    method.save(tmp_path / "s")
    again = SEEKR(count=3)
    again.load(tmp_path / "s")
    assert again.plans_ == method.plans_ and torch.equal(again.importance_, method.importance_)
    assert again.buffer_.signals.ids == method.buffer_.ids


@pytest.mark.parametrize("others", [["migu"], ["kif"], ["olora"], [{"name": "kif"}, {"name": "migu"}]])
def test_combines_with_other_methods(tmp_path, others):
    for order in (lambda ms: ms, lambda ms: ms[::-1]):
        methods = MethodList(order([SEEKR(count=4), *others]))
        model = tiny_model(lora=True)
        for index in range(3):
            trainer = train_task(model, toy_rows(seed=index), methods, tmp_path / f"{index}{id(methods)}")
        logged = [e for e in trainer.state.log_history if "seekr/attention" in e]
        assert logged and all(np.isfinite(e["seekr/attention"]) for e in logged)


def test_teacher_of_each_task_ignores_adapters_that_came_later(tmp_path):
    """With O-LoRA a task's teacher has only the adapters of its time."""
    from hf_continual.distillation import teacher_forward

    method = SEEKR(count=3, teacher="tasks")
    methods, model, ids = MethodList(["olora", method]), tiny_model(lora=True), torch.tensor([[5, 9, 30, 41]])
    after = []
    for index in range(3):
        trainer = train_task(model, toy_rows(seed=index), methods, tmp_path / str(index))
        after.append(copy.deepcopy(model).eval()(ids).logits)
    for task in range(3):
        found = teacher_forward(trainer.ctx, method._teacher_weights(trainer.ctx, task), {"input_ids": ids}).logits
        assert torch.allclose(found, after[task], atol=1e-6)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": 3}, "layers=3"),
        ({"heads": 9}, "heads=9"),
        ({"layers": 1, "heads": 5}, "heads=5"),
    ],
)
def test_refuses_budgets_larger_than_the_model(tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        train_task(tiny_model(lora=True), toy_rows(), [SEEKR(**options)], tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"layers": 0}, {"heads": -1}, {"query_rows": -1}, {"logit_weight": 1.5}, {"attention_weight": -1},
        {"attention": "scores"}, {"kl_reduction": "mean"}, {"head_choice": "best"}, {"importance": "product"},
        {"logit_shift": "wrong"}, {"attention_store": "k"}, {"recompute": 1}, {"head_plan": "global"},
    ],
)  # fmt: skip
def test_refuses_options_that_cannot_be(options):
    with pytest.raises(InputError, match=next(iter(options))):
        SEEKR(**options)


def test_refuses_reentrant_checkpointing(tmp_path):
    method, model = SEEKR(count=3), tiny_model(lora=True)
    train_task(model, toy_rows(), [method], tmp_path / "0")
    with pytest.raises(InputError, match="use_reentrant"):
        train_task(
            model, toy_rows(seed=1), [method], tmp_path / "1", gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )  # fmt: skip


def test_refuses_attention_that_cannot_be_tapped(tmp_path):
    model = tiny_model()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(InputError, match="flex_attention"):
        train_task(model, toy_rows(), [SEEKR(count=2)], tmp_path)


def test_implementation_is_restored(tmp_path):
    model = tiny_model()
    before = model.config._attn_implementation
    for index in range(2):
        train_task(model, toy_rows(seed=index), [SEEKR(count=2)], tmp_path / str(index))
    assert model.config._attn_implementation == before
    assert equal(weights(model), weights(model)) and close(weights(model), weights(model), 0)
