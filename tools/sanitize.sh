#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs tests on a C core built with a sanitizer: tools/sanitize.sh VENV thread|address TEST...
#
# The core is built beside the plain one; PYTHONPATH puts it before the editable install. The
# sanitizer's library is preloaded, because the interpreter is not built with it. setarch -R disables
# address space randomisation, which may occupy the addresses that the sanitizer needs. Guests run
# the plain core (tests/support, tests/stress): they get deadly signals by design.
#
# Every report fails the run. Reports go to files, because pytest captures processes' output, and a
# killed process has no exit status to check.
set -eu

venv=$1 sanitizer=$2
shift 2
here=$PWD
built=$here/build/sanitize-$sanitizer
case $sanitizer in
thread) library=$(gcc -print-file-name=libtsan.so) ;;
address) library=$(gcc -print-file-name=libasan.so) ;;
*) echo "sanitize: $sanitizer is neither thread nor address" >&2 && exit 2 ;;
esac
case $library in
/*) ;;
*) echo "sanitize: gcc has no $library; install its package (libtsan2, libasan8)" >&2 && exit 1 ;;
esac

rm -rf "$built/lib"
COWSHED_SANITIZE=$sanitizer "$venv/bin/python" setup.py -q build --build-base "$built/build" --build-lib "$built/lib"

reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT
chmod 1777 "$reports"
export TSAN_OPTIONS="log_path=$reports/report:exitcode=0:second_deadlock_stack=1"
export ASAN_OPTIONS="log_path=$reports/report:exitcode=0"
[ "$sanitizer" = thread ] || export PYTHONMALLOC=malloc # leak reports need the allocating stack
export COWSHED_STRESS_SECONDS="${COWSHED_STRESS_SECONDS:-25}"

# Refuse to run on the plain core, which would prove nothing.
loaded() {
    PYTHONPATH=$built/lib LD_PRELOAD=$library setarch -R "$venv/bin/python" -c \
        'from cowshed.cache import _core; print(_core.__file__)'
}
case $(loaded) in
"$built/lib/"*) ;;
*) echo "sanitize: the core built with the $sanitizer sanitizer was not the one loaded" >&2 && exit 1 ;;
esac

status=0
PYTHONPATH=$built/lib LD_PRELOAD=$library setarch -R "$venv/bin/pytest" -q "$@" || status=$?
nr_reports=0
for report in "$reports"/report.*; do
    [ -e "$report" ] || continue
    # The interpreter and cffi leak some memory at exit; only leaks of our C count.
    if grep -q 'LeakSanitizer' "$report" && ! grep -q '/core/[a-z]*\.c:\|[ (]\(cache\|accounting\|faults\|transport\)/core/' "$report"; then
        continue
    fi
    nr_reports=$((nr_reports + 1))
    cat "$report"
    status=1
done
echo "sanitize: $sanitizer: $nr_reports processes with reports, exit status $status"
exit $status
