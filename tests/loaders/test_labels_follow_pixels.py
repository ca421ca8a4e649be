"""The promise of the loader: the label crop is exactly the image crop.

Images whose colours say where a pixel is from (red is x, green is y, blue is full everywhere), and score maps whose
classes do (one class per cell, all of its probability): after whatever the loader does to both, they have to agree.
Under the rule "probs" targets are linear in the map, so the mean position of the classes of a target is a position.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from loaders import TokenLabelBatch, TokenLabelLoader
from loaders.device import Mix
from loaders.rand_augment import RandAugment
from tests.loaders.photos import encode, write_label_set, write_tar
from tokenlabels.affine import affine_from_boxes, apply_affine, invert_affine, token_centres
from tokenlabels.boxes import box_in_map
from tokenlabels.geometry import cell_centres, valid_cells, view_center, view_letterbox, view_squash
from tokenlabels.types import ScoreMaps

MAP, TOKENS = (16, 16), (14, 14)
SIDE = (
    14 * 15
)  # the middle of a token is the middle of a pixel, so that it shows the image or fill and not a bit of both
SIZES_WH = [(256, 256), (320, 200), (180, 300), (500, 150), (160, 170), (140, 420)]
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.3, 0.2)
GEOMETRY = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")

# Positions read off the pixels were rounded to grey levels when the image was made and when its crop was resized; at
# the border of a crop, bicubic resizing leans inwards by a part of a pixel of the image.
GREY_LEVEL = 1 / 255
# Beyond the outermost centres of cells maps are constant. A token across such a bend takes at least one sample per
# cell, and the mean of one sample is off by an eighth of a cell at most.
BEND = 1 / 8
# Of regions fitted to all pixels and to all tokens; the distance from 1 is the rounding to grey levels.
MIN_IOU = 0.99
# Fewer tokens that lie wholly in the map do not say well enough where the others would be.
MIN_TOKENS = 20

ViewName = Literal["squash", "center", "letterbox"]
VIEWS: dict[ViewName, Callable[[int, int], tuple[float, ...]]] = {
    "squash": lambda _width, _height: view_squash(),
    "center": lambda width, height: view_center(width, height, 0.875),
    "letterbox": lambda width, height: view_letterbox(width, height, (288, 288)),
}


def gradient(width: int, height: int) -> Image.Image:
    """Red is x and green is y, both 0..255 over the image."""
    x = np.broadcast_to(255 * (np.arange(width) + 0.5) / width, (height, width))
    y = np.broadcast_to(255 * (np.arange(height)[:, None] + 0.5) / height, (height, width))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 255)], axis=2).round().astype(np.uint8))


def position_maps(keys: list[str], views: np.ndarray[Any, Any]) -> ScoreMaps:
    """The class of a cell is its number, row by row."""
    num_cells = MAP[0] * MAP[1]
    shape = (len(keys), *MAP, 1)
    classes = np.broadcast_to(np.arange(num_cells, dtype=np.uint16).reshape(*MAP, 1), shape).copy()
    tail = np.zeros(shape[:3], np.float16)
    return ScoreMaps(tuple(keys), np.full(shape, 10, np.float16), classes, tail, views.astype(np.float32))


@dataclass(frozen=True)
class Positions:
    """Images and labels that say where they are from.

    Attributes:
        tar: of the images.
        labels: label sets, by the way their maps cover the images.
        views: of every image, float32 [4], by the same and by key.
    """

    tar: Path
    labels: dict[ViewName, Path]
    views: dict[ViewName, dict[str, np.ndarray[Any, Any]]]

    def load(self, view: ViewName = "squash", **options: Any) -> TokenLabelBatch:
        """The one batch of an epoch."""
        defaults: dict[str, Any] = {
            "image_size": SIDE, "grid": TOKENS, "interpolate": "probs", "batch_size": 2 * len(SIZES_WH), "threads": 2,
            "mean": MEAN, "std": STD, "index_dir": self.tar.parent / "index", "scale": (0.1, 1.0),
        }  # fmt: skip
        (batch,) = TokenLabelLoader(str(self.tar), self.labels[view], **(defaults | options))
        return batch


def write_positions(
    folder: Path, images: dict[str, bytes], sizes_wh: list[tuple[int, int]], extension: str
) -> Positions:
    tar, labels, views = folder / "train.tar", {}, {}
    write_tar(tar, {key: {extension: data} for key, data in images.items()})
    for name, view_of in VIEWS.items():
        array = np.array([view_of(*size) for size in sizes_wh], np.float32)
        labels[name] = write_label_set(folder / name, {"train": position_maps(list(images), array)}, num_classes=256)
        views[name] = dict(zip(images, array, strict=True))
    return Positions(tar, labels, views)


@pytest.fixture(scope="module")
def positions(tmp_path_factory: pytest.TempPathFactory) -> Positions:
    sizes = 2 * SIZES_WH
    images = {f"img_{row:02d}": encode(gradient(*size), "PNG") for row, size in enumerate(sizes)}
    return write_positions(tmp_path_factory.mktemp("positions"), images, sizes, "png")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A function that makes RandAugment apply these operations to every sample, and returns the option to give."""

    def choose(*op_names: str, magnitude: float = 9.0) -> str:
        chosen = RandAugment(op_names, num_layers=len(op_names), prob=1.0, magnitude=magnitude, magnitude_std=1.0)
        monkeypatch.setattr(RandAugment, "parse", lambda _config: chosen)
        return "rand-m9"

    return choose


