"""Which labelled images `tokenlabels show LABELS` draws, found through the label set."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import TYPE_CHECKING

from tokenlabels.nearest import nearest_keys

if TYPE_CHECKING:
    from tokenlabels.images import EncodedImage, ImageShard
    from tokenlabels.store import LabelStore, ShardReader
    from tokenlabels.types import ScoreMap


@dataclass(frozen=True, eq=False)
class LabelledSample:
    """An encoded image without problems, its map, and the tar or folder that it is from."""

    score_map: "ScoreMap"
    image: "EncodedImage"
    path: str


def find_labelled(
    store: "LabelStore",
    patterns: Sequence[str],
    keys: Sequence[str],
    num: int | None,
    on_shard: Callable[[str], None],
) -> list[LabelledSample]:
    """The samples of the keys in their order; without keys the first of every shard, then the second ones.

    Keys are looked for in the labels, shard by shard until all are found; only the tars that they are in are opened.

    Args:
        store: the labels.
        patterns: the images, as `tokenlabels annotate` takes them.
        keys: of images.
        num: how many without keys; None is one.
        on_shard: told the stem of every shard whose keys are read.

    Raises:
        ValueError: no images are named or found, they are not those of the labels, a key has no labels or no image,
            or a map or an image cannot be used. The message says which.
    """
    from tokenlabels.images import find_shards

    if not patterns:
        raise ValueError("name the images that were labelled: --images 'imagenet1k-train-{0000..1023}.tar'")
    if keys and num is not None:
        raise ValueError("give keys or a number of images: --num is for those that are not named")
    sources = {shard.stem: shard for shard in find_shards(patterns)}
    given = [shard for shard in store.shards if shard.stem in sources]
    if not given:
        ours = ", ".join(tar for tar in store.info.tars[:3]) or "nothing"
        raise ValueError(
            f"{store.path} has no labels of {', '.join(list(sources)[:3])}: it was made of {ours}"
            f"{' and others' if len(store.info.tars) > 3 else ''}; give its own images, or the labels of these"
        )
    if keys:
        found = _places_of(given, keys, on_shard)
        for key in keys:
            if key not in found:
                raise _missing(store, sources, key)
        places = [found[key] for key in keys]
    else:
        places = list(islice(_in_turn(given), num or 1))
        if not places:
            raise ValueError(f"{store.path} has no labels for any of these images")
    return [_read(sources[shard.stem], shard, row) for shard, row in places]


def _places_of(
    shards: "Sequence[ShardReader]", keys: Sequence[str], on_shard: Callable[[str], None]
) -> "dict[str, tuple[ShardReader, int]]":
    """Shard and row of the keys, as far as they are in these shards; of a key that is in several, the first."""
    wanted, found = set(keys), {}
    for shard in shards:
        on_shard(shard.stem)
        for key in wanted.intersection(shard.keys):
            found[key] = shard, shard.keys.index(key)
        wanted -= found.keys()
        if not wanted:
            break
    return found


def _in_turn(shards: "Sequence[ShardReader]") -> "Iterator[tuple[ShardReader, int]]":
    for rows in zip_longest(*(range(len(shard)) for shard in shards)):
        yield from ((shard, row) for shard, row in zip(shards, rows, strict=True) if row is not None)


def _read(source: "ImageShard", shard: "ShardReader", row: int) -> LabelledSample:
    from tokenlabels.audit.measures import broken_maps
    from tokenlabels.types import ScoreMaps

    score_map = shard.row(row)
    key = score_map.key
    alone = ScoreMaps(
        (key,), score_map.scores[None], score_map.classes[None], score_map.tail[None], score_map.view[None]
    )
    if broken_maps(alone, shard.info.num_classes)[0]:
        raise ValueError(
            f"the labels of {key!r} in {shard.path} are broken; `tokenlabels verify` says what else is, and "
            f"`annotate` makes the shard again without {shard.path.name}"
        )
    if key not in set(source.keys()):
        raise ValueError(
            f"{source.path} has no image {key!r}, though the labels {shard.path} have it; give the images that were "
            "labelled"
        )
    image = next(source.read([key]))
    if image.problem is not None:
        raise ValueError(f"{source.path}: sample {key!r}: {image.problem}")
    return LabelledSample(score_map, image, source.path)


def _missing(store: "LabelStore", sources: "dict[str, ImageShard]", key: str) -> ValueError:
    """What is wrong with a key that the labels of the given images do not have."""
    for shard in store.shards:
        reasons = [skipped.reason for skipped in shard.manifest.skipped if skipped.key == key]
        if reasons:
            return ValueError(f"{key!r} of {shard.stem} has no labels, as it was skipped: {reasons[0]}")
    for shard in store.shards:
        if shard.stem not in sources and key in shard.keys:
            return ValueError(f"{key!r} is an image of {shard.manifest.source.name}; name that too: --images")
    labelled = {shard.stem for shard in store.shards}
    for stem, source in sources.items():
        if key in set(source.keys()):
            why = "they were made of other images" if stem in labelled else f"{store.path} has none of that shard yet"
            return ValueError(f"{key!r} of {source.path} has no labels: {why}; run `tokenlabels annotate`")
    nearest = nearest_keys(key, store)
    return ValueError(f"neither labels nor images have the key {key!r}; near it are {', '.join(nearest) or 'none'}")
