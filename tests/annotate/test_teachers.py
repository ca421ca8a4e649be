"""Teachers from pixels to the k best classes, against twins that do each step the long way."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, to_tensor

import annotate.teachers
from annotate.cells import CellClassifier, TeacherError
from annotate.members import ModelInfo, TeacherModel
from annotate.teachers import Amp, Teacher, TeacherSpec, TopK, load_teacher

NUM_CLASSES, SIZE, GRID = 6, 32, (4, 4)


class Small(nn.Module):
    """A classifier of timm's shape with one convolution, whose cells differ. Runs out of memory above `max_batch`."""

    def __init__(
        self, seed: int, *, num_classes: int = NUM_CLASSES, stride: int = 8, max_batch: int = 1000, scale: float = 3
    ) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 5
        self.max_batch, self.batches = max_batch, list[int]()
        generator = torch.Generator().manual_seed(seed)
        self.stem = nn.Conv2d(3, 5, stride, stride=stride)
        self.fc = nn.Linear(5, num_classes)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
        self.fc.weight.data *= scale

    def forward_features(self, images: Tensor) -> Tensor:
        if len(images) > 1:
            self.batches.append(len(images))
        if len(images) > self.max_batch:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        return self.stem(images)

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(features.mean((2, 3)))


def info(name: str = "small", size: int = SIZE, seed: int = 0) -> ModelInfo:
    return ModelInfo(
        name=name,
        weights=f"random, seed {seed}",
        digest=f"{seed:064x}",
        image_size=(size, size),
        interpolation="bicubic",
        crop_pct=0.9,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.3),
    )


def member(model: nn.Module, size: int = SIZE, **fields: Any) -> TeacherModel:
    names = fields.pop("class_names", None)
    described = replace(info(size=size), **fields)
    return TeacherModel(CellClassifier(model, described.name, (size, size)), described, names)


def teacher(*seeds: int, topk: int = 3, flip: bool = False, **arguments: Any) -> Teacher:
    models = [member(Small(seed, **arguments), name=f"small-{seed}") for seed in seeds]
    return Teacher(models, topk=topk, flip=flip)


def pictures(num_images: int, size: int = SIZE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_images, size, size, 3), generator=generator, dtype=torch.uint8)


def assert_same(found: TopK, expected: TopK) -> None:
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.classes, expected.classes)
    assert torch.equal(found.tail, expected.tail)


def _slow_logits(model: TeacherModel, image: Tensor) -> Tensor:
    """float64 [h, w, K] of one picture, by torchvision's preprocessing and one cell at a time."""
    network: Any = model.classifier.model
    pixels = normalize(to_tensor(image.numpy()), model.info.mean, model.info.std)
    features = network.forward_features(pixels[None])
    height, width = features.shape[2:]
    cells = [network.forward_head(features[:, :, i : i + 1, j : j + 1]) for i in range(height) for j in range(width)]
    return torch.cat(cells).reshape(height, width, -1).double()


def _slow_members(teacher: Teacher, images: Sequence[Tensor]) -> list[Tensor]:
    """float64 [B, h, w, K] of every model and view."""
    found = []
    for model, batch in zip(teacher.models, images, strict=True):
        found.append(torch.stack([_slow_logits(model, image) for image in batch]))
        if teacher.info.flip:
            mirrored = [_slow_logits(model, torch.from_numpy(image.numpy()[:, ::-1].copy())) for image in batch]
            found.append(torch.stack([logits.flip(1) for logits in mirrored]))
    return found


@pytest.mark.parametrize("flip", [False, True], ids=["plain", "flip"])
@pytest.mark.parametrize("seeds", [(0,), (0, 1), (0, 1, 2)], ids=["one", "two", "three"])
@torch.inference_mode()
def test_matches_the_long_way(seeds: tuple[int, ...], flip: bool) -> None:
    labels = teacher(*seeds, topk=NUM_CLASSES, flip=flip)
    images = [pictures(3)] * len(seeds)
    best = labels(images)
    members = torch.stack(_slow_members(labels, images))
    probabilities = members.softmax(-1).mean(0)
    scores = members[0] if len(members) == 1 else probabilities.log() + members.logsumexp(-1).mean(0)[..., None]
    order = scores.argsort(-1, descending=True)
    assert members.std(dim=(0, 2, 3)).min() > 0.1
    assert (best.classes == order).double().mean() > 0.99
    torch.testing.assert_close(best.scores.double(), scores.gather(-1, best.classes), rtol=1e-3, atol=1e-3)
    assert (best.tail == 0).all()
    fewer = teacher(*seeds, topk=2, flip=flip)(images)
    torch.testing.assert_close(fewer.scores, best.scores[..., :2])
    left_over = 1 - probabilities.sort(-1, descending=True).values[..., :2].sum(-1)
    torch.testing.assert_close(fewer.tail.double(), left_over, rtol=2e-3, atol=1e-5)


