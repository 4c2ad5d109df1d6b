import gc
import weakref

import pytest
import torch
from contract import MethodContract
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from hf_continual.errors import InputError
from hf_continual.methods.base import make_method
from hf_continual.methods.migu import MIGU, MIGUConfig, keep_mask, magnitude_of
from hf_continual.testing import (
    LORA_TARGETS,
    MODELS,
    check_method,
    close,
    equal,
    hook_count,
    tiny_model,
    toy_rows,
    train_task,
    weights,
)
from hf_continual.trainer import ContinualTrainer


class TestMIGU(MethodContract):
    method = {"name": "migu", "threshold": 0.5}
    kinds = MODELS


EVERY_OPTION = {
    "name": "migu",
    "threshold": 0.3,
    "skip_first_task": False,
    "ignore_padding": True,
    "select": "topk",
    "mask": "update",
    "mask_bias": True,
    "lora_b_stat": "x_B",
    "normalize_tokens": True,
    "include_lm_head": True,
}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_contract_with_every_option(kind):
    failed = [f"{r.model}: {r.name}: {r.detail}" for r in check_method(EVERY_OPTION, kinds=(kind,)) if not r.passed]
    assert not failed, "\n".join(failed)


# -- the equations -----------------------------------------------------------------------------------------------------


def quantile_by_hand(values, q):
    """Order statistics with linear interpolation, in double precision."""
    ordered = sorted(float(v) for v in values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def test_keep_mask_by_hand():
    magnitude = torch.tensor([4.0, 1.0, 3.0, 2.0])
    assert keep_mask(magnitude, 0.5).tolist() == [True, False, True, False]  # quantile 2.5
    assert keep_mask(magnitude, 1 / 3).tolist() == [True, False, True, True]  # quantile 2.0, kept by >=
    assert keep_mask(magnitude, 0.0).tolist() == [True] * 4
    assert keep_mask(torch.ones(5), 0.7).all()  # ties at the quantile are kept
    assert keep_mask(magnitude, 0.7).dtype == torch.bool


@pytest.mark.parametrize(
    ("width", "threshold", "quantile", "topk"),
    [
        (8, 0.05, 7, 8),
        (1024, 0.05, 972, 973),
        (4096, 0.05, 3891, 3892),
        (8, 0.4, 5, 5),
        (1024, 0.4, 614, 615),
        (4096, 0.4, 2458, 2458),
        (8, 0.7, 3, 3),
        (1024, 0.7, 307, 308),
        (4096, 0.7, 1229, 1229),
        (8, 0.95, 1, 1),
        (1024, 0.95, 52, 52),
        (4096, 0.95, 205, 205),
    ],
)
def test_rows_kept_of_a_width(width, threshold, quantile, topk):
    magnitude = torch.rand(width, generator=torch.Generator().manual_seed(0))
    assert int(keep_mask(magnitude, threshold).sum()) == quantile
    assert int(keep_mask(magnitude, threshold, select="topk").sum()) == topk
    mask = keep_mask(magnitude, threshold, select="topk")
    dropped = magnitude[~mask].tolist() or [0.0]
    assert float(magnitude[mask].min()) >= max(dropped)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.4, 0.7, 0.95])
@pytest.mark.parametrize("ties", [False, True])
def test_keep_mask_equals_a_naive_one_and_is_the_same_batched(threshold, ties):
    magnitude = torch.rand(6, 37, generator=torch.Generator().manual_seed(1))
    if ties:
        magnitude = (magnitude * 4).round()
    batched = keep_mask(magnitude, threshold)
    for row, mask in zip(magnitude, batched, strict=True):
        border = quantile_by_hand(row, threshold)
        expected = [float(v) >= border or abs(float(v) - border) < 1e-6 for v in row]
        assert mask.tolist() == expected == keep_mask(row, threshold).tolist()


@pytest.mark.parametrize(("threshold", "width", "kept"), [(0.29, 100, 71), (0.57, 100, 43), (0.7, 10, 3)])
def test_topk_counts_as_the_formula_says(threshold, width, kept):
    assert int(keep_mask(torch.rand(width), threshold, select="topk").sum()) == kept  # d - floor(T d)


