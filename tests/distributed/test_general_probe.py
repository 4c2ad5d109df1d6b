"""General ability under two processes: rank 0 measures, the others wait, and the numbers are those of one process."""

import json

import pytest
from ranks import run_ranks
from toy_runs import save_model

from hf_continual import TaskQueue, general_ability
from hf_continual.testing import toy_queue_options, toy_stream

pytestmark = pytest.mark.distributed


def make_queue(folder, model, batch):
    options = toy_queue_options(per_device_train_batch_size=batch, train_sampling_strategy="sequential", optim="sgd")
    options |= {"model": str(model), "peft_config": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}
    options["evaluation"] |= {"general": True}
    return TaskQueue(folder, tasks=toy_stream(2, rows=8, eval_rows=4), methods=["migu"], **options)


def _run(rank, folder, model):
    general_ability.PAUSE = 0.0  # a sign of life before every batch
    calls = []
    original = general_ability.TextProbe.measure
    general_ability.TextProbe.measure = lambda *args: calls.append(1) or original(*args)
    make_queue(folder, model, 2).run()
    assert len(calls) == (3 if rank == 0 else 0)


def test_rank_0_measures_what_one_process_does(tmp_path):
    save_model(tmp_path / "model")
    run_ranks(_run, 2, tmp_path / "ranks", tmp_path / "two", tmp_path / "model")
    make_queue(tmp_path / "one", tmp_path / "model", 4).run()
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "general.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert one[0] == two[0] and [row["after_task"] for row in two] == [None, "toy0", "toy1"]
    for mine, theirs in zip(two, one, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
