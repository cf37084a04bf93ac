"""The choices of PBE, each against a slow loop or a case whose answer is known."""

import math

import pytest
import torch
from torch import nn

from unplant.detection.clusters import Split, outweighing, split_classes
from unplant.erasers.aft import AFTConfig
from unplant.erasers.examination import ExaminationConfig, cross_examine
from unplant.erasers.selection import (
    below,
    cosine_score,
    drop_score,
    least_suspicious,
    next_lesson,
    random_part,
    second_opinion,
    shared_suspicion,
    shown_instead,
)
from unplant.erasers.steps import fitting_eps
from unplant.erasers.verdict import findings, retrial
from unplant.images import LabeledImages

HALVES = torch.zeros(2, dtype=torch.bool)
"""No class may fall into more than two groups."""


@pytest.fixture
def outputs(generator):
    return torch.randn(2, 20, 5, generator=generator) * 3


def limits(split, *, longer=1, believed=False, **settings):
    """What is asked of a group: the defaults, but for what costs more trials."""
    config = ExaminationConfig(longer=longer, believed=believed, **settings)
    return {"many": torch.zeros(len(split.count), dtype=torch.bool), "config": config}


def nobody(count):
    """No group carries a trigger."""
    return torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)


def test_scores_equal_a_loop(outputs):
    before, after = outputs
    labels = torch.arange(20) % 5
    cosine, drop = cosine_score(before, after, labels), drop_score(before, after, labels)
    for i in range(20):
        a, b = before[i].tolist(), after[i].tolist()
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
        assert float(cosine[i]) == pytest.approx(1 - dot / lengths, abs=1e-5)
        chances = [math.exp(v[labels[i]]) / sum(math.exp(x) for x in v) for v in (a, b)]
        assert float(drop[i]) == pytest.approx(chances[0] - chances[1], abs=1e-5)


def test_what_groups_show_instead_equals_a_loop(outputs, generator):
    labels, group = torch.randint(5, (20,), generator=generator), torch.arange(20) % 4
    members = torch.rand(20, generator=generator) < 0.6
    members[group == 3] = False
    chances, expected = outputs[0].softmax(1).tolist(), []
    for number in range(4):
        places = [i for i in range(20) if members[i] and group[i] == number]
        best = sum(max(p for k, p in enumerate(chances[i]) if k != labels[i]) for i in places)
        missing = sum(1 - chances[i][labels[i]] for i in places)
        expected.append(best / missing if places else 0.0)
    assert shown_instead(outputs[0], labels, group, members, 4).tolist() == pytest.approx(expected, abs=1e-5)


def test_shared_suspicion_equals_a_loop(generator):
    score, labels = torch.rand(40, generator=generator), torch.randint(0, 4, (40,), generator=generator)
    left_out = (torch.rand(40, generator=generator) < 0.3) & (labels != 3)
    shared = shared_suspicion(score, labels, left_out)
    for i in range(40):
        mates = [j for j in range(40) if labels[j] == labels[i]]
        own = [float(score[j]) for j in mates if left_out[j] == left_out[i]]
        trusted = [float(score[j]) for j in mates if not left_out[j]]
        base = sum(trusted) / len(trusted)
        assert float(shared[i]) == pytest.approx((float(score[i]) + sum(own) / len(own)) / 2 - base, abs=1e-6)


def test_hard_images_and_hard_classes_are_less_suspicious_than_a_group_that_fell_together():
    score = torch.tensor([0.9, 0.0, 0.1, 0.0, 0.8, 0.9, 0.95, 0.9, 0.7, 0.6, 0.8, 0.7])
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    left_out = torch.tensor([False] * 4 + [True] * 4 + [False] * 4)
    shared = shared_suspicion(score, labels, left_out)
    fallen = shared[4:8].min()
    assert fallen > 0.45 > shared[0] > shared[8:].max()


def test_selections_take_the_least_suspicious_and_never_nothing():
    suspicion = torch.tensor([0.9, 0.1, 0.5, 0.3])
    assert least_suspicious(suspicion, 0.5).tolist() == [False, True, False, True]
    assert below(suspicion, 0.4).tolist() == [False, True, False, True]
    assert below(suspicion, 0.0).tolist() == [False, True, False, True]


