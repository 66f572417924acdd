"""Label-free scores against closed forms and other people's implementations."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

from upstep_fast.evaluation import label_free


def unit(num, width, seed=0):
    return F.normalize(torch.randn(num, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def rotation(width, seed=7):
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)).double())[0]


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_of_equal_directions_is_their_number(rank):
    x = torch.eye(8)[:rank].repeat(5, 1)
    assert label_free.effective_rank(x) == pytest.approx(rank, abs=1e-9)
    assert label_free.effective_rank(3 * x.double() @ rotation(8)) == pytest.approx(rank, abs=1e-9)


def test_effective_rank_of_unequal_directions():
    # singular values 3 and 1: shares 3/4 and 1/4
    x = torch.diag(torch.tensor([3.0, 1.0]))
    assert label_free.effective_rank(x) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_alignment_of_same_opposite_and_orthogonal_views():
    x = unit(20, 6)
    assert label_free.alignment(x, x) == 0
    assert label_free.alignment(x, -x) == pytest.approx(4, rel=1e-6)
    assert label_free.alignment(torch.eye(4), torch.eye(4).roll(1, 0)) == pytest.approx(2)


def test_uniformity_of_a_point_of_a_simplex_and_of_two_points():
    assert label_free.uniformity(unit(1, 5).repeat(9, 1)) == pytest.approx(0, abs=1e-6)
    # orthonormal: every squared distance is 2
    assert label_free.uniformity(torch.eye(6)) == pytest.approx(-4)
    # two opposite points: -2 * 4
    assert label_free.uniformity(torch.tensor([[1.0, 0], [-1.0, 0]])) == pytest.approx(-8)


def test_uniformity_is_the_mean_over_pairs():
    x = unit(30, 5).double()
    pairs = [math.exp(-2 * float((x[i] - x[j]).square().sum())) for i in range(30) for j in range(i)]
    assert label_free.uniformity(x) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-12)


def test_occupancy():
    assert label_free.occupancy(torch.arange(12) % 4, 4) == pytest.approx(1)
    assert label_free.occupancy(torch.zeros(12, dtype=torch.long), 4) == pytest.approx(1 / 4)
    assert label_free.occupancy(torch.arange(12) % 2, 4) == pytest.approx(2 / 4)


@pytest.mark.parametrize("seed", range(5))
def test_stability_matches_scikit_learns_adjusted_rand_index(seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(5, (80,), generator=generator)
    b = torch.where(torch.rand(80, generator=generator) < 0.5, a, torch.randint(7, (80,), generator=generator))
    assert label_free.stability(a, b) == pytest.approx(adjusted_rand_score(a, b), abs=1e-12)
    assert label_free.stability(a, (a + 2) % 5) == pytest.approx(1)
    assert label_free.stability(torch.zeros_like(a), torch.zeros_like(a)) == 1


def test_view_agreement_counts_both_directions():
    x = torch.eye(4)
    assert label_free.view_agreement(x, x) == 1
    assert label_free.view_agreement(x, x.roll(1, 0)) == 0
    # two images trade places: both of their views miss, in both directions
    assert label_free.view_agreement(x, x[[1, 0, 2, 3]]) == 0.5
    # x's views all find y's first; of y's, the first finds x's first (a tie goes to the first), the others find 0 too
    assert label_free.view_agreement(x[:1].repeat(4, 1), x) == pytest.approx((1 / 4 + 1 / 4) / 2)


def test_neighbor_overlap_matches_scikit_learn():
    x, y = unit(60, 8, 0), unit(60, 8, 1)
    y = F.normalize(x + 0.7 * y, dim=-1)
    near = [NearestNeighbors(n_neighbors=10).fit(z.numpy()).kneighbors(return_distance=False) for z in (x, y)]
    common = [len(set(a) & set(b)) / 10 for a, b in zip(*near, strict=True)]
    assert label_free.neighbor_overlap(x, y, 10) == pytest.approx(sum(common) / 60)
    assert label_free.neighbor_overlap(x, (x.double() @ rotation(8)), 10) == 1
    assert label_free.neighbor_overlap(x, y, 59) == 1


def test_linear_cka_is_the_centered_kernel_alignment_with_its_invariances():
    x, y = unit(40, 6, 0).double(), unit(40, 9, 1).double()
    centering = torch.eye(40).double() - 1 / 40
    kernels = [centering @ z @ z.T @ centering for z in (x, y)]
    expected = (kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm())
    assert label_free.linear_cka(x, y) == pytest.approx(float(expected), rel=1e-12)
    assert label_free.linear_cka(x, 3 * x @ rotation(6) + 5) == pytest.approx(1)
    assert label_free.linear_cka(x, torch.ones(40, 3)) == 0


def test_clusters_finds_well_separated_groups_from_any_start():
    groups = torch.arange(60) % 3
    x = F.normalize(torch.eye(3)[groups] + 0.05 * unit(60, 3), dim=-1)
    found = [label_free.clusters(x, 3, seed) for seed in range(8)]
    assert max(label_free.stability(a, groups) for a in found) == 1


def test_judge_of_the_base_itself_changes_nothing():
    views = torch.stack([unit(40, 8, 0), unit(40, 8, 1)])
    result = label_free.judge(views, views)
    assert result.pop("base_overlap") == 1
    assert result.pop("base_cka") == pytest.approx(1)
    assert set(result.values()) == {0.0}


def test_judge_separates_a_collapsed_model_from_a_consistent_one():
    x = unit(64, 16, 0)
    base = torch.stack([x, F.normalize(x + 0.8 * unit(64, 16, 1), dim=-1)])
    better = torch.stack([x, F.normalize(x + 0.1 * unit(64, 16, 1), dim=-1)])
    collapsed = F.normalize(torch.ones(2, 64, 16) + 0.01 * torch.randn(2, 64, 16), dim=-1)
    good, bad = label_free.judge(base, better), label_free.judge(base, collapsed)
    assert good["view_agreement"] > 0 and good["alignment"] < 0 and good["view_overlap"] > 0
    assert bad["effective_rank"] < -5 and bad["view_agreement"] < -0.3 and bad["uniformity"] > 1
    assert bad["base_overlap"] < 0.5 < good["base_overlap"]
    assert label_free.predicted_gain(bad) < 0 < label_free.predicted_gain(good)
    assert label_free.predicted_gain(bad) < label_free.CLEARLY_WORSE
    assert label_free.predicted_gain({"view_agreement": 0.03, "base_cka": 0.9}) == pytest.approx(3 - 1.5)


@pytest.mark.parametrize("num", [16, 64, 256])
def test_a_collapse_is_clearly_worse_and_small_changes_are_not(num):
    x, shift = unit(num, 64, 0), 0.5 * unit(num, 64, 1)
    base = torch.stack([x, F.normalize(x + shift, dim=-1)])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, num, 64, generator=generator)
    one_point = F.normalize(torch.ones(64) + 0.01 * noise, dim=-1)
    one_line = F.normalize(noise[..., :1] * torch.ones(64) + 0.01 * noise, dim=-1)
    nearly = F.normalize(base + 0.02 * noise, dim=-1)
    found = [label_free.predicted_gain(label_free.judge(base, z)) for z in (one_point, one_line, base, nearly)]
    assert [gain < label_free.CLEARLY_WORSE for gain in found] == [True, True, False, False]


def test_no_adapter_of_the_study_that_lost_nothing_is_clearly_worse():
    """The committed rows at every strength; the ones at four times the trained strength are those to refuse."""
    text = (Path(__file__).resolve().parents[2] / "bench" / "results" / "study_cpu2.jsonl").read_text()
    rows = [row for row in map(json.loads, text.splitlines()) if row["split"] == "select" and "error" not in row]
    found = [
        (
            at["adapted"]["knn"] - row["base"]["knn"],
            label_free.predicted_gain(at["judgement"]) < label_free.CLEARLY_WORSE,
        )
        for row in rows
        for at in row["at"].values()
    ]
    assert len(found) >= 88 and not any(is_worse for gain, is_worse in found if gain >= -3)
    far = [is_worse for gain, is_worse in found if gain < -6]
    assert sum(far) >= 0.6 * len(far) > 0
