import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from annotate import published_read
from annotate.published_read import (
    ImportSettings,
    PublishedLayoutError,
    base_name,
    open_label_files,
    parse_label_file,
    tail_of_zero_logits,
)
from tokenlabels.tars import TarError, TarReader, scan_tar

KINDS = ("folder", ".tar", ".zip")


def published_tensor(seed: int = 0, grid: tuple[int, int] = (4, 4)) -> torch.Tensor:
    """A map as the published generator makes it: top 5 of dense logits, stacked as fp16, axes moved by a view."""
    logits = 4 * torch.randn(*grid, 1000, generator=torch.Generator().manual_seed(seed))
    scores, ids = logits.topk(5)
    return torch.stack([scores.half(), ids.half()]).permute(0, 3, 1, 2)


def changed(**values: float) -> torch.Tensor:
    """A map with another score or id at one place."""
    tensor = published_tensor().clone()
    for plane, value in values.items():
        tensor[0 if plane == "score" else 1, 1, 2, 3] = value
    return tensor


def saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def pack(files: dict[str, bytes], folder: Path, kind: str) -> Path:
    """The files as a folder tree, tar or zip."""
    path = folder / ("labels" if kind == "folder" else f"labels{kind}")
    if kind == ".tar":
        with tarfile.open(path, "w") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    elif kind == ".zip":
        with zipfile.ZipFile(path, "w") as zipped:
            for name, data in files.items():
                zipped.writestr(name, data)
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def test_a_file_is_its_tensor_with_classes_last() -> None:
    tensor = published_tensor(grid=(2, 3))
    parsed = parse_label_file(saved(tensor), "x.pt", ImportSettings())
    assert parsed.scores.dtype == np.float16
    assert parsed.classes.dtype == np.int64
    for row, column, rank in np.ndindex(2, 3, 5):
        assert parsed.scores[row, column, rank] == tensor[0, rank, row, column].item()
        assert parsed.classes[row, column, rank] == tensor[1, rank, row, column].item()


def test_columns_first_is_transposed() -> None:
    tensor = published_tensor(grid=(2, 3))
    expected = parse_label_file(saved(tensor), "x.pt", ImportSettings())
    parsed = parse_label_file(saved(tensor.transpose(2, 3).contiguous()), "x.pt", ImportSettings(axes="wh"))
    assert np.array_equal(parsed.scores, expected.scores)
    assert np.array_equal(parsed.classes, expected.classes)


def test_files_of_old_torch_are_read() -> None:
    data = saved(published_tensor(), _use_new_zipfile_serialization=False)
    assert parse_label_file(data, "x.pt", ImportSettings()).scores.shape == (4, 4, 5)


