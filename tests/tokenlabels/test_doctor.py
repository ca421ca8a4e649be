import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import PIL
import pytest
import torch
from PIL import Image, ImageOps

from tokenlabels import doctor
from tokenlabels.doctor import PIPELINE_VARIABLE, Check, examine, installed_versions, known_bad_pairs, pillow_flavour

Rule = Callable[[Mapping[str, str]], Check | None]

HEALTHY = {
    "torch": "2.15.0",
    "torchvision": "0.29.2",
    "timm": "1.0.32",
    "zarr": "3.1.6",
    "pillow": "13.0.0",
    "PIL": "13.0.0",
}

# Rule, what differs from HEALTHY (None: not there), and the status that it gives.
PAIRS: dict[str, tuple[Rule, dict[str, str | None], str | None]] = {
    "one Pillow": (doctor.mixed_pil, {}, None),
    "one pillow-simd": (
        doctor.mixed_pil,
        {"pillow": None, "pillow-simd": "12.1.1.post0", "PIL": "12.1.1.post0"},
        None,
    ),
    "no PIL at all": (doctor.mixed_pil, {"pillow": None, "PIL": None}, None),
    "simd over Pillow": (doctor.mixed_pil, {"pillow-simd": "12.1.1.post0", "PIL": "12.1.1.post0"}, "bad"),
    "Pillow over simd": (doctor.mixed_pil, {"pillow-simd": "12.1.1.post0"}, "bad"),
    "files of another Pillow": (doctor.mixed_pil, {"PIL": "11.0.0"}, "bad"),
    "PIL of nobody": (doctor.mixed_pil, {"pillow": None}, "bad"),
    "both torches from the registry": (doctor.cpu_torch, {}, None),
    "both torches for CPUs": (doctor.cpu_torch, {"torch": "2.15.0+cpu", "torchvision": "0.29.2+cpu"}, None),
    "both torches for CUDA": (doctor.cpu_torch, {"torch": "2.15.0+cu130", "torchvision": "0.29.2+cu130"}, None),
    "torch for CPUs": (doctor.cpu_torch, {"torch": "2.15.0+cpu"}, "bad"),
    "torchvision for CPUs": (doctor.cpu_torch, {"torchvision": "0.29.2+cpu"}, "bad"),
    "CPUs and CUDA": (doctor.cpu_torch, {"torch": "2.15.0+cpu", "torchvision": "0.29.2+cu130"}, "bad"),
    "torch alone": (doctor.cpu_torch, {"torch": "2.15.0+cpu", "torchvision": None}, None),
    "zarr 2": (doctor.old_zarr, {"zarr": "2.18.4"}, "bad"),
    "zarr 3.0": (doctor.old_zarr, {"zarr": "3.0.10"}, "bad"),
    "zarr 3.1": (doctor.old_zarr, {"zarr": "3.1.0"}, None),
    "zarr 3.10": (doctor.old_zarr, {"zarr": "3.10.0"}, None),
    "no zarr": (doctor.old_zarr, {"zarr": None}, None),
    "timm after the posterize rule": (doctor.posterize, {}, None),
    "timm 1.0.31, Pillow 13": (doctor.posterize, {"timm": "1.0.31"}, "warn"),
    "timm 1.0.9, Pillow 13.1": (doctor.posterize, {"timm": "1.0.9", "PIL": "13.1.0"}, "warn"),
    "timm 1.0.31, Pillow 12": (doctor.posterize, {"timm": "1.0.31", "PIL": "12.3.0"}, None),
    "timm 1.0.31, pillow-simd 12": (doctor.posterize, {"timm": "1.0.31", "PIL": "12.1.1.post0"}, None),
    "no timm": (doctor.posterize, {"timm": None}, None),
    "default pipeline": (doctor.forked_zarrs, {}, None),
    "zarrs pipeline": (doctor.forked_zarrs, {PIPELINE_VARIABLE: "zarrs.ZarrsCodecPipeline"}, "warn"),
    "zarr's own pipeline": (doctor.forked_zarrs, {PIPELINE_VARIABLE: "zarr.core.codec_pipeline.X"}, None),
    "our annotate": (doctor.foreign_annotate, {}, None),
    "another annotate": (doctor.foreign_annotate, {"annotate": "1.0"}, "bad"),
}


@pytest.mark.parametrize(("rule", "changes", "status"), PAIRS.values(), ids=PAIRS.keys())
def test_known_pairs(rule: Rule, changes: dict[str, str | None], status: str | None) -> None:
    versions = {name: version for name, version in (HEALTHY | changes).items() if version is not None}
    check = rule(versions)
    assert (check and check.status) == status
    assert (check in known_bad_pairs(versions)) == (check is not None)
    if check:
        assert all(changed in f"{check.value} {check.name}" for changed in changes.values() if changed)


def test_posterize_is_what_pillow_does() -> None:
    """The rule speaks of the Pillow that is installed here, so hold it against that."""
    refuses = False
    try:
        ImageOps.posterize(Image.new("RGB", (2, 2)), 0)
    except ValueError:
        refuses = True
    assert refuses == (doctor.posterize({"timm": "1.0.31", "PIL": PIL.__version__}) is not None)


