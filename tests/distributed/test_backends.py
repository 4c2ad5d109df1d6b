"""Every method on every backend computes what one process computes on the same global batch.

Micro-batch j of a step in one process is rank j % W, accumulation j // W. Tolerance: 1e-5 relative to the largest entry
of a tensor, after 8 to 12 steps in fp32; 4e-5 under ZeRO-3, for SEEKR's outputs and where DeepSpeed trains all weights
on two rows a step, whose rounding Adam amplifies (in float64 the same runs agree to 1e-10, and with a larger epsilon of
Adam to 3e-6); 2e-4 for SEEKR's outputs under ZeRO-3. Masked and unmasked runs differ
by more than 1e-2. `HF_CONTINUAL_DISTRIBUTED=full` runs all cases, `pairs` each method on each backend once with LoRA
and once in full, alternating accumulation; by default a selection that has every method and backend.
"""

import os
from pathlib import Path

import pytest
import support_matrix
import torch
from backends import (
    BACK_TO_A_CHECKPOINT,
    PLAIN_STEPS,
    SometimesScaled,
    learn,
    learn_and_save,
    learn_in_fp16,
    learn_sometimes,
    offloading,
)
from ranks import run_ranks
from safetensors.torch import load_file
from whole_weights import NeedsWholeWeights

from hf_continual.distributed import BACKENDS, check_backend
from hf_continual.errors import InputError
from hf_continual.methods.base import ContinualMethod, method_class, method_names
from hf_continual.testing import close

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]
LEVEL = os.environ.get("HF_CONTINUAL_DISTRIBUTED", "")
MIGU = {"name": "migu", "threshold": 0.5}
SEEKR = {"name": "seekr", "count": 8, "layers": 2, "heads": 5, "query_rows": 4, "attention_weight": 10}

