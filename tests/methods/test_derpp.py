import pytest
import torch
from contract import MethodContract, check_exact
from torch.nn import functional as F

from hf_continual.errors import InputError
from hf_continual.methods.derpp import DERPP
from hf_continual.testing import close, equal, tiny_model, toy_rows, train_task, weights


class TestDERPP(MethodContract):
    method = {"name": "derpp", "ratio": 0.25}


class TestDERPPSummed(MethodContract):
    method = {"name": "derpp", "ratio": 0.25, "loss_mix": "summed", "loss": "kl", "top_k": 10}
    kinds = ("llama",)


@pytest.mark.parametrize(("teacher", "kind"), [("previous", "llama"), ("tasks", "t5")])
def test_online_teachers_are_exact(teacher, kind, tmp_path):
    check_exact({"name": "derpp", "count": 4, "teacher": teacher, "loss": "kl"}, kind, tmp_path)


class Spy(DERPP):
    """Keeps each batch of stored rows with the weights it met and what was logged for it."""

    name = "derpp"

    def extra_loss(self, ctx, batch, outputs):
        losses = super().extra_loss(ctx, batch, outputs)
        if not hasattr(self, "seen"):
            self.seen = []
        if losses:
            inputs = {k: v for k, v in batch.items() if k not in ("teacher", "replay_row")}
            ids = [row["input_ids"] for row in self.buffer_.rows]
            rows = [ids.index(row.tolist()) for row in inputs["input_ids"]]
            self.seen.append((inputs, weights(ctx.model), {k: float(v) for k, v in losses.items()}, rows))
        return losses


@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize("teacher", ["cached", "tasks", "previous"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_distilled_logits_are_those_after_the_rows_own_task(tmp_path, loss, teacher, kind):
    """Three tasks; each logged loss is computed again in float64 from saved weights of student and teacher."""
    method = Spy(count=3, loss=loss, alpha=0.7, beta=0.3, teacher=teacher)
    model, after = tiny_model(kind, lora=True), []
    for index in range(3):
        train_task(model, toy_rows(kind, seed=index), [method], tmp_path / str(index), kind=kind)
        after.append(weights(model))
    assert method.buffer_.sizes == {"task0": 3, "task1": 3, "task2": 3}
    reference = tiny_model(kind, lora=True).eval().double()

    def logits(state, inputs):
        reference.load_state_dict({k: v.double() for k, v in state.items()}, strict=False)
        with torch.no_grad():
            return reference(**inputs).logits

    assert len(method.seen) == 3  # one micro-batch of three rows, then two of six
    for inputs, now, logged, rows in method.seen:
        values = []
        for row, number in enumerate(rows):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            task = number // 3
            if teacher == "previous":
                task = 0 if inputs is method.seen[0][0] else 1
            old, new = logits(after[task], one)[0], logits(now, one)[0]
            if kind == "llama":
                old, new = old[:-1], new[:-1]  # all tokens are labels: position t - 1 predicts t
            if loss == "mse":
                values += (new - old).square().mean(-1).tolist()
            else:
                p, q = F.log_softmax(old, -1), F.log_softmax(new, -1)
                values += (p.exp() * (p - q)).sum(-1).tolist()
        expected = 0.7 * sum(values) / len(values)
        assert logged == {"derpp/logits": pytest.approx(expected, rel=2e-5, abs=1e-7)}


def test_stored_rows_weigh_beta(tmp_path):
    """alpha = 0: what is left is the task loss on stored micro-batches times beta."""

    def learn(**options):
        model = tiny_model()
        method = DERPP(count=4, alpha=0.0, **options)
        for index in range(2):
            train_task(
                model, toy_rows(seed=index), [method], tmp_path / f"{options}{index}", optim="sgd",
                train_sampling_strategy="sequential",
            )  # fmt: skip
        return weights(model)

    whole, none = learn(beta=1.0), learn(beta=0.0)
    from hf_continual.methods.replay import Replay

    replayed = tiny_model()
    replay = Replay(count=4, mixing="alternate")
    for index in range(2):
        train_task(
            replayed, toy_rows(seed=index), [replay], tmp_path / f"r{index}", optim="sgd",
            train_sampling_strategy="sequential",
        )  # fmt: skip
    assert equal(whole, weights(replayed)) and not close(whole, none, 1e-4)


def test_state_round_trip_with_signals(tmp_path):
    method = DERPP(count=4)
    train_task(tiny_model(), toy_rows(), [method], tmp_path / "t")
    method.save(tmp_path / "s")
    again = DERPP(count=4)
    again.load(tmp_path / "s")
    assert again.buffer_.ids == method.buffer_.ids == again.buffer_.signals.ids
    for row in again.buffer_.ids:
        assert torch.equal(
            again.buffer_.signals.read(row).logits.values, method.buffer_.signals.read(row).logits.values
        )
    file = next((tmp_path / "s").rglob("000-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.unlink()  # a hard link: the others must stay as they are
    file.write_bytes(content)
    with pytest.raises(InputError, match=file.name):
        DERPP(count=4).load(tmp_path / "s")


def test_refuses_task_teachers_without_lora(tmp_path):
    with pytest.raises(InputError, match="teacher='tasks'"):
        train_task(tiny_model(), toy_rows(), [DERPP(teacher="tasks")], tmp_path)


@pytest.mark.parametrize("options", [{"alpha": -1}, {"beta": "x"}, {"loss": "l1"}])
def test_refuses_weights_that_cannot_be(options):
    with pytest.raises(InputError, match=next(iter(options))):
        DERPP(**options)


def test_cannot_be_combined_with_another_replay():
    from hf_continual.methods.base import MethodList

    with pytest.raises(InputError, match="replay"):
        MethodList(["derpp", "replay"])
