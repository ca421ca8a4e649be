import io
import pickle
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from tokenlabels.tars import MAX_END_BYTES, Member, TarError, TarIndex, TarReader, scan_tar

BLOCK = tarfile.BLOCKSIZE
SAMPLES = {
    "a": {"jpg": b"first image", "cls": b"3"},
    "b": {"jpg": b"i" * 700, "cls": b"11", "json": b"{}"},
    "c": {"jpg": b"", "cls": b"0"},
}
FILES = [(f"{key}.{ext}", data) for key, files in SAMPLES.items() for ext, data in files.items()]
FORMATS = [
    pytest.param(tarfile.USTAR_FORMAT, id="ustar"),
    pytest.param(tarfile.GNU_FORMAT, id="gnu"),
    pytest.param(tarfile.PAX_FORMAT, id="pax"),
]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, **fields: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    info.linkname = fields.get("linkname", "")
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def file_entry(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + padded(data)


def pax_entry(records: bytes) -> bytes:
    return header("pax", len(records), tarfile.XHDTYPE) + padded(records)


END = bytes(2 * BLOCK)
ENTRY_A = file_entry("a.jpg", b"image")


def write(folder: Path, content: bytes) -> str:
    path = folder / "t.tar"
    path.write_bytes(content)
    return str(path)


def tar_bytes(files: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def contents(index: TarIndex) -> dict[str, dict[str, bytes]]:
    with TarReader(index) as reader:
        return {
            sample.key: {ext: reader.read(member) for ext, member in sample.members.items()} for sample in index.samples
        }


def webdataset_contents(path: str) -> dict[str, dict[str, bytes]]:
    """The slow twin: WebDataset itself."""

    def streams() -> Iterator[dict[str, object]]:
        with Path(path).open("rb") as stream:
            yield {"url": path, "stream": stream}

    return {
        sample["__key__"]: {ext: data for ext, data in sample.items() if not ext.startswith("__")}
        for sample in group_by_keys(tar_file_expander(streams()))
    }


@pytest.mark.parametrize("tar_format", FORMATS)
def test_finds_all_members(tar_format: int, tmp_path: Path) -> None:
    path = write(tmp_path, tar_bytes(FILES, tar_format))
    index = scan_tar(path)
    assert (index.path, index.size_bytes, index.ignored) == (path, Path(path).stat().st_size, ())
    assert contents(index) == SAMPLES
    assert pickle.loads(pickle.dumps(index)) == index


@pytest.mark.parametrize("tar_format", FORMATS[1:])
@pytest.mark.parametrize("name", ["d" * 90 + "/" + "k" * 120, "kätze-猫", "k" * 100], ids=["long", "unicode", "100"])
def test_long_and_unicode_names(tar_format: int, name: str, tmp_path: Path) -> None:
    path = write(tmp_path, tar_bytes([(f"{name}.jpg", b"x"), (f"{name}.cls", b"1")], tar_format))
    assert contents(scan_tar(path)) == {name: {"jpg": b"x", "cls": b"1"}} == webdataset_contents(path)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["x/a.b/c.d.jpg", "x/a.b/c.cls"], id="first-dot-of-base-name"),
        pytest.param(["./a.jpg", "./a.cls", "b.jpg"], id="leading-dot-folder"),
        pytest.param(["a.JPG", "a.Cls"], id="upper-case"),
        pytest.param(["a.jpg", "a.", "a.seg.png"], id="empty-and-double-extension"),
        pytest.param(["a.jpg", "README", "x.y/plain", "a.cls"], id="no-dot"),
        pytest.param([".hidden.jpg", "._a.jpg", "a.jpg"], id="hidden"),
        pytest.param(["__meta__", "__meta__/x.json", "__m.x__", "a.jpg", "d/__n__.jpg"], id="meta"),
    ],
)
def test_keys_and_extensions_are_those_of_webdataset(names: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, tar_bytes([(name, name.encode()) for name in names]))
    index = scan_tar(path)
    assert contents(index) == webdataset_contents(path)
    kept = {data.decode() for files in contents(index).values() for data in files.values()}
    assert sorted(index.ignored) == sorted(set(names) - kept)


def test_hidden_files_in_folders_are_ignored(tmp_path: Path) -> None:
    """WebDataset makes samples named like the folder of them, with the key returning after every other one."""
    path = write(tmp_path, tar_bytes([(name, b"x") for name in ("d/._a.jpg", "d/a.jpg", "d/._b.jpg", "d/b.jpg")]))
    index = scan_tar(path)
    assert [sample.key for sample in index.samples] == ["d/a", "d/b"]
    assert index.ignored == ("d/._a.jpg", "d/._b.jpg")


