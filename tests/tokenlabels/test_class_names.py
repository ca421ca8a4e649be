import json
import subprocess
import sys
from pathlib import Path

import pytest
from timm.data import ImageNetInfo

from tokenlabels.class_names import in_words, read_class_names


def written(folder: Path, content: object, name: str = "classes.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("cat\ndog\nbird\n", id="a name per line"),
        pytest.param(["cat", "dog", "bird"], id="list"),
        pytest.param([{"index": i, "name": name} for i, name in ((2, "bird"), (0, "cat"), (1, "dog"))], id="objects"),
        pytest.param(
            {"10": "x", **{str(i): "x" for i in range(3, 10)}} | {"0": "cat", "1": "dog", "2": "bird"}, id="ids"
        ),
        pytest.param({"0": ["n1", "cat"], "1": ["n2", "dog"], "2": ["n3", "bird"]}, id="Keras"),
        pytest.param({"bird": 2, "cat": 0, "dog": 1}, id="class_to_idx"),
    ],
)
def test_forms(tmp_path: Path, content: object) -> None:
    assert read_class_names(written(tmp_path, content))[:3] == ("cat", "dog", "bird")


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    assert read_class_names(written(tmp_path, "\ufeffcat\ndog")) == ("cat", "dog")
    assert read_class_names(written(tmp_path, '\ufeff["cat", "dog"]')) == ("cat", "dog")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "names").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"names: not a text file of class names .*one name per line"):
        read_class_names(tmp_path / "names")
    with pytest.raises(ValueError, match=r"class names .*: Is a directory; there is"):
        read_class_names(tmp_path)


def test_names_need_no_import_of_timm() -> None:
    """It takes seconds."""
    code = (
        "import sys; from tokenlabels.class_names import read_class_names; read_class_names('imagenet-1k'); "
        "sys.exit('timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_words_are_those_of_timm() -> None:
    info = ImageNetInfo("imagenet-1k")
    assert read_class_names("imagenet-1k") == tuple(info.label_descriptions())


def test_imagenet_by_index() -> None:
    names = read_class_names("imagenet-1k", 1000)
    assert (names[0], names[999]) == ("tench, Tinca tinca", "toilet tissue, toilet paper, bathroom tissue")


def test_wnids_become_words_and_other_names_stay(tmp_path: Path) -> None:
    path = written(tmp_path, [{"index": 0, "wnid": "n01440764"}, {"index": 1, "wnid": "n99999999"}])
    assert read_class_names(path) == ("tench, Tinca tinca", "n99999999")
    assert in_words(("n01443537", "my own class")) == ("goldfish, Carassius auratus", "my own class")


def test_names_of_tiny_imagenet(tiny_imagenet: Path) -> None:
    assert read_class_names(tiny_imagenet / "classes.json", 50)[0] == "goldfish, Carassius auratus"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("[1, 2", "not a list of class names", id="no JSON"),
        pytest.param([{"index": 0}], "not a list of class names .*one name per line", id="no name"),
        pytest.param({"0": "cat", "2": "dog"}, "class 1 is there 0 times", id="missing"),
        pytest.param([{"index": 0, "name": "a"}, {"index": 0, "name": "b"}], "class 0 is there 2 times", id="twice"),
        pytest.param("cat\n\ndog\nbird", "class 1 has no name", id="empty line"),
        pytest.param("cat\ndog", "2 class names for 4 classes", id="too few"),
    ],
)
def test_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_class_names(written(tmp_path, content), 4)
