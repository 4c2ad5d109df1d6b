import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from toy_runs import assert_same, save_model, write_recipe

from hf_continual import InputError
from hf_continual.cli import main, make_parser
from hf_continual.launch import (
    RUN_OPTIONS,
    STATUS,
    check_launch,
    check_recipe,
    find_config,
    launch_command,
    launcher_options,
    presets,
    refuse_flags,
    report_end,
    run_launched,
    split_flags,
)
from hf_continual.recipes import recipe_files
from hf_continual.run_state import RunDirectory

NAMES = {"ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload", "multi_node"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "no"}


def test_presets_are_no_recipes():
    assert set(presets()) == NAMES
    assert not any("accelerate_configs" in name for name in recipe_files())


@pytest.mark.parametrize("name", sorted(NAMES))
def test_accelerate_takes_each_preset(name):
    """Its own parser and validation, up to where it would start processes, and the variables for the workers."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--num_processes", "4", "--main_process_port", "0"]
    if name == "multi_node":
        words = ["--num_processes", "4", "--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "node-a",
                 "--main_process_port", "29500"]  # fmt: skip
    command = launch_command(name, words, "r.yaml", [], gpus=4)
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command[3:]))
    assert args.module and args.training_script == "hf_continual.cli"
    assert args.training_script_args == ["run", "r.yaml"]
    assert args.num_processes == 4 and not args.use_cpu and args.mixed_precision == "no"
    assert args.use_deepspeed is name.startswith("zero") and args.use_fsdp is (name == "fsdp2")
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        found = prepare_deepspeed_cmd_env(args)[1]
        assert found["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == name[4]
        assert found["ACCELERATE_GRADIENT_CLIPPING"] == found["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"
        offload = "cpu" if name.endswith("offload") else "none"
        assert found["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] == offload
    else:
        found = prepare_multi_gpu_env(args)
        assert args.multi_gpu is (name != "fsdp2")
        assert found.get("FSDP_VERSION") == ("2" if name == "fsdp2" else None)
    if name == "multi_node":
        assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "2", 1) and args.main_process_ip == "node-a"
    check_launch({"training": {}}, found)


def test_flags_are_split():
    words = ["--num_processes", "4", "--training.learning_rate", "1e-4", "--seeds=[1, 2]", "--main-process-port=29501",
             "--debug", "--run_dir", "x", "--methods", "[migu]"]  # fmt: skip
    launcher, overrides = split_flags(words)
    assert launcher == ["--num_processes", "4", "--main_process_port", "29501", "--debug"]
    assert overrides == ["--training.learning_rate", "1e-4", "--seeds=[1, 2]", "--run_dir", "x", "--methods", "[migu]"]


def test_options_are_those_of_accelerate():
    options = launcher_options()
    assert {"num_processes", "main_process_port", "zero_stage", "fsdp_version", "config_file"} <= set(options)
    assert options["debug"].nargs == 0 and options["num_processes"].nargs is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num_proceses", "2"], "no option --num_proceses; did you mean 'num_processes'"),
        (["--sed", "2"], "no option --sed; did you mean 'seed'"),
        (["--accelerate_confg", "zero2"], "no option --accelerate_confg; did you mean 'accelerate_config'"),
        (["--isolate_task"], "no option --isolate_task; did you mean 'isolate_tasks'"),
        (["--num_processes"], "--num_processes has no value"),
        (["stray"], "'stray' belongs to no option"),
        (["--config_file", "x"], "use --accelerate_config FILE"),
        (["--num_processes", "two"], "--num_processes=two: accelerate launch cannot read this value"),
        (["--num-processes=0"], "--num-processes=0 must be a whole number, at least 1"),
        (["--num_machines", "-1"], "--num_machines=-1 must be"),
    ],
)
def test_other_flags_are_refused(words, said):
    with pytest.raises(InputError, match=said):
        split_flags(words)


def test_options_of_run_are_suggested_too():
    given = vars(make_parser().parse_args(["run", "recipe.yaml"]))
    assert set(given) - set(RUN_OPTIONS) == {"command", "recipe", "one_task"}  # one_task is ours alone


def test_launcher_flags_need_a_configuration(capsys):
    with pytest.raises(InputError, match="--num_processes is an option of accelerate launch; add --accelerate_config"):
        refuse_flags(["--num_processes", "2"])
    refuse_flags([])
    assert main(["run", "quickstart", "--num_processes", "2"]) == 2
    assert "add --accelerate_config" in capsys.readouterr().err


def test_configurations_that_would_start_something_else(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"distributed_type": "MULTI_GPU", "num_processes": 3}))
    assert "--num_processes" not in launch_command(str(mine), [], "r", [], gpus=0)
    assert launch_command("ddp", [], "r", ["--seed", "1"], gpus=2)[5:7] == ["--num_processes", "2"]
    for flags in (["--gpu_ids", "0,1"], []):
        mine.write_text(yaml.safe_dump({"distributed_type": "MULTI_GPU", "gpu_ids": "all" if flags else "2,5"}))
        assert launch_command(str(mine), flags, "r", [], gpus=8)[5:7] == ["--num_processes", "2"]
    one = tmp_path / "fsdp1.yaml"
    one.write_text(yaml.safe_dump({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}))
    mine.write_text(yaml.safe_dump({"distributed_type": "MULTI_CPU", "num_processes": 3}))
    cases = [
        (str(one), ["--num_processes", "2"], "it starts FSDP1"),
        ("ddp", ["--num_processes", "2", "--use_fsdp", "--fsdp_version", "1"], "it starts FSDP1"),
        (str(mine), [], "accelerate starts one process on the CPU"),
        ("ddp", ["--cpu"], "accelerate starts one process on the CPU"),
        ("fsdp2", ["--num_processes", "2"], "FSDP needs a GPU"),
        ("ddp", [], "--num_processes is missing and this machine has no GPUs"),
        ("zero4", [], "no such preset; did you mean 'zero"),
        ("zero2", ["--num_machines", "2"], "processes of all machines together"),
        ("multi_node", ["--num_processes", "4"], "--num_machines is missing"),
    ]
    for config, launcher, said in cases:
        with pytest.raises(InputError, match=said):
            launch_command(config, launcher, "r", [], gpus=0)
    mine.write_text("distributed_type: MULTI_GPU\nnum_procs: 3\n")
    with pytest.raises(InputError, match="accelerate cannot read it .*num_procs"):
        find_config(str(mine))


@pytest.mark.parametrize(
    ("training", "environment", "said"),
    [
        ({"deepspeed": {}}, {}, None),
        ({"deepspeed": {"gradient_clipping": "auto"}}, {}, None),  # torchrun
        ({"deepspeed": {"gradient_clipping": "auto"}}, DEEPSPEED, "launcher brings DeepSpeed too"),
        ({"deepspeed": {"gradient_clipping": "auto"}}, {"ACCELERATE_MIXED_PRECISION": "no"}, "starts no DeepSpeed"),
        ({}, {**DEEPSPEED, "ACCELERATE_USE_CPU": "true"}, "unset it"),
        ({"fsdp": True}, DEEPSPEED, "the launcher brings DeepSpeed"),
        ({"fsdp": "full_shard"}, {}, "training.fsdp='full_shard' and no launcher started this process"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP1"),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, None),
        ({"use_cpu": True}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "needs GPUs"),
        ({}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, "training.bf16=False and the launcher"),
        ({"bf16": True}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, None),
        ({"bf16": True}, {"ACCELERATE_MIXED_PRECISION": "no"}, None),
        ({}, {**DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "=0.5 against training.max_grad_norm=1.0"),
        ({"max_grad_norm": 0.5}, {**DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "0.5"}, None),
        ({}, {**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "training.gradient_accumulation_steps=1"),
        ({}, {**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, None),
        ({}, {"WORLD_SIZE": "1", "LOCAL_RANK": "1"}, "WORLD_SIZE=1 and this machine alone has 2 processes"),
        ({}, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "which do not know of each other"),
        ({}, {"WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, None),
    ],
)
def test_launcher_and_recipe_disagree(training, environment, said):
    if said is None:
        check_launch({"training": {"max_grad_norm": 0, **training}} if training.get("deepspeed") == {} else
                     {"training": training}, environment)  # fmt: skip
    else:
        with pytest.raises(InputError, match=said):
            check_launch({"training": training}, environment)


@pytest.mark.parametrize(
    ("config", "training", "said"),
    [
        ({"optimizer": {"type": "Lion"}}, {}, "optimizer.type='Lion' against training.optim"),
        ({"optimizer": {"type": "AdamW"}}, {"optim": "adafactor"}, "against training.optim='adafactor'"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, {"learning_rate": 1e-4}, "training.learning_rate"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, {}, None),
        ({"gradient_clipping": None}, {}, "DeepSpeed would not clip"),
        ({"gradient_clipping": None}, {"max_grad_norm": 0.0}, None),
        ({"gradient_accumulation_steps": 2}, {}, "against training.gradient_accumulation_steps=1"),
        ({"train_micro_batch_size_per_gpu": 4}, {"per_device_train_batch_size": 4}, None),
        ({"bf16": {"enabled": True}}, {}, "bf16.enabled=True against training.bf16=False"),
        ({"bf16": {"enabled": "auto"}}, {}, None),
        ({"zero_optimisation": {"stage": 3}}, {}, "ignores the key 'zero_optimisation'; did you mean 'zero_optimiz"),
        ({"zero_allow_untested_optimizer": True, "elasticity": {}}, {}, None),
    ],
)
def test_deepspeed_config_and_recipe_disagree(tmp_path, config, training, said):
    config = {"gradient_clipping": "auto", "zero_optimization": {"stage": 2}} | config
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    ways = [
        ({**training, "deepspeed": config}, {}),
        ({**training, "deepspeed": "ds.json"}, {}),
        (training, {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}),
    ]
    for given, environment in ways:
        if said is None:
            check_launch({"training": given}, environment, tmp_path)
        else:
            with pytest.raises(InputError, match=said):
                check_launch({"training": given}, environment, tmp_path)
    with pytest.raises(InputError, match="it cannot be read"):
        check_launch({"training": {"deepspeed": "absent.json"}}, {})


def test_the_batch_of_a_deepspeed_config():
    config = {"gradient_clipping": "auto", "train_batch_size": 64}
    given = {"deepspeed": config, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    check_launch({"training": given}, {"WORLD_SIZE": "8"})
    check_launch({"training": given}, {})  # before the processes are started
    with pytest.raises(InputError, match="train_batch_size=64 against 4 x 2 x 2"):
        check_launch({"training": given}, {"WORLD_SIZE": "2"})


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process is not told of its parent's end")
def test_a_killed_command_leaves_no_workers(tmp_path):
    """A worker that trained on would write into the run directory that the next command opens."""
    note = tmp_path / "pid"
    worker = f"import os, pathlib, time; pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(60)"
    words = [sys.executable, "-c", worker]
    own = subprocess.Popen([sys.executable, "-c", f"from hf_continual.launch import run_launched as r; r({words!r})"])
    _wait_for(lambda: note.exists() and note.read_text())
    own.kill()
    own.wait()
    _wait_for(lambda: not Path(f"/proc/{note.read_text()}").exists())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process is not told of its parent's end")
def test_a_killed_queue_leaves_no_isolated_task(tmp_path, model):
    words = ["run", str(write_recipe(tmp_path, model)), "--isolate_tasks", "--training.num_train_epochs", "100000"]
    code = f"import sys; from hf_continual.cli import main; sys.exit(main({words!r}))"
    own = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = tmp_path / "run" / "work"
    _wait_for(lambda: next(work.glob("*/checkpoint-*"), None))
    own.kill()
    own.wait()
    _wait_for(lambda: _is_free(tmp_path / "run"))


def _is_free(run):
    with contextlib.suppress(InputError), RunDirectory(run).locked():
        return True
    return False


def _wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_each_variant_is_checked_as_written(tmp_path):
    """Before training arguments are made of it, in which transformers would answer with several lines."""
    config = {"gradient_clipping": "auto", "zero_optimization": {"stage": 3}}
    recipe = {
        "training": {"learning_rate": 1e-4},
        "variants": {"plain": None, "split": {"training": {"deepspeed": config}}},
    }
    check_recipe(recipe, {}, tmp_path, {})
    for given, overrides in (
        (recipe, {}),
        ({"training": {}}, {"training.deepspeed": config}),
        ({}, {"variants": {"a": {"training": {"deepspeed": config}}}}),
    ):
        with pytest.raises(InputError, match="launcher brings DeepSpeed too"):
            check_recipe(given, overrides, tmp_path, DEEPSPEED)
    check_recipe(recipe, {"training.deepspeed": None}, tmp_path, DEEPSPEED)
    check_recipe({"training": 3, "variants": {"a": 4}}, {}, tmp_path, DEEPSPEED)  # refused where recipes are read


def test_deepspeed_that_is_not_installed(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else find(name, *a))
    with pytest.raises(InputError, match=r"--accelerate_config zero2: .*pip install 'hf-continual\[deepspeed\]'"):
        launch_command("zero2", ["--num_processes", "2"], "r", [], gpus=0)
    with pytest.raises(InputError, match=r"--accelerate_config ddp: DeepSpeed is not installed"):
        launch_command("ddp", ["--num_processes", "2", "--use_deepspeed"], "r", [], gpus=0)
    with pytest.raises(InputError, match=r"training.deepspeed is given: .*pip install 'hf-continual\[deepspeed\]'"):
        check_launch({"training": {"deepspeed": {"gradient_clipping": "auto"}}}, {})
    launch_command("ddp", ["--num_processes", "2"], "r", [], gpus=0)


# -- how workers end -------------------------------------------------------------------------------------------------


def test_ends_of_workers(tmp_path):
    assert report_end(2, "error: x", environment={}) is None
    alone = {STATUS: str(tmp_path), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    assert report_end(2, "error: x", environment=alone) == 0
    many = {**alone, "RANK": "1", "WORLD_SIZE": "4"}
    assert report_end(2, "error: x", environment=many) == 2  # others on another machine must be stopped


def test_under_torchrun_a_sentence_comes_once(tmp_path):
    ranks = [{"TORCHELASTIC_ERROR_FILE": str(tmp_path / "attempt_0" / str(r) / "error.json")} for r in range(3)]
    (tmp_path / "attempt_0" / "0").mkdir(parents=True)
    ends = [
        report_end(2, message, environment=ranks[r]) for r, message in enumerate(("error: x", "error: x", "error: y"))
    ]
    assert ends == [None, 2, None]
    assert report_end(0, finished=True, environment=ranks[0]) is None
    absent = {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "absent" / "0" / "error.json")}
    assert [report_end(2, "error: x", environment=absent) for _ in range(2)] == [None, None]


def _stub(body):
    return [sys.executable, "-c", f"import os, sys, time, json, signal\nfrom pathlib import Path\n{body}"]


WRITE = "folder = Path(os.environ['HF_CONTINUAL_LAUNCH_STATUS'])\n"


def test_the_sentence_is_printed_once_and_the_code_survives(capfd):
    ends = "".join(
        f"(folder / '{r}.end').write_text(json.dumps({{'rank': {r}, 'code': {c}, 'message': {m!r}, 'lost': {lost}}}))\n"
        for r, c, m, lost in ((0, 2, "error: lost it", True), (1, 2, "error: the cause", False))
    )
    assert run_launched(_stub(WRITE + ends + "sys.exit(1)")) == 2
    assert capfd.readouterr().err == "error: the cause\n"
    assert run_launched(_stub("sys.exit(7)")) == 7
    with pytest.raises(InputError, match="without starting a run"):
        run_launched(_stub("pass"))


def test_one_launch_a_task(tmp_path):
    count = tmp_path / "count"
    body = (
        f"count = Path({str(count)!r})\nn = len(count.read_text()) if count.exists() else 0\n"
        "count.write_text('x' * (n + 1))\nassert sys.argv[-1] == '--one_task'\n"
        "(folder / '0.end').write_text(json.dumps({'rank': 0, 'code': 0, 'message': '', 'finished': n == 2}))\n"
    )
    assert run_launched(_stub(WRITE + body), isolate_tasks=True) == 0
    assert count.read_text() == "xxx"


def test_sigint_goes_to_the_workers_once(tmp_path):
    """The worker counts; the launcher above it, which would kill it, hears nothing."""
    body = (
        "n = []\nsignal.signal(signal.SIGINT, lambda *a: n.append(1))\n"
        "(folder / '0.pid').write_text(str(os.getpid()))\n"
        "end = time.monotonic() + 20\nwhile not n and time.monotonic() < end: time.sleep(0.05)\ntime.sleep(0.3)\n"
        "said = f'interrupted: {len(n)}'\n"
        "(folder / '0.end').write_text(json.dumps({'rank': 0, 'code': 130, 'message': said}))\n"
    )
    outer = f"import sys\nfrom hf_continual.launch import run_launched\nsys.exit(run_launched({_stub(WRITE + body)!r}))"
    process = subprocess.Popen([sys.executable, "-c", outer], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while time.monotonic() < until and not _child_listens(process.pid):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted: 1" in err


def _child_listens(pid):
    import psutil

    for child in psutil.Process(pid).children(recursive=True):
        folder = child.environ().get(STATUS)
        if folder and os.path.exists(f"{folder}/0.pid"):
            return True
    return False


# -- Slurm -----------------------------------------------------------------------------------------------------------

SLURM = Path(__file__).parent.parent / "recipes" / "slurm" / "multi_node.sbatch"
COMMANDS = {  # stand-ins that say what they were asked for
    "scontrol": 'case $1 in show) echo node-a; echo node-b;; *) echo "$@" >> "$LOG";; esac',
    "srun": 'while [[ $1 == -* ]]; do shift; done; for i in 0 1; do SLURM_NODEID=$i "$@"; done; sleep "$WAIT"',
    "hf-continual": 'printf "%s\\n" "$*" >> "$LOG"',
}


@pytest.fixture
def slurm(tmp_path):
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def start(*words, wait=0, **changes):
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "32", "WAIT": str(wait), **changes,
        }  # fmt: skip
        given = {name: value for name, value in environment.items() if value is not None}
        return subprocess.Popen(["bash", str(SLURM), *words], env=given, stderr=subprocess.PIPE, text=True)

    return start


def test_slurm_starts_each_node_with_its_own_rank(slurm, tmp_path):
    assert slurm("recipe.yaml", "--only", "migu", "--name", "two words").wait(20) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert line.startswith(
            "run recipe.yaml --only migu --name two words --accelerate_config multi_node --num_machines"
        )
        args, rest = make_parser().parse_known_args(line.replace("two words", "two").split())
        launcher, overrides = split_flags(rest)
        assert overrides == ["--name", "two"] and args.only == "migu"
        given = dict(zip(launcher[::2], launcher[1::2], strict=True))
        assert given == {
            "--num_machines": "2", "--machine_rank": str(rank), "--num_processes": "16", "--main_process_ip": "node-a",
            "--main_process_port": "23456",
        }  # fmt: skip
        launch_command(args.accelerate_config, launcher, args.recipe, overrides, gpus=8)


def test_slurm_queues_again_before_the_limit(slurm, tmp_path):
    process = slurm("recipe.yaml", wait=5, PRESET="zero2")
    until = time.monotonic() + 20
    while time.monotonic() < until and "zero2" not in (
        (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0
    assert (tmp_path / "log").read_text().splitlines()[-1] == "requeue 123456"


def test_slurm_says_what_is_missing(slurm):
    for name, said in (("SLURM_GPUS_ON_NODE", "no GPUs"), ("SLURM_CPUS_PER_TASK", "set --cpus-per-task above")):
        process = slurm("recipe.yaml", **{name: None})
        assert process.wait(20) != 0 and said in process.stderr.read()


# -- for real --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def _command(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hf_continual.cli", "run", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.distributed
@pytest.mark.slow
def test_ddp_run_and_one_launch_a_task(tmp_path, model):
    flags = ["--accelerate_config", "ddp", "--num_processes", "2", "--main_process_port", "0"]
    whole = _command(write_recipe(tmp_path / "whole", model), *flags)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("Report: ") == 1 and whole.stdout.count("== task 1/2") == 1
    queue = json.loads((tmp_path / "whole" / "run" / "queue.json").read_text())
    assert queue["world_size"] == 2 and queue["finished"]
    parts = _command(write_recipe(tmp_path / "parts", model), *flags, "--isolate_tasks")
    assert parts.returncode == 0, parts.stderr
    assert parts.stdout.count("Report: ") == 1
    assert_same(tmp_path / "parts" / "run", tmp_path / "whole" / "run")


@pytest.mark.distributed
@pytest.mark.slow
def test_bad_input_comes_back_as_two(tmp_path, model):
    path = write_recipe(tmp_path, model)
    done = _command(path, "--accelerate_config", "ddp", "--num_processes", "2", "--main_process_port", "0",
                    "--tasks.1.path", "absent.jsonl")  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and "absent.jsonl" in done.stderr
    assert "Traceback" not in done.stderr and "ChildFailedError" not in done.stderr
