"""What is done to a batch when all its rows are in: rows that cannot be used, and the vocabulary of its maps."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from loaders.batch import HostBatch
from tokenlabels.checks import check_choice
from tokenlabels.vocabulary import find_vocabulary

OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class FinishBatch:
    """Finishes batches.

    Attributes:
        on_error: "raise" leaves the problems of a batch for the one who takes it; "skip" does without
            these rows, unless a whole tar is to blame.
        keeps_size: with "skip", another sample of the batch takes the place of each that is left out, so that batches
            stay equal; otherwise the batch gets shorter (evaluation, where no sample may count twice).
        num_classes: of the label set; None without maps.
    """

    on_error: OnError
    keeps_size: bool
    num_classes: int | None

    def __post_init__(self) -> None:
        check_choice("on_error", self.on_error, OnError)

    def __call__(self, host: HostBatch) -> None:
        """Finish one batch. One without any usable row keeps its problems."""
        if host.problems and self.on_error == "skip":
            of_tars = {row: problem for row, problem in host.problems.items() if problem.is_of_tar}
            if of_tars:
                host.problems = of_tars
            else:
                self._leave_out(host)
        if host.maps is not None and self.num_classes is not None and len(host) and not host.problems:
            host.vocabulary = find_vocabulary(torch.from_numpy(host.maps.classes.astype(np.int32)), self.num_classes)

    def _leave_out(self, host: HostBatch) -> None:
        rows = [row for row in range(len(host)) if row not in host.problems]
        if self.keeps_size:
            if not rows:
                return
            good = iter(rows * len(host))
            rows = [next(good) if row in host.problems else row for row in range(len(host))]
        _keep_rows(host, rows)


def _keep_rows(host: HostBatch, rows: list[int]) -> None:
    """Make the batch one of these rows. Colours and erasing stay those of the place in the batch."""
    index = torch.tensor(rows, dtype=torch.int64)
    images = host.images[: len(rows)]
    images.copy_(host.images[index])  # the images stay where they are, in the ring
    host.images = images
    host.keys = tuple(host.keys[row] for row in rows)
    host.labels, host.boxes, host.flip = host.labels[rows], host.boxes[rows], host.flip[rows]
    host.crops, host.mirrored = host.crops[rows], host.mirrored[rows]
    host.warp, host.is_warped = host.warp[rows], host.is_warped[rows]
    if host.maps is not None:
        host.maps = host.maps.take(rows)
    host.skipped, host.problems = tuple(host.problems.values()), {}