def test_flip_of_a_mirrored_picture_is_the_mirrored_map() -> None:
    labels = teacher(0, flip=True)
    images = pictures(2)
    straight, mirrored = labels([images]), labels([images.flip(2)])
    assert not torch.equal(straight.scores, straight.scores.flip(2))
    torch.testing.assert_close(mirrored.scores, straight.scores.flip(2), rtol=1e-3, atol=1e-3)


def test_models_of_different_input_sizes_share_a_grid() -> None:
    small, large = member(Small(0)), member(Small(1, stride=12), size=48, name="large")
    labels = Teacher([small, large], topk=2)
    assert labels.grid == GRID
    images = [pictures(2), pictures(2, size=48, seed=1)]
    members = torch.stack([logits.detach() for logits in _slow_members(labels, images)])
    best = labels(images)
    torch.testing.assert_close(
        best.tail.double(), 1 - members.softmax(-1).mean(0).topk(2).values.sum(-1), rtol=2e-3, atol=1e-5
    )


def test_blocks_of_cells_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [pictures(5), pictures(5)]
    whole = teacher(0, 1, flip=True)(images)
    monkeypatch.setattr(annotate.teachers, "_MAX_LOGITS", 2 * NUM_CLASSES * GRID[0] * GRID[1])
    assert_same(teacher(0, 1, flip=True)(images), whole)


def test_memory_of_the_logits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = teacher(0)
    monkeypatch.setattr(annotate.teachers, "_MAX_LOGITS", 2 * NUM_CLASSES * GRID[0] * GRID[1])
    sizes: list[int] = []
    logits = CellClassifier.logits

    def watched(self: CellClassifier, cells: Tensor) -> Tensor:
        found = logits(self, cells)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(CellClassifier, "logits", watched)
    labels([pictures(5)])
    assert max(sizes) == annotate.teachers._MAX_LOGITS
    assert len(sizes) == 3


@pytest.mark.parametrize(
    ("num_images", "max_batch", "batches"),
    [
        pytest.param(8, 8, [8, 8], id="fits"),
        pytest.param(8, 4, [8, 4, 4, 4, 4], id="halved-once"),
        pytest.param(8, 3, [8, 4, 2, 2, 2, 2, 2, 2, 2, 2], id="halved-twice"),
        pytest.param(7, 5, [7, 3, 3, 3, 3], id="odd-number"),
        pytest.param(5, 1, [5, 2], id="one-at-a-time"),
    ],
)
def test_batches_are_halved_when_memory_runs_out_and_stay_small(
    num_images: int, max_batch: int, batches: list[int]
) -> None:
    model = Small(0, max_batch=max_batch)
    labels = Teacher([member(model)], topk=2)
    images = pictures(num_images)
    first, second = labels([images]), labels([images])
    # Batches of one are not counted; the second call starts where the first one ended.
    assert model.batches == batches
    expected = teacher(0, topk=2)([images])
    assert_same(first, second)
    assert_same(first, expected)


def test_the_smaller_batch_holds_for_every_model() -> None:
    models = [Small(0), Small(1, max_batch=2)]
    labels = Teacher([member(model, name=f"m{index}") for index, model in enumerate(models)], topk=2)
    assert_same(labels([pictures(4)] * 2), teacher(0, 1, topk=2)([pictures(4)] * 2))
    assert models[0].batches == [4, 2, 2]


def test_one_image_too_many_is_explained() -> None:
    model = Small(0)
    labels = Teacher([member(model, name="huge")], topk=2)
    model.max_batch = 0
    with pytest.raises(TeacherError, match="huge: one image does not fit into the memory of the GPU; give a smaller"):
        labels([pictures(4)])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        pytest.param([], "got 0 batches of images, give one for each model", id="no-batch"),
        pytest.param([pictures(2)] * 2, "got 2 batches", id="too-many"),
        pytest.param([pictures(2).float()], r"must be uint8 \('B', 32, 32, 3\).*got torch.float32", id="dtype"),
        pytest.param([pictures(2, size=40)], r"got torch.uint8 \(2, 40, 40, 3\)", id="size"),
        pytest.param([pictures(2).permute(0, 3, 1, 2)], r"\(2, 3, 32, 32\)", id="channels-first"),
        pytest.param([pictures(2)[:0]], "with B at least 1", id="empty"),
    ],
)
def test_wrong_images_are_refused(images: list[Tensor], message: str) -> None:
    with pytest.raises(TeacherError, match=f"^small-0: .*{message}"):
        teacher(0)(images)


