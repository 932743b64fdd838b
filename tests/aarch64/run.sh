#!/usr/bin/env bash
# Runs sanrt for aarch64 on an x86-64 Debian under QEMU: the tests of its CPU kernels, and a picture by `sanrt run`, which is
# held against the same on this machine. Nothing is installed here: all goes into FOLDER, about 860 MB.
#     tests/aarch64/run.sh [FOLDER] [more arguments for pytest]
# The Python that sanrt is installed for on this machine is .venv's, or PYTHON.
set -euo pipefail
repository=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(realpath -m "${1:-$repository/build/aarch64}")
here=$(realpath -s "${PYTHON:-$repository/.venv/bin/python}")
mkdir -p "$folder"/{lists,cache/archives,qemu}/partial
cd "$folder"

# Debian's Python for arm64 and all that it needs, unpacked into arm64/; apt with lists and a state of its own needs no root.
touch status
arm64() {
    apt-get -qq -y -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$folder" -o Dir::State::lists=lists \
        -o Dir::State::status="$folder/status" -o Dir::Cache="$folder/cache" -o Debug::NoLocking=1 "$@"
}
if [ ! -e arm64 ]; then
    arm64 update
    arm64 --no-install-recommends --download-only install python3 libstdc++6
    for package in cache/archives/*.deb; do dpkg -x "$package" unpacked; done
    apt-get -qq download qemu-user-static
    dpkg -x qemu-user-static_*.deb qemu
    mv unpacked arm64
fi

# sanrt as it is now, with the wheels of what it installs; pyvips has no wheel of its own, and no machine code either.
python=$(basename "$(echo arm64/usr/bin/python3.[0-9]*)")
version=${python#python}
"$here" -m pip -q wheel --no-deps --wheel-dir wheels "$repository" 'pyvips>=3,<4'
platforms=$(for libc in 17 24 26 27 28 31 34; do echo "--platform manylinux_2_${libc}_aarch64"; done)
rm -rf site
"$here" -m pip -q install --target site --only-binary=:all: --find-links wheels $platforms --platform manylinux2014_aarch64 \
    --python-version "$version" --abi "cp${version/./}" --abi abi3 --abi none wheels/sanrt-*.whl pytest

there() {
    "$folder/qemu/usr/bin/qemu-aarch64-static" -L "$folder/arm64" -E PYTHONPATH="$folder/site" -E PYTHONHOME="$folder/arm64/usr" \
        -E PYTHONDONTWRITEBYTECODE=1 -E XDG_CACHE_HOME="$folder/compiled" -E OMP_NUM_THREADS=1 "$folder/arm64/usr/bin/$python" "$@"
}

echo "--- what runs"
qemu/usr/bin/qemu-aarch64-static --version | head -1
there -c 'import platform, llvmlite, numpy, pyvips; from sanrt.kernels.cpu.ir import this_processor as p
print(platform.machine(), "Python", platform.python_version(), "llvmlite", llvmlite.__version__, "numpy", numpy.__version__,
      "libvips", f"{pyvips.version(0)}.{pyvips.version(1)}", "lanes", p().lanes, "registers", p().registers)'

echo "--- a picture"
picture=$repository/tests/aarch64/picture.py
"$here" "$picture" make picture.png
"$here" -m sanrt run --overwrite --backend native --precision fp32 picture.png here.png
there -m sanrt run --overwrite --precision fp32 picture.png there.png
"$here" "$picture" upscale here.npy
there "$picture" upscale there.npy
"$here" "$picture" compare here there
there -m sanrt run --overwrite --precision int16 picture.png none.png || [ $? = 1 ]

echo "--- the tests"
# In vectors of this processor, which are of 128 bits anyway; what needs torch skips.
cd "$repository"
there -m pytest -q -p no:cacheprovider tests/kernels/cpu -k 'not 128-bit and not other_systems' "${@:2}"