@given(st.permutations(range(5)), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_unsorted_cells_are_sorted_with_their_ids(order: list[int], seed: int) -> None:
    tensor = published_tensor(seed)
    parsed = parse_label_file(saved(tensor[:, order]), "x.pt", ImportSettings())
    pairs = np.stack([parsed.scores, parsed.classes], axis=-1)
    for row, column in np.ndindex(4, 4):
        assert sorted(pairs[row, column].tolist()) == sorted(tensor[:, :, row, column].T.tolist())
        assert np.all(np.diff(parsed.scores[row, column].astype(np.float32)) <= 0)


def test_equal_scores_keep_their_order() -> None:
    both = torch.tensor([[[[1, 3, 3, 3, 2]]], [[[9, 8, 1, 5, 0]]]], dtype=torch.float16).permute(0, 3, 1, 2)
    parsed = parse_label_file(saved(both), "x.pt", ImportSettings())
    assert parsed.scores.tolist() == [[[3, 3, 3, 2, 1]]]
    assert parsed.classes.tolist() == [[[8, 1, 5, 0, 9]]]


def test_the_largest_exact_id_is_let_through() -> None:
    parsed = parse_label_file(saved(changed(id=2048)), "x.pt", ImportSettings(num_classes=2049))
    assert parsed.classes.max() == 2048


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a tensor file"),
    "text": (b"<html>quota exceeded</html>", "not a tensor file"),
    "truncated": (saved(published_tensor())[:700], "not a tensor file"),
    "code": (pickle.dumps(_Harmful()), "not a tensor file"),
    "code in a tensor file": (saved(_Harmful()), "not a tensor file"),
    "dictionary": (saved({"scores": published_tensor()}), "holds a dict"),
    "float32": (saved(published_tensor().float()), r"torch.float32 \[2, 5, 4, 4\]"),
    "scores alone": (saved(published_tensor()[:1]), r"torch.float16 \[1, 5, 4, 4\]"),
    "flat": (saved(published_tensor().flatten(2)), r"torch.float16 \[2, 5, 16\]"),
    "no cells": (saved(published_tensor()[..., :0]), r"torch.float16 \[2, 5, 4, 0\]"),
    "NaN score": (saved(changed(score=float("nan"))), "a score is not finite"),
    "infinite score": (saved(changed(score=float("inf"))), "a score is not finite"),
    "NaN id": (saved(changed(id=float("nan"))), "class id nan"),
    "negative id": (saved(changed(id=-1)), "class id -1 .* are there really 1000 classes"),
    "fractional id": (saved(changed(id=3.5)), "class id 3.5 is not a whole number in 0..999"),
    "id of no class": (saved(changed(id=1000)), "class id 1000 is not a whole number in 0..999"),
    "rounded id": (saved(changed(id=2050)), "class id 2050 .* lost already"),
    "class twice": (saved(changed(id=float(published_tensor()[1, 0, 2, 3]))), "names a class twice"),
}


@pytest.mark.parametrize(("data", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_says_its_name_and_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(PublishedLayoutError, match=rf"^labels: x/a\.pt: .*{message}"):
        parse_label_file(data, "labels: x/a.pt", ImportSettings())


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([0, 1, 7, 994]), st.floats(-30, 60000))
@settings(max_examples=50, deadline=None)
def test_tail_is_the_mass_of_zero_logits(seed: int, k: int, num_absent: int, offset: float) -> None:
    scores = (np.random.default_rng(seed).normal(0, 8, (3, k)) + offset).astype(np.float16)
    dense = np.concatenate([scores.astype(np.float64), np.zeros((3, num_absent))], axis=1)
    exponentials = np.exp(dense - dense.max(axis=1, keepdims=True))
    expected = exponentials[:, k:].sum(axis=1) / exponentials.sum(axis=1)
    tail = tail_of_zero_logits(scores, k + num_absent)
    assert tail.dtype == np.float16
    assert tail == pytest.approx(expected, rel=1e-3, abs=1e-7)


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "axes": ({"axes": "xy"}, "hw or wh, got 'xy'"),
    "view": ({"view": "letterbox"}, "center or squash, got 'letterbox'"),
    "no crop": ({"crop_pct": 0.0}, "above 0 and at most 1"),
    "large crop": ({"crop_pct": 1.1}, "above 0 and at most 1"),
    "crop of the whole": ({"crop_pct": 0.9, "view": "squash"}, "no meaning for view squash"),
    "no classes": ({"num_classes": 0}, "at least 1"),
}


