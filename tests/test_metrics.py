"""Metrics on 3 x 3 matrices worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hf_continual.errors import InputError
from hf_continual.metrics import (
    METRICS,
    average_performance,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
    summarize,
)

R = [
    [0.8, 0.3, 0.1],
    [0.6, 0.9, 0.2],
    [0.5, 0.7, 0.6],
]
BASELINE = [0.2, 0.1, 0.1]
NAN = float("nan")


def test_average_performance():
    assert average_performance(R) == pytest.approx((0.5 + 0.7 + 0.6) / 3)


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
        ("diagonal", ((0.8 - 0.2) + (0.9 - 0.1) + (0.6 - 0.1)) / 3),
        ("zero_shot", (0.3 + 0.2) / 2),
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
        # Only scores below 0 tell the zero filling apart; column 0 has no cell above the diagonal.
        ([[-0.5, NAN, NAN], [-0.6, -0.4, NAN], [-0.7, -0.8, 0.1]], "chaudhry", (0.2 + 0.4) / 2),
        ([[-0.5, NAN, NAN], [-0.6, -0.4, NAN], [-0.7, -0.8, 0.1]], "sapt", (0.2 + 0.8) / 2),
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
        value = info.function(R, BASELINE) if info.needs_baseline else info.function(R)
        metric, _, variant = name.partition("/")
        function = {"backward_transfer": backward_transfer, "forgetting": forgetting}.get(metric)
        if function and variant:
            assert value == function(R, variant=variant)
    assert len(METRICS) == 2 + 3 + 3 + 3


@pytest.mark.parametrize("info", METRICS.values(), ids=METRICS.keys())
def test_input_is_not_changed(info):
    matrix, baseline = np.array(R), np.array(BASELINE)
    info.function(matrix, baseline) if info.needs_baseline else info.function(matrix)
    np.testing.assert_array_equal(matrix, R)
    np.testing.assert_array_equal(baseline, BASELINE)


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
    for variant in ("chaudhry", "all_rows", "sapt"):
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
