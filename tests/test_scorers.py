import itertools
import json
import math
import os
import subprocess
import sys
import time
from functools import partial

import datasets
import pytest

from hf_continual import scorers
from hf_continual.errors import InputError
from hf_continual.evaluation import EvaluationConfig, check_task, evaluate_task, make_cell
from hf_continual.scorers import SCORERS, code_tests, score
from hf_continual.scorers.code_tests import network_can_be_cut, pass_at_k, program_of, run_program
from hf_continual.scorers.exact_match import extract_answer
from hf_continual.scorers.sari import sentence_sari, tokenize_13a
from hf_continual.scorers.text_overlap import fill_literals
from hf_continual.tasks import Task
from hf_continual.testing import tiny_model, toy_tokenizer


def rows(*pairs, **columns):
    """Rows of (prediction, references) pairs."""
    made = [{"prediction": p, "references": r if isinstance(r, list) else [r]} for p, r in pairs]
    for column, values in columns.items():
        for row, value in zip(made, values, strict=True):
            row[column] = value
    return made


def one(name, prediction, references):
    return score(name, rows((prediction, references))).value


# Exact match


EXACT = ["exact_match", "exact_match_olora", "exact_match_plain", "exact_match_squad", "exact_match_tasl",
         "exact_match_casefold", "exact_match_trace", "exact_match_seekr"]  # fmt: skip


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("yes", "yes", set(EXACT)),
        ("Yes", "yes", {"exact_match", "exact_match_olora", "exact_match_squad", "exact_match_tasl",
                        "exact_match_casefold"}),
        ("very  positive!", "Very positive", {"exact_match", "exact_match_olora", "exact_match_squad"}),
        ("the cat", "cat", {"exact_match_squad"}),
        ("theatre", "atre", set()),  # an article is a word
        ("lax</s>", "lax", {"exact_match_tasl"}),
        ("reasons\nAnswer: B", "B", {"exact_match_seekr"}),
        ("", "-", {"exact_match_olora", "exact_match_squad"}),  # MNLI's rows without a label
        ("", "", set(EXACT) - {"exact_match_trace", "exact_match_seekr"}),
    ],
)  # fmt: skip
def test_exact_match_of_each_paper(prediction, reference, right):
    assert {name for name in EXACT if one(name, prediction, reference) == 1.0} == right


def test_olora_migu_and_sapt_are_one_formula_and_any_reference_counts():
    for name in ("exact_match_olora", "exact_match_migu", "exact_match_sapt"):
        assert one(name, "B.", ["a", "b"]) == 1.0 and one(name, "B C", ["a", "b"]) == 0.0
    found = score("exact_match", rows(("a", "a"), ("b", "a"), ("a", "a"), ("c", "a")))
    assert found.value == 0.5 and found.rows == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("A\nReasoning: since", "A"),
        ("Because it is.\nAnswer: C ", "C"),
        ("\u56e0\u4e3a\n\u7b54\u6848\uff1aB", "B"),  # the Chinese "answer" with a full-width colon
        ("x\nReasoning: y\nAnswer: z", "x"),
        ("so\nAnswer: 5\nAnswer: 6", "5"),
        ("  42 ", "42"),
    ],
)
def test_seekrs_answer_within_reasoned_text(text, answer):
    assert extract_answer(text) == answer


def test_first_letter():
    assert one("first_letter", "B. since the sun", "B") == 1.0
    assert one("first_letter", "b", "B") == 0.0
    assert one("first_letter", "", "") == 0.0 and one("first_letter", "", "B") == 0.0
    assert one("first_letter", "since\nAnswer: B)", "B") == 0.0
    assert one("first_letter_seekr", "since\nAnswer: B)", "B") == 1.0