@dataclass(frozen=True)
class Seen:
    """Positions in the image, x first, of every token of a batch.

    Attributes:
        by_pixels: float64 [B, N, 2], the mean of the pixels.
        by_labels: float64 [B, N, 2], the mean of the target.
        tolerance: float64 [B, N, 2], how far the two may be apart.
        is_whole: bool [B, N], where no pixel of the token shows fill or a part of the image without label.
        is_linear: bool [B, N], where besides no pixel lies beyond the outermost centres of cells, between which a map
            is interpolated, and beyond which it is constant.
        shows_labelled: bool [B, N], whether the centre of the token shows a part of the image that has labels.
        on_border: bool [B, N], where grey levels cannot tell that.
        valid: bool [B, N], whether the token has a target.
        regions: float64 [B, 2, 3], the affine map from output to image that explains all pixels best.
    """

    by_pixels: Tensor
    by_labels: Tensor
    tolerance: Tensor
    is_whole: Tensor
    is_linear: Tensor
    shows_labelled: Tensor
    on_border: Tensor
    valid: Tensor
    regions: Tensor


def fitted(positions_N2: Tensor, grid: tuple[int, int], chosen: Tensor) -> Tensor:
    """The affine map [2, 3] from the output to the image that explains the positions of the chosen places best."""
    centres = token_centres(grid, dtype=torch.float64)[chosen]
    ones = torch.ones(len(centres), 1, dtype=torch.float64)
    solution: Tensor = torch.linalg.lstsq(torch.cat([centres, ones], dim=1), positions_N2[chosen]).solution
    return solution.T


def label_positions(batch: TokenLabelBatch, views: list[np.ndarray[Any, Any]]) -> Tensor:
    """Mean position in the image of the classes of every row, float64 [B, 1 + N, 2]."""
    assert batch.targets is not None
    columns, rows = zip(*(cell_centres(view, MAP) for view in views), strict=True)
    x = torch.tensor(np.stack(columns)).repeat(1, MAP[0])
    y = torch.tensor(np.stack(rows)).repeat_interleave(MAP[1], dim=1)
    return batch.targets.dense().double() @ torch.stack([x, y], dim=2)


def pixel_positions(batch: TokenLabelBatch) -> tuple[Tensor, Tensor]:
    """Position in the image of every pixel, float64 [B, 2, S, S], and whether it shows fill, bool [B, S, S]."""
    colours = batch.images.double() * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    return colours[:, :2], colours[:, 2] < 0.9