def test_unequal_batches_are_refused() -> None:
    with pytest.raises(TeacherError, match=r"^small-1: .* the same for every model"):
        teacher(0, 1)([pictures(2), pictures(3)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(
            lambda weight: weight.fill_(float("nan")), "small: it returns logits that are not finite", id="nan"
        ),
        pytest.param(
            lambda weight: weight.fill_(float("inf")), "small: it returns logits that are not finite", id="inf"
        ),
        pytest.param(lambda weight: weight.mul_(1e6), "small: .*beyond the range of float16", id="float16"),
    ],
)
def test_logits_that_cannot_be_stored_are_refused(damage: Callable[[Tensor], Tensor], message: str) -> None:
    model = Small(0)
    labels = Teacher([member(model)], topk=2)
    damage(model.fc.weight.data)
    with pytest.raises(TeacherError, match=message):
        labels([pictures(2)])


@pytest.mark.parametrize("topk", [0, -1, NUM_CLASSES + 1])
def test_topk_beyond_the_classes_is_refused(topk: int) -> None:
    with pytest.raises(TeacherError, match=rf"small-0 has 6 classes, so topk must be 1 to 6; got {topk}"):
        teacher(0, topk=topk)


def test_models_that_do_not_go_together_are_refused() -> None:
    first, coarse, other = member(Small(0), name="a"), member(Small(1, stride=16), name="b"), Small(2, num_classes=4)
    with pytest.raises(TeacherError, match=r"same grid, got a 4 x 4, b 2 x 2; image_size can make them equal"):
        Teacher([first, coarse], topk=2)
    with pytest.raises(TeacherError, match="same classes, got a 6, c 4"):
        Teacher([first, member(other, name="c")], topk=2)


def test_the_same_classes_in_another_order_are_refused() -> None:
    names = tuple("abcdef")
    models = [member(Small(seed), name=f"m{seed}") for seed in range(3)]
    models[0].class_names, models[2].class_names = names, names
    assert Teacher(models, topk=2).class_names == names
    models[2].class_names = names[::-1]
    with pytest.raises(TeacherError, match="m0 and m2 number the same classes in different orders"):
        Teacher(models, topk=2)
    models[2].class_names = tuple("ABCDEF")
    assert Teacher(models, topk=2).class_names == names


def test_info_is_plain_json_and_its_digest_covers_all_of_it() -> None:
    base = teacher(0).info
    assert json.loads(json.dumps(asdict(base)))["models"][0]["image_size"] == [SIZE, SIZE]
    assert asdict(base).keys() == {"models", "flip", "amp", "digest"}
    assert teacher(0).info == base
    changes: list[dict[str, Any]] = [
        {"name": "other"},
        {"weights": "pretrained"},
        {"digest": "1" * 64},
        {"interpolation": "bilinear"},
        {"crop_pct": 0.875},
        {"mean": (0.5, 0.5, 0.5)},
        {"std": (0.5, 0.5, 0.5)},
    ]
    fields = asdict(base.models[0])
    others = [Teacher([member(Small(0), **{**fields, **change})], topk=3).info.digest for change in changes]
    others += [teacher(0, flip=True).info.digest, teacher(0, 1).info.digest, teacher(1, 0).info.digest]
    others.append(Teacher([member(Small(0), name="small-0")], topk=3, amp="bf16").info.digest)
    others.append(Teacher([member(Small(0), size=40, name="small-0")], topk=3).info.digest)
    assert len({base.digest, *others}) == 1 + len(others)


def test_loading_twice_gives_the_same_teacher_bit_for_bit() -> None:
    specs = [TeacherSpec("test_nfnet", seed=1, image_size=64), TeacherSpec("test_resnet", seed=2, image_size=64)]
    first, second = load_teacher(specs, flip=True), load_teacher(specs, flip=True)
    images = [pictures(3, size=64)] * 2
    best = first(images)
    assert first.info == second.info
    assert first.grid == (2, 2)
    assert_same(best, second(images))
    assert best.scores.shape == (3, 2, 2, 5)
    assert best.tail.numpy().dtype == np.float16