def test_everything_is_examined(tmp_path: Path) -> None:
    checks = {check.name: check for check in examine(tmp_path / "not" / "yet" / "there")}
    assert set(checks) >= {"python", "CUDA", "PIL", "cores", "open files", "disk for labels", *doctor.DISTRIBUTIONS}
    assert checks["torch"].value == installed_versions()["torch"]
    assert checks["PIL"].value == pillow_flavour()
    assert str(tmp_path) in checks["disk for labels"].value
    assert not (tmp_path / "not").exists()
    assert len(checks) == len(examine(tmp_path)), "no name twice"


def test_what_is_not_installed_is_bad() -> None:
    check = doctor._installed("zarr", {})
    assert (check.value, check.status, check.advice) == ("not installed", "bad", "pip install zarr")


def test_a_failing_import_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision").mkdir()
    source = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    check = next(check for check in examine(tmp_path) if check.name == "torchvision")
    assert check.status == "bad"
    assert "RuntimeError: operator torchvision::nms does not exist" in check.value


def test_without_torch_the_rest_is_still_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    checks = {check.name: check for check in examine(tmp_path)}
    assert checks["torch"].status == "bad"
    assert checks["CUDA"].status == "warn"
    assert checks["zarr"].status == "ok"


def write_metadata(site: Path, name: str, version: str) -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


FLAVOURS = {
    "simd": (["12.1.1.post0", "pillow-simd"], "12.1.1.post0", "pillow-simd 12.1.1.post0"),
    "another": ([], "1.2.3", "PIL 1.2.3"),
}


@pytest.mark.parametrize(("installed", "files", "flavour"), FLAVOURS.values(), ids=FLAVOURS.keys())
def test_flavour_is_whose_files_are_there(
    installed: list[str], files: str, flavour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed:
        write_metadata(tmp_path, installed[1], installed[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(PIL, "__version__", files)
    assert pillow_flavour() == flavour
    found = {check.name: check for check in known_bad_pairs(installed_versions())}
    assert found["pillow + pillow-simd"].status == "bad", "the Pillow of this environment is still there"


def test_flavour_of_this_environment() -> None:
    name, _, version = pillow_flavour().partition(" ")
    assert name in doctor.PIL_DISTRIBUTIONS
    assert version == PIL.__version__


def test_the_environment_variable_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PIPELINE_VARIABLE, raising=False)
    assert PIPELINE_VARIABLE not in installed_versions()
    monkeypatch.setenv(PIPELINE_VARIABLE, "zarrs.ZarrsCodecPipeline")
    assert any(check.name == "zarrs + fork" for check in known_bad_pairs(installed_versions()))


DISKS = {"plenty": (7e9, "ok"), "little": (1e9, "warn"), "none": (1e6, "bad")}


@pytest.mark.parametrize(("free_bytes", "status"), DISKS.values(), ids=DISKS.keys())
def test_free_space(free_bytes: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=100e9, used=0, free=free_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    check = doctor.disk_space("disk", tmp_path / "later", 6e9)
    assert check.status == status
    assert f"{free_bytes / 1e9:,.1f} GB free at {tmp_path}" in check.value


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    check = doctor.disk_space("disk", tmp_path, 0)
    assert (check.status, "not writable" in check.value) == ("bad", True)


def test_ray_needs_room_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=1000e9, used=0, free=40e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    check = doctor.temporary_space(tmp_path)
    assert (check.status, "96% full" in check.value, "Ray" in check.advice) == ("warn", True, True)
    usage.free = 60e9
    assert doctor.temporary_space(tmp_path).status == "ok"


LIMITS = {"few": (256, "warn"), "usual": (1024, "ok"), "all": (resource.RLIM_INFINITY, "ok")}


@pytest.mark.parametrize(("limit", "status"), LIMITS.values(), ids=LIMITS.keys())
def test_open_files(limit: int, status: str) -> None:
    assert doctor.open_files(limit).status == status


DRIVER_FILES = {
    "proprietary": (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023",
        "535.104.05",
    ),
    "open": ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95  Release Build (x)", "580.95"),
    "unlike any": ("something else", "unknown"),
}


@pytest.mark.parametrize(("text", "driver"), DRIVER_FILES.values(), ids=DRIVER_FILES.keys())
def test_a_driver_that_torch_cannot_use(
    text: str, driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version").write_text(f"{text}\nGCC version:  gcc version 12.3.0\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check = doctor._cuda(tmp_path / "version")
    assert (check.status, f"driver {driver}" in check.value) == ("bad", True)


def test_no_driver_means_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._cuda(tmp_path / "none") == Check("CUDA", "none, the CPU is used")


@pytest.mark.gpu
def test_devices_are_named(cuda: torch.device, tmp_path: Path) -> None:
    check = doctor._cuda(tmp_path / "none")
    assert check.status == "ok"
    assert torch.cuda.get_device_name(cuda) in check.value


def test_nothing_heavy_is_imported() -> None:
    """doctor is asked when imports are broken, and by a command line that should answer at once."""
    code = """
import sys
from pathlib import Path
import tokenlabels.doctor
def imported(*names): return [name for name in names if name in sys.modules]
assert not imported("torch", "torchvision", "timm", "zarr", "ray", "PIL"), "on import"
sys.modules.update(torch=None, torchvision=None)  # as if they were broken: the only two that may be tried
tokenlabels.doctor.examine(Path())
assert not imported("timm", "zarr", "ray", "webdataset"), "on examination"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
