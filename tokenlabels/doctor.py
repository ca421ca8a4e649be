"""What `tokenlabels doctor` prints: versions, devices, disks and limits of this machine, and pairs known to fail.

Versions come from the metadata of the distributions. Only torch, torchvision and PIL are imported, inside functions,
and an import that fails is a finding like any other.
"""

import importlib
import os
import platform
import re
import resource
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Literal

Status = Literal["ok", "warn", "bad"]

DISTRIBUTIONS = ("tokenlabels", "torch", "torchvision", "timm", "numpy", "zarr", "ray", "webdataset")
"""What has to be installed, PIL apart."""

PIL_DISTRIBUTIONS = ("pillow", "pillow-simd")
"""What can own the folder PIL."""

PIPELINE_VARIABLE = "ZARR_CODEC_PIPELINE__PATH"
"""The environment variable that gives zarr another codec pipeline, such as that of zarrs."""

_DRIVER_FILE = Path("/proc/driver/nvidia/version")

# ImageNet at 18x18 cells with k=5 takes 5.2 GB.
_LABEL_ROOM_BYTES = 6e9
_TEMPORARY_ROOM_BYTES = 1e9
_LEAST_ROOM_BYTES = 100e6
# Ray places no more objects on a disk that is fuller than this.
_RAY_DISK_SHARE = 0.95
# What most systems begin with. Workers, shards and connections all take some.
_LEAST_OPEN_FILES = 1024


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at.
        value: what was found.
        status: "ok"; "warn" if some uses will fail; "bad" if the main ones will.
        advice: what to do about it; empty if ok.
    """

    name: str
    value: str
    status: Status = "ok"
    advice: str = ""

    def __post_init__(self) -> None:
        assert (self.status == "ok") == (self.advice == ""), "advice is for what is not ok"


def examine(path: Path) -> tuple[Check, ...]:
    """Look at everything that making and reading labels depends on.

    Args:
        path: where labels will be, for the space on that disk; it need not be there yet.
    """
    versions = installed_versions()
    return (
        Check("python", f"{platform.python_version()} on {platform.platform()}"),
        *(_installed(name, versions) for name in DISTRIBUTIONS),
        _pil(),
        _cuda(_DRIVER_FILE),
        *known_bad_pairs(versions),
        disk_space("disk for labels", path, _LABEL_ROOM_BYTES),
        temporary_space(Path(tempfile.gettempdir())),
        Check("cores", f"{_usable_cores()} usable of {os.cpu_count()}"),
        open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
    )


def pillow_flavour() -> str:
    """Which PIL is imported, as "pillow 13.0.0" or "pillow-simd 12.1.1.post0".

    Both own the folder PIL, so the one whose version the imported files have is it; "PIL 1.2.3" if that is neither.
    """
    import PIL

    names = (name for name in PIL_DISTRIBUTIONS if _version(name) == PIL.__version__)
    return f"{next(names, 'PIL')} {PIL.__version__}"


def installed_versions() -> dict[str, str]:
    """Versions by distribution, of all that `known_bad_pairs` asks for; what is not installed is left out.

    Two entries more: "PIL", the version of the files in that folder, and the value of `PIPELINE_VARIABLE`.
    """
    names = (*DISTRIBUTIONS, *PIL_DISTRIBUTIONS, "annotate")
    versions = {name: found for name in names if (found := _version(name)) is not None}
    pil = _import("PIL")
    if isinstance(pil, ModuleType):
        versions["PIL"] = pil.__version__
    if PIPELINE_VARIABLE in os.environ:
        versions[PIPELINE_VARIABLE] = os.environ[PIPELINE_VARIABLE]
    return versions


def known_bad_pairs(versions: Mapping[str, str]) -> tuple[Check, ...]:
    """Combinations that are known to fail, out of what `installed_versions` gives."""
    return tuple(check for rule in BAD_PAIRS if (check := rule(versions)) is not None)


def mixed_pil(versions: Mapping[str, str]) -> Check | None:
    """Pillow and pillow-simd write into one folder: whichever came last overwrote a part of the other."""
    owners = {name: versions[name] for name in PIL_DISTRIBUTIONS if name in versions}
    if "PIL" not in versions or list(owners.values()) == [versions["PIL"]]:
        return None
    installed = " and ".join(f"{name} {number}" for name, number in owners.items()) or "no distribution"
    advice = "pip uninstall -y pillow pillow-simd; pip install pillow (then jobs/install_pillow_simd.sh, if wanted)"
    return Check("pillow + pillow-simd", f"{installed} installed, PIL is {versions['PIL']}", "bad", advice)


def cpu_torch(versions: Mapping[str, str]) -> Check | None:
    """A CPU-only torch and a torchvision built for the default one: `operator torchvision::nms does not exist`."""
    pair = {name: versions.get(name, "") for name in ("torch", "torchvision")}
    builds = {number.partition("+")[2] for number in pair.values() if number}
    if len(builds) < 2 or "cpu" not in builds:
        return None
    advice = "pip uninstall -y torch torchvision; pip install torch torchvision (both from one index)"
    return Check("torch + torchvision", f"{pair['torch']} and {pair['torchvision']}: different builds", "bad", advice)


def old_zarr(versions: Mapping[str, str]) -> Check | None:
    """The store needs the shards and codecs of zarr 3.1."""
    if "zarr" not in versions or _release(versions["zarr"]) >= (3, 1):
        return None
    return Check("zarr", f"{versions['zarr']}, the store needs 3.1", "bad", "pip install 'zarr>=3.1,<4'")


def posterize(versions: Mapping[str, str]) -> Check | None:
    """timm's RandAugment asks Pillow to keep 0 bits now and then, which Pillow refuses since 13.0."""
    if "timm" not in versions or _release(versions["timm"]) > (1, 0, 31) or _release(versions.get("PIL", "0")) < (13,):
        return None
    return Check(
        "timm + Pillow",
        f"{versions['timm']} and {versions['PIL']}: timm's own RandAugment stops at random (posterize to 0 bits)",
        "warn",
        "labels and loading are fine; for training through timm's RandAugment: pip install 'pillow<13'",
    )