def test_a_random_part_has_its_share_and_depends_on_the_generator():
    data = LabeledImages(torch.zeros(200, 1, 8, 8, dtype=torch.uint8), torch.zeros(200, dtype=torch.int64), ("a", "b"))
    parts = [random_part(data, 0.05, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert int(parts[0].sum()) == 10
    assert torch.equal(parts[0], parts[1])
    assert not torch.equal(parts[0], parts[2])


def test_second_opinion_never_repeats_the_label(outputs):
    labels = outputs[0].argmax(1)
    opinion, sure = second_opinion(outputs[0], labels, 0.5)
    assert (opinion != labels).all()
    assert not sure.any()  # the label itself has most of the probability
    others = (labels + 1) % 5
    opinion, sure = second_opinion(outputs[0], others, 0.5)
    assert torch.equal(opinion, labels)
    assert torch.equal(sure, outputs[0].softmax(1).max(1).values > 0.5)


def test_suspects_are_taught_under_new_labels_or_not_at_all():
    labels = torch.tensor([0, 0, 1, 1])
    extra = torch.tensor([True, False, True, False])
    suspects = torch.tensor([False, True, False, True])
    after = torch.tensor([[9.0, 0, 0], [0, 0, 9], [0, 9, 0], [1, 0, 1]])
    everyone = torch.ones(4, dtype=torch.bool)
    lesson = next_lesson(extra, suspects, after, labels, taught=everyone, sure_above=0.5)
    assert lesson.images.tolist() == [True, True, True, False]  # of the last one the model isn't sure
    assert lesson.labels.tolist()[:3] == [0, 2, 1]
    nobody = next_lesson(extra, suspects, after, labels, taught=~everyone, sure_above=0.5)
    assert torch.equal(nobody.images, extra)
    assert nobody.labels[extra].tolist() == labels[extra].tolist()


def test_witnesses_tell_how_much_of_the_backdoor_is_left():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    suspects = torch.tensor([1, 1, 1, 0, 1, 0, 1, 0, 0]).bool()
    left_out = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0, 0]).bool()
    witnesses = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1]).bool()
    purified = torch.eye(3)[torch.tensor([0, 1, 0, 0, 2, 1, 2, 2, 2])] * 9
    kin = torch.tensor([0, 0, 0, 0, 0, 1, 0, 0, 0]).bool()
    said = findings(suspects, left_out, witnesses, purified, labels, (0.9, 0.1), kin)
    assert said.infected
    assert said.targets == (0, 1)  # 2 has a suspect, but no group that fell
    assert said.flagged == (3, 2)  # kin is counted, too
    assert said.poisoning_rate == pytest.approx(6 / 9)
    assert said.witnesses == 3  # images 0, 1 and 4; kin isn't heard
    assert said.asr_left == pytest.approx(1 / 3)  # image 0 is still called 0
    assert 1 / 3 < said.asr_left_upper < 1


def test_a_class_is_cleared_if_its_suspects_get_their_label_all_the_same():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    suspects = torch.tensor([1, 1, 1, 1, 1, 1, 0]).bool()
    heard = torch.tensor([1, 1, 1, 1, 1, 0, 1]).bool()
    after = torch.eye(2)[torch.tensor([0, 0, 1, 1, 0, 1, 1])]
    cleared = retrial(suspects, heard, after, labels)  # 0: two of three; 1: one of two, the third wasn't heard
    assert cleared.tolist() == [False, False, False, True, True, True, False]
    assert torch.equal(retrial(suspects, ~suspects, after, labels), suspects)  # nobody heard, nobody cleared


def test_without_suspects_nothing_is_said_about_what_is_left():
    nobody = torch.zeros(4, dtype=torch.bool)
    said = findings(nobody, nobody, ~nobody, torch.rand(4, 2), torch.tensor([0, 1, 0, 1]), (None, None), nobody)
    assert not said.infected
    assert (said.targets, said.flagged, said.poisoning_rate, said.witnesses) == ((), (), 0, 0)
    assert said.asr_left is said.asr_left_upper is None


def clouds(generator, *, apart: float, sizes=(60, 40), dimensions=30):
    points = torch.randn(sum(sizes), dimensions, generator=generator)
    points[: sizes[0], :10] += apart
    return points