STREAMS = {  # name: (methods, LoRA and full fine-tuning, whether a micro-batch is that of all ranks together)
    "naive": (["naive"], (True, False), False),
    "migu": ([MIGU], (True, False), False),
    "migu-micro": ([{**MIGU, "scope": "micro_batch"}], (True, False), True),
    "kif+migu-update": (["kif", {**MIGU, "mask": "update"}], (True,), False),
    "kif": (["kif"], (True,), False),
    "kif-matrix": ([{"name": "kif", "units": "matrix", "timing": "consistent"}], (False,), False),
    "kif-memory": ([{"name": "kif", "units": "matrix", "timing": "consistent", "replay_count": 8}], (False,), False),
    "tasl": (["tasl"], (True, False), False),
    "inclora": (["inclora"], (True,), False),
    "olora": ([{"name": "olora", "lambda_1": 0.5, "lambda_2": 0.1}], (True,), False),
    "weight_ensemble": (["weight_ensemble"], (True, False), False),
    "weight_ema": ([{"name": "weight_ema", "decay": 0.5}], (True, False), False),
    "fisher_merge": (["fisher_merge"], (True, False), False),
    "replay+migu": ([{"name": "replay", "count": 4}, MIGU], (True, False), False),
    "replay-after": ([{"name": "replay", "count": 8, "mixing": "after"}], (True, False), False),
    "er": ([{"name": "er", "count": 4}], (True,), False),
    "herding": ([{"name": "replay", "count": 8, "mixing": "alternate", "policy": "herding"}], (True,), True),
    "seekr": ([SEEKR], (True, False), True),
    "seekr-outputs": ([{**SEEKR, "attention": "outputs", "attention_weight": 1}], (True,), True),
    "seekr-summed": (
        [{"name": "seekr", "count": 8, "loss_mix": "summed", "teacher": "previous", "attention_weight": 10}],
        (True,),
        True,
    ),
    "derpp": ([{"name": "derpp", "count": 8}], (True, False), True),
    "derpp-tasks": ([{"name": "derpp", "count": 8, "loss_mix": "summed", "teacher": "tasks"}], (True,), True),
    "ewc": ([{"name": "ewc", "fisher_rows": 7}], (True, False), False),  # 7: one rank has a row less
    "ewc-trace": ([{"name": "ewc", "fisher": "trace"}], (True, False), False),
    "lwf": (["lwf"], (True, False), False),
    "agem": ([{"name": "agem", "count": 7, "memory_micro_batch": 3}], (True, False), False),
    "gem": ([{"name": "gem", "count": 8}], (True, False), False),
}
SELECTION = [  # stream, backend, LoRA, accumulation, processes
    ("naive", "ddp", True, 1, 2), ("migu", "ddp", True, 1, 2), ("migu", "ddp", False, 2, 2),
    ("migu-micro", "ddp", False, 2, 2), ("kif+migu-update", "ddp", True, 2, 2), ("kif-memory", "ddp", False, 1, 2),
    ("tasl", "ddp", True, 2, 2), ("inclora", "ddp", True, 1, 2), ("olora", "ddp", True, 2, 2),
    ("weight_ensemble", "ddp", True, 1, 2), ("weight_ema", "ddp", False, 1, 2), ("fisher_merge", "ddp", True, 2, 2),
    ("replay+migu", "ddp", False, 1, 2), ("herding", "ddp", True, 1, 2), ("seekr", "ddp", True, 1, 2),
    ("seekr-summed", "ddp", True, 1, 2), ("derpp", "ddp", False, 1, 2), ("ewc", "ddp", True, 1, 2),
    ("lwf", "ddp", True, 2, 2), ("agem", "ddp", False, 1, 2), ("gem", "ddp", True, 2, 2),
    ("naive", "zero0", False, 2, 2), ("naive", "zero3", False, 1, 1), ("migu", "fsdp2", False, 2, 2),
    ("migu", "zero2", True, 2, 2), ("migu", "zero3", False, 2, 2), ("migu-micro", "fsdp2", True, 1, 2),
    ("kif+migu-update", "zero1", True, 1, 2), ("kif+migu-update", "zero2", True, 2, 2),
    ("kif+migu-update", "fsdp2", True, 1, 2), ("kif", "zero3", True, 1, 2), ("kif-matrix", "zero2", False, 1, 1),
    ("tasl", "fsdp2", False, 1, 2), ("inclora", "zero2", True, 1, 2), ("olora", "zero3", True, 1, 2),
    ("olora", "fsdp2", True, 1, 2), ("weight_ensemble", "zero3", True, 1, 2), ("weight_ema", "zero2", False, 1, 2),
    ("fisher_merge", "zero3", True, 1, 2), ("replay+migu", "zero1", False, 1, 2), ("er", "fsdp2", True, 1, 2),
    ("herding", "fsdp2", True, 1, 2),
    ("seekr", "fsdp2", False, 1, 2), ("seekr", "zero3", True, 1, 2), ("seekr-outputs", "zero2", True, 1, 2),
    ("derpp", "zero3", False, 1, 2), ("ewc", "zero2", True, 1, 2), ("ewc-trace", "zero1", False, 1, 2),
    ("lwf", "zero3", True, 1, 2), ("ewc", "fsdp2", True, 1, 2), ("agem", "zero3", False, 1, 2),
    ("gem", "fsdp2", False, 1, 2), ("seekr-summed", "zero3", True, 1, 2),
]  # fmt: skip


def names_of(stream):
    return [spec if isinstance(spec, str) else spec["name"] for spec in STREAMS[stream][0]]


def supported(stream, backend):
    return all(backend in method_class(name).supports for name in names_of(stream))


def all_cases():
    for stream, (_, kinds, _) in STREAMS.items():
        for backend in BACKENDS[1:]:
            if not supported(stream, backend) or (backend == "zero0" and stream not in ("naive", "migu", "kif")):
                continue
            for lora in kinds:
                for accumulation in (1, 2) if LEVEL == "full" else (1 + (len(stream) + len(kinds) + lora) % 2,):
                    for processes in (1, 2) if backend.startswith("zero") and LEVEL == "full" else (2,):
                        yield stream, backend, lora, accumulation, processes


ALONE = {}


