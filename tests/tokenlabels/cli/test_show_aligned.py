"""tokenlabels show --aligned: what is drawn of which images, and what is refused with exit code 2."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.loaders.photos import encode, smooth_image, write_tar
from tests.tokenlabels.cli.conftest import Run
from tokenlabels.align import TLAlign
from tokenlabels.mixing import MixPlan
from tokenlabels.models import DenseClassifier
from tokenlabels.views.aligned import AlignedPair

ALIGNED = ("show", "--aligned", "--device", "cpu")
MODEL = ("--model", "test_vit", "--image-size", "64")
RANDOM = (*MODEL, "--random-weights", "0")
PVT = ("--model", "pvt_v2_b0", "--random-weights", "0")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[AlignedPair]:
    """What the command draws, in order."""
    import tokenlabels.views.aligned as pictures

    pairs: list[AlignedPair] = []
    draw_pairs = pictures.draw_pairs

    def record(given: list[AlignedPair], title: str) -> Image.Image:
        pairs.extend(given)
        return draw_pairs(given, title)

    monkeypatch.setattr(pictures, "draw_pairs", record)
    return pairs


def test_a_picture_of_the_first_images_of_all_tars(
    run: Run, pattern: str, tmp_path: Path, drawn: list[AlignedPair]
) -> None:
    result = run(*ALIGNED, *RANDOM, "--images", pattern, "--out", tmp_path / "new" / "aligned.png")
    assert result.exit_code == 0, result.stderr
    with Image.open(tmp_path / "new" / "aligned.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        assert picture.width > 5 * 256
    firsts = ["scene_000000", "scene_000005", "scene_000008", "scene_000001"]  # of 5, 3 and 2 scenes
    assert [pair.names for pair in drawn] == list(zip(firsts, firsts[1:] + firsts[:1], strict=True))
    *lines, last = result.stdout.splitlines()
    assert last == f"picture: {tmp_path / 'new' / 'aligned.png'}"
    for line, pair in zip(lines, drawn, strict=True):
        start = f"{pair.names[0]} with {pair.names[1]}: own {pair.initial.mean():.1%} of the image"
        assert line == f"{start}, {pair.target:.1%} of what is classified"


def test_keys_in_their_order(run: Run, pattern: str, tmp_path: Path, drawn: list[AlignedPair]) -> None:
    keys = ["scene_000009", "scene_000002", "scene_000007"]
    options = [word for key in keys for word in ("--key", key)]
    result = run(*ALIGNED, *RANDOM, "--images", pattern, *options, "--out", tmp_path / "keys.webp")
    assert result.exit_code == 0, result.stderr
    assert [pair.names for pair in drawn] == [(keys[0], keys[1]), (keys[1], keys[2]), (keys[2], keys[0])]
    np.testing.assert_array_equal(drawn[0].partner, drawn[1].own)


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "random", "blockwise"])
def test_mixing(run: Run, pattern: str, tmp_path: Path, drawn: list[AlignedPair], mix: str) -> None:
    out = tmp_path / "mixed.png"
    command = (*ALIGNED, *RANDOM, "--images", pattern, "--mix", mix, "--num", "2", "--out", out)
    assert run(*command).exit_code == 0
    assert run(*command).exit_code == 0
    assert run(*command, "--seed", "1").exit_code == 0
    first, again, other = drawn[0], drawn[2], drawn[4]
    np.testing.assert_array_equal(first.mixed, again.mixed)
    assert (first.mixed != other.mixed).any()
    is_mixup = mix == "mixup"
    assert (np.ptp(first.initial) < 1e-6) == is_mixup
    share = first.initial.mean() if is_mixup else np.kron(first.initial, np.ones((16, 16)))[..., None]
    expected = first.own * share + first.partner * (1 - share)
    whole = np.isin(share, (0, 1)) | is_mixup  # patches of one image; a patch on the border of a box is of two
    assert (np.abs(first.mixed - expected)[np.broadcast_to(whole, expected.shape)] <= 1).all()


def test_pixels_and_shares_are_those_of_an_evaluation(
    run: Run, pattern: str, tmp_path: Path, drawn: list[AlignedPair]
) -> None:
    """From the loader of evaluations to the share, once more by hand."""
    from loaders import EvaluationLoader

    options = ("--images", pattern, "--key", "scene_000000", "--key", "scene_000001", "--mix", "blockwise")
    assert run(*ALIGNED, *RANDOM, *options, "--out", tmp_path / "a.png").exit_code == 0
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=64)
    config = model.pretrained_cfg
    mean, std = config["mean"], config["std"]
    loader = EvaluationLoader(pattern, image_size=64, batch_size=2, crop_pct=config["crop_pct"], mean=mean, std=std)
    batch = next(iter(loader))
    assert batch.keys == ("scene_000000", "scene_000001")
    pixels = batch.images.permute(0, 2, 3, 1) * torch.tensor(std) + torch.tensor(mean)
    np.testing.assert_array_equal(drawn[0].own, (255 * pixels[0]).round().byte().numpy())
    np.testing.assert_array_equal(drawn[0].partner, (255 * pixels[1]).round().byte().numpy())
    plan = MixPlan.blockwise(2, grid=(4, 4), generator=torch.Generator().manual_seed(0))
    aligned = TLAlign(model.train())  # its dropout rates are 0
    _, share = aligned(plan.mix(batch.images), plan)
    assert [pair.target for pair in drawn] == pytest.approx(share.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "wrap", [TLAlign, lambda model: TLAlign(DenseClassifier(model, 64))], ids=["TLAlign", "and DenseClassifier"]
)
def test_checkpoints_of_runs(run: Run, pattern: str, tmp_path: Path, drawn: list[AlignedPair], wrap: Any) -> None:
    source = timm.create_model("test_vit", img_size=64, num_classes=7)
    with torch.no_grad():
        source.blocks[0].attn.qkv.weight.mul_(9)
    torch.save(source.state_dict(), tmp_path / "plain.pt")
    torch.save({"state_dict": wrap(source).state_dict(), "epoch": 3}, tmp_path / "best.pt")
    rest = ("--images", pattern, "--out", tmp_path / "a.png", "--num", "2")
    for weights in (("--checkpoint", tmp_path / "plain.pt"), ("--checkpoint", tmp_path / "best.pt"), RANDOM[-2:]):
        result = run(*ALIGNED, *MODEL, *weights, *rest)
        assert result.exit_code == 0, result.stderr
    plain, best, random = (pair.target for pair in drawn[::2])
    assert best == plain
    assert abs(random - plain) > 1e-4


def test_models_that_merge_patches(run: Run, tars: Path, tmp_path: Path, drawn: list[AlignedPair]) -> None:
    result = run(
        *ALIGNED, *PVT, "--image-size", "64", "--images", tars / "scenes-0002.tar", "--out", tmp_path / "pvt.jpg"
    )
    assert result.exit_code == 0, result.stderr
    assert [(pair.initial.shape, pair.aligned.shape) for pair in drawn] == 2 * [((16, 16), (2, 2))]


def test_the_random_state_is_left_alone(run: Run, pattern: str, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    assert run(*ALIGNED, *RANDOM, "--images", pattern, "--out", tmp_path / "a.png").exit_code == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_photographs(run: Run, imagenet_sample: Path, tmp_path: Path, drawn: list[AlignedPair]) -> None:
    images = f"{imagenet_sample}/*.tar"
    result = run(*ALIGNED, *RANDOM[:2], "--random-weights", "0", "--images", images, "--out", tmp_path / "photo.png")
    assert result.exit_code == 0, result.stderr
    assert len({pair.names[0] for pair in drawn}) == 4
    assert drawn[0].own.shape == (160, 160, 3), "the size of test_vit"


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no mode": (
        ("show", "--model", "test_vit"),
        "say what to draw, and one thing at a time. There is LABELS: a label set",
    ),
    "two modes": ((*ALIGNED, "--layout"), "--layout: the most probable entity of every position"),
    "options of another mode": ((*ALIGNED, *RANDOM, "--entities", "4"), "--entities is for --layout; leave it out"),
    "no model": ((*ALIGNED, "--images", "IMAGES"), "name the model: --model deit_small_patch16_224"),
    "no images": ((*ALIGNED, *RANDOM), "name the images: --images"),
    "no weights": ((*ALIGNED, *MODEL, "--images", "IMAGES"), "--checkpoint FILE, or --random-weights 0"),
    "two kinds of weights": (
        (*ALIGNED, *RANDOM, "--images", "IMAGES", "--checkpoint", "x.pt"),
        "--checkpoint FILE, or --random-weights 0",
    ),
    "unknown model": (
        (*ALIGNED, "--model", "deit_smal_patch16_224", "--random-weights", "0", "--images", "IMAGES"),
        "has no model 'deit_smal_patch16_224'; near it: deit_small_patch16_224",
    ),
    "size that it cannot have": (
        (*ALIGNED, "--model", "test_vit", "--random-weights", "0", "--image-size", "8", "--images", "IMAGES"),
        "test_vit: it does not take 8 x 8 images",
    ),
    "model without a rule": (
        (*ALIGNED, "--model", "test_resnet", "--random-weights", "0", "--images", "IMAGES"),
        "labels cannot follow the tokens through timm.models.resnet.ResNet",
    ),
    "missing checkpoint": (
        (*ALIGNED, *MODEL, "--checkpoint", "none.pt", "--images", "IMAGES"),
        "none.pt: there is no such file",
    ),
    "missing images": ((*ALIGNED, *RANDOM, "--images", "none-*.tar"), "'none-*.tar' finds no images"),
    "unknown key": (
        (*ALIGNED, *RANDOM, "--images", "IMAGES", "--key", "scene_000001", "--key", "scene_0000011"),
        "no key 'scene_0000011'; near it are scene_000001, ",
    ),
    "one key": ((*ALIGNED, *RANDOM, "--images", "IMAGES", "--key", "scene_000001"), "give two at least"),
    "one key twice": ((*ALIGNED, *RANDOM, "--images", "IMAGES", *2 * ("--key", "a")), "--key a is given twice"),
    "one image": ((*ALIGNED, *RANDOM, "--images", "IMAGES", "--num", "1"), "give two at least"),
    "keys and a number": (
        (*ALIGNED, *RANDOM, "--images", "IMAGES", "--key", "a", "--key", "b", "--num", "2"),
        "give keys or a number",
    ),
    "patches that do not fit": (
        (*ALIGNED, *PVT, "--image-size", "72", "--images", "IMAGES", *("--mix", "random")),
        "--mix random mixes patches of 16 pixels, which images of 72 x 72 pixels",
    ),
    "unknown mixing": ((*ALIGNED, *RANDOM, "--images", "IMAGES", "--mix", "puzzle"), "'puzzle' is not one of"),
    "seed that torch does not take": ((*ALIGNED, *RANDOM, "--images", "IMAGES", "--seed", str(2**80)), "--seed"),
    "a side that no memory holds": ((*ALIGNED, *RANDOM, "--images", "IMAGES", "--image-size", "5000000"), "image-size"),
    "ending": (
        (*ALIGNED, *RANDOM, "--images", "IMAGES", "--out", "a.txt"),
        "a.txt: pictures are written as .png",
    ),
    "no ending": ((*ALIGNED, *RANDOM, "--images", "IMAGES", "--out", "aligned"), "pictures are written as .png"),
    "ending that is read alone": (
        (*ALIGNED, *RANDOM, "--images", "IMAGES", "--out", "a.psd"),
        "a.psd: pictures are written as .png",
    ),
    "format of another size": (
        (*ALIGNED, *RANDOM, "--images", "IMAGES", "--out", "a.xbm"),
        "a.xbm: this format cannot hold the picture",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_use_exits_with_2(
    run: Run, pattern: str, arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*(pattern if word == "IMAGES" else word for word in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_tar_with_one_image(run: Run, tmp_path: Path) -> None:
    from annotate.scenes import write_scenes

    write_scenes(tmp_path, shard_sizes=(1,), seed=0)
    result = run(*ALIGNED, *RANDOM, "--images", tmp_path / "*.tar", "--out", tmp_path / "a.png")
    assert result.exit_code == 2
    assert f"an image is mixed with another one, but {tmp_path / '*.tar'} has 1" in result.stderr


def test_a_checkpoint_of_another_model(run: Run, pattern: str, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit2", num_classes=3).state_dict(), tmp_path / "other.pt")
    result = run(*ALIGNED, *MODEL, "--checkpoint", tmp_path / "other.pt", "--images", pattern)
    assert result.exit_code == 2
    assert f"{tmp_path / 'other.pt'} does not fit VisionTransformer" in result.stderr


@pytest.mark.parametrize("kind", ["a file in the place of the folder", "a folder in the place of the file", "no right"])
def test_a_folder_that_cannot_be_written(
    run: Run, pattern: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "place" / "a.png"
    if kind.startswith("a file"):
        (tmp_path / "place").touch()
    elif kind.startswith("a folder"):
        out.mkdir(parents=True)
    else:
        monkeypatch.setattr("os.access", lambda *_: False)
    result = run(*ALIGNED, *RANDOM, "--images", pattern, "--out", out)
    assert result.exit_code == 2
    assert str(out) in result.stderr


def test_images_that_cannot_be_decoded(run: Run, tmp_path: Path) -> None:
    for label, data in (("a", b"no image"), ("b", b"neither")):
        (tmp_path / "tree" / label).mkdir(parents=True)
        (tmp_path / "tree" / label / "x.jpg").write_bytes(data)
    result = run(*ALIGNED, *RANDOM, "--images", tmp_path / "tree", "--out", tmp_path / "a.png")
    assert result.exit_code == 2
    assert "sample 'a/x': broken header" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_in_the_place_of_the_picture(run: Run, pattern: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    result = run(*ALIGNED, *RANDOM, "--images", pattern, "--out", tmp_path / "a.png")
    assert result.exit_code == 2
    assert "a.png is a folder" in result.stderr


def test_a_key_in_two_tars(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {key: {"png": encode(smooth_image(rng, 64, 64))} for key in ("one", name)})
    result = run(*ALIGNED, *RANDOM, "--images", tmp_path / "*.tar", "--key", "one", "--key", "a")
    assert result.exit_code == 2
    assert "'one' is in" in result.stderr
    assert "give the images of one of them" in result.stderr
