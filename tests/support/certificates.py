# SPDX-License-Identifier: Apache-2.0
"""Certificates for tests, made by openssl: an authority and the certificates it signs."""

import subprocess
from pathlib import Path


class Authority:
    """A certificate authority in a folder of its own."""

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.ca = folder / "ca.pem"
        _openssl(
            *("req", "-x509", *_NEW_KEY, "-keyout", str(folder / "ca.key"), "-out", str(self.ca)),
            *("-days", "2", "-subj", f"/CN={name}", "-addext", "basicConstraints=critical,CA:TRUE"),
        )

    def issue(self, name: str, alternatives: str = "") -> dict[str, str]:
        """Sign a certificate for CN=name; return the options of a tls URI that use it."""
        key, cert = self.folder / f"{name}.key", self.folder / f"{name}.pem"
        request = self.folder / f"{name}.csr"
        _openssl(
            "req", *_NEW_KEY, "-keyout", str(key), "-out", str(request), "-subj", f"/CN={name}"
        )
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternatives}\n" if alternatives else "")
        _openssl(
            *("x509", "-req", "-in", str(request), "-out", str(cert), "-days", "2"),
            *("-CA", str(self.ca), "-CAkey", str(self.folder / "ca.key"), "-CAcreateserial"),
            *("-extfile", str(extensions)),
        )
        return {"cert": str(cert), "key": str(key), "ca": str(self.ca)}


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)
