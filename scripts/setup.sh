# Sourced by the other scripts: makes .venv from the requirements when it is missing or they have changed, enters it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=(requirements.txt requirements-demo.txt requirements-dev.txt requirements-gpu.txt)
if [ "$(cat .venv/ready 2>/dev/null)" != "$(cat "${requirements[@]}" | cksum)" ]; then
    echo "setting up .venv (a few minutes)"
    [ -x .venv/bin/python ] || python3 -m venv .venv
    pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
    if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then
        "${pip[@]}" -r <(grep -v '^faiss-cpu' requirements.txt) -r requirements-gpu.txt -r requirements-dev.txt
    else
        "${pip[@]}" -r requirements.txt -r requirements-dev.txt
    fi
    "${pip[@]}" --no-deps -r requirements-demo.txt
    cat "${requirements[@]}" | cksum > .venv/ready
fi
source .venv/bin/activate
