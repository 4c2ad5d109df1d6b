import copy
import json

import pytest
import torch
from contract import MethodContract
from naive_skills import NaiveSkills, StopAfter, assert_agrees, four_cases, orthogonality, soft
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer

from hf_continual.errors import InputError
from hf_continual.importance import normalise
from hf_continual.methods import kif
from hf_continual.methods.base import MethodList
from hf_continual.methods.kif import KIF
from hf_continual.testing import equal, tiny_model, toy_rows, train_task, weights
from hf_continual.units import SkillUnits


class TestKIF(MethodContract):
    method = "kif"


class TestKIFMatrix(MethodContract):
    method = {"name": "kif", "units": "matrix", "timing": "consistent"}
    kinds = ("t5",)


class TestKIFMemory(MethodContract):
    method = {"name": "kif", "replay_count": 4, "replay_learning_rate": 0.005}
    kinds = ("llama",)


def train(model, index, methods, folder, kind="llama", **options):
    rows = toy_rows(kind, rows=16, seed=index)
    return train_task(model, rows, methods, folder / f"t{index}", kind=kind, **{"num_train_epochs": 2, **options})


# -- the naive one -----------------------------------------------------------------------------------------------------

MODELS = [(kind, lora) for kind in ("llama", "t5", "roberta") for lora in (True, False)]


@pytest.mark.parametrize(("kind", "lora"), MODELS)
def test_three_tasks_agree_with_the_naive_one(kind, lora, tmp_path):
    scheme = "lora_rank1" if lora else "matrix"
    model, method, naive = tiny_model(kind, lora=lora), KIF(units=scheme), NaiveSkills(scheme, "mix", soft)
    for index in range(3):
        train(model, index, [method], tmp_path, kind, callbacks=[naive])
        assert naive.steps_seen == list(range(1, 8))
        assert_agrees(method, naive, model)


VARIANTS = {
    "temperature": ({"temperature": 0.1}, "lora_rank1", lambda now, before: soft(now, before, 0.1), {}),
    "categorical": ({"fusion": "categorical"}, "lora_rank1", four_cases, {}),
    "matrices of LoRA": ({"units": "lora_matrix", "order": "first"}, "lora_matrix", soft, {"order": "first"}),
    "consistent": ({"timing": "consistent"}, "lora_rank1", soft, {"timing": "consistent"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_agree_with_the_naive_one(variant, tmp_path):
    options, scheme, rule, changes = VARIANTS[variant]
    model, method = tiny_model(lora=True), KIF(**options)
    naive = NaiveSkills(scheme, coefficients=rule, **{"order": "mix", **changes})
    for index in range(2):
        train(model, index, [method], tmp_path, callbacks=[naive], max_grad_norm=0)
        assert_agrees(method, naive, model)


def test_accumulated_batches_count_as_one(tmp_path):
    found = []
    for size, accumulated in ((8, 1), (2, 4)):
        method, model = KIF(), tiny_model(lora=True)
        for index in range(2):
            train(model, index, [method], tmp_path, per_device_train_batch_size=size, optim="sgd",
                  gradient_accumulation_steps=accumulated, train_sampling_strategy="sequential")  # fmt: skip
        found.append(method)
    for name in ("raw_", "coefficients_"):
        ours, theirs = getattr(found[0], name), getattr(found[1], name)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.max()))


# -- the orthogonality loss --------------------------------------------------------------------------------------------


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry and "phase" not in entry]


