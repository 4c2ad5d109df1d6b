"""Metrics on 3 x 3 matrices worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hf_continual.errors import InputError
from hf_continual.metrics import (
    CONVENTIONS,
    METRICS,
    average_performance,
    backward_transfer,
    find_convention,
    forgetting,
    forward_transfer,
    learning_accuracy,
    less_is_better,
    oriented,
    summarize,
)

R = [
    [0.8, 0.3, 0.1],
    [0.6, 0.9, 0.2],
    [0.5, 0.7, 0.6],
]
BASELINE = [0.2, 0.1, 0.1]
SINGLE = [0.7, 0.8, 0.9]
SIZES = [10, 20, 70]
NAN = float("nan")


def test_average_performance():
    assert average_performance(R) == pytest.approx((0.5 + 0.7 + 0.6) / 3)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("lopez-paz", (0.5 + 0.7 + 0.6) / 3),
        ("weighted", (10 * 0.5 + 20 * 0.7 + 70 * 0.6) / 100),
        ("incremental", (0.8 + (0.6 + 0.9) / 2 + (0.5 + 0.7 + 0.6) / 3) / 3),
    ],
)
def test_variants_of_average_performance(variant, expected):
    assert average_performance(R, SIZES, variant=variant) == pytest.approx(expected)


def test_learning_accuracy():
    assert learning_accuracy(R) == pytest.approx((0.8 + 0.9 + 0.6) / 3)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("lopez-paz", (-0.3 - 0.2) / 2),
        ("divide_by_t", (-0.3 - 0.2) / 3),
        ("lower_triangle", (-0.2 - 0.3 - 0.2) / 3),
    ],
)
def test_backward_transfer(variant, expected):
    assert backward_transfer(R, variant=variant) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("lopez-paz", ((0.3 - 0.1) + (0.2 - 0.1)) / 2),
        ("divide_by_t", ((0.3 - 0.1) + (0.2 - 0.1)) / 3),
        ("diagonal", ((0.8 - 0.2) + (0.9 - 0.1) + (0.6 - 0.1)) / 3),
        ("zero_shot", (0.3 + 0.2) / 2),
        ("sapt", (0.8 + 0.9 + 0.6) / 3 - 0.5094),
    ],
)
def test_forward_transfer(variant, expected):
    assert forward_transfer(R, BASELINE, variant=variant) == pytest.approx(expected)


# Task 1 scored best before it was trained, task 0 recovers after task 1: every variant picks another maximum.
PEAKS = [
    [0.5, 0.9, 0.0],
    [0.7, 0.4, 0.0],
    [0.6, 0.3, 0.8],
]


@pytest.mark.parametrize(
    ("matrix", "variant", "expected"),
    [
        (R, "chaudhry", ((0.8 - 0.5) + (0.9 - 0.7)) / 2),
        (PEAKS, "chaudhry", ((0.7 - 0.6) + (0.4 - 0.3)) / 2),
        (PEAKS, "all_rows", ((0.7 - 0.6) + (0.9 - 0.3)) / 2),
        (PEAKS, "sapt", ((0.7 - 0.6) + (0.4 - 0.3)) / 2),
        (PEAKS, "mammoth", ((0.7 - 0.6) + (0.4 - 0.3)) / 2),
        (PEAKS, "since_learned", ((0.5 - 0.6) + (0.4 - 0.3)) / 2),
        # Task 0 is best at the end: only Mammoth's maximum includes that row.
        ([[0.5, NAN], [0.8, 0.9]], "chaudhry", -0.3),
        ([[0.5, NAN], [0.8, 0.9]], "mammoth", 0.0),
        ([[0.5, NAN], [0.8, 0.9]], "since_learned", -0.3),
        # Only scores below 0 tell the zero filling apart; column 0 has no cell above the diagonal.
        ([[-0.5, NAN, NAN], [-0.6, -0.4, NAN], [-0.7, -0.8, 0.1]], "chaudhry", (0.2 + 0.4) / 2),
        ([[-0.5, NAN, NAN], [-0.6, -0.4, NAN], [-0.7, -0.8, 0.1]], "sapt", (0.2 + 0.8) / 2),
        ([[-0.5, NAN, NAN], [-0.6, -0.4, NAN], [-0.7, -0.8, 0.1]], "mammoth", (0.2 + 0.8) / 2),
    ],
)
def test_forgetting(matrix, variant, expected):
    assert forgetting(matrix, variant=variant) == pytest.approx(expected)


def test_default_variants_are_the_registered_ones():
    assert backward_transfer(R) == backward_transfer(R, variant="lopez-paz")
    assert forward_transfer(R, BASELINE) == forward_transfer(R, BASELINE, variant="lopez-paz")
    assert forgetting(R) == forgetting(R, variant="chaudhry")


def test_registry_covers_every_variant():
    for name, info in METRICS.items():
        assert info.id == name and info.formula and info.source
        # What is not a default says how it differs from it.
        assert bool(info.differs) == ("/" in name) and info.family in METRICS
        assert info.lower_is_better == (info.family == "forgetting")
        value = info.compute(R, baseline=BASELINE, single_task=SINGLE, sizes=SIZES)
        metric, _, variant = name.partition("/")
        function = {"backward_transfer": backward_transfer, "forgetting": forgetting}.get(metric)
        if function and variant:
            assert value == function(R, variant=variant)
    assert len(METRICS) == 3 + 3 + 5 + 5 + 1


def naive(name, R, baseline, single, sizes):
    """Every definition once more, as plain loops over a list of lists."""
    T = len(R)
    last = R[T - 1]

    def best(j, rows, padded):
        found = 0.0 if padded and j > 0 else -float("inf")
        for i in rows:
            found = max(found, R[i][j])
        return found

    def lost(rows, padded=False):
        return sum(best(j, rows(j), padded) - last[j] for j in range(T - 1)) / (T - 1)

    if name == "average_performance":
        return sum(last) / T
    if name == "average_performance/weighted":
        return sum(last[j] * sizes[j] for j in range(T)) / sum(sizes)
    if name == "average_performance/incremental":
        return sum(sum(R[i][: i + 1]) / (i + 1) for i in range(T)) / T
    if name == "backward_transfer":
        return sum(last[j] - R[j][j] for j in range(T - 1)) / (T - 1)
    if name == "backward_transfer/divide_by_t":
        return sum(last[j] - R[j][j] for j in range(T)) / T  # as SAPT and SEEKR write it: the last term is 0
    if name == "backward_transfer/lower_triangle":
        terms = [R[i][j] - R[j][j] for i in range(T) for j in range(T) if i > j]
        return sum(terms) / (T * (T - 1) / 2)
    if name == "forward_transfer":
        return sum(R[j - 1][j] - baseline[j] for j in range(1, T)) / (T - 1)
    if name == "forward_transfer/divide_by_t":
        terms = [0.0] * T
        for j in range(1, T):
            terms[j] = R[j - 1][j] - baseline[j]
        return sum(terms) / T
    if name == "forward_transfer/diagonal":
        return sum(R[j][j] for j in range(T)) / T - sum(single) / T
    if name == "forward_transfer/zero_shot":
        return sum(R[j - 1][j] for j in range(1, T)) / (T - 1)
    if name == "forward_transfer/sapt":
        return (sum(100 * R[j][j] for j in range(T)) / T - 50.94) / 100
    if name == "forgetting":
        return lost(lambda j: range(j, T - 1))
    if name == "forgetting/all_rows":
        return lost(lambda j: range(T - 1))
    if name == "forgetting/sapt":
        return lost(lambda j: range(j, T - 1), padded=True)
    if name == "forgetting/mammoth":
        return lost(lambda j: range(j, T), padded=True)
    if name == "forgetting/since_learned":
        return sum(R[j][j] - last[j] for j in range(T - 1)) / (T - 1)
    assert name == "learning_accuracy"
    return sum(R[j][j] for j in range(T)) / T


@pytest.mark.parametrize("name", METRICS)
def test_against_plain_loops(name):
    generator = np.random.default_rng(0)
    for T in (2, 3, 7):
        for low in (0.0, -1.0):  # below 0 the zeros of SAPT and Mammoth count
            matrix = generator.uniform(low, 1.0, (T, T)).tolist()
            given = {key: generator.uniform(0, 1, T).tolist() for key in ("baseline", "single_task")}
            sizes = generator.integers(1, 500, T).tolist()
            expected = naive(name, matrix, given["baseline"], given["single_task"], sizes)
            assert METRICS[name].compute(matrix, **given, sizes=sizes) == pytest.approx(expected, abs=1e-12)


def test_conventions_name_known_metrics():
    for name, convention in CONVENTIONS.items():
        assert convention.id == name and convention.source and set(convention.metrics.values()) <= set(METRICS)
    used = {id for convention in CONVENTIONS.values() for id in convention.metrics.values()}
    assert used == set(METRICS)  # no definition that nobody reports
    assert {"default", "lopez-paz", "sapt", "trace", "tasl", "kif", "seekr", "mammoth", "avalanche"} <= set(CONVENTIONS)


def test_where_papers_and_their_code_part():
    """SEEKR's BWT on eight tasks is 7/8 of its Eq. 15, GEM's code likewise."""
    T = 8
    matrix = np.tril(np.full((T, T), 0.5)) + 0.3 * np.eye(T)
    paper, code = (find_convention(name).metrics for name in ("seekr", "seekr-code"))
    assert METRICS[paper["BWT"]].compute(matrix) == pytest.approx(-0.3)
    assert METRICS[code["bwt"]].compute(matrix) == pytest.approx(-0.3 * 7 / 8)
    assert METRICS[find_convention("gem-code").metrics["Backward"]].compute(matrix) == pytest.approx(-0.3 * 7 / 8)
    # SAPT's FWT does not depend on the single-task scores in its code.
    fwt = METRICS[find_convention("sapt").metrics["FWT"]]
    constant = METRICS[find_convention("sapt-code").metrics["Fwt"]]
    assert fwt.compute(R, single_task=SINGLE) == pytest.approx((0.8 + 0.9 + 0.6) / 3 - 0.8)
    assert constant.compute(R, single_task=SINGLE) == pytest.approx((0.8 + 0.9 + 0.6) / 3 - 0.5094)


def test_what_a_convention_lacks_is_named():
    with pytest.raises(InputError, match="--convention sept: it is unknown; did you mean 'sapt'"):
        find_convention("sept")
    with pytest.raises(InputError, match="forward_transfer needs the scores of the model before any task"):
        METRICS["forward_transfer"].compute(R)
    # The base model's scores are no substitute for those of models trained on one task each.
    with pytest.raises(InputError, match="forward_transfer/diagonal needs the scores of models trained on one task"):
        METRICS["forward_transfer/diagonal"].compute(R, baseline=BASELINE)
    with pytest.raises(InputError, match="average_performance/weighted needs sizes"):
        average_performance(R, variant="weighted")
    with pytest.raises(InputError, match="sizes: expected 3 numbers"):
        average_performance(R, [1, 2], variant="weighted")
    with pytest.raises(InputError, match=r"needs R\[1, 0\]"):
        average_performance([[0.5, NAN], [NAN, 0.7]], variant="incremental")


@pytest.mark.parametrize("info", METRICS.values(), ids=METRICS.keys())
def test_input_is_not_changed(info):
    matrix, baseline, sizes = np.array(R), np.array(BASELINE), np.array(SIZES)
    info.compute(matrix, baseline=baseline, single_task=baseline, sizes=sizes)
    np.testing.assert_array_equal(matrix, R)
    np.testing.assert_array_equal(baseline, BASELINE)
    np.testing.assert_array_equal(sizes, SIZES)


def test_cells_that_are_not_needed_may_be_missing():
    lower = [[0.8, NAN, None], [0.6, 0.9, NAN], [0.5, 0.7, 0.6]]
    assert summarize(lower, BASELINE) == {
        "average_performance": average_performance(R),
        "backward_transfer": backward_transfer(R),
        "forgetting": forgetting(R),
        "learning_accuracy": learning_accuracy(R),
    }
    ends = [[0.8, NAN, NAN], [NAN, 0.9, NAN], [0.5, 0.7, NAN]]
    assert backward_transfer(ends) == backward_transfer(R)


@pytest.mark.parametrize(
    ("function", "cell"),
    [
        (average_performance, (2, 1)),
        (learning_accuracy, (1, 1)),
        (backward_transfer, (2, 0)),
        (lambda matrix: backward_transfer(matrix, variant="lower_triangle"), (1, 0)),
        (forgetting, (1, 0)),
        (lambda matrix: forgetting(matrix, variant="all_rows"), (0, 1)),
        (lambda matrix: forward_transfer(matrix, BASELINE), (1, 2)),
        (summarize, (2, 2)),
    ],
)
def test_a_missing_cell_is_named(function, cell):
    matrix = np.array(R)
    matrix[cell] = NAN
    with pytest.raises(InputError, match=rf"R\[{cell[0]}, {cell[1]}\].*not evaluated"):
        function(matrix)


def test_one_task():
    assert average_performance([[0.7]]) == learning_accuracy([[0.7]]) == 0.7
    for variant in ("lopez-paz", "divide_by_t", "lower_triangle"):
        assert backward_transfer([[0.7]], variant=variant) == 0.0
    for variant in ("chaudhry", "all_rows", "sapt", "mammoth", "since_learned"):
        assert forgetting([[0.7]], variant=variant) == 0.0
    assert forward_transfer([[0.7]], [0.1]) == 0.0
    assert "forward_transfer" not in summarize([[0.7]], [0.1])


def test_joint_run_has_average_performance_only():
    joint = [[0.5, 0.7, 0.6]]
    assert summarize(joint, BASELINE) == {"average_performance": pytest.approx(0.6)}
    for function in (backward_transfer, forgetting, learning_accuracy, lambda m: forward_transfer(m, BASELINE)):
        with pytest.raises(InputError, match=r"1 x 3.*average_performance"):
            function(joint)


def test_summarize_adds_forward_transfer():
    assert summarize(R, BASELINE)["forward_transfer"] == pytest.approx(0.15)
    assert "forward_transfer" not in summarize(R)
    assert "forward_transfer" not in summarize(R, [0.2, NAN, 0.1])


@pytest.mark.parametrize("bad", [[], [[]], [0.1, 0.2], [[0.1], [0.2, 0.3]], [["a"]]])
def test_not_a_matrix(bad):
    with pytest.raises(InputError, match="R: expected a table"):
        average_performance(bad)


def test_bad_arguments():
    with pytest.raises(InputError, match="no variant 'divide_by_T'; did you mean 'divide_by_t'"):
        backward_transfer(R, variant="divide_by_T")
    with pytest.raises(InputError, match="needs a baseline"):
        forward_transfer(R)
    with pytest.raises(InputError, match="expected 3 scores"):
        forward_transfer(R, [0.1, 0.2])
    with pytest.raises(InputError, match=r"baseline\[1\].*not evaluated"):
        forward_transfer(R, [0.1, NAN, 0.2])


PPL = [[10.0, 50.0], [20.0, 30.0]]


def test_of_perplexities_the_log_likelihood_enters_the_formulas():
    values = summarize(PPL, [40.0, 60.0], ["perplexity"])
    assert values["backward_transfer"] == pytest.approx(np.log(10 / 20))  # twice the perplexity: below 0
    assert values["forgetting"] == pytest.approx(np.log(20 / 10))
    assert values["average_performance"] == pytest.approx(-(np.log(20) + np.log(30)) / 2)
    assert values["forward_transfer"] == pytest.approx(np.log(60 / 50))
    assert summarize(R, BASELINE, ["exact_match", "rouge_l"]) == summarize(R, BASELINE)
    assert oriented(PPL, False).tolist() == PPL
    assert oriented([np.inf, 1.0], True).tolist() == [-np.inf, 0.0]


def test_scores_of_two_directions_have_no_mean():
    assert less_is_better(["perplexity"]) and not less_is_better(["accuracy", "unknown"]) and not less_is_better([])
    with pytest.raises(InputError, match="scored by perplexity, where less is better, and some by exact_match, so"):
        less_is_better(["exact_match", "perplexity"])
    assert summarize(PPL, None, ["perplexity", "exact_match"]) == {}


def test_formulas_with_numbers_of_their_own_are_marked():
    bounded = {name for name, info in METRICS.items() if info.bounded}
    assert bounded == {"forward_transfer/sapt", "forgetting/sapt", "forgetting/mammoth"}
