from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from annotate import demo_teacher
from annotate.demo_teacher import MODEL_NAME, train_demo_teacher
from annotate.scenes import BACKGROUND, CLASS_NAMES, draw_scene
from annotate.specs import TeacherSpec
from annotate.teachers import load_teacher


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_teacher, "_NUM_TRAINING_SCENES", 24)
    monkeypatch.setattr(demo_teacher, "_NUM_HELD_OUT_SCENES", 3)


@pytest.mark.usefixtures("few_scenes")
class TestShortTraining:
    def test_loss_falls_and_plain_timm_loads_the_file(self, tmp_path: Path) -> None:
        losses: list[float] = []

        def record(step: int, loss: float) -> None:
            assert step == len(losses)
            losses.append(loss)

        teacher = train_demo_teacher(tmp_path / "teacher.safetensors", steps=12, on_step=record)
        assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.05
        assert 0 <= teacher.token_accuracy <= 1
        assert teacher.num_cells > 0

        model = timm.create_model(teacher.name, num_classes=len(CLASS_NAMES))
        model.load_state_dict(load_file(teacher.checkpoint), strict=True)

        spec = TeacherSpec(teacher.name, checkpoint=teacher.checkpoint, image_size=teacher.image_size)
        assert load_teacher([spec]).grid == (12, 12)

    def test_same_seed_same_file_and_the_callers_torch_is_left_alone(self, tmp_path: Path) -> None:
        threads, random_state = torch.get_num_threads(), torch.get_rng_state()
        files = []
        for name, seed in (("a.safetensors", 0), ("b.safetensors", 0), ("c.safetensors", 1)):
            torch.rand(3)
            files.append(train_demo_teacher(tmp_path / name, seed=seed, steps=2).checkpoint.read_bytes())
            torch.set_rng_state(random_state)
        assert files[0] == files[1] != files[2]
        assert torch.get_num_threads() == threads

    def test_callers_random_numbers_go_on(self, tmp_path: Path) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        train_demo_teacher(tmp_path / "teacher.safetensors", steps=2)
        torch.testing.assert_close(torch.rand(3), expected)


class TestParts:
    def test_too_few_steps_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="got steps=1; give 2 or more"):
            train_demo_teacher(tmp_path / "teacher.safetensors", steps=1)

    def test_other_file_types_are_refused_before_training(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"teacher\.pth; give a name that ends in \.safetensors"):
            train_demo_teacher(tmp_path / "teacher.pth")

    def test_area_target_spreads_the_background(self) -> None:
        truth = np.array([[3, 3], [BACKGROUND, 7]], np.int16)
        expected = np.full(len(CLASS_NAMES), 0.025)
        expected[3], expected[7] = 0.525, 0.275
        np.testing.assert_allclose(demo_teacher._area_target(truth), expected, atol=1e-7)

    def test_squashed_truth_keeps_the_shares(self) -> None:
        truth = draw_scene(0, 0).truth
        squashed = demo_teacher._squash_truth(truth)
        assert squashed.shape == (demo_teacher.IMAGE_SIZE_PX,) * 2
        np.testing.assert_allclose(demo_teacher._area_target(squashed), demo_teacher._area_target(truth), atol=5e-3)


@pytest.mark.slow
def test_full_training_names_the_cells_of_new_scenes(tmp_path: Path) -> None:
    """What the demo promises; a teacher that guesses names one cell in ten."""
    teacher = train_demo_teacher(tmp_path / "teacher.safetensors", seed=4)
    assert teacher.name == MODEL_NAME
    assert teacher.num_cells > 1000
    assert teacher.token_accuracy > 0.92