class TestClusters:
    def test_two_clouds_are_told_apart_and_one_is_left_whole(self, generator):
        two, one = clouds(generator, apart=6.0), clouds(generator, apart=0.0)
        noise = torch.randn(200, 30, generator=generator)
        labels = torch.tensor([0] * 100 + [1] * 100)
        split, *_ = split_classes([noise, torch.cat([two, one])], labels, HALVES, least_gain=0.125)
        assert split.group.tolist() == [0] * 60 + [1] * 40 + [0] * 100
        assert split.count.tolist() == [2, 1]
        assert split.minor_share.tolist() == pytest.approx([0.4, 0.0])
        assert split.gain[0] > 0.5 > split.gain[1]

    def test_a_class_that_outweighs_the_others_may_fall_into_more_than_two(self, generator):
        points = torch.randn(250, 30, generator=generator)
        points[100:180, :5] += 8
        points[180:, 5:10] += 8
        labels, many = torch.zeros(250, dtype=torch.int64), torch.tensor([True])
        split, *_ = split_classes([points], labels, many, least_gain=0.125)
        assert split.group.tolist() == [0] * 100 + [1] * 80 + [2] * 70
        assert split.count.tolist() == [3]
        assert split.minor_share.tolist() == pytest.approx([0.6])
        assert int(split_classes([points], labels, ~many, least_gain=0.125)[0].count) == 2

    def test_other_groups_at_other_depths_are_told_after_the_most_evident(self, generator):
        """Each class by itself: the first falls apart in three ways, one of them twice; the second in one."""
        labels = torch.tensor([0] * 100 + [1] * 100)
        first, second, third = (torch.randn(200, 30, generator=generator) for _ in range(3))
        first[:20, :10] += 8  # the same groups at two depths
        second[:20, :10] += 7
        second[100:150, :10] += 6
        third[50:100, :10] += 6
        splits = split_classes([third, first, second], labels, HALVES, least_gain=0.125)
        assert [split.count.tolist() for split in splits] == [[2, 2], [2, 1]]
        first_class = [split.group[:100].tolist() for split in splits]
        ways = [1] * 20 + [0] * 80, [0] * 50 + [1] * 50
        assert sorted(first_class) == sorted(ways) or sorted(first_class) == sorted([ways[0], [1] * 50 + [0] * 50])
        assert splits[0].gain[0] > splits[1].gain[0] > 0.125
        assert not splits[1].group[100:].any()
        assert splits[1].gain[1] == 0

    def test_third_groups_of_a_few_images_do_not_count(self, generator):
        points = torch.randn(225, 30, generator=generator)
        points[100:200, :5] += 8
        points[200:, 5:10] += 8
        split, *_ = split_classes([points], torch.zeros(225).long(), torch.tensor([True]), least_gain=0.125)
        assert split.count.tolist() == [2]

    def test_gain_is_half_the_difference_of_the_bic_per_image(self, generator):
        from sklearn.decomposition import PCA
        from sklearn.mixture import GaussianMixture

        points = clouds(generator, apart=6.0)
        split, *_ = split_classes([points], torch.zeros(100, dtype=torch.int64), HALVES[:1], least_gain=0.125)
        scaled = (points / points.std(0)).double().numpy()
        reduced = PCA(10, random_state=0).fit_transform(scaled)
        bic = [
            GaussianMixture(count, covariance_type="tied", n_init=4, random_state=0).fit(reduced).bic(reduced)
            for count in (1, 2)
        ]
        assert float(split.gain[0]) == pytest.approx((bic[0] - bic[1]) / 200, abs=1e-6)

    def test_small_classes_and_constant_features_are_left_whole(self, generator):
        few = clouds(generator, apart=6.0, sizes=(15, 15))
        split, *_ = split_classes([few], torch.zeros(30, dtype=torch.int64), HALVES, least_gain=0.125)
        assert not split.group.any()
        split, *_ = split_classes(
            [torch.ones(100, 5)], torch.zeros(100, dtype=torch.int64), HALVES[:1], least_gain=0.125
        )
        assert not split.group.any()


class Brightness(nn.Module):
    """Two classes by mean brightness, as a linear model: images flip at a known radius."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.first = nn.Linear(1, 2)  # two layers, so that there are features to look at
        self.last = nn.Linear(2, 2)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[1.0], [-1.0]]))
            self.first.bias.copy_(torch.tensor([-0.5, 0.5]))
            self.last.weight.copy_(scale * torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
            self.last.bias.zero_()

    def forward(self, pixels):
        return self.last(self.first(pixels.mean((1, 2, 3))[:, None]))


@pytest.mark.parametrize(("distance", "expected"), [(2, 6), (5, 12), (30, 16)], ids=str)
def test_the_ball_is_twice_the_radius_at_which_half_of_the_images_flip(distance, expected):
    """Brightness flips once each pixel moved by the distance; the next tried level above is 3, 6 or none."""
    levels = torch.tensor([127.5 - distance - 0.2, 127.5 + distance + 0.2]).round().to(torch.uint8)
    images = levels.repeat(20)[:, None, None, None].expand(40, 1, 8, 8).contiguous()
    data = LabeledImages(images, torch.arange(40) % 2, ("dark", "bright"))
    config = AFTConfig(pgd_steps=2, pgd_step_size=1.0)
    assert fitting_eps(Brightness(), data, config) * 255 == pytest.approx(expected)


@pytest.mark.parametrize("poison_is", ["smaller", "larger"])
def test_the_cross_examination_finds_the_poison_whichever_group_it_is(poison_is, generator):
    """A fake purification that behaves as measured: poison that was left out loses its label, clean images don't."""
    poison_count = 40 if poison_is == "smaller" else 60
    poisoned = torch.zeros(200, dtype=torch.bool)
    poisoned[:poison_count] = True
    labels = torch.tensor([0] * 100 + [1] * 100)
    layer = torch.randn(200, 12, generator=generator)
    layer[poisoned, :4] += 6
    sure = torch.full((200, 2), -3.0).scatter(1, labels[:, None], 3.0)
    taught = {}

    def purify(part, why, times):
        model = nn.Identity()
        taught[model] = part
        return model, sure if part[poisoned].any() else torch.where(poisoned[:, None], -sure, sure)

    split, *_ = split_classes([layer], labels, HALVES, least_gain=0.125)
    found = cross_examine(split, nobody(200), nn.Identity(), sure, labels, purify, **limits(split))
    assert torch.equal(found.left_out, poisoned)
    assert torch.equal(taught[found.start], ~poisoned)
    assert (found.score[poisoned] > 0.9).all()
    assert (found.score[~poisoned] == 0).all()


