"""Encryption of payloads. Pure; no I/O, and safe from any thread.

A token of Fernet's has no associated data. So it holds the name of the channel or group that the message was
encrypted for, before the message: `<prefix>!<channel>` or `<prefix>!@<group>`, and a zero byte. Without a key
it cannot be changed. The reader compares it with where it found the token.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

from cryptography.fernet import Fernet, MultiFernet

from pg_layer.exceptions import UndecodableMessage


class Crypter:
    """Writes with the first key, reads with any. Keys of any length, stretched as channels_redis does it."""

    __slots__ = ("_fernet", "_groups", "_prefix")

    def __init__(self, keys: Sequence[str | bytes], prefix: str) -> None:
        raw = (key.encode() if isinstance(key, str) else key for key in keys)
        self._fernet = MultiFernet(
            [Fernet(base64.urlsafe_b64encode(hashlib.sha256(key).digest())) for key in raw]
        )
        self._prefix = prefix
        self._groups = f"{prefix}!@".encode()

    def encrypt(self, plaintext: bytes, name: str) -> bytes:
        """The token for `name`: a channel, or `@<group>`."""
        return self._fernet.encrypt(self._bound_to(name) + plaintext)

    def decrypt(self, token: bytes, name: str) -> bytes:
        """The plaintext of a token that was found where it is for `name`.

        A normal channel that is in a group has rows of its own with the tokens of the group, and its readers
        do not know its groups. So it takes what was encrypted for any group.

        Raises `UndecodableMessage` for a token that none of the keys opens, or that is for another name.
        """
        try:
            content = self._fernet.decrypt(token)
        except Exception:
            content = None  # raised below, where the error has no context that might hold some of the payload
        if content is None:
            raise UndecodableMessage(
                "A stored message was encrypted with none of the symmetric_encryption_keys, or is damaged."
            )
        bound_to = self._bound_to(name)
        if content.startswith(bound_to):
            return content[len(bound_to) :]
        is_normal = "!" not in name and not name.startswith("@")
        if is_normal and content.startswith(self._groups):
            return content[content.index(0) + 1 :]
        raise UndecodableMessage(
            "A stored message was encrypted for another channel or group: its row or notification is a copy."
        )

    def _bound_to(self, name: str) -> bytes:
        # Without ambiguity: a prefix has no "!", and a name no zero byte.
        return f"{self._prefix}!{name}\0".encode()
