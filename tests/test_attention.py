import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_continual.attention as attention
from hf_continual.attention import (
    KWARG,
    Capture,
    Change,
    Distil,
    LayerTarget,
    Sensitivity,
    attention_kl,
    head_sensitivity,
    refuse_reentrant,
    select_heads,
)
from hf_continual.errors import InputError
from hf_continual.taps import AttentionTap
from hf_continual.testing import tiny_model

LLAMA_LIKE = {"num_key_value_heads": 2, "max_position_embeddings": 64}
OPTIONS = {
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 8},
    "mistral": {**LLAMA_LIKE, "sliding_window": 4},
    "gemma2": {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "n_inner": 48},
    "gpt_neox": {"max_position_embeddings": 64},
    "bert": {"max_position_embeddings": 64},
    "roberta": {"max_position_embeddings": 64},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "decoder_start_token_id": 2,
    },
}
SEQ2SEQ, ENCODERS = ("t5", "bart"), ("bert", "roberta")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS, LENGTH, ANSWER = 4, 9, 5


def build(kind, seed=0, **options):
    torch.manual_seed(seed)
    own = {} if kind in (*SEQ2SEQ, "gpt2") else SMALL
    tokens = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **{**own, **tokens, **OPTIONS[kind], **options})
    auto = AutoModelForSeq2SeqLM if kind in SEQ2SEQ else AutoModelForCausalLM
    model = (AutoModelForSequenceClassification if kind in ENCODERS else auto).from_config(config)
    with torch.no_grad():  # maps of freshly initialised models are nearly uniform
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and kind != "t5" or "bias" in name:
                parameter.normal_(std=0.2)
    return model.eval()