@pytest.mark.parametrize("poison", [{0, 1}, {0, 2}, {1, 2}, {1}, set()], ids=str)
def test_each_of_many_groups_is_judged_by_itself(poison):
    """Three groups of one class, as measured: the poison of one group teaches that of the others, never clean images.

    Clean images that no clean image of their class teaches lose a good half of their label, poison loses all; the first
    group loses its label even where it is kept, if it is poison (seen with SIG).
    """
    group, labels = torch.tensor([0] * 50 + [1] * 45 + [2] * 40 + [0] * 30), torch.tensor([0] * 135 + [1] * 30)
    poisoned = (labels == 0) & torch.isin(group, torch.tensor(sorted(poison), dtype=torch.int64))
    sure = torch.full((165, 2), -3.0).scatter(1, labels[:, None], 3.0)

    def purify(part, why, times):
        taught = part & (labels == 0)
        chance = torch.full((165,), 0.99)
        if not (taught & poisoned).any():
            chance[poisoned] = 0.01
        if not (taught & ~poisoned).any():
            chance[(labels == 0) & ~poisoned] = 0.4
        if 0 in poison and taught[group == 0].any():
            chance[(labels == 0) & poisoned] = 0.005
        return nn.Identity(), torch.stack([chance, 1 - chance], 1).log().where(labels[:, None] == 0, sure)

    split = Split(group, torch.ones(2), torch.tensor([3, 1]), torch.tensor([0.6, 0.0]))
    settings = limits(split) | {"many": torch.tensor([True, False])}
    found = cross_examine(split, nobody(165), nn.Identity(), sure, labels, purify, **settings)
    assert torch.equal(found.left_out, poisoned)
    assert float(found.fall[0]) > 0.9 if poison else float(found.fall[0]) < 0.1


@pytest.mark.parametrize(
    ("works_on", "kept", "stays_out", "by_right"),
    [("all classes", 1.0, True, True), ("one class", 0.8, True, False), ("one class", 0.95, False, False)],
)
def test_a_group_with_a_working_trigger_needs_no_trial(works_on, kept, stays_out, by_right, generator):
    """Clean-label poison: recognised by its content when left out, yet it stays out, under its own label.

    With a trigger for one class a fall is asked for, if a small one, and the label is taken for wrong.
    """
    poisoned = torch.arange(200) < 50
    labels = torch.tensor([0] * 100 + [1] * 100)
    layer = torch.randn(200, 12, generator=generator)
    layer[poisoned, :4] += 6
    sure = torch.full((200, 2), -30.0).scatter(1, labels[:, None], 30.0)
    calls = []

    def purify(part, why, times):
        calls.append(part)
        return nn.Identity(), torch.where(poisoned[:, None], torch.tensor([kept, 1 - kept]).log(), sure)

    split, *_ = split_classes([layer], labels, HALVES, least_gain=0.125)
    carrying = (labels == 0) & (split.group == split.group[0])
    none = torch.zeros_like(carrying)
    both = (carrying, none) if works_on == "all classes" else (none, carrying)
    found = cross_examine(split, both, nn.Identity(), sure, labels, purify, **limits(split))
    assert len(calls) == 1
    assert torch.equal(calls[0], ~poisoned)
    assert torch.equal(found.left_out, poisoned if stays_out else none)
    assert torch.equal(found.own_label, poisoned if by_right else none)


def test_a_natural_group_that_falls_a_little_is_trusted_again(generator):
    """A rare way to write a digit: two groups in the features, but left out it keeps most of its label."""
    rare = torch.zeros(100, dtype=torch.bool)
    rare[:20] = True
    labels = torch.zeros(100, dtype=torch.int64)
    layer = torch.randn(100, 12, generator=generator)
    layer[rare, :4] += 6

    def outputs(chance):
        return torch.tensor([[chance, 1 - chance]]).log().expand(100, 2)

    calls = []

    def purify(part, why, times):
        calls.append(part)
        return nn.Identity(), torch.where(rare[:, None], outputs(0.6), outputs(0.99))

    split, *_ = split_classes([layer], labels, HALVES, least_gain=0.125)  # no image has the last label
    found = cross_examine(
        split,
        nobody(100),
        nn.Identity(),
        outputs(0.99),
        labels,
        purify,
        **limits(split),
    )
    assert torch.equal(calls[0], ~rare)
    assert not found.left_out.any()
    assert found.fall.tolist() == pytest.approx([0.39 / 0.99, 0.0], abs=1e-5)
    assert float(found.score[rare].mean()) == pytest.approx(0.39, abs=1e-5)