def test_topk_breaks_ties_by_position():
    assert keep_mask(torch.tensor([1.0, 1.0, 1.0, 1.0]), 0.5, select="topk").tolist() == [True, True, False, False]


def test_magnitude_by_hand():
    output = torch.tensor([[[1.0, -2.0], [3.0, 0.0]], [[-1.0, 1.0], [0.5, 0.5]]])  # 2 samples, 2 tokens, 2 rows
    assert magnitude_of(output).tolist() == [5.5, 3.5]
    assert magnitude_of(output, weights=torch.tensor([1, 0, 1, 0])).tolist() == [2.0, 3.0]
    torch.testing.assert_close(
        magnitude_of(output, normalize=True), torch.tensor([1 / 3 + 1 + 0.5 + 0.5, 2 / 3 + 0.5 + 0.5])
    )
    assert magnitude_of(output.bfloat16()).dtype == torch.float32
    large = torch.randn(1000, 600)  # more than one chunk
    torch.testing.assert_close(magnitude_of(large), large.double().abs().sum(0).float(), rtol=1e-5, atol=0)


# -- what training does ------------------------------------------------------------------------------------------------


class Recorder:
    """Independent of the package's taps: sums |h| of chosen modules over each optimizer step, with plain hooks."""

    def __init__(self, model, pairs):
        self.sums, self.handles, self.open = {}, [], True
        for weight, module in pairs.items():
            self.handles.append(module.register_forward_hook(self._hook(weight)))

    def _hook(self, weight):
        def hook(module, args, output):
            if torch.is_grad_enabled() and module.training:
                rows = output.detach().double().abs().reshape(-1, output.shape[-1]).sum(0)
                self.sums[weight] = self.sums.get(weight, 0) + rows

        return hook


