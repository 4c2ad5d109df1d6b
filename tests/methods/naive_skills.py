"""TaSL and KIF a second time: float64, one parameter after another, straight from the equations.

Shares no code with the package. `NaiveSkills` is a callback that watches a real training and merges for itself.
"""

import math

import torch
from transformers import TrainerCallback

# -- one number a unit; scores are plain dicts {key: float} ------------------------------------------------------------


def norm(scores):
    low, high = min(scores.values()), max(scores.values())
    return {key: (value - low) / (high - low) for key, value in scores.items()}


def accumulate(now, before, beta=0.7):
    if before is None:
        return dict(now)
    now, before = norm(now), norm(before)
    return norm({key: (1 - beta) * now[key] + beta * before[key] for key in now})


def percentile(values, q):
    """Order statistics with linear interpolation."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def four_cases(now, before, quantile=0.8, gamma=0.7):
    now, before = norm(now), norm(before)
    now_border, before_border = percentile(now.values(), quantile), percentile(before.values(), quantile)
    result = {}
    for key in now:
        if before[key] > before_border:
            result[key] = 1 - gamma if now[key] > now_border else 0.0
        else:
            result[key] = 1.0 if now[key] > now_border else 0.5
    return result


def soft(now, before, tau=0.25):
    now, before = norm(now), norm(before)
    return {k: math.exp(now[k] / tau) / (math.exp(now[k] / tau) + math.exp(before[k] / tau)) for k in now}


# -- units -------------------------------------------------------------------------------------------------------------


def units_of(parameters, scheme):
    """{key: [(parameter, index of its rows or columns)]}; the index is `...` for a whole parameter."""
    units = {}
    for name, parameter in parameters.items():
        if scheme == "lora_rank1" and ".lora_B." in name:
            continue
        if scheme == "lora_rank1" and ".lora_A." in name:
            module = name.split(".lora_A.")[0]
            for r in range(parameter.shape[0]):
                row, column = (name, (r,)), (name.replace(".lora_A.", ".lora_B."), (slice(None), r))
                units[f"{module}[{r}]"] = [row, column]
        else:
            units[name.replace(".default", "")] = [(name, ...)]
    return units


def unit_score(parts):
    """The mean over the outer product of what belongs to a unit, which is built; of one part its mean."""
    if len(parts) == 1:
        return float(parts[0].mean())
    row, column = parts
    return float(torch.outer(column.flatten(), row.flatten()).mean())


# -- KIF's further loss ------------------------------------------------------------------------------------------------


def orthogonality(model, form="norm"):
    """The mean over all A and B of the norm of (A A^T - I) and (B^T B - I), entry by entry."""
    terms = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or not (".lora_A." in name or ".lora_B." in name):
            continue
        rows = parameter.detach().double()
        rows = list(rows if ".lora_A." in name else rows.T)
        total = 0.0
        for i, a in enumerate(rows):
            for j, b in enumerate(rows):
                if form == "decorrelation" and i == j:
                    continue
                total += (float((a * b).sum()) - (i == j)) ** 2
        terms.append(total if form == "squared" else math.sqrt(total))
    return sum(terms) / len(terms)


# -- a training watched ------------------------------------------------------------------------------------------------


class NaiveSkills(TrainerCallback):
    """After each task: `raw`, `cumulative`, `coefficients` by unit, and `merged` by parameter."""

    def __init__(self, scheme, order, coefficients, *, timing="reference", counted=lambda step, steps: step > 0,
                 beta1=0.85, beta2=0.85):  # fmt: skip
        self.scheme, self.order, self.rule, self.timing, self.counted = scheme, order, coefficients, timing, counted
        self.beta1, self.beta2 = beta1, beta2
        self.cumulative = self.coefficients = None
        self.steps_seen = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.previous = self.weights()
        self.sensitivity = {name: torch.zeros_like(p) for name, p in self.previous.items()}
        self.uncertainty = {name: torch.zeros_like(p) for name, p in self.previous.items()}
        self.steps_seen = []

    def weights(self):
        return {name: p.detach().double().clone() for name, p in self.parameters.items()}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.timing == "consistent":
            self.take_step(state)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.timing == "reference":
            self.take_step(state)

    def take_step(self, state):
        if not self.counted(state.global_step, state.max_steps):
            return
        self.steps_seen.append(state.global_step)
        for name, parameter in self.parameters.items():
            weight = parameter.detach().double()
            gradient = torch.zeros_like(weight) if parameter.grad is None else parameter.grad.double()
            x = weight * gradient
            now = {"first": x.abs(), "second": x**2, "mix": (x - 0.5 * x**2).abs()}[self.order]
            mean = self.beta1 * self.sensitivity[name] + (1 - self.beta1) * now
            deviation = (now - mean).abs()
            self.uncertainty[name] = self.beta2 * self.uncertainty[name] + (1 - self.beta2) * deviation
            self.sensitivity[name] = mean

    def on_train_end(self, args, state, control, **kwargs):
        self.present = self.weights()
        scores = {name: self.sensitivity[name] * self.uncertainty[name] for name in self.sensitivity}
        units = units_of(self.parameters, self.scheme)
        self.raw = {key: unit_score([scores[name][index] for name, index in parts]) for key, parts in units.items()}
        self.merged = {name: w.clone() for name, w in self.present.items()}
        before, self.coefficients = self.cumulative, None
        if before is not None:
            self.coefficients = self.rule(self.raw, before)
            for key, parts in units.items():
                c = self.coefficients[key]
                for name, index in parts:
                    self.merged[name][index] = (1 - c) * self.previous[name][index] + c * self.present[name][index]
        self.cumulative = accumulate(self.raw, before)


# -- comparing ---------------------------------------------------------------------------------------------------------


def assert_close(ours, naive, keys, absolute=0.0):
    """Our vector over units against a naive dict, each unit within 1e-6 of itself, or `absolute` of the naive one."""
    assert list(naive) == list(keys)
    expected = torch.tensor(list(naive.values()), dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=absolute)


def assert_same_weights(model, expected):
    """Every parameter within 1e-6 of its largest entry."""
    parameters = dict(model.named_parameters())
    assert expected
    for name, value in expected.items():
        error = float((parameters[name].detach().double() - value).abs().max())
        assert error <= 1e-6 * float(value.abs().max()), f"{name} is off by {error}"


def assert_agrees(method, naive, model):
    """What a method and the callback made of the same task."""
    assert naive.steps_seen and min(naive.raw.values()) >= 0 < max(naive.raw.values())
    assert_close(method.raw_, naive.raw, method.unit_keys_)
    assert_close(method.cumulative_, naive.cumulative, method.unit_keys_, 1e-6 if naive.coefficients else 0.0)
    if naive.coefficients is None:
        assert method.coefficients_ is None
    else:
        assert_close(method.coefficients_, naive.coefficients, method.unit_keys_, 1e-6)
    assert_same_weights(model, naive.merged)


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


class OutOfMemory(TrainerCallback):
    """Once, after this step: with `auto_find_batch_size` the Trainer then begins again with a smaller batch."""

    def __init__(self, step):
        self.step, self.raised = step, False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.raised:
            self.raised = True
            raise RuntimeError("CUDA out of memory.")


class Movement(TrainerCallback):
    """The trainable weights at the begin and after every step of each training, those of replay phases too."""

    in_phases = True

    def __init__(self):
        self.trainings = []

    def note(self, model):
        copies = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.trainings[-1].append(copies)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.trainings.append([])
        self.note(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.note(model)


def still_and_moving(states, parts):
    """Whether the unit of these parts never moved, and whether it did, over the states of one training."""
    moved = [any(not torch.equal(state[n][i], states[0][n][i]) for n, i in parts) for state in states[1:]]
    return not any(moved), any(moved)
