"""LoSA: the side network against plain float64, saved memory, gradients, initialization, other input sizes."""

import copy

import pytest
import timm
import torch
from references import losa as reference

from upstep_fast.engine import vit as engine
from upstep_fast.methods.supervised.baselines import Baseline
from upstep_fast.methods.supervised.losa import Losa, LosaSpec, SideNetwork, make_stream, stream_plain
from upstep_fast.model import backbone as backbones
from upstep_fast.model import pooling

AXES = {"channel": -1, "token": -2, "space": -2, "time": -3}
FORMS = [
    LosaSpec(rank=3, token_rank=2),
    LosaSpec(rank=3, token_rank=2, order="token", learn_scale=True),
    LosaSpec(rank=3, token_rank=2, combine="replace"),
    LosaSpec(rank=3, token_rank=2, combine="gated", learn_scale=True),
    LosaSpec(rank=4, token_rank=0, every=2),
]


def randomize(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.4 + (p.dim() == 0)


def side_network(spec, frames=1, dtype=torch.float64, tokens=5, width=8, depth=4):
    side = SideNetwork(spec, depth=depth, width=width, tokens=tokens, frames=frames).to(dtype)
    randomize(side)
    return side


def by_reference(side, taps):
    """The same network from helpers/references/losa.py; taps [K, B T, N, D]."""
    shape = taps.shape[1:]
    if side.frames > 1:
        taps = taps.unflatten(1, (-1, side.frames))
    adaptors = [
        [(AXES[axis], (m.down, m.down_bias, m.up, m.up_bias)) for axis, m in adaptor.mixers.items()]
        for adaptor in side.adaptors
    ]
    z = reference.refine(
        list(taps),
        adaptors,
        combine=side.spec.combine,
        gates=[adaptor.gate for adaptor in side.adaptors],
        scales=[adaptor.scale for adaptor in side.adaptors] if side.spec.learn_scale else (),
        start=side.positions,
    )
    return z.reshape(shape)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("spec", FORMS)
def test_forward_and_gradient_against_the_formula(spec, frames):
    side = side_network(spec, frames)
    torch.manual_seed(1)
    taps = torch.randn(len(side.taps), 2 * frames, 5, 8, dtype=torch.float64)
    weights = torch.randn(taps.shape[1:], dtype=torch.float64)
    ours, theirs = side(taps), by_reference(side, taps)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    names = [name for name, _ in side.named_parameters()]
    ours, theirs = (torch.autograd.grad((z * weights).sum(), list(side.parameters())) for z in (ours, theirs))
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def kept_bytes(run):
    """Bytes that `run` keeps for backward, each memory once, parameters left out."""
    found = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(found.values()), result


@pytest.mark.parametrize("spec", FORMS)
def test_saved_tensors_are_16_bit_inputs_and_low_rank_values(spec):
    side = side_network(spec, dtype=torch.float32, tokens=17, width=64)
    taps = torch.randn(len(side.taps), 4, 17, 64, dtype=torch.bfloat16)
    kept, _ = kept_bytes(lambda: side(taps))
    wide = 2 if spec.combine == "gated" else 1
    per_token = 2 * (64 * wide + spec.rank + spec.token_rank * 64 / 17)
    assert kept <= len(side.taps) * 4 * 17 * per_token
    # an ordinary writing of it keeps several times as much
    plain, _ = kept_bytes(lambda: by_reference(side.bfloat16(), taps))
    assert plain > (3 if spec.token_rank else 1.5) * kept


@pytest.fixture
def tiny(model):
    return backbones.load(model)


def images(n=3, size=32, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backbone_gets_no_gradient_and_is_not_changed(tiny, dtype):
    before = copy.deepcopy(tiny.vit.state_dict())
    net = Losa(tiny, LosaSpec(rank=2, token_rank=2), classes=4).train()
    net.accelerate(dtype)
    randomize(net.side)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    for _ in range(2):
        torch.nn.functional.cross_entropy(net(images()), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
    assert all(p.grad is None for p in net.vit.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in [*net.side.parameters(), *net.head.parameters()])
    assert all(torch.equal(value, before[name]) for name, value in net.vit.state_dict().items())


def test_no_activation_of_the_backbone_is_saved(tiny):
    net = Losa(tiny, LosaSpec(rank=2, token_rank=2), classes=4).train()
    net.accelerate(torch.bfloat16)
    kept, _ = kept_bytes(lambda: net(images(8)))
    tokens, width, blocks = 17, 48, 2
    per_token = 2 * (width + 2 + 2 * width / tokens)
    tail = 8 * 4 * (3 * width + 16)  # the class token's norm and the head, fp32
    assert kept <= 8 * tokens * per_token * blocks + tail


def test_saved_memory_is_a_fraction_of_loras(model):
    def of(net):
        net.train().accelerate(torch.bfloat16)
        return kept_bytes(lambda: net(images(8)))[0]

    lora = Baseline(backbones.load(model), "lora", 4)
    losa = Losa(backbones.load(model), LosaSpec(rank=2, token_rank=2), classes=4)
    assert of(losa) < 0.25 * of(lora)


@pytest.mark.parametrize("spec", FORMS)
def test_initial_output_is_the_backbones(tiny, spec):
    net = Losa(tiny, spec, classes=4)
    x = images()
    want = net.head(pooling.features(tiny.vit, x))
    torch.testing.assert_close(net(x), want, rtol=1e-5, atol=1e-5)
    net.accelerate(torch.float32)
    torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("token_rank", [0, 2])
def test_tokens_interact_in_token_mixers_only(token_rank):
    side = side_network(LosaSpec(rank=3, token_rank=token_rank))
    taps = torch.randn(4, 2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    changed = taps.clone()
    changed[:, :, 1, 0] += 1
    difference = (side(taps) - side(changed)).abs().amax((0, 2))  # of each token
    others = difference[[0, 2, 3, 4]]
    assert difference[1] > 0
    assert (others > 1e-6).all() if token_rank else (others == 0).all()


def test_frames_interact_in_time_mixers_only():
    spec = LosaSpec(rank=3, token_rank=2)
    side = side_network(spec, frames=3)
    taps = torch.randn(4, 6, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    changed = taps.clone()
    changed[:, 1, :, 0] += 1  # the second frame of the first clip
    difference = (side(taps) - side(changed)).abs().amax((1, 2))
    assert (difference[:3] > 1e-6).all() and (difference[3:] == 0).all()
    for adaptor in side.adaptors:
        for p in adaptor.mixers["time"].parameters():
            p.data.zero_()
    difference = (side(taps) - side(changed)).abs().amax((1, 2))
    assert difference[1] > 1e-6 and (difference[[0, 2, 3, 4, 5]] == 0).all()


def test_every_kth_block_is_counted_from_the_last():
    assert LosaSpec(every=1).taps(4) == (0, 1, 2, 3)
    assert LosaSpec(every=3).taps(12) == (2, 5, 8, 11)
    assert LosaSpec(every=5).taps(12) == (1, 6, 11)
    assert LosaSpec(every=50).taps(12) == (11,)


@pytest.mark.parametrize(("rank", "millions"), [(4, 0.093), (8, 0.185), (16, 0.371)])
def test_parameters_of_vit_b(rank, millions):
    side = SideNetwork(LosaSpec(rank=rank, token_rank=rank), depth=12, width=768, tokens=197)
    matrices = sum(p.numel() for p in side.parameters() if p.dim() == 2)
    assert matrices == 12 * 2 * rank * (768 + 197)  # METHODS 3.2
    assert matrices / 1e6 == pytest.approx(millions, abs=5e-4)
    biases = sum(p.numel() for p in side.parameters() if p.dim() == 1)
    assert biases == 12 * (2 * rank + 768 + 197)


def test_stored_activations_give_the_output_of_images(tiny):
    net = Losa(tiny, LosaSpec(rank=2, token_rank=2, every=2), classes=4)
    net.accelerate(torch.float32)
    randomize(net.side)
    x = images(4)
    frozen = net.frozen(x)
    assert frozen.shape == (4, 1, 1, 17, 48) and not frozen.requires_grad
    assert torch.equal(net.logits_of(frozen), net(x))


def test_clips_are_frames_of_a_batch(tiny):
    net = Losa(tiny, LosaSpec(rank=2, token_rank=2), classes=4, frames=3)
    clips = images(6).unflatten(0, (2, 3))
    start = net(clips)
    torch.testing.assert_close(start, net.head(pooling.features(tiny.vit, images(6)).unflatten(0, (2, 3)).mean(1)))
    randomize(net.side)
    assert net.frozen(clips).shape == (2, 3, 2, 17, 48)
    torch.testing.assert_close(net.logits_of(net.frozen(clips)), net(clips))
    # the order of the frames matters, and that of the clips does not
    assert (net(clips.flip(1)) - net(clips)).abs().max() > 1e-4
    torch.testing.assert_close(net(clips.flip(0)), net(clips).flip(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engine_and_plain_model_stream_equal_activations(tiny, dtype):
    x, found = images(), {"engine": [], "plain": []}
    with torch.no_grad():
        make_stream(tiny.vit, dtype)(x, lambda i, b: found["engine"].append((i, b)))
        stream_plain(tiny.vit, dtype, x, lambda i, b: found["plain"].append((i, b)))
    assert [i for i, _ in found["engine"]] == [i for i, _ in found["plain"]] == [0, 1]
    for (_, ours), (_, theirs) in zip(found["engine"], found["plain"], strict=True):
        assert ours.dtype == theirs.dtype == dtype
        error = (ours - theirs).float().norm() / theirs.float().norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_frozen_weights_in_fp8(tiny):
    x, found = images(), {}
    with torch.no_grad():
        for fp8 in (False, True):
            make_stream(tiny.vit, torch.bfloat16, fp8)(x, lambda i, b, fp8=fp8: found.setdefault((fp8, i), b.float()))
    error = (found[True, 1] - found[False, 1]).norm() / found[False, 1].norm()
    assert 1e-4 < error < 0.1  # other numbers, and close
    net = Losa(tiny, LosaSpec(rank=2, token_rank=2), classes=4).train()
    net.accelerate(torch.bfloat16, fp8=True)
    randomize(net.side)
    net(x).sum().backward()
    assert all(p.grad is None for p in net.vit.parameters()) and all(p.grad is not None for p in net.side.parameters())


@pytest.mark.parametrize(
    ("arch", "runs"), [("vit_small_patch16_rope_mixed_224", False), ("vit_small_patch16_dinov3", True)]
)
def test_rotary_models_train_with_and_without_the_engine(arch, runs, caplog):
    vit = timm.create_model(arch, img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    vit.eval().requires_grad_(False)
    assert (engine.unsupported_reason(vit) is None) is runs
    one = backbones.Backbone(vit, "eva", 48, (32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
    net = Losa(one, LosaSpec(rank=2, token_rank=2), classes=3)
    with caplog.at_level("WARNING", "upstep_fast"):
        net.accelerate(torch.float32)
    assert ("plain model" in caplog.text) is not runs
    torch.testing.assert_close(net(images(2, 32)), net.head(pooling.features(vit, images(2, 32))))
    randomize(net.side)
    net(images(2, 32)).sum().backward()
    assert all(p.grad is None for p in vit.parameters())
    assert all(p.grad is not None for p in net.side.parameters())


def test_another_grid_is_interpolated_and_logged(caplog):
    side = side_network(LosaSpec(rank=3, token_rank=2), dtype=torch.float32, tokens=17, depth=1)
    torch.manual_seed(1)
    own, patch = torch.randn(8), torch.randn(8)

    def grid(patches):  # a picture without structure, and a class token
        return torch.stack([own, *[patch] * patches]).view(1, 1, 1 + patches, 8)

    want = side(grid(16))[0, 0]
    with caplog.at_level("WARNING", "upstep_fast"):
        side.resample((4, 4), (4, 4), 1)
        assert not caplog.text
        side.resample((4, 4), (8, 6), 1)
    assert "4 x 4 patches and is interpolated to 8 x 6" in caplog.text
    assert side.tokens == 49 and side.adaptors[0].mixers["token"].up.shape == (49, 2)
    # such a picture is the same at every size
    torch.testing.assert_close(side(grid(48))[0, 0], want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="17 tokens, but tokens are mixed for 49"):
        side(grid(16))


def test_a_short_run_learns(tiny):
    net = Losa(tiny, LosaSpec(rank=4, token_rank=4), classes=4).train()
    net.accelerate(torch.float32)
    x, y = images(16), torch.arange(16) % 4
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("spec", FORMS)
def test_bf16_on_a_gpu_against_the_formula(spec, frames):
    side = SideNetwork(spec, depth=4, width=192, tokens=65, frames=frames)
    randomize(side)
    taps = torch.randn(len(side.taps), 2 * frames, 65, 192, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(taps.shape[1:], generator=torch.Generator().manual_seed(2))
    theirs = copy.deepcopy(side).double()
    z = by_reference(theirs, taps.double())
    want = [z, *torch.autograd.grad((z * weights).sum(), list(theirs.parameters()))]
    side.cuda()
    z = side(taps.cuda().bfloat16())
    got = [z, *torch.autograd.grad((z.float() * weights.cuda()).sum(), list(side.parameters()))]
    for a, b in zip(got, want, strict=True):
        assert (a.cpu().double() - b).norm() <= 3e-2 * b.norm() + 1e-6
