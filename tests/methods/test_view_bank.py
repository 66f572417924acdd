"""Views that serve in several epochs: which an epoch compares, what is computed once, and the runs that take them."""

import itertools
from collections import Counter

import pytest
import torch

import upstep_fast
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.flat import from_flat
from upstep_fast.data.loading.loader import Batch
from upstep_fast.data.views.make_views import random_views
from upstep_fast.errors import ConfigError
from upstep_fast.methods.upstep.upstep import UpStep
from upstep_fast.methods.view_bank import TokenBank, pair
from upstep_fast.model import backbone
from upstep_fast.runtime.device import resolve
from upstep_fast.train import cost
from upstep_fast.train.state import fresh_state

CPU = torch.device("cpu")


@pytest.mark.parametrize("uses", [2, 4, 6, 10])
def test_no_two_views_meet_twice_and_each_serves_as_often(uses):
    pairs = [pair(epoch, uses) for epoch in range(60)]
    assert pairs[0] == (0, 1) and len(set(pairs)) == 60 and all(first < second for first, second in pairs)
    served = Counter(itertools.chain(*pairs))
    latest = pairs[-1][0]
    assert {served[view] for view in range(uses // 2, latest)} == {uses}
    # a view that an epoch no longer compares does not come back: it can be forgotten
    assert [first for first, _ in pairs] == sorted(first for first, _ in pairs)
    assert max(second - first for first, second in pairs) == uses // 2


def test_tokens_are_computed_once_and_again_beyond_the_limit():
    computed = []

    def tokens_of(views):
        computed.append(len(views))
        return views[:, None].float()

    def tokens(bank, view, images):
        return bank.tokens(view, images, lambda at: torch.tensor([[100 * view + images[i]] for i in at]), CPU)[:, 0, 0]

    bank = TokenBank(tokens_of, 2, float("inf"))
    assert tokens(bank, 1, [4, 2]).tolist() == [104, 102] and computed == [2]
    assert tokens(bank, 1, [2, 9, 4, 8]).tolist() == [102, 109, 104, 108] and computed == [2, 2]
    assert tokens(bank, 1, [8, 9]).tolist() == [108, 109] and computed == [2, 2]
    assert tokens(bank, 3, [9]).tolist() == [309] and bank.size == 5 * 4
    bank._spare = lambda: 3
    assert [tokens(bank, 2, [5]).item() for _ in range(2)] == [205, 205] and computed[3:] == [1, 1]
    del computed[3:]
    bank._spare, bank.limit = lambda: 4, bank.size
    assert [tokens(bank, 0, [1]).item() for _ in range(2)] == [1, 1] and computed == [2, 2, 1, 1, 1]
    bank.forget_before(3)
    assert bank.size == 4 and tokens(bank, 3, [9]).tolist() == [309] and computed == [2, 2, 1, 1, 1]
    assert tokens(bank, 1, [4]).tolist() == [104] and computed[5:] == [1]


def state_of(options, **flags):
    flat = {name: value for name, value in options.items() if name != "prototypes"}
    config = from_flat(AdaptConfig, **flat | {"data": ("none",), "out": "none", "lora_blocks": 1} | flags)
    return fresh_state(config, resolve("cpu", "fp32", "auto"), backbone.load_from(config.model))


def batch_of(epoch, count=5):
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(256, (3, 40, 50), dtype=torch.uint8, generator=generator) for _ in range(count)]
    return Batch(images, torch.arange(10, 10 + count), epoch, 0)


def test_the_views_of_an_image_are_those_of_its_numbers_in_every_epoch(options):
    method = state_of(options, view_uses=4, implementation="reference").method
    assert method.bank is None
    batch, config = batch_of(0), method.view_configs[0][0]
    key = {"seed": method.config.runtime.seed, "epoch": 0, "indices": batch.indices}
    views = random_views(batch.images, config, **key, views=6)
    assert len(views.flatten(2).unique(dim=0)) == 6
    for epoch in (0, 1, 2, 5):
        expected = views[[*pair(epoch, 4)]]
        assert torch.equal(method.views(batch_of(epoch), CPU).pixels, expected)
    assert torch.equal(method.pictures(batch_of(3), CPU), views[0])


def test_tokens_of_the_bank_are_those_of_the_engine(options):
    own, plain = (state_of(options, view_uses=size).method for size in (4, 1))
    assert own.bank.frozen == 1 and plain.bank is None
    config = own.view_configs[0][0]
    for epoch in (0, 1, 2, 3):
        batch = batch_of(epoch)
        views = random_views(
            batch.images, config, seed=own.config.runtime.seed, epoch=0, indices=batch.indices, views=4
        )
        expected = plain.features(views[[*pair(epoch, 4)]].flatten(0, 1))
        got = own.features(own.views(batch, CPU).pixels.flatten(0, 1))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def counted(monkeypatch):
    """Count the views that pass the frozen blocks, by number of view and image."""
    passed, real = Counter(), TokenBank.tokens

    def tokens(self, view, images, make, device):
        def counting(positions):
            passed.update((view, images[at]) for at in positions)
            return make(positions)

        return real(self, view, images, counting, device)

    monkeypatch.setattr(TokenBank, "tokens", tokens)
    return passed


@pytest.mark.parametrize("extra", [{}, {"layout": "asymmetric"}, {"objective": "clustering", "gate": "ema"}], ids=str)
def test_the_frozen_blocks_see_each_view_once(options, monkeypatch, caplog, extra):
    if "objective" not in extra:
        del options["prototypes"]
    passed = counted(monkeypatch)
    with caplog.at_level("INFO", logger="upstep_fast"):
        upstep_fast.adapt(**options | extra | {"steps": 20}, lora_blocks=1, view_uses=4)
    assert max(passed.values()) == 1 and len({view for view, _ in passed}) > 2
    assert "each view serves in 4 epochs; what the first 1 blocks make of it is kept" in caplog.text


def test_nothing_is_kept_where_no_view_comes_twice(options, monkeypatch):
    del options["prototypes"]
    kept = []
    real = UpStep.views
    monkeypatch.setattr(UpStep, "views", lambda self, *args: (real(self, *args), kept.append(self.bank.size))[0])
    upstep_fast.adapt(**options | {"steps": 2}, lora_blocks=1, view_uses=4)
    assert kept and not any(kept)


def test_several_ranks_take_the_same_views_and_keep_nothing(options, monkeypatch):
    from upstep_fast.runtime import distributed

    alone = state_of(options, view_uses=4, implementation="reference").method.views(batch_of(1), CPU).pixels
    monkeypatch.setattr(distributed, "size", lambda: 2)
    method = state_of(options, view_uses=4).method
    assert method.bank is None
    views = method.views(batch_of(1), CPU)
    assert torch.equal(method.first_view(views), alone[0])


def test_what_a_bank_does_not_go_with(options):
    for flags, message in (
        ({"view_uses": 3}, "view_uses: got 3, must be 1 or an even number above 0"),
        ({"view_uses": 0}, "view_uses: got 0"),
        ({"view_uses": -2}, "view_uses: got -2"),
        ({"view_uses": 4, "local_views": 2, "objective": "clustering"}, "view_uses and local_views"),
        ({"view_uses": 4, "method": "diet"}, "view_uses: belongs to --method upstep"),
        ({"view_uses": 4, "method": "explora"}, "view_uses: belongs to --method upstep"),
    ):
        given = {name: options[name] for name in ("model", "data", "out")}
        with pytest.raises(ConfigError, match=message):
            upstep_fast.adapt(**given | flags)


def test_flops_count_the_frozen_blocks_once_a_view(options):
    config, images = state_of(options, view_uses=4, steps=320, batch_size=8).method.config, 16
    # 160 epochs: 320 views of each image are compared, 80 made, and one more
    assert cost.views_seen(config) == 320 * images and cost.views_made(config, images) == 81 * images
    model = backbone.load_from(config.model)
    plain, reused = cost.step_flops(config, model, 1000), cost.step_flops(config, model, 1000, images)
    # one of two blocks is frozen: 1.5 passes become 1, and half of one for each view that is made
    assert reused / plain == pytest.approx((1 + 0.5 * 81 / 320) / 1.5)