@pytest.mark.parametrize("form", ["norm", "squared", "decorrelation"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_logged_orthogonality_equals_the_formula(form, kind, tmp_path):
    model, method = tiny_model(kind, lora=True), KIF(orthogonality=0.3, orthogonality_form=form)
    train(model, 0, [method], tmp_path, kind, num_train_epochs=1)  # B is zero before
    expected = 0.3 * orthogonality(model, form)
    again = KIF(orthogonality=0.3, orthogonality_form=form)
    trainer = train(model, 1, [again], tmp_path, kind, num_train_epochs=1, learning_rate=0.0)
    assert logged(trainer, "kif/orthogonality") == pytest.approx([expected] * 4, rel=1e-5)
    assert expected > 1e-3


def test_orthogonality_under_accumulation_and_mixed_ranks(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"layers.0.self_attn.q_proj": 2})
    model = get_peft_model(tiny_model(), config)
    train(model, 0, [KIF()], tmp_path, num_train_epochs=1)
    trainer = train(model, 1, [KIF()], tmp_path, num_train_epochs=1, learning_rate=0.0, per_device_train_batch_size=2,
                    gradient_accumulation_steps=2)  # fmt: skip
    assert logged(trainer, "kif/orthogonality") == pytest.approx([0.1 * orthogonality(model)] * 4, rel=1e-5)


@pytest.mark.parametrize("options", [{"orthogonality_form": "off"}, {"orthogonality": 0.0}], ids=str)
def test_no_orthogonality(options, tmp_path):
    plain, ours = tiny_model(lora=True), tiny_model(lora=True)
    train(plain, 0, None, tmp_path, trainer_class=Trainer)
    trainer = train(ours, 0, [KIF(**options)], tmp_path)
    assert not logged(trainer, "kif/orthogonality")
    assert equal(weights(plain), weights(ours))  # the first task is not merged


def test_orthogonality_is_in_the_training_loss_and_not_in_the_evaluation_loss(tmp_path):
    rows, losses = toy_rows(rows=4), []
    for strength in (0.0, 0.4):
        model = tiny_model(lora=True)
        train(model, 0, [KIF(orthogonality=0.0)], tmp_path)
        method = KIF(orthogonality=strength)
        trainer = train(model, 1, [method], tmp_path, learning_rate=0.0, max_steps=2)
        losses.append((trainer.evaluate(rows)["eval_loss"], logged(trainer, "loss")[0]))
    assert losses[0][0] == losses[1][0]
    assert losses[1][1] - losses[0][1] == pytest.approx(0.4 * orthogonality(model), rel=1e-3)


def test_orthogonality_brings_rows_to_length_one_and_apart(tmp_path):
    found = []
    for strength in (0.0, 5.0):
        model = tiny_model(lora=True)
        train(model, 0, [KIF(orthogonality=strength)], tmp_path, num_train_epochs=4)
        found.append(orthogonality(model))
    assert found[1] < 0.7 * found[0]


def test_gradient_of_the_norm_is_finite_at_orthogonal_matrices():
    eye = torch.eye(3).unsqueeze(0).requires_grad_()
    kif.orthogonality(eye).sum().backward()
    assert torch.isfinite(eye.grad).all()


def test_orthogonality_is_absent_from_the_replay_phase(tmp_path):
    model, method = tiny_model(lora=True), KIF(replay_count=4)
    for index in range(2):
        trainer = train(model, index, [method], tmp_path)
    phase = [entry for entry in trainer.state.log_history if "phase" in entry]
    assert phase and not any("kif/orthogonality" in entry for entry in phase)


# -- beside other methods ----------------------------------------------------------------------------------------------

STACKS = {
    "migu": ["kif", {"name": "migu", "threshold": 0.5}],
    "olora": ["olora", "kif"],
    "replay": ["kif", {"name": "replay", "count": 4}],
    "migu and replay": ["kif", {"name": "migu", "threshold": 0.5}, {"name": "replay", "count": 4}],
    "kif before olora": ["kif", "olora"],
    "its memory": [{"name": "kif", "replay_count": 4, "fusion": "categorical"}],
}


@pytest.mark.parametrize(
    "stack",
    [
        *(name for name in STACKS if name != "kif before olora"),
        "kif before olora",
    ],
)
def test_stacks_train_and_resume(stack, tmp_path):
    def task(model, methods, **options):
        options = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 2, **options}
        return train(model, 1, methods, tmp_path, **options)

    model, methods = tiny_model(lora=True), MethodList(copy.deepcopy(STACKS[stack]))
    train(model, 0, methods, tmp_path, num_train_epochs=1)
    methods.save(tmp_path / "state")
    copies = [copy.deepcopy(model) for _ in range(2)]
    trainer = task(model, methods)
    assert all(torch.isfinite(torch.tensor(logged(trainer, "loss"))))
    again = MethodList(copy.deepcopy(STACKS[stack]))
    again.load(tmp_path / "state")
    task(copies[0], again, callbacks=[StopAfter(2)])
    again = MethodList(copy.deepcopy(STACKS[stack]))
    again.load(tmp_path / "state")
    task(copies[1], again, resume=str(tmp_path / "t1" / "checkpoint-2"))
    assert equal(weights(copies[1]), weights(model)) and not equal(weights(copies[0]), weights(model))
    ours, theirs = (next(m for m in made if m.name == "kif") for made in (methods, again))
    for name in ("raw_", "cumulative_", "coefficients_"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_migu_changes_the_importance(tmp_path):
    found = []
    for stack in (["kif"], STACKS["migu"]):
        methods = MethodList(copy.deepcopy(stack))
        model = tiny_model(lora=True)
        for index in range(2):
            train(model, index, methods, tmp_path, num_train_epochs=1)
        found.append(methods[0].raw_)
    assert not torch.equal(*found)  # it scores the gradients as they were applied


def test_units_keep_their_keys_when_olora_adds_adapters(tmp_path):
    model, methods = tiny_model(lora=True), MethodList(["olora", "kif"])
    keys = []
    for index in range(2):
        train(model, index, methods, tmp_path, num_train_epochs=1)
        keys.append(methods[1].unit_keys_)
    assert keys[0] == keys[1] == SkillUnits.of_model(tiny_model(lora=True), "lora_rank1").keys


PAIRS = [("kif", "olora"), ("kif", "inclora"), ("tasl", "inclora"), ("fisher_merge", "inclora"),
         ("weight_ema", "inclora"), ("migu", "olora")]  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_both_orders_of_a_pair_learn_the_same(pair, tmp_path):
    found = []
    for order in (pair, pair[::-1]):
        model, methods = tiny_model(lora=True), MethodList(order)
        train(model, 0, methods, tmp_path, num_train_epochs=1)
        before = weights(model)
        train(model, 1, methods, tmp_path, num_train_epochs=1)
        after = weights(model)
        assert all(torch.equal(after[name], before[name]) for name in before)  # the first adapter is frozen
        assert all(value.any() for name, value in after.items() if ".lora_B.task1." in name)
        found.append(after)
    assert len(found[0]) > len(before) and equal(*found)


@pytest.mark.parametrize("order", [["migu", "olora"], ["olora", "migu"]], ids="-".join)
def test_migu_masks_the_new_adapter_in_either_order(order, tmp_path):
    model, methods = tiny_model(lora=True), MethodList(order)
    for index in range(2):
        train(model, index, methods, tmp_path, num_train_epochs=1)
    ranked = [name for name in methods[order.index("migu")].top_rows_ if ".lora_A." in name]
    assert len(ranked) == 4 and all(name.endswith(".lora_A.task1") for name in ranked)


# -- beside weights that are learnt in full ----------------------------------------------------------------------------


def learn_beside(kind, folder, **options):
    targets = {"llama": ["q_proj", "v_proj"], "roberta": ["query", "value"]}[kind]
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(kind), LoraConfig(r=4, target_modules=targets, **options))
    method = KIF()
    for index in range(2):
        train(model, index, [method], folder, kind)
    return method, [i for i, key in enumerate(method.unit_keys_) if key.endswith("]")]


