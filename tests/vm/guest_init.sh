#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# A guest's first and only process of its own: does what is asked of it over the second serial port.
#
#   asked:     NUMBER COMMAND         a line for the shell, run in a subshell
#   answered:  .LINE ...              each line that it printed, to stdout or stderr
#              =NUMBER STATUS
#
# Where the kernel is given vm_root=KIND vm_device=PATH, this first makes that device's file system, which
# holds this script too (filesystems.py: add_system), the root, and goes on from there. Says "=ready" once it listens. The kernel's messages go to the first port, and stay out of this.
set -o pipefail
export PATH=/bin

# Devices are found by the kernel in its own time.
await() {
    for path; do
        until [ -e "$path" ]; do usleep 10000; done
    done
}

# The checksum of every file of a file system, in the order of their names.
sums() {
    cd "$1" && find . -xdev -type f -print0 | sort -z | xargs -0 -r md5sum
}

word() {
    sed -n "s/.*$1=\\([^ ]*\\).*/\\1/p" /proc/cmdline
}

if [ ! -e /proc/cmdline ]; then
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t devtmpfs devtmpfs /dev
    echo 5 > /proc/sys/kernel/printk
    # shellcheck disable=SC2046 # a list
    modprobe -a $(word vm_modules | tr , ' ')
    root=$(word vm_root)
    if [ -n "$root" ]; then
        device=$(word vm_device)
        case $root$device in ext4/dev/pmem* | erofs/dev/pmem*) options=,dax=always ;; esac
        await "$device"
        mount -t "$root" -o "ro$options" "$device" /root
        for folder in proc sys dev; do mount -o move "/$folder" "/root/$folder"; done
        exec switch_root /root /init
    fi
fi
mount -t tmpfs tmpfs /tmp

exec 3<> /dev/ttyS1
stty -F /dev/ttyS1 raw -echo
echo =ready >&3
while read -r number order <&3; do
    (eval "$order") < /dev/null 2>&1 3>&- | awk '{ print "." $0 }' >&3
    echo "=$number $?" >&3
done