@pytest.mark.parametrize("name", ["rouge_l", "edit_similarity", "sari"])
def test_seekrs_scorers_see_the_answer_alone(name):
    columns = {"prompt": ["make it simpler : a b c d"]} if name == "sari" else {}
    reasoned, plain_text = (
        score(f"{name}_{kind}", rows((text, "a b c"), **columns)).value
        for kind, text in (("seekr", "a b d\nReasoning: since a b c"), ("trace", "a b d"))
    )
    whole = score(f"{name}_trace", rows(("a b d\nReasoning: since a b c", "a b c"), **columns)).value
    assert reasoned == plain_text != whole


# ROUGE-L and edit similarity


def test_rouge_l_is_rouge_scores_own_number_and_the_best_reference():
    from rouge_score import rouge_scorer

    own = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    pairs = [("The councils approved it.", "the council approves the budget"), ("a b a c", "a a b c d"), ("x", "y")]
    found = score("rouge_l", rows(*pairs))
    assert found.rows == [own.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in pairs]
    assert found.value == sum(found.rows) / 3 and found.rows[0] == pytest.approx(6 / 9)  # stemmed: the council approv
    assert one("rouge_l", "a b", ["c d", "a x"]) == 0.5


def test_traces_rouge_l_gives_the_numbers_of_the_package_rouge():
    # rouge 1.0.1, Rouge(metrics=["rouge-l"]).get_scores(reference, prediction, avg=True)["rouge-l"]["f"]
    first = one("rouge_l_trace", "the council approved. the budget passed.", "the budget passed. council met today.")
    assert first == 0.7272727223140496
    assert one("rouge_l_trace", "a b c. d e", "d e. a c") == 0.8888888839506174
    # By hand: words count once, so a repeated word costs nothing and P = R = 1; rouge_l sees it.
    assert one("rouge_l_trace", "the the cat", "the cat the") == pytest.approx(1.0, abs=1e-8)
    assert one("rouge_l", "the the cat", "the cat the") == pytest.approx(2 / 3)
    assert one("rouge_l_trace", "", "a") == 0.0 and one("rouge_l_trace", "a", "...") == 0.0


def test_edit_similarity_by_hand():
    # The longest common subsequence of kitten and sitting is ittn: 6 + 7 - 2 * 4 = 5 edits.
    assert one("edit_similarity", "kitten", "sitting") == pytest.approx(1 - 5 / 13)
    assert one("edit_similarity", "kitten", ["x", "sitting"]) == pytest.approx(1 - 5 / 13)
    assert one("edit_similarity", "", "") == 1.0
    assert one("edit_similarity_trace", "kitten", "sitting") == 0.62
    assert one("edit_similarity_trace", "", "") == 0.0
    assert fill_literals("x = <NUM_LIT:3> + <NUM_LIT>; s = '<STR_LIT:a>b<STR_LIT>'") == "x = 3 + 0; s = 'ab'"
    assert one("edit_similarity_trace", "f(<NUM_LIT>)", "f(0)") == 1.0


def test_a_package_that_is_missing_is_named(monkeypatch):
    from hf_continual.scorers import text_overlap

    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    text_overlap._fuzz.cache_clear()
    with pytest.raises(InputError, match=r"edit_similarity.*rapidfuzz.*pip install"):
        score("edit_similarity", rows(("a", "a")))


# SARI


SOURCE = "About 95 species are currently accepted."
KNOWN = ["About 95 species are currently known.", "About 95 species are now accepted.", "95 species are now accepted."]


def test_sari_gives_the_published_vectors():
    # The metric card of `sari`, with the parts FlexEval's documentation prints, and the card of `wiki_split`.
    found = sentence_sari(SOURCE, "About 95 you now get in.", KNOWN)
    assert found["sari"] == pytest.approx(0.26953601953601954, abs=1e-12)
    assert found["keep"] == pytest.approx(0.22527472527472525) and found["delete"] == 0.5
    assert found["add"] == pytest.approx(0.08333333333333333)
    single = sentence_sari("About 95 species are currently accepted .", "About 95 you now get in .",
                           ["About 95 species are currently known ."])  # fmt: skip
    assert single["sari"] == pytest.approx(0.21805555555555557, abs=1e-12)