def batch(kind, padding="left", seed=1, size=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (size, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :3], mask[1, :1] = 0, 0
    elif padding == "right":
        mask[0, -3:], mask[1, -1:] = 0, 0
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    if kind in SEQ2SEQ:
        inputs["labels"] = torch.randint(3, 96, (size, ANSWER), generator=generator)
    elif kind in ENCODERS:
        inputs["labels"] = torch.arange(size) % 2
    else:
        # nothing is learnt from a row of padding, where eager and sdpa differ: not the first real token either
        learnt = mask.bool() & mask.roll(1, 1).bool() if padding == "left" else mask.bool()
        inputs["labels"] = ids.masked_fill(~learnt, -100)
    return inputs


def widths(tap, name):
    return tuple(LENGTH if side == "input" else ANSWER for side in tap.sides[name])


def all_rows(tap, inputs, names=None, heads=None):
    """All heads and all real rows of every module."""
    mask, targets = inputs["attention_mask"].bool(), {}
    for name in names or tap.names:
        size, rows = len(mask), torch.arange(widths(tap, name)[0]).expand(len(mask), -1)
        chosen = torch.as_tensor(heads if heads is not None else range(HEADS)).expand(size, -1)
        real = mask if tap.sides[name][0] == "input" else torch.ones_like(rows).bool()
        targets[name] = LayerTarget(None, chosen, torch.ones_like(chosen).bool(), rows, real)
    return targets


def some_rows(tap, inputs, seed=2):
    """Random heads and rows of some samples, with padding in both."""
    generator, targets = torch.Generator().manual_seed(seed), {}
    for name in tap.names:
        chosen = torch.stack([torch.randperm(HEADS, generator=generator)[:2] for _ in range(2)])
        samples = torch.tensor([2, 0])
        width = widths(tap, name)[0]
        rows = torch.stack([torch.randperm(width, generator=generator)[:4] for _ in range(2)])
        real = torch.ones_like(rows).bool()
        if tap.sides[name][0] == "input":
            real = inputs["attention_mask"].bool()[samples[:, None], rows]
        real[0, 3] = False
        head_mask = torch.tensor([[True, True], [True, False]])
        targets[name] = LayerTarget(samples, chosen, head_mask, rows, real)
    return targets


def eager_maps(kind, model, inputs, names):
    """Attention weights of all heads by module name, from `output_attentions`, and the outputs of the model."""
    model.set_attn_implementation("eager")
    outputs = model(**inputs, output_attentions=True)
    if kind in SEQ2SEQ:
        pairs = zip(outputs.decoder_attentions, outputs.cross_attentions, strict=True)
        maps = [*outputs.encoder_attentions, *(a for pair in pairs for a in pair)]
    else:
        maps = outputs.attentions
    return dict(zip(names, maps, strict=True)), outputs


def pick(maps, target):
    samples = target.batch if target.batch is not None else torch.arange(len(target.heads))
    chosen = maps[samples[:, None, None], target.heads[:, :, None], target.rows[:, None, :]]
    return torch.where(target.valid()[..., None], chosen, 0.0)


def with_values(targets, values):
    return {name: copy.copy(t) for name, t in targets.items()} | {
        name: LayerTarget(t.batch, t.heads, t.head_mask, t.rows, t.row_mask, values[name])
        for name, t in targets.items()
    }


def captured(model, inputs, targets, kind="weights", **options):
    request = Capture(kind, targets)
    model(**inputs, **{KWARG: request}, **options)
    return request.values


def naive_row(teacher, student):
    teacher, student = teacher[teacher > 0], student[teacher > 0]
    return (teacher * (teacher.log() - student.log())).sum()


def naive_kl(teacher, student, target, reduction):
    """In float64, sample by sample and row by row."""
    found = []
    for b in range(len(target.heads)):
        terms = [
            naive_row(teacher[b, h, r].double(), student[b, h, r].double())
            for h in range(target.heads.shape[1])
            for r in range(target.rows.shape[1])
            if target.valid()[b, h, r]
        ]
        total = sum(terms, torch.zeros((), dtype=torch.float64))
        found.append(total / max(1, len(terms)) if reduction == "mean_rows" else total)
    return torch.stack(found)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(a, b, tolerance=1e-5):
    assert a.keys() == b.keys() and a
    scale = max(float(x.abs().max()) for x in a.values())
    worst = max(float((a[n] - b[n]).abs().max()) for n in a)
    assert worst <= tolerance * scale, (worst, scale)


# -- capture -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_captured_weights_are_the_eager_ones(kind, padding):
    model, inputs = build(kind), batch(kind, padding)
    with torch.no_grad(), AttentionTap(model) as tap:
        assert tap.num_heads == HEADS
        everything, some = all_rows(tap, inputs), some_rows(tap, inputs)
        whole, part = captured(model, inputs, everything), captured(model, inputs, some)
        names = tap.names
    maps, _ = eager_maps(kind, model, inputs, names)
    for name in names:
        torch.testing.assert_close(whole[name], pick(maps[name], everything[name]), atol=1e-6, rtol=0)
        torch.testing.assert_close(part[name], pick(maps[name], some[name]), atol=1e-6, rtol=0)
        assert whole[name].std() > 0.02


def test_a_batch_without_padding_arrives_without_mask_or_with_a_window():
    for kind, without in (("llama", True), ("mistral", False)):
        model, inputs, masks = build(kind), batch(kind, "none"), []

        class Seen(Capture):
            def run(self, call, output, training):
                masks.append(call.mask)  # noqa: B023

        with AttentionTap(model):
            model(**inputs, **{KWARG: Seen("weights", {})})
        assert all((mask is None) == without for mask in masks) and len(masks) == 2


def test_the_mask_function_is_registered(monkeypatch):
    inputs = batch("llama")
    with torch.no_grad():
        plain = build("llama")(**inputs).logits
        model = build("llama")
        with AttentionTap(model):
            assert torch.equal(model(**inputs).logits, plain)
        monkeypatch.setattr(type(ALL_MASK_ATTENTION_FUNCTIONS), "register", classmethod(lambda *a: None))
        with AttentionTap(model):
            assert (model(**inputs).logits - plain)[0, 3:].abs().max() > 1e-3


def test_names_and_sides():
    with AttentionTap(tiny_model("t5")) as tap:
        assert tap.sides["encoder.block.1.layer.0.SelfAttention"] == ("input", "input")
        assert tap.sides["decoder.block.1.layer.0.SelfAttention"] == ("decoder", "decoder")
        assert tap.sides["decoder.block.1.layer.1.EncDecAttention"] == ("decoder", "input")
        assert len(tap.names) == 6
    with AttentionTap(build("bart")) as tap:
        assert tap.sides["model.decoder.layers.0.encoder_attn"] == ("decoder", "input")
    plain, lora = tiny_model("llama"), tiny_model("llama", lora=True)
    with AttentionTap(plain) as a, AttentionTap(lora) as b:
        assert a.names == b.names == [f"model.layers.{i}.self_attn" for i in range(2)]
        assert a.sides[a.names[0]] == ("input", "input")


def test_capture_through_peft_and_in_training_is_before_dropout():
    inputs, model = batch("llama"), tiny_model("llama", dropout=0.5)
    lora = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad(), AttentionTap(model) as tap, AttentionTap(lora):
        targets = all_rows(tap, inputs)
        plain = captured(model.eval(), inputs, targets)
        through = captured(lora.eval(), inputs, targets)
        first = tap.names[:1]  # later layers see the dropout of this one
        training = captured(model.train(), inputs, {n: targets[n] for n in first})
    for name in tap.names:
        assert torch.equal(plain[name], through[name])
    assert torch.equal(plain[first[0]], training[first[0]])


def test_flash_attention_with_a_mask_of_two_dimensions(monkeypatch):
    def flash(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
        assert module.config._attn_implementation == "flash_attention_2" and module.is_causal
        assert attention_mask is None or attention_mask.dim() == 2
        rows, keys = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
        allowed = (keys <= rows) & (rows - keys < (sliding_window or 10**6))
        allowed = allowed[None, None] if attention_mask is None else allowed & attention_mask[:, None, None, :]
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~allowed, torch.finfo(query.dtype).min)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    for kind in ("llama", "mistral"):
        for padding in ("left", "right", "none"):
            model, inputs = build(kind), batch(kind, padding)
            model.config._attn_implementation = "flash_attention_2"
            with torch.no_grad(), AttentionTap(model) as tap:
                targets = some_rows(tap, inputs)
                found = captured(model, inputs, targets)
                request = Sensitivity(masked=True)
                with torch.enable_grad():
                    model(**inputs, **{KWARG: request}).loss.backward()
            assert model.config._attn_implementation == "flash_attention_2"
            maps, _ = eager_maps(kind, model, inputs, tap.names)
            reference = naive_sensitivity(kind, model, inputs, tap, masked=True)
            for name in tap.names:
                torch.testing.assert_close(found[name], pick(maps[name], targets[name]), atol=1e-6, rtol=0)
                torch.testing.assert_close(request.scores[name].double(), reference[name], rtol=1e-4, atol=1e-12)


# -- distillation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["llama", "t5", "gemma2", "bert"])
def test_loss_and_gradient_are_those_of_the_eager_path(kind, recompute):
    inputs, model, other = batch(kind), build(kind), build(kind, seed=5)
    with torch.no_grad(), AttentionTap(other) as tap:
        empty = some_rows(tap, inputs)
        targets = with_values(empty, captured(other, inputs, empty))
    model.train().config.attention_dropout = 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    with AttentionTap(model) as tap:
        request = Distil("weights", targets, recompute=recompute)
        task = model(**inputs, **{KWARG: request}).loss
        loss = task + 1e3 * sum(x.mean() for x in request.losses.values())
        loss.backward()
    found = gradients(model)
    model.zero_grad()
    maps, outputs = eager_maps(kind, model, inputs, tap.names)
    reference = {name: naive_kl(t.values, pick(maps[name], t), t, "mean_rows") for name, t in targets.items()}
    expected = outputs.loss + 1e3 * sum(x.mean() for x in reference.values())
    expected.backward()
    for name in targets:
        torch.testing.assert_close(request.losses[name].double(), reference[name], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=0)
    assert_same_gradients(found, gradients(model))


def losses_and_gradients(model, inputs, request):
    model.zero_grad()
    with AttentionTap(model):
        loss = model(**inputs, **{KWARG: request}).loss + 10 * sum(x.sum() for x in request.losses.values())
        loss.backward()
    return request.losses, gradients(model)


@pytest.mark.parametrize("kind", ["weights", "outputs"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_gradient_checkpointing_changes_nothing_and_reentrant_is_refused(name, kind):
    inputs, model, other = batch(name), tiny_model(name).train(), tiny_model(name, seed=4)
    with torch.no_grad(), AttentionTap(other) as tap:
        empty = some_rows(tap, inputs)
        targets = with_values(empty, captured(other, inputs, empty, kind))
    refuse_reentrant(model)
    plain = losses_and_gradients(model, inputs, Distil(kind, targets))
    for recompute in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        refuse_reentrant(model)
        again = losses_and_gradients(model, inputs, Distil(kind, targets, recompute=recompute))
        for layer in targets:
            torch.testing.assert_close(plain[0][layer], again[0][layer], rtol=1e-6, atol=0)
        assert_same_gradients(plain[1], again[1], 1e-6)
    model.gradient_checkpointing_disable()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(InputError, match="use_reentrant"):
        refuse_reentrant(model)
    with pytest.raises(InputError, match="'use_reentrant': False"):
        losses_and_gradients(model, inputs, Distil(kind, targets))
    with pytest.raises(InputError, match="'use_reentrant': False"), AttentionTap(model):
        model(**inputs, **{KWARG: Sensitivity()})
    model.gradient_checkpointing_disable()
    refuse_reentrant(model)


def test_lora_with_checkpointing_trains_the_adapter_only():
    inputs, model = batch("llama"), tiny_model("llama", lora=True).train()
    other = tiny_model("llama", seed=4)
    with torch.no_grad(), AttentionTap(other) as tap:
        empty = all_rows(tap, inputs)
        targets = with_values(empty, captured(other, inputs, empty))
    plain = losses_and_gradients(model, inputs, Distil("weights", targets))[1]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_gradients(plain, losses_and_gradients(model, inputs, Distil("weights", targets))[1], 1e-6)
    assert all("lora_" in name for name in plain)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_model_that_is_its_own_teacher_has_no_loss_and_no_gradient(kind):
    inputs, model = batch(kind), build(kind)
    with AttentionTap(model) as tap:
        empty = all_rows(tap, inputs)
        with torch.no_grad():
            weights, outputs = captured(model, inputs, empty), captured(model, inputs, empty, "outputs")
        for name, values in (("weights", weights), ("outputs", outputs)):
            request = Distil(name, with_values(empty, values))
            model(**inputs, **{KWARG: request})
            loss = sum(x.sum() for x in request.losses.values())
            assert loss.abs() < 1e-5 and loss.requires_grad
            model.zero_grad()
            loss.backward()
            assert max(float(g.abs().max()) for g in gradients(model).values()) < 1e-5


@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
@pytest.mark.parametrize("reduction", ["mean_rows", "sum"])
def test_reductions_recomputation_blocks_and_stored_queries(reduction, epsilon, monkeypatch):
    inputs, model, other = batch("llama"), build("llama"), build("llama", seed=5)
    options = {"reduction": reduction, "epsilon": epsilon}
    with torch.no_grad(), AttentionTap(other) as tap:
        empty = some_rows(tap, inputs)
        weights, stored = captured(other, inputs, empty), captured(other, inputs, empty, "qk")
    targets = with_values(empty, weights)
    losses, expected = losses_and_gradients(model, inputs, Distil("weights", targets, **options))
    with torch.no_grad(), AttentionTap(model):
        student = captured(model, inputs, empty)
    for name, target in targets.items():
        naive = naive_kl(weights[name], student[name] + epsilon, target, reduction)
        torch.testing.assert_close(losses[name].double(), naive, rtol=1e-5, atol=1e-6)

    def plain(request):  # the same by automatic differentiation of the probabilities
        model.zero_grad()
        maps, outputs = eager_maps("llama", model, inputs, tap.names)
        total = outputs.loss
        for name, t in targets.items():
            total = total + 10 * naive_kl(t.values, pick(maps[name], t) + epsilon, t, reduction).sum()
        total.backward()
        model.set_attn_implementation("sdpa")
        return gradients(model)

    assert_same_gradients(expected, plain(None), 2e-5)
    queries = {
        n: LayerTarget(t.batch, t.heads, t.head_mask, t.rows, t.row_mask, query=stored[n][0], key=stored[n][1])
        for n, t in empty.items()
    }
    monkeypatch.setattr(attention, "BLOCK", 1)
    for request in (
        Distil("weights", targets, **options),
        Distil("weights", targets, recompute=True, **options),
        Distil("weights", queries, **options),
    ):
        again, found = losses_and_gradients(model, inputs, request)
        for name in targets:
            torch.testing.assert_close(again[name], losses[name], rtol=1e-5, atol=1e-6)
        assert_same_gradients(expected, found)


def test_stored_queries_without_the_position_bias_are_refused():
    inputs, model = batch("t5"), build("t5")
    with AttentionTap(model) as tap:
        empty = some_rows(tap, inputs)
        stored = captured(model, inputs, empty, "qk")
        assert all(len(x) == 3 for x in stored.values())
        targets = {
            n: LayerTarget(t.batch, t.heads, t.head_mask, t.rows, t.row_mask, query=stored[n][0], key=stored[n][1])
            for n, t in empty.items()
        }
        with pytest.raises(InputError, match="position bias"):
            model(**inputs, **{KWARG: Distil("weights", targets)})


def test_distilled_outputs_equal_a_naive_sum():
    inputs, model, other = batch("llama"), build("llama"), build("llama", seed=5)
    collected = {}

    def keep(name):
        return lambda module, args: collected.__setitem__(name, args[0].unflatten(-1, (HEADS, -1)).transpose(1, 2))

    handles = [
        m.register_forward_pre_hook(keep(n.removesuffix(".o_proj")))
        for n, m in model.named_modules()
        if n.endswith("o_proj")
    ]
    with torch.no_grad(), AttentionTap(other) as tap:
        empty = some_rows(tap, inputs)
        targets = with_values(empty, captured(other, inputs, empty, "outputs"))
    for reduction in ("mean_rows", "sum"):
        losses, _ = losses_and_gradients(model, inputs, Distil("outputs", targets, reduction=reduction))
        for name, t in targets.items():
            student = collected[name]
            for b, sample in enumerate(t.batch):
                heads = []
                for h in range(2):
                    if t.head_mask[b, h]:
                        rows = t.rows[b][t.row_mask[b]]
                        o, mine = t.values[b, h][t.row_mask[b]].double(), student[sample, t.heads[b, h], rows].double()
                        heads.append((o - mine).square().sum() / o.square().sum())
                expected = sum(heads) / (len(heads) if reduction == "mean_rows" else 1)
                torch.testing.assert_close(losses[name][b].double(), expected, rtol=1e-5, atol=0)
    for handle in handles:
        handle.remove()


def test_a_sample_without_rows_or_heads_adds_nothing():
    inputs, model = batch("llama"), build("llama")
    with AttentionTap(model) as tap:
        empty = all_rows(tap, inputs)
        for target in empty.values():
            target.row_mask = target.row_mask.clone()
            target.row_mask[0] = False
            target.head_mask = target.head_mask.clone()
            target.head_mask[1] = False
        with torch.no_grad():
            values = captured(model, inputs, empty)
        for kind in ("weights", "outputs"):
            shape = (3, HEADS, LENGTH, 8)
            teacher = values if kind == "weights" else {n: torch.randn(shape) for n in values}
            teacher = {
                n: v.roll(1, -2) * empty[n].valid()[..., None] if kind == "weights" else v for n, v in teacher.items()
            }
            request = Distil(kind, with_values(empty, teacher))
            model(**inputs, **{KWARG: request})
            for loss in request.losses.values():
                assert (loss[:2] == 0).all() and loss[2] > 0
            model.zero_grad()
            sum(x.sum() for x in request.losses.values()).backward()
            assert all(g.isfinite().all() for g in gradients(model).values())


def test_loss_under_autocast_is_near_that_in_float32():
    inputs, model, other = batch("llama"), build("llama"), build("llama", seed=5)
    with torch.no_grad(), AttentionTap(other) as tap:
        empty = all_rows(tap, inputs)
        targets = with_values(empty, captured(other, inputs, empty))
    exact, gradient = losses_and_gradients(model, inputs, Distil("weights", targets))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, near = losses_and_gradients(model, inputs, Distil("weights", targets))
    for name in targets:
        assert rough[name].dtype == torch.float32
        torch.testing.assert_close(rough[name], exact[name], rtol=0.05, atol=0)
    assert_same_gradients(gradient, near, 0.05)


def saved_bytes(function, model):
    """Bytes of the distinct storages kept for the backward pass, without those of parameters and targets."""
    storages, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = function()
    del kept
    return sum(size for pointer, size in storages.items() if pointer not in weights)


def test_bytes_kept_for_the_backward_pass():
    length, rows = 1024, 100
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 32, "num_key_value_heads": 32}
    model = build("llama", max_position_embeddings=1024, **sizes).train()
    ids = torch.randint(3, 96, (1, length))
    with AttentionTap(model) as tap:
        targets = {}
        for name in tap.names:
            chosen = torch.randperm(32)[:8][None]
            picked = torch.randperm(length)[:rows][None]
            ones = torch.ones(1, 8).bool(), torch.ones(1, rows).bool()
            teacher = torch.rand(1, 8, rows, length).softmax(-1)
            targets[name] = LayerTarget(None, chosen, ones[0], picked, ones[1], teacher)

        def forward(request=None):
            out = model(input_ids=ids, labels=ids, **({KWARG: request} if request else {}))
            return out.loss + (sum(x.sum() for x in request.losses.values()) if request else 0)

        plain = saved_bytes(forward, model)
        kept = saved_bytes(lambda: forward(Distil("weights", targets)), model)
        again = saved_bytes(lambda: forward(Distil("weights", targets, recompute=True)), model)
    assert kept <= 1.10 * plain, kept / plain
    assert again <= 1.01 * plain, again / plain


# -- scores ------------------------------------------------------------------------------------------------------------


def naive_sensitivity(kind, model, inputs, tap, masked):
    """Squared gradients of the eager maps, in float64, sample by sample."""
    model = copy.deepcopy(model)
    maps, outputs = eager_maps(kind, model, inputs, tap.names)
    grads = torch.autograd.grad(outputs.loss, [maps[n] for n in tap.names])
    scores, mask = {}, inputs["attention_mask"].bool()
    for name, grad in zip(tap.names, grads, strict=True):
        real = [mask if side == "input" else torch.ones(len(mask), ANSWER).bool() for side in tap.sides[name]]
        found = []
        for b in range(len(mask)):
            square = grad[b][:, real[0][b]][:, :, real[1][b]].double().square()
            if masked:
                allowed = maps[name][b][:, real[0][b]][:, :, real[1][b]] > 0
                found.append((square * allowed).sum((1, 2)) / allowed.sum((1, 2)))
            else:
                found.append(square.mean((1, 2)))
        scores[name] = torch.stack(found)
    return scores


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind,padding", [("llama", "left"), ("llama", "right"), ("mistral", "left"), ("t5", "right")])
def test_sensitivity_equals_that_of_the_eager_maps(kind, padding, masked, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 200)  # several blocks of rows
    model, inputs = build(kind), batch(kind, padding)
    with AttentionTap(model) as tap:
        request, again = (
            Sensitivity(masked=masked),
            Sensitivity(masked=masked, real={"input": inputs["attention_mask"]}),
        )
        again.real["decoder"] = torch.ones(3, ANSWER)
        model(**inputs, **{KWARG: request}).loss.backward()
        loss = model(**inputs, **{KWARG: again}).loss
        torch.autograd.grad(loss, list(again.outputs.values()))
    reference = naive_sensitivity(kind, model, inputs, tap, masked)
    for name in tap.names:
        assert request.scores[name].shape == (3, HEADS) and request.scores[name].dtype == torch.float32
        torch.testing.assert_close(request.scores[name].double(), reference[name], rtol=1e-4, atol=1e-10)
        torch.testing.assert_close(again.scores[name], request.scores[name], rtol=1e-5, atol=1e-12)


def test_sensitivity_of_a_frozen_model_and_with_checkpointing():
    model, inputs = tiny_model("llama").train(), batch("llama")
    scores = []
    for frozen, checkpointing in ((False, False), (True, False), (False, True)):
        model.requires_grad_(not frozen)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with AttentionTap(model):
            request = Sensitivity()
            model(**inputs, **{KWARG: request}).loss.backward()
        scores.append(request.scores)
    for other in scores[1:]:
        for name, score in scores[0].items():
            torch.testing.assert_close(other[name], score)


@pytest.mark.parametrize("kind", ["llama", "t5", "gemma2"])
def test_change_equals_that_of_the_eager_maps(kind, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 1)
    inputs, before, now = batch(kind), build(kind, seed=5), build(kind)
    with torch.no_grad(), AttentionTap(before) as tap, AttentionTap(now):
        targets = some_rows(tap, inputs)
        requests = [
            Change(captured(before, inputs, targets, "qk"), targets),
            Change(captured(before, inputs, targets), targets),
            Change(captured(before, inputs, targets, "qk"), targets, normalise=True),
        ]
        for request in requests:
            now(**inputs, **{KWARG: request})
        same = Change(captured(now, inputs, targets, "qk"), targets)
        now(**inputs, **{KWARG: same})
    old, _ = eager_maps(kind, before, inputs, tap.names)
    new, _ = eager_maps(kind, now, inputs, tap.names)
    for name, t in targets.items():
        square = (pick(old[name], t) - pick(new[name], t)).double().square()
        lengths = torch.full((len(t.batch),), widths(tap, name)[1])
        if tap.sides[name][1] == "input":
            lengths = inputs["attention_mask"][t.batch].sum(1)
        per_row = square.sum((-1, -2)) / t.row_mask.sum(1, keepdim=True)
        for request, divisor in zip(requests, (lengths, lengths, torch.ones_like(lengths)), strict=True):
            torch.testing.assert_close(request.scores[name].double(), per_row / divisor[:, None], rtol=1e-3, atol=1e-9)
        assert same.scores[name].max() < 1e-12 and per_row.max() > 1e-5


# -- functions ---------------------------------------------------------------------------------------------------------


def test_attention_kl():
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(3, 2, 4, 6, generator=generator).softmax(-1) for _ in range(2))
    teacher[0, 0, 1, :3] = 0
    row_mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    student[0, :, 2] = float("nan")
    student.requires_grad_()
    loss = attention_kl(teacher, student, row_mask)
    expected = 0.0
    for b in range(3):
        rows = [
            sum(
                float(t) * (float(t.double().log()) - float(s.double().log()))
                for t, s in zip(u, v, strict=True)
                if t > 0
            )
            for h in range(2)
            for u, v, valid in zip(teacher[b, h], student[b, h].detach(), row_mask[b], strict=True)
            if valid
        ]
        expected += sum(rows) / max(1, len(rows)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert student.grad.isfinite().all() and (student.grad[2] == 0).all()
    assert attention_kl(teacher[:2], teacher[:2], row_mask[:2]).abs() < 1e-7
    assert attention_kl(teacher.double(), teacher.double(), row_mask).dtype == torch.float64
    half = teacher.half(), student.detach().nan_to_num(0.5).half()
    assert attention_kl(*half, row_mask).dtype == torch.float32
    zero = torch.zeros(1, 1, 1, 2).requires_grad_()
    loss = attention_kl(torch.tensor([[[[0.0, 1.0]]]]), zero, torch.ones(1, 1))
    loss.backward()
    assert loss.isfinite() and zero.grad.isfinite().all()


def test_head_sensitivity():
    grad, value = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 3, 7, 4, dtype=torch.float64)
    expected = (grad @ value.transpose(-1, -2)).square().mean((-1, -2))
    torch.testing.assert_close(head_sensitivity(grad, value), expected)
    rough = head_sensitivity(grad.bfloat16(), value.bfloat16())
    assert rough.dtype == torch.float32
    exact = head_sensitivity(grad.bfloat16().double(), value.bfloat16().double())
    torch.testing.assert_close(rough.double(), exact, rtol=1e-5, atol=0)


def test_select_heads():
    importance = torch.tensor([[1.0, 2.0, 0.0], [9.0, 0.0, 0.0], [4.0, 4.0, 4.0], [3.0, 0.0, 0.0]])
    chosen = select_heads(importance, 2, 3)
    assert chosen.dtype == torch.bool and chosen.nonzero().tolist() == [[1, 0], [2, 0], [2, 1]]
    assert select_heads(importance, 4, 12).all()
    assert select_heads(torch.zeros(3, 3), 2, 4).nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0]]
    tie = torch.tensor([[1.0, 2.0], [3.0, 0.0], [2.0, 1.0]])
    assert select_heads(tie, 1, 2).nonzero().tolist() == [[0, 0], [0, 1]]
    for layers, heads, words in (
        (0, 1, "layers=0.*4"),
        (5, 1, "layers=5.*4"),
        (2, 0, "heads=0.*6"),
        (2, 7, "heads=7.*6"),
    ):
        with pytest.raises(InputError, match=words):
            select_heads(importance, layers, heads)
    for bad in (torch.zeros(3), torch.tensor([[float("nan")]]), torch.tensor([[float("inf"), 1.0]])):
        with pytest.raises(InputError, match="importance"):
            select_heads(bad, 1, 1)


