# Sourced by the other scripts: goes to the repository and puts its Python first. That is .venv, made from the
# requirements where it is missing, unfinished or of other requirements; or NANOCOLBERT_PYTHON=/path/to/python, used as
# it is: then nothing is installed. pip's own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL) say where packages are.

setup_error() { echo "setup.sh: error: $*" >&2; return 2; }

version_of() {  # version_of PYTHON: print its version; succeed if it is recent enough
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))' 2> /dev/null
}

own_python() {  # print the absolute path of NANOCOLBERT_PYTHON
    local path version
    path=$(command -v -- "$NANOCOLBERT_PYTHON") ||
        setup_error "NANOCOLBERT_PYTHON=$NANOCOLBERT_PYTHON: no such program" || return
    version=$(version_of "$path") || setup_error "needs Python 3.11 or later, found ${version:-none} at $path" || return
    case $path in /*) echo "$path" ;; *) echo "$PWD/$path" ;; esac
}

find_python() {  # print the path of a Python for .venv, the plain one if that will do
    local name version found=
    for name in python3 python3.13 python3.12 python3.11; do
        version=$(version_of "$name") && command -v "$name" && return
        found=${found:-${version:+$version at $(command -v "$name")}}
    done
    setup_error "needs Python 3.11 or later, found ${found:-none}"
}

has_gpu() { command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; }

lacks_gpu_builds() { [ -e .venv/without_gpu ] && has_gpu; }  # made elsewhere: a folder shared with machines without one

checksum() { cat requirements{,-demo,-dev,-gpu,-serve}.txt | cksum; }

is_ready() {
    [ "$(cat .venv/ready 2> /dev/null)" = "$(checksum)" ] && [ -x .venv/bin/python ] && ! lacks_gpu_builds
}

make_venv() {  # set -e does not hold in all that calls this: each step says what follows if it fails
    local python torch pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
    local more=(-r requirements-dev.txt -r requirements-serve.txt)
    if [ -e .venv/unfinished ] || lacks_gpu_builds; then rm -rf .venv; fi
    if [ ! -e .venv ]; then
        python=$(find_python) || return
        "$python" -c 'import ensurepip' 2> /dev/null ||
            setup_error "$python cannot make .venv: install its venv package (Debian, Ubuntu: python3-venv)" || return
        echo "setting up .venv (a few minutes)"
        { mkdir .venv && touch .venv/unfinished && "$python" -m venv .venv; } || return
        has_gpu || touch .venv/without_gpu
    else
        version_of .venv/bin/python > /dev/null ||
            setup_error "$PWD/.venv: its Python is gone, or older than 3.11: remove .venv" || return
        echo "updating .venv (a few minutes)"
        rm -f .venv/ready
    fi
    if has_gpu; then
        "${pip[@]}" -r <(grep -v '^faiss-cpu' requirements.txt) -r requirements-gpu.txt "${more[@]}"
    else
        # Without 3.7 GB of CUDA libraries, where the package index has that build; else requirements.txt's own follows.
        torch=$(sed -n 's/^\(torch==[^ #]*\).*/\1+cpu/p' requirements.txt)
        "${pip[@]}" --no-deps "$torch" > /dev/null 2>&1 || true
        "${pip[@]}" -r requirements.txt "${more[@]}"
    fi && "${pip[@]}" --no-deps -r requirements-demo.txt && checksum > .venv/ready && rm -f .venv/unfinished ||
        setup_error "the packages above could not be installed: run this again"
}

set_up() {  # one at a time, where there is flock: the next one waits, and finds it done
    ( ! command -v flock > /dev/null || flock 9; is_ready || make_venv ) 9< .
}

if [ -n "${NANOCOLBERT_PYTHON:-}" ]; then
    NANOCOLBERT_PYTHON=$(own_python) || return
    export NANOCOLBERT_PYTHON
    CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || return
    nanocolbert_python=$NANOCOLBERT_PYTHON
else
    CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || return
    is_ready || set_up || return
    nanocolbert_python=$PWD/.venv/bin/python
fi
export PATH="${nanocolbert_python%/*}:$PATH"
unset PYTHONHOME
python() { "$nanocolbert_python" "$@"; }  # whatever its name is (venv's activate would misquote a folder's " and $)