@pytest.mark.parametrize(
    ("kind", "options"), [("llama", {"modules_to_save": ["lm_head"]}), ("roberta", {"task_type": "SEQ_CLS"})]
)
def test_rank1_units_stay_apart_beside_weights_learnt_in_full(kind, options, tmp_path):
    method, ranks = learn_beside(kind, tmp_path, **options)
    assert 0 < len(ranks) < len(method.unit_keys_)
    for scores in (method.raw_, method.before_):
        spread = normalise(scores)[ranks]
        assert float(spread.max()) > 0.5 and float(spread.std()) > 0.05
    assert float((method.coefficients_[ranks] - 0.5).abs().max()) > 0.1


# -- state -------------------------------------------------------------------------------------------------------------


def test_state_files(tmp_path):
    model, method = tiny_model(lora=True), KIF(temperature=0.2, replay_count=3)
    for index in range(2):
        train(model, index, [method], tmp_path)
    method.save(tmp_path / "state")
    record = json.loads((tmp_path / "state" / "kif.json").read_text())
    tensors = load_file(str(tmp_path / "state" / "kif.safetensors"))
    assert record["options"] == method.options() and record["options"]["temperature"] == 0.2
    assert record["state"]["unit_keys_"]["value"][0].endswith("layers.0.self_attn.q_proj[0]")
    assert {name: t.shape for name, t in tensors.items()} == {
        name: (16,) for name in ("raw_", "before_", "cumulative_", "coefficients_")
    }
    again = KIF(replay_count=3)
    again.load(tmp_path / "state")
    assert again.buffer_.to_dict() == method.buffer_.to_dict() and len(again.buffer_) == 6
    assert again.shares_ == method.shares_ and again.tasks_done_ == 2


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", ["lora_rank1", "lora_matrix"])
def test_refuses_a_model_without_lora(units, tmp_path):
    with pytest.raises(InputError, match="method 'kif' needs LoRA adapters and this model has none"):
        train(tiny_model(), 0, [KIF(units=units)], tmp_path)


