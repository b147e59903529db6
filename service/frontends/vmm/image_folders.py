# SPDX-License-Identifier: Apache-2.0
"""The directories of images' own sockets: users that a domain does not list cannot connect.

RUN_DIR/images is open to all, like the default domain's sockets in it. RUN_DIR/images/DOMAIN admits
its owner, root, and the users and groups that the domain lists, by a POSIX access control list
(acl(5)). The daemon also checks each peer's credentials: the directory is a second barrier.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from cowshed.cache.errors import UsageError
from cowshed.service.runtime.logs import EventLog
from cowshed.service.settings.domains import DomainMembers, Domains
from cowshed.service.settings.names import Named, image_socket_path

__all__ = ["image_folders", "make_image_folders"]

_log = EventLog("cowshed")

_ACL: Final = "system.posix_acl_access"
# linux/posix_acl_xattr.h: a version, then {tag, permissions, id} entries in the order of tags.
_VERSION: Final = struct.pack("<I", 2)
_ENTRY: Final = struct.Struct("<HHI")
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NO_ID: Final = 0xFFFFFFFF
_ENTER: Final = 1


@contextlib.contextmanager
def image_folders(run_dir: Path, images: Iterable[Named], domains: Domains) -> Iterator[None]:
    """Make the directories for as long as the block lasts; then remove those that are empty."""
    images = list(images)
    for domain in make_image_folders(run_dir, images, domains):
        _log.warning(
            "open-folder",
            f"the file system of {run_dir} has no access control lists, so anybody can connect to "
            f"the sockets of domain {domain!r}, before being refused: choose another --run-dir",
        )
    try:
        yield
    finally:
        root = run_dir / "images"
        # Images added later have directories, too.
        for folder in [*root.glob("*/"), root]:
            with contextlib.suppress(OSError):
                folder.rmdir()


def make_image_folders(run_dir: Path, images: Iterable[Named], domains: Domains) -> list[str]:
    """Make the directory of each image's socket, and revoke access of users no longer listed.

    Returns the domains whose directory is open to all because the file system has no access control
    lists. Raises UsageError if a directory cannot be made.
    """
    open_to_all = []
    root = run_dir / "images"
    _make(root, 0o755)
    for folder in sorted({image_socket_path(run_dir, image).parent for image in images} - {root}):
        _make(folder, 0o700)
        members = domains.members.get(folder.name, DomainMembers())
        if not _let_in(folder, members):
            open_to_all.append(folder.name)
    return open_to_all


def _make(folder: Path, mode: int) -> None:
    try:
        folder.mkdir(exist_ok=True)
        if os.path.islink(folder):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        folder.chmod(mode)  # also sets the mask of an earlier run's access list
    except OSError as error:
        raise UsageError(
            f"cannot make {str(folder)!r} for images' sockets: {error.strerror}: "
            "remove it, or name another --run-dir"
        ) from error


def _let_in(folder: Path, members: DomainMembers) -> bool:
    """Admit members beside the owner; False, and open to all, if there are no access lists."""
    if not members.uids and not members.gids:
        return True
    entries = [
        (_USER_OBJ, 7, _NO_ID),
        *((_USER, _ENTER, uid) for uid in sorted(members.uids)),
        (_GROUP_OBJ, 0, _NO_ID),
        *((_GROUP, _ENTER, gid) for gid in sorted(members.gids)),
        (_MASK, _ENTER, _NO_ID),
        (_OTHER, 0, _NO_ID),
    ]
    try:
        os.setxattr(folder, _ACL, _VERSION + b"".join(_ENTRY.pack(*entry) for entry in entries))
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise UsageError(
                f"cannot set the access list of {str(folder)!r}: {error.strerror}: "
                "name another --run-dir"
            ) from error
        folder.chmod(0o711)
        return False
    return True
