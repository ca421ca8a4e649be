"""The device's part of a batch: what is done in which order, and that nothing else is."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from loaders.augment_ops import Op
from loaders.batch import HostBatch, SampleError, TokenLabelBatch
from loaders.crop_targets import CropTargets
from loaders.device import DeviceStage, Mix, Mixing, choose_mixing
from loaders.erasing import erased_tokens
from loaders.passes import _here, _on_cuda
from loaders.stats import LoaderStats
from loaders.warp import warp
from tests.loaders.batches import assert_same
from tests.loaders.hosts import augment, make_host
from tests.loaders.photos import NUM_CLASSES
from tokenlabels.losses import token_label_loss
from tokenlabels.mixing import MixPlan
from tokenlabels.sparse_targets import TokenTargets

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.3, 0.2)
MEAN_3, STD_3 = 255 * torch.tensor(MEAN), 255 * torch.tensor(STD)
GRID = (4, 4)
MIXES: tuple[Mix, ...] = get_args(Mix)


def stage_of(
    device: torch.device = CPU, *, maps: bool = True, mix: Mix | None = None, mixup_alpha: float = 0.0, **options: Any
) -> DeviceStage:
    targets = CropTargets(NUM_CLASSES, GRID, "logits", True, device) if maps else None
    mixing = None if mix is None else Mixing(mix, GRID, (32, 32), 1.0, 1.0, mixup_alpha)
    return DeviceStage(device, MEAN, STD, targets, mixing=mixing, **options)


def pixels_of(host: HostBatch) -> Tensor:
    """Grey levels, float32 [B, 3, H, W]."""
    return host.images.permute(0, 3, 1, 2).float()


def normalised(grey: Tensor) -> Tensor:
    return (grey - MEAN_3[:, None, None]) / STD_3[:, None, None]


def erasing(host: HostBatch) -> HostBatch:
    """Rows 0 and 2 lose a box: of row 0 exactly the upper left quarter of the tokens, of row 2 the middle."""
    host.erased = torch.zeros(len(host), 4, dtype=torch.int64)
    host.erased[0], host.erased[2] = torch.tensor([0, 0, 16, 16]), torch.tensor([6, 6, 26, 20])
    return host


def test_a_plain_batch_is_normalised_and_its_fields_are_those_of_the_host() -> None:
    host = make_host(5)
    batch = stage_of()(host)
    torch.testing.assert_close(batch.images, normalised(pixels_of(host)))
    assert batch.images.is_contiguous()
    assert batch.plan is None
    assert batch.keys == host.keys
    assert batch.labels.tolist() == host.labels.tolist()
    assert batch.flip.tolist() == host.flip.tolist()
    torch.testing.assert_close(batch.boxes, torch.from_numpy(host.boxes).float())


def test_the_order_is_colours_geometry_normalisation_erasing_mixing() -> None:
    """Step by step, by hand. Fill is not inverted, erased boxes are not warped, and both are mixed."""
    host = erasing(make_host(4))
    augment(host, dict.fromkeys((0, 1, 3), ((Op.INVERT, 0.0), (Op.TRANSLATE_X, 0.5))))
    batch = stage_of(mix="cutmix", erase_mode="const")(host)
    assert batch.plan is not None
    images = pixels_of(host)
    rows = torch.tensor([0, 1, 3])
    images[rows] = 255 - images[rows]
    images = warp(images, torch.from_numpy(host.warp).float(), MEAN_3, rows)
    images = normalised(images)
    images[0, :, 0:16, 0:16] = 0
    images[2, :, 6:20, 6:26] = 0
    torch.testing.assert_close(batch.images, batch.plan.mix(images), rtol=0, atol=1e-5)


def test_fill_is_exactly_the_mean_colour() -> None:
    host = make_host(3)
    augment(host, {1: ((Op.TRANSLATE_X, 0.5),)})
    images = stage_of()(host).images
    assert (images[1, :, :, 16:] == 0).all(), "0 is nothing to the first layer of a model"
    assert (images[1, :, :, :16] != 0).float().mean() > 0.9
    assert (images[[0, 2]] == normalised(pixels_of(host))[[0, 2]]).all()


@pytest.mark.parametrize("mix", [None, *MIXES])
def test_nothing_of_the_host_is_changed(mix: Mix | None) -> None:
    """The ring is the threads' memory, and the maps may be a slice of a window's."""
    host, untouched = (erasing(make_host(6, warped=(1, 2))) for _ in range(2))
    stage_of(mix=mix, ignore_erased=True)(host)
    assert host.maps is not None
    assert untouched.maps is not None
    assert torch.equal(host.images, untouched.images)
    for name in ("scores", "classes", "tail", "views"):
        assert (getattr(host.maps, name) == getattr(untouched.maps, name)).all(), name
    for name in ("boxes", "flip", "warp", "is_warped", "labels"):
        assert (getattr(host, name) == getattr(untouched, name)).all(), name


@pytest.mark.parametrize("mix", MIXES)
def test_every_kind_of_mixing(mix: Mix) -> None:
    """Pixels and targets by one plan; MixToken leaves the pixels to the model."""
    host = make_host(6)
    plain, mixed = stage_of()(host), stage_of(mix=mix)(host)
    assert mixed.plan is not None
    assert plain.targets is not None
    assert mixed.targets is not None
    assert mixed.plan.own.shape[1:] == {"cutmix": (32, 32), "mixup": (1, 1)}.get(mix, GRID)
    assert 0.05 < mixed.plan.share().mean() < 0.95
    expected = plain.images if mix == "mixtoken" else mixed.plan.mix(plain.images)
    assert torch.equal(mixed.images, expected)
    assert torch.equal(mixed.targets.dense(), mixed.plan.mix_targets(plain.targets).dense())
    assert mixed.labels.tolist() == host.labels.tolist(), "of the images themselves"


@pytest.mark.parametrize("mix", MIXES)
def test_random_numbers_come_from_the_contents(mix: Mix) -> None:
    """The same hash gives the same plan and noise, whatever was drawn before; another one others."""
    host, again, other = (erasing(make_host(6)) for _ in range(3))
    other.hash += 1
    stage = stage_of(mix=mix, erase_mode="pixel")
    first = stage(host)
    torch.rand(3)
    assert_same(stage(again), first)
    different = stage(other)
    assert first.plan is not None
    assert different.plan is not None
    assert not torch.equal(different.plan.own, first.plan.own)
    assert not torch.equal(different.images, first.images)


def mixed_by_hand(plan: MixPlan, dense: Tensor) -> Tensor:
    """Dense targets [B, 1 + N, K] of images of 32 x 32 pixels: every row by the pixels that it covers, one by one."""
    mixed = torch.empty_like(dense)
    for sample, partner in enumerate(plan.partner.tolist()):
        rows, columns = plan.own.shape[1:]
        pixels = plan.own[sample].repeat_interleave(32 // rows, dim=0).repeat_interleave(32 // columns, dim=1)
        shares = [pixels.mean()]
        for top in range(0, 32, 8):
            shares += [pixels[top : top + 8, left : left + 8].mean() for left in range(0, 32, 8)]
        for row, share in enumerate(shares):
            mixed[sample, row] = share * dense[sample, row] + (1 - share) * dense[partner, row]
    return mixed


def test_mixtoken_after_mixup() -> None:
    """MixUp of pixels and targets, then MixToken of targets; the model gets the plan of the latter."""
    host = make_host(6)
    plain, mixed = stage_of()(host), stage_of(mix="mixtoken", mixup_alpha=0.8)(host)
    generator = torch.Generator().manual_seed(host.hash)
    before = MixPlan.mixup(6, alpha=0.8, generator=generator)
    plan = MixPlan.mixtoken(6, grid=GRID, generator=generator)
    assert mixed.plan is not None
    assert plain.targets is not None
    assert mixed.targets is not None
    assert torch.equal(mixed.plan.own, plan.own)
    assert torch.equal(mixed.plan.partner, plan.partner)
    lam = before.own
    assert ((lam > 0) & (lam < 1)).all()
    expected = lam[..., None] * plain.images + (1 - lam[..., None]) * plain.images[before.partner]
    torch.testing.assert_close(mixed.images, expected)
    by_hand = mixed_by_hand(plan, mixed_by_hand(before, plain.targets.dense()))
    torch.testing.assert_close(mixed.targets.dense(), by_hand)
    other_way = mixed_by_hand(before, mixed_by_hand(plan, plain.targets.dense()))
    assert (by_hand - other_way).abs().max() > 0.01, "the order of the two does not show"


def test_cutmix_in_turns_with_mixup() -> None:
    """Pixels and targets by one plan, which is CutMix of some samples and MixUp of the others."""
    host = make_host(12)
    plain, mixed = stage_of()(host), stage_of(mix="cutmix", mixup_alpha=0.8)(host)
    plan = MixPlan.cutmix(12, image_size=32, mixup_alpha=0.8, generator=torch.Generator().manual_seed(host.hash))
    assert mixed.plan is not None
    assert plain.targets is not None
    assert mixed.targets is not None
    assert torch.equal(mixed.plan.own, plan.own)
    assert torch.equal(mixed.plan.partner, plan.partner)
    is_mixup = ((plan.own > 0) & (plan.own < 1)).flatten(1).all(dim=1)
    assert 2 < int(is_mixup.sum()) < 10
    torch.testing.assert_close(mixed.images, plan.mix(plain.images))
    torch.testing.assert_close(mixed.targets.dense(), mixed_by_hand(plan, plain.targets.dense()))


@pytest.mark.parametrize("mix", MIXES)
def test_without_mixup_alpha_nothing_more_is_drawn(mix: Mix) -> None:
    """The random numbers of batches stay those of the plan alone."""
    host = make_host(6)
    sizes: dict[str, Any] = {"mixup": {}, "cutmix": {"image_size": 32}}
    draw = {"random": MixPlan.random_patches}.get(mix) or getattr(MixPlan, mix)
    generator = torch.Generator().manual_seed(host.hash)
    expected = draw(6, alpha=1.0, generator=generator, **sizes.get(mix, {"grid": GRID}))
    plan = stage_of(mix=mix)(host).plan
    assert plan is not None
    assert torch.equal(plan.own, expected.own)
    assert torch.equal(plan.partner, expected.partner)


@pytest.mark.parametrize("mix", ["mixtoken", "cutmix"])
def test_mix_prob_is_of_mixup_too(mix: Mix) -> None:
    host = make_host(6)
    mixing = Mixing(mix, GRID, (32, 32), 1.0, 0.0, 0.8)
    batch, plain = DeviceStage(CPU, MEAN, STD, mixing=mixing)(host), stage_of()(host)
    assert batch.plan is not None
    assert (batch.plan.own == 1).all()
    assert torch.equal(batch.images, plain.images)


@pytest.mark.parametrize("mix", ["mixtoken", "cutmix"])
def test_mixup_works_without_targets(mix: Mix) -> None:
    host = make_host(6)
    with_targets, without = (
        stage_of(mix=mix, mixup_alpha=0.8)(host),
        stage_of(mix=mix, mixup_alpha=0.8, maps=False)(host),
    )
    assert without.targets is None
    assert torch.equal(without.images, with_targets.images)


def test_a_batch_of_one_cannot_be_mixed() -> None:
    assert choose_mixing(None, GRID, (32, 32), 1.0, 1.0, batch_size=1) is None
    assert choose_mixing("mixup", GRID, (32, 32), 1.0, 1.0, batch_size=2) == Mixing("mixup", GRID, (32, 32), 1.0, 1.0)
    with pytest.raises(ValueError, match="mix='mixup' needs another sample of the batch"):
        choose_mixing("mixup", GRID, (32, 32), 1.0, 1.0, batch_size=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5, 0.5)}, "mean must be three numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be three finite numbers above 0"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean must be three finite numbers"),
        ({"erase_mode": "rand"}, "erase_mode must be one of 'const', 'pixel'"),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"mean": MEAN, "std": STD, **options}
    with pytest.raises(ValueError, match=message):
        DeviceStage(CPU, **arguments)


@pytest.mark.parametrize(
    ("kind", "alpha", "prob", "message"),
    [
        ("both", 1.0, 1.0, "mix must be one of 'mixtoken'"),
        ("mixup", 0.0, 1.0, "mix_alpha must be a finite number above 0, got 0.0"),
        ("mixup", 1.0, 1.5, "mix_prob must be"),
    ],
)
def test_mixing_that_cannot_be_drawn_is_refused(kind: Any, alpha: float, prob: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixing(kind, GRID, (32, 32), alpha, prob)


def test_without_maps_targets_are_of_the_labels_or_there_are_none() -> None:
    host = make_host(5)
    assert stage_of(maps=False)(host).targets is None
    batch = stage_of(maps=False, num_classes=NUM_CLASSES, mix="mixup")(host)
    assert batch.targets is not None
    assert batch.plan is not None
    labels = torch.from_numpy(host.labels)
    expected = batch.plan.mix_targets(TokenTargets.from_labels(labels, NUM_CLASSES))
    assert torch.equal(batch.targets.dense(), expected.dense())


def test_erased_tokens_stay_in_the_loss_unless_asked() -> None:
    host, plain = erasing(make_host(4)), make_host(4)
    targets, expected = stage_of()(host).targets, stage_of()(plain).targets
    assert targets is not None
    assert expected is not None
    assert torch.equal(targets.dense(), expected.dense())
    assert targets.valid.all()


def test_erased_tokens_can_be_left_out_of_the_loss() -> None:
    host = erasing(make_host(4))
    targets, expected = stage_of(ignore_erased=True)(host).targets, stage_of()(host).targets
    assert targets is not None
    assert expected is not None
    assert host.erased is not None
    erased = erased_tokens(host.erased, (32, 32), GRID)
    assert erased[0].tolist() == [[row < 2 and column < 2 for column in range(4)] for row in range(4)]
    erased = erased.flatten(1)
    assert torch.equal(targets.valid[:, 1:], ~erased)
    assert targets.valid[:, 0].all(), "the image as a whole keeps its target"
    assert (targets.dense()[:, 1:][erased] == 0).all()
    assert torch.equal(targets.dense()[targets.valid], expected.dense()[targets.valid])

    logits = torch.randn(4, 16, NUM_CLASSES, generator=torch.Generator().manual_seed(0)).requires_grad_()
    image_logits = torch.zeros(4, NUM_CLASSES)
    loss = token_label_loss(image_logits, logits, targets, image_weight=0, dense_weight=1)
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert (logits.grad[erased] == 0).all()
    assert (logits.grad[~erased].abs().sum(dim=1) > 0).all()
    by_hand = -(expected.dense()[:, 1:] * logits.detach().log_softmax(2)).sum(dim=2)[~erased].mean()
    torch.testing.assert_close(loss.detach(), by_hand)


def test_a_row_mixed_with_an_erased_one_has_no_target() -> None:
    host = erasing(make_host(4))
    batch, alone = stage_of(ignore_erased=True, mix="mixup")(host), stage_of(ignore_erased=True)(host)
    assert batch.plan is not None
    assert batch.targets is not None
    assert alone.targets is not None
    both = alone.targets.valid & alone.targets.valid[batch.plan.partner]
    assert torch.equal(batch.targets.valid, both)
    assert 0 < both.float().mean() < 1


class Ring:
    """Hands out batches whose memory is overwritten as soon as it is given back."""

    def __init__(self, hosts: list[HostBatch], error: Exception | None = None, *, pinned: bool = False) -> None:
        self.hosts, self.error, self.pinned = hosts, error, pinned
        self.released: list[int] = []

    def __iter__(self) -> Iterator[HostBatch]:
        for number, host in enumerate(self.hosts):
            host.number = number
            host.images = host.images.pin_memory() if self.pinned else host.images.clone()
            yield host
        if self.error is not None:
            raise self.error

    def release(self, host: HostBatch) -> None:
        self.released.append(host.number)
        host.images.zero_()


def all_of(batches: Iterator[tuple[int, TokenLabelBatch]]) -> tuple[list[TokenLabelBatch], list[int], str]:
    """The batches, their numbers, and what the error after them says."""
    items: list[tuple[int, TokenLabelBatch]] = []
    message = ""
    try:
        for item in batches:
            items.append(item)
    except SampleError as error:
        message = str(error)
    return [batch for _, batch in items], [number for number, _ in items], message


def hosts_of(num: int) -> list[HostBatch]:
    return [erasing(make_host(6, seed=seed, warped=(1, 4))) for seed in range(num)]


@pytest.mark.parametrize("num", [0, 1, 2, 5])
def test_a_pass_hands_out_every_batch_and_then_the_error(num: int) -> None:
    ring, stage = Ring(hosts_of(num), SampleError("broken")), stage_of(mix="cutmix")
    batches, numbers, message = all_of(_here(ring, iter(ring), stage, LoaderStats()))  # type: ignore[arg-type]
    assert message == "broken"
    assert numbers == ring.released == list(range(num))
    for batch, host in zip(batches, hosts_of(num), strict=True):
        assert_same(batch, stage(host))


@pytest.mark.gpu
@pytest.mark.parametrize("mix", [None, *MIXES])
def test_cuda_gives_what_the_cpu_gives(cuda: torch.device, mix: Mix | None) -> None:
    """Random numbers of the two are not the same, so that mixing is compared with the plan of CUDA."""
    host = erasing(make_host(6, warped=(0, 3)))
    options: dict[str, Any] = {"erase_mode": "const", "ignore_erased": True}
    here, there = stage_of(**options)(host), stage_of(cuda, mix=mix, **options)(host)
    images, targets = here.images, here.targets
    assert targets is not None
    assert there.targets is not None
    if mix is not None:
        assert there.plan is not None
        plan = there.plan.to(CPU)
        images, targets = images if mix == "mixtoken" else plan.mix(images), plan.mix_targets(targets)
    torch.testing.assert_close(there.images.cpu(), images, rtol=0, atol=1e-3)
    torch.testing.assert_close(there.targets.dense().cpu(), targets.dense(), rtol=0, atol=5e-6)
    assert torch.equal(there.targets.valid.cpu(), targets.valid)


@pytest.mark.gpu
def test_mixtoken_after_mixup_on_cuda(cuda: torch.device) -> None:
    host = make_host(6)
    plain, mixed = stage_of(cuda)(host), stage_of(cuda, mix="mixtoken", mixup_alpha=0.8)(host)
    generator = torch.Generator(cuda).manual_seed(host.hash)
    before = MixPlan.mixup(6, alpha=0.8, generator=generator)
    plan = MixPlan.mixtoken(6, grid=GRID, generator=generator)
    assert plain.targets is not None
    assert mixed.targets is not None
    torch.testing.assert_close(mixed.images, before.mix(plain.images))
    by_hand = mixed_by_hand(plan.to(CPU), mixed_by_hand(before.to(CPU), plain.targets.dense().cpu()))
    torch.testing.assert_close(mixed.targets.dense().cpu(), by_hand)


@pytest.mark.gpu
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("num", [0, 1, 2, 3, 7])
def test_batches_ahead_on_cuda_are_those_one_by_one(cuda: torch.device, num: int, fails: bool) -> None:
    """In the same order, none after its memory was overwritten, and the error after the batch before it."""
    problem = SampleError("broken") if fails else None
    ring, stage = Ring(hosts_of(num), problem, pinned=True), stage_of(cuda, mix="cutmix")
    batches, numbers, message = all_of(_on_cuda(ring, iter(ring), stage, LoaderStats()))  # type: ignore[arg-type]
    assert message == ("broken" if fails else "")
    assert numbers == list(range(num))
    for batch, host in zip(batches, hosts_of(num), strict=True):
        assert_same(batch, stage(host))
