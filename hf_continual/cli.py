"""The command line: run, add, report, compare, ledger, merge, estimate, ls, env, validate.

Exit codes: 0 done, 2 bad input (one sentence), 3 more was forgotten than the gate allows (one sentence), 130
interrupted with the state saved, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import ForgettingLimit, InputError, Interrupted

if TYPE_CHECKING:
    from .recipes import Run
    from .task_queue import QueueResult, TaskQueue


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})  # of subparsers, too: --with_bound would train for hours

    def error(self, message: str) -> NoReturn:
        raise InputError(f"command line: {message}; see {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hf-continual", description="Learn one task after another without forgetting.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    run = commands.add_parser(
        "run", help="start or continue a recipe or a run directory",
        epilog="Any key of the recipe can follow as --section.key value, e.g. --training.learning_rate 1e-4 "
               "--methods '[{name: migu, threshold: 0.5}]' --run_dir DIR. With --accelerate_config, so can any "
               "option of accelerate launch, e.g. --num_processes 4.",
    )  # fmt: skip
    run.add_argument("recipe", help="YAML file, the name of a recipe of the package, or a run directory to continue")
    run.add_argument("--dry_run", action="store_true", help="resolve and check everything, train nothing")
    run.add_argument("--only", default=None, help="comma-separated variants to run")
    run.add_argument(
        "--accelerate_config", default=None, metavar="PRESET",
        help="several processes: ddp, fsdp2, zero1, zero2, zero3, zero3_offload, multi_node, or a file of accelerate",
    )  # fmt: skip
    run.add_argument(
        "--with_bounds", action="store_true",
        help="also run, with every seed, naive (no method), independent (each task alone) and joint (all at once)",
    )  # fmt: skip
    run.add_argument(
        "--with_padded_control", action="store_true",
        help="also run each variant that replays with rows of the present task in the place of the old ones",
    )  # fmt: skip
    run.add_argument(
        "--max_forgetting", type=float, default=None, metavar="LIMIT",
        help="after each task: the most that a task seen before may have lost of its best score, such as 0.05; exit "
             "code 3 if one lost more (--gate.measure mean compares the mean)",
    )  # fmt: skip
    run.add_argument(
        "--on_violation", default=None, metavar="ACTION",
        help="then stop (default), rollback (leave the task out and go on), or rehearse (train on old rows, then stop)",
    )  # fmt: skip
    run.add_argument("--isolate_tasks", action="store_true", help="learn each task in processes of its own")
    run.add_argument("--one_task", action="store_true", help=argparse.SUPPRESS)

    add = commands.add_parser("add", help="append a task to a run's queue and learn it")
    add.add_argument("run", help="run directory")
    add.add_argument("task", help="YAML file with one task: name, path, ...")
    add.add_argument("--no_run", action="store_true", help="append only")

    report = commands.add_parser("report", help="score matrix, metrics, report.md and PNG of a run or a folder of runs")
    report.add_argument("run", help="run directory, or a folder of them")
    report.add_argument("-o", "--out", default=None, help="folder of the report; default: the run's")
    report.add_argument("--scorer", default=None, help="score the kept predictions with this one, without the model")
    report.add_argument(
        "--convention", default="default", metavar="NAME",
        help="also the metrics as this paper or library computes them, such as sapt, trace, tasl, seekr or mammoth, "
             "and where conventions differ",
    )  # fmt: skip
    report.add_argument(
        "--single_task", default=None, metavar="DIR",
        help="a folder with a run of each task alone, for the forward transfer of SAPT",
    )  # fmt: skip

    compare = commands.add_parser("compare", help="variants paired by seed: differences with confidence intervals")
    compare.add_argument("runs", nargs="+", metavar="run", help="run directories, or folders of them")
    compare.add_argument(
        "--metric", default="average_performance", help="such as backward_transfer, forgetting or forgetting/sapt"
    )
    compare.add_argument("--against", default=None, metavar="VARIANT", help="compare with this one; default: the first")
    compare.add_argument("--scorer", default=None, help="score the kept predictions with this one, without the model")

    merge = commands.add_parser(
        "merge", help="write a run's model with its adapters merged in; or fuse two stored adapters or models",
        epilog="Fusing: hf-continual merge --method kif --previous DIR --current DIR --importance DIR -o OUT",
    )  # fmt: skip
    merge.add_argument(
        "run", nargs="?", default=None, help="run directory, whose model is written as plain transformers"
    )
    merge.add_argument("-o", "--out", required=True, help="folder to write")
    merge.add_argument("--task", default=None, help="as it was after this task; default: the last learnt")
    merge.add_argument(
        "--push_to_hub", default=None, metavar="USER/NAME", help="also upload it with its model card, private if new"
    )
    merge.add_argument("--method", default=None, help="fuse stored weights with tasl, kif or weight_ensemble instead")
    merge.add_argument("--previous", default=None, help="adapter or model from before the task, or a task's folder")
    merge.add_argument("--current", default=None, help="the one learnt from it, not merged yet")
    merge.add_argument(
        "--importance", nargs="+", action="extend", default=None, metavar="PATH",
        help="a task's folder or its methods/kif.json, for the scores; a second one for those of the past",
    )  # fmt: skip
    merge.add_argument(
        "--options", default="{}",
        help="options of the method, such as '{temperature: 0.15}'; default: those stored with the importance",
    )  # fmt: skip

    estimate = commands.add_parser(
        "estimate", help="memory per GPU of a recipe, by part, without loading the model",
        epilog="Any key of the recipe can follow as --section.key value.",
    )  # fmt: skip
    estimate.add_argument("recipe", help="YAML file, or the name of a recipe of the package")
    estimate.add_argument("--gpus", type=int, required=True, help="how many GPUs train together")
    estimate.add_argument("--gpu_memory", required=True, help="memory of one of them, such as 80GB")
    estimate.add_argument("--only", default=None, help="comma-separated variants")
    estimate.add_argument(
        "--accelerate_config", default=None, metavar="NAME", help="preset or file that the run would be started with"
    )

    ledger = commands.add_parser("ledger", help="published numbers beside ours: keep results of runs, write the tables")
    actions = ledger.add_subparsers(dest="ledger_command", required=True, metavar="action")
    keep = actions.add_parser("add", help="distil finished runs into small result files, to be committed")
    keep.add_argument("runs", nargs="+", metavar="run", help="run directories, or folders of them")
    keep.add_argument("--results", default="benchmarks/results", metavar="DIR", help="where the files are kept")
    keep.add_argument("--hardware", default=None, help="what the runs were made on, such as '8 A100'")
    keep.add_argument("--note", action="append", default=[], help="a sentence for the tables; may be given again")
    keep.add_argument("--title", default=None, help="the entry's name in tables; default: the variant")
    keep.add_argument("--group", default=None, metavar="NAME", help="folder of the entry; default: the recipe's name")
    keep.add_argument("--stream", default=None, metavar="NAME", help="the stream of a recipe that lists its tasks")
    keep.add_argument("--recipe", default=None, help="the recipe the runs are of; default: that of the same name")
    keep.add_argument("--model", default=None, metavar="ID", help="hub id of a model that was read from a folder")
    keep.add_argument("--detail_only", action="store_true", help="only in the tables of the stream, not in the first")
    keep.add_argument("--skip_unfinished", action="store_true", help="leave unfinished runs out instead of refusing")
    write = actions.add_parser("write", help="make the tables from the result files")
    write.add_argument("--results", default="benchmarks/results", metavar="DIR", help="where the files are kept")
    write.add_argument("--into", default="METHODS.md", metavar="FILE", help="file with the two markers")
    write.add_argument("--paper_numbers", default=None, metavar="FILE", help="published numbers of your own")
    write.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the file would change")

    ls = commands.add_parser("ls", help="list what the package brings")
    ls.add_argument("what", choices=("methods", "streams", "recipes"))
    ls.add_argument(
        "name", nargs="?", default=None,
        help="a method, whose options are then explained; or a stream: name, name:variant or a stream file",
    )  # fmt: skip
    ls.add_argument(
        "--data_dir", default=None, metavar="DIR", help="of a stream: show the rows found there, and their hash"
    )

    env = commands.add_parser("env", help="versions, hardware and torch.compile, for bug reports")
    env.add_argument(
        "--compile", nargs="*", default=None, metavar="METHOD",
        help="also compile a toy model with each of these methods (none named: all) and count its graph breaks",
    )  # fmt: skip

    validate = commands.add_parser("validate", help="check that a method keeps the contract")
    validate.add_argument("method", help="name, or package.module:Class")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    code, sentence = _main(argv)
    if sentence:
        from .launch import report_end

        ended = report_end(code, sentence)  # a worker tells the command that started it, which prints it once
        if ended is not None:
            return ended
        print(sentence, file=sys.stderr)
    return code


def _main(argv: Sequence[str] | None) -> tuple[int, str]:
    """The exit code, and the sentence to end with."""
    import logging

    # Said at every import on CPUs with AVX512-BF16, of a kernel for inference that keep_layout switches off.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        args, rest = make_parser().parse_known_args(argv)
        if rest and args.command not in ("run", "estimate"):
            raise InputError(
                f"command line: {args.command} has no option {rest[0]}; see hf-continual {args.command} --help"
            )
        return COMMANDS[args.command](args, rest), ""
    except InputError as error:
        return 2, f"error: {error}"
    except ForgettingLimit as error:
        return 3, f"forgotten: {error}"
    except (Interrupted, KeyboardInterrupt) as error:
        return 130, f"interrupted: {str(error) or 'stopped'}; run the same command again to continue"
    except BrokenPipeError:
        return 1, ""
    except Exception as error:
        from .run_state import disk_full

        if not disk_full(error):
            raise
        return 2, "error: the disk is full; free some space and run the same command again"


def _run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from . import launch, recipes
    from .models import quiet

    quiet()
    launcher, words = launch.split_flags(rest)
    if args.accelerate_config is not None:
        return _launch(args, launcher, words)
    launch.refuse_flags(launcher)
    launch.register_worker()
    overrides = recipes.parse_overrides(words)
    given = {"max_forgetting": args.max_forgetting, "on_violation": args.on_violation}
    given = {key: value for key, value in given.items() if value is not None}
    if Path(args.recipe).is_dir():
        for flag in ("with_bounds", "with_padded_control"):
            if getattr(args, flag):
                raise InputError(
                    f"command line: --{flag} adds runs to those of a recipe, and {args.recipe} is one run; give the "
                    "recipe"
                )
        if overrides:
            raise InputError(
                f"command line: the run directory {args.recipe} is continued as it is; change a recipe instead"
            )
        run = recipes.open_run(args.recipe)
        if given:
            recipes.set_gate(run, {**_gate_of(run.recipe, given), **given})
        runs, root = [run], run.run_dir
    else:
        overrides |= {f"gate.{key}": value for key, value in given.items()}
        path = recipes.find_recipe(args.recipe)
        recipe = recipes.load_recipe(path)
        if recipe.get("gate") and given:
            recipe["gate"] = _gate_of(recipe, given)
        launch.check_recipe(recipe, overrides, path.parent.resolve())
        runs = recipes.expand(recipe, path.parent.resolve(), overrides)
        added = _bounds_and_controls(args, recipe, runs, overrides)
        own = {str(r.variant) for r in runs}
        runs += added
        if args.only:
            wanted = recipes.variants_named(args.only, runs)
            # With a variant come its control and the bounds, which were asked for by flags.
            chosen = {str(r.variant) for r in added if str(r.variant).removesuffix("+padded") in wanted}
            chosen |= {str(r.variant) for r in added if own & set(wanted) and "+padded" not in str(r.variant)}
            runs = [r for r in runs if str(r.variant) in {*wanted, *chosen}]
        shared = {r.run_dir for r in runs}
        root = runs[0].run_dir if len(runs) == 1 else Path(os.path.commonpath([str(d) for d in shared]))
    for run in runs:
        launch.check_launch(run.recipe, base_dir=run.base_dir)
    main_process = os.environ.get("RANK", "0") == "0"
    if args.dry_run:
        for run in runs:
            queue = run.queue()
            queue.check()
            methods = "+".join(m["name"] for m in run.recipe["methods"]) or "naive"
            rows = ", ".join(
                f"{t.name} ({len(t.train_dataset)} train, {len(t.eval_dataset)} eval)" for t in queue.stream
            )
            if main_process:
                variant = f"{run.variant}, " if run.variant else ""
                print(f"{run.run_dir}: {variant}{methods}, seed {run.seed}; tasks: {rows}")
                _print_stream(queue)
        if main_process:
            print(f"dry run: {len(runs)} run(s) resolved and checked, nothing trained")
        launch.report_end(0, finished=True)
        return 0
    forgotten = []
    for number, run in enumerate(runs, 1):
        queue = run.queue()
        if args.one_task and number < len(runs) and _finished(queue) and not run.recipe.get("gate"):
            continue
        if len(runs) > 1 and main_process:
            print(
                f"\n#### run {number}/{len(runs)}: {run.variant or 'recipe'}, seed {run.seed} -> {run.run_dir}",
                flush=True,
            )
        began = _cursor(queue)
        try:
            result = queue.run(one_task=args.one_task, isolate_tasks=args.isolate_tasks)
        except ForgettingLimit as error:
            forgotten.append(str(error))
            if args.one_task and _cursor(queue) != began:
                launch.report_end(0, finished=False)
                return 0
            continue
        whole = _finished(queue)
        if args.one_task and not (whole and (number == len(runs) or _cursor(queue) == began)):
            launch.report_end(0, finished=False)
            return 0
        if run.recipe.get("gate"):
            forgotten += _left_out(result)
    if main_process:
        _print_report(root)
    if forgotten:
        raise ForgettingLimit("; ".join(forgotten))
    launch.report_end(0, finished=True)
    return 0


def _left_out(result: QueueResult) -> list[str]:
    """A sentence on what the gate has taken out of a run, if anything."""
    names = ", ".join(f"'{entry['name']}'" for entry in result.rejected)
    if not names:
        return []
    return [
        f"run directory {result.run_dir} left out {names}, after which a task had lost more than the gate allows; add "
        "it again under another name and trained less, or in another run directory with a method against forgetting"
    ]


def _gate_of(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """The recipe's gate, without how to rehearse where the command line says to do something else."""
    gate = recipe.get("gate") or {}
    if given.get("on_violation", "rehearse") == "rehearse" or not isinstance(gate, Mapping):
        return gate
    return {key: value for key, value in gate.items() if not str(key).startswith("rehearsal_")}


