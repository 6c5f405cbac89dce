"""Who an id is without saying who: keyed hashes of patient ids, and short names for files.

A bare hash of a patient id is no secret: ids are few, and whoever lists them all finds the one that fits. So the hash
has a key, 32 random bytes in a file that its owner alone can read and that is never part of a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import sys
import tempfile
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt64

from kladi.errors import UserError

BYTES = 32
"""Length of a key."""
SHOWN = 8
"""Hexadecimal digits of an id or a file that a person reads."""


@dataclass(frozen=True)
class Key:
    """The secret that ids are hashed with. It has no `repr`, so it stands in no log and no traceback."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != BYTES:
            raise ValueError(f"a key has {BYTES} bytes, not {len(self.secret)}")

    @property
    def fingerprint(self) -> str:
        """8 hexadecimal digits that a run keeps: two runs can be compared by patient only where these agree."""
        return self._digest("fingerprint")[:SHOWN]

    def hashed(self, kind: str, issuer: str, identifier: str) -> str:
        """HMAC-SHA256(key, kind, issuer, id) cut to 128 bits, 32 hexadecimal digits.

        Args:
            kind: what is named, e.g. "patient" or "study": the same number may name both.
            issuer: who gave the id, e.g. a hospital; "" where nobody says.
            identifier: trimmed of blanks and NUL and brought to NFC, so that one id has one hash.

        Raises:
            ValueError: an empty id, which names nobody.
        """
        clean = cleaned(identifier)
        if not clean:
            raise ValueError(f"an empty {kind} id names nobody and has no hash")
        return self._digest("id", kind, cleaned(issuer), clean)[:32]

    def _digest(self, *parts: str) -> str:
        # Each part is preceded by its length: ("ab", "c") and ("a", "bc") must not meet.
        encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
        message = b"".join(len(part).to_bytes(8, "little") + part for part in encoded)
        return hmac.new(self.secret, message, hashlib.sha256).hexdigest()


def cleaned(identifier: str) -> str:
    """An id without the padding that file formats add: blanks and NUL at the ends, and in NFC.

    >>> cleaned(" 0042\\0")
    '0042'
    """
    before, text = "", unicodedata.normalize("NFC", identifier)
    while text != before:
        before, text = text, text.strip().strip("\0")
    return text


def load_key(path: str | Path = "") -> Key:
    """The key in `path`; without a path the user's own, made at first use.

    Args:
        path: `data.key`. It must exist: a key made for a mistyped path would look like "no patient in common".

    Raises:
        UserError: the file is missing, cannot be read, is no key, or others can read it.
    """
    if path:
        return _read(Path(path), hint=f"; make one with: head -c {BYTES} /dev/urandom > KEY; chmod 600 KEY")
    own = own_key_file()
    if not own.exists():
        _make(own)
    return _read(own)


def own_key_file() -> Path:
    """`kladi/key` in the user's configuration folder."""
    given = os.environ.get("XDG_CONFIG_HOME") or (os.environ.get("APPDATA") if sys.platform == "win32" else "")
    return (Path(given) if given else Path.home() / ".config") / "kladi" / "key"


def shown(identifier: str) -> str:
    """The first 8 digits of a hashed id, for people.

    >>> shown("0123456789abcdef0123456789abcdef")
    '01234567'
    """
    return identifier[:SHOWN]


def shown_rows(row_id: UInt64[np.ndarray, " n"]) -> list[str]:
    """File ids for logs and reports: the first 8 hexadecimal digits of each content digest.

    >>> shown_rows(np.array([0x0123456789ABCDEF, 7], dtype=np.uint64))
    ['01234567', '00000000']
    """
    return [f"{value:016x}"[:SHOWN] for value in row_id.tolist()]


def _read(path: Path, hint: str = "") -> Key:
    try:
        # One byte more than a key has: a wrong file may be long.
        with path.open("rb") as file:
            secret = file.read(BYTES + 1)
            mode = os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise UserError(f"the key {path} cannot be read ({error.strerror}){hint}") from error
    if len(secret) != BYTES:
        raise UserError(f"{path} is no key: a key has {BYTES} bytes{hint}")
    if os.name != "nt" and mode & 0o077:
        raise UserError(f"the key {path} can be read by others; chmod 600 {path}")
    return Key(secret)


def _make(path: Path) -> None:
    """Write a new key, whole or not at all; where another process was faster, its key stays."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".key-")  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(BYTES))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(name, path)  # unlike a rename, a link never replaces
        finally:
            Path(name).unlink()
    except OSError as error:
        raise UserError(
            f"a key cannot be made in {path.parent} ({error.strerror}); name one with --data.key"
        ) from error
