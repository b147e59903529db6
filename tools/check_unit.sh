#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Has systemd itself check the unit $1 (a file NAME.service), whose program is looked for as $2: any word of its own
# is a failure. A setting in a section that does not know it would else be ignored, and the unit do something else.
set -eu

unit=${1:?usage: tools/check_unit.sh UNIT PROGRAM}
program=${2:?usage: tools/check_unit.sh UNIT PROGRAM}
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
copy=$folder/$(basename "$unit")
sed "s|^ExecStart=[^ ]*|ExecStart=$(realpath -s "$program")|" "$unit" >"$copy"

status=0
systemd-analyze verify --man=no "$copy" >"$folder/said" 2>&1 || status=$?
# Known from systemd 254 on; what is older keeps descriptors over a restart anyway.
version=$(systemd-analyze --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
if [ "$version" -lt 254 ]; then
    sed -i "/Unknown key 'FileDescriptorStorePreserve' in section \[Service\], ignoring/d" "$folder/said"
fi
sed "s|$copy|$unit|g" "$folder/said" >&2
[ "$status" = 0 ] && [ ! -s "$folder/said" ]
