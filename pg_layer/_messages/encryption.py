"""Encryption of payloads. No I/O. Thread-safe.

A Fernet token has no associated data. So the encrypted text begins with the name of the
channel or group that the message was sent to: ``<prefix>!<channel>`` or
``<prefix>!@<group>``, and a zero byte. The name cannot be changed without a key. The reader
compares it with the address at which it found the token.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

from cryptography.fernet import Fernet, MultiFernet

from pg_layer.exceptions import UndecodableMessage


class Crypter:
    """A set of keys: the first one encrypts, and any of them decrypts.

    Keys may have any length: like channels_redis, the class uses their SHA-256 digests.
    """

    __slots__ = ("_fernet", "_groups", "_prefix")

    def __init__(self, keys: Sequence[str | bytes], prefix: str) -> None:
        raw = (key.encode() if isinstance(key, str) else key for key in keys)
        self._fernet = MultiFernet(
            [Fernet(base64.urlsafe_b64encode(hashlib.sha256(key).digest())) for key in raw]
        )
        self._prefix = prefix
        self._groups = f"{prefix}!@".encode()

    def encrypt(self, plaintext: bytes, name: str) -> bytes:
        """Return the token for ``name``: a channel, or ``@<group>``."""
        return self._fernet.encrypt(self._bound_to(name) + plaintext)

    def decrypt(self, token: bytes, name: str) -> bytes:
        """Return the plaintext of a token that was found in a row for ``name``.

        A normal channel accepts a token for any group of the prefix. A group message for a normal
        channel is copied into a row of the channel, with the token of the group. The readers of the
        channel do not know its groups.

        Raises ``UndecodableMessage`` for a token that no key opens, or for another name.
        """
        try:
            content = self._fernet.decrypt(token)
        except Exception:
            # Raise outside of this block: the context of the error may hold the payload.
            content = None
        if content is None:
            raise UndecodableMessage(
                "A stored message was encrypted with none of the symmetric_encryption_keys, "
                "or is damaged."
            )
        bound_to = self._bound_to(name)
        if content.startswith(bound_to):
            return content[len(bound_to) :]
        is_normal = "!" not in name and not name.startswith("@")
        if is_normal and content.startswith(self._groups):
            return content[content.index(0) + 1 :]
        raise UndecodableMessage(
            "A stored message was encrypted for another channel or group: "
            "its row or notification is a copy."
        )

    def _bound_to(self, name: str) -> bytes:
        # Unambiguous: a prefix contains no "!", and a name contains no zero byte.
        return f"{self._prefix}!{name}\0".encode()