def _bounds_and_controls(
    args: argparse.Namespace, recipe: dict[str, Any], runs: Sequence[Run], overrides: dict[str, Any]
) -> list[Run]:
    """The runs that flags add to those of the recipe."""
    from . import bounds

    added = bounds.bounds_of(recipe, runs, overrides) if args.with_bounds else []
    if args.with_padded_control:
        controls, lines = bounds.padded(recipe, runs, overrides)
        added += controls
        if lines and os.environ.get("RANK", "0") == "0":
            print("\n".join(lines))
    return added


def _print_stream(queue: TaskQueue) -> None:
    """How the stream of a queue is cited, and how many of its rows no answer of the label set can be right for."""
    from .data import answers_outside_labels
    from .streams import named_hash

    if queue.named_stream is not None:
        print(f"  stream: {named_hash(queue.named_stream['name'], queue.named_stream['hash'])}")
    for task in queue.stream:
        if outside := answers_outside_labels(task):
            rows = f"{outside} of {len(task.eval_dataset)} evaluation rows"
            print(f"  {task.name}: {rows} are answered outside its labels and count as wrong")


def _launch(args: argparse.Namespace, launcher: Sequence[str], words: Sequence[str]) -> int:
    """Start the workers, each of which runs the same recipe without the launcher's options."""
    from . import launch

    if "RANK" in os.environ:
        raise InputError(
            f"--accelerate_config {args.accelerate_config}: a launcher has started this process already; leave it out"
        )
    rest = list(words)
    if args.only:
        rest += ["--only", args.only]
    for flag in ("dry_run", "with_bounds", "with_padded_control"):
        if getattr(args, flag):
            rest.append(f"--{flag}")
    for option in ("max_forgetting", "on_violation"):
        if getattr(args, option) is not None:
            rest += [f"--{option}", str(getattr(args, option))]
    command = launch.launch_command(args.accelerate_config, launcher, args.recipe, rest)
    return launch.run_launched(command, isolate_tasks=args.isolate_tasks and not args.dry_run)