# -- the tap -----------------------------------------------------------------------------------------------------------


def implementations(model):
    return [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "t5", "gpt2"])
def test_the_model_is_restored_also_after_an_exception(kind, implementation):
    model = build(kind)
    model.set_attn_implementation(implementation)
    before, keys = implementations(model), (set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS))
    with pytest.raises(RuntimeError, match="on purpose"), AttentionTap(model) as tap:
        assert implementations(model) != before and set(ALL_ATTENTION_FUNCTIONS) != keys[0]
        raise RuntimeError("on purpose")
    tap.close()
    assert implementations(model) == before
    assert (set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)) == keys


def test_nothing_is_left_if_the_tap_cannot_be_placed(monkeypatch):
    model, keys = build("t5"), set(ALL_ATTENTION_FUNCTIONS)
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(InputError, match="cannot be tapped"):
        AttentionTap(model)
    assert set(implementations(model)) == {"sdpa"} and set(ALL_ATTENTION_FUNCTIONS) == keys


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "t5", "gemma2"])
def test_generation_is_unchanged(kind):
    model, inputs = build(kind), batch(kind)
    inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "do_sample": False}
    if kind == "gemma2":
        model.set_attn_implementation("eager")
    before = model.generate(**inputs, **options)
    with AttentionTap(model):
        assert torch.equal(model.generate(**inputs, **options), before)


