"""What `tokenlabels audit` and `tokenlabels compare` print: pages for people, JSON for machines."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from tokenlabels.audit.audit import Audit
from tokenlabels.audit.classes import ClassAudit
from tokenlabels.audit.compare import Comparison
from tokenlabels.audit.findings import IDENTICAL_IMAGES, KINDS
from tokenlabels.store import LabelStore

_NUM_CLASSES = 10


def audit_page(audit: Audit, store: LabelStore, num: int) -> Group:
    """Everything that was counted, and `num` rows of every list."""
    measures = audit.measures
    parts: list[RenderableType] = [f"{escape(str(store.path))}: {len(measures):,} maps in {len(audit.shards)} shards"]
    parts += _unfinished(store)
    if audit.agreement is None:
        parts.append("the data set's own classes are not known (--images)")
    else:
        num_labelled, num_agreeing = int(measures.is_labelled.sum()), int(measures.agrees.sum())
        parts.append(
            f"most probable class: the data set's own in {num_agreeing:,} of {num_labelled:,} ({audit.agreement:.1%})"
        )
    if (found := audit.localisation) is not None:
        parts.append(
            f"boxes of {found.num_boxed:,} images: pointing game {_percent(found.hit_share)}, mass inside "
            f"{_percent(found.mass_inside)}; a map that knows no place has {_percent(found.cells_inside)} of both"
        )
    counts = [(kind, _number(kind, count), KINDS[kind]) for kind, count in audit.counts.items()]
    parts.append(_table("Findings", ("kind", "number", "meaning"), counts))
    for kind, count in audit.counts.items():
        listed = [finding for finding in audit.findings if finding.kind == kind]
        if listed:
            rest = f", {len(listed):,} of {count:,}" if count is not None and len(listed) < count else ""
            is_of_classes = listed[0].key == ""
            rows = [(one.detail,) if is_of_classes else (one.shard, one.key, one.detail) for one in listed]
            columns = ("found",) if is_of_classes else ("shard", "key", "found")
            parts.append(_table(f"{kind}{rest}", columns, rows))
    return Group(*parts, *_class_tables(audit, num))


def _class_tables(audit: Audit, num: int) -> Iterable[RenderableType]:
    names = [known.name for known in audit.classes]
    present = [known for known in audit.classes if known.agreement is not None]
    seldom = sorted(present, key=lambda known: known.agreement or 0.0)[:num]
    if seldom:
        title = f"Classes that agree least, {len(seldom)} of {len(present):,}"
        headings: Sequence[str] = ("class", "images", "agree", "predicted", "own mass", "pointing game", "mass inside")
        yield _table(title, headings, map(_class_row, seldom))
    if pairs := audit.confusions[:num]:
        title = f"Classes taken for others, {len(pairs)} of {len(audit.confusions):,} pairs"
        headings = ("the data set's class", "predicted", "images", "of the class")
        rows = (
            (
                names[pair.label],
                names[pair.predicted],
                f"{pair.count:,}",
                _percent(pair.count / audit.classes[pair.label].num_images),
            )
            for pair in pairs
        )
        yield _table(title, headings, rows)


def _class_row(known: ClassAudit) -> Sequence[str]:
    return (
        known.name,
        f"{known.num_images:,}",
        _percent(known.agreement),
        f"{known.num_predicted:,}",
        _percent(known.own_mass),
        _percent((known.pointing_hits or 0) / known.num_boxed if known.num_boxed else None),
        _percent(known.mass_inside),
    )


def audit_json(audit: Audit, store: LabelStore) -> dict[str, Any]:
    """Plain JSON types.

    Returns:
        path; missing, the names of tars without labels yet; num_images, num_labelled, num_agreeing and agreement (null
        without labels); is_usable; counts, by kind, null for what was not looked for; findings, each with kind, key,
        shard and detail; classes, all by id, with the fields of `ClassAudit`; confusions, all, with label, label_name,
        predicted, predicted_name and count; localisation, with the fields of `Localisation`, or null without boxes.
    """
    names = [known.name for known in audit.classes]
    return {
        "path": str(store.path),
        "missing": list(store.missing),
        "num_images": len(audit.measures),
        "num_labelled": int(audit.measures.is_labelled.sum()),
        "num_agreeing": int(audit.measures.agrees.sum()),
        "agreement": audit.agreement,
        "is_usable": audit.is_usable,
        "counts": dict(audit.counts),
        "findings": [asdict(finding) for finding in audit.findings],
        "classes": [asdict(known) for known in audit.classes],
        "confusions": [
            asdict(pair) | {"label_name": names[pair.label], "predicted_name": names[pair.predicted]}
            for pair in audit.confusions
        ],
        "localisation": None if audit.localisation is None else asdict(audit.localisation),
    }


def comparison_page(comparison: Comparison, first: LabelStore, second: LabelStore, num: int) -> Group:
    """Numbers over all images, the classes that agree least, and the `num` most different images."""
    summary = comparison_json(comparison, first, second, num)
    rows, columns = comparison.grid
    common = f"{len(comparison.keys):,} images compared"
    alone = f"{comparison.num_only_first:,} only in A, {comparison.num_only_second:,} only in B"
    agreement = f"the same leading class at {_percent(summary['agreement'])} of the points"
    parts: list[RenderableType] = [
        f"A {escape(str(first.path))}, B {escape(str(second.path))}: {common}, {alone}",
        f"{agreement}, the centres of {rows} x {columns} cells",
    ]
    if summary["variation"] is not None:
        parts.append(
            "total variation of the mean distributions over what each map covers: "
            f"{summary['variation']:.3f} on average, 0..1{_caveat(first, second)}"
        )
    parts += [*_unfinished(first, "A "), *_unfinished(second, "B ")]
    if comparison.num_broken or comparison.num_apart:
        parts.append(
            f"not compared: {comparison.num_broken:,} with broken maps, {comparison.num_apart:,} whose maps cover no "
            "common point"
        )
    led = [known for known in comparison.classes if known.agreement is not None]
    least = sorted(led, key=lambda known: known.agreement or 0.0)[:_NUM_CLASSES]
    of_classes = [
        (k.name, _percent(k.agreement), f"{k.num_both:,}", f"{k.num_first:,}", f"{k.num_second:,}") for k in least
    ]
    headings = ("class", "agree", "points of both", "points of A", "points of B")
    parts.append(_table(f"Classes that agree least, {len(least)} of {len(led):,}", headings, of_classes))
    images = [(one["key"], _percent(one["agreement"]), f"{one['variation']:.3f}") for one in summary["most_different"]]
    heading = f"Most different images, {len(images)} of {len(comparison.keys):,}"
    parts.append(_table(heading, ("key", "agree", "variation"), images))
    return Group(*parts)


def comparison_json(comparison: Comparison, first: LabelStore, second: LabelStore, num: int) -> dict[str, Any]:
    """Plain JSON types.

    Returns:
        first and second, paths; missing, the names of tars without labels yet, of first and of second;
        num_compared, num_only_first, num_only_second, num_broken and num_apart; grid of the
        points; agreement and variation, means over the compared images, null without; classes, all by id, with the
        fields of `ClassComparison` and agreement; most_different, each with key, agreement and variation.
    """
    return {
        "first": str(first.path),
        "second": str(second.path),
        "missing": {"first": list(first.missing), "second": list(second.missing)},
        "num_compared": len(comparison.keys),
        "num_only_first": comparison.num_only_first,
        "num_only_second": comparison.num_only_second,
        "num_broken": comparison.num_broken,
        "num_apart": comparison.num_apart,
        "grid": list(comparison.grid),
        "agreement": float(np.mean(comparison.agreement)) if comparison.keys else None,
        "variation": float(np.mean(comparison.variation)) if comparison.keys else None,
        "classes": [asdict(known) | {"agreement": known.agreement} for known in comparison.classes],
        "most_different": [
            {
                "key": comparison.keys[row],
                "agreement": float(comparison.agreement[row]),
                "variation": float(comparison.variation[row]),
            }
            for row in comparison.most_different(num)
        ],
    }


def _unfinished(store: LabelStore, which: str = "") -> list[str]:
    if not store.missing:
        return []
    return [f"{which}not finished: {len(store.missing):,} of {len(store.info.tars):,} shards have no labels yet"]


def _number(kind: str, count: int | None) -> str:
    if count is not None:
        return f"{count:,}"
    return "not looked for (--images)" if kind == IDENTICAL_IMAGES else "not looked for (--images with classes)"


def _caveat(first: LabelStore, second: LabelStore) -> str:
    """What else than the teachers' opinions makes distributions differ."""
    reasons = []
    if first.info.resize != second.info.resize:
        reasons.append(f"the maps cover different parts (resize {first.info.resize}, {second.info.resize})")
    if first.info.k != second.info.k:
        reasons.append(f"the tails hold different numbers of classes (k {first.info.k}, {second.info.k})")
    return f"; part of it may be that {' and that '.join(reasons)}" if reasons else ""


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Group:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold", header_style="dim")
    for row in rows:
        table.add_row(*(escape(text) for text in row))
    return Group(f"\n[bold]{escape(title)}[/]", table)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
