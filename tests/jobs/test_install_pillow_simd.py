"""The script that swaps Pillow for pillow-simd.

What it does to an environment is tried on throw-away ones: their Pillow, and the "pillow-simd" that is built, are small
packages around the Pillow of this environment, so that nothing is compiled or downloaded. One test does the real thing.
"""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
from pathlib import Path

import PIL
import pytest

SCRIPT = Path(__file__).parents[2] / "jobs" / "install_pillow_simd.sh"
REAL_PIL = Path(PIL.__file__).parent
VERSION = PIL.__version__

# PIL as a folder without a copy of its compiled parts.
SHIM = f"""
__path__.append({str(REAL_PIL)!r})
exec(open({str(REAL_PIL / "__init__.py")!r}).read())
"""

WRONG_PIXELS = """
from PIL import Image as _image
_resize = _image.Image.resize
_image.Image.resize = lambda *args, **options: _resize(*args, **options).point(lambda value: value + 3)
"""

BROKEN_IN_PLACE = """
if "site-packages" in __file__:
    raise ImportError("a library of this build is not where it was")
"""

BACKEND = """
import zipfile

METADATA = "Metadata-Version: 2.1\\nName: pillow-simd\\nVersion: VERSION\\n"
WHEEL = "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"

def build_wheel(folder, config_settings=None, metadata_directory=None):
    name, info = "pillow_simd-VERSION-py3-none-any.whl", "pillow_simd-VERSION.dist-info"
    files = {"PIL/__init__.py": open("init.txt").read(), f"{info}/METADATA": METADATA, f"{info}/WHEEL": WHEEL}
    record = "".join(f"{path},,\\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(path, text)
    return name
""".replace("VERSION", VERSION)


def run(*arguments: str, environment: Path | None, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    if environment is not None:
        env["VIRTUAL_ENV"] = str(environment)
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=env | variables, capture_output=True, text=True, timeout=900
    )


def install(environment: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script to build; skips the test on a machine that cannot."""
    result = run(environment=environment, **variables)
    if "apt-get install" in result.stderr or "x86-64" in result.stderr:
        pytest.skip(result.stderr.strip())
    return result


def test_bash_can_read_it() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_it_may_be_run() -> None:
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck_finds_nothing() -> None:
    subprocess.run(["shellcheck", str(SCRIPT)], check=True)


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_explains_the_shared_folder(option: str) -> None:
    result = run(option, environment=None)
    assert result.returncode == 0
    assert "owns the same folder, PIL" in result.stdout
    assert "--undo" in result.stdout


def test_an_unknown_option_is_wrong_use() -> None:
    result = run("--force", environment=None)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: ")


@pytest.mark.parametrize("arguments", [(), ("--undo",)], ids=["install", "undo"])
def test_outside_a_virtual_environment_it_refuses(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = run(*arguments, environment=None)
    assert (result.returncode, result.stdout) == (1, "")
    assert "no active virtual environment" in result.stderr

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    result = run(*arguments, environment=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"{tmp_path} is not a virtual environment" in result.stderr


def site_of(environment: Path) -> Path:
    return environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def pil_of(environment: Path) -> dict[str, bytes]:
    """What of PIL and its distributions is in an environment."""
    files = contents(site_of(environment))
    return {name: data for name, data in files.items() if name.startswith(("PIL/", "pillow"))}


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment with a Pillow and without pip."""
    path = tmp_path / "environment"
    venv.create(path, symlinks=True)
    site = site_of(path)
    for folder in ("PIL", f"pillow-{VERSION}.dist-info", "pillow.libs"):
        (site / folder).mkdir()
    (site / "PIL" / "__init__.py").write_text(SHIM)
    (site / "pillow.libs" / "libjpeg.so").write_text("a library")
    metadata = f"Metadata-Version: 2.1\nName: pillow\nVersion: {VERSION}\n"
    (site / f"pillow-{VERSION}.dist-info" / "METADATA").write_text(metadata)
    return path


def test_an_environment_without_pillow_is_refused(environment: Path) -> None:
    shutil.rmtree(site_of(environment) / f"pillow-{VERSION}.dist-info")
    result = run(environment=environment)
    assert (result.returncode, "no Pillow in" in result.stderr) == (1, True)


def test_two_distributions_over_each_other_are_refused(environment: Path) -> None:
    info = site_of(environment) / "pillow_simd-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pillow-simd\nVersion: 1.0\n")
    result = run(environment=environment)
    assert result.returncode == 1
    assert f"both pillow {VERSION} and pillow-simd 1.0 are installed" in result.stderr