def linear_pairs(model, kind, lora):
    """weight name -> module whose output ranks its rows."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    pairs = {}
    for name, module in model.named_modules():
        if lora and hasattr(module, "lora_A") and len(module.lora_A):
            pairs[f"{name}.lora_A.default.weight"] = module.lora_A["default"]
            pairs[f"{name}.lora_B.default.weight"] = module
        elif not lora and isinstance(module, nn.Linear) and module is not head:
            pairs[f"{name}.weight"] = module
    return pairs


def spy_on_seam(monkeypatch):
    """Gradients before and after the edits of every optimizer step."""
    steps = []

    original = MIGU.edit_gradients

    def edit(self, ctx, grads):
        before = {n: p.grad.clone() for n, p in ctx.model.named_parameters() if p.grad is not None}
        original(self, ctx, grads)
        after = {n: p.grad.clone() for n, p in ctx.model.named_parameters() if p.grad is not None}
        steps.append((before, after))

    monkeypatch.setattr(MIGU, "edit_gradients", edit)
    return steps


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("kind", ["llama", "t5", "roberta"])
def test_gradients_of_masked_rows_are_zero_and_others_untouched(kind, lora, monkeypatch, tmp_path):
    model, method = tiny_model(kind, lora=lora), MIGU(threshold=0.6)
    train_task(model, toy_rows(kind), [method], tmp_path / "0", kind=kind)
    pairs = linear_pairs(model, kind, lora)
    steps = spy_on_seam(monkeypatch)
    recorder = Recorder(model, pairs)
    wanted = []

    class Collect(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            wanted.append(dict(recorder.sums))
            recorder.sums.clear()

    train_task(
        model,
        toy_rows(kind, seed=1),
        [method],
        tmp_path / "1",
        kind=kind,
        callbacks=[Collect()],
        gradient_accumulation_steps=2,
        max_grad_norm=1e-3,
    )
    assert len(steps) == len(wanted) == 2
    for (before, after), sums in zip(steps, wanted, strict=True):
        assert sums.keys() == pairs.keys() and pairs
        for name, gradient in before.items():
            if name not in sums:
                assert torch.equal(gradient, after[name]), f"{name} is no target and was edited"
                continue
            border = quantile_by_hand(sums[name], 0.6)
            keep = torch.tensor([float(v) >= border * (1 - 1e-6) for v in sums[name]])
            assert torch.equal(after[name][keep], gradient[keep])
            assert not after[name][~keep].any() and (~keep).any()


def test_first_task_is_learnt_without_a_mask_unless_asked(tmp_path):
    plain = tiny_model()
    train_task(plain, toy_rows(), [], tmp_path / "a")
    skipped = tiny_model()
    train_task(skipped, toy_rows(), [MIGU()], tmp_path / "b")
    masked = tiny_model()
    train_task(masked, toy_rows(), [MIGU(skip_first_task=False)], tmp_path / "c")
    assert equal(weights(plain), weights(skipped))
    assert not equal(weights(plain), weights(masked))


def test_clipping_sees_the_masked_norm(monkeypatch, tmp_path):
    steps = spy_on_seam(monkeypatch)
    method = MIGU(threshold=0.9, skip_first_task=False)
    trainer = train_task(tiny_model(), toy_rows(), [method], tmp_path, max_steps=1)
    before, after = (sum(float(g.double().pow(2).sum()) for g in grads.values()) ** 0.5 for grads in steps[0])
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(after, rel=1e-5)
    assert after < 0.99 * before


def test_adamw_moves_masked_rows_but_not_in_update_mode(tmp_path):
    """Zero gradient is not a frozen row: momentum and weight decay move it."""
    moved = {}
    for mask in ("gradient", "update"):
        model, method = tiny_model(), MIGU(threshold=0.5, mask=mask)
        train_task(model, toy_rows(), [method], tmp_path / f"{mask}0")
        before, masks = weights(model), []

        class Keep(TrainerCallback):
            def on_optimizer_step(self, args, state, control, masks=masks, method=method, **kwargs):
                masks.append(
                    {t.weight: f.clone() for t, f in ((t, method._factor_views[t.weight]) for t in method._targets)}
                )

        train_task(model, toy_rows(seed=1), [method], tmp_path / f"{mask}1", callbacks=[Keep()], weight_decay=0.1)
        after, moved[mask] = weights(model), 0.0
        for name in masks[0]:
            never = torch.stack([m[name] for m in masks]).sum(0).squeeze(1) == 0
            moved[mask] = max(
                moved[mask], float((after[name] - before[name])[never].abs().max()) if never.any() else 0.0
            )
    assert moved["gradient"] > 1e-5
    assert moved["update"] == 0.0


def test_one_mask_per_step_over_all_micro_batches(tmp_path):
    """Accumulated 4x2 equals 8x1 in step scope; in micro-batch scope it need not."""
    results = {}
    for scope in ("step", "micro_batch"):
        for batch, accumulation in ((8, 1), (2, 4)):
            model, method = tiny_model(), MIGU(threshold=0.5, scope=scope, skip_first_task=False)
            train_task(
                model,
                toy_rows(),
                [method],
                tmp_path / f"{scope}{batch}",
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                train_sampling_strategy="sequential",
                optim="sgd",
                learning_rate=0.1,
            )
            results[scope, batch] = weights(model)
    assert close(results["step", 8], results["step", 2], 1e-4)
    assert equal(results["step", 8], results["micro_batch", 8])
    assert not close(results["micro_batch", 8], results["micro_batch", 2], 1e-3)


def test_micro_batch_gradients_are_masked_before_they_add_up(tmp_path):
    """By hand: the sum of each micro-batch's own masked gradient."""
    model = tiny_model()
    rows = toy_rows(rows=4)
    layer, name = model.model.layers[0].mlp.up_proj, "model.layers.0.mlp.up_proj.weight"
    expected = torch.zeros_like(layer.weight)
    for part in (slice(0, 2), slice(2, 4)):
        outputs = []
        handle = layer.register_forward_hook(lambda m, a, o, outputs=outputs: outputs.append(o.detach()))
        batch = {k: torch.tensor(v) for k, v in rows[part].items()}
        model(**batch, num_items_in_batch=torch.tensor(36)).loss.backward()
        handle.remove()
        expected += layer.weight.grad * keep_mask(magnitude_of(outputs[0]), 0.5)[:, None]
        model.zero_grad()
    before = layer.weight.detach().clone()
    method = MIGU(threshold=0.5, scope="micro_batch", skip_first_task=False, targets="up_proj")
    train_task(
        model,
        rows,
        [method],
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        optim="sgd",
        train_sampling_strategy="sequential",
        learning_rate=1.0,
        max_grad_norm=0.0,
    )
    torch.testing.assert_close(before - dict(model.named_parameters())[name].detach(), expected, rtol=1e-4, atol=1e-7)


