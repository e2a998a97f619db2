"""A channel layer for Django Channels on PostgreSQL alone.

CHANNEL_LAYERS = {"default": {"BACKEND": "pg_layer.PostgresChannelLayer"}}
"""

from pg_layer.exceptions import (
    ChannelFull,
    InvalidMessage,
    LayerUnavailable,
    MessageTooLarge,
    NotMigrated,
    OutcomeUnknown,
    PgLayerError,
)
from pg_layer.layer import PostgresChannelLayer

__all__ = [
    "ChannelFull",
    "InvalidMessage",
    "LayerUnavailable",
    "MessageTooLarge",
    "NotMigrated",
    "OutcomeUnknown",
    "PgLayerError",
    "PostgresChannelLayer",
]