def test_a_grid_can_be_reached_through_the_image_size() -> None:
    specs = [TeacherSpec("test_resnet", seed=0, image_size=96), TeacherSpec("test_vit", seed=0)]
    with pytest.raises(TeacherError, match=r"test_resnet 3 x 3, test_vit 10 x 10; image_size"):
        load_teacher(specs)
    assert load_teacher([specs[0], TeacherSpec("test_vit", seed=0, image_size=48)]).grid == (3, 3)


@pytest.mark.parametrize(
    ("device", "amp", "message"),
    [
        pytest.param("cpu", "bf16", "amp='bf16' needs a CUDA device, got 'cpu'; use amp='none'", id="bf16-on-cpu"),
        pytest.param("cpu", "fp16", "amp='fp16' needs a CUDA device", id="fp16-on-cpu"),
        pytest.param("cpu", "fp8", "amp must be none, bf16 or fp16, got 'fp8'", id="unknown-amp"),
        pytest.param("gpu", "none", "no device 'gpu'; give cpu, cuda or cuda:N", id="unknown-device"),
        pytest.param("cuda:99", "none", "no device 'cuda:99': torch sees", id="absent-device"),
    ],
)
def test_settings_that_do_not_go_with_the_device_are_refused_before_loading(
    device: str, amp: Amp, message: str, tmp_path: Path
) -> None:
    spec = TeacherSpec("resnet18", checkpoint=tmp_path / "is not there.pth")
    with pytest.raises(TeacherError, match=message):
        load_teacher([spec], amp=amp, device=device)


def test_a_teacher_needs_a_model() -> None:
    with pytest.raises(TeacherError, match="at least one model"):
        load_teacher([])


def _by_class(best: TopK) -> Tensor:
    """Scores [B, h, w, K] in order of class; every class must be there."""
    return torch.zeros(best.scores.shape).scatter(-1, best.classes, best.scores.float())


@pytest.mark.parametrize("flip", [False, True], ids=["plain", "flip"])
def test_autocast_covers_the_backbone_and_leaves_the_head_in_float32(
    flip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()
    head = Small.forward_head

    def watched(self: Small, features: Tensor) -> Tensor:
        logits = head(self, features)
        seen.update((features.dtype, logits.dtype))
        return logits

    models = [member(Small(0))]
    monkeypatch.setattr(Small, "forward_head", watched)
    half = Teacher(models, topk=NUM_CLASSES, flip=flip, amp="bf16")([pictures(2)])
    whole = Teacher(models, topk=NUM_CLASSES, flip=flip)([pictures(2)])
    assert seen == {torch.float32}
    assert not torch.equal(half.scores, whole.scores)
    torch.testing.assert_close(_by_class(half), _by_class(whole), rtol=0.05, atol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize(("amp", "tolerance"), [("none", 0.02), ("fp16", 0.05), ("bf16", 0.3)])
@pytest.mark.parametrize("name", ["test_efficientnet", "test_nfnet", "test_vit", "test_convnext"])
def test_gpu_agrees_with_cpu(cuda: torch.device, name: str, amp: Amp, tolerance: float) -> None:
    spec = TeacherSpec(name, seed=0)
    on_cpu = load_teacher([spec], topk=1000, flip=True)
    on_gpu = load_teacher([spec], topk=1000, flip=True, amp=amp, device=str(cuda))
    images = [pictures(4, size=on_cpu.info.models[0].image_size[0])]
    expected, found = _by_class(on_cpu(images)), _by_class(on_gpu(images))
    assert (expected - found).abs().max() < tolerance * expected.std()


@pytest.mark.gpu
def test_real_memory_shortage_halves_the_batch(cuda: torch.device) -> None:
    labels = load_teacher([TeacherSpec("resnet18", seed=0, image_size=256)], device=str(cuda))
    images = [pictures(512, size=256)]
    expected = labels(images)
    torch.cuda.empty_cache()
    total_bytes = torch.cuda.get_device_properties(cuda).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(cuda) + 2**30) / total_bytes, cuda)
    try:
        found = labels(images)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, cuda)
    assert labels._max_batch is not None
    assert labels._max_batch < 512
    torch.testing.assert_close(found.tail, expected.tail, rtol=1e-2, atol=1e-3)
