"""Host batches as the threads of a loader hand them out, for the tests of what happens to them afterwards."""

from collections.abc import Sequence

import numpy as np
import torch

from loaders.augment_ops import Op
from loaders.batch import HostBatch
from loaders.label_windows import LabelBlock
from loaders.rand_augment import NOT_APPLIED, AugmentDraw
from tests.loaders.photos import NUM_CLASSES, random_maps
from tokenlabels.vocabulary import Vocabulary, find_vocabulary


def make_host(
    num: int,
    *,
    seed: int = 0,
    image_size: tuple[int, int] = (32, 32),
    map_grid: tuple[int, int] = (5, 6),
    warped: Sequence[int] = (),
    reaching: Sequence[int] = (),
    num_classes: int = NUM_CLASSES,
) -> HostBatch:
    """A batch with maps.

    Args:
        warped: rows that are rotated and shifted, the last ones most.
        reaching: rows whose crop shows more than their map covers.
    """
    rng = np.random.default_rng(seed)
    keys = tuple(f"img_{row}" for row in range(num))
    low, extent = rng.uniform(0, 0.3, (num, 2)), rng.uniform(0.3, 0.7, (num, 2))
    host = HostBatch(
        number=0,
        keys=keys,
        labels=rng.integers(0, NUM_CLASSES, num),
        boxes=np.concatenate([low, low + extent], axis=1),
        flip=rng.random(num) < 0.5,
        warp=np.tile(np.eye(2, 3), (num, 1, 1)),
        is_warped=np.zeros(num, np.bool_),
        hash=seed + 1,
        images=torch.from_numpy(rng.integers(0, 256, (num, *image_size, 3), dtype=np.uint8)),
    )
    maps = random_maps(rng, keys, map_grid, num_classes)
    host.maps = LabelBlock(maps.scores, maps.classes, maps.tail, maps.views, {})
    for row in reaching:
        low_x, low_y, high_x, high_y = host.boxes[row]
        host.maps.views[row] = [low_x + 0.1, low_y - 0.1, high_x + 0.2, high_y - 0.1]
    host.vocabulary = vocabulary_of(host.maps, num_classes)
    if warped:
        augment(host, {row: ((Op.ROTATE, 15.0 + row), (Op.TRANSLATE_X, 0.1 + 0.05 * row)) for row in warped})
    return host


def augment(host: HostBatch, ops: dict[int, tuple[tuple[Op, float], ...]]) -> None:
    """Give rows their operations, equally many each; the others none."""
    num_layers = max(map(len, ops.values()))
    chosen = [ops.get(row, num_layers * ((NOT_APPLIED, 0.0),)) for row in range(len(host))]
    host.augment = AugmentDraw.from_ops(
        torch.tensor([[int(op) for op, _ in layers] for layers in chosen]),
        torch.tensor([[float(argument) for _, argument in layers] for layers in chosen]),
    )
    host.is_warped = host.augment.is_geometric.numpy()
    size = host.images.shape[1:3]
    host.warp = host.augment.affine((size[0], size[1])).double().numpy()


def only(host: HostBatch, row: int, num_classes: int = NUM_CLASSES) -> HostBatch:
    """A batch of one of the rows. Its images are the same memory."""
    assert host.maps is not None
    maps = host.maps.take([row])
    return HostBatch(
        number=host.number,
        keys=host.keys[row : row + 1],
        labels=host.labels[row : row + 1],
        boxes=host.boxes[row : row + 1],
        flip=host.flip[row : row + 1],
        warp=host.warp[row : row + 1],
        is_warped=host.is_warped[row : row + 1],
        hash=host.hash,
        maps=maps,
        vocabulary=vocabulary_of(maps, num_classes),
        images=host.images[row : row + 1],
    )


def vocabulary_of(maps: LabelBlock, num_classes: int = NUM_CLASSES) -> Vocabulary:
    """The distinct classes of maps, as a finished batch has them."""
    return find_vocabulary(torch.from_numpy(maps.classes.astype(np.int32)), num_classes)
