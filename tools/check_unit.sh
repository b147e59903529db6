#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Checks the unit $1 (a file NAME.service) with systemd's own parser, with $2 as its program; any output is a failure.
# At run time systemd would ignore a setting in the wrong section.
set -eu

unit=${1:?usage: tools/check_unit.sh UNIT PROGRAM}
program=${2:?usage: tools/check_unit.sh UNIT PROGRAM}
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
copy=$folder/$(basename "$unit")
sed "s|^ExecStart=[^ ]*|ExecStart=$(realpath -s "$program")|" "$unit" >"$copy"

status=0
systemd-analyze verify --man=no "$copy" >"$folder/said" 2>&1 || status=$?
# Known since systemd 254; older versions keep descriptors over a restart anyway.
version=$(systemd-analyze --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
if [ "$version" -lt 254 ]; then
    sed -i "/Unknown key 'FileDescriptorStorePreserve' in section \[Service\], ignoring/d" "$folder/said"
fi
sed "s|$copy|$unit|g" "$folder/said" >&2
[ "$status" = 0 ] && [ ! -s "$folder/said" ]