@pytest.mark.parametrize(("options", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_settings_say_what_they_allow(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImportSettings(**options)


BASE_NAMES = {"a/b/c.pt": "c", "c.pt": "c", "c": "c", "a.b/c.d.pt": "c", "a/.c.pt": "", "a/": ""}


@pytest.mark.parametrize(("path", "base"), BASE_NAMES.items(), ids=BASE_NAMES.keys())
def test_base_names_end_at_the_first_dot(path: str, base: str) -> None:
    assert base_name(path) == base


@pytest.mark.parametrize("kind", KINDS)
def test_label_files_are_found_and_others_left_alone(kind: str, tmp_path: Path) -> None:
    ignored = {"__MACOSX/l/._a.pt": b"x", "l/readme.txt": b"x", "l/c.pt.bak": b"x", "l/pt": b"x"}
    files = {"l/a.pt": saved(published_tensor(0)), "b.PT": saved(published_tensor(1))}
    with open_label_files(pack(ignored | files, tmp_path, kind)) as found:
        assert sorted(found) == ["a", "b"]
        assert len(found) == 2
        assert "a" in found
        assert "c" not in found
        assert found.name("a") == f"{found.archive}: l/a.pt"
        for seed, base in enumerate("ab"):
            expected = parse_label_file(saved(published_tensor(seed)), base, ImportSettings())
            assert np.array_equal(found.load(base, ImportSettings()).scores, expected.scores)


def test_one_set_of_files_has_one_digest(tmp_path: Path) -> None:
    def digest(files: dict[str, bytes], kind: str) -> str:
        with open_label_files(pack(files, tmp_path, kind)) as found:
            return found.digest()

    files = {"x/a.pt": b"1", "x/b.pt": b"22"}
    digests = {digest(files, kind) for kind in KINDS}
    assert digests == {digest(dict(reversed(files.items())), ".tar")}
    assert digest({"x/a.pt": b"1", "x/b.pt": b"333"}, ".tar") not in digests
    assert digest({"x/a.pt": b"1", "x/c.pt": b"22"}, ".tar") not in digests


@pytest.mark.parametrize("kind", KINDS)
def test_two_files_of_one_name_are_refused(kind: str, tmp_path: Path) -> None:
    archive = pack({"cats/1.pt": b"x", "dogs/1.pt": b"y"}, tmp_path, kind)
    with pytest.raises(PublishedLayoutError, match=r"named '1': cats/1\.pt and dogs/1\.pt"), open_label_files(archive):
        pass


def test_links_are_followed_and_circles_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.pt").write_bytes(b"x")
    archive = pack({"a.pt": b"x"}, tmp_path, "folder")
    (archive / "linked").symlink_to(tmp_path / "elsewhere")
    with open_label_files(archive) as found:
        assert sorted(found) == ["a", "b"]
    (archive / "circle").symlink_to(archive)
    with pytest.raises(PublishedLayoutError, match=r"named 'a': a\.pt and circle/a\.pt"), open_label_files(archive):
        pass


def test_archives_say_what_is_wrong_with_them(tmp_path: Path) -> None:
    (tmp_path / "labels.tar.gz").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    cases: dict[str, tuple[type[Exception], str]] = {
        "nowhere.tar": (FileNotFoundError, r"nowhere\.tar: no such file"),
        "labels.tar.gz": (PublishedLayoutError, r"decompress a \.tar\.gz first"),
        "empty": (PublishedLayoutError, r"empty: no \.pt files"),
        "labels.tar": (TarError, r"labels\.tar: truncated"),
        "labels.zip": (PublishedLayoutError, r"labels\.zip: not a whole zip .* download"),
    }
    for kind in (".tar", ".zip"):
        whole = pack({f"{name}.pt": saved(published_tensor()) for name in "ab"}, tmp_path, kind)
        whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 3])
    for name, (error, message) in cases.items():
        with pytest.raises(error, match=message), open_label_files(tmp_path / name):
            pass


def test_a_flipped_bit_in_a_zip_is_named(tmp_path: Path) -> None:
    archive = pack({"x/a.pt": saved(published_tensor())}, tmp_path, ".zip")
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)
    with (
        open_label_files(archive) as found,
        pytest.raises(PublishedLayoutError, match=r"x/a\.pt: cannot be unpacked"),
    ):
        found.load("a", ImportSettings())


def test_a_tar_is_scanned_once_and_files_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans: list[str] = []
    sizes: list[int] = []

    class CountingReader(TarReader):
        def read(self, member: Any) -> bytes:
            sizes.append(member.size)
            return super().read(member)

    def counting_scan(path: str) -> Any:
        scans.append(path)
        return scan_tar(path)

    monkeypatch.setattr(published_read, "TarReader", CountingReader)
    monkeypatch.setattr(published_read, "scan_tar", counting_scan)
    data = {f"{name}.pt": saved(published_tensor(seed)) for seed, name in enumerate("abcdef")}
    with open_label_files(pack(data, tmp_path, ".tar")) as found:
        for base in "fadbce":
            found.load(base, ImportSettings())
    assert len(scans) == 1
    assert sizes == [len(data[f"{base}.pt"]) for base in "fadbce"]