def padded(kind):
    """The rows of `toy_rows`, once as they are and once with padding of random tokens that is masked out."""
    rows = toy_rows(kind, rows=8).to_dict()
    wide = {k: [list(v) if isinstance(v, list) else v for v in column] for k, column in rows.items()}
    for i in range(8):
        wide["input_ids"][i] += [0] * 6
        wide["attention_mask"][i] += [0] * 6
        if kind != "roberta":
            wide["labels"][i] += [-100] * (6 if kind == "llama" else 4)
    import datasets

    return datasets.Dataset.from_dict(rows), datasets.Dataset.from_dict(wide)


@pytest.mark.parametrize("kind", ["llama", "t5", "roberta"])
def test_ignore_padding(kind, tmp_path):
    plain, wide = padded(kind)
    masks = {}
    for ignore in (True, False):
        for label, rows in (("plain", plain), ("wide", wide)):
            model = tiny_model(kind)
            method = MIGU(threshold=0.5, ignore_padding=ignore, skip_first_task=False)
            train_task(
                model,
                rows,
                [method],
                tmp_path / f"{ignore}{label}",
                kind=kind,
                max_steps=1,
                train_sampling_strategy="sequential",
            )
            masks[ignore, label] = method.updates_.clone()
    assert torch.equal(masks[True, "plain"], masks[True, "wide"])
    assert torch.equal(masks[True, "plain"], masks[False, "plain"])
    assert not torch.equal(masks[False, "plain"], masks[False, "wide"])


def test_lora_rows_of_a_by_x_a_and_of_b_by_x_o_with_two_adapters(monkeypatch, tmp_path):
    model, methods = tiny_model(lora=True), [make_method("inclora"), MIGU(threshold=0.5)]
    train_task(model, toy_rows(), methods, tmp_path / "0")
    layers, pairs = [], {}
    original = type(methods[0]).on_task_begin

    def begin(self, ctx):
        original(self, ctx)
        if not ctx.task.is_first:
            for name, module in ctx.model.named_modules():
                if hasattr(module, "lora_A"):
                    layers.append(name)
                    pairs[f"{name}.lora_A.task1.weight"] = module.lora_A["task1"]
                    pairs[f"{name}.lora_B.task1.weight"] = module
            self.recorder = Recorder(ctx.model, pairs)

    monkeypatch.setattr(type(methods[0]), "on_task_begin", begin)
    steps = spy_on_seam(monkeypatch)
    train_task(model, toy_rows(seed=1), methods, tmp_path / "1", max_steps=1)
    before, after = steps[0]
    assert set(before) == set(pairs) and len(layers) == 4
    for name, sums in methods[0].recorder.sums.items():
        keep = sums >= quantile_by_hand(sums, 0.5) * (1 - 1e-6)
        assert torch.equal(after[name][keep], before[name][keep]) and not after[name][~keep].any()


def test_lm_head_is_left_out_unless_asked(tmp_path):
    for include in (False, True):
        model = tiny_model()
        method = MIGU(threshold=0.9, include_lm_head=include, skip_first_task=False)
        trainer = ContinualTrainer(model, train_task(tiny_model(), toy_rows(), [], tmp_path).args, methods=[method])
        method.on_task_begin(trainer._make_context())
        names = {t.weight for t in method._targets}
        assert ("lm_head.weight" in names) is include and len(names) == 14 + include


