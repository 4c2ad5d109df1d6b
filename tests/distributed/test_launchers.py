"""The real launchers, as a user types them: a plain script and a queue under torchrun and `accelerate launch`."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from backends import make_args
from ranks import run_ranks
from safetensors.torch import load_file
from test_queue import assert_close
from toy_runs import save_model, snapshot, write_recipe

from hf_continual import ContinualTrainer, InputError, distributed
from hf_continual.cli import main
from hf_continual.distributed import release_engine
from hf_continual.launch import presets
from hf_continual.lora import LoraView
from hf_continual.merging import merge_adapters
from hf_continual.testing import backend_options, close, tiny_model, toy_rows

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TRAINER = """
import os
import sys
from hf_continual import ContinualTrainer, ContinualTrainingArguments
from hf_continual.testing import tiny_model, toy_rows

folder, accumulation = sys.argv[1:]
os.umask(0o077 if os.environ.get("RANK") == "1" else 0o022)  # the modes of the files say who wrote them
args = ContinualTrainingArguments(
    output_dir=folder, methods=[{"name": "migu", "threshold": 0.5}], per_device_train_batch_size=2,
    num_train_epochs=2, learning_rate=1e-2, adam_epsilon=1e-3, train_sampling_strategy="sequential", use_cpu=True,
    gradient_accumulation_steps=int(accumulation), save_steps=4, report_to="none", disable_tqdm=True,
    dataloader_pin_memory=False, ddp_find_unused_parameters=False,
)
trainer = ContinualTrainer(tiny_model(lora=True), args, train_dataset=toy_rows())
trainer.train()
trainer.save_model()
print(f"rank {args.process_index} of {args.world_size}: {trainer.dist.backend}, step {trainer.state.global_step}")
"""
QUEUE = """
import os
import sys
from hf_continual import TaskQueue
from hf_continual.testing import toy_queue_options, toy_stream

folder, accumulation = sys.argv[1:]
os.umask(0o077 if os.environ.get("RANK") == "1" else 0o022)  # the modes of the files say who wrote them
options = toy_queue_options(
    per_device_train_batch_size=2, gradient_accumulation_steps=int(accumulation), adam_epsilon=1e-3,
    train_sampling_strategy="sequential",
)
options["evaluation"] |= {"max_new_tokens": 2}
queue = TaskQueue(folder, tasks=toy_stream(2, rows=8), methods=[{"name": "migu", "threshold": 0.5}], **options)
result = queue.run()
print(f"rank {queue.processes.rank} of {queue.processes.world_size}: {result.R.tolist()}")
"""
NOISE = ("Traceback", "terminate called", "ChildFailedError", "destroy_process_group", "leaked", "Exception ignored")
"""What a bad end prints."""


def torchrun(processes=2):
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv_backend", "c10d",
        "--rdzv_endpoint", "localhost:0",
    ]  # fmt: skip


def accelerate_launch(preset, processes=2):
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(presets()[preset]),
        "--num_processes", str(processes), "--main_process_port", "0",
    ]  # fmt: skip


def start(command, *words, code=0, **environment):
    known = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "HF_CONTINUAL_"))}
    done = subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, timeout=200,
        env={**known, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    for name, text in (("plain_trainer", TRAINER), ("plain_queue", QUEUE)):
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def alone(scripts, tmp_path_factory):
    """The same script in this process: micro-batch j of a step is then rank j % 2, accumulation j // 2."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"{name}-alone") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [name, str(made[name]), "2"])
                runpy.run_path(str(scripts / f"{name}.py"))
        return made[name]

    return get


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def by_the_second_rank(folder):
    """safetensors always writes 0600; adapters are the main process's in any case, or they would not be whole."""
    return {
        name for name in files(folder)
        if not name.endswith(".safetensors") and not (Path(folder) / name).stat().st_mode & 0o044
    }  # fmt: skip


