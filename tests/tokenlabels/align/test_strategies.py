"""Mixing strategies (TL-Align, Table 7) and the ablations of Table 8: what is true of shares whatever the model."""

import pytest
import torch
from torch import Tensor, nn

from tests.tokenlabels.align.cases import (
    CASES,
    NUM_CLASSES,
    NUM_IMAGES,
    ONE_OF_EACH,
    STRATEGIES,
    build,
    images_of,
    mixed,
    seeded,
)
from tests.tokenlabels.align.twins import Twin, move, norm, prefix_labels
from tokenlabels.align import TLAlign
from tokenlabels.align.families import find_family, on_grid
from tokenlabels.align.rules import Alignment
from tokenlabels.mixing import MixPlan


@torch.no_grad()
def shares_of(case: str, plan: MixPlan, **options: object) -> tuple[Tensor, Tensor]:
    """Of images and of tokens."""
    model = TLAlign(build(case), **options)
    share, tokens = model(plan.mix(images_of(case)), plan, return_token_share=True)[1:]
    return share, tokens


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", ["vit", "swin", "pvt", "mixer"])
def test_exchanged_roles_leave_the_rest(case: str, strategy: str) -> None:
    """What is not the own image's is the partner's: seen from it, of the same mixed image."""
    plan = STRATEGIES[strategy](CASES[case][1])
    images = plan.mix(images_of(case))
    exchanged = MixPlan(plan.partner, 1 - plan.own)
    model = TLAlign(build(case))
    with torch.no_grad():
        _, *ours = model(images, plan, return_token_share=True)
        _, *theirs = model(images, exchanged, return_token_share=True)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left + right, torch.ones_like(left), rtol=0, atol=2e-6)
    assert ((ours[0] > 0.001) & (ours[0] < 0.999)).any()


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_mixup_has_its_share_everywhere(case: str) -> None:
    plan = MixPlan.mixup(NUM_IMAGES, generator=seeded())
    share, tokens = shares_of(case, plan)
    torch.testing.assert_close(share, plan.share(), rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens, plan.share()[:, None].expand_as(tokens), rtol=0, atol=1e-6)


@pytest.mark.parametrize("own", [0.0, 1.0])
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_a_whole_image_stays_one(case: str, own: float) -> None:
    plan = MixPlan(torch.tensor([1, 2, 3, 0]), torch.full((NUM_IMAGES, 1, 1), own))
    share, tokens = shares_of(case, plan)
    torch.testing.assert_close(share, torch.full_like(share, own), rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens, torch.full_like(tokens, own), rtol=0, atol=1e-6)


def test_each_sample_has_its_own_strategy() -> None:
    """Labels of one sample do not depend on how another one is mixed."""
    plan = STRATEGIES["both"](CASES["vit"][1])
    is_mixup = plan.own.flatten(1).amin(dim=1) == plan.own.flatten(1).amax(dim=1)
    assert is_mixup.any()
    assert not is_mixup.all()
    images = plan.mix(images_of("vit"))
    model = TLAlign(build("vit"))
    with torch.no_grad():
        share = model(images, plan)[1]
        own = plan.own.clone()
        own[1:] = 1 - own[1:]
        changed = model(images, MixPlan(plan.partner, own))[1]
    torch.testing.assert_close(changed[0], share[0])
    torch.testing.assert_close(share[is_mixup], plan.share()[is_mixup], rtol=0, atol=1e-6)
    assert (share - plan.share())[~is_mixup].abs().max() > 0.005


def test_other_layers_give_other_shares() -> None:
    images, plan = mixed("vit")
    with torch.no_grad():
        by_layers = {layers: TLAlign(build("vit"), layers=layers)(images, plan)[1] for layers in [(0,), (1,), (0, 1)]}
    assert len({tuple(share.tolist()) for share in by_layers.values()}) == 3