def test_a_tied_lm_head_is_masked_when_asked(tmp_path):
    model = tiny_model("t5")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.shared.weight
    before = weights(model)
    method = MIGU(threshold=0.5, targets="lm_head", include_lm_head=True, skip_first_task=False)
    train_task(
        model,
        toy_rows("t5", rows=64, length=30),
        [method],
        tmp_path,
        kind="t5",
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        per_device_train_batch_size=64,
    )
    still = (weights(model)["shared.weight"] == before["shared.weight"]).all(1)
    assert int(still.sum()) == 48  # half of the 96 rows, though every token occurs


def test_two_learning_adapters_of_one_layer_are_both_masked(tmp_path):
    model = tiny_model(lora=True)
    model.add_adapter("second", LoraConfig(r=4, target_modules=LORA_TARGETS["llama"]))
    model.base_model.set_adapter(["default", "second"])
    method = MIGU(threshold=0.5, skip_first_task=False)
    train_task(model, toy_rows(), [method], tmp_path, max_steps=1)
    assert len(method.top_rows_) and float(method.updates_.mean()) == 0.5


def test_every_process_needs_the_same_mask(tmp_path):
    method = MIGU(sync=False, skip_first_task=False)
    trainer = ContinualTrainer(tiny_model(), train_task(tiny_model(), toy_rows(), [], tmp_path).args, methods=[method])
    trainer.dist.world_size = 2
    with pytest.raises(InputError, match="sync=False"):
        method.on_task_begin(trainer._make_context())


def test_targets_regex_and_bias(tmp_path):
    model = tiny_model("bert")
    method = MIGU(threshold=0.5, targets=r"attention\.self\.query", mask_bias=True, skip_first_task=False)
    before = weights(model)
    train_task(model, toy_rows("bert"), [method], tmp_path, kind="bert", max_steps=1, optim="sgd", learning_rate=1.0)
    after = weights(model)
    bias = "bert.encoder.layer.0.attention.self.query.bias"
    weight = bias.replace("bias", "weight")
    still = (after[weight] == before[weight]).all(1)
    assert 0 < int(still.sum()) < len(still)
    assert torch.equal(after[bias][still], before[bias][still]) and not torch.equal(after[bias], before[bias])
    other = weight.replace("query", "key")
    assert not (after[other] == before[other]).all(1).any()


def test_conv1d_rows_are_columns(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    method = MIGU(threshold=0.5, targets="c_fc", skip_first_task=False)
    before = weights(model)
    train_task(model, toy_rows(), [method], tmp_path, max_steps=1, optim="sgd", learning_rate=1.0)
    weight = "transformer.h.0.mlp.c_fc.weight"
    still = (weights(model)[weight] == before[weight]).all(0)
    assert int(still.sum()) == 32 and len(still) == 64


def test_the_same_masks_with_gradient_checkpointing(tmp_path):
    usage = []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ):
        model = tiny_model(lora=True)
        if options:
            model.enable_input_require_grads()
        method = MIGU(threshold=0.5, skip_first_task=False)
        train_task(model, toy_rows(), [method], tmp_path / str(len(usage)), **options)
        usage.append(method.updates_.clone())
    assert torch.equal(usage[0], usage[1]) and torch.equal(usage[0], usage[2])


def test_evaluation_during_training_is_not_counted(tmp_path):
    usage = []
    for evaluate in (False, True):
        model, method = tiny_model(), MIGU(threshold=0.5, skip_first_task=False)
        args = train_task(tiny_model(), toy_rows(), [], tmp_path, num_train_epochs=2, eval_strategy="no").args
        if evaluate:
            args.eval_strategy, args.eval_steps = "steps", 1
        from transformers.trainer_utils import IntervalStrategy

        args.eval_strategy = IntervalStrategy("steps" if evaluate else "no")
        torch.manual_seed(0)
        trainer = ContinualTrainer(
            model, args, train_dataset=toy_rows(), eval_dataset=toy_rows(seed=5), methods=[method]
        )
        trainer.train()
        usage.append(method.updates_.clone())
    assert torch.equal(*usage)


