#!/usr/bin/env bash
# Replaces Pillow by pillow-simd in the active virtual environment, or puts Pillow back. See usage() below.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: jobs/install_pillow_simd.sh [--undo | --help]

Builds pillow-simd for this CPU, proves it against the Pillow that is installed, and puts it in Pillow's place in the
active virtual environment. Decoding and resizing images get faster; nothing else changes.

pillow-simd is a fork of Pillow that owns the same folder, PIL. Only one of them can be installed, and every
distribution that asks for Pillow by name (torchvision, timm) will be reported by `pip check` as lacking it. The next
`pip install` that pulls Pillow in overwrites a part of pillow-simd: `tokenlabels doctor` finds that, and --undo
repairs it.

pillow-simd 12 resizes as Pillow 12 does. Pillow 13 differs from both where bicubic overshoots black or white: by up to
7 grey levels in 2 of 100,000 values of real photographs, elsewhere by 2 at most.

The proof, before anything is replaced: pillow-simd imports, has the version that was built, and decodes and resizes
a test image to within 2 grey levels of Pillow. The ratio of their speeds is printed, not asserted. After the swap the
same is checked in place, torchvision and timm included; if it fails, Pillow is put back.

  --undo   put back the Pillow that was there before
  --help   this text

Needs an x86-64 CPU, a C compiler, the headers of Python, libjpeg and zlib, and pip or uv with access to a package
index. On Debian and Ubuntu: apt-get install build-essential python3-dev libjpeg-dev zlib1g-dev (and libwebp-dev, if
there are WebP images).
TEXT
}

die() {
    printf 'install_pillow_simd: %s\n' "$*" >&2
    exit 1
}

say() {
    printf '%s\n' "$*"
}

# What PIL and its distributions are, in the site-packages of the environment.
list_pil() {
    find "$SITE" -mindepth 1 -maxdepth 1 \
        \( -name PIL -o -iname pillow.libs -o -iname 'pillow-[0-9]*.dist-info' -o -iname 'pillow_simd-*.dist-info' \)
}

remove_pil() {
    list_pil | while read -r entry; do rm -rf "$entry"; done
}