def _finished(queue: TaskQueue) -> bool:
    """Whether every task of a queue is learnt and scored."""
    rejected = {entry["name"] for entry in queue.read_rejected()}
    return _cursor(queue) >= sum(task.name not in rejected for task in queue.learnt_tasks)


def _cursor(queue: TaskQueue) -> int:
    """How many tasks of a queue are learnt and scored; -1 before it was started."""
    if not (queue.directory.path / "queue.json").exists():
        return -1
    return int(queue.directory.read_queue()["cursor"])


def _estimate(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from . import recipes
    from .estimate_command import estimate_command

    if args.gpus < 1:
        raise InputError(f"--gpus {args.gpus} must be at least 1")
    return estimate_command(
        args.recipe, recipes.parse_overrides(rest), args.gpus, args.gpu_memory, args.only, args.accelerate_config
    )


def _print_report(
    path: Path,
    out: str | None = None,
    scorer: str | None = None,
    convention: str = "default",
    single_task: str | None = None,
) -> None:
    from .report import print_report

    print()
    print_report(path, Path(out) if out else None, scorer, convention, single_task)


def _add(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from . import recipes
    from .models import quiet

    quiet()
    path = Path(args.task)
    if not path.is_file():
        raise InputError(f"task {args.task}: there is no such file; write a YAML file with name and path")
    spec = recipes.parse_yaml(recipes.read_text(path, "task"), str(path))
    queue = recipes.add_task(args.run, recipes.with_absolute_paths(spec, path.parent.resolve()))
    print(f"added task '{queue.stream[-1].name}' to {args.run}")
    if not args.no_run:
        result = queue.run()
        _print_report(Path(args.run))
        if queue.gated and (said := _left_out(result)):
            raise ForgettingLimit(said[0])
    return 0


def _report(args: argparse.Namespace, rest: Sequence[str]) -> int:
    _print_report(Path(args.run), args.out, args.scorer, args.convention, args.single_task)
    return 0


def _compare(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from .compare import compare_runs, comparison_text

    print(comparison_text(compare_runs(args.runs, args.metric, args.scorer, args.against)))
    return 0


def _ledger(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from .ledger import add_runs, write_ledger

    if args.ledger_command == "add":
        options = ("group", "title", "stream", "hardware", "recipe", "model", "detail_only", "skip_unfinished")
        given = {name: getattr(args, name) for name in options}
        print("\n".join(add_runs(args.runs, args.results, notes=args.note, **given)))
        return 0
    difference = write_ledger(args.results, args.into, args.paper_numbers, args.check)
    if difference is None:
        print(f"{args.into} is what the result files give")
    elif args.check:
        print(f"{args.into} is not what the result files give; run hf-continual ledger write ({difference})")
        return 1
    else:
        print(f"wrote the ledger into {args.into}")
    return 0


def _merge(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from .merging import push_merged, write_merged
    from .models import quiet

    quiet()
    if args.method is not None or args.previous or args.current or args.importance:
        return _fuse(args)
    if args.run is None:
        raise InputError("command line: merge needs a run directory, or --method with --previous and --current")
    task = write_merged(args.run, args.out, args.task)
    print(f"wrote the model after task '{task}' and its model card to {args.out}")
    if args.push_to_hub is not None:
        print(f"uploaded to {push_merged(args.out, args.push_to_hub)}")
    return 0


def _fuse(args: argparse.Namespace) -> int:
    from .offline_merge import describe, merge_offline
    from .recipes import parse_yaml

    for option, value in (("--method", args.method), ("--previous", args.previous), ("--current", args.current)):
        if value is None:
            raise InputError(
                f"command line: fusing stored weights needs {option} as well; see hf-continual merge --help"
            )
    if args.run is not None or args.task is not None or args.push_to_hub is not None:
        raise InputError(
            "command line: --method fuses the weights of --previous and --current; leave out the run, --task and "
            "--push_to_hub"
        )
    options = parse_yaml(args.options, "--options")
    if not isinstance(options, dict):
        raise InputError(f"--options {args.options}: write a mapping, such as '{{temperature: 0.15}}'")
    summary = merge_offline(args.method, args.previous, args.current, args.importance or [], args.out, options)
    print(f"{describe(summary)}\nwrote {args.out}")
    return 0


def _ls(args: argparse.Namespace, rest: Sequence[str]) -> int:
    if args.data_dir is not None and (args.what != "streams" or args.name is None):
        raise InputError(
            f"command line: --data_dir {args.data_dir} is for one stream; write hf-continual ls streams NAME "
            f"--data_dir {args.data_dir}"
        )
    if args.what == "streams" and args.name is not None:
        import datasets

        from .models import quiet
        from .streams.show import stream_text

        quiet()
        datasets.disable_progress_bars()
        print(stream_text(args.name, args.data_dir))
        return 0
    if args.name is not None:
        return _explain(args)
    if args.what == "methods":
        from .methods.base import method_class, method_names

        for name in method_names():
            cls = method_class(name)
            summary = (cls.__doc__ or "").strip().splitlines()[0]
            print(f"{name:15} {cls.paper:18} {summary}")
    elif args.what == "streams":
        from .streams.show import streams_text

        print(streams_text())
    else:
        from .recipes import load_recipe, recipe_files

        for name, path in recipe_files().items():
            recipe = load_recipe(path)
            print(f"{name:32} {', '.join(recipe.get('variants') or {}) or 'one run'}")
    return 0


def _explain(args: argparse.Namespace) -> int:
    """The options of one method, with their defaults."""
    import dataclasses
    import textwrap

    from .methods.base import method_class

    if args.what != "methods":
        raise InputError(
            f"command line: ls {args.what} takes no name; a method's options: hf-continual ls methods NAME"
        )
    cls = method_class(args.name)
    print(f"{cls.name} ({cls.paper}): {(cls.__doc__ or '').strip().splitlines()[0]}")
    for option in dataclasses.fields(cls.config_class):
        print(f"  {option.name} = {option.default!r}")
        print(textwrap.indent(textwrap.fill(option.metadata.get("help", ""), 100), "      "))
    return 0


def _env(args: argparse.Namespace, rest: Sequence[str]) -> int:
    import importlib.metadata
    import importlib.util
    import platform

    import torch

    from .compilation import describe_compile
    from .methods.base import method_names
    from .provenance import versions

    for name, version in versions().items():
        print(f"{name}: {version}")
    for name in ("bitsandbytes", "deepspeed"):
        found = importlib.util.find_spec(name) is not None
        print(f"{name}: {importlib.metadata.version(name) if found else 'not installed'}")
    print(f"platform: {platform.platform()}\ncpus: {os.cpu_count()} (torch threads: {torch.get_num_threads()})")
    for i in range(torch.cuda.device_count()):
        print(f"gpu {i}: {torch.cuda.get_device_name(i)}")
    if not torch.cuda.is_available():
        print("gpu: none")
    print(describe_compile())
    if args.compile is not None:
        _count_breaks(args.compile or method_names())
    return 0


def _count_breaks(methods: Sequence[str]) -> None:
    """One line a method: graphs and graph breaks of its second toy task, and where it broke."""
    import logging

    from .compilation import DEFAULT_OPTIONS, first_line, toy_graph_breaks
    from .methods.base import make_method
    from .models import quiet

    quiet()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    made = [make_method({"name": name, **DEFAULT_OPTIONS.get(name, {})}) for name in methods]  # names, before training
    for method in made:
        report = toy_graph_breaks(method)
        print(f"compiled with {method.name}: {report}", flush=True)
        for reason, times in report.breaks.items():
            print(f"  {times} x {first_line(reason)}", flush=True)


def _validate(args: argparse.Namespace, rest: Sequence[str]) -> int:
    import gc

    import datasets

    from .models import quiet
    from .testing import check_method

    quiet()
    datasets.disable_progress_bars()

    gc.freeze()  # every check trains a tiny model, and the Trainer collects garbage each time
    results = check_method(args.method, report=lambda line: print(line, flush=True))
    failed = [result for result in results if not result.passed]
    print(f"{args.method}: {len(results) - len(failed)} checks passed, {len(failed)} failed")
    return 1 if failed else 0


COMMANDS = {
    "run": _run,
    "add": _add,
    "report": _report,
    "compare": _compare,
    "ledger": _ledger,
    "merge": _merge,
    "estimate": _estimate,
    "ls": _ls,
    "env": _env,
    "validate": _validate,
}

if __name__ == "__main__":
    sys.exit(main())