@pytest.mark.parametrize("layers", [(-1,), (1,), (0, 2), (0, 1, 2), (-3, 0), None])
@pytest.mark.parametrize("normalize", [True, False])
@torch.no_grad()
def test_layers_and_normalization_of_table_8(layers: tuple[int, ...] | None, normalize: bool) -> None:
    """Against the twin's matrices: left out layers move nothing, and without Norm the residual is left out."""
    images, plan = mixed("vit")
    model = build("vit")
    y = nn.functional.one_hot(torch.tensor([2, 5, 0, 3]), NUM_CLASSES).double()
    twin = Twin(model, images, plan.own, plan.partner, y)
    labels = torch.cat([prefix_labels(plan.own, plan.partner, y, 1), twin.patches((4, 6))], dim=1)
    followed = range(3) if layers is None else {layer % 3 for layer in layers}
    for number, matrix in enumerate(twin.vit_matrices()):
        if number in followed:
            moved = move(labels, matrix)
            labels = norm(labels + moved) if normalize else moved
    share = TLAlign(model, layers=layers, normalize=normalize)(images, plan)[1].double()[:, None]
    torch.testing.assert_close(share * y + (1 - share) * y[plan.partner], labels[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_nothing_is_averaged_without_norm(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither around attention nor around convolutions in MLPs."""
    images, plan = mixed(case)
    model = TLAlign(build(case), normalize=False)
    monkeypatch.setattr("tokenlabels.align.rules.residual", None)
    model(images, plan)


@pytest.mark.parametrize("case", ["swin", "pvt", "convnext", "mixer"])
@torch.no_grad()
def test_layers_count_over_all_stages(case: str) -> None:
    """Every block moves labels by its own number, and the last has the number -1."""
    images, plan = mixed(case)
    model = TLAlign(build(case))
    followed = [None, *range(model.num_layers), -1]
    shares = []
    for layer in followed:
        if layer is None:
            features = model.align(images, plan, Alignment(layers=frozenset()))
            shares.append(model.classified(features)[:, 0])
        else:
            shares.append(TLAlign(model.model, layers=(layer,))(images, plan)[1])
    assert torch.equal(shares.pop(), shares[-1])
    for number, share in enumerate(shares):
        assert all((share - other).abs().max() > 1e-5 for other in shares[:number])


def test_all_layers_in_any_order_are_the_default() -> None:
    images, plan = mixed("pvt")
    with torch.no_grad():
        named, default = (TLAlign(build("pvt"), layers=layers)(images, plan)[1] for layers in [(4, 3, 2, 1, 0), None])
    assert torch.equal(named, default)


@pytest.mark.parametrize("case", ONE_OF_EACH)
@torch.no_grad()
def test_whoever_wants_sees_tokens_and_labels_after_every_block(case: str) -> None:
    images, plan = mixed(case)
    model = TLAlign(build(case))
    seen: list[tuple[Tensor, Tensor]] = []
    features = model.align(images, plan, Alignment(seen=lambda tokens, labels: seen.append((tokens, labels))))
    assert len(seen) == model.num_layers
    torch.testing.assert_close(seen[-1][1].reshape(features.labels.shape), features.labels)
    torch.testing.assert_close(model.classified(features)[:, 0], model(images, plan)[1])
    calls: list[Tensor] = []
    blocks = find_family(model.model).blocks(model.model)
    handles = [block.register_forward_hook(lambda *args: calls.append(args[-1])) for block in blocks]
    model.model(images)
    for handle in handles:
        handle.remove()
    for (tokens, _), expected in zip(seen, calls, strict=True):
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["vit", "swin-padded", "mixer", "convnext"])
@torch.no_grad()
def test_several_columns_of_labels_go_the_same_way(case: str) -> None:
    """As the published code has it, and more classes than a head has channels."""
    images, plan = mixed(case)
    model = TLAlign(build(case))
    one = model.align(images, plan)

    def labels_of(grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
        first = torch.cat([plan.share()[:, None].expand(-1, num_prefix_tokens), plan.coverage(grid).flatten(1)], dim=1)
        return torch.stack([first, 1 - first, *(18 * [first / 2])], dim=-1)

    many = model.features(images, labels_of)
    assert many.labels.shape == (*one.labels.shape[:2], 20)
    torch.testing.assert_close(many.labels[..., :1], one.labels, rtol=0, atol=2e-6)
    torch.testing.assert_close(many.labels[..., 1:2], 1 - one.labels, rtol=0, atol=2e-6)
    torch.testing.assert_close(many.labels[..., 19:], one.labels / 2, rtol=0, atol=2e-6)
    assert on_grid(many.labels[:, -many.grid[0] * many.grid[1] :], many.grid).shape[1:3] == many.grid