def alone(stream, lora, accumulation, processes, folder):
    """One process on the same global batch."""
    specs, _, together = STREAMS[stream]
    steps, batch = (accumulation, 2 * processes) if together else (accumulation * processes, 2)
    key = (stream, lora, steps, batch)
    if key not in ALONE:
        ALONE[key] = learn("single", specs, lora, steps, batch, folder / "one")
    return ALONE[key]


def tolerance(stream, backend, lora, micro_batches):
    if stream == "seekr-outputs":
        return 2e-4 if backend == "zero3" else 4e-5
    few_rows = micro_batches == 1 and not lora and backend.startswith("zero")
    return 4e-5 if backend == "zero3" or few_rows else 1e-5


@pytest.mark.parametrize(
    ("stream", "backend", "lora", "accumulation", "processes"), all_cases() if LEVEL else SELECTION
)
def test_equals_one_process(stream, backend, lora, accumulation, processes, tmp_path):
    passed = False
    try:
        specs = STREAMS[stream][0]
        run_ranks(learn_and_save, processes, tmp_path, tmp_path, backend, specs, lora, accumulation, 2, {})
        ranks = [load_file(str(tmp_path / f"{rank}.safetensors")) for rank in range(processes)]
        for other in ranks[1:]:
            assert all(torch.equal(ranks[0][name], other[name]) for name in other), "the ranks hold different values"
        expected = alone(stream, lora, accumulation, processes, tmp_path)
        assert close(expected, ranks[0], tolerance(stream, backend, lora, accumulation * processes))
        passed = True
    finally:
        support_matrix.record(names_of(stream), backend, passed)


OTHERS = [  # model, backend, stream, LoRA, accumulation: Conv1D and tied embeddings, encoder-decoder, classifier
    ("gpt2", "zero3", "migu", False, 2), ("gpt2", "fsdp2", "agem", False, 1), ("gpt2", "zero2", "seekr", True, 1),
    ("t5", "zero2", "migu", False, 1), ("t5", "zero3", "kif", True, 2), ("t5", "ddp", "derpp", True, 1),
    ("bert", "zero3", "migu", False, 1), ("bert", "zero1", "ewc", True, 1),
    *([("bert", "fsdp2", "migu", True, 1), ("t5", "zero2", "tasl", True, 1)] if LEVEL else []),
    *([("gpt2", "fsdp2", "kif", True, 1)] if LEVEL else []),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "backend", "stream", "lora", "accumulation"), OTHERS)
def test_other_models_equal_one_process(kind, backend, stream, lora, accumulation, tmp_path):
    specs, _, together = STREAMS[stream]
    run_ranks(learn_and_save, 2, tmp_path, tmp_path, backend, specs, lora, accumulation, 2, {"kind": kind})
    steps, batch = (accumulation, 4) if together else (accumulation * 2, 2)
    expected = learn("single", specs, lora, steps, batch, tmp_path / "one", kind=kind)
    found = load_file(str(tmp_path / "0.safetensors"))
    assert expected.keys() == found.keys()
    # The gradient of a key's bias is zero but for rounding, since softmax does not see a shift of all keys.
    without = {name for name in expected if name.endswith("key.bias")}
    assert bool(without) == (kind == "bert")
    expected, found = ({n: t for n, t in side.items() if n not in without} for side in (expected, found))
    assert close(expected, found, 4e-5 if backend == "zero3" else 1e-5)


@pytest.mark.parametrize(
    "options", [{"weight_decay": 0.1}, {"max_grad_norm": 0}], ids=lambda options: next(iter(options))
)
@pytest.mark.parametrize("backend", ["zero2", "zero3", "fsdp2"])
def test_decay_groups_and_no_clipping_equal_one_process(backend, options, tmp_path):
    run_ranks(learn_and_save, 2, tmp_path, tmp_path, backend, [MIGU], False, 1, 2, options)
    expected = learn("single", [MIGU], False, 2, 2, tmp_path / "one", **options)
    assert close(expected, load_file(str(tmp_path / "0.safetensors")), 4e-5 if backend == "zero3" else 1e-5)