def test_undo_without_a_kept_pillow_says_what_to_run(environment: Path) -> None:
    before = pil_of(environment)
    result = run("--undo", environment=environment)
    assert (result.returncode, "pip uninstall -y pillow pillow-simd" in result.stderr) == (1, True)
    assert pil_of(environment) == before


def test_no_compiler_is_named_with_its_package(environment: Path) -> None:
    result = run(environment=environment, CC="no-such-compiler -O2")
    assert (result.returncode, "no C compiler (no-such-compiler -O2). apt-get install" in result.stderr) == (1, True)


def test_missing_headers_are_named_with_their_packages(environment: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nsource=$(cat)\ncase "$source" in *jpeglib*) exit 1 ;; esac\n')
    compiler.chmod(0o755)
    result = run(environment=environment, CC=str(compiler))
    assert result.returncode == 1
    assert "missing headers: jpeglib.h. apt-get install python3-dev libjpeg-dev zlib1g-dev" in result.stderr


@pytest.fixture
def offline_pip(environment: Path) -> Path:
    """Gives the environment pip."""
    subprocess.run([environment / "bin" / "python", "-m", "ensurepip"], check=True, capture_output=True)
    return environment


def index_with(init: str, folder: Path) -> dict[str, str]:
    """Variables by which pip finds one source distribution of pillow-simd, whose PIL/__init__.py is `init`."""
    folder.mkdir()
    pyproject = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    files = {"pyproject.toml": pyproject, "backend.py": BACKEND, "init.txt": textwrap.dedent(init)}
    files["PKG-INFO"] = f"Metadata-Version: 2.1\nName: pillow-simd\nVersion: {VERSION}\n"
    name = f"pillow_simd-{VERSION}"
    with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as tar:
        for path, text in files.items():
            member = tarfile.TarInfo(f"{name}/{path}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}


@pytest.mark.slow
def test_swap_and_undo(offline_pip: Path, tmp_path: Path) -> None:
    before = pil_of(offline_pip)
    index = index_with(SHIM, tmp_path / "index")
    result = install(offline_pip, **index)
    assert result.returncode == 0, result.stderr
    assert "largest difference to Pillow: 0 grey levels" in result.stdout
    assert "ratio " in result.stdout
    swapped = pil_of(offline_pip)
    assert f"pillow_simd-{VERSION}.dist-info/METADATA" in swapped
    assert not any(name.startswith(("pillow-", "pillow.libs")) for name in swapped)

    again = run(environment=offline_pip, **index)
    assert (again.returncode, "installed already" in again.stdout) == (0, True)
    assert pil_of(offline_pip) == swapped

    undone = run("--undo", environment=offline_pip)
    assert (undone.returncode, undone.stdout) == (0, f"Pillow {VERSION} is back.\n")
    assert pil_of(offline_pip) == before
    assert not list(offline_pip.glob("pillow-before-simd*"))


FAILURES = {
    "does not build": (None, "could not be built; Pillow was not touched"),
    "does not import": ("raise ImportError('libjpeg.so.62')", "does not work; Pillow was not touched"),
    "other pixels": (SHIM + WRONG_PIXELS, "differs from Pillow's by 3 grey levels"),
    "fails once in place": (BROKEN_IN_PLACE + SHIM, "the proof failed in place; Pillow is back"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("init", "message"), FAILURES.values(), ids=FAILURES.keys())
def test_whatever_fails_pillow_stays(init: str | None, message: str, offline_pip: Path, tmp_path: Path) -> None:
    before = pil_of(offline_pip)
    index = index_with(init or SHIM, tmp_path / "index")
    if init is None:
        (tmp_path / "index" / f"pillow_simd-{VERSION}.tar.gz").unlink()
    result = install(offline_pip, **index)
    assert result.returncode == 1
    assert message in result.stderr
    assert pil_of(offline_pip) == before
    assert not list(offline_pip.glob("pillow-before-simd*"))


@pytest.mark.slow
def test_the_real_thing(tmp_path: Path) -> None:
    path = tmp_path / "environment"
    venv.create(path, symlinks=True, with_pip=True)
    get_pillow = [str(path / "bin" / "python"), "-m", "pip", "install", "--quiet", f"pillow=={VERSION}"]
    if subprocess.run(get_pillow, capture_output=True).returncode:
        pytest.skip("no package index is in reach")
    before = pil_of(path)
    result = install(path)
    assert result.returncode == 0, result.stderr
    assert "grey levels (2 are allowed)" in result.stdout
    assert run("--undo", environment=path).returncode == 0
    assert pil_of(path) == before
