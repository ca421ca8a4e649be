"""LV-ViT against the published names and numbers, a plain twin, and timm's habits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

import tokenlabels as tl
from tokenlabels.models import LVViT

MakeLVViT = Callable[..., LVViT]
SIZES = ["lvvit_t", "lvvit_s", "lvvit_m", "lvvit_l"]


@pytest.fixture(scope="module")
def published(golden: Path) -> dict[str, dict[str, int]]:
    numbers: dict[str, dict[str, int]] = json.loads((golden / "lvvit_models.json").read_text())
    return numbers


def on_meta(name: str, **arguments: object) -> LVViT:
    with torch.device("meta"):
        model: LVViT = timm.create_model(name, **arguments)
    return model


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_the_published_ones(name: str, published: dict[str, dict[str, int]]) -> None:
    model = on_meta(name)
    assert num_parameters(model) == published[name]["params"]
    assert num_parameters(on_meta(name, aux_head=False)) == published[name]["no_aux"]
    assert sum(buffer.numel() for buffer in model.buffers()) == published[name]["buffers"]


@pytest.mark.parametrize("name", ["lvvit_s_384", "lvvit_m_384", "lvvit_m_448", "lvvit_l_448", "lvvit_l_512"])
def test_parameters_at_other_sizes(name: str, published: dict[str, dict[str, int]]) -> None:
    architecture, _, size = name.rpartition("_")
    assert num_parameters(on_meta(architecture, img_size=int(size))) == published[name]["params"]


def test_the_ablations_without_convolutions_and_without_token_head(published: dict[str, dict[str, int]]) -> None:
    plain = on_meta("lvvit_s", aux_head=False, stem_kernels=(), stem_strides=(), residual_scale=1)
    assert num_parameters(plain) == published["vit"]["params"]
    assert num_parameters(on_meta("lvvit_s", aux_head=False)) == published["lvvit"]["params"]


def test_state_dict_of_the_smallest_is_the_published_one(golden: Path) -> None:
    names = json.loads((golden / "lvvit_t_state_dict.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in on_meta("lvvit_t").state_dict().items()} == names


def test_state_dict_of_the_tiny_one_is_the_published_one(golden: Path, published: dict[str, dict[str, int]]) -> None:
    tiny = json.loads((golden / "lvvit_models.json").read_text())["tiny"]
    model = LVViT(img_size=32, num_classes=10, embed_dim=24, depth=2, num_heads=2)
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == tiny["state_dict"]
    assert num_parameters(model) == tiny["params"] == published["tiny"]["params"]


def plain_tokens(model: LVViT, images: Tensor, plan: tl.MixPlan | None = None) -> Tensor:
    """The published forward pass, step by step, up to the last norm: [B, 1 + N, D]."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    scale, heads = model.blocks[0].residual_scale, model.blocks[0].attn.num_heads
    x = images.double()
    for number, (stride, padding) in enumerate(((2, 3), (1, 1), (1, 1)), start=1):
        x = functional.conv2d(x, state[f"patch_embed.conv{number}.weight"], stride=stride, padding=padding)
        mean, var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=0)
        if not model.training:
            mean, var = (state[f"patch_embed.bn{number}.running_{name}"] for name in ("mean", "var"))
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        affine = (state[f"patch_embed.bn{number}.{name}"][:, None, None] for name in ("weight", "bias"))
        weight, bias = affine
        x = (x * weight + bias).relu()
    x = functional.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
    if plan is not None:
        own = plan.own.double()[:, None]
        x = x * own + x[plan.partner] * (1 - own)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], dim=1) + state["pos_embed"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    for number in range(len(model.blocks)):
        block = f"blocks.{number}"
        qkv = (
            linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        )
        query, key, value = qkv
        attention = (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1)
        x = x + linear((attention @ value).transpose(1, 2).flatten(2), f"{block}.attn.proj") / scale
        hidden = functional.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2") / scale
    return norm(x, "norm")


def classified(model: LVViT, tokens: Tensor, name: str) -> Tensor:
    head = getattr(model, name)
    return functional.linear(tokens, head.weight.double(), head.bias.double())


@pytest.mark.parametrize("residual_scale", [1.0, 2.0, 3.0])
def test_evaluation_is_the_class_token_and_half_of_the_best_token(make_lvvit: MakeLVViT, residual_scale: float) -> None:
    model = make_lvvit(residual_scale=residual_scale).eval()
    images = torch.randn(3, 3, 32, 32)
    tokens = plain_tokens(model, images)
    expected = classified(model, tokens[:, 0], "head") + 0.5 * classified(model, tokens[:, 1:], "aux_head").amax(dim=1)
    torch.testing.assert_close(model(images).double(), expected, rtol=1e-4, atol=1e-4)


def test_training_gives_both_and_mixes_behind_the_patch_embedding(make_lvvit: MakeLVViT) -> None:
    model = make_lvvit().train()
    images = torch.randn(4, 3, 32, 32)
    plan = tl.MixPlan.mixtoken(4, grid=(2, 2), generator=torch.Generator().manual_seed(3))
    assert 0 < plan.share().min() < 1
    expected = plain_tokens(model, images, plan)
    image_logits, token_logits = model(images, plan)
    torch.testing.assert_close(image_logits.double(), classified(model, expected[:, 0], "head"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        token_logits.double(), classified(model, expected[:, 1:], "aux_head"), rtol=1e-4, atol=1e-4
    )


def test_mixed_targets_are_worth_unmixed_predictions(make_lvvit: MakeLVViT) -> None:
    """The published code puts the predictions of tokens back where their images were; value and gradient agree."""
    torch.manual_seed(0)
    model = make_lvvit(drop_path_rate=0.0).train()
    images = torch.randn(6, 3, 32, 32)
    dense = torch.rand(6, 5, 10).softmax(dim=-1)
    own = torch.ones(6, 2, 2)
    own[:, 0, 1] = 0  # one box for all and partners from the back, as published
    plan = tl.MixPlan(torch.arange(6).flip(0), own)

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(model.parameters())))

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        return -(target * logits.log_softmax(dim=-1)).sum(dim=-1).mean()

    image_logits, token_logits = model(images, plan)
    ours = tl.token_label_loss(image_logits, token_logits, tl.TokenTargets.from_dense(dense), plan)
    image_logits, token_logits = model(images, plan)
    cells = token_logits.unflatten(1, (2, 2))
    unmixed = torch.where(own[..., None] == 1, cells, cells.flip(0)).flatten(1, 2)
    share = own.mean()
    mixed_rows = share * dense[:, 0] + (1 - share) * dense[:, 0].flip(0)
    published = cross_entropy(image_logits, mixed_rows) + 0.5 * cross_entropy(unmixed, dense[:, 1:])
    torch.testing.assert_close(ours, published)
    for mine, theirs in zip(gradients(ours), gradients(published), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_mixing_nothing_changes_nothing(make_lvvit: MakeLVViT) -> None:
    model = make_lvvit().eval()
    images = torch.randn(3, 3, 32, 32)
    alone = tl.MixPlan(torch.tensor([1, 2, 0]), torch.ones(3, 2, 2))
    torch.testing.assert_close(model(images, alone), model(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stem", "num_convs"),
    [
        pytest.param({"stem_kernels": (), "stem_strides": ()}, 1, id="[16] [16]"),
        pytest.param({"stem_kernels": (7,), "stem_strides": (2,)}, 2, id="[7,8] [2,8]"),
        pytest.param({"stem_kernels": (7, 3), "stem_strides": (2, 2), "proj_kernel": 8}, 3, id="[7,3,8] [2,2,4]"),
        pytest.param({"stem_kernels": (7, 3), "stem_strides": (2, 1)}, 3, id="[7,3,8] [2,1,8]"),
        pytest.param({}, 4, id="[7,3,3,8] [2,1,1,8]"),
        pytest.param({"stem_kernels": (7, 3, 3, 3, 3), "stem_strides": (2, 1, 1, 1, 1)}, 6, id="[7,3,3,3,3,8]"),
    ],
)
def test_every_patch_embedding_of_table_9(make_lvvit: MakeLVViT, stem: dict[str, object], num_convs: int) -> None:
    model = make_lvvit(img_size=(32, 48), **stem)
    assert sum(isinstance(module, nn.Conv2d) for module in model.patch_embed.modules()) == num_convs
    assert model.grid == (2, 3)
    image_logits, token_logits = model(torch.randn(2, 3, 32, 48))
    assert (image_logits.shape, token_logits.shape) == ((2, 10), (2, 6, 10))


def test_smaller_patches(make_lvvit: MakeLVViT) -> None:
    model = make_lvvit(patch_size=8)
    assert model.grid == (4, 4)
    assert model.patch_embed.proj.kernel_size == (4, 4)
    assert model(torch.randn(2, 3, 32, 32))[1].shape == (2, 16, 10)


def test_tokens_are_row_major(make_lvvit: MakeLVViT) -> None:
    """Without blocks a token sees its patch and the stem's margin: the token of a changed patch changes most."""
    model = make_lvvit(img_size=(48, 64), depth=0).eval()
    images = torch.randn(1, 3, 48, 64)
    changed = images.clone()
    changed[..., 16:32, 48:64] += 3
    with torch.no_grad():
        moved = (model.forward_features(changed) - model.forward_features(images))[0, 1:].norm(dim=1)
    assert int(moved.argmax()) == 1 * 4 + 3


def test_initial_weights_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    model = timm.create_model("lvvit_t")
    for weights in (model.pos_embed, model.cls_token, model.aux_head.weight, model.blocks[3].mlp.fc1.weight):
        assert weights.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.aux_head.bias.abs().max() == 0
    assert model.norm.eps == model.blocks[0].norm1.eps == 1e-5
    assert [
        round(block.drop_path1.drop_prob, 3) if index else 0.0
        for index, block in enumerate(timm.create_model("lvvit_t", drop_path_rate=0.11).blocks)
    ] == [round(0.01 * i, 3) for i in range(12)]


class TestAsTimmHasIt:
    """What users of timm expect of a model."""

    def test_head_of_features_is_the_model(self, make_lvvit: MakeLVViT) -> None:
        model = make_lvvit().eval()
        images = torch.randn(2, 3, 32, 32)
        features = model.forward_features(images)
        assert features.shape == (2, 5, 24)
        torch.testing.assert_close(model.forward_head(features), model(images))
        assert model.forward_head(features, pre_logits=True).shape == (2, 24)

    @pytest.mark.parametrize("aux_head", [True, False])
    def test_reset_classifier(self, make_lvvit: MakeLVViT, aux_head: bool) -> None:
        model = make_lvvit(aux_head=aux_head)
        assert model.get_classifier() is model.head
        model.reset_classifier(7)
        images = torch.randn(2, 3, 32, 32)
        outputs = model(images)
        logits = outputs[0] if aux_head else outputs
        assert logits.shape == (2, 7)
        assert (model.aux_head is not None) == aux_head
        model.reset_classifier(0)
        torch.testing.assert_close(model.eval()(images), model.forward_features(images)[:, 0])

    def test_without_classes_it_is_a_backbone(self, make_lvvit: MakeLVViT) -> None:
        assert make_lvvit(num_classes=0)(torch.randn(2, 3, 32, 32)).shape == (2, 24)

    def test_average_pooling(self, make_lvvit: MakeLVViT) -> None:
        model = make_lvvit(global_pool="avg").eval()
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)

    def test_without_pooling_every_token_is_classified_by_the_image_s_classifier(self, make_lvvit: MakeLVViT) -> None:
        model = make_lvvit(global_pool="").eval()
        assert model(torch.randn(5, 3, 32, 32)).shape == (5, 5, 10)

    def test_weights_drawn_again_are_those_of_the_paper(self, make_lvvit: MakeLVViT) -> None:
        model = make_lvvit(embed_dim=480)
        model.init_weights()
        assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)

    def test_released_weights_make_a_backbone_of_another_size(self, tmp_path: Path) -> None:
        """Through timm alone: the position embedding is resampled, and a classifier that is not there left out."""
        source = timm.create_model("lvvit_t", depth=2, img_size=64)
        torch.save({"state_dict_ema": source.state_dict(), "state_dict": {}}, tmp_path / "lvvit.pth.tar")
        options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "lvvit.pth.tar")}, "depth": 2}
        backbone = timm.create_model("lvvit_t", features_only=True, out_indices=(1,), img_size=96, **options)
        source.set_input_size(img_size=96)
        images = torch.randn(1, 3, 96, 96)
        expected = source.eval().forward_intermediates(images, indices=[1], intermediates_only=True)
        torch.testing.assert_close(backbone.eval()(images), expected)
        plain = timm.create_model("lvvit_t", img_size=96, aux_head=False, **options)
        torch.testing.assert_close(plain.head.weight, source.head.weight)

    def test_intermediates(self, make_lvvit: MakeLVViT) -> None:
        model = make_lvvit(img_size=(32, 48)).eval()
        images = torch.randn(2, 3, 32, 48)
        last, intermediates = model.forward_intermediates(images, indices=[0, 1])
        assert [tuple(map_.shape) for map_ in intermediates] == [(2, 24, 2, 3)] * 2
        torch.testing.assert_close(last, model.forward_features(images))

    def test_features_only_for_segmentation(self) -> None:
        backbone = timm.create_model("lvvit_t", features_only=True, out_indices=(3, 7, 11), img_size=64, depth=12)
        assert backbone.feature_info.channels() == [240] * 3
        assert backbone.feature_info.reduction() == [16] * 3
        maps = backbone(torch.randn(1, 3, 64, 64))
        assert [tuple(map_.shape) for map_ in maps] == [(1, 240, 4, 4)] * 3

    def test_gradient_checkpointing_changes_no_gradient(self, make_lvvit: MakeLVViT) -> None:
        images = torch.randn(2, 3, 32, 32)
        plan = tl.MixPlan(torch.tensor([1, 0]), torch.tensor([[[1.0, 0], [1, 1]]] * 2))
        found = []
        for enable in (False, True):
            model = make_lvvit()
            model.set_grad_checkpointing(enable)
            image_logits, token_logits = model(images, plan)
            loss = image_logits.square().mean() + token_logits.square().mean()
            found.append(torch.autograd.grad(loss, list(model.parameters())))
        for without, with_checkpoints in zip(*found, strict=True):
            torch.testing.assert_close(without, with_checkpoints)

    def test_compiles_to_one_graph(self, make_lvvit: MakeLVViT) -> None:
        model = make_lvvit()
        images = torch.randn(4, 3, 32, 32)
        plan = tl.MixPlan.mixtoken(4, grid=(2, 2), generator=torch.Generator().manual_seed(0))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for mine, theirs in zip(compiled(images, plan), model(images, plan), strict=True):
            torch.testing.assert_close(mine, theirs)
        model.eval()
        torch.testing.assert_close(compiled(images), model(images))

    def test_exports(self, make_lvvit: MakeLVViT) -> None:
        model = make_lvvit().eval()
        images = torch.randn(2, 3, 32, 32)
        exported = torch.export.export(model, (images,))
        torch.testing.assert_close(exported.module()(images), model(images))

    def test_exports_with_a_dynamic_size(self, make_lvvit: MakeLVViT) -> None:
        model = make_lvvit(img_size=64, dynamic_img_size=True).eval()
        images = torch.randn(3, 3, 96, 96)
        batch = torch.export.Dim("batch", min=2, max=16)
        exported = torch.export.export(model, (images,), dynamic_shapes={"x": {0: batch}})
        more = torch.randn(5, 3, 96, 96)
        torch.testing.assert_close(exported.module()(more), model(more))

    def test_parameters_without_decay(self, make_lvvit: MakeLVViT) -> None:
        assert {"pos_embed", "cls_token"} <= set(make_lvvit().no_weight_decay())

    @pytest.mark.parametrize("size", [(48, 32), (64, 64)])
    def test_set_input_size_resamples_without_antialiasing(self, make_lvvit: MakeLVViT, size: tuple[int, int]) -> None:
        model = make_lvvit(img_size=96).eval()
        before = model.pos_embed.detach().clone()
        model.set_input_size(img_size=size)
        grid = (size[0] // 16, size[1] // 16)
        assert model.grid == grid
        maps = before[:, 1:].unflatten(1, (6, 6)).permute(0, 3, 1, 2)
        expected = functional.interpolate(maps, size=grid, mode="bicubic", align_corners=False)
        torch.testing.assert_close(model.pos_embed[:, 1:], expected.flatten(2).mT)
        torch.testing.assert_close(model.pos_embed[:, :1], before[:, :1])
        assert model(torch.randn(1, 3, *size)).shape == (1, 10)

    def test_dynamic_size_equals_a_model_of_that_size(self, make_lvvit: MakeLVViT) -> None:
        dynamic = make_lvvit(img_size=96, dynamic_img_size=True).eval()
        fixed = make_lvvit(img_size=96).eval()
        for size in ((96, 96), (48, 64)):
            images = torch.randn(2, 3, *size)
            fixed.set_input_size(img_size=size)
            torch.testing.assert_close(dynamic(images), fixed(images))
            plan = tl.MixPlan(torch.tensor([1, 0]), torch.rand(2, *fixed.grid))
            torch.testing.assert_close(dynamic(images, plan), fixed(images, plan))
            fixed = make_lvvit(img_size=96).eval()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"residual_scale": 0.0}, "residual_scale must be above 0"),
        ({"stem_kernels": (7,), "stem_strides": (2, 1)}, "as many of both"),
        ({"stem_kernels": (7,), "stem_strides": (3,)}, "divides the patch size"),
        ({"proj_kernel": 7}, "proj_kernel must be 8"),
        ({"stem_kernels": (7, 2), "stem_strides": (2, 1)}, "stem_kernels must be odd"),
        ({"patch_size": (16, 16)}, "patch_size must be an integer"),
        ({"dynamic_img_pad": True}, "dynamic_img_pad is not supported"),
    ],
)
def test_refused_arguments(make_lvvit: MakeLVViT, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_lvvit(**arguments)


def test_refused_images_and_plans(make_lvvit: MakeLVViT) -> None:
    model = make_lvvit()
    with pytest.raises(ValueError, match="images are 48 x 32 pixels, the model takes 32 x 32"):
        model(torch.randn(2, 3, 48, 32))
    with pytest.raises(ValueError, match="no whole patches of 16 pixels"):
        make_lvvit(dynamic_img_size=True)(torch.randn(2, 3, 40, 32))
    with pytest.raises(ValueError, match="cannot become 8"):
        model.set_input_size(patch_size=8)
    with pytest.raises(ValueError, match=r"\(3, 3\)|3x3|3 x 3|grid"):
        model(torch.randn(2, 3, 32, 32), tl.MixPlan.mixtoken(2, grid=(3, 3)))