@pytest.mark.parametrize(("accumulation", "used"), [(1, (True, False)), (2, (False, True, False, False))])
@pytest.mark.parametrize(
    ("backend", "offloads"),
    [("zero3", False), ("zero2", True)]
    + ([("ddp", False), ("fsdp2", False), ("zero2", False), ("zero1", True), ("zero3", True)] if LEVEL else []),
)
def test_a_layer_that_some_steps_do_not_use(backend, offloads, accumulation, used, tmp_path, monkeypatch):
    """DeepSpeed at ZeRO-3, and where the optimizer is offloaded, would apply its last gradient again."""
    run_ranks(learn_sometimes, 2, tmp_path, tmp_path, backend, offloads, accumulation, used)
    monkeypatch.setattr(SometimesScaled, "used", used)
    options = {"kind": "sometimes", **PLAIN_STEPS}
    expected = learn("single", ["migu"], False, accumulation * 2, 2, tmp_path / "one", **options)
    assert close(expected, load_file(str(tmp_path / "0.safetensors")), 4e-5 if backend == "zero3" else 1e-5)


@pytest.mark.parametrize(
    ("backend", "stream", "lora"),
    [
        ("zero3", "seekr", True),
        *(
            [
                (backend, stream, kinds[0])
                for backend in ("ddp", "zero2", "zero3")
                for stream, (_, kinds, together) in STREAMS.items()
                if stream != "herding"
            ]
            if LEVEL == "full"
            else []
        ),
    ],
)
def test_a_model_that_goes_on_to_the_next_task(backend, stream, lora, tmp_path):
    """By hand one model may learn all tasks, which at ZeRO-3 is split already when the second one begins."""
    specs, _, together = STREAMS[stream]
    run_ranks(learn_and_save, 2, tmp_path, tmp_path, backend, specs, lora, 1, 2, {"go_on": True})
    steps, batch = (1, 4) if together else (2, 2)
    expected = learn("single", specs, lora, steps, batch, tmp_path / "one", go_on=True)
    found = load_file(str(tmp_path / "0.safetensors"))
    assert close(expected, found, tolerance(stream, backend, lora, 2))


@pytest.mark.parametrize("backend", ["zero3", *(["ddp", "fsdp2"] if LEVEL else [])])
def test_teachers_of_several_tasks(backend, tmp_path):
    """The ranks have stored rows of different tasks, and collect the weights of one teacher at a time."""
    specs = STREAMS["derpp-tasks"][0]
    run_ranks(learn_and_save, 2, tmp_path, tmp_path, backend, specs, True, 1, 2, {"tasks": 3})
    expected = learn("single", specs, True, 1, 4, tmp_path / "one", tasks=3)
    assert close(expected, load_file(str(tmp_path / "0.safetensors")), 4e-5 if backend == "zero3" else 1e-5)


@pytest.mark.parametrize(
    ("backend", "stream"),
    [
        ("zero2", "kif"),
        ("fsdp2", "fisher_merge"),
        *(
            [
                (backend, stream)
                for backend in ("ddp", "fsdp2", "zero2", "zero3")
                for stream in ("kif", "tasl", "weight_ema", "fisher_merge", "ewc", "ewc-trace", "lwf")
            ]
            if LEVEL == "full"
            else []
        ),
    ],
)
def test_back_to_a_checkpoint_equals_one_process(backend, stream, tmp_path):
    """`load_best_model_at_end` reads state that is whole in the file and in parts on the ranks, and then merges."""
    specs = STREAMS[stream][0]
    run_ranks(learn_and_save, 2, tmp_path, tmp_path, backend, specs, True, 1, 2, BACK_TO_A_CHECKPOINT)
    expected = learn("single", specs, True, 2, 2, tmp_path / "one", **BACK_TO_A_CHECKPOINT)
    found = load_file(str(tmp_path / "0.safetensors"))
    assert close(expected, found, tolerance(stream, backend, True, 2))


