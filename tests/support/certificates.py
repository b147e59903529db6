# SPDX-License-Identifier: Apache-2.0
"""Certificates made for a test, by the openssl program: a CA, and what it signs."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")


class Authority:
    """A CA in a folder: ca.pem and ca.key there, and NAME.pem and NAME.key of those it signed.

    As nbdkit, QEMU and libnbd want their files named, they are linked too: ca-cert.pem, ...
    """

    def __init__(self, folder: Path, name: str = "Test CA") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.ca = folder / "ca.pem"
        self._key = folder / "ca.key"
        _openssl("req", "-x509", *_NEW_KEY, "-subj", f"/CN={name}", *self._out("ca"))

    def _out(self, name: str) -> tuple[str, ...]:
        return ("-keyout", f"{self.folder}/{name}.key", "-out", f"{self.folder}/{name}.pem")

    def sign(self, name: str, *alternative_names: str) -> tuple[Path, Path]:
        """Make a certificate for CN=name and, for instance, "DNS:localhost"; certificate, key."""
        names = [f"-addext=subjectAltName={','.join(alternative_names)}"]
        signed_by = ("-CA", str(self.ca), "-CAkey", str(self._key))
        _openssl(
            *("req", "-x509", *_NEW_KEY, "-subj", f"/CN={name}", *signed_by),
            "-addext=basicConstraints=critical,CA:FALSE",
            *(names if alternative_names else []),
            *self._out(name),
        )
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def client_folder(self, name: str) -> Path:
        """A folder with a client's files named as libnbd and QEMU look for them."""
        certificate, key = self.sign(name)
        folder = self.folder / f"{name}.pki"
        folder.mkdir()
        for path, as_name in (
            (self.ca, "ca-cert.pem"),
            (certificate, "client-cert.pem"),
            (key, "client-key.pem"),
        ):
            (folder / as_name).symlink_to(path)
        return folder

    def client_context(self, name: str | None) -> ssl.SSLContext:
        """The context of a client that trusts this CA and shows NAME's certificate, or none."""
        context = ssl.create_default_context(cafile=self.ca)
        if name is not None:
            context.load_cert_chain(*self.sign(name))
        return context


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