@pytest.mark.parametrize(
    ("shows", "lost_later", "tried_again", "stays_out"),
    [
        ("a class that was hidden", 0.9, True, True),
        ("a class that was hidden", 0.3, True, False),
        ("what it did before", 0.9, False, False),
    ],
)
def test_a_group_whose_contents_come_to_light_is_tried_for_longer(shows, lost_later, tried_again, stays_out):
    """TaCT's poison on the digits, as measured: it loses a tenth of its label, but is seen for what it shows."""
    poisoned = torch.arange(100) < 20
    labels = torch.tensor([0] * 90 + [1] * 10)

    def outputs(label, other, third):
        return torch.tensor([[label, other, third]]).log().expand(100, 3)

    rest = torch.full((100, 3), 0.005).scatter(1, labels[:, None], 0.99).log()
    before = torch.where(poisoned[:, None], outputs(0.99, 0.003, 0.007), rest)
    calls, models = [], []

    def purify(part, why, times):
        calls.append((part, times))
        models.append(nn.Identity())
        lost = 0.1 if times == 1 else lost_later
        left = (0.01 + lost) * (0.8 if shows == "a class that was hidden" else 0.3)
        chances = outputs(0.99 - lost, left, 0.01 + lost - left)
        return models[-1], torch.where(poisoned[:, None], chances, rest)

    split = Split(poisoned.long(), torch.ones(3), torch.tensor([2, 1, 1]), torch.tensor([0.22, 0.0, 0.0]))
    found = cross_examine(split, nobody(100), nn.Identity(), before, labels, purify, **limits(split, longer=6))
    assert [times for _, times in calls] == ([1, 6] if tried_again else [1])
    assert all(torch.equal(part, ~poisoned) for part, _ in calls)
    assert torch.equal(found.left_out, poisoned if stays_out else nobody(100)[0])
    assert float(found.fall[0]) == pytest.approx((lost_later if tried_again else 0.1) / 0.99, abs=1e-5)
    if stays_out:
        assert found.start is models[-1]
    calls.clear()
    cross_examine(split, nobody(100), nn.Identity(), before, labels, purify, **limits(split, longer=1))
    assert len(calls) == 1


@pytest.mark.parametrize("later", [0.9, 0.27, 0.2, 0.1])
@pytest.mark.parametrize(
    ("classes", "convicted", "nearly", "tried_again"),
    [
        *[(2, 1, 0, False), (3, 2, 0, False), (4, 0, 0, False), (4, 2, 0, False), (4, 3, 0, True)],
        *[(12, 3, 0, False), (12, 4, 0, True)],
        *[(2, 0, 2, False), (3, 1, 2, True), (4, 0, 3, True), (4, 0, 2, False), (12, 0, 7, False), (12, 1, 7, True)],
    ],
)
def test_where_several_classes_are_convicted_half_a_longer_fall_convicts_others(
    classes, convicted, nearly, tried_again, later
):
    """Classes of 25 images, a group of 5 in each; the convicted fall by 0.8, others by 0.4 (nearly) or 0.19."""
    count = 25 * classes
    labels = torch.arange(classes).repeat_interleave(25)
    small = torch.arange(count) % 25 < 5
    mine, before_it = (nn.functional.one_hot(of, classes) for of in (labels, (labels - 1) % classes))
    others_get = before_it * 0.9 + (1 - mine) * 0.1 / (classes - 1)
    others_get = others_get / others_get.sum(1, keepdim=True)
    sure = mine * 0.99 + others_get * 0.01

    def outputs(fall):
        """Whose label is likelier falls, the others stay as likely beside each other: nothing comes to light."""
        chance = 0.99 * (1 - fall[:, None])
        return (mine * chance + others_get * (1 - chance)).log()

    calls = []

    def purify(part, why, times):
        calls.append(times)
        first = torch.where(labels < convicted, 0.8, torch.where(labels < convicted + nearly, 0.4, 0.19))
        fall = first if times == 1 else torch.full((count,), later)
        return nn.Identity(), outputs(torch.where(small, fall, 0.0))

    split = Split(small.long(), torch.ones(classes), torch.full((classes,), 2), torch.full((classes,), 0.2))
    found = cross_examine(split, nobody(count), nn.Identity(), sure.log(), labels, purify, **limits(split, longer=6))
    assert calls == ([1, 6] if tried_again else [1])
    others = list(range(convicted, classes))
    assert torch.equal(found.left_out, small & ((labels < convicted) | (tried_again and later > 0.25)))
    said = found.to_json(labels)
    assert said["longer"] == (others if tried_again else [])
    doubted = (others if later == 0.2 else []) if tried_again else others[:nearly]
    assert said["in_doubt"] == doubted, "0.7 of the half, or of its half"
    calls.clear()
    alone = limits(split, longer=6, several=False)
    found = cross_examine(split, nobody(count), nn.Identity(), sure.log(), labels, purify, **alone)
    assert calls == [1]
    assert torch.equal(found.left_out, small & (labels < convicted))


