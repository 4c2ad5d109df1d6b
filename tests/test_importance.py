import math

import pytest
import torch

from hf_continual import importance
from hf_continual.errors import InputError
from hf_continual.importance import ImportanceTracker, accumulate, normalise
from hf_continual.methods.kif import adaptive_coefficients
from hf_continual.methods.tasl import categorical_coefficients
from hf_continual.skill_fusion import unit_cases
from hf_continual.units import SkillUnits


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def same(ours, *expected, digits=5):
    assert ours.dtype == torch.float64
    assert ours.tolist() == pytest.approx(expected, abs=0.51 * 10**-digits)


# -- the worked example ------------------------------------------------------------------------------------------------

NOW, BEFORE = vector(4, 1, 0, 3, 2), vector(0, 10, 2, 9, 1)


def test_normalised_scores_of_the_worked_example():
    same(normalise(NOW), 1, 0.25, 0, 0.75, 0.5)
    same(normalise(BEFORE), 0, 1, 0.2, 0.9, 0.1)


def test_cumulative_importance_of_the_worked_example():
    same(accumulate(NOW, BEFORE, 0.7), 0.22378, 0.88811, 0, 1, 0.11189)
    assert torch.equal(accumulate(NOW, BEFORE), accumulate(NOW, BEFORE, 0.7))


@pytest.mark.parametrize("prepare", [lambda scores: scores, normalise], ids=["raw", "normalised"])
def test_coefficients_of_the_worked_example(prepare):
    now, before = prepare(NOW), prepare(BEFORE)
    same(categorical_coefficients(now, before), 1, 0, 0.5, 0.5, 0.5)
    same(adaptive_coefficients(now, before), 0.98201, 0.04743, 0.31003, 0.35434, 0.83202)
    assert torch.equal(categorical_coefficients(now, before), categorical_coefficients(now, before, 0.8, 0.3))
    assert torch.equal(adaptive_coefficients(now, before), adaptive_coefficients(now, before, 0.25))


def test_moving_averages_of_the_worked_example():
    tracker = ImportanceTracker()
    tracker.update({"w": torch.tensor([1.0])}, {"w": torch.tensor([1.0])})
    same(tracker.scores(), 0.15 * 0.1275, digits=8)
    assert tracker.state()["sensitivity"].tolist() == pytest.approx([0.15])
    tracker.update({"w": torch.tensor([-4.0])}, {"w": torch.tensor([0.5])})
    same(tracker.scores(), 0.147167, digits=6)
    assert tracker.state()["sensitivity"].tolist() == pytest.approx([0.4275])


# -- coefficients and accumulation -------------------------------------------------------------------------------------


def test_the_four_cases():
    now, before = vector(9, 8, 1, 2, 0), vector(9, 1, 8, 2, 0)  # above their medians (2): {0, 1} and {0, 2}
    assert unit_cases(now, before, 0.5).tolist() == [3, 2, 1, 0, 0]
    same(categorical_coefficients(now, before, 0.5, shared=0.2), 0.2, 1, 0, 0.5, 0.5)


def test_a_unit_at_the_quantile_is_not_important():
    now = vector(0, 1, 2, 3, 4)
    assert (unit_cases(now, now.flip(0), 0.75) >= 2).tolist() == [False] * 4 + [True]


def test_nothing_is_important_above_quantile_one_and_all_but_the_least_above_zero():
    same(categorical_coefficients(NOW, BEFORE, 1.0), *[0.5] * 5)
    same(categorical_coefficients(NOW, BEFORE, 0.0, 0.3), 1, 0.3, 0, 0.3, 0.3)


def test_temperature():
    same(adaptive_coefficients(NOW, BEFORE, 1e9), *[0.5] * 5)
    same(adaptive_coefficients(NOW, BEFORE, 1e-3), 1, 0, 0, 0, 1)
    same(adaptive_coefficients(NOW, BEFORE, 0.5), *[1 / (1 + math.exp(-d / 0.5)) for d in (1, -0.75, -0.2, -0.15, 0.4)])