def test_directories_are_not_samples(tmp_path: Path) -> None:
    path = write(tmp_path, header("d.ir/", 0, tarfile.DIRTYPE) + file_entry("d.ir/a.jpg", b"x") + END)
    assert contents(scan_tar(path)) == {"d.ir/a": {"jpg": b"x"}}
    assert scan_tar(path).ignored == ()


def test_one_block_of_zeros_and_a_full_record_are_ends(tmp_path: Path) -> None:
    for num_zeros in (BLOCK, BLOCK + 1, 2 * BLOCK, MAX_END_BYTES):
        assert len(scan_tar(write(tmp_path, ENTRY_A + bytes(num_zeros))).samples) == 1


BAD_LAYOUTS = {
    "empty-file": (b"", "not a tar.*byte 0, no key before it"),
    "zeros-only": (bytes(10_240), "no sample in it"),
    "no-samples": (file_entry("README", b"x") + END, "no sample in it"),
    "not-a-tar": (b"<html>" * 500, "not a tar, or compressed"),
    "interleaved": (
        b"".join(file_entry(name, b"x") for name in ("a.jpg", "b.jpg", "a.cls")) + END,
        "interleaved: key 'a' returns after 'b'.*at byte 2048, last good key 'b'",
    ),
    "duplicate": (ENTRY_A + file_entry("a.JPG", b"y") + END, "duplicate: key 'a' has two 'jpg' files, at bytes 512"),
    "symbolic-link": (ENTRY_A + header("b.jpg", 0, tarfile.SYMTYPE, linkname="a.jpg") + END, "'b.jpg' is a link to"),
    "hard-link": (ENTRY_A + header("b.jpg", 0, tarfile.LNKTYPE, linkname="a.jpg") + END, "a link to 'a.jpg'"),
    "device": (ENTRY_A + header("b.jpg", 0, tarfile.CHRTYPE) + END, "'b.jpg' is of type b'3', not a plain file"),
    "sparse": (
        pax_entry(b"22 GNU.sparse.size=10\n") + file_entry("b.jpg", b"0123456789") + END,
        "'b.jpg' is sparse, not a plain file",
    ),
    "not-utf8": (file_entry("K\udce4.jpg", b"x") + END, "is not plain UTF-8"),
    "newline-in-name": (file_entry("a\nb.jpg", b"x") + END, "is not plain UTF-8"),
}