def test_sari_by_hand():
    assert sentence_sari("a b", "a c", ["a c"])["sari"] == 1.0
    # The source unchanged, though b should be c. n = 1: keep P = 1/2, R = 1, F = 2/3; nothing deleted: 1; nothing
    # added: P = 1, R = 0, F = 0. n = 2: keep P = 0; delete 1; add 0. n = 3, 4: no n-grams, all 1.
    found = sentence_sari("a b", "a b", ["a c"])
    assert found["keep"] == pytest.approx((2 / 3 + 0 + 1 + 1) / 4) and found["delete"] == 1.0 and found["add"] == 0.5
    assert found["sari"] == pytest.approx(13 / 18)
    both = score("sari", rows(("a c", "a c"), ("a b", "a c"), source=["a b", "a b"]))
    assert both.value == pytest.approx((1 + 13 / 18) / 2) and both.rows == pytest.approx([1.0, 13 / 18])
    assert both.details["add"] == 0.75


def test_traces_sari_takes_the_whole_prompt_for_the_source():
    given = rows(("a b", "a b"), prompt=["Simplify: a b"], source=["a b"])
    assert score("sari_trace", given).value == sentence_sari("Simplify: a b", "a b", ["a b"])["sari"]
    given[0]["prompt"] = [{"role": "user", "content": "Simplify: a b"}]
    assert score("sari_trace", given).value == sentence_sari("Simplify: a b", "a b", ["a b"])["sari"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("In 1,000.5 ways, e.g. 3-4.", "In 1,000.5 ways , e . g . 3 - 4 ."),
        ("well-known (it's) &quot;so&quot;", 'well-known ( it\'s ) " so "'),
        ("Z\u00fcrich\u2013Bern: 5%", "Z\u00fcrich\u2013Bern : 5 %"),
    ],
)
def test_13a_words(text, words):
    assert tokenize_13a(text) == words.split()


# Classes and dialogues


LABELS = ["a", "b", "c", "d"]


def test_f1_by_hand():
    # a: 1 right, 1 missed; b: 1 right, 1 wrong; c: 1 missed, for x is no label; d does not occur.
    given = rows(("A.", "a"), ("b", "a"), ("b", "b"), ("x", "c"))
    macro, micro = score("macro_f1", given, LABELS), score("micro_f1", given, LABELS)
    assert macro.value == pytest.approx((2 / 3 + 2 / 3 + 0) / 3) and macro.rows is None
    assert micro.value == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert macro.details == {"classes": 3.0, "accuracy": 0.5, "predictions_outside_labels": 1.0,
                             "references_outside_labels": 0.0}  # fmt: skip
    assert score("macro_f1", given).value == macro.value  # without a label set


def test_macro_f1_is_sklearns():
    golds, answers = "abacabdcba", "aabcabdacb"
    given = rows(*zip(answers, golds, strict=True))
    # sklearn 1.9.1: f1_score(list(golds), list(answers), average="macro"), and "micro"
    assert score("macro_f1", given, LABELS).value == pytest.approx(0.5833333333333333, abs=1e-12)
    assert score("micro_f1", given, LABELS).value == pytest.approx(0.5, abs=1e-12)


def test_labels_that_read_alike_are_refused_by_f1():
    with pytest.raises(InputError, match="'C.' reads like another label"):
        score("macro_f1", rows(("c", "c")), ["c", "C."])


def test_answers_outside_the_labels_are_counted_and_no_error():
    given = rows(("Yes!", "yes"), ("maybe", "no"), ("no", "-"))
    found = score("exact_match", given, ["yes", "no"])
    assert found.value == pytest.approx(1 / 3)
    assert found.details == {"predictions_outside_labels": 1.0, "references_outside_labels": 1.0}
    assert score("exact_match", given).details == {}