def _same_trainer_model(rank, folder):
    with pytest.raises(InputError, match="the model was trained with FSDP2 before, which cannot wrap it again"):
        learn("fsdp2", ["naive"], True, 1, 2, folder, go_on=True)


def test_a_model_of_fsdp2_is_loaded_anew(tmp_path):
    run_ranks(_same_trainer_model, 2, tmp_path, tmp_path)


def _tied(rank, folder):
    with pytest.raises(InputError, match=r"shared.weight and .* are one weight, which FSDP2 cannot put into one group"):
        learn("fsdp2", ["naive"], False, 1, 2, folder, kind="t5")


def test_weights_tied_three_times_are_refused_under_fsdp2(tmp_path):
    run_ranks(_tied, 2, tmp_path, tmp_path)


@pytest.mark.parametrize("stream", ["seekr-outputs", "kif+migu-update", "derpp"])
def test_equals_one_process_in_float64(stream, tmp_path):
    """What is left in fp32 is rounding."""
    specs, _, together = STREAMS[stream]
    run_ranks(learn_and_save, 2, tmp_path, tmp_path, "ddp", specs, True, 1, 2, {"dtype": torch.float64})
    steps, batch = (1, 4) if together else (2, 2)
    expected = learn("single", specs, True, steps, batch, tmp_path / "one", dtype=torch.float64)
    assert close(expected, load_file(str(tmp_path / "0.safetensors")), 1e-10)


def test_a_missing_mask_would_be_seen(tmp_path):
    """The control: without the mask the weights are far off."""
    masked = alone("migu", True, 2, 2, tmp_path)
    plain = alone("naive", True, 2, 2, tmp_path)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight"
    assert float((masked[name] - plain[name]).abs().max()) > 1e-2 * float(plain[name].abs().max())