def test_first_task_accumulates_to_its_raw_scores():
    scores = NOW.clone()
    cumulative = accumulate(scores, None)
    assert torch.equal(cumulative, NOW)
    scores += 1
    assert torch.equal(cumulative, NOW)  # a copy


@pytest.mark.parametrize(("beta", "expected"), [(0.0, NOW), (1.0, BEFORE)])
def test_accumulation_at_its_ends(beta, expected):
    torch.testing.assert_close(accumulate(NOW, BEFORE, beta), normalise(expected))


def test_rank_normalisation_has_equal_steps_and_shares_places():
    same(normalise(vector(5, 1e9, 7, -3), "rank"), 1 / 3, 1, 2 / 3, 0)
    same(normalise(vector(1, 1, 2, 9), "rank"), 0, 0, 1.5 / 2.5, 1)  # places 0.5, 0.5, 2, 3


def test_log_normalisation():
    same(normalise(vector(1e-6, 1e-3, 1.0), "log"), 0, 0.5, 1)
    same(normalise(vector(0, 1e-4, 1e-2), "log"), 0, 1 / 3, 1)  # zero counts as a tenth of the least score above it
    once = normalise(vector(1e-6, 1e-5, 1e-4, 1e-2), "log")
    assert torch.equal(normalise(once, "log"), once)
    same(normalise(vector(0, 5), "log"), 0, 1)


@pytest.mark.parametrize("kind", ["rank", "log"])
def test_normalisation_reaches_the_coefficients(kind):
    now, before = vector(1, 2, 3, 1000, 5), vector(1000, 3, 2, 1, 7)
    shares = normalise(now, kind) - normalise(before, kind)
    expected = 1 / (1 + torch.exp(-shares / 0.25))
    torch.testing.assert_close(adaptive_coefficients(now, before, normalisation=kind), expected)
    assert not torch.allclose(adaptive_coefficients(now, before), expected, atol=1e-2)
    torch.testing.assert_close(
        accumulate(now, before, 0.7, kind),
        normalise(0.3 * normalise(now, kind) + 0.7 * normalise(before, kind), kind),
    )


# -- the tracker -------------------------------------------------------------------------------------------------------


