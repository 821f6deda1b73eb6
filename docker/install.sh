#!/usr/bin/env bash
# The steps of docker/Dockerfile, one RUN each. CI runs the same steps in a clean virtual environment.
#   docker/install.sh user             create the user of the image (root only)
#   docker/install.sh dependencies     install the dependencies of vcrd except torch, at the versions of requirements/
#   docker/install.sh extension        install vcrd with its compiled extension
#   docker/install.sh check            check the installation, without a GPU
# Variables: PYTHON, the interpreter with torch (python3); CUDA_ARCHITECTURES, the targets of the extension (9.0a; others:
# "9.0a;10.0"; none: only CPU kernels, for a torch without CUDA); USER_ID and GROUP_ID of the user (1000); PREFIX, a folder
# that replaces / for the step user ("").
set -euo pipefail

: "${PYTHON:=python3}" "${CUDA_ARCHITECTURES:=9.0a}" "${USER_ID:=1000}" "${GROUP_ID:=1000}" "${PREFIX:=}"
name=vcrd
home=/home/$name
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
    echo "vcrd: $*" >&2
    exit 1
}

# Uses the installed packages, not PYTHONPATH and (-I) not the current folder. -B writes no caches.
unset PYTHONPATH
python() { "$PYTHON" -I -B "$@"; }
pip() { "$PYTHON" -I -m pip --disable-pip-version-check --no-input -q "$@"; }

# Prints version, folder and contents of torch, without importing it.
torch_identity() {
    python - <<'END'
import hashlib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

spec = find_spec("torch")
if spec is None:
    raise SystemExit("vcrd: torch is not installed here: it comes with the base image and is never installed anew")
folder = Path(spec.origin).parent
contents = hashlib.sha256((folder / "version.py").read_bytes()).hexdigest()[:12]
print("torch", version("torch"), "in", folder, contents)
END
}

# Runs pip, and fails if torch changed.
pip_beside_torch() {
    local before after
    before=$(torch_identity)
    pip "$@" || fail "pip could not install beside $before; what it said is above"
    after=$(torch_identity)
    [[ $after == "$before" ]] || fail "torch was replaced: before $before, now $after"
    echo "unchanged: $after"
}

dependencies() {
    python "$root/docker/pins.py" "$work"
    # Replaces the constraints of the base image, which contain more than torch and do not have our pins.
    PIP_CONSTRAINT=$work/held.txt pip_beside_torch install -r "$work/install.txt"
}

extension() {
    local kernels='the CPU alone'
    python -c 'import sys; sys.path.insert(0, sys.argv[1]); import check; check.asked(sys.argv[2])' \
        "$root/docker" "$CUDA_ARCHITECTURES"
    if [[ $CUDA_ARCHITECTURES != none ]]; then
        kernels=$CUDA_ARCHITECTURES
        python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
            fail "CUDA_ARCHITECTURES is $CUDA_ARCHITECTURES, and this torch has no CUDA; none builds CPU kernels only"
        [[ -n ${CUDA_HOME:-} ]] || command -v nvcc >/dev/null ||
            fail "CUDA_ARCHITECTURES is $CUDA_ARCHITECTURES, and there is no nvcc: set CUDA_HOME or the PATH"
        export TORCH_CUDA_ARCH_LIST=$CUDA_ARCHITECTURES # the base image sets its own list
    fi
    # A copy, so that no objects or metadata stay in the sources, and the package contains no earlier build.
    mkdir "$work/source"
    cp -r "$root"/{setup.py,pyproject.toml,README.md,LICENSE,csrc,vcrd} "$work/source"
    find "$work/source" -name '*.so' -delete
    echo "building vcrd for $kernels"
    pip_beside_torch install --no-build-isolation --check-build-dependencies --no-deps --force-reinstall "$work/source"
}

check() {
    [[ -w ${HOME:-/nonexistent} ]] || fail "HOME is ${HOME:-not set}, which user $(id -u) cannot write to: caches go there"
    (cd / && python "$root/docker/check.py" "$CUDA_ARCHITECTURES")
}

user() {
    local id holder where=()
    for id in "USER_ID=$USER_ID" "GROUP_ID=$GROUP_ID"; do
        [[ ${id#*=} =~ ^[1-9][0-9]*$ ]] || fail "${id%%=*} must be a positive integer, as the image does not run as root; got '${id#*=}'"
    done
    if [[ -n $PREFIX ]]; then where=(--prefix "$PREFIX"); fi
    # Ubuntu's image has a user 1000, which is not needed.
    holder=$(awk -F: -v id="$USER_ID" '$3 == id {print $1}' "$PREFIX/etc/passwd")
    [[ -z $holder ]] || userdel "${where[@]}" "$holder"
    awk -F: -v id="$GROUP_ID" '$3 == id {found = 1} END {exit !found}' "$PREFIX/etc/group" ||
        groupadd "${where[@]}" --gid "$GROUP_ID" "$name"
    # The log of logins has an entry for every id up to the largest, so a large id would fill the layer.
    useradd "${where[@]}" --no-log-init --uid "$USER_ID" --gid "$GROUP_ID" --no-create-home --home-dir "$home" \
        --shell /bin/bash "$name"
    # Writable for every user, as /tmp is: `docker run --user` and enroot run another user, who has caches at home.
    install -d -m 1777 -o "$USER_ID" -g "$GROUP_ID" "$PREFIX$home"
}

(($#)) || fail "name a step: user, dependencies, extension or check"
for step in "$@"; do
    case $step in
        user | dependencies | extension | check) "$step" ;;
        *) fail "there is no step $step; there are user, dependencies, extension and check" ;;
    esac
done