def assert_clean(done, said):
    assert not any(noise in done.stderr for noise in NOISE), done.stderr
    assert all(done.stdout.count(words) == 1 for words in said), done.stdout  # two ranks may write on one line


@pytest.mark.parametrize("launcher", [torchrun(), accelerate_launch("ddp")], ids=["torchrun", "accelerate"])
def test_a_plain_script(launcher, scripts, alone, tmp_path):
    run = tmp_path / "run"
    done = start(launcher, scripts / "plain_trainer.py", run, 1)
    assert_clean(done, [f"rank {rank} of 2: ddp, step 8" for rank in range(2)])
    assert close(
        load_file(alone("plain_trainer") / "adapter_model.safetensors"),
        load_file(run / "adapter_model.safetensors"),
        1e-5,
    )
    # Everything once; only the state of the random generators is each rank's own.
    states = {f"checkpoint-{step}/rng_state{rank}.pth" for step in (4, 8) for rank in ("", "_0", "_1")}
    assert set(files(run)) - states == set(files(alone("plain_trainer"))) - states
    assert {name for name in files(run) if name in states} == {name for name in states if "_state_" in name}
    assert by_the_second_rank(run) == {name for name in states if name.endswith("_1.pth")}


def test_a_queue(scripts, alone, tmp_path):
    run = tmp_path / "run"
    done = start(torchrun(), scripts / "plain_queue.py", run, 1)
    score = [line for line in done.stdout.splitlines() if line.startswith("rank ")][0].partition(": ")[2]
    assert_clean(done, [f"rank {rank} of 2: {score}" for rank in range(2)])
    assert done.stdout.count("== task 1/2") == 1
    assert_close(run, snapshot(alone("plain_queue")), 1e-5)
    assert files(run) == files(alone("plain_queue"))
    assert by_the_second_rank(run) == set()


# -- bad input -------------------------------------------------------------------------------------------------------