def test_the_saved_configuration_does_not_name_the_tap(tmp_path):
    for kind in ("llama", "t5"):
        model = tiny_model(kind)
        with AttentionTap(model):
            model.save_pretrained(tmp_path / kind)
        assert "_tap_" not in (tmp_path / kind / "config.json").read_text()
        assert "attn_implementation" not in json.loads((tmp_path / kind / "config.json").read_text())
        assert type(model).from_pretrained(tmp_path / kind).config._attn_implementation == "sdpa"


def test_what_cannot_be_tapped_is_refused(caplog):
    model = build("llama")
    with AttentionTap(model), pytest.raises(InputError, match="tapped already"):
        AttentionTap(model)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(InputError, match="'flex_attention' is an attention implementation that cannot be tapped"):
        AttentionTap(model)
    with pytest.raises(InputError, match="use a model of transformers"):
        AttentionTap(nn.Linear(2, 2))
    model = build("gemma2")
    model.config._attn_implementation = "sdpa"
    with AttentionTap(model):
        assert sum("capped" in r.message for r in caplog.records) == 1
        model(**batch("gemma2"))


def test_what_a_request_cannot_be_is_refused():
    model, inputs = build("llama"), batch("llama")
    for make in (
        lambda: Capture("maps", {}),
        lambda: Distil("qk", {}),
        lambda: Distil("weights", {}, reduction="mean"),
    ):
        with pytest.raises(InputError, match="unknown; choose one of"):
            make()
    with AttentionTap(model) as tap:
        targets = all_rows(tap, inputs)
        first = next(iter(targets.values()))
        with pytest.raises(InputError, match="no attention module 'model.x'"):
            model(**inputs, **{KWARG: Capture("weights", {"model.x": first})})
        with pytest.raises(InputError, match="give the teacher's values"):
            model(**inputs, **{KWARG: Distil("weights", targets)})
        first.values = torch.rand(3, HEADS, LENGTH, LENGTH - 1)
        with pytest.raises(InputError, match="8 keys and the model 9"):
            model(**inputs, **{KWARG: Distil("weights", {tap.names[0]: first})})
        clone = copy.deepcopy(model)
        assert torch.equal(clone(**inputs).logits, model(**inputs).logits)
        with pytest.raises(InputError, match="tap the copy"):
            clone(**inputs, **{KWARG: Capture("weights", {})})


def test_private_names_we_rely_on():
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        assert "sdpa" in registry._global_mapping
    model = tiny_model("llama")
    assert model.config._attn_implementation == "sdpa"
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    layer = model.model.layers[0]
    assert layer.gradient_checkpointing and layer._gradient_checkpointing_func.keywords == {"use_reentrant": True}
