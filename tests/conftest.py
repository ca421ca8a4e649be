"""Fixtures that every test module may use, and the rules for data and GPUs."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

DATA_ENV, REQUIRE_DATA_ENV, REQUIRE_GPU_ENV = (
    "TOKENLABELS_TEST_DATA",
    "TOKENLABELS_REQUIRE_DATA",
    "TOKENLABELS_REQUIRE_GPU",
)


@pytest.fixture(scope="session", autouse=True)
def _control_c_interrupts() -> None:
    """A shell that starts the tests in the background makes them, and all that they start, ignore Control-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _restore_random_state() -> Iterator[None]:
    """No test changes the random numbers that another one draws."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch.set_rng_state(torch_state)


def _data_folder(name: str, parent: str = "data") -> Path:
    default = Path(__file__).parents[2] / "shared" / parent
    folder = Path(os.environ.get(DATA_ENV, default)) / name
    if not folder.is_dir():
        message = f"no data at {folder}; {DATA_ENV} names the folder that holds {name}"
        if os.environ.get(REQUIRE_DATA_ENV) == "1":
            pytest.fail(f"{message} ({REQUIRE_DATA_ENV}=1)")
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def imagenet_sample() -> Path:
    """Folder of four WebDataset tars with 400 full-size ImageNet photographs (128, 128, 100, 44)."""
    return _data_folder("imagenet-sample")


@pytest.fixture(scope="session")
def tiny_imagenet() -> Path:
    """Folder of WebDataset tars of 64 x 64 images in 50 classes, with boxes.json and classes.json."""
    return _data_folder("tiny-imagenet-50")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of outputs of the published code."""
    return _data_folder("golden", parent="")


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The CUDA device of tests marked gpu."""
    if not torch.cuda.is_available():
        if os.environ.get(REQUIRE_GPU_ENV) == "1":
            pytest.fail(f"no CUDA device, and {REQUIRE_GPU_ENV}=1")
        pytest.skip("no CUDA device")
    return torch.device("cuda")