@pytest.mark.parametrize("later", [0.6, 0.45])
@pytest.mark.parametrize(
    ("witnesses", "agreed", "first", "tried_again"),
    [(5, 5, 0.4, True), (4, 4, 0.4, True), (3, 5, 0.4, False), (5, 3, 0.4, False), (5, 5, 0.04, False)],
)
def test_a_group_of_a_class_that_the_groups_of_others_name_is_tried_for_longer(
    witnesses, agreed, first, tried_again, later
):
    """Six classes of 25 images, a group of 5 in each. In five they are covers, which lose little and show class 0.

    So many of these groups do, with so many of their images; the rest of them shows the class before its own.
    """
    labels, place = torch.arange(6).repeat_interleave(25), torch.arange(150) % 25
    small = place < 5
    names = small & (labels > 0) & (labels <= witnesses) & (place < agreed)
    other = torch.where(names, 0, torch.where(labels > 1, labels - 1, labels + 1))
    mine, second = (nn.functional.one_hot(of, 6) for of in (labels, other))
    sure = mine * 0.96 + second * 0.036 + (1 - mine) * 0.001
    calls = []

    def purify(part, why, times):
        calls.append(times)
        poison = first if times == 1 else later
        fall = torch.where(small, torch.where(labels == 0, poison, 0.15), 0.0)[:, None]
        return nn.Identity(), (sure - fall * sure * mine + fall * 0.96 * second).log()

    split = Split(small.long(), torch.ones(6), torch.full((6,), 2), torch.full((6,), 0.2))
    found = cross_examine(split, nobody(150), nn.Identity(), sure.log(), labels, purify, **limits(split, longer=6))
    assert calls == ([1, 6] if tried_again else [1])
    assert found.to_json(labels)["named"] == ([0] if min(witnesses, agreed) >= 4 else [])
    assert torch.equal(found.left_out, small & (labels == 0) & (tried_again and later == 0.6))
    calls.clear()
    unheard = limits(split, longer=6, named=False)
    found = cross_examine(split, nobody(150), nn.Identity(), sure.log(), labels, purify, **unheard)
    assert calls == [1]
    assert not found.left_out.any()


@pytest.mark.parametrize("witnesses", [4, 2])
def test_covers_are_trusted_whatever_they_lose(witnesses):
    """Six classes of 25 images, groups of 5: poison in class 0, in the others images that lose as much.

    They show class 0 in so many classes; the class before their own in the others.
    """
    labels, small = torch.arange(6).repeat_interleave(25), torch.arange(150) % 25 < 5
    covers = small & (labels > 0) & (labels <= witnesses)
    other = torch.where(covers, 0, torch.where(labels > 1, labels - 1, labels + 1))
    mine, second = (nn.functional.one_hot(of, 6) for of in (labels, other))
    sure = mine * 0.96 + second * 0.036 + (1 - mine) * 0.001
    fall = torch.where(small, 0.8, 0.0)[:, None]
    given = (sure - fall * sure * mine + fall * 0.96 * second).log()
    split = Split(small.long(), torch.ones(6), torch.full((6,), 2), torch.full((6,), 0.2))
    found = cross_examine(
        split, nobody(150), nn.Identity(), sure.log(), labels, lambda *_: (nn.Identity(), given), **limits(split)
    )
    named = witnesses == 4
    assert torch.equal(found.covers, covers if named else nobody(150)[0])
    assert torch.equal(found.left_out, small & ~found.covers)
    assert (found.score[found.covers] == 0).all()
    assert not found.in_doubt.any()
    assert found.to_json(labels)["covers"] == ([0, 5, 5, 5, 5, 0] if named else [0] * 6)


@pytest.mark.parametrize(("witnesses", "forget", "right"), [(5, 0.3, True), (5, 0.45, False), (2, 0.3, False)], ids=str)
def test_covers_say_which_half_of_a_class_is_poison(witnesses, forget, right):
    """Class 0 is half poison, and loses less of its label than the clean half does, each where the other is taught.

    Covers in so many of the five other classes show class 0 by 0.5 while the poison is taught, else by `forget`.
    """
    labels, place = torch.arange(6).repeat_interleave(25), torch.arange(150) % 25
    small = place < torch.where(labels == 0, 12, 5)
    poisoned = ~small & (labels == 0)
    other = torch.where((labels > 0) & (labels <= witnesses), 0, torch.where(labels > 1, labels - 1, labels + 1))
    mine, second = (nn.functional.one_hot(of, 6) for of in (labels, other))
    sure = mine * 0.96 + second * 0.036 + (1 - mine) * 0.001

    def purify(part, why, times):
        taught = part[poisoned].any()
        lost = torch.where(poisoned, 0.0 if taught else 0.6, torch.where(labels == 0, 0.8 if taught else 0.0, 0.0))
        lost = torch.where(small & (labels > 0), 0.5 if taught else forget, lost)[:, None]
        return nn.Identity(), (sure - lost * sure * mine + lost * 0.96 * second).log()

    split = Split(small.long(), torch.ones(6), torch.full((6,), 2), torch.tensor([0.48] + [0.2] * 5))
    found = cross_examine(split, nobody(150), nn.Identity(), sure.log(), labels, purify, **limits(split))
    assert torch.equal(found.left_out & (labels == 0), poisoned if right else small & (labels == 0))


