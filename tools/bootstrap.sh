#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs the programs that `make setup` needs, and makes a virtual environment at $1.
#
# Installs only missing programs (with apt-get, as root): on a complete machine it changes nothing
# and needs no network. PYTHON chooses the interpreter; by default the first of 3.11 or newer.
set -eu

venv=${1:?usage: tools/bootstrap.sh VENV}
# mkfs.ext4 and the like are outside ordinary users' PATH.
PATH=$PATH:/usr/sbin:/sbin

fail() {
    echo "setup: $*" >&2
    exit 1
}

updated=
apt_install() {
    command -v apt-get >/dev/null || fail "missing $*; install it with this system's package manager"
    [ "$(id -u)" = 0 ] || fail "missing $*; run as root: apt-get install $*"
    echo "setup: installing $*"
    if [ -z "$updated" ]; then
        apt-get -qq update || fail "apt-get update failed; install by hand: $*"
        updated=1
    fi
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@" >/dev/null ||
        fail "apt-get install failed; install by hand: $*"
}

# PROGRAM:PACKAGE pairs. The build needs a C compiler; demos and tests need file systems and machines. systemd,
# which is not started, checks the unit; groff checks the man pages.
missing=
for pair in gcc:gcc gcc:libc6-dev mkfs.ext4:e2fsprogs mksquashfs:squashfs-tools mkfs.erofs:erofs-utils \
    qemu-system-x86_64:qemu-system-x86 busybox:busybox-static \
    nbdkit:nbdkit nbdinfo:libnbd-bin nbdsh:python3-libnbd nbd-client:nbd-client \
    qemu-img:qemu-utils fio:fio openssl:openssl ip:iproute2 sqlite3:sqlite3 nc:netcat-openbsd \
    systemd-analyze:systemd musl-gcc:musl-tools groff:groff-base; do
    command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair#*:}"
done
# shellcheck disable=SC2086 # a list of package names
[ -z "$missing" ] || apt_install $missing

# Prometheus, for the tests of dashboards and rules. The package is not installed, since it starts a
# server for the whole machine; its two programs need only libc.
add_prometheus() {
    command -v prometheus >/dev/null && command -v promtool >/dev/null && return
    [ ! -x "$venv/bin/promtool" ] || return 0
    echo "setup: fetching prometheus"
    download=$(mktemp -d)
    (
        cd "$download"
        if ! apt-get -qq -o APT::Sandbox::User=root download prometheus 2>/dev/null; then
            [ "$(id -u)" != 0 ] || apt-get -qq update
            apt-get -qq -o APT::Sandbox::User=root download prometheus
        fi
        dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/prometheus ./usr/bin/promtool
    ) || fail "cannot fetch prometheus; install it with this system's package manager"
    mv "$download/usr/bin/prometheus" "$download/usr/bin/promtool" "$venv/bin/"
    rm -r "$download"
}

# A browser, for the tests of the page on the metrics port; they are skipped without one.
add_browser() {
    command -v chromium >/dev/null && command -v chromedriver >/dev/null && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt_install chromium chromium-driver
    else
        echo "setup: no chromium and chromedriver here; the tests that need them will be skipped"
    fi
}

if [ -x "$venv/bin/python" ]; then
    add_browser
    add_prometheus
    exit 0
fi

new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
python=
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c "$new_enough" 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] ||
    fail "no Python 3.11 or newer (tried: ${PYTHON:-python3 python3.13 python3.12 python3.11}); install one or set PYTHON=/path/to/python3"

can_build='import ensurepip, os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
if ! "$python" -c "$can_build" 2>/dev/null; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    case $("$python" -c 'import sys; print(sys.base_prefix)') in
    /usr) apt_install "python$version-venv" "python$version-dev" ;;
    *) fail "$python lacks ensurepip or Python.h; choose another with PYTHON=/path/to/python3" ;;
    esac
fi
"$python" -m venv "$venv" || fail "cannot make $venv; remove it and try again"
add_browser
add_prometheus