ZERO = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
BAD = {  # name: (training, other sections, variables of a launcher, what the sentence says)
    "an optimizer of DeepSpeed's against ours": (
        {"deepspeed": {**ZERO, "zero_optimization": {"stage": 2}, "optimizer": {"type": "Lion"}}}, {}, {},
        "optimizer.type='Lion' against training.optim",
    ),
    "DeepSpeed twice": (
        {"deepspeed": {**ZERO, "zero_optimization": {"stage": 2}}}, {},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "no",
         "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
        "the launcher brings DeepSpeed too; remove one of them",
    ),
    "DeepSpeed that does not engage": (
        {"deepspeed": {**ZERO, "zero_optimization": {"stage": 2}}}, {}, {"ACCELERATE_USE_CPU": "true"},
        "ACCELERATE_USE_CPU is set, which turns DeepSpeed off",
    ),
    "FSDP that does not engage": (
        {"fsdp": True, "fsdp_config": {"version": 2}}, {}, {}, "training.fsdp=True is given and the backend is 'ddp'",
    ),
    "FSDP1": ({"use_cpu": False}, {}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "starts FSDP1"),
    "a stage that a method cannot do": (
        {"deepspeed": {**ZERO, "zero_optimization": {"stage": 3}}},
        {"methods": ["whole_weights:NeedsWholeWeights"]},
        {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))},
        "method 'needswholeweights' does not support the 'zero3' backend, because it reads every weight",
    ),
    "a schedule of DeepSpeed's against ours": (
        {"deepspeed": {**ZERO, "zero_optimization": {"stage": 2},
                       "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}}, {}, {},
        "scheduler.params.warmup_num_steps=5 vs hf warmup_steps=",
    ),
    "a compiler that does not exist": (
        {"torch_compile": True, "torch_compile_backend": "inducter"}, {}, {}, "torch_compile_backend='inducter' is",
    ),
    "no optimizer": (
        {"deepspeed": {**ZERO, "zero_optimization": {"stage": 2}}, "adam_beta1": 1.5}, {"peft": None}, {},
        "makes no optimizer (Invalid beta parameter",
    ),
    "an optimizer that is not installed": (
        {"optim": "galore_adamw", "optim_target_modules": "all-linear"}, {}, {}, "optim=galore_adamw",
    ),
    "ranks that do not see each other": (
        {"use_cpu": False}, {}, {}, "WORLD_SIZE=2 processes were started and each of them trains alone",
    ),
    "ranks that count to one": (
        {}, {}, {"WORLD_SIZE": "1", "RANK": "0"}, "WORLD_SIZE=1 and this machine alone has 2 processes",
    ),
}  # fmt: skip


def run_command(rank, folder, words, environment):
    """One rank of `hf-continual run`; leaves its exit code and what it wrote to stderr."""
    os.environ.update(environment)
    if environment.get("ACCELERATE_USE_DEEPSPEED"):
        distributed._GIVEN_BY_LAUNCHER = "true"
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(["run", *words])
    (folder / f"{rank}.json").write_text(json.dumps({"code": code, "said": said.getvalue()}))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("case", BAD)
def test_one_sentence_and_nothing_lost(case, model, tmp_path):
    training, sections, environment, expected = BAD[case]
    recipe = write_recipe(tmp_path, model, **sections)
    whole = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**whole, "training": {**whole["training"], **training}}))
    run_ranks(run_command, 2, tmp_path / "ranks", tmp_path, [str(recipe)], environment)  # a hang would be killed
    ends = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    spoken = [end for end in ends if expected in end["said"]]
    assert [end["code"] for end in ends] == [2, 2] and spoken, ends
    for end in ends:
        lines = [line for line in end["said"].splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("error: "), end["said"]
    assert not (tmp_path / "run" / "tasks").exists()


def test_the_corrected_recipe_runs_in_the_same_directory(model, tmp_path):
    recipe = write_recipe(tmp_path, model)
    for words, code in ((["--training.learning_rate", "-1"], 2), ([], 0)):
        run_ranks(run_command, 2, tmp_path / "ranks", tmp_path, [str(recipe), *words], {})
        assert [json.loads((tmp_path / f"{rank}.json").read_text())["code"] for rank in range(2)] == [code, code]
    assert json.loads((tmp_path / "run" / "queue.json").read_text())["finished"] is True


def test_an_engine_left_from_the_last_task(tmp_path):
    run_ranks(_two_trainers, 2, tmp_path, tmp_path)


def _two_trainers(rank, folder):
    def make(backend):
        args = make_args(backend, folder / backend, per_device_train_batch_size=4, max_steps=1)
        return ContinualTrainer(tiny_model(lora=True), args, train_dataset=toy_rows(), methods=["migu"])

    first = make("zero2")
    first.train()
    config = {**backend_options("zero2")["deepspeed"], "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    other = make_args("zero2", folder / "other", per_device_train_batch_size=4, deepspeed=config, optim="sgd")
    with pytest.raises(InputError, match="optimizer.type='AdamW' against training.optim='sgd'"):
        ContinualTrainer(tiny_model(lora=True), other, train_dataset=toy_rows()).train()
    with pytest.raises(InputError, match="DeepSpeed is still on from an earlier Trainer"):
        make("ddp").train()
    release_engine(first)
    second = make("ddp")
    second.train()
    assert second.dist.backend == "ddp"
    release_engine(second)
    third = make("zero3")
    third.train()
    split = third.accelerator.unwrap_model(third.model)
    with pytest.raises(InputError, match="saving adapters: the weight .* is split between the processes"):
        LoraView(split).save(folder / "never")
    with pytest.raises(InputError, match="merging adapters: .* use trainer.save_model"):
        merge_adapters(split)
    third.save_model(str(folder / "saved"))
    if rank == 0:
        saved = load_file(folder / "saved" / "adapter_model.safetensors")
        assert saved and all(tensor.numel() for tensor in saved.values())