def test_joint_goal_accuracy_by_hand():
    # d1/0: both slots right; d1/2: one of two wrong; d2/0: right. Without dialogues, or by rows, it would be another.
    given = rows(("LAX", "lax"), ("two</s>", "two"), ("lax", "lax"), ("1", "2"), ("bach", "bach"),
                 dialogue=["d1", "d1", "d1", "d1", "d2"], turn=[0, 0, 2, 2, 0])  # fmt: skip
    found = score("joint_goal_accuracy", given)
    assert found.value == pytest.approx(2 / 3) and found.rows == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert found.details == {"turns": 3.0, "slot_accuracy": 0.8}
    assert score("joint_goal_accuracy", given[::-1]).value == found.value


# Perplexity


def test_perplexity_by_hand_over_tokens_and_by_domain():
    half, eighth = math.log(0.5), math.log(0.125)
    given = [
        {"text_log_likelihood": [half, half, half], "domain": "acl"},
        {"text_log_likelihood": eighth, "tokens": 1, "domain": "phone"},
    ]
    found = score("perplexity", given)
    assert found.value == pytest.approx(2 ** ((1 + 1 + 1 + 3) / 4))
    assert found.rows == pytest.approx([2.0, 8.0])
    assert found.details == pytest.approx({"tokens": 4.0, "perplexity/acl": 2.0, "perplexity/phone": 8.0})
    assert score("perplexity", [{"text_log_likelihood": -1e9, "tokens": 1}]).value == math.inf
    assert not SCORERS["perplexity"].higher_is_better and not SCORERS["perplexity"].bounded


@pytest.mark.parametrize("row", [{"text_log_likelihood": -1.0}, {"text_log_likelihood": [-1.0], "tokens": 2},
                                 {"text_log_likelihood": 0.5, "tokens": 1},
                                 {"text_log_likelihood": math.nan, "tokens": 1}])  # fmt: skip
def test_perplexity_refuses_what_is_no_log_likelihood(row):
    with pytest.raises(InputError, match="row 1: t"):
        score("perplexity", [{"text_log_likelihood": -1.0, "tokens": 1}, row])


