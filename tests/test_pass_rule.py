"""The pass rule that all tables go by: each clause at its edge, and what the classes lose."""

from dataclasses import replace

import pytest
import torch

from unplant.evaluation import evaluate, largest_fall, missed
from unplant.poisoning import Attack
from unplant.results import Scores
from unplant.triggers import triggers

INFECTED = Scores(acc=0.82, asr=0.99, ra=0.01, natural_target_rate=0.02, worst_class_acc=0.66, asr_upper=0.995)
PURIFIED = Scores(acc=0.81, asr=0.02, ra=0.78, natural_target_rate=0.02, worst_class_acc=0.64, asr_upper=0.03)
CLEAN = Scores(acc=0.82, asr=None, ra=None, natural_target_rate=None, worst_class_acc=0.66)


def test_an_erased_backdoor_at_little_cost_passes():
    assert missed(INFECTED, PURIFIED) == ()


@pytest.mark.parametrize(
    ("name", "allowed", "too_much", "said"),
    [
        ("asr_upper", 0.05, 0.051, "ASR 2.0, at most 5.1"),
        ("acc", 0.80, 0.799, "ACC −2.1"),
        ("worst_class_acc", 0.61, 0.609, "worst class −5.1"),
        ("ra", 0.9 * 0.81, 0.728, "RA 72.8 of 72.9"),
    ],
)
def test_each_clause_alone(name, allowed, too_much, said):
    assert missed(INFECTED, replace(PURIFIED, **{name: allowed})) == ()
    assert missed(INFECTED, replace(PURIFIED, **{name: too_much})) == (said,)


def test_all_that_is_missed_is_said():
    ruined = Scores(acc=0.5, asr=0.9, ra=0.05, natural_target_rate=0.1, worst_class_acc=0.1, asr_upper=0.92)
    clauses = missed(INFECTED, ruined)
    assert clauses is not None
    assert [text.split(" ")[0] for text in clauses] == ["ASR", "RA", "ACC", "worst"]


@pytest.mark.parametrize(
    ("after", "accused", "said"),
    [
        (CLEAN, False, ()),
        (replace(CLEAN, acc=0.81, worst_class_acc=0.61), False, ()),
        (replace(CLEAN, acc=0.809), False, ("ACC −1.1",)),
        (replace(CLEAN, worst_class_acc=0.6), False, ("worst class −6.0",)),
        (CLEAN, True, ("called infected",)),
    ],
)
def test_a_model_that_was_never_infected_must_not_suffer_nor_be_accused(after, accused, said):
    assert missed(CLEAN, after, accused) == said


def test_a_verdict_of_infected_is_right_where_the_model_is():
    assert missed(INFECTED, PURIFIED, accused=True) == ()


@pytest.mark.parametrize(("asr", "counts"), [(0.8, True), (0.799, False), (None, False)])
def test_an_attack_that_hardly_works_does_not_count(asr, counts):
    assert (missed(replace(INFECTED, asr=asr), PURIFIED) is not None) is counts


def test_without_test_images_nothing_counts():
    assert missed(replace(CLEAN, acc=None), CLEAN) is None
    assert missed(CLEAN, replace(CLEAN, acc=None)) is None


def test_another_class_may_be_the_worst_afterwards_and_another_one_lose_most():
    before = replace(CLEAN, class_acc=(0.66, 0.9, None, 0.8))
    after = replace(before, worst_class_acc=0.68, class_acc=(0.68, 0.82, None, 0.75))
    assert missed(before, after) == ()
    assert largest_fall(before, after) == (1, pytest.approx(0.08))


def test_where_classes_were_not_told_apart_no_fall_is_known():
    assert largest_fall(INFECTED, PURIFIED) is None


def test_each_class_is_measured_and_the_worst_is_one_of_them(trained, digits_test):
    part = digits_test.select(torch.nonzero(digits_test.labels != 3).flatten())
    scores = evaluate(trained, part, Attack(trigger=triggers["badnets"]()))
    assert len(scores.class_acc) == 10
    assert scores.class_acc[3] is None
    known = {k: share for k, share in enumerate(scores.class_acc) if share is not None}
    assert scores.worst_class_acc == min(known.values())
    counts = torch.bincount(part.labels, minlength=10).tolist()
    assert sum(share * counts[k] for k, share in known.items()) / len(part) == pytest.approx(scores.acc)
