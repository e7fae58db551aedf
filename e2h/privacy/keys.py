"""Secret, addressed randomness: one master secret a run, one derived key a purpose and address.

Nothing is consumed: a key is a function of (secret, purpose, address), so a step replayed after a crash draws the
same bits on any number of workers, and two purposes never share a stream.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from e2h import s3
from e2h.errors import InputError

SECRET_BYTES = 32
# A fixed, published secret: reproducible, and therefore not private.
TEST_SECRET = hashlib.sha256(b"e2h test mode: not private").digest()


def create_secret(path: Path) -> None:
    """Writes a new secret from the system's entropy, owner-only, unless one is there."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # A fresh name: what a killed process left behind may be a second name of the secret itself.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(SECRET_BYTES).hex().encode())
            file.flush()
            os.fsync(file.fileno())
        # A link fails where the name exists: the first of two racing runs decides, and no secret is ever replaced.
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink(missing_ok=True)


def create_secret_object(url: str) -> None:
    """Writes a new secret to s3://bucket/key unless one is there; who may read the object knows the noise.

    Raises:
      InputError: if the store can't be written.
    """
    with s3.explained(f"privacy.secret={url}"):
        s3.put(s3.client(), *s3.split(url), os.urandom(SECRET_BYTES).hex().encode(), IfNoneMatch="*")


def load_secret(reference: str) -> bytes:
    """The 32-byte master secret behind `file:PATH`, `env:NAME` or `s3://bucket/key` (64 hex digits).

    Raises:
      InputError: if it is absent, malformed, or a file that others may read. The secret is never quoted.
    """
    scheme, _, place = reference.partition(":")
    if scheme == "env":
        text = os.environ.get(place)
        if text is None:
            raise InputError(
                f"privacy.secret={reference}: expected an environment variable of 64 hex digits; set {place}"
            )
    elif scheme == "s3":
        text = _read_object(reference)
    else:
        text = _read_owner_only(reference, Path(os.path.expanduser(place)))
    try:
        secret = bytes.fromhex(text.strip())
    except ValueError:
        secret = b""
    # Random bytes have fewer than 16 different values among 32 once in 10^17 times.
    if len(secret) != SECRET_BYTES or secret == TEST_SECRET or len(set(secret)) < 16:
        raise InputError(
            f"privacy.secret={reference}: expected 64 random hex digits; make some with `openssl rand -hex 32`"
        )
    return secret


def _read_object(url: str) -> str:
    bucket, key = s3.split(url)
    with s3.explained(f"privacy.secret={url}"):
        return s3.client().get_object(Bucket=bucket, Key=key)["Body"].read().decode(errors="replace")


def _read_owner_only(reference: str, path: Path) -> str:
    try:
        if not path.is_file():
            raise InputError(f"privacy.secret={reference}: expected a file with 64 hex digits; it does not exist")
        path.read_bytes()
    except OSError as error:
        raise InputError(f"privacy.secret={reference}: expected a file that you may read ({error.strerror})") from error
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise InputError(f"privacy.secret={reference}: expected a file that only its owner may read; chmod 600 it")
    return path.read_text(errors="replace")


def derive_key(secret: bytes, purpose: str, *address: object) -> bytes:
    """A 32-byte key for one purpose and address (HKDF-SHA256, RFC 5869)."""
    # Lengths are part of the encoding, so that ("a", "bc") and ("ab", "c") differ.
    parts = [str(part).encode() for part in (purpose, *address)]
    info = b"e2h" + b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(secret)


def keystream(key: bytes, first_block: int, num_blocks: int) -> bytes:
    """`num_blocks` 16-byte blocks of AES-256-CTR from block `first_block` on: seekable."""
    counter = modes.CTR(first_block.to_bytes(16, "big"))
    return Cipher(algorithms.AES(key), counter).encryptor().update(bytes(16 * num_blocks))


def permute_blocks(key: bytes, blocks: bytes) -> bytes:
    """AES-256 of each 16-byte block: a pseudo-random function of distinct blocks."""
    # ECB is right here: the blocks are addresses, each used once under the key, not a message.
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(blocks)
