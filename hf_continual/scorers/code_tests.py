"""pass@k: generated programs run against the tests of their problem."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

from ..errors import InputError
from .base import Row, Scores, mean

PERMISSION = "HF_ALLOW_CODE_EVAL"
TIMEOUT = 3.0
MEMORY_MIB = 1024
FILE_MIB = 1
# The end of a function body, by which Chen et al. 2021 stop sampling.
_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)

# Sets the limits, then becomes the program: limits stay over exec, and no code of ours runs beside the program. In a
# namespace the program is process 1, with whose end, or with the end of its parent, all that it started is killed.
_LAUNCHER = """
import ctypes, os, resource, signal, sys
cpu, memory, size, cut, program = sys.argv[1:]
if cut == "cut":
    user, process, network = 0x10000000, 0x20000000, 0x40000000
    if ctypes.CDLL(None).unshare(user | process | network):
        sys.exit("no namespace")
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.exit(code if code >= 0 else 128 - code)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
for name, value in (("CPU", cpu), ("AS", memory), ("FSIZE", size), ("CORE", 0), ("NOFILE", 64), ("NPROC", 1)):
    limit = getattr(resource, "RLIMIT_" + name, None)
    if limit is not None:
        hard = resource.getrlimit(limit)[1]
        value = int(value) if hard == resource.RLIM_INFINITY else min(int(value), hard)
        resource.setrlimit(limit, (value, value))
os.execv(sys.executable, [sys.executable, "-I", "-B", program])
"""


@dataclass(frozen=True)
class Verdict:
    """How a program ended: `passed`, `failed`, `timeout`; and the end of its error output."""

    outcome: str
    error: str = ""

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased pass@k from c right ones among n samples: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, Eq. 1)."""
    if n < k:
        raise InputError(f"pass@{k} needs at least {k} samples of each problem, and there are {n}")
    if n - c < k:
        return 1.0
    return 1.0 - prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def pass_at(k: int) -> Callable[[Sequence[Row], Sequence[str] | None], Scores]:
    """The scorer of pass@k."""

    def score(rows: Sequence[Row], labels: Sequence[str] | None = None) -> Scores:
        """Mean over problems of pass@k = 1 - C(n-c, k) / C(n, k), c of n samples passing the problem's tests.

        `prediction` is one sample or a list of n. A program is the sample after `prefix` (HumanEval's prompt), then
        `test`, then `check(entry_point)` if there is an `entry_point`; see `program_of`. It runs in a process of its
        own: 3 s, 1 GiB, an empty folder, almost no environment, no children unless the user is root, and no network
        where the system lets a user take it away (`network_cut` in the details). This keeps accidents in, not
        attacks: run programs of a model you do not trust in a container.
        """
        code_ready()
        samples = [[p] if isinstance(p, str) else list(p) for p in (row["prediction"] for row in rows)]
        for number, given in enumerate(samples):
            if len(given) < k or not all(isinstance(sample, str) for sample in given):
                raise InputError(
                    f"row {number}: scorer 'pass_at_{k}' needs {k} samples or more, as strings, not {len(given)}"
                )
        cut = network_can_be_cut()
        programs = [program_of(row, sample) for row, given in zip(rows, samples, strict=True) for sample in given]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            verdicts = iter(list(pool.map(partial(run_program, cut_network=cut), programs)))
        found = [[next(verdicts) for _ in given] for given in samples]
        scores = [pass_at_k(len(each), sum(v.passed for v in each), k) for each in found]
        flat = [verdict for each in found for verdict in each]
        details = {
            "programs": float(len(flat)),
            "timeouts": float(sum(v.outcome == "timeout" for v in flat)),
            "network_cut": float(cut),
        }
        return Scores(mean(scores), scores, details)

    return score


def code_ready() -> None:
    """Refuse unless the user allowed it.

    Raises:
        InputError: without the permission, or on a system without the means to limit a program.
    """
    if os.environ.get(PERMISSION) != "1":
        raise InputError(
            f"scorer 'pass_at_k' runs programs a model wrote and is off; set the environment variable {PERMISSION}=1 "
            "to allow it, best in a container"
        )
    if os.name != "posix":
        raise InputError("scorer 'pass_at_k' limits programs by POSIX means; run it on Linux or macOS")


def program_of(row: Row, sample: str) -> str:
    """The program to run: a sample that continues `prefix`, or one that defines the function itself, then the tests.

    Of Markdown the first block of code counts. What continues `prefix` ends where Chen et al. 2021 stop: at the next
    class, def, comment, if or print that is not indented.
    """
    prefix, entry = row.get("prefix") or "", row.get("entry_point")
    block = _FENCE.search(sample)
    code = block[1] if block else sample
    whole = not prefix or (entry and re.search(rf"^(?:async )?def {re.escape(entry)}\b", code, re.MULTILINE))
    if not whole:
        code = code[: min([len(code), *(at for stop in _STOPS if (at := code.find(stop)) >= 0)])]
    parts = [f"{prefix}\n{code}" if whole and prefix else prefix + code, row["test"]]
    if entry:
        parts.append(f"check({entry})")
    return "\n".join(parts) + "\n"


def run_program(
    program: str, *, timeout: float = TIMEOUT, memory_mib: int = MEMORY_MIB, cut_network: bool = False
) -> Verdict:
    """Run a program in a process of its own; it passed if it ran to its last line and ended in time.

    The end is reported through a pipe with a word that differs from run to run, so that `sys.exit(0)` before the tests
    is no pass. At the limit the process and its session are killed; with `cut_network`, everything it started.
    """
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="hf_continual_code_") as folder:
        receive, send = os.pipe()
        try:
            file, errors = Path(folder, "program.py"), Path(folder, "errors.txt")
            file.write_text(f"{program}\n__import__('os').write({send}, b'{word}')\n", encoding="utf-8")
            limits = [str(int(timeout) + 1), str(memory_mib << 20), str(FILE_MIB << 20)]
            with errors.open("wb") as stderr:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _LAUNCHER, *limits, "cut" if cut_network else "keep", str(file)],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, cwd=folder, pass_fds=(send,),
                    env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                    start_new_session=True,
                )  # fmt: skip
                try:
                    code: int | None = process.wait(timeout)
                except subprocess.TimeoutExpired:
                    code = None
                finally:
                    _kill_session(process)
            os.set_blocking(receive, False)
            try:
                told = os.read(receive, len(word))
            except BlockingIOError:
                told = b""
            message = errors.read_bytes()[-500:].decode(errors="replace")
        finally:
            os.close(receive)
            os.close(send)
    if code is None:
        return Verdict("timeout", message)
    return Verdict("passed" if code == 0 and told == word.encode() else "failed", message)


def network_can_be_cut() -> bool:
    """Whether a program here can be put where there is no network, tried with an empty one."""
    return run_program("", timeout=10.0, cut_network=True).passed


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