@pytest.mark.parametrize(("content", "message"), BAD_LAYOUTS.values(), ids=BAD_LAYOUTS.keys())
def test_refuses_with_tar_byte_and_key(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(TarError, match=rf"^\S*t\.tar: .*{message}") as caught:
        scan_tar(write(tmp_path, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_refuses_compressed_tars(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(TarError, match=r"compressed.*decompress it first"):
        scan_tar(str(path))


def with_size_field(field: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A good member, then one whose size field is replaced, its checksum made right."""
    block = bytearray(header("b.jpg", 5, kind))
    block[124:136] = field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return ENTRY_A + bytes(block) + padded(b"image") + END


def base256(number: int) -> bytes:
    first = 0xFF if number < 0 else 0x80
    return bytes([first]) + (number % 256**11).to_bytes(11, "big")


HOSTILE = {
    "negative": (with_size_field(base256(-1024)), "-1024 bytes"),
    "negative-to-itself": (with_size_field(base256(-BLOCK)), "-512 bytes"),
    "small-negative": (with_size_field(base256(-1)), "-1 bytes"),
    "huge": (with_size_field(base256(2**70)), "truncated: 'b.jpg' would end at byte"),
    "past-the-end": (with_size_field(b"00000010000\0"), "truncated: 'b.jpg' would end"),
    "not-octal": (with_size_field(b"9" * 11 + b"\0"), "damaged header"),
    "pax-negative": (ENTRY_A + pax_entry(b"13 size=-1024\n") + file_entry("b.jpg", b"x") + END, "damaged header"),
    "pax-huge": (
        ENTRY_A + pax_entry(b"33 size=9999999999999999999999999\n") + file_entry("b.jpg", b"x") + END,
        "truncated",
    ),
    "pax-longer-than-a-header": (ENTRY_A + header("p", 2**33, tarfile.XHDTYPE) + END, "extended header of 8589934592"),
    "global-size": (
        header("g", 10, tarfile.XGLTYPE) + padded(b"10 size=0\n") + ENTRY_A + file_entry("b.jpg", b"x") + END,
        "two sizes for 'a.jpg'",
    ),
    "negative-extended-header": (
        with_size_field(base256(-1024), tarfile.GNUTYPE_LONGNAME),
        "extended header of -1024 bytes",
    ),
    "sparse-that-leads-backwards": (
        pax_entry(b"22 GNU.sparse.size=10\n") + with_size_field(base256(-1024))[2 * BLOCK :],
        "is sparse",
    ),
    "name-longer-than-a-header": (ENTRY_A + header("n", 2**40, tarfile.GNUTYPE_LONGNAME) + END, "extended header of"),
    "endless-chain": (
        ENTRY_A + (header("n", BLOCK, tarfile.GNUTYPE_LONGNAME) + bytes(BLOCK)) * 3000 + END,
        "damaged header",
    ),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers_end_in_an_error(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(TarError, match=message):
        scan_tar(write(tmp_path, content))


@pytest.mark.parametrize("tar_format", FORMATS)
def test_every_truncation_is_found(tar_format: int, tmp_path: Path) -> None:
    whole = tar_bytes(FILES, tar_format)
    end = len(whole.rstrip(b"\0")) // BLOCK * BLOCK + BLOCK
    end = max(end, scan_tar(write(tmp_path, whole)).samples[-1].members["cls"].offset + BLOCK)
    for length in range(0, end + BLOCK, 64):
        with pytest.raises(TarError, match=r"t\.tar: .*\(at byte \d+, "):
            scan_tar(write(tmp_path, whole[:length]))
    for length in range(end + BLOCK, len(whole) + 1, BLOCK):
        assert len(scan_tar(write(tmp_path, whole[:length])).samples) == len(SAMPLES)


def test_damage_in_any_header_is_found_with_byte_and_last_key(tmp_path: Path) -> None:
    whole = tar_bytes(FILES)
    members = [member for sample in scan_tar(write(tmp_path, whole)).samples for member in sample.members.values()]
    keys = [name.partition(".")[0] for name, _ in FILES]
    generator = random.Random(0)
    for number, member in enumerate(members):
        start = member.offset - BLOCK
        last = f"last good key '{keys[number - 1]}'" if number else "no key before it"
        flipped = bytearray(whole)
        flipped[start + generator.randrange(148)] ^= 1 << generator.randrange(8)
        zeroed = whole[:start] + bytes(BLOCK) + whole[member.offset :]
        for damaged in (bytes(flipped), zeroed):
            with pytest.raises(TarError, match=last):
                scan_tar(write(tmp_path, damaged))
        with pytest.raises(TarError, match=f"at byte {start}, "):
            scan_tar(write(tmp_path, bytes(flipped)))


def test_data_after_the_end_is_found(tmp_path: Path) -> None:
    other = tar_bytes([("z.jpg", b"x")])
    with pytest.raises(TarError, match=r"data after the end-of-archive marker.*at byte 10240, last good key 'c'"):
        scan_tar(write(tmp_path, tar_bytes(FILES) + other))


def test_the_zeros_of_an_unfinished_download_are_found(tmp_path: Path) -> None:
    with pytest.raises(TarError, match="as an unfinished download leaves"):
        scan_tar(write(tmp_path, ENTRY_A + bytes(MAX_END_BYTES + 1)))


def test_reader_notices_another_tar(tmp_path: Path) -> None:
    index = scan_tar(write(tmp_path, tar_bytes(FILES)))
    write(tmp_path, tar_bytes(FILES) + bytes(BLOCK))
    with pytest.raises(TarError, match=r"t\.tar: the tar changed after it was scanned: it has 10752 bytes, had 10240"):
        TarReader(index).__enter__()


def test_reader_notices_a_tar_cut_under_it(tmp_path: Path) -> None:
    index = scan_tar(write(tmp_path, tar_bytes(FILES)))
    with TarReader(index) as reader, pytest.raises(TarError, match="changed after it was scanned: 5 bytes at byte"):
        reader.read(Member(index.size_bytes - 5, 10))


def test_urls_are_read_through_fsspec(tmp_path: Path) -> None:
    content = tar_bytes(FILES)
    url = f"memory://{tmp_path.name}/a.tar"
    fsspec.filesystem("memory").pipe_file(f"{tmp_path.name}/a.tar", content)
    assert contents(scan_tar(url)) == SAMPLES
    assert contents(scan_tar(f"file://{write(tmp_path, content)}")) == SAMPLES
    assert scan_tar(url).path == url


def test_a_missing_tar_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.tar"):
        scan_tar(str(tmp_path / "gone.tar"))


def test_real_imagenet_shards(imagenet_sample: Path) -> None:
    paths = sorted(imagenet_sample.glob("*.tar"))
    assert [len(scan_tar(str(path)).samples) for path in paths] == [128, 128, 100, 44]
    smallest = str(paths[-1])
    assert contents(scan_tar(smallest)) == webdataset_contents(smallest)


def test_real_tiny_imagenet_shards(tiny_imagenet: Path) -> None:
    indexes = [scan_tar(str(path)) for path in sorted(tiny_imagenet.glob("*.tar"))]
    assert sum(len(index.samples) for index in indexes) == 27_500
    assert not any(index.ignored for index in indexes)
