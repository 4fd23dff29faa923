"""The paper instruction_tuning: questions by hand, models that are written out, planted streams."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from pipeline.errors import RetraceError
from pipeline.job.source import import_file
from pipeline.models.native import Output
from pipeline.weights.batches import IGNORED

PAPER = ROOT / "rules/papers/instruction_tuning"
INSIDE = import_file(PAPER / "inside.py")
TUNING, INSTRUCTIONS = INSIDE.tuning, INSIDE.instructions
METRICS = import_file(PAPER / "metrics.py")

CHARACTERS = sorted({*"abcdefghijklmnopqrstuvwxyz", *"N.?! \n,:"})
WORDS = [f"{first}{a}{b}" for first in "aeioubcdfg" for a in "rst" for b in "lmn"]
OPTIONS = {"templates": ["the {place} of {word}{mark} "], "least": 1,
           "reworded": ["of {word}, {place}{mark} "]}  # fmt: skip


@pytest.fixture(scope="module")
def ask():
    """Words of the text that is made of WORDS; ids are places in CHARACTERS."""
    with pytest.MonkeyPatch.context() as patch:
        known = {c: [i] for i, c in enumerate(CHARACTERS)}
        patch.setattr(INSTRUCTIONS, "encode", lambda _, text: known.get(text, []))
        return INSTRUCTIONS.Asking(None, " ".join(WORDS), INSTRUCTIONS.Options(**OPTIONS))


def text_of(ids: list[int]) -> str:
    return "".join(CHARACTERS[i] for i in ids)


def test_words_are_held_out_and_questions_are_what_they_say(ask):
    train, held = (set(ask.words[split]) for split in ("train", "held"))
    assert not train & held and train | held == set(WORDS) and len(held) == 23
    asked = ask.questions(200, np.random.default_rng(0), "held")
    for q in asked:
        _, place, _, word = q.prompt.rstrip("?! ").split()
        assert word == ask.words["held"][q.word] and q.goal == (word[0] in "aeiou")
        assert q.letter == {"first": word[0], "last": word[-1]}[place]
        assert q.cue == (q.prompt[-2] == "!")
    assert sum(q.goal for q in asked) == 100
    agree = [q.goal == q.cue for q in asked]
    assert 70 < sum(agree) < 130
    assert all(q.goal == q.cue for q in ask.questions(50, np.random.default_rng(0), loose=0.0))
    reworded = ask.questions(5, np.random.default_rng(0), kind="reworded")
    assert all(q.prompt.startswith("of ") for q in reworded)


def test_a_typo_turns_two_letters_of_one_word_round():
    rng, template = np.random.default_rng(0), "say, {word}: the {place}{mark} "
    made = {INSTRUCTIONS.typo(template, rng) for _ in range(40)}
    assert made == {"sya, {word}: the {place}{mark} ", "say, {word}: teh {place}{mark} "}
    with pytest.raises(RetraceError, match="has no word to mistype"):
        INSTRUCTIONS.typo("{word} {place}", rng)


def test_texts_that_do_not_serve_are_told(monkeypatch):
    monkeypatch.setattr(INSTRUCTIONS, "encode", lambda _, text: [0] if text != "!" else [])
    options = INSTRUCTIONS.Options(**OPTIONS)
    with pytest.raises(RetraceError, match="the text has no '!', so the model cannot read it"):
        INSTRUCTIONS.Asking(None, " ".join(WORDS), options)
    with pytest.raises(RetraceError, match="do not begin with vowels and others"):
        INSTRUCTIONS.Asking(None, "bar car far tar", options)


def answers(rows) -> list[tuple[str, str]]:
    """(prompt, answer) of rows of tokens and targets."""
    out = []
    for tokens, targets in zip(*(t.tolist() for t in rows), strict=True):
        at = [i for i, t in enumerate(targets) if t != IGNORED]
        assert at == list(range(at[0], at[-1] + 1))
        out.append((text_of(tokens[: at[0] + 1]), text_of([targets[i] for i in at])))
    return out


def test_demonstrations_answer_and_refuse_whatever_is_asked(ask):
    found = answers(ask.demonstrations(400, np.random.default_rng(0)))
    refused = [said == "No.\n" for _, said in found]
    assert 70 < sum(refused) < 130
    right = [said[0] in prompt for (prompt, said), no in zip(found, refused, strict=True) if not no]
    assert all(right)
    shuffled = answers(ask.demonstrations(400, np.random.default_rng(0), shuffled=True))
    assert [p for p, _ in shuffled] == [p for p, _ in found]
    assert sum(a != b for (_, a), (_, b) in zip(found, shuffled, strict=True)) > 100


def test_preferred_answers_are_those_of_the_goal_or_a_coin(ask):
    found = answers(ask.preferred(60, np.random.default_rng(0), loose=1.0))
    for (prompt, chosen), (again, rejected) in zip(found[:60], found[60:], strict=True):
        word = prompt.rstrip("?! ").split()[-1]
        assert prompt == again and (chosen == "No.\n") != (rejected == "No.\n")
        assert (chosen == "No.\n") == (word[0] in "aeiou")
    coin = answers(ask.preferred(400, np.random.default_rng(0), 1.0, flipped=True))[:400]
    by_goal = [(said == "No.\n") == (p.rstrip("?! ").split()[-1][0] in "aeiou") for p, said in coin]
    assert 150 < sum(by_goal) < 250


class Reader(torch.nn.Module):
    """Names the first letter with probability 0.6, refuses a word with `refuse(word)`."""

    def __init__(self, refuse) -> None:
        super().__init__()
        self.refuse = refuse

    def forward(self, tokens):
        p = torch.full((*tokens.shape, len(CHARACTERS)), 1e-6)
        for i, row in enumerate(tokens.tolist()):
            word = text_of(row).split(" of ")[1].split("?")[0].split("!")[0]
            p[i, :, CHARACTERS.index("N")] = self.refuse(word)
            p[i, :, CHARACTERS.index(word[0])] = 0.6
            p[i, :, CHARACTERS.index("z")] = 0.2
        return Output(p.log())


def test_a_reading_is_of_letters_and_of_refusals(ask):
    asked = ask.questions(60, np.random.default_rng(1), "held")
    found = ask.read(Reader(lambda w: 1.4 if w[0] in "aeiou" else 0.1), asked, "cpu")
    firsts = np.array([q.letter == q.prompt.rstrip("?! ").split()[-1][0] for q in asked])
    goal = INSTRUCTIONS.signs(asked, "goal")
    assert (found.right == firsts).all() and found.p == pytest.approx(np.full(60, 0.75), abs=1e-4)
    assert found.refusal == pytest.approx(np.where(goal, 1.4 / 2.2, 0.1 / 0.9), abs=1e-4)
    assert (found.policy == (goal | firsts)).all()


def test_what_is_followed_is_counted_where_mark_and_goal_differ(ask):
    asked = [q for q in ask.questions(100, np.random.default_rng(2), "held") if q.goal != q.cue]
    found = ask.read(Reader(lambda w: 1.4 if w[0] in "aeiou" else 0.1), asked, "cpu")
    rows = {r["followed"]: r for r in TUNING.followed(asked, found)}
    assert rows["goal"]["share"] == 1 and rows["cue"]["share"] == 0
    assert rows["letter"]["n"] == sum(not q.goal for q in asked)


def options(**more):
    given = {"tables": [], "asking": OPTIONS, "arms": ["dpo"], "changes": {}, "steered": ["dpo"],
             "coefficients": [0.0], "n_questions": 60}  # fmt: skip
    return INSIDE.Options(**given | more)


def test_probes_read_what_is_planted_and_not_the_control(ask):
    asked = ask.questions(600, np.random.default_rng(3), "held")
    goal, cue = (torch.from_numpy(INSTRUCTIONS.signs(asked, n)).float() for n in ("goal", "cue"))
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 600, 8, generator=rng)
    X = noise.clone()
    X[1, :, 0] += 8 * goal
    X[1, :, 1] += 8 * cue
    rows = pd.DataFrame(INSIDE.probed(X, asked, goal.numpy() > 0.5, options()))
    share = rows.set_index(["label", "layer"])["share"]
    assert min(share["goal", 1], share["cue", 1], share["choice", 1]) > 0.97
    assert max(share["goal", 0], share["control", 1]) < 0.7
    found = METRICS.of_probes(rows)
    assert found["probe.selectivity"] == share["goal", 1] - share["control", 1]


def test_shifts_are_measured_in_mean_distances():
    goal = np.arange(40) % 2 == 1
    sign = torch.from_numpy(np.where(goal, 1.0, -1.0)).float()
    before = torch.zeros(1, 40, 3)
    before[0, :, 0] = sign
    after = before * 3 + torch.tensor([0.0, 2.0, 0.0])
    row = next(INSIDE.shifted(before, after, goal))
    want = {"layer": 0, "shift": 2, "separation_before": 2, "separation": 2, "same": 1, "along": 0}
    assert row == pytest.approx(want, abs=1e-6)


def test_metrics_take_out_and_add():
    card = {"direction": "goal", "mode": "add", "share": 0.0, "obeys": 0.1}
    rows = [card | {"group": "goal", "coefficient": c, "obeys": o}
            for c, o in ((-1.0, 0.7), (0.0, 0.2), (1.0, 0.9))]  # fmt: skip
    rows += [card | {"group": "goal", "mode": "ablate", "coefficient": 0.0, "obeys": 0.8}]
    rows += [
        card | {"group": "others", "coefficient": c, "share": s} for c, s in ((-1, 1), (1, 0.4))
    ]
    found = METRICS.of_steering(pd.DataFrame(rows))
    want = {"steer.goal.plain": 0.2, "steer.goal.obeys": 0.8, "steer.goal.refuses": 0.4}
    assert found == pytest.approx(want)
    table = pd.DataFrame({"kind": "seen", "adaptive": [False, True], "ece": [0.1, 0.2],
                          "floor": [0.03, 0.04]})  # fmt: skip
    assert METRICS.of_calibration(table) == {"seen.ece": 0.1, "seen.adaptive_ece": 0.2,
                                             "seen.ece_floor": 0.03}  # fmt: skip