def steps(shapes, count=6, seed=0, dtype=torch.float32):
    """`count` random steps: weights and gradients by name."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    return [({n: draw(s) for n, s in shapes.items()}, {n: draw(s) for n, s in shapes.items()}) for _ in range(count)]


def elementwise(history, name, order="first", beta1=0.85, beta2=0.85):
    """Ibar and Ubar after every step, in double precision."""
    mean = deviation = torch.zeros_like(history[0][0][name], dtype=torch.float64)
    found = []
    for weights, gradients in history:
        x = weights[name].double() * gradients[name].double()
        now = {"first": x.abs(), "second": x * x, "mix": (x - x * x / 2).abs()}[order]
        mean = beta1 * mean + (1 - beta1) * now
        deviation = beta2 * deviation + (1 - beta2) * (now - mean).abs()
        found.append((mean, deviation))
    return found


def tracked(history, units=None, **options):
    tracker = ImportanceTracker(units, **options)
    for weights, gradients in history:
        tracker.update(weights, gradients)
    return tracker


SHAPES = {"w": (4, 5), "b": (3,)}


@pytest.mark.parametrize("order", ["first", "second", "mix"])
def test_orders(order):
    history = steps(SHAPES)
    scores = tracked(history, order=order, beta1=0.6, beta2=0.9).scores()
    for score, name in zip(scores, SHAPES, strict=True):
        mean, deviation = elementwise(history, name, order, 0.6, 0.9)[-1]
        assert float(score) == pytest.approx(float((mean * deviation).mean()), rel=1e-6)


def test_orders_differ():
    history = steps(SHAPES)
    assert len({tuple(tracked(history, order=o).scores().tolist()) for o in ("first", "second", "mix")}) == 3


def test_pair_score_is_the_mean_of_the_outer_product():
    shapes = {"m.lora_A.weight": (2, 5), "m.lora_B.weight": (3, 2)}
    history, units = steps(shapes), SkillUnits.of_shapes(shapes, "lora_rank1")
    (a, a_dev), (b, b_dev) = (elementwise(history, name)[-1] for name in shapes)
    a, b = a * a_dev, b * b_dev
    outer = [float(torch.outer(b[:, r], a[r]).mean()) for r in range(2)]
    means = [(float(a[r].mean()), float(b[:, r].mean())) for r in range(2)]
    assert tracked(history, units).scores().tolist() == pytest.approx(outer, rel=1e-6)
    mean = tracked(history, units, pair_reduce="mean").scores()
    assert mean.tolist() == pytest.approx([(x + y) / 2 for x, y in means], rel=1e-6)
    total = tracked(history, units, pair_reduce="sum").scores()
    assert total.tolist() == pytest.approx([x + y for x, y in means], rel=1e-6)


def test_tiny_pair_scores_do_not_underflow():
    shapes = {"m.lora_A.weight": (2, 4), "m.lora_B.weight": (4, 2)}
    history = [(w, {n: g * 1e-12 for n, g in gradients.items()}) for w, gradients in steps(shapes)]
    scores = tracked(history, SkillUnits.of_shapes(shapes, "lora_rank1")).scores()
    assert bool((scores > 0).all()) and float(scores.max()) < 1e-44  # below what fp32 can hold
    normalise(scores)


def test_every_n_steps_raises_the_betas_to_that_power():
    history = steps(SHAPES)
    sparse = tracked(history, every_n_steps=3, beta1=0.8, beta2=0.9).scores()
    same_as = tracked(history, beta1=0.8**3, beta2=0.9**3).scores()
    torch.testing.assert_close(sparse, same_as, rtol=1e-6, atol=0)
    assert not torch.allclose(sparse, tracked(history, beta1=0.8, beta2=0.9).scores(), rtol=1e-3, atol=0)


def test_run_average_is_the_mean_over_all_updates():
    history = steps(SHAPES)
    scores = tracked(history, average="run").scores()
    for score, name in zip(scores, SHAPES, strict=True):
        expected = [float((mean * deviation).mean()) for mean, deviation in elementwise(history, name)]
        assert float(score) == pytest.approx(sum(expected) / len(expected), rel=1e-6)


@pytest.mark.parametrize("average", ["end", "run"])
def test_loss_scale_is_taken_out(average):
    plain, scaled = ImportanceTracker(order="mix", average=average), ImportanceTracker(order="mix", average=average)
    for weights, gradients in steps(SHAPES):
        plain.update(weights, gradients)
        scaled.update(weights, {name: g * 1024 for name, g in gradients.items()}, scale=1024.0)
    assert torch.equal(plain.scores(), scaled.scores())


@pytest.mark.parametrize("kept", [importance.KEPT, 0], ids=["products kept", "made again"])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("average", ["end", "run"])
def test_a_step_with_a_gradient_that_is_not_finite_does_not_count(bad, average, kept, monkeypatch):
    monkeypatch.setattr(importance, "KEPT", kept)
    history = steps(SHAPES)
    spoilt = {name: g.clone() for name, g in history[2][1].items()}
    spoilt["b"][1] = bad  # after parameters that are finite
    clean = tracked(history, average=average)
    tracker = tracked(history[:2], average=average)
    tracker.update(history[2][0], spoilt)
    for weights, gradients in history[2:]:
        tracker.update(weights, gradients)
    assert torch.equal(tracker.scores(), clean.scores())
    assert all(torch.equal(value, clean.state()[name]) for name, value in tracker.state().items())


@pytest.mark.parametrize("given", ["none", "absent", "attribute"])
def test_missing_gradients_are_zeros(given):
    history = steps(SHAPES)
    zeros, missing = ImportanceTracker(), ImportanceTracker()
    for i, (weights, gradients) in enumerate(history):
        gone = i % 2 == 1
        zeros.update(weights, {"w": gradients["w"], "b": torch.zeros(3) if gone else gradients["b"]})
        if given == "attribute":
            parameters = {name: torch.nn.Parameter(w) for name, w in weights.items()}
            for name, parameter in parameters.items():
                parameter.grad = None if gone and name == "b" else gradients[name]
            missing.update(parameters)
        else:
            dropped = {"w": gradients["w"], "b": None} if given == "none" else {"w": gradients["w"]}
            missing.update(weights, dropped if gone else gradients)
    assert torch.equal(zeros.scores(), missing.scores())


def test_forms_of_the_argument():
    history = steps(SHAPES)
    by_name, pairs, triples = tracked(history), ImportanceTracker(), ImportanceTracker()
    for weights, gradients in history:
        pairs.update({name: (weights[name], gradients[name]) for name in weights})
        triples.update([(name, weights[name], gradients[name]) for name in weights])
    assert torch.equal(by_name.scores(), pairs.scores()) and torch.equal(by_name.scores(), triples.scores())


def test_order_of_the_names_does_not_matter():
    units = SkillUnits.of_shapes(SHAPES, "matrix")
    history = steps(SHAPES)
    turned = [tuple(dict(reversed(part.items())) for part in step) for step in history]
    assert torch.equal(tracked(history, units).scores(), tracked(turned, units).scores())


@pytest.mark.parametrize("kept", [importance.KEPT, 0])
@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 20, 1000])
@pytest.mark.parametrize("average", ["end", "run"])
def test_chunks_of_the_buffers_change_nothing(chunk, kept, average, monkeypatch):
    shapes = {"a": (4, 5), "b": (3,), "c": (), "d": (2, 2, 2), "e": (1, 7)}
    history = steps(shapes, count=4)
    whole = tracked(history, average=average, order="mix").scores()
    monkeypatch.setattr(importance, "CHUNK", {"cpu": chunk})
    monkeypatch.setattr(importance, "KEPT", kept)
    assert torch.equal(tracked(history, average=average, order="mix").scores(), whole)


def test_weights_of_several_dtypes(monkeypatch):
    monkeypatch.setattr(importance, "CHUNK", {"cpu": 5})
    history = []
    for weights, gradients in steps({"a": (3, 3), "b": (4,), "c": (2, 2)}):
        cast = lambda part: {n: t.bfloat16() if n == "b" else t for n, t in part.items()}  # noqa: E731
        history.append((cast(weights), cast(gradients)))
    tracker = tracked(history)
    assert all(value.dtype == torch.float32 for value in tracker.state().values())
    for score, name in zip(tracker.scores(), "abc", strict=True):
        mean, deviation = elementwise(history, name)[-1]
        assert float(score) == pytest.approx(float((mean * deviation).mean()), rel=1e-6)


def test_gradients_and_weights_stay_as_they_are():
    weights, gradients = steps(SHAPES, 1)[0]
    before = [t.clone() for t in (*weights.values(), *gradients.values())]
    for order in ("first", "second", "mix"):
        ImportanceTracker(order=order).update(weights, gradients, scale=2.0)
    after = [*weights.values(), *gradients.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("average", ["end", "run"])
def test_continues_from_its_state(average):
    history = steps(SHAPES)
    first = tracked(history[:3], average=average)
    second = ImportanceTracker(SkillUnits.of_shapes(SHAPES, "matrix"), average=average)
    second.load_state({name: value.clone() for name, value in first.state().items()})
    for weights, gradients in history[3:]:
        second.update(weights, gradients)
    assert torch.equal(second.scores(), tracked(history, average=average).scores())
    second.load_state({})
    with pytest.raises(InputError, match="no optimizer step"):
        second.scores()


def test_keeps_two_buffers_a_weight_and_a_third_for_the_run_average():
    history = steps(SHAPES, 2)
    sizes = lambda **o: sorted(v.numel() for v in tracked(history, **o).state().values())  # noqa: E731
    assert sizes() == [1, 23, 23] and sizes(average="run") == [1, 23, 23, 23]


# -- what cannot be ----------------------------------------------------------------------------------------------------

SCORES = {
    "equal": (vector(2, 2, 2), "all 3 skill units are equal"),
    "all zero": (vector(0, 0), "are equal"),
    "one unit": (vector(1), "only one skill unit"),
    "NaN": (vector(1, float("nan"), 2), "1 of 3 importance scores are NaN"),
    "infinite": (vector(1, float("inf"), -float("inf")), "2 of 3"),
    "empty": (vector(), "one score a unit"),
    "a matrix": (torch.ones(2, 2), "one score a unit"),
}


@pytest.mark.parametrize("case", SCORES)
def test_refuses_scores_that_cannot_be_compared(case):
    scores, said = SCORES[case]
    others = torch.arange(scores.numel(), dtype=torch.float64).reshape(scores.shape)
    with pytest.raises(InputError, match=said):
        normalise(scores)
    with pytest.raises(InputError, match=said):
        accumulate(scores, None)
    for function in (accumulate, adaptive_coefficients, categorical_coefficients):
        with pytest.raises(InputError):
            function(scores, others)
        with pytest.raises(InputError):
            function(others, scores)


@pytest.mark.parametrize("function", [accumulate, adaptive_coefficients, categorical_coefficients, unit_cases])
def test_refuses_scores_of_different_models(function):
    with pytest.raises(InputError, match="4 units and the previous one 5"):
        function(vector(1, 2, 3, 4), NOW)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), True, "half", None])
def test_refuses_shares_out_of_range(share):
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        accumulate(NOW, BEFORE, share)
    with pytest.raises(InputError, match="quantile"):
        categorical_coefficients(NOW, BEFORE, share)
    with pytest.raises(InputError, match="shared"):
        categorical_coefficients(NOW, BEFORE, 0.8, share)


@pytest.mark.parametrize("option", ["beta1", "beta2"])
@pytest.mark.parametrize("value", [-0.1, 1.0, 1, float("nan"), "high"])
def test_refuses_betas_out_of_range(option, value):
    with pytest.raises(InputError, match=option):
        ImportanceTracker(**{option: value})


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_refuses_temperatures_not_above_zero(temperature):
    with pytest.raises(InputError, match="temperature"):
        adaptive_coefficients(NOW, BEFORE, temperature)


def test_refuses_unknown_options():
    with pytest.raises(InputError, match="order='third' is unknown; choose first, second, mix"):
        ImportanceTracker(order="third")
    with pytest.raises(InputError, match="normalisation='max' is unknown; choose minmax, rank, log"):
        normalise(NOW, "max")
    with pytest.raises(InputError, match="log"):
        normalise(vector(-1, 2, 3), "log")


@pytest.mark.parametrize(
    ("option", "value"),
    [("average", "all"), ("pair_reduce", "max"), ("every_n_steps", 0), ("every_n_steps", 1.5), ("every_n_steps", True)],
)
def test_refuses_options_of_the_tracker_that_cannot_be(option, value):
    with pytest.raises(InputError, match=f"{option}={value!r}"):
        ImportanceTracker(**{option: value})


def test_refuses_scores_before_the_first_step_and_states_of_another_model():
    with pytest.raises(InputError, match="no optimizer step"):
        ImportanceTracker().scores()
    state = tracked(steps({"w": (4, 4)})).state()
    with pytest.raises(InputError, match="covers 16 weights and the model has 23"):
        ImportanceTracker(SkillUnits.of_shapes(SHAPES, "matrix")).load_state(state)
    tracker = tracked(steps(SHAPES))
    with pytest.raises(InputError, match="misses the weight 'b'"):
        tracker.update({"w": torch.ones(4, 5)}, {"w": torch.ones(4, 5)})
