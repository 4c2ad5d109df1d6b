import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_continual.errors import InputError
from hf_continual.methods.kif import KIF
from hf_continual.methods.tasl import TaSL
from hf_continual.testing import equal, tiny_model, toy_rows, train_task, weights
from hf_continual.units import SCHEMES, SkillUnits, fuse, fuse_products, lerp

LORA = {"llama": {"r": 4, "target_modules": ["q_proj", "v_proj"]}, "roberta": {"r": 3, "target_modules": ["query"]}}
P = "base_model.model."


def lora_model(kind="llama", model=None, **options):
    torch.manual_seed(1)
    model = model if model is not None else tiny_model(kind)
    model = get_peft_model(model, LoraConfig(**{**LORA.get(kind, {}), **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


def ranks(*modules_and_ranks):
    return [f"{module}[{r}]" for module, rank in modules_and_ranks for r in range(rank)]


def q(layer):
    return f"{P}model.layers.{layer}.self_attn.q_proj"


def v(layer):
    return f"{P}model.layers.{layer}.self_attn.v_proj"


# -- which units there are ---------------------------------------------------------------------------------------------


def test_rank1_units_of_a_llama():
    units = SkillUnits.of_model(lora_model(), "lora_rank1")
    assert units.keys == ranks((q(0), 4), (v(0), 4), (q(1), 4), (v(1), 4))
    assert units.names[:2] == [f"{q(0)}.lora_A.default.weight", f"{q(0)}.lora_B.default.weight"]
    assert [(p.axis, p.shape, p.start, p.units) for p in units.pieces[:3]] == [
        (0, (4, 32), 0, 4), (1, (32, 4), 0, 4), (0, (4, 32), 4, 4),
    ]  # fmt: skip
    assert len(units) == 16 and units.scheme == "lora_rank1"


@pytest.mark.parametrize("scheme", ["matrix", "lora_matrix"])
def test_matrix_units_of_lora_are_its_factors(scheme):
    units = SkillUnits.of_model(lora_model(), scheme)
    modules = (q(0), v(0), q(1), v(1))
    assert units.keys == [f"{module}.lora_{side}.weight" for module in modules for side in "AB"]
    assert all(p.axis is None and p.units == 1 for p in units.pieces)


def test_matrix_units_of_a_full_model_are_its_parameters():
    model = tiny_model("roberta")
    units = SkillUnits.of_model(model, "matrix")
    assert units.keys == units.names == [name for name, _ in model.named_parameters()]
    model.roberta.embeddings.requires_grad_(False)
    assert not any("embeddings" in key for key in SkillUnits.of_model(model, "matrix").keys)


def test_min_ndim_leaves_vectors_out():
    units = SkillUnits.of_model(tiny_model("roberta"), "matrix", min_ndim=2)
    assert units.keys == [n for n, p in tiny_model("roberta").named_parameters() if p.dim() >= 2]


def test_rank_pattern():
    units = SkillUnits.of_model(lora_model(rank_pattern={"layers.1.self_attn.q_proj": 2, "v_proj": 7}), "lora_rank1")
    assert units.keys == ranks((q(0), 4), (v(0), 7), (q(1), 2), (v(1), 7))


def test_modules_to_save_are_one_unit_each():
    model = lora_model(modules_to_save=["lm_head"])
    units = SkillUnits.of_model(model, "lora_rank1")
    assert units.keys == [*ranks((q(0), 4), (v(0), 4), (q(1), 4), (v(1), 4)), f"{P}lm_head.weight"]
    assert units.names[-1] == f"{P}lm_head.modules_to_save.default.weight"


def test_embedding_lora_pairs_its_rows_and_columns():
    units = SkillUnits.of_model(lora_model(target_modules=["embed_tokens", "q_proj"]), "lora_rank1")
    assert units.keys == ranks((f"{P}model.embed_tokens", 4), (q(0), 4), (q(1), 4))
    assert [(p.shape, p.axis) for p in units.pieces[:2]] == [((4, 96), 0), ((32, 4), 1)]
    both = SkillUnits.of_model(lora_model(target_modules=["embed_tokens"]), "lora_matrix").keys
    assert both == [f"{P}model.embed_tokens.lora_embedding_A", f"{P}model.embed_tokens.lora_embedding_B"]


def test_biases_are_one_unit_each():
    model = lora_model("roberta", bias="all")
    units = SkillUnits.of_model(model, "lora_rank1")
    learn = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum(".bias" in key for key in units.keys) == sum(".bias" in name for name in learn) > 10
    assert sorted(units.names) == sorted(learn)


def test_trainable_tokens_are_one_unit():
    model = lora_model(trainable_token_indices={"embed_tokens": [3, 5]})
    keys = SkillUnits.of_model(model, "lora_rank1").keys
    assert [key for key in keys if "[" not in key] == [f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"]


def test_tied_embeddings_are_one_unit():
    keys = SkillUnits.of_model(tiny_model("t5"), "matrix").keys
    assert keys.count("shared.weight") == 1
    assert "encoder.embed_tokens.weight" not in keys and "decoder.embed_tokens.weight" not in keys


def tied_llama():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    return LlamaForCausalLM(config)


TIED = {
    "LoRA": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


def tied_adapter(case):
    """An adapter on the embeddings that PEFT ties as the weights are, and (one name, another, view of it) of both."""
    model = get_peft_model(tied_llama(), LoraConfig(r=4, task_type="CAUSAL_LM", ensure_weight_tying=True, **TIED[case]))
    embedding, head = f"{P}model.embed_tokens", f"{P}lm_head"
    if case == "LoRA":
        twins = [
            (f"{embedding}.lora_embedding_A.default", f"{head}.lora_B.default.weight", lambda w: w.T),
            (f"{embedding}.lora_embedding_B.default", f"{head}.lora_A.default.weight", lambda w: w.T),
        ]
    else:
        kept = "modules_to_save.default.weight"
        twins = [(f"{embedding}.{kept}", f"{head}.{kept}", lambda w: w)]
    return model, twins


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", TIED)
def test_tied_adapters_are_one_unit(case, scheme):
    model, twins = tied_adapter(case)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for first, second, view in twins:
        assert parameters[first].data_ptr() == parameters[second].data_ptr()
        assert torch.equal(view(parameters[first]), parameters[second])
    units = SkillUnits.of_model(model, scheme)
    assert {first for first, _, _ in twins} <= set(units.names)
    assert not any("lm_head" in name for name in [*units.names, *units.keys])


@pytest.mark.parametrize("c", [0.0, 1.0, "both"])
@pytest.mark.parametrize("case", TIED)
def test_tied_adapters_are_merged_once(case, c, tmp_path):
    seen = []

    class Watched(KIF):
        name = "kif"

        def fusion_coefficients(self, current, previous):
            place = torch.arange(len(current))  # units of a second copy would get other coefficients
            return ((place + place // 4) % 2).double() if c == "both" else torch.full_like(current, c)

        def merge(self, ctx, previous, current):
            merged = super().merge(ctx, previous, current)
            seen[:] = [previous, current, merged]
            return merged

    model, twins = tied_adapter(case)
    two_tasks(model, Watched(), tmp_path)
    previous, current, merged = seen
    parameters = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    for first, second, view in twins:
        assert torch.equal(view(parameters[first]), parameters[second])
        assert not torch.equal(previous[first], current[first])
    for name, value in merged.items():
        assert torch.equal(parameters[name], value)
        if c != "both":
            assert torch.equal(value, (previous, current)[int(c)][name])
    if c == "both" and case == "LoRA":
        a = parameters[twins[0][0]]
        for r in range(4):
            assert torch.equal(a[r], (previous, current)[r % 2][twins[0][0]][r])


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 6, 3, groups=1), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.conv(x).mean((2, 3)))


def test_convolutions_pair_their_rows_and_columns():
    model = lora_model(model=Convolutions(), kind="", r=2, target_modules=["conv", "out"])
    units = SkillUnits.of_model(model, "lora_rank1")
    assert units.keys == ranks((f"{P}conv", 2), (f"{P}out", 2))
    a, b = units.pieces[:2]
    assert (a.shape, a.axis, b.shape, b.axis) == ((2, 3, 3, 3), 0, (6, 2, 1, 1), 1)


@pytest.mark.parametrize("active", ["default", "second"])
def test_keys_name_no_adapter_and_cover_only_the_one_that_learns(active):
    model = lora_model(modules_to_save=["lm_head"])
    model.add_adapter("second", LoraConfig(**LORA["llama"], modules_to_save=["lm_head"]))
    model.set_adapter(active)
    units = SkillUnits.of_model(model, "lora_rank1")
    assert units.keys == SkillUnits.of_model(lora_model(modules_to_save=["lm_head"]), "lora_rank1").keys
    assert all(f".{active}" in name for name in units.names)


def test_two_adapters_that_learn_at_once_keep_their_names():
    model = lora_model()
    model.add_adapter("second", LoraConfig(**LORA["llama"]))
    model.base_model.set_adapter(["default", "second"])
    units = SkillUnits.of_model(model, "lora_rank1")
    assert len(set(units.keys)) == len(units.keys) == 32
    assert sorted(units.names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)


CONFIGS = {
    "plain": {},
    "rank pattern": {"rank_pattern": {"layers.0.self_attn.v_proj": 2}},
    "modules to save": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_stored_adapter_has_the_keys_of_its_model(config, scheme, tmp_path):
    model = lora_model(**CONFIGS[config])
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    stored = load_file(str(tmp_path / "adapter_model.safetensors"))
    units = SkillUnits.of_shapes({name: tuple(t.shape) for name, t in stored.items()}, scheme)
    assert sorted(units.keys) == sorted(SkillUnits.of_model(model, scheme).keys)
    assert sorted(units.names) == sorted(stored)


def test_hash_tells_scheme_and_keys():
    digests = [SkillUnits.of_model(lora_model(), scheme).digest for scheme in SCHEMES]
    digests += [SkillUnits.of_model(lora_model(r=rank), "lora_rank1").digest for rank in (3, 4)]
    assert len(set(digests)) == 4 and digests[2] == digests[4]


@pytest.mark.parametrize("config", [{"use_dora": True}, {"r": 7}, {"target_modules": ["k_proj"]}], ids=str)
def test_an_adapter_that_does_not_learn_may_be_of_another_kind(config):
    model = lora_model()
    model.add_adapter("old", LoraConfig(**{**LORA["llama"], **config}))
    model.set_adapter("default")
    for scheme in SCHEMES:
        assert SkillUnits.of_model(model, scheme).keys == SkillUnits.of_model(lora_model(), scheme).keys
    if "use_dora" in config:
        model.set_adapter("old")
        with pytest.raises(InputError, match="DoRA"):
            SkillUnits.of_model(model, "lora_rank1")


# -- scores of units ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pair", "ranks"), [("product", [6, 20]), ("mean", [2.5, 4.5]), ("sum", [5, 9])])
def test_scores_of_rank1_units_and_of_what_learns_beside_them(pair, ranks):
    """Head and bias have means 7 and 14: the larger gets the largest score of a rank-1 unit, the other half of it."""
    shapes = {"m.lora_A.weight": (2, 3), "m.lora_B.weight": (3, 2), "head": (2, 2), "bias": (2,)}
    units = SkillUnits.of_shapes(shapes, "lora_rank1")
    means = {"m.lora_A.weight": torch.tensor([2.0, 4.0]), "m.lora_B.weight": torch.tensor([3.0, 5.0])}
    scores = units.reduce({**means, "head": torch.tensor([7.0]), "bias": torch.tensor([14.0])}, pair)
    assert scores.tolist() == [*ranks, ranks[1] / 2, ranks[1]]
    scores = units.reduce({**means, "head": torch.tensor([0.0]), "bias": torch.tensor([0.0])}, pair)
    assert scores.tolist() == [*ranks, 0, 0]


@pytest.mark.parametrize("pair", ["product", "mean", "sum"])
@pytest.mark.parametrize("scheme", ["matrix", "lora_matrix"])
def test_scores_of_whole_matrices_are_plain_means(scheme, pair):
    units = SkillUnits.of_shapes({"m.lora_A.weight": (2, 3), "m.lora_B.weight": (3, 2), "head": (2, 2)}, scheme)
    means = {name: torch.tensor([mean]) for name, mean in zip(units.names, [2.0, 3.0, 7.0], strict=True)}
    assert units.reduce(means, pair).tolist() == [2, 3, 7]


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_refuses_dora(scheme):
    with pytest.raises(InputError, match=r"method 'kif' cannot split '.*q_proj' into skill units: it is DoRA"):
        SkillUnits.of_model(lora_model(use_dora=True), scheme, method="kif")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_refuses_adalora(scheme):
    config = AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=10, task_type="CAUSAL_LM")
    with pytest.raises(InputError, match="AdaLoRA, whose rank changes; use plain LoRA there"):
        SkillUnits.of_model(get_peft_model(tiny_model(), config), scheme)


def test_refuses_a_grouped_convolution_only_where_it_does_not_pair():
    model = Convolutions()
    model.conv = nn.Conv2d(4, 8, 3, groups=2)
    adapted = lora_model(model=model, kind="", r=2, target_modules=["conv"])
    columns = adapted.base_model.model.conv.lora_B["default"].weight.shape[1]
    if columns == 2:
        assert len(SkillUnits.of_model(adapted, "lora_rank1")) == 2
    else:
        with pytest.raises(InputError, match="do not pair up"):
            SkillUnits.of_model(adapted, "lora_rank1")


@pytest.mark.parametrize("scheme", ["lora_matrix", "lora_rank1"])
def test_refuses_lora_units_without_lora(scheme):
    with pytest.raises(InputError, match="method 'tasl' needs LoRA adapters and this model has none"):
        SkillUnits.of_model(tiny_model(), scheme, method="tasl")
    with pytest.raises(InputError, match="needs LoRA weights and there are none"):
        SkillUnits.of_shapes({"w": (2, 2)}, scheme, method="tasl")


def test_refuses_what_does_not_learn_or_is_unknown():
    model = tiny_model()
    with pytest.raises(InputError, match="units='rows' is unknown; choose matrix, lora_matrix, lora_rank1"):
        SkillUnits.of_shapes({"m.lora_A.weight": (2, 3), "m.lora_B.weight": (3, 2)}, "rows")
    with pytest.raises(InputError, match="no parameter of the model learns"):
        SkillUnits.of_model(model.requires_grad_(False), "matrix")
    with pytest.raises(InputError, match="no LoRA adapter of the model learns"):
        SkillUnits.of_model(lora_model().requires_grad_(False), "lora_rank1")


def test_refuses_factors_that_do_not_pair_up():
    shapes = {"m.lora_A.weight": (4, 3), "m.lora_B.weight": (3, 2)}
    with pytest.raises(InputError, match=r"'m' has A of shape \[4, 3\] and B of shape \[3, 2\]"):
        SkillUnits.of_shapes(shapes, "lora_rank1")
    assert len(SkillUnits.of_shapes(shapes, "lora_matrix")) == 2


def test_other_units_are_refused_with_the_first_key_that_differs():
    units = SkillUnits.of_model(lora_model(r=2), "lora_rank1")
    units.check_same(list(units.keys), "kif", "the file")
    cases = [
        (units.keys[:3] + units.keys[4:], f"'{units.keys[3]}' is missing there"),
        ([*units.keys[:2], "other[0]", *units.keys[2:]], "'other[0]' is there and not here"),
        ([units.keys[1], units.keys[0], *units.keys[2:]], f"'{units.keys[0]}' stands at another place"),
        (SkillUnits.of_model(lora_model(r=3), "lora_rank1").keys, f"'{q(0)}[2]' is there and not here"),
    ]
    for keys, said in cases:
        with pytest.raises(InputError) as error:
            units.check_same(keys, "kif", "the file")
        assert said in str(error.value) and "method 'kif': the file" in str(error.value)


# -- fusing ------------------------------------------------------------------------------------------------------------


def two_states(units, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: {p.name: torch.randn(p.shape, generator=generator).to(dtype) for p in units.pieces}  # noqa: E731
    return draw(), draw()


def some_units(scheme="lora_rank1"):
    shapes = {
        "m.lora_A.weight": (3, 5), "m.lora_B.weight": (4, 3), "head.weight": (2, 4), "bias": (6,),
        "e.lora_embedding_A": (2, 7), "e.lora_embedding_B": (3, 2),
        "c.lora_A.weight": (2, 3, 3, 3), "c.lora_B.weight": (6, 2, 1, 1),
    }  # fmt: skip
    return SkillUnits.of_shapes(shapes, scheme)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_fusing_at_zero_and_one_is_exact(scheme, dtype):
    units = some_units(scheme)
    previous, current = two_states(units, dtype)
    for c, expected in ((0.0, previous), (1.0, current)):
        merged = fuse(units, previous, current, torch.full((len(units),), c, dtype=torch.float64))
        assert equal(merged, expected) and all(value.dtype == dtype for value in merged.values())


def test_fusing_mixes_exact_units_within_one_matrix():
    units = some_units()
    previous, current = two_states(units)
    c = torch.tensor([float(i % 2) for i in range(len(units))], dtype=torch.float64)
    merged = fuse(units, previous, current, c)
    a, b = merged["m.lora_A.weight"], merged["m.lora_B.weight"]
    for r, source in ((0, previous), (1, current), (2, previous)):
        assert torch.equal(a[r], source["m.lora_A.weight"][r])
        assert torch.equal(b[:, r], source["m.lora_B.weight"][:, r])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("c", [0.0, 1.0])
def test_signed_zeros_and_infinities_pass_unchanged(c, dtype):
    values = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1.5], dtype=dtype)
    previous, current = (t.reshape(-1).contiguous() for t in torch.meshgrid(values, values, indexing="ij"))
    expected = current if c else previous
    for coefficient in (c, torch.full((25,), c, dtype=torch.float64)):
        merged = lerp(previous, current, coefficient)
        assert torch.equal(merged, expected) and torch.equal(merged.signbit(), expected.signbit())
    halves = torch.where(torch.arange(25) < 12, c, 0.5).double()
    mixed = lerp(previous, current, halves)
    assert torch.equal(mixed[:12], expected[:12]) and mixed[24] == 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fusing_rounds_once(dtype):
    units = some_units("matrix")
    previous, current = two_states(units, dtype)
    c = torch.rand(len(units), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    merged = fuse(units, previous, current, c)
    for share, (name, value) in zip(c, merged.items(), strict=True):
        exact = previous[name].double() + share * (current[name].double() - previous[name].double())
        assert torch.equal(value, exact.to(dtype)), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fusing_equals_a_naive_loop(scheme):
    units = some_units(scheme)
    previous, current = two_states(units)
    c = torch.rand(len(units), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    merged = fuse(units, previous, current, c)
    by_key = dict(zip(units.keys, c.tolist(), strict=True))
    for name, value in merged.items():
        before, after = previous[name].double(), current[name].double()
        expected = torch.empty_like(before)
        module, _, side = name.partition(".lora_")
        for place in torch.cartesian_prod(*[torch.arange(n) for n in value.shape]).reshape(-1, value.dim()).tolist():
            if scheme == "lora_rank1" and side:
                r = place[0] if "A" in side.split(".")[0] else place[1]
                share = by_key[f"{module}[{r}]"]
            else:
                share = by_key[name]
            i = tuple(place)
            expected[i] = (1 - share) * before[i] + share * after[i]
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


def test_fusing_leaves_what_belongs_to_no_unit_and_its_inputs():
    units = SkillUnits.of_shapes({"w": (2, 2), "b": (2,)}, "matrix", min_ndim=2)
    previous, current = two_states(SkillUnits.of_shapes({"w": (2, 2), "b": (2,)}, "matrix"))
    kept = {name: value.clone() for name, value in (previous | {"now " + n: v for n, v in current.items()}).items()}
    merged = fuse(units, previous, current, torch.zeros(1, dtype=torch.float64))
    assert torch.equal(merged["b"], current["b"]) and torch.equal(merged["w"], previous["w"])
    assert equal(previous | {"now " + n: v for n, v in current.items()}, kept)


def dense(state, module, coefficients, sides=("lora_A.weight", "lora_B.weight")):
    """The sum of c_r b_r a_r^T, one rank-1 matrix after another."""
    a, b = (state[f"{module}.{side}"].double().flatten(1) for side in sides)
    return sum(float(c) * torch.outer(b[:, r], a[r]) for r, c in enumerate(coefficients))


@pytest.mark.parametrize(
    ("module", "sides", "start", "rank"),
    [
        ("m", ("lora_A.weight", "lora_B.weight"), 0, 3),
        ("e", ("lora_embedding_A", "lora_embedding_B"), 5, 2),
        ("c", ("lora_A.weight", "lora_B.weight"), 7, 2),
    ],
)
def test_fusing_products_is_the_best_matrix_of_that_rank(module, sides, start, rank):
    units = some_units()
    assert units.keys[start] == f"{module}[0]"
    previous, current = two_states(units)
    c = torch.rand(len(units), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    merged = fuse_products(units, previous, current, c)
    part = c[start : start + rank]
    wanted = dense(previous, module, 1 - part, sides) + dense(current, module, part, sides)
    u, s, vh = torch.linalg.svd(wanted, full_matrices=False)
    best = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
    torch.testing.assert_close(dense(merged, module, torch.ones(rank), sides), best, rtol=1e-5, atol=1e-5)
    for piece in units.pieces:
        assert merged[piece.name].shape == piece.shape
    plain = fuse(units, previous, current, c)
    assert torch.equal(merged["head.weight"], plain["head.weight"]) and torch.equal(merged["bias"], plain["bias"])


def test_fusing_products_where_the_layer_is_narrower_than_twice_the_rank():
    units = SkillUnits.of_shapes({"m.lora_A.weight": (4, 3), "m.lora_B.weight": (2, 4)}, "lora_rank1")
    previous, current = two_states(units)
    c = torch.tensor([0.2, 0.9, 0.5, 0.0], dtype=torch.float64)
    merged = fuse_products(units, previous, current, c)
    wanted = dense(previous, "m", 1 - c) + dense(current, "m", c)
    torch.testing.assert_close(dense(merged, "m", torch.ones(4)), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fusing_products_at_zero_and_one_is_exact(dtype):
    units = some_units()
    previous, current = two_states(units, dtype)
    for c, expected in ((0.0, previous), (1.0, current)):
        merged = fuse_products(units, previous, current, torch.full((len(units),), c, dtype=torch.float64))
        assert equal(merged, expected)


@pytest.mark.parametrize("scheme", ["matrix", "lora_matrix"])
def test_fusing_products_needs_pairs(scheme):
    units = some_units(scheme)
    with pytest.raises(InputError, match="needs units='lora_rank1'"):
        fuse_products(units, *two_states(units), torch.ones(len(units)))


# -- whole models ------------------------------------------------------------------------------------------------------


def two_tasks(model, method, folder, kind="llama"):
    for index in range(2):
        train_task(model, toy_rows(kind, rows=12, seed=index), [method], folder / str(index), kind=kind)


def test_tied_embeddings_are_merged_and_stay_tied(tmp_path):
    model, seen = tiny_model("t5"), {}

    class Watched(TaSL):
        name = "tasl"

        def merge(self, ctx, previous, current):
            seen.update(previous=previous, current=current)
            return super().merge(ctx, previous, current)

    two_tasks(model, Watched(quantile=1.0), tmp_path, "t5")  # nothing is important: all go half the way
    half = (seen["previous"]["shared.weight"] + seen["current"]["shared.weight"]) / 2
    torch.testing.assert_close(model.shared.weight.detach(), half)
    assert not torch.equal(half, seen["current"]["shared.weight"])
    for tied in (model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head):
        assert tied.weight is model.shared.weight
    model.save_pretrained(str(tmp_path / "saved"))
    again = type(model).from_pretrained(str(tmp_path / "saved"))
    assert equal(weights(again), weights(model))


MODELS = {
    "rank pattern": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "modules to save": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [3, 5]}},
}


@pytest.mark.parametrize("space", ["factors", "products"])
@pytest.mark.parametrize("config", MODELS)
def test_two_tasks_are_merged_and_load_in_plain_peft(config, space, tmp_path):
    model = lora_model(task_type="CAUSAL_LM", **MODELS[config])
    method = TaSL(units="lora_rank1", space=space)
    two_tasks(model, method, tmp_path)
    assert len(method.coefficients_) == len(method.unit_keys_)
    model.save_pretrained(str(tmp_path / "saved"), save_embedding_layers=False)
    plain = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "saved"))
    ids = torch.tensor([[3, 5, 9, 30, 41, 60, 7]])
    assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)


def test_an_adapter_that_does_not_learn_stays_as_it_is(tmp_path):
    model = lora_model()
    model.add_adapter("second", LoraConfig(**LORA["llama"]))
    model.set_adapter("second")
    before = weights(model)
    two_tasks(model, TaSL(units="lora_rank1"), tmp_path)
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before if ".second." not in name)
    assert all(not torch.equal(before[name], after[name]) for name in before if ".second." in name)