# pass@k


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))
            share = sum(any(sample < c for sample in subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)
    with pytest.raises(InputError, match="pass@3 needs at least 3 samples"):
        pass_at_k(2, 1, 3)


PREFIX = 'def double(x):\n    """Twice x."""\n'
TEST = "def check(f):\n    assert f(2) == 4\n    assert f(-1) == -2\n"


def problem(*samples):
    return {"prediction": list(samples), "prefix": PREFIX, "test": TEST, "entry_point": "double"}


def test_programs_are_scored_by_their_tests(monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    right = ["    return 2 * x", "    return x + x\n\nprint(undefined)",
             "Sure:\n```python\ndef double(x):\n    return 2 * x\n```\nDone."]  # fmt: skip
    wrong = [
        "    return x",
        "    return 4",
        "    import sys; sys.exit(0)",
        "return 2 * x",
        "    import os; os._exit(0)",
    ]
    for sample in right:
        assert score("pass_at_1", [problem(sample)]).value == 1.0, sample
    for sample in wrong:
        assert score("pass_at_1", [problem(sample)]).value == 0.0, sample
    samples = [*right[:2], *wrong[:2]]
    found = score("pass_at_1", [problem(*samples), problem(wrong[0])])
    assert found.rows == [0.5, 0.0] and found.value == 0.25 and found.details["programs"] == 5.0
    many = [right[0], *wrong[:1] * 10]
    assert score("pass_at_10", [problem(*many)]).value == pytest.approx(10 / 11)
    with pytest.raises(InputError, match="row 0: scorer 'pass_at_10' needs 10 samples or more"):
        score("pass_at_10", [problem(*samples)])


def test_code_is_run_only_if_allowed(monkeypatch, tmp_path):
    target = tmp_path / "ran"
    row = {"prediction": f"open({str(target)!r}, 'w').close()", "test": ""}
    for value in (None, "0", "true"):
        monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
        if value is not None:
            monkeypatch.setenv("HF_ALLOW_CODE_EVAL", value)
        with pytest.raises(InputError, match="HF_ALLOW_CODE_EVAL=1 to allow it"):
            score("pass_at_1", [row])
        assert not target.exists()
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    assert score("pass_at_1", [row]).value == 1.0 and target.exists()


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal\nfor s in (1, 2, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    ],
)
def test_a_program_that_loops_is_killed_in_time(program):
    begin = time.monotonic()
    assert run_program(program, timeout=1.0).outcome == "timeout"
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("cut", [False, True])
def test_what_a_killed_program_started_is_killed_too(tmp_path, cut):
    cut = cut and network_can_be_cut()
    target = tmp_path / "late"
    assert run_program(f"open({str(target)!r}, 'w').close()", timeout=10.0, cut_network=cut).passed
    assert target.exists()  # it could write there
    target.unlink()
    leave = "    os.setsid()\n" if cut else ""  # process 1 of a namespace takes those of other sessions along
    program = f"import os, time\nif not os.fork():\n{leave}    time.sleep(2)\n    open({str(target)!r}, 'w').close()\n"
    assert not run_program(program + "while True: pass", timeout=1.0, cut_network=cut).passed
    time.sleep(2)
    assert not target.exists()


def test_a_program_gets_little_memory_no_secrets_and_no_large_files(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    assert run_program("import os; assert 'SECRET_TOKEN' not in os.environ", timeout=10.0).passed
    large = run_program("x = bytearray(3 << 30)", timeout=10.0)
    assert large.outcome == "failed" and "MemoryError" in large.error
    assert not run_program("open('f', 'wb').write(bytes(2 << 20)); open('f').close()", timeout=10.0).passed
    assert run_program("print('x' * (4 << 20))", timeout=10.0).passed  # what it prints goes nowhere


def test_a_program_has_no_network_where_it_can_be_cut():
    dial = "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0)); s.listen()\n"
    dial += "socket.create_connection(s.getsockname(), 2).close()"
    assert run_program(dial, timeout=10.0).passed
    if network_can_be_cut():
        assert run_program(dial, timeout=10.0, cut_network=True).outcome == "failed"


def test_where_a_continuation_ends_and_what_is_whole():
    row = problem("")
    assert program_of(row, "    return 1\ndef other(): pass") == f"{PREFIX}    return 1\n{TEST}\ncheck(double)\n"
    whole = "import math\ndef double(x):\n    return 2 * x\n"
    assert program_of(row, whole) == f"{PREFIX}\n{whole}\n{TEST}\ncheck(double)\n"
    assert program_of({"test": "assert x"}, "x = 1") == "x = 1\nassert x\n"


# As metrics of `evaluate`


METRICS = """
import json, socket, sys
def refuse(*args): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
import evaluate
from hf_continual import scorers
for name, given in json.load(sys.stdin).items():
    own = scorers.load(name).compute(**given)
    assert evaluate.load(scorers.METRIC_FILE, name).compute(**given) == own
    print(json.dumps([name, own]))
"""


@pytest.mark.slow
def test_every_scorer_is_a_metric_of_evaluate_without_network(tmp_path):
    columns = {"source": ["a b", "c"], "prompt": ["a b", "c"], "dialogue": ["d", "d"], "turn": ["0", "1"],
               "test": ["assert x == 1", "assert x == 2"], "text_log_likelihood": [-1.0, -2.0]}  # fmt: skip
    inputs, expected = {}, {}
    for name, scorer in SCORERS.items():
        given = {column: columns[column] for column in scorer.columns}
        if scorer.answers == "code":
            given["predictions"] = [["x = 1"] * scorer.samples] * 2
        elif scorer.answers != "tokens":
            given["predictions"] = ["a b", "c d"]
        if scorer.uses_references:
            given["references"] = [["x", "a b"], ["c e"]] if name != "rouge_l" else ["a b", "c e"]
        if name == "perplexity":
            given |= {"tokens": [2, 3], "domain": ["x", "y"]}
        if scorer.samples == 1:  # the others would run more programs of the same kind
            inputs[name] = given
            expected[name] = 0.75 if name.startswith("rouge_l") else 0.5
    expected |= {"first_letter": 1.0, "first_letter_seekr": 1.0, "edit_similarity": (1 + 4 / 6) / 2,
                 "edit_similarity_trace": (1 + 0.67) / 2, "edit_similarity_seekr": (1 + 0.67) / 2,
                 "perplexity": math.exp(3 / 5), "micro_f1": 2 / 3}  # fmt: skip
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_ALLOW_CODE_EVAL": "1"}
    done = subprocess.run([sys.executable, "-c", METRICS], input=json.dumps(inputs), env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert set(found) == set(inputs)
    for name, result in found.items():
        value = result[SCORERS[name].metric or name]
        if name.startswith("sari"):
            answers = zip(["a b", "c"], ["a b", "c d"], inputs[name]["references"], strict=True)
            assert value == pytest.approx(sum(sentence_sari(*each)["sari"] for each in answers) / 2)
        else:
            assert value == pytest.approx(expected[name], abs=1e-7), name


def test_each_scorer_states_its_formula_and_source_and_scores_the_perfect_answer_best():
    for name, scorer in SCORERS.items():
        assert scorer.name == name and scorer.source and len(scorer.summary) > 20, name
        if scorer.answers in ("text", "labels"):
            given = rows(("a b c d e", "a b c d e"), **{column: ["a b c d e"] for column in scorer.columns})
            assert score(name, given).value == pytest.approx(1.0, abs=1e-8), name


# Bad input


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("exact_match", {"prediction": "a"}, "preds.jsonl, row 1 has no references"),
        ("exact_match", {"prediction": "a", "references": []}, "preds.jsonl, row 1 has no references"),
        ("rouge_l", {"prediction": "a", "references": None}, "preds.jsonl, row 1 has no references"),
        ("exact_match", {"prediction": "a", "references": ["a", 1]}, "row 1: the reference 1 is of type int"),
        ("exact_match", {"prediction": "a", "references": [["a"]]}, r"row 1: the reference \['a'\] is of type list"),
        ("exact_match", {"prediction": "a", "references": 7}, "row 1: references=7 is of type int"),
        ("exact_match", {"prediction": "a", "references": "a"}, "row 1: references is a string, but a list in row 0"),
        ("exact_match", {"prediction": None, "references": ["a"]}, "row 1: prediction=None is no string"),
        ("sari", {"prediction": "a", "references": ["a"]}, "row 1 has no 'source', which scorer 'sari' needs"),
        ("joint_goal_accuracy", {"prediction": "a", "references": ["a"], "dialogue": "d"}, "row 1 has no 'turn'"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(name, row, says):
    good = {"prediction": "a", "references": ["a"], **dict.fromkeys(SCORERS[name].columns, "x")}
    with pytest.raises(InputError, match=says) as error:
        score(name, [good, row], where="preds.jsonl")
    assert str(error.value).startswith("preds.jsonl, row 1") and "\n" not in str(error.value)


def test_a_scorer_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"scorer='sary' is unknown; did you mean 'sari'\?"):
        score("sary", rows(("a", "a")))
    with pytest.raises(InputError, match=r"did you mean 'rouge_l'\?"):
        scorers.load("rougel")
    with pytest.raises(InputError, match=r"evaluation.scorer='exact_mach' is unknown; did you mean 'exact_match'\?"):
        EvaluationConfig(scorer="exact_mach")
    with pytest.raises(InputError, match=r"evaluation.scorer=\['sari'\] is unknown"):
        EvaluationConfig(scorer=["sari"])
    with pytest.raises(InputError, match=r"task 't': scorer='macro-f1' is unknown; did you mean 'macro_f1'\?"):
        check_task(task(scorer="macro-f1"), EvaluationConfig())
    with pytest.raises(InputError, match="p.jsonl: there are no predictions"):
        score("exact_match", [], where="p.jsonl")


# In evaluation


def task(n=3, scorer=None, labels=None, references=None, **columns):
    data = {"prompt": [f"w{i} w2 Answer :" for i in range(n)], "references": references or [["red"]] * n, **columns}
    return Task("t", eval_dataset=datasets.Dataset.from_dict(data), scorer=scorer, labels=labels)


@pytest.mark.parametrize(
    ("scorer", "columns", "says"),
    [
        ("pass_at_10", {"test": ["", "", ""]}, "'pass_at_10' needs 10 samples a row.*set evaluation.temperature"),
        ("pass_at_1", {"test": ["", "", ""]}, "HF_ALLOW_CODE_EVAL=1"),
        ("joint_goal_accuracy", {"turn": ["1", "1", "2"]}, "task 't', row 0 has no 'dialogue'"),
        ("sari", {"source": ["a", None, "b"]}, "task 't', row 1 has no 'source'"),
        ("macro_f1", {"references": [["a"], ["b"], []]}, "task 't', row 2 has no references"),
    ],
)
def test_a_task_that_could_not_be_scored_is_refused_before_training(monkeypatch, scorer, columns, says):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(InputError, match=says):
        check_task(task(scorer=scorer, **columns), EvaluationConfig())


def test_evaluation_keeps_what_the_scorer_needs_and_counts_answers_outside_the_labels():
    given = task(scorer="joint_goal_accuracy", dialogue=["d", "d", "e"], turn=["1", "1", "1"])
    check_task(given, EvaluationConfig())
    cell = evaluate_task(tiny_model(), toy_tokenizer(), given, EvaluationConfig(max_new_tokens=3), max_prompt_length=16)
    assert cell.metric == "joint_goal_accuracy" and cell.others["turns"] == 2.0 and cell.n == 3
    assert [(p["dialogue"], p["turn"]) for p in cell.predictions] == [("d", "1"), ("d", "1"), ("e", "1")]
    assert make_cell("joint_goal_accuracy", cell.predictions, cell.settings).score == cell.score
    right = [{**p, "prediction": p["references"][0]} for p in cell.predictions]
    assert make_cell("joint_goal_accuracy", right, {}).score == 1.0

    given = task(scorer="exact_match", labels=["blue", "green"])
    cell = evaluate_task(tiny_model(), toy_tokenizer(), given, EvaluationConfig(max_new_tokens=3), max_prompt_length=16)
    assert cell.settings["labels"] == ["blue", "green"] and cell.others["references_outside_labels"] == 3.0


def test_generated_code_keeps_its_indentation(monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    tokenizer = toy_tokenizer()
    monkeypatch.setattr(tokenizer, "batch_decode", lambda output, **_: ["    return 2 * x\n"] * len(output))
    given = task(2, "pass_at_1", test=[TEST] * 2, prefix=[PREFIX] * 2, entry_point=["double"] * 2)
    check_task(given, EvaluationConfig())
    cell = evaluate_task(tiny_model(), tokenizer, given, EvaluationConfig(max_new_tokens=3), max_prompt_length=16)
    assert cell.score == 1.0 and cell.others["programs"] == 2.0


class Ranks:
    """One of two processes, as far as an evaluation asks."""

    world_size = 1

    def __init__(self, is_main):
        self.is_main, self.rank = is_main, 0

    def on_main(self, function):
        return function() if self.is_main else {"metric": "told", "score": 0.5, "n": 1, "others": {}}


def test_pass_at_10_draws_ten_answers_to_each_row(monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    tried = []

    def passes(program, **options):
        tried.append(program)
        return code_tests.Verdict("passed" if "w1" in program else "failed")

    monkeypatch.setattr(code_tests, "run_program", passes)
    given = task(3, "pass_at_10", test=[f"TEST {i}" for i in range(3)])
    settings = {"max_new_tokens": 4, "temperature": 2.0, "top_p": 0.95, "seed": 5}
    config = EvaluationConfig(**settings, batch_size=16)
    check_task(given, config)
    cell = evaluate_task(tiny_model(), toy_tokenizer(), given, config, max_prompt_length=16)
    assert cell.settings == {"scorer": "pass_at_10", "max_prompt_length": 16, "batch_size": 16, "do_sample": True,
                             "num_beams": 1, "samples": 10, **settings}  # fmt: skip
    assert all(len(p["prediction"]) == 10 and len(set(p["prediction"])) > 5 for p in cell.predictions)
    assert len(tried) == 31 and cell.others["programs"] == 30.0  # one asks whether the network can be cut
    assert cell.score == sum(any("w1" in text for text in p["prediction"]) for p in cell.predictions) / 3
    for other in ({"batch_size": 4}, {"seed": 6}):  # the first draws the same, in other batches
        changed = evaluate_task(
            tiny_model(), toy_tokenizer(), given, EvaluationConfig(**{**settings, "batch_size": 16, **other}),
            max_prompt_length=16,
        )  # fmt: skip
        assert (changed.predictions == cell.predictions) == ("batch_size" in other)
    tried.clear()
    ranks = {"max_prompt_length": 16, "ranks": Ranks(is_main=False)}
    told = evaluate_task(tiny_model(), toy_tokenizer(), given, config, **ranks)
    assert (told.metric, told.score) == ("told", 0.5) and told.predictions == cell.predictions
    assert not tried  # rank 0 alone runs programs


@pytest.mark.parametrize(
    ("option", "value"), [("temperature", -1), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.5), ("seed", -1),
                          ("seed", True), ("top_p", 0.5)]
)  # fmt: skip
def test_draws_that_cannot_be_are_refused(option, value):
    with pytest.raises(InputError, match=f"evaluation.{option}={value!r}"):
        EvaluationConfig(**{option: value})


def test_stored_predictions_are_scored_again_without_torch_and_name_their_file(tmp_path):
    """`report --scorer`: a row that cannot be scored is named with its file."""
    folder = tmp_path / "tasks" / "00-a" / "predictions"
    folder.mkdir(parents=True)
    rows = [{"index": i, "prediction": "Red", "references": ["red"]} for i in range(2)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "a.json").write_text(json.dumps({"settings": {"labels": ["blue"]}}))
    code = (
        "import sys; from pathlib import Path; from hf_continual.run_scores import _score_again;"
        "print(_score_again(Path(sys.argv[1]), 0, 'a', 'a', sys.argv[2]), 'torch' in sys.modules)"
    )
    run = partial(subprocess.run, capture_output=True, text=True)
    done = run([sys.executable, "-c", code, str(tmp_path), "exact_match"])
    outside = {"predictions_outside_labels": 2.0, "references_outside_labels": 2.0}
    assert done.stdout.strip() == f"('exact_match', 1.0, {outside}) False", done.stderr
    failed = run([sys.executable, "-c", code, str(tmp_path), "sari"])
    assert f"{folder / 'a.jsonl'}, row 0 has no 'source'" in failed.stderr


def test_a_report_shows_predictions_outside_the_labels(tmp_path):
    from hf_continual.report import load_run, print_report

    tasks = [{"name": name, "folder": f"{i:02d}-{name}", "rows": 4, "hash": "0"} for i, name in enumerate("ab")]
    queue = {"schema": 1, "tasks": tasks, "cursor": 2, "finished": True, "seed": 1, "variant": None}
    (tmp_path / "queue.json").write_text(json.dumps(queue))
    cells = [(0, "a", 1.0), (1, "a", 3.0), (1, "b", 0.0)]
    rows = [
        {"after_task": "ab"[i], "after_index": i, "task": task, "task_index": "ab".index(task), "metric": "exact_match",
         "score": 0.5, "n": 4, "others": {"predictions_outside_labels": count}}
        for i, task, count in cells
    ]  # fmt: skip
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_run(tmp_path).strays == {"a": {0: 1, 1: 3}, "b": {1: 0}}
    print_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Predictions outside the labels, after one task and the next: a 1, 3 of 4.\n" in text