@pytest.mark.parametrize(("size", "alike"), [(10, True), (12, False)])
def test_a_group_that_is_a_far_larger_part_of_its_class_is_not_taken_for_more_of_the_same(size, alike):
    """Five classes of 25 images; groups of 5 are convicted in four, one of `size` in the fifth falls by 0.4."""
    labels, place = torch.arange(5).repeat_interleave(25), torch.arange(125) % 25
    small = place < torch.where(labels == 4, size, 5)
    mine, before_it = (nn.functional.one_hot(of, 5) for of in (labels, (labels - 1) % 5))
    sure = mine * 0.96 + before_it * 0.036 + (1 - mine) * 0.001
    calls = []

    def purify(part, why, times):
        calls.append(times)
        fall = torch.where(small, torch.where(labels < 4, 0.8, 0.4), 0.0)[:, None]
        return nn.Identity(), (sure - fall * sure * mine + fall * 0.96 * before_it).log()

    split = Split(small.long(), torch.ones(5), torch.full((5,), 2), torch.tensor([0.2] * 4 + [size / 25]))
    settings = limits(split, balanced=0.5, longer=6)
    found = cross_examine(split, nobody(125), nn.Identity(), sure.log(), labels, purify, **settings)
    assert calls == ([1, 6] if alike else [1])
    assert torch.equal(found.left_out, small & ((labels < 4) | alike))
    assert labels[found.in_doubt].unique().tolist() == ([] if alike else [4])


@pytest.mark.parametrize(
    ("chances", "trusted"),
    [
        ((0.2, 0.4, 0.2, 0.2), True),
        ((0.09, 0.43, 0.28, 0.2), True),
        ((0.2, 0.75, 0.03, 0.02), False),
        ((0.02, 0.47, 0.31, 0.2), False),
    ],
    ids=["a rare kind", "a rare kind that lost nine tenths", "shows another class", "lost all"],
)
@pytest.mark.parametrize(("carrying", "asked"), [(False, True), (True, True), (False, False)])
def test_a_group_that_turns_out_to_show_nothing_else_is_trusted_again(chances, trusted, carrying, asked):
    """A rare kind that a net knew by heart, as measured on the digits: it loses its label, and shows no other class."""
    labels, rare = torch.arange(4).repeat_interleave(25), torch.arange(100) < 5
    sure = torch.full((100, 4), 0.01).scatter(1, labels[:, None], 0.97)
    given = torch.where(rare[:, None], torch.tensor([chances]), sure).log()
    split = Split(rare.long(), torch.ones(4), torch.tensor([2, 1, 1, 1]), torch.tensor([0.2, 0.0, 0.0, 0.0]))
    none = torch.zeros(100, dtype=torch.bool)
    found = cross_examine(
        split,
        (none, rare & carrying),
        nn.Identity(),
        sure.log(),
        labels,
        lambda part, why, times: (nn.Identity(), given),
        **limits(split, shows=asked),
    )
    trusted = trusted and asked and not carrying
    assert torch.equal(found.left_out, none if trusted else rare)
    assert torch.equal(found.in_doubt, rare if trusted else none)
    assert (found.score[rare] == 0).all() == trusted, "what wasn't taught isn't suspect for being unlearnt"
    expected = max(chances[1:]) / (1 - chances[0]) / 0.97
    assert found.to_json(labels)["shows"][0] == pytest.approx(expected, abs=0.001)


@pytest.mark.parametrize(
    ("heeded", "kept", "carrying", "asked", "trusted"),
    [
        *[(2, 0.08, False, True, True), (3, 0.08, False, True, False), (2, 0.08, True, True, False)],
        *[(2, 0.005, False, True, False), (2, 0.08, False, False, False)],
    ],
    ids=["disobeyed", "obeyed", "carries a trigger", "lost all", "not asked"],
)
def test_a_group_that_the_infected_model_took_for_another_class_is_trusted_again(
    heeded, kept, carrying, asked, trusted
):
    """Hard images of a net that has learnt little, as of a transformer: no trigger made it say their label."""
    labels, hard = torch.arange(4).repeat_interleave(25), torch.arange(100) < 5
    said = torch.where(hard & (torch.arange(100) >= heeded), 1, labels)
    before = torch.full((100, 4), 0.2).scatter(1, said[:, None], 0.4)
    given = torch.where(hard[:, None], torch.tensor([[kept, 0.96 - kept, 0.02, 0.02]]), before)
    split = Split(hard.long(), torch.ones(4), torch.tensor([2, 1, 1, 1]), torch.tensor([0.2, 0.0, 0.0, 0.0]))
    none = torch.zeros(100, dtype=torch.bool)
    found = cross_examine(
        split,
        (none, hard & carrying),
        nn.Identity(),
        before.log(),
        labels,
        lambda part, why, times: (nn.Identity(), given.log()),
        **limits(split, heeded=asked),
    )
    assert torch.equal(found.left_out, none if trusted else hard)
    assert torch.equal(found.in_doubt, hard if trusted else none)
    assert (found.score[hard] == 0).all() == trusted


