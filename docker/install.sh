#!/usr/bin/env bash
# The steps of docker/Dockerfile, one RUN each; CI runs them as they are in a clean virtual environment.
#   docker/install.sh user             the user that the image runs as (root only)
#   docker/install.sh dependencies     what vcrd needs besides torch, at the versions of requirements/
#   docker/install.sh extension        vcrd itself, with its compiled extension
#   docker/install.sh check            what is installed works, without a GPU
# Variables: PYTHON, the interpreter to install into (python3), which has torch already; CUDA_ARCHITECTURES, what the
# extension is built for (9.0a; others: "9.0a;10.0"; none: CPU kernels only, where torch has no CUDA); USER_ID and
# GROUP_ID of the user (1000); PREFIX, a folder that stands for / when the user is made ("").
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

# What is installed decides, neither PYTHONPATH nor (-I) the folder that this is started in. -B leaves no caches.
unset PYTHONPATH
python() { "$PYTHON" -I -B "$@"; }
pip() { "$PYTHON" -I -m pip --disable-pip-version-check --no-input -q "$@"; }

# Version, place and contents of torch, without importing it.
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

# pip with arguments, after which torch must be the one that was there before.
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
    # In place of the base image's own constraints, which name more than torch and know nothing of our pins.
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
        export TORCH_CUDA_ARCH_LIST=$CUDA_ARCHITECTURES # the base image sets a list of its own
    fi
    # A copy, so that neither objects nor metadata stay in the sources, and nothing built before gets into the package.
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
    # Ubuntu's image has a user 1000 of its own, whom nobody needs here.
    holder=$(awk -F: -v id="$USER_ID" '$3 == id {print $1}' "$PREFIX/etc/passwd")
    [[ -z $holder ]] || userdel "${where[@]}" "$holder"
    awk -F: -v id="$GROUP_ID" '$3 == id {found = 1} END {exit !found}' "$PREFIX/etc/group" ||
        groupadd "${where[@]}" --gid "$GROUP_ID" "$name"
    # A log of logins has a place for every id up to the largest: with it a large one fills the layer.
    useradd "${where[@]}" --no-log-init --uid "$USER_ID" --gid "$GROUP_ID" --no-create-home --home-dir "$home" \
        --shell /bin/bash "$name"
    # Everybody's, as /tmp is: under `docker run --user` and enroot somebody else runs here, and keeps caches at home.
    install -d -m 1777 -o "$USER_ID" -g "$GROUP_ID" "$PREFIX$home"
}

(($#)) || fail "name a step: user, dependencies, extension or check"
for step in "$@"; do
    case $step in
        user | dependencies | extension | check) "$step" ;;
        *) fail "there is no step $step; there are user, dependencies, extension and check" ;;
    esac
done