restore_pillow() {
    remove_pil
    mv "$BACKUP"/* "$SITE"/
    rmdir "$BACKUP"
}

find_environment() {
    [[ -n "${VIRTUAL_ENV:-}" && -x "$VIRTUAL_ENV/bin/python" ]] ||
        die "no active virtual environment. Activate the one that tokenlabels is installed in; a system-wide Pillow is never touched."
    PYTHON=$VIRTUAL_ENV/bin/python
    "$PYTHON" -P -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' ||
        die "$VIRTUAL_ENV is not a virtual environment. Activate one made by 'python -m venv' or 'uv venv'."
    SITE=$("$PYTHON" -P -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
    BACKUP=$VIRTUAL_ENV/pillow-before-simd
}

distribution_version() {
    "$PYTHON" -P - "$1" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    print(version(sys.argv[1]))
except PackageNotFoundError:
    pass
PY
}

undo() {
    [[ -d "$BACKUP" ]] ||
        die "no Pillow was kept at $BACKUP. Run: pip uninstall -y pillow pillow-simd; pip install pillow"
    restore_pillow
    say "Pillow $(distribution_version pillow) is back."
}

check_pillow_is_alone() {
    local pillow simd
    pillow=$(distribution_version pillow)
    simd=$(distribution_version pillow-simd)
    if [[ -n "$simd" && -n "$pillow" ]]; then
        die "both pillow $pillow and pillow-simd $simd are installed over each other. Run this with --undo first."
    fi
    if [[ -n "$simd" ]]; then
        say "pillow-simd $simd is installed already; --undo brings Pillow back."
        exit 0
    fi
    [[ -n "$pillow" && -d "$SITE/PIL" ]] || die "no Pillow in $SITE. Install tokenlabels in this environment first."
    [[ ! -e "$BACKUP" ]] || die "$BACKUP is in the way: an earlier run kept a Pillow there. Remove it if Pillow works."
}

check_build_needs() {
    local compiler=${CC:-cc} include missing=()
    [[ "$(uname -m)" == x86_64 ]] || die "pillow-simd is written for x86-64 CPUs; this one is $(uname -m)."
    # shellcheck disable=SC2086  # CC may carry options
    command -v ${compiler%% *} >/dev/null || die "no C compiler ($compiler). apt-get install build-essential"
    include=$("$PYTHON" -P -c 'import sysconfig; print(sysconfig.get_path("include"))')
    for header in Python.h jpeglib.h zlib.h; do
        # shellcheck disable=SC2086
        printf '#include <stdio.h>\n#include <%s>\n' "$header" | $compiler -I"$include" -E -x c - >/dev/null 2>&1 ||
            missing+=("$header")
    done
    ((${#missing[@]} == 0)) ||
        die "missing headers: ${missing[*]}. apt-get install python3-dev libjpeg-dev zlib1g-dev"
}

# pillow-simd is built for SSE4 by default; AVX2 is chosen by the compiler's command line.
compiler_for_this_cpu() {
    if grep -qw avx2 /proc/cpuinfo; then
        printf '%s -mavx2' "${CC:-cc}"
    else
        printf '%s' "${CC:-cc}"
    fi
}

# Without the cache: it may hold a build for another CPU.
build_into() {
    local options=(--no-cache-dir --no-deps --no-binary pillow-simd --target "$1" pillow-simd)
    if "$PYTHON" -m pip --version >/dev/null 2>&1; then
        CC=$(compiler_for_this_cpu) "$PYTHON" -m pip install --quiet "${options[@]}"
    elif command -v uv >/dev/null; then
        CC=$(compiler_for_this_cpu) uv pip install --quiet --python "$PYTHON" "${options[@]}"
    else
        die "neither pip nor uv is there to build with. Run: $PYTHON -m ensurepip"
    fi
}

# probe NAME [FOLDER]: writes what PIL (from FOLDER, if given) makes of the test image to $WORK/NAME.*, prints seconds.
probe() {
    PYTHONPATH="${2:-}" "$PYTHON" -P - "$WORK" "$1" <<'PY'
import sys, time
from pathlib import Path

import PIL
from PIL import Image, features

work, name = Path(sys.argv[1]), sys.argv[2]
photo = work / "photo.jpg"
if not photo.exists():
    # Kept away from black and white, where Pillow 13 cuts overshoot off differently from the Pillow before it.
    size = (500, 375)
    planes = [Image.radial_gradient("L"), Image.linear_gradient("L"), Image.effect_noise(size, 60)]
    planes = [plane.resize(size, Image.Resampling.BICUBIC).point(lambda v: 64 + v // 2) for plane in planes]
    Image.merge("RGB", planes).save(photo, quality=92)


def outputs():
    image = Image.open(photo).convert("RGB")
    box = (37, 21, 437, 341)
    yield image
    yield image.resize((224, 224), Image.Resampling.BILINEAR, box=box)
    yield image.resize((224, 224), Image.Resampling.BICUBIC, box=box)
    yield image.resize((576, 576), Image.Resampling.BICUBIC)


(work / f"{name}.pixels").write_bytes(b"".join(image.tobytes() for image in outputs()))
(work / f"{name}.version").write_text(PIL.__version__)
(work / f"{name}.formats").write_text("\n".join(features.get_supported()))
seconds = []
for _ in range(20):
    start = time.perf_counter()
    Image.open(photo).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC, box=(37, 21, 437, 341))
    seconds.append(time.perf_counter() - start)
print(min(seconds))
PY
}

# Holds the probe $1 against Pillow's: the version that was built, pixels within 2 grey levels.
compare_with_pillow() {
    "$PYTHON" -P - "$WORK" "$1" "$SIMD_VERSION" <<'PY'
import sys
from pathlib import Path

work, name, expected = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
got = (work / f"{name}.version").read_text()
if got != expected:
    sys.exit(f"PIL calls itself {got}, expected {expected}")
pillow, simd = ((work / f"{which}.pixels").read_bytes() for which in ("pillow", name))
if len(pillow) != len(simd):
    sys.exit(f"{len(simd)} bytes of pixels, Pillow makes {len(pillow)}")
largest = max(abs(a - b) for a, b in zip(pillow, simd))
if largest > 2:
    sys.exit(f"a pixel differs from Pillow's by {largest} grey levels, 2 are allowed")
print(f"largest difference to Pillow: {largest} grey levels (2 are allowed)")
before, after = (set((work / f"{which}.formats").read_text().split()) for which in ("pillow", name))
if lost := sorted(before - after):
    print(f"features of Pillow that this build lacks (their headers were not found): {', '.join(lost)}")
PY
}

# Whatever of torchvision and timm is installed must still import.
check_dependants() {
    "$PYTHON" -P - <<'PY'
import importlib, importlib.util
for name in ("torchvision", "timm"):
    if importlib.util.find_spec(name):
        importlib.import_module(name)
        print(f"{name} imports")
PY
}

print_speed() {
    local pillow=() simd=()
    for _ in 1 2 3 4 5; do
        pillow+=("$(probe pillow)")
        simd+=("$(probe trial "$TRIAL")")
    done
    "$PYTHON" -P - "${pillow[*]}" "${simd[*]}" <<'PY'
import sys
from statistics import median
pillow, simd = (median(map(float, text.split())) for text in sys.argv[1:])
print(
    f"decode and resize 500x375 -> 224x224: Pillow {1e3 * pillow:.2f} ms, pillow-simd {1e3 * simd:.2f} ms, "
    f"ratio {pillow / simd:.2f}"
)
PY
}

# Pillow is copied and not moved, so that the backup is whole before anything is taken away.
swap() {
    rm -rf "$BACKUP.part"
    mkdir "$BACKUP.part"
    list_pil | while read -r entry; do cp -a "$entry" "$BACKUP.part"/; done
    mv "$BACKUP.part" "$BACKUP"
    SWAPPED=yes
    remove_pil
    cp -a "$TRIAL"/PIL "$TRIAL"/pillow_simd-*.dist-info "$SITE"/
}

# Runs however the script ends; whatever goes wrong after Pillow was taken away brings it back.
clean_up() {
    local status=$?
    if [[ "$SWAPPED" == yes && "$PROVEN" == no ]]; then
        restore_pillow
        printf 'install_pillow_simd: the proof failed in place; Pillow is back.\n' >&2
    fi
    rm -rf "$WORK"
    exit "$status"
}

install() {
    check_pillow_is_alone
    check_build_needs
    SWAPPED=no PROVEN=no
    WORK=$(mktemp -d)
    trap clean_up EXIT
    trap 'exit 130' INT TERM
    TRIAL=$WORK/trial

    say "Building pillow-simd with $(compiler_for_this_cpu) (about a minute) ..."
    build_into "$TRIAL" || die "pillow-simd could not be built; Pillow was not touched."
    SIMD_VERSION=$(find "$TRIAL" -maxdepth 1 -name 'pillow_simd-*.dist-info' | sed 's/.*pillow_simd-\(.*\)\.dist-info/\1/')
    say "Built pillow-simd $SIMD_VERSION. Holding it against Pillow $(distribution_version pillow) ..."
    probe pillow >/dev/null
    probe trial "$TRIAL" >/dev/null || die "pillow-simd does not work; Pillow was not touched."
    compare_with_pillow trial || die "pillow-simd failed the proof; Pillow was not touched."
    print_speed

    swap
    probe installed >/dev/null
    compare_with_pillow installed >/dev/null
    check_dependants
    PROVEN=yes
    say "pillow-simd $SIMD_VERSION is installed in $VIRTUAL_ENV. --undo brings Pillow back, kept at $BACKUP."
}

case "${1:-}" in
    -h | --help) usage ;;
    --undo)
        find_environment
        undo
        ;;
    "")
        find_environment
        install
        ;;
    *)
        usage >&2
        exit 2
        ;;
esac