def forked_zarrs(versions: Mapping[str, str]) -> Check | None:
    """The zarrs pipeline keeps threads, so a process that has read an array hangs its forked data workers."""
    if "zarrs" not in versions.get(PIPELINE_VARIABLE, ""):
        return None
    value = f"{PIPELINE_VARIABLE}={versions[PIPELINE_VARIABLE]}: hangs in forked data workers"
    return Check("zarrs + fork", value, "warn", f"unset {PIPELINE_VARIABLE}, or start the workers by spawn")


def foreign_annotate(versions: Mapping[str, str]) -> Check | None:
    """An unrelated distribution has the import name of one of our packages."""
    if "annotate" not in versions:
        return None
    value = f"another distribution, annotate {versions['annotate']}, takes the import name of ours"
    return Check(
        "annotate", value, "bad", "pip uninstall -y annotate; pip install --force-reinstall --no-deps tokenlabels"
    )


BAD_PAIRS: tuple[Callable[[Mapping[str, str]], Check | None], ...] = (
    mixed_pil,
    cpu_torch,
    old_zarr,
    posterize,
    forked_zarrs,
    foreign_annotate,
)


def disk_space(name: str, path: Path, wanted_bytes: float) -> Check:
    """Free space at `path`, or where it would be made."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    value = f"{free_bytes / 1e9:,.1f} GB free at {place}"
    if not os.access(place, os.W_OK):
        return Check(name, f"{value}, not writable", "bad", "name a folder that you may write to")
    if free_bytes >= wanted_bytes:
        return Check(name, value)
    status: Status = "warn" if free_bytes >= _LEAST_ROOM_BYTES else "bad"
    return Check(name, value, status, f"free some; {wanted_bytes / 1e9:g} GB are enough for a run of ImageNet's size")


def temporary_space(path: Path) -> Check:
    """Space for temporary files, where a local Ray keeps its session."""
    usage = shutil.disk_usage(path)
    share = 1 - usage.free / usage.total
    if share <= _RAY_DISK_SHARE:
        return disk_space("disk for temporary files", path, _TEMPORARY_ROOM_BYTES)
    return Check(
        "disk for temporary files",
        f"{share:.0%} full at {path}",
        "warn",
        f"Ray stores no objects above {_RAY_DISK_SHARE:.0%}: free some space, set TMPDIR, or use the inline backend",
    )


def open_files(limit: int) -> Check:
    """How many files a process may have open."""
    if limit == resource.RLIM_INFINITY:
        return Check("open files", "no limit")
    if limit >= _LEAST_OPEN_FILES:
        return Check("open files", f"{limit:,}")
    return Check(
        "open files", f"{limit:,}", "warn", f"ulimit -n {_LEAST_OPEN_FILES} or more, before many workers start"
    )


def _installed(name: str, versions: Mapping[str, str]) -> Check:
    if name not in versions:
        return Check(name, "not installed", "bad", f"pip install {name}")
    if name in ("torch", "torchvision"):
        module = _import(name)
        if isinstance(module, Exception):
            value = f"{versions[name]}, but it does not import ({_reason(module)})"
            return Check(name, value, "bad", f"pip install --force-reinstall {name}, and see the pairs below")
    return Check(name, versions[name])


def _pil() -> Check:
    pil = _import("PIL.Image")
    if isinstance(pil, Exception):
        return Check("PIL", f"does not import ({_reason(pil)})", "bad", "pip install --force-reinstall pillow")
    return Check("PIL", pillow_flavour())


def _cuda(driver_file: Path) -> Check:
    driver = _driver_version(driver_file)
    torch = _import("torch")
    if isinstance(torch, Exception):
        return Check("CUDA", f"unknown: torch does not import, driver {driver or 'none'}", "warn", "see torch")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        names = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        devices = ", ".join(f"{count} x {name}" for name, count in names.items())
        return Check("CUDA", f"{devices}, CUDA {torch.version.cuda}, driver {driver or 'unknown'}")
    if driver is None:
        return Check("CUDA", "none, the CPU is used")
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    said = "".join(f": {_reason(warning.message)}" for warning in caught[:1])
    return Check(
        "CUDA",
        f"torch for {built_for} cannot use the driver {driver}{said}",
        "bad",
        "update the driver, or install the torch that is built for it",
    )


def _driver_version(file: Path) -> str | None:
    if not file.exists():
        return None
    found = re.search(r"\s(\d{3,}\.\d+(\.\d+)?)\s", file.read_text())
    return found[1] if found else "unknown"


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _import(name: str) -> ModuleType | Exception:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken build raises ImportError, OSError, RuntimeError or AttributeError
        return error


def _reason(error: BaseException | str) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, str | Warning) else f"{type(error).__name__}: {text}"


def _release(number: str) -> tuple[int, ...]:
    """ "13.0.0.post1+cpu" -> (13, 0, 0)."""
    found = re.match(r"\d+(\.\d+)*", number)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