@pytest.mark.parametrize(("others", "several", "trusted"), [(2, True, True), (3, True, False), (3, False, True)])
def test_where_several_classes_are_convicted_nobody_is_asked_what_he_shows(others, several, trusted):
    """All-to-all poison: a group of a few images can show little by chance (0.79 of three, on the digits)."""
    labels, small = torch.arange(5).repeat_interleave(20), torch.arange(100) % 20 < 4
    sure = torch.full((100, 5), 0.009).scatter(1, labels[:, None], 0.96).scatter(1, (labels[:, None] + 1) % 5, 0.013)
    clear = torch.full((100, 5), 0.02).scatter(1, labels[:, None], 0.2).scatter(1, (labels[:, None] - 1) % 5, 0.74)
    unclear = torch.full((100, 5), 0.2)
    given = torch.where((labels < others)[:, None], clear, torch.where((labels == 4)[:, None], unclear, sure))
    given = torch.where(small[:, None], given, sure).log()
    split = Split(small.long(), torch.ones(5), torch.full((5,), 2), torch.full((5,), 0.2))

    def purify(part, why, times):
        return nn.Identity(), given

    found = cross_examine(
        split, nobody(100), nn.Identity(), sure.log(), labels, purify, **limits(split, several=several)
    )
    assert torch.equal(found.left_out, small & ((labels < others) | ((labels == 4) & (not trusted))))
    assert torch.equal(found.in_doubt, small & (labels == 4) & trusted)


def test_a_group_that_stands_far_apart_is_in_doubt_even_if_it_keeps_its_label():
    """A strong blend on the digits outlasts the trials: it isn't convicted, but the report names its class."""
    labels, small = torch.arange(3).repeat_interleave(20), torch.arange(60) % 20 < 5
    sure = torch.full((60, 3), 0.01).scatter(1, labels[:, None], 0.98).log()
    split = Split(small.long(), torch.tensor([1.2, 1.4, 2.0]), torch.tensor([2, 2, 2]), torch.full((3,), 0.25))
    convicted = torch.where((small & (labels == 2))[:, None], torch.tensor([[0.95, 0.03, 0.02]]).log(), sure)
    found = cross_examine(
        split,
        nobody(60),
        nn.Identity(),
        sure,
        labels,
        lambda part, why, times: (nn.Identity(), convicted),
        **limits(split),
    )
    assert torch.equal(found.in_doubt, small & (labels == 1)), "not what is near its class, nor what is convicted"
    assert torch.equal(found.left_out, small & (labels == 2))


@pytest.mark.parametrize("share_believed", [0.3, 0.01])
def test_trials_are_taught_only_what_the_infected_model_gives_its_label(share_believed):
    """Unless that is next to nothing; which images are tried doesn't change."""
    labels, small = torch.zeros(100, dtype=torch.int64), torch.arange(100) < 20
    believed = torch.arange(100) >= 100 * (1 - share_believed)
    before = torch.where(believed[:, None], torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.9])).log()
    taught = []

    def purify(part, why, times):
        taught.append(part)
        return nn.Identity(), before

    split = Split(small.long(), torch.ones(2), torch.tensor([2, 1]), torch.tensor([0.2, 0.0]))
    for asked in (False, True):
        cross_examine(split, nobody(100), nn.Identity(), before, labels, purify, **limits(split, believed=asked))
    assert torch.equal(taught[0], ~small)
    assert torch.equal(taught[1], ~small & believed if share_believed == 0.3 else ~small)


def test_what_outweighs_the_others_has_times_the_images_of_the_median_class():
    labels = torch.tensor([0] * 30 + [1] * 9 + [2] * 10 + [3] * 11 + [4] * 10)
    assert outweighing(labels, 5, 3.0).tolist() == [True, False, False, False, False]
    assert not outweighing(labels, 5, 3.1).any()
    assert outweighing(labels, 9, 3.0).tolist() == [True] + [False] * 8, (
        "classes without images don't make others heavy"
    )


def test_which_groups_are_tried():
    """Class 0 outweighs and has three groups, class 1 two alike, class 2 a small one, class 3 one; nothing is lost."""
    labels = torch.arange(5).repeat_interleave(torch.tensor([30, 10, 10, 10, 10]))
    group = torch.cat([torch.arange(30) % 3, torch.arange(10) % 2, torch.arange(10) // 9, torch.zeros(20).long()])
    split = Split(
        group, torch.ones(5), torch.tensor([3, 2, 2, 1, 1]), torch.tensor([2 / 3, 0.5, 0.1, 0.0, 0.0])
    )  # fmt: skip
    many, out = torch.tensor([True] + [False] * 4), torch.full((70, 5), 0.0)
    tried = []

    def purify(part, why, times):
        kept = [sorted(set(group[part & (labels == label)].tolist())) for label in range(3)]
        tried.append(kept)
        return nn.Identity(), out

    settings = limits(split) | {"many": many}
    found = cross_examine(split, nobody(70), nn.Identity(), out, labels, purify, **settings)
    assert tried == [[[0], [0], [0]], [[0], [1], [0]], [[1], [0], [0]], [[2], [0], [0]]]
    assert not found.left_out.any()
