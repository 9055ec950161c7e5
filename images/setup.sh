#!/bin/sh
# The heavy steps of images/Dockerfile. Runs inside the build, as root, on any base with Python >= 3.11.
#   setup.sh system VARIANT    compiler, RDMA libraries (where the base has apt), the venv in /opt/venv
#   setup.sh heavy FILE        a requirements file, without dependencies: the largest packages of a lock
#   setup.sh packages FILE     a requirements file; beside it FILE with .no-deps: packages without their dependencies
#   setup.sh user FOLDER       requirements.txt, or uv.lock / poetry.lock / pylock.toml with pyproject.toml
set -eu
umask 022

ca=/run/secrets/ca
if [ -s "$ca" ]; then
    export PIP_CERT="$ca" SSL_CERT_FILE="$ca" REQUESTS_CA_BUNDLE="$ca"
fi
if [ -s /run/secrets/pip ]; then
    export PIP_CONFIG_FILE=/run/secrets/pip
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1

fail() {
    echo "orch: $*" >&2
    exit 1
}

apt() {
    if [ -s "$ca" ]; then
        set -- -o "Acquire::https::CAInfo=$ca" "$@"
    fi
    DEBIAN_FRONTEND=noninteractive apt-get -q -y -o APT::Sandbox::User=root -o Acquire::Retries=2 \
        -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 "$@"
}

# apt_install PACKAGE...: false where there is no apt or no mirror answers.
apt_install() {
    command -v apt-get >/dev/null || return 1
    rm -f /etc/apt/apt.conf.d/docker-clean
    apt update && apt install --no-install-recommends "$@"
}

headers() {
    python3 -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
}

system() {
    command -v python3 >/dev/null || fail "the base image has no python3"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "the base image's Python is older than 3.11"
    wanted=""
    command -v c++ >/dev/null || wanted="g++ libc6-dev"
    headers || wanted="$wanted python3-dev"
    python3 -c 'import ensurepip' 2>/dev/null || wanted="$wanted python3-venv"
    rdma=""
    if [ "$1" = cuda ] && ! ls /usr/lib/*/libibverbs.so.1 /usr/lib64/libibverbs.so.1 >/dev/null 2>&1; then
        rdma="rdma-core libibverbs1 ibverbs-providers librdmacm1"
    fi
    # shellcheck disable=SC2086  # lists of words
    if [ -n "$wanted$rdma" ] && ! apt_install $wanted $rdma; then
        [ -z "$rdma" ] || fail "no RDMA libraries ($rdma) in the base image and none from apt: set image.base to one that has them"
        echo "orch: warning: $wanted cannot be installed here; torch.compile will not work in this image" >&2
    fi
    python3 -m venv /opt/venv || fail "the base image's Python cannot make a venv (python3-venv is missing)"
    # Our trainer and your code can be imported from anywhere, whatever PYTHONPATH a job sets.
    site=$(/opt/venv/bin/python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf '%s\n' /opt/orch /workspace /workspace/src >"$site/orch.pth"
    # The folders of the code are made here, so that the layers above hold nothing but files, always the same bytes.
    mkdir -p /opt/orch/trainer /workspace
}

heavy() {
    [ ! -s "$1" ] || python3 -m pip install --progress-bar off --no-deps -r "$1"
}

packages() {
    [ -s "$1" ] || return 0
    python3 -m pip install --progress-bar off -r "$1"
    if [ -s "${1%.txt}.no-deps.txt" ]; then
        python3 -m pip install --progress-bar off --no-deps -r "${1%.txt}.no-deps.txt"
    fi
}

# uv ARGUMENTS...: a throw-away uv that reads the lock files; it stays out of the layer.
uv() {
    [ -d /tmp/uv ] || { python3 -m venv /tmp/uv && /tmp/uv/bin/pip install -q uv; }
    UV_CACHE_DIR=/tmp/uv/cache UV_PYTHON=/opt/venv/bin/python3 UV_PYTHON_DOWNLOADS=never /tmp/uv/bin/uv "$@"
}

user() {
    cd "$1"
    if [ -f uv.lock ]; then
        cp pyproject.toml uv.lock /tmp/
        (cd /tmp && uv export -q --frozen --no-dev --no-emit-workspace --no-hashes -o /tmp/user.txt)
    elif [ -f pylock.toml ]; then
        # PEP 751: this pip may be too old to read it, so its pins are listed here.
        python3 - pylock.toml >/tmp/user.txt <<'PY'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    lock = tomllib.load(file)
for package in lock.get("packages", ()):
    if "version" in package:
        marker = package.get("marker")
        print(f"{package['name']}=={package['version']}" + (f" ; {marker}" if marker else ""))
PY
    elif [ -f poetry.lock ]; then
        cp pyproject.toml poetry.lock /tmp/
        python3 -m venv /tmp/poetry
        /tmp/poetry/bin/pip install -q poetry poetry-plugin-export
        (cd /tmp && POETRY_VIRTUALENVS_CREATE=false /tmp/poetry/bin/poetry export -q --without-hashes -o /tmp/user.txt)
    elif [ -f requirements.txt ]; then
        python3 -m pip install --progress-bar off -r requirements.txt
        return
    else
        return 0
    fi
    python3 -m pip install --progress-bar off -r /tmp/user.txt
    rm -rf /tmp/uv /tmp/poetry /tmp/user.txt /tmp/pyproject.toml /tmp/*.lock
}

command="$1"
shift
case "$command" in
system | heavy | packages | user) "$command" "$@" ;;
*) fail "setup.sh: unknown step $command" ;;
esac
