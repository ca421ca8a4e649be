"""What a loader says of its speed, and where the time goes."""

import time
from dataclasses import dataclass, field


@dataclass
class LoaderStats:
    """Counted over the newest pass of a loader; all zeros before the first.

    Attributes:
        num_images, num_batches: handed out.
        num_skipped: samples that were left out because they could not be used.
        seconds: of the pass so far, or of all of it when it is over.
        read_seconds, decode_seconds: of all threads together; reading waits for the disk, decoding includes the crop.
        wait_seconds: the training loop waited so long for images. Near `seconds`, it waits for the loader alone.
        device_seconds: the host spent so long on the device's part (on a GPU, on queueing it).
        queue_depth: batches that were ready when the newest was asked for, from 0 to prefetch + 1. Near 0, the loader
            is the bottleneck.
    """

    num_images: int = 0
    num_batches: int = 0
    num_skipped: int = 0
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    wait_seconds: float = 0.0
    device_seconds: float = 0.0
    queue_depth: int = 0
    _started: float | None = field(default=None, repr=False)
    _stopped: float | None = field(default=None, repr=False)

    def start(self) -> None:
        """The pass begins."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """It is over or given up: what the training loop does next is no part of it."""
        self._stopped = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the pass began, until it was over."""
        if self._started is None:
            return 0.0
        stopped = self._stopped
        return (time.perf_counter() if stopped is None else stopped) - self._started

    @property
    def images_per_second(self) -> float:
        """Handed out, over the whole pass."""
        seconds = self.seconds
        return self.num_images / seconds if seconds else 0.0

    def __str__(self) -> str:
        return (
            f"{self.num_images} images in {self.num_batches} batches and {self.seconds:.1f} s, "
            f"{self.images_per_second:.0f} images/s, "
            f"{self.num_skipped} skipped; threads: read {self.read_seconds:.1f} s, decode {self.decode_seconds:.1f} s; "
            f"waited {self.wait_seconds:.1f} s, device {self.device_seconds:.1f} s, {self.queue_depth} batches ready"
        )
