"""What every source of images gives: shards of samples, each an encoded image or the reason why there is none."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EncodedImage:
    """One sample of a shard.

    Attributes:
        key: WebDataset key, or path in the tree without its suffix.
        data: the encoded image, or None if there is a problem.
        label: class index, or None where the source has none.
        problem: why there is no data, on one line; None if there is.
    """

    key: str
    data: bytes | None
    label: int | None
    problem: str | None

    def __post_init__(self) -> None:
        assert (self.data is None) == (self.problem is not None), "an image has either data or a problem"


@dataclass(frozen=True)
class SourceInfo:
    """Where the images of a shard come from.

    Attributes:
        name, size_bytes, num_ignored: as in `ImageShard`.
        num_samples: images with and without problems.
    """

    name: str
    size_bytes: int
    num_samples: int
    num_ignored: int


class ImageShard(ABC):
    """Images that become one group of labels. Picklable, and lazy: nothing is read before it is asked for."""

    path: str
    """Tar or class folder, for messages."""

    @property
    @abstractmethod
    def stem(self) -> str:
        """Names the label group and its manifest; unique among the shards of a run."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Names the source in reports: file name of the tar, or stem of the part of a tree."""

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """Of the tar, or of all image files together; known without reading them."""

    @property
    @abstractmethod
    def num_ignored(self) -> int:
        """Files that belong to no sample: hidden, without extension, or in a tree not an image by suffix."""

    @abstractmethod
    def keys(self) -> list[str]:
        """The keys of all samples, in the order of the shard."""

    @abstractmethod
    def read(self, keys: Sequence[str]) -> Iterator[EncodedImage]:
        """The samples of these keys, in this order.

        Raises:
            ValueError: the shard has no such key.
        """

    @property
    def source(self) -> SourceInfo:
        """All of this in one; reads the headers of a tar."""
        return SourceInfo(self.name, self.size_bytes, len(self.keys()), self.num_ignored)

    def images(self) -> Iterator[EncodedImage]:
        """All samples, in the order of the shard."""
        return self.read(self.keys())

    def _unknown(self, key: str) -> ValueError:
        return ValueError(f"{self.path}: no sample with the key {key!r}")
