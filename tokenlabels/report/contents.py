"""All that the page says, gathered from a label set, its audit, and a gallery of its images."""

from collections import Counter
from dataclasses import dataclass

from tokenlabels.audit.audit import Audit
from tokenlabels.audit.boxes import Localisation
from tokenlabels.audit.classes import ClassAudit, Confusion
from tokenlabels.audit.findings import KINDS, Finding
from tokenlabels.report.gallery import Gallery
from tokenlabels.report.histograms import Histogram, histograms
from tokenlabels.report.sample import MULTI_OBJECT, REASONS
from tokenlabels.store import LabelSet, LabelStore

NUM_LISTED = 50
"""Findings of every kind, and images without labels, that the page names."""
NUM_CONFUSIONS = 200
"""Pairs of classes that the page names."""


@dataclass(frozen=True)
class Skipped:
    """An image that has no labels, and why."""

    key: str
    shard: str
    reason: str


@dataclass(frozen=True)
class Description:
    """What a label set is.

    Attributes:
        name: of its folder and the one above.
        info: what labels.json says.
        num_images, num_shards: with labels.
        missing: tars that have no labels yet.
        num_skipped: images that could not be labelled; `skipped` names the first `NUM_LISTED`.
        size_bytes: of all shards.
        versions: of the software; several where shards were made by different ones.
    """

    name: str
    info: LabelSet
    num_images: int
    num_shards: int
    missing: tuple[str, ...]
    num_skipped: int
    skipped: tuple[Skipped, ...]
    size_bytes: int
    versions: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class KindOfFinding:
    """Findings of one kind.

    Attributes:
        kind, meaning: see `tokenlabels.audit.findings.KINDS`.
        count: of all of them, or None where they could not be looked for.
        listed: the worst `NUM_LISTED`.
    """

    kind: str
    meaning: str
    count: int | None
    listed: tuple[Finding, ...]


@dataclass(frozen=True)
class Row:
    """A class of the table, and how many images of the gallery show it."""

    audit: ClassAudit
    num_shown: int


@dataclass(frozen=True)
class Contents:
    """All that the page says.

    Attributes:
        description: of the set.
        num_labelled: images with a usable map whose data set gives a class.
        num_agreeing: those of them whose most probable class it is.
        num_multi_object: images with several objects.
        num_broken: images whose maps cannot be used; they are in no other number but `description`'s.
        histograms: over all images but the broken ones.
        localisation: against boxes, or None without any.
        findings: every kind.
        is_usable: whether nothing was found that makes the labels unfit to train with.
        classes: those that an image has or a map predicts.
        num_unseen: all other ones.
        num_pairs: of different classes that were taken for each other; `confusions` are the most frequent
            `NUM_CONFUSIONS`.
        gallery: images worth a look.
        reasons: how many of them were chosen for which reason, in the order of `REASONS`.
        names: of all classes.
    """

    description: Description
    num_labelled: int
    num_agreeing: int
    num_multi_object: int
    num_broken: int
    histograms: tuple[Histogram, ...]
    localisation: Localisation | None
    findings: tuple[KindOfFinding, ...]
    is_usable: bool
    classes: tuple[Row, ...]
    num_unseen: int
    confusions: tuple[Confusion, ...]
    num_pairs: int
    gallery: Gallery
    reasons: dict[str, int]
    names: tuple[str, ...]


def contents_of(store: LabelStore, audit: Audit, gallery: Gallery, names: tuple[str, ...]) -> Contents:
    """Gather the contents; reads no map."""
    measures = audit.measures
    shown = Counter(class_id for item in gallery.items for class_id in item.shows)
    seen = [known for known in audit.classes if known.num_images or known.num_predicted]
    reasons = Counter(reason for item in gallery.items for reason in item.reasons)
    return Contents(
        description=_describe(store),
        num_labelled=int(measures.is_labelled.sum()),
        num_agreeing=int(measures.agrees.sum()),
        num_multi_object=int((measures.num_objects[~measures.is_broken] >= MULTI_OBJECT).sum()),
        num_broken=int(measures.is_broken.sum()),
        histograms=histograms(measures),
        localisation=audit.localisation,
        findings=tuple(_of_kind(audit, kind) for kind in KINDS),
        is_usable=audit.is_usable,
        classes=tuple(Row(known, shown[known.class_id]) for known in seen),
        num_unseen=len(names) - len(seen),
        confusions=audit.confusions[:NUM_CONFUSIONS],
        num_pairs=len(audit.confusions),
        gallery=gallery,
        reasons={reason: reasons[reason] for reason in REASONS},
        names=names,
    )


def _describe(store: LabelStore) -> Description:
    skipped = [
        Skipped(record.key, shard.stem, record.reason) for shard in store.shards for record in shard.manifest.skipped
    ]
    versions = {tuple(sorted(shard.attributes.versions.items())) for shard in store.shards}
    return Description(
        name="/".join(store.path.resolve().parts[-2:]),
        info=store.info,
        num_images=len(store),
        num_shards=len(store.shards),
        missing=store.missing,
        num_skipped=len(skipped),
        skipped=tuple(skipped[:NUM_LISTED]),
        size_bytes=sum(shard.manifest.size_bytes for shard in store.shards),
        versions=tuple(dict(found) for found in sorted(versions)),
    )


def _of_kind(audit: Audit, kind: str) -> KindOfFinding:
    listed = [finding for finding in audit.findings if finding.kind == kind]
    return KindOfFinding(kind, KINDS[kind], audit.counts[kind], tuple(listed[:NUM_LISTED]))
