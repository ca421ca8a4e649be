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
from tests.loaders.conftest import encode, write_label_set, write_tar
from tokenlabels.affine import affine_from_boxes, apply_affine, invert_affine, token_centres
from tokenlabels.boxes import box_in_map
from tokenlabels.geometry import cell_centres, valid_cells, view_center, view_letterbox, view_squash
from tokenlabels.types import ScoreMaps

MAP, TOKENS = (16, 16), (14, 14)
SIDE = 14 * 15  # the middle of a token is the middle of a pixel, so that it shows the image or fill and not a bit of both
SIZES_WH = [(256, 256), (320, 200), (180, 300), (500, 150), (160, 170), (140, 420)]
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.3, 0.2)
GEOMETRY = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")

# Positions read off the pixels are whole grey levels of 255 that were rounded when the image was made and when its crop
# was resized; along the border of a crop bicubic resizing leans inwards, by less than a pixel of the image.
GREY_LEVEL = 1 / 255
TOKEN_TOLERANCE = GREY_LEVEL
MIN_IOU = 0.98

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


def write_positions(folder: Path, images: dict[str, bytes], sizes_wh: list[tuple[int, int]], extension: str) -> Positions:
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
        is_whole: bool [B, N], where no pixel of the token shows fill or a part of the image without label.
        is_linear: bool [B, N], where besides no pixel lies beyond the outermost centres of cells, between which a map
            is interpolated, and beyond which it is constant.
        shows_labelled: bool [B, N], whether the centre of the token shows a part of the image that has labels.
        on_border: bool [B, N], where grey levels cannot tell that.
        valid: bool [B, N], whether the token has a target.
    """

    by_pixels: Tensor
    by_labels: Tensor
    is_whole: Tensor
    is_linear: Tensor
    shows_labelled: Tensor
    on_border: Tensor
    valid: Tensor


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
    return colours[:, :2], colours[:, 2] < 0.99


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
    view_low, view_high = torch.tensor(np.stack(views), dtype=torch.float64)[..., None, None].split(2, dim=1)
    is_cut = (view_high - view_low < 1).any(dim=1)
    outside = torch.maximum(view_low - position, position - view_high).amax(dim=1)
    beyond_centres = ((position < low) | (position > high)).any(dim=1)

    def any_of(pixels: Tensor) -> Tensor:
        return max_pool2d(pixels.double()[:, None], SIDE // TOKENS[0]).flatten(1) > 0

    def of_centre(pixels: Tensor) -> Tensor:
        return pixels[:, 7::15, 7::15].flatten(1)

    is_whole = ~any_of(is_fill | (outside > -GREY_LEVEL) & is_cut)
    return Seen(
        by_pixels=avg_pool2d(position.clamp(low, high), SIDE // TOKENS[0]).flatten(2).mT,
        by_labels=label_positions(batch, views)[:, 1:],
        is_whole=is_whole,
        is_linear=is_whole & ~any_of(beyond_centres),
        shows_labelled=~of_centre(is_fill) & of_centre(outside <= 0),
        on_border=of_centre((outside.abs() < GREY_LEVEL) & is_cut),
        valid=batch.targets.valid[:, 1:],
    )


def fitted_region(positions_N2: Tensor, tokens: Tensor) -> Tensor:
    """The affine map [2, 3] from the output to the image that explains the positions of these tokens best."""
    centres = token_centres(TOKENS, dtype=torch.float64)[tokens]
    ones = torch.ones(len(centres), 1, dtype=torch.float64)
    return torch.linalg.lstsq(torch.cat([centres, ones], dim=1), positions_N2[tokens]).solution.T


def overlap(one: Tensor, other: Tensor, num_points: int = 400) -> float:
    """Intersection over union of the parts of the image that two outputs show, by a grid of points."""
    points = token_centres((num_points, num_points), dtype=torch.float64)
    shown = [
        ((place >= 0) & (place <= 1)).all(dim=1)
        for place in (apply_affine(invert_affine(affine), points) for affine in (one, other))
    ]
    return float((shown[0] & shown[1]).sum() / (shown[0] | shown[1]).sum())


def overlaps(found: Seen) -> list[float]:
    """Of every sample, the part of the image that its labels are of with the part that its pixels are of."""
    return [
        overlap(*(fitted_region(by[sample], tokens) for by in (found.by_pixels, found.by_labels)))
        for sample, tokens in enumerate(found.is_linear)
    ]


def check_agreement(found: Seen) -> None:
    difference = (found.by_labels - found.by_pixels).abs().amax(dim=2)
    assert difference[found.is_whole].max() < TOKEN_TOLERANCE
    assert torch.equal(found.valid | found.on_border, found.shows_labelled | found.on_border)
    assert found.on_border.double().mean() < 0.05
    assert min(overlaps(found)) >= MIN_IOU


if True:
    import sys


def test_dbg(positions: Positions, monkeypatch) -> None:
    for view in VIEWS:
      for order in ("after crop", "before crop"):
        for ops in ((), *((g,) for g in GEOMETRY), GEOMETRY):
            kw = {}
            with monkeypatch.context() as m:
              if ops:
                chosen = RandAugment(ops, num_layers=len(ops), prob=1.0, magnitude=6.0, magnitude_std=1.0, weights=(1,)*len(ops))
                m.setattr(RandAugment, "parse", lambda _config: chosen)
                kw = {"rand_augment": "rand-m9"}
              f = seen(positions.load(view, augment_order=order, **kw), positions.views[view])
            d = (f.by_labels - f.by_pixels).abs().amax(dim=2)
            ww = (f.valid != f.shows_labelled).nonzero()
            if len(ww): print(ww.tolist(), f.by_pixels[ww[:,0],ww[:,1]], f.valid[ww[:,0],ww[:,1]], f.on_border[ww[:,0],ww[:,1]], file=sys.stderr)
            wrong = (f.valid != f.shows_labelled)
            ious = [overlap(*(fitted_region(by[i], t) for by in (f.by_pixels, f.by_labels))) for i, t in enumerate(f.is_linear) if t.sum() > 20]
            print(view, order, ops, "tok %.5f lin %.5f whole %.2f lin %d" % (d[f.is_whole].max(), d[f.is_linear].max(), f.is_whole.double().mean(), f.is_linear.sum(1).min()), "wrong", int((wrong & ~f.on_border).sum()), int(wrong.sum()), "bord %.3f valid %.3f" % (f.on_border.double().mean(), f.valid.double().mean()), "iou %.4f" % min(ious), len(ious), file=sys.stderr)