def seen(batch: TokenLabelBatch, views_by_key: dict[str, np.ndarray[Any, Any]]) -> Seen:
    views = [views_by_key[key] for key in batch.keys]
    assert batch.targets is not None
    position, is_fill = pixel_positions(batch)
    low, high = torch.empty(2, len(batch), 2, 1, 1, dtype=torch.float64)
    for sample, view in enumerate(views):
        shows_image = valid_cells(view, MAP)
        for axis, centres in enumerate(cell_centres(view, MAP)):
            readable = centres[shows_image.any(axis=axis)]
            low[sample, axis], high[sample, axis] = readable[0], readable[-1]
    view_low, view_high = torch.tensor(np.stack(views), dtype=torch.float64)[..., None, None].chunk(2, dim=1)
    is_cut = (view_high - view_low < 1).any(dim=1)
    outside = torch.maximum(view_low - position, position - view_high).amax(dim=1)
    beyond_centres = ((position < low) | (position > high)).any(dim=1)

    def any_of(pixels: Tensor) -> Tensor:
        return max_pool2d(pixels.double()[:, None], SIDE // TOKENS[0]).flatten(1) > 0

    def of_centre(pixels: Tensor) -> Tensor:
        return pixels[:, 7::15, 7::15].flatten(1)

    is_whole = ~any_of(is_fill | (outside > -GREY_LEVEL) & is_cut)
    is_linear = is_whole & ~any_of(beyond_centres)
    cell_extent = (view_high - view_low)[..., 0, 0] / torch.tensor(MAP[::-1])
    return Seen(
        by_pixels=avg_pool2d(position.clamp(low, high), SIDE // TOKENS[0]).flatten(2).mT,
        by_labels=label_positions(batch, views)[:, 1:],
        tolerance=GREY_LEVEL + ~is_linear[..., None] * BEND * cell_extent[:, None],
        is_whole=is_whole,
        is_linear=is_linear,
        shows_labelled=~of_centre(is_fill) & of_centre(outside < 1e-6),
        on_border=of_centre((outside.abs() < GREY_LEVEL) & is_cut),
        valid=batch.targets.valid[:, 1:],
        regions=torch.stack(
            [
                fitted(place.flatten(1).T, (SIDE, SIDE), ~fill.flatten())
                for place, fill in zip(position, is_fill, strict=True)
            ]
        ),
    )


def overlap(one: Tensor, other: Tensor, num_points: int = 100_000) -> float:
    """Intersection over union of the parts of the image that two outputs show, by points strewn over it."""
    points = torch.rand(num_points, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shown = [
        ((place >= 0) & (place <= 1)).all(dim=1)
        for place in (apply_affine(invert_affine(affine), points) for affine in (one, other))
    ]
    return float((shown[0] & shown[1]).sum() / (shown[0] | shown[1]).sum())


def label_regions(found: Seen) -> dict[int, Tensor]:
    """The affine map from output to image that explains the targets best, of samples that say enough."""
    enough = (found.is_linear.sum(dim=1) >= MIN_TOKENS).nonzero().flatten().tolist()
    return {sample: fitted(found.by_labels[sample], TOKENS, found.is_linear[sample]) for sample in enough}


def overlaps(found: Seen) -> list[float]:
    """Of every sample, the part of the image that its labels are of with the part that its pixels are of."""
    return [overlap(found.regions[sample], region) for sample, region in label_regions(found).items()]


def check_agreement(found: Seen) -> None:
    excess = (found.by_labels - found.by_pixels).abs() - found.tolerance
    assert float(excess[found.is_whole].max()) <= 0
    mistaken = (found.valid != found.shows_labelled) & ~found.on_border
    assert mistaken.nonzero().tolist() == []
    assert found.on_border.double().mean() < 0.05
    shares = overlaps(found)
    assert len(shares) >= len(found.valid) / 2
    assert min(shares) >= MIN_IOU


@pytest.mark.parametrize("decoder", ["torchvision", "pillow"])
@pytest.mark.parametrize("view", VIEWS)
def test_crops_and_flips(positions: Positions, view: ViewName, decoder: str) -> None:
    batch = positions.load(view, decoder=decoder)
    assert 0 < batch.flip.sum() < len(batch)
    found = seen(batch, positions.views[view])
    check_agreement(found)
    # What the labels say needs no grey levels: it is exactly the box of the crop.
    expected = affine_from_boxes(batch.boxes.double(), batch.flip)
    for sample, region in label_regions(found).items():
        torch.testing.assert_close(region, expected[sample], rtol=0, atol=2e-5)
        assert overlap(region, expected[sample]) > 0.9999


@pytest.mark.parametrize("order", ["after crop", "before crop"])
@pytest.mark.parametrize("op", GEOMETRY)
def test_every_geometric_operation(positions: Positions, always: Callable[..., str], op: str, order: str) -> None:
    batch = positions.load(rand_augment=always(op), augment_order=order)
    found = seen(batch, positions.views["squash"])
    assert not found.valid.all()
    check_agreement(found)


@pytest.mark.parametrize("order", ["after crop", "before crop"])
@pytest.mark.parametrize("view", VIEWS)
def test_all_of_them_together(positions: Positions, always: Callable[..., str], view: ViewName, order: str) -> None:
    batch = positions.load(view, rand_augment=always(*GEOMETRY, magnitude=4.0), augment_order=order, scale=(0.4, 1.0))
    found = seen(batch, positions.views[view])
    assert not found.valid.all()
    check_agreement(found)


def test_the_published_mistake_would_be_seen(positions: Positions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes as (top, left, bottom, right) where x comes first: the other tests here are able to fail."""
    monkeypatch.setattr(
        "loaders.crop_targets.box_in_map", lambda boxes, views: box_in_map(boxes[:, [1, 0, 3, 2]], views)
    )
    found = seen(positions.load(), positions.views["squash"])
    shares = overlaps(found)
    assert np.mean(shares) < 0.5
    assert min(shares) < 0.1
    with pytest.raises(AssertionError):
        check_agreement(found)


@pytest.mark.parametrize("op", [None, "Rotate"])
def test_the_image_level_row_is_the_mean_of_what_is_seen(
    positions: Positions, always: Callable[..., str], op: str | None
) -> None:
    batch = positions.load(rand_augment=None if op is None else always(op))
    position, is_fill = pixel_positions(batch)
    shown = (~is_fill)[:, None].double()
    mean = (position * shown).sum(dim=(2, 3)) / shown.sum(dim=(2, 3))
    by_labels = label_positions(batch, [positions.views["squash"][key] for key in batch.keys])[:, 0]
    assert (by_labels - mean).abs().max() < GREY_LEVEL


@pytest.mark.parametrize("decoder", ["torchvision", "pillow"])
def test_labels_are_of_the_upright_image(tmp_path: Path, decoder: str) -> None:
    """JPEGs that say how they are to be turned, in all ways."""
    images, sizes = {}, []
    for orientation in range(1, 9):
        sizes.append(SIZES_WH[orientation % len(SIZES_WH)])
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        lying(gradient(*sizes[-1]), orientation).save(buffer, "JPEG", quality=100, subsampling=0, exif=exif)
        images[f"turned_{orientation}"] = buffer.getvalue()
    turned = write_positions(tmp_path, images, sizes, "jpg")
    batch = turned.load(batch_size=8, decoder=decoder)
    check_agreement(seen(batch, turned.views["squash"]))


def lying(upright: Image.Image, orientation: int) -> Image.Image:
    """The image as a camera stores it that gives it this EXIF orientation."""
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    return upright.transpose(turns[orientation]) if orientation in turns else upright


@pytest.mark.parametrize("mix", ["mixtoken", "cutmix", "mixup", "random", "blockwise"])
def test_mixed_targets_are_of_both_samples(positions: Positions, mix: Mix) -> None:
    plain, mixed = positions.load(), positions.load(mix=mix)
    assert plain.keys == mixed.keys
    assert mixed.plan is not None
    found = seen(plain, positions.views["squash"])
    pixels = plain.images if mix == "mixtoken" else mixed.plan.mix(plain.images)
    torch.testing.assert_close(mixed.images, pixels, rtol=0, atol=1e-6)
    partner, own = mixed.plan.partner, mixed.plan.coverage(TOKENS).double().flatten(1)[..., None]
    expected = own * found.by_pixels + (1 - own) * found.by_pixels[partner]
    by_labels = label_positions(mixed, [positions.views["squash"][key] for key in mixed.keys])[:, 1:]
    assert ((by_labels - expected).abs() <= torch.maximum(found.tolerance, found.tolerance[partner])).all()
    assert 0.1 < own.mean() < 0.9
