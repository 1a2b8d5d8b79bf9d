#!/usr/bin/env bash
# Creates or completes an environment from a lock file; called by make.
# usage: scripts/environment.sh [PYTHON] [FOLDER, .venv if not given] [LOCK, requirements.lock if not given]
# TORCH=cpu leaves all of CUDA out: torch and torchvision in the lock's versions from PyTorch's own index of CPU builds, or from
# TORCH_WHEELS, a folder or page of wheels. Of these two the lock has no hashes.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${1:-python3}"
venv="${2:-.venv}"
lock="${3:-requirements.lock}"
unfinished="$venv/.unfinished"
torch="${TORCH:-cuda}"

die() {
    echo "error: $*" >&2
    exit 1
}

case "$torch" in
    cpu | cuda) ;;
    *) die "TORCH is cpu or cuda, got $torch." ;;
esac
command -v "$python" >/dev/null || die "$python was not found: install Python 3.10 to 3.13, or name one: make PYTHON=python3.12 ..."
version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" || die "$python does not run."
case "$version" in
    3.10 | 3.11 | 3.12 | 3.13) ;;
    *) die "$python is Python $version, this project needs 3.10 to 3.13: name another one: make PYTHON=python3.12 ..." ;;
esac
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python has no venv module: install it (on Debian and Ubuntu the package python$version-venv)."

# An install that was cut short may have left packages that look complete: they are all laid down again.
repair=()
if [ -e "$unfinished" ]; then
    echo "Completing $venv: its last install was interrupted."
    repair=(--reinstall)
fi
usable='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))'
if [ -e "$venv" ] && ! "$venv/bin/python" -c "$usable" 2>/dev/null; then
    echo "Removing $venv: its Python does not run or is not 3.10 to 3.13."
    rm -rf "$venv"
fi
if [ ! -e "$venv" ]; then
    size="3 GB to download and 7 GB on disk"
    [ "$torch" = cuda ] || size="2.5 GB on disk"
    echo "Creating $venv with Python $version; the packages take about $size."
    "$python" -m venv "$venv"
fi
touch "$unfinished"
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null

parts="$(mktemp -d)"
trap 'rm -rf "$parts"' EXIT
entries() { # only|rest PATTERN: entries of the lock by name
    awk -v part="$1" -v pattern="$2" -f scripts/lock_entries.awk "$lock"
}

# uv is itself one of the locked packages, so its hash is checked too.
entries only '^uv$' >"$parts/uv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r "$parts/uv"

# uv does not read pip's configuration: hand it the package index that pip would use.
if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
    index="${PIP_INDEX_URL:-$("$venv/bin/python" -m pip config get global.index-url 2>/dev/null || true)}"
    [ -z "$index" ] || export UV_DEFAULT_INDEX="$index"
fi

uv=("$venv/bin/uv" pip install --python "$venv/bin/python")
if [ "$torch" = cuda ]; then
    "${uv[@]}" "${repair[@]}" --require-hashes -r "$lock"
else
    entries rest '^(torch|torchvision|triton|nvidia-.*|cuda-.*)$' >"$parts/without_cuda"
    entries only '^(torch|torchvision)$' | sed -n 's/^\([a-z].*\) \\$/\1/p' >"$parts/torch"
    where=(--torch-backend cpu)
    [ -z "${TORCH_WHEELS:-}" ] || where=(--no-index --find-links "$TORCH_WHEELS")
    "${uv[@]}" "${repair[@]}" --no-deps --require-hashes -r "$parts/without_cuda"
    "${uv[@]}" "${repair[@]}" --no-deps "${where[@]}" -r "$parts/torch"
fi
# Byte code is compiled here, on all cores: otherwise the first import of torch and transformers pays for it, and
# where PYTHONDONTWRITEBYTECODE is set every import does (ten seconds for each test process). A third of it all is of tests and of
# what hardly anything imports. A file that does not compile is a template of its package.
seldom='/(tests?|OpenGL|mypy|mypyc|setuptools|pip)/|/transformers/models/'
python="$(cd "$venv/bin" && pwd)/python"
# from inside, as the folder the project is in may be called "test"
(cd "$venv"/lib/python*/site-packages && "$python" -m compileall -q -j 0 -x "$seldom" . >/dev/null) || true
"${uv[@]}" --quiet --no-deps --no-build-isolation --editable .
rm -f "$unfinished"
