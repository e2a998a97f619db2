"""The packages whose tests run against the layer.

Each carries its tests in its source distribution. `python -m ecosystem` reads this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Suite:
    """The tests of one package."""

    package: str
    version: str
    # The classes that `PostgresChannelLayer` replaces. The package's settings and tests find the
    # layer under these names, so nothing else in them changes.
    layers: tuple[str, ...] = ("channels.layers.InMemoryChannelLayer",)
    # Arguments of pytest, such as folders and files.
    tests: tuple[str, ...] = ("tests",)
    # Text that is replaced in the distribution: (file, old, new). "{redis}" in the new text is the
    # address of a Redis server.
    edits: tuple[tuple[str, str, str], ...] = ()
    # Tests that fail with this layer and pass with the package's own, and the reason.
    expected: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs_redis(self) -> bool:
        return any("{redis}" in new for _, _, new in self.edits)


SUITES = (
    Suite(
        package="djangochannelsrestframework",
        version="1.3.0",
    ),
    Suite(
        package="CypartaGraphqlSubscriptionsTools",
        version="4.1.7",
    ),
    Suite(
        package="channels-yroom",
        version="0.0.6",
        # The suite's helper fails if a message arrives before the test waits for it.
        edits=(
            (
                "tests/test_consumer.py",
                "if not self.messages:\n            await self.event.wait()\n"
                "            self.event = asyncio.Event()",
                "while not self.messages:\n            self.event.clear()\n"
                "            await self.event.wait()",
            ),
        ),
    ),
    Suite(
        package="django-channels-broadcast",
        version="0.3.1",
        expected={
            f"tests.test_management_command::{test}": "reads `channels` of the in-memory layer"
            for test in (
                "test_disabled_flag_delivers_nothing_and_warns_noop",
                "test_disabled_flag_warns_for_redirect_kind",
                "test_enabled_flag_delivers_and_does_not_warn_noop",
                "test_enabled_flag_delivers_to_user_channel",
            )
        },
    ),
    Suite(
        package="django-liveops",
        version="0.4.1",
    ),
    Suite(
        package="graphene-django-realtime",
        version="0.2.2a2",
    ),
    Suite(
        package="channels-redis",
        version="4.3.0",
        layers=(
            "channels_redis.core.RedisChannelLayer",
            "channels_redis.pubsub.RedisPubSubChannelLayer",
        ),
        tests=("tests/test_core.py", "tests/test_pubsub.py"),
        edits=(
            ("tests/test_core.py", "localhost:6379", "{redis}"),
            ("tests/test_pubsub.py", "localhost:6379", "{redis}"),
            ("channels_redis/utils.py", "localhost:6379", "{redis}"),
        ),
        expected={
            "tests.test_core::test_custom_group_key_format": "keys of Redis",
            "tests.test_core::test_default_group_key_format": "keys of Redis",
            "tests.test_core::test_double_receive[None]": "calls `close_pools`",
            # The README promises more: "a consumer that keeps up receives a whole burst". The
            # channel was full for a moment only, and the message waits for it.
            "tests.test_core::test_group_send_capacity": "the message is received",
            "tests.test_core::test_group_send_capacity_multiple_channels": "it is received",
            "tests.test_core::test_receive_buffer_respects_capacity": "reads `receive_buffer`",
            "tests.test_core::test_reject_bad_client_prefix": "expects an AssertionError",
            "tests.test_pubsub::test_auto_reconnect": "closes connections of Redis",
            "tests.test_pubsub::test_loop_instance_channel_layer_reference": "calls `_get_layer`",
            "tests.test_pubsub::test_multi_event_loop_garbage_collection": "reads `_layers`",
            # The specification asks for a dict.
            "tests.test_pubsub::test_receive_on_non_owned_general_channel": "sends a str",
        },
    ),
)
