#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# A guest's first and only process of its own: does what is asked of it over the second serial port.
#
#   asked:     NUMBER COMMAND         a line for the shell, run in a subshell
#   answered:  .LINE ...              each line that it printed, to stdout or stderr
#              =NUMBER STATUS
#
# Says "=ready" once it listens. The kernel's messages go to the first port, and stay out of this.
set -o pipefail
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
echo 5 > /proc/sys/kernel/printk
# shellcheck disable=SC2046 # a list
modprobe -a $(sed -n 's/.*vm_modules=\([^ ]*\).*/\1/p' /proc/cmdline | tr , ' ')
mkdir -p /mnt /tmp

# Devices are found by the kernel in its own time.
await() {
    for path; do
        until [ -e "$path" ]; do usleep 10000; done
    done
}

# Every file's checksum, in the order of the names. Whole files: `sums /mnt`
sums() {
    cd "$1" && find . -type f -print0 | sort -z | xargs -0 -r md5sum
}

exec 3<> /dev/ttyS1
stty -F /dev/ttyS1 raw -echo
echo =ready >&3
while read -r number order <&3; do
    (eval "$order") < /dev/null 2>&1 3>&- | awk '{ print "." $0 }' >&3
    echo "=$number $?" >&3
done
