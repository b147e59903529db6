#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# A QEMU machine whose disk is an image of the cache: /dev/pmem0 in the guest.
#
# The guest reads the cache's frames, and a page that it writes is its own. Add `-accel kvm` to the
# arguments where KVM works. The image's size must be a multiple of 2 MiB.
set -eu

if [ $# -lt 3 ]; then
    echo "usage: $0 IMAGE NAME KERNEL [QEMU ARGUMENT ...]" >&2
    exit 2
fi
image=$1 name=$2 kernel=$3
shift 3

size=$(cowshed status --json | python3 -c '
import json, sys
print(*(image["size_bytes"] for image in json.load(sys.stdin)["images"] if image["name"] == sys.argv[1]))
' "$image")
if [ -z "$size" ]; then
    echo "$0: image '$image' is not served; cowshed status lists those that are" >&2
    exit 1
fi
# maxmem leaves guest-physical addresses for the disk beside the guest's memory.
exec cowshed attach "$image" --guest "$name" --quota 256M -- \
    qemu-system-x86_64 -machine pc,mem-merge=off -m size=128M,maxmem=64G,slots=1 \
    -display none -kernel "$kernel" \
    -object "memory-backend-file,id=disk,share=off,mem-path={image},size=$size" \
    -device virtio-pmem-pci,memdev=disk "$@"