@pytest.mark.parametrize("backend", ["zero1", "zero2", "zero3", "fsdp2"])
def test_bf16_masks_agree_between_ranks(backend, tmp_path):
    """In half precision the sums differ, so it is the ranks that are compared, and how many rows moved."""
    run_ranks(learn_and_save, 2, tmp_path, tmp_path, backend, [MIGU], True, 1, 2, {"bf16": True})
    first, second = (load_file(str(tmp_path / f"{rank}.safetensors")) for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    share = first["migu.updates_"].mean() / first["migu.updates_"].max()
    assert 0.2 < float(share) < 0.9


@pytest.mark.parametrize(("backend", "accumulation"), [("zero2", 1), ("zero2", 2), ("zero3", 1)])
def test_offloaded_optimizer_clips_what_the_methods_left(backend, accumulation, tmp_path):
    """DeepSpeed takes the norms during backward there, before the masks; unmasked norms would move weights by 7 %."""
    run_ranks(learn_and_save, 2, tmp_path, tmp_path, backend, [MIGU], False, accumulation, 2, offloading(backend))
    ranks = load_file(str(tmp_path / "0.safetensors"))
    assert close(alone("migu", False, accumulation, 2, tmp_path), ranks, 4e-5 if backend == "zero3" else 1e-5)


@pytest.mark.parametrize(
    ("backend", "stream", "lora"),
    [
        ("ddp", "kif", True),
        ("zero2", "migu", False),
        *([("ddp", "migu", True), ("zero1", "kif", True)] if LEVEL else []),
    ],
)
def test_compiled_equals_one_process_that_is_not(backend, stream, lora, tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    run_ranks(learn_and_save, 2, tmp_path, tmp_path, backend, STREAMS[stream][0], lora, 1, 2, compiled)
    assert close(alone(stream, lora, 1, 2, tmp_path), load_file(str(tmp_path / "0.safetensors")), 1e-5)


OLORA = {"name": "olora", "lambda_1": 0.5, "lambda_2": 0.1}


@pytest.mark.parametrize(
    ("backend", "specs"), [("zero1", ["kif"]), ("zero2", ["kif", MIGU]), ("zero3", ["kif"]), ("zero3", [OLORA])]
)
def test_fp16_scale_is_in_neither_importance_nor_penalty(backend, specs, tmp_path):
    run_ranks(learn_in_fp16, 2, tmp_path, tmp_path, backend, specs, 10)
    first, second = (load_file(str(tmp_path / f"{rank}.safetensors")) for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    expected = learn("single", specs, True, 2, 2, tmp_path / "one")
    for name, value in expected.items():
        if name.startswith(("kif.raw_", "kif.cumulative_")) or (name.endswith(".weight") and "lora_A" in name):
            assert float((first[name] - value).abs().mean()) <= 0.02 * float(value.abs().mean()), name


def test_fp16_steps_that_overflow_count_for_nothing(tmp_path):
    """The scale is halved at each overflow: 2^20 is soon low enough, from 2^22 four steps do not get there."""
    run_ranks(learn_in_fp16, 2, tmp_path, tmp_path, "zero2", ["kif", MIGU], 20)
    first, second = (load_file(str(tmp_path / f"{rank}.safetensors")) for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(bool(value.isfinite().all()) for value in first.values() if value.is_floating_point())
    with pytest.raises(AssertionError, match="no optimizer step has been counted"):
        run_ranks(learn_in_fp16, 2, tmp_path, tmp_path, "zero2", ["kif"], 22)


@pytest.mark.parametrize("backend", ["fsdp2", "zero3", "fsdp1"])
def test_what_cannot_be_done_is_refused_with_its_reason(backend):
    cls = NeedsWholeWeights
    with pytest.raises(InputError, match=f"'{cls.name}' does not support") as error:
        check_backend(backend, cls.supports, cls.name, cls.unsupported)
    assert cls.unsupported.get(backend, "FSDP1") in str(error.value)


class Rewrites(ContinualMethod):
    """Reads every gradient whole and puts back what `mul_rows_` would leave of it, or calls it."""

    supports = frozenset(BACKENDS)

    def __init__(self, by_set):
        super().__init__()
        self.by_set = by_set

    def edit_gradients(self, ctx, grads):
        for name in list(grads.names()):
            whole = grads.read(name)
            assert whole.shape == dict(ctx.model.named_parameters())[name].shape or ctx.dist.backend == "zero3"
            keep = (torch.arange(whole.shape[0], device=whole.device) % 3 != 0).to(whole)
            if self.by_set:
                grads.set_(name, whole * keep.view(-1, *[1] * (whole.dim() - 1)))
            else:
                grads.mul_rows_(name, keep)
        assert [name for name, _ in grads.items()] == list(grads.names())


def _rewrite(rank, folder, backend, by_set):
    learn_and_save(rank, folder, backend, [Rewrites(by_set)], False, 1, 2, {})


@pytest.mark.parametrize(
    ("backend", "by_set"),
    [
        (backend, by_set)
        for i, backend in enumerate(BACKENDS[1:])
        for by_set in ([True, False] if LEVEL else [i % 2 == 0])
    ],
)
def test_the_view_of_whole_gradients(backend, by_set, tmp_path):
    """`items`, `read`, `set_` and `mul_rows_` from a method of one's own; in one process the other of the two."""
    run_ranks(_rewrite, 2, tmp_path, tmp_path, backend, by_set)
    expected = learn("single", [Rewrites(not by_set)], False, 2, 2, tmp_path / "one")
    assert close(expected, load_file(str(tmp_path / "0.safetensors")), 4e-5 if backend == "zero3" else 1e-5)


def _refused(rank, folder, backend):
    with pytest.raises(InputError, match="because it reads every weight; run it on one of: single, ddp, zero0"):
        learn(backend, [NeedsWholeWeights()], True, 1, 2, folder)


@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
def test_refused_before_training(backend, tmp_path):
    run_ranks(_refused, 2, tmp_path, tmp_path, backend)


def test_the_table_says_what_the_methods_declare():
    table = support_matrix.written(Path(__file__).parents[2] / "METHODS.md")
    assert "failed" not in table and "not run" not in table
    assert table == support_matrix.table()
    for name in method_names():
        assert f"| {name} |" in table
