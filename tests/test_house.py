"""The arrows of the house: who may import whom, what works without the heavy libraries, what the wheel holds."""

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("tokenlabels", "annotate", "loaders", "jobs")


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            yield str(node.module)


def imports_of(package: str) -> list[tuple[Path, str]]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no files in {package}"
    return [(file.relative_to(ROOT), module) for file in files for module in imported_modules(file)]


def offenders(package: str, forbidden: tuple[str, ...], allowed_in: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    return [
        (str(file), module)
        for file, module in imports_of(package)
        if module.split(".")[0] in forbidden and not str(file).startswith(allowed_in or ("\0",))
    ]


@pytest.mark.parametrize(
    ("package", "forbidden", "allowed_in"),
    [
        pytest.param(
            "tokenlabels", ("annotate", "loaders"), ("tokenlabels/cli/",), id="tokenlabels imports its own parts"
        ),
        pytest.param("tokenlabels", ("zarr", "pydantic"), ("tokenlabels/store/",), id="zarr only in the store"),
        pytest.param("tokenlabels", ("ray", "webdataset"), (), id="tokenlabels knows neither ray nor webdataset"),
        pytest.param("annotate", ("loaders", "webdataset"), (), id="annotate writes and does not load"),
        pytest.param("annotate", ("ray",), ("annotate/schedule.py",), id="ray only in the scheduling module"),
        pytest.param("loaders", ("annotate", "ray"), (), id="loaders read and do not annotate"),
        pytest.param("tokenlabels", ("jobs",), ("tokenlabels/cli/",), id="tokenlabels: commands alone import jobs"),
        *(pytest.param(package, ("jobs",), (), id=f"{package}: nobody imports jobs") for package in PACKAGES[1:3]),
    ],
)
def test_import_arrows(package: str, forbidden: tuple[str, ...], allowed_in: tuple[str, ...]) -> None:
    assert offenders(package, forbidden, allowed_in) == []


def test_the_command_line_imports_other_packages_inside_commands_only() -> None:
    for file in sorted((ROOT / "tokenlabels" / "cli").glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            heavy = {"annotate", "jobs", "loaders", "torch", "zarr", "timm"}
            assert not {name.split(".")[0] for name in names} & heavy, file


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        pytest.param(
            "tokenlabels, tokenlabels.types, tokenlabels.geometry, tokenlabels.boxes, tokenlabels.affine, "
            "tokenlabels.targets, tokenlabels.mixing, tokenlabels.losses",
            "ray zarr webdataset pydantic timm torchvision PIL",
            id="the maths",
        ),
        pytest.param(
            "tokenlabels.models, tokenlabels.models.lvvit, tokenlabels.models.dense, tokenlabels.align, "
            "tokenlabels.trainer",
            "ray zarr webdataset pydantic",
            id="models and trainer",
        ),
        pytest.param("tokenlabels.analysis", "ray zarr webdataset pydantic", id="analysis"),
        pytest.param("annotate.teachers", "ray zarr webdataset pydantic", id="teachers"),
        pytest.param("tokenlabels.store, annotate.shard", "ray webdataset", id="one shard"),
        pytest.param(
            "tokenlabels.views, tokenlabels.views.labelled, tokenlabels.views.replayed, tokenlabels.audit.audit, "
            "tokenlabels.audit.compare, tokenlabels.report.page",
            "ray webdataset torch timm torchvision matplotlib",
            id="looking at labels",
        ),
        pytest.param("tokenlabels.cli", "ray zarr webdataset torch timm", id="the command line"),
    ],
)
def test_works_without(modules: str, absent: str) -> None:
    """Import the modules in a fresh process in which the absent libraries cannot be imported."""
    code = f"import sys\nfor name in '{absent}'.split():\n    sys.modules[name] = None\nimport {modules}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_every_package_opens_with_a_docstring() -> None:
    for file in sorted(ROOT.glob("*/**/__init__.py")):
        if file.relative_to(ROOT).parts[0] in PACKAGES:
            docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
            assert docstring, f"{file} has no docstring"


@pytest.mark.slow
def test_the_wheel_holds_the_three_packages_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"tokenlabels", "annotate", "loaders"}
    on_disk = {
        str(file.relative_to(ROOT))
        for package in PACKAGES[:3]
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {name for name in names if ".dist-info" not in name} == on_disk