def test_no_activation_outlives_the_step(tmp_path):
    model, method = tiny_model(), MIGU(threshold=0.5, skip_first_task=False)
    alive = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, a, o: alive.append(weakref.ref(o)))
    left = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            gc.collect()
            left.append(sum(r() is not None for r in alive))

    train_task(model, toy_rows(), [method], tmp_path, callbacks=[Look()])
    assert alive and left == [0] * len(left)


def test_memory_is_a_few_times_the_output_widths(tmp_path):
    model, method = tiny_model(), MIGU(skip_first_task=False)
    sizes = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            tensors = [v for v in vars(method).values() if torch.is_tensor(v)]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
            sizes.append((sum(storages.values()), sum(t.rows for t in method._targets)))

    train_task(model, toy_rows(), [method], tmp_path, callbacks=[Look()], max_steps=1)
    used, widths = sizes[0]
    assert used <= 4 * 4 * widths  # at most four fp32 numbers an output row


def test_thresholds_are_found_in_one_call_per_width(monkeypatch, tmp_path):
    calls = []
    original = torch.quantile
    monkeypatch.setattr(torch, "quantile", lambda x, *a, **k: calls.append(x.shape) or original(x, *a, **k))
    model, method = tiny_model(), MIGU(skip_first_task=False)
    train_task(model, toy_rows(), [method], tmp_path, max_steps=1)
    assert sorted(shape[-1] for shape in calls) == [16, 32, 48]  # 14 layers, three widths


def test_bf16_model_trains_with_masks(tmp_path):
    model, method = tiny_model().bfloat16(), MIGU(threshold=0.5, skip_first_task=False)
    before = weights(model)
    train_task(model, toy_rows(), [method], tmp_path, max_steps=1, optim="sgd", learning_rate=1.0)
    name = "model.layers.0.mlp.up_proj.weight"
    still = (weights(model)[name] == before[name]).all(1)
    assert int(still.sum()) == 24  # half of 48 rows


def test_overlap_of_tasks_is_reported(tmp_path):
    model, method = tiny_model(), MIGU(threshold=0.5)
    for i in range(3):
        train_task(model, toy_rows(seed=i), [method], tmp_path / str(i))
    assert len(method.overlap_) == 14 and all(0 <= v <= 1 for v in method.overlap_.values())
    assert 0 <= method.never_updated_ < 1 and hook_count(model) == 0


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [1.0, -0.1, 1.5, float("nan"), "0.7", True, None])
def test_threshold_outside_its_range_is_refused(threshold):
    with pytest.raises(InputError, match=r"threshold=.*\[0, 1\)"):
        MIGU(threshold=threshold)


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "epoch"},
        {"select": "best"},
        {"mask": "all"},
        {"lora_b_stat": "x"},
        {"targets": "("},
        {"scope": "micro_batch", "mask": "update"},
    ],
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(InputError, match="migu"):
        MIGUConfig(**options)


def test_unknown_option_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'threshold'"):
        make_method({"name": "migu", "treshold": 0.5})


def test_a_model_without_linear_layers_is_refused(tmp_path):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(96, 3)

        def forward(self, input_ids, labels=None, attention_mask=None):
            return {"loss": self.table(input_ids).pow(2).mean()}

    with pytest.raises(InputError, match="no Linear layer"):
        train_task(Table(), toy_rows(), [MIGU()], tmp_path)
    with pytest.raises(InputError, match="targets='nowhere'"):
        train_task(tiny_model(), toy_rows(), [MIGU(targets="nowhere")], tmp_path)


def test_fully_trained_heads_beside_lora_are_not_masked(tmp_path):
    config = LoraConfig(r=2, target_modules=LORA_TARGETS["bert"], modules_to_save=["classifier"])
    model, method = get_peft_model(tiny_model("bert"), config), MIGU(threshold=0.5, skip_first_task=False)
    before = weights(model)
    trainer = train_task(model, toy_rows("bert"), [method], tmp_path, kind="bert", max_steps=1)
    method.on_task_begin(trainer.ctx)
    assert method._targets and not [t.weight for t in method._targets if "classifier" in t.weight]
    head = "base_model.model.classifier.modules_to_save.default.weight"
    assert (weights(model)[head] != before[head]).all()
