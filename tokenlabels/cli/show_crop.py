"""What a student sees of a crop, and what it is asked for: as the loader makes them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from tokenlabels import ScoreMap, TokenTargets
    from tokenlabels.geometry import Box
    from tokenlabels.views.crop import StudentCrop

_SIDE_PX, _GRID = 224, (14, 14)


def student_crop(image: "Image", score_map: "ScoreMap", box: "Box", flip: bool, num_classes: int) -> "StudentCrop":
    """The crop at 224 x 224 pixels, bicubic, with 14 x 14 targets by the rule "logits".

    Args:
        image: mode RGB.
        score_map: its map.
        box: xyxy in 0..1 of the image; brought to whole pixels, of which it has at least one.
        flip: mirror the crop left-right.
        num_classes: K.
    """
    import numpy as np
    import torch

    from loaders.crops import PixelBox
    from loaders.decode import get_decoder
    from tokenlabels.views.crop import StudentCrop

    left, top = (min(round(low * side), side - 1) for low, side in zip(box[:2], image.size, strict=True))
    right, bottom = (round(high * side) for high, side in zip(box[2:], image.size, strict=True))
    pixel_box = PixelBox(left, top, max(right - left, 1), max(bottom - top, 1))
    pixels = torch.empty((_SIDE_PX, _SIDE_PX, 3), dtype=torch.uint8)
    decoded = torch.from_numpy(np.array(image))
    get_decoder("torchvision").resize_into(decoded, pixel_box, pixels, flip, "bicubic")
    shown = pixel_box.normalised(*image.size)
    targets = crop_targets(score_map, torch.tensor([shown], dtype=torch.float64), torch.tensor([flip]), num_classes)
    rows = targets.dense()[0].numpy()
    valid = targets.valid[0, 1:].view(_GRID).numpy()
    return StudentCrop(shown, flip, pixels.numpy(), rows[1:].reshape(*_GRID, -1), rows[0], valid)


def crop_targets(score_map: "ScoreMap", boxes: "Tensor", flip: "Tensor", num_classes: int) -> "TokenTargets":
    """Targets of crops of one image, boxes float64 [1, 4] in 0..1 of it. Tokens beyond the map have none."""
    import numpy as np
    import torch

    from tokenlabels.geometry import BORDER_TOLERANCE, affine_from_boxes, affine_in_map, box_in_map
    from tokenlabels.targets import affine_token_targets, token_targets

    scores = torch.from_numpy(score_map.scores[None])
    classes = torch.from_numpy(score_map.classes[None].astype(np.int32))
    views = torch.from_numpy(score_map.view[None]).double()
    low, high = views[:, :2].clamp(min=0) - BORDER_TOLERANCE, views[:, 2:].clamp(max=1) + BORDER_TOLERANCE
    if bool((boxes[:, :2] >= low).all()) and bool((boxes[:, 2:] <= high).all()):
        inside = box_in_map(boxes, views)
        return token_targets(scores, classes, inside, flip=flip, grid=_GRID, num_classes=num_classes, views=views)
    to_map = affine_in_map(affine_from_boxes(boxes, flip), views)
    return affine_token_targets(scores, classes, to_map, grid=_GRID, num_classes=num_classes, views=views)