def test_refuses_a_second_method_that_merges():
    with pytest.raises(InputError, match="methods 'kif' and 'tasl' cannot be combined: both have the role 'merge'"):
        MethodList(["kif", "tasl"])


def test_refuses_a_changed_rank_and_names_the_key(tmp_path):
    method = KIF()
    train(tiny_model(lora=True, rank=2), 0, [method], tmp_path)
    with pytest.raises(InputError, match=r"method 'kif': the task before 'task1'.*q_proj\[2\]' is missing there"):
        train(tiny_model(lora=True, rank=4), 1, [method], tmp_path)


def test_accepts_another_rank_of_an_adapter_that_does_not_learn(tmp_path):
    model = tiny_model(lora=True)
    model.add_adapter("old", LoraConfig(r=7, target_modules=["q_proj"]))
    model.set_adapter("default")
    method = KIF()
    for index in range(2):
        train(model, index, [method], tmp_path)
    assert method.unit_keys_ == SkillUnits.of_model(tiny_model(lora=True), "lora_rank1").keys


def test_refuses_other_columns_before_training(tmp_path):
    model, method = tiny_model(lora=True), KIF(replay_count=4)
    train(model, 0, [method], tmp_path)
    before = weights(model)
    rows = toy_rows(seed=1).add_column("further", list(range(16)))
    with pytest.raises(InputError, match=r"method 'kif': task 'task1' has the columns .*'further'.* and the buffer"):
        train_task(model, rows, [method], tmp_path / "t1")
    assert equal(weights(model), before) and len(method.buffer_) == 4 and method.tasks_done_ == 1


@pytest.mark.parametrize("first", ["replay", "kif"])
def test_the_buffer_holds_no_rows_that_replay_has_mixed_in(first, tmp_path):
    methods = [{"name": "replay", "ratio": 1.0}, {"name": "kif", "replay_count": 16}]
    methods = MethodList(methods if first == "replay" else methods[::-1])
    model = tiny_model(lora=True)
    for index in range(2):
        train(model, index, methods, tmp_path, num_train_epochs=1)
    kept = next(m for m in methods if m.name == "kif").buffer_["input_ids"]
    assert list(kept) == [row for i in range(2) for row in toy_rows(rows=16, seed=i)["input_ids"]]


def test_refuses_too_few_steps(tmp_path):
    with pytest.raises(InputError, match=r"method 'kif': task 'task0' has 1 optimizer step\(s\)"):
        train(tiny_model(lora=True), 0, [KIF()], tmp_path, max_steps=1)


@pytest.mark.parametrize("method", [{"name": "kif"}, {"name": "kif", "units": "matrix"}])
def test_refuses_dora(method, tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(InputError, match="DoRA"):
        train(model, 0, [method], tmp_path)


@pytest.mark.parametrize(
    ("option", "value"),
    [("fusion", "hard"), ("temperature", 0), ("temperature", -1.0), ("temperature", float("nan")),
     ("temperature", "warm"), ("temperature", float("inf")), ("temperature", True), ("orthogonality", -0.1),
     ("orthogonality", float("inf")), ("orthogonality", "much"), ("orthogonality_form", "trace"), ("units", "rows")],
)  # fmt: skip
def test_refuses_options_that_cannot_be(option, value):
    with pytest.raises(InputError, match=rf"method 'kif'.*{option}"):
        KIF(**{option: value})
