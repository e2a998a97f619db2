"""The layer's counters for Prometheus: ``pip install pg-layer[prometheus]``.

    from pg_layer import prometheus

    prometheus.register()

Needs `prometheus_client`; nothing else of the package imports this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

from channels.layers import BaseChannelLayer, channel_layers
from django.core.exceptions import ImproperlyConfigured

from pg_layer._state.counters import Stats
from pg_layer.checks import is_ours
from pg_layer.layer import PostgresChannelLayer

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import REGISTRY, CollectorRegistry
    from prometheus_client.registry import Collector as BaseCollector
except ImportError as error:
    raise ImportError(
        "pg_layer.prometheus needs prometheus-client: pip install pg-layer[prometheus]"
    ) from error


class _Spec(NamedTuple):
    """A metric: where its values stand in `Stats`, by the values of its ``label``, if it has one."""

    name: str
    help: str
    keys: Mapping[str, str]
    label: str | None = None


def _plain(name: str, help: str, key: str) -> _Spec:
    return _Spec(name, help, {"": key})


_COUNTERS = (
    _Spec(
        "pg_layer_messages_sent",
        "Messages that the database accepted, for a channel or for a group.",
        {"channel": "sent", "group": "group_sent"},
        "to",
    ),
    _plain(
        "pg_layer_messages_refused",
        "Messages that were refused because their channel was full.",
        "refused_full",
    ),
    _plain("pg_layer_batches", "Statements that carried sent and refused messages.", "batches"),
    _plain(
        "pg_layer_messages_received",
        "Messages that came to this process; a group message once for all its members.",
        "received",
    ),
    _plain("pg_layer_messages_delivered", "Messages that receive() returned.", "delivered"),
    _Spec(
        "pg_layer_messages_dropped",
        "Messages that were dropped before they were received, by the reason.",
        {
            "full": "dropped_full",
            "expired": "dropped_expired",
            "undecodable": "dropped_undecodable",
        },
        "reason",
    ),
    _plain(
        "pg_layer_inline_messages",
        "Messages delivered inside the notification, without a read.",
        "inline_messages",
    ),
    _plain("pg_layer_reads", "Statements that read announced messages.", "reads"),
    _plain(
        "pg_layer_reconnects",
        "Times the listening connection was lost and made again.",
        "reconnects",
    ),
    _plain(
        "pg_layer_expired_leases",
        "Times this process was silent for longer than its lease, so that messages may have been missed.",
        "expired_leases",
    ),
    _plain(
        "pg_layer_notifications_refused",
        "Statements for which the server refused NOTIFY, and that were repeated without.",
        "refused_notifications",
    ),
    _plain(
        "pg_layer_notifications_ignored",
        "Notifications on the layer's NOTIFY channels that it did not send.",
        "ignored_notifications",
    ),
)
_GAUGES = (
    _plain("pg_layer_channels", "Channels for which this process has a queue.", "channels"),
    _plain(
        "pg_layer_queued_messages", "Messages in those queues, not yet received.", "queued_messages"
    ),
    _plain(
        "pg_layer_pending_announcements",
        "Announcements that are not dispatched yet.",
        "pending_announcements",
    ),
    _plain(
        "pg_layer_pending_operations",
        "Sends and membership changes that wait for the statement in flight.",
        "pending_operations",
    ),
    _plain("pg_layer_memberships", "Memberships of this process's channels.", "memberships"),
    _plain(
        "pg_layer_remembered_keys",
        "Keys of messages that are remembered, so that none is delivered twice.",
        "remembered_keys",
    ),
    _plain(
        "pg_layer_lease_age_seconds",
        "Time since the lease was renewed; absent without a lease.",
        "lease_age",
    ),
    _plain(
        "pg_layer_failing_tasks",
        "Tasks of the layer that an unexpected error keeps from their work.",
        "failing_tasks",
    ),
)
_LISTENER = "pg_layer_listener"
_LISTENER_HELP = "1 for the state in which the listener is, 0 for the others."
_LISTENER_STATES = ("off", "connecting", "listening", "polling")


class Collector(BaseCollector):
    """Collects `PostgresChannelLayer.stats` of a layer, or of several, for a registry of `prometheus_client`.

    ``alias``: the value of the label of that name. As a registry takes a metric from one collector only,
    further layers are given to `add`. Each scrape looks at the layers of the process that answers it. Raises
    `TypeError` for another kind of layer.
    """

    def __init__(self, layer: BaseChannelLayer | None, alias: str = "default") -> None:
        self._layers: dict[str, PostgresChannelLayer] = {}
        self.add(layer, alias)

    def add(self, layer: BaseChannelLayer | None, alias: str) -> None:
        """Collect another layer as well. Raises `ValueError` if there is one with that alias."""
        if not isinstance(layer, PostgresChannelLayer):
            raise TypeError(
                f"The layer {alias!r} must be a PostgresChannelLayer, not {type(layer).__name__}: only those "
                "have stats()."
            )
        if alias in self._layers:
            raise ValueError(
                f"There is a layer with the alias {alias!r} already: give this one another."
            )
        self._layers[alias] = layer

    def collect(self) -> Iterator[Metric]:
        """All metrics, for the registry."""
        stats = {alias: layer.stats() for alias, layer in list(self._layers.items())}
        for spec in _COUNTERS:
            yield _filled(
                CounterMetricFamily(spec.name, spec.help, labels=_labels(spec)), spec, stats
            )
        for spec in _GAUGES:
            yield _filled(
                GaugeMetricFamily(spec.name, spec.help, labels=_labels(spec)), spec, stats
            )
        listener = GaugeMetricFamily(_LISTENER, _LISTENER_HELP, labels=["alias", "state"])
        for alias, values in stats.items():
            for state in _LISTENER_STATES:
                listener.add_metric([alias, state], values["listener"] == state)
        yield listener


_registered: WeakKeyDictionary[CollectorRegistry, Collector] = WeakKeyDictionary()


def register(registry: CollectorRegistry = REGISTRY) -> Collector:
    """Register a collector of all layers in ``CHANNEL_LAYERS`` that are of this package.

    A second time it returns the collector that the registry has already. Raises `ImproperlyConfigured` if
    there is no such layer, and `prometheus_client`'s `ValueError` if the registry has another `Collector`.
    """
    aliases = [alias for alias, entry in channel_layers.configs.items() if is_ours(entry)]
    if not aliases:
        raise ImproperlyConfigured(
            "pg_layer.prometheus.register() found no layer of pg_layer in CHANNEL_LAYERS: "
            'give one the BACKEND "pg_layer.PostgresChannelLayer".'
        )
    first, *others = aliases
    collector = Collector(channel_layers[first], first)
    for alias in others:
        collector.add(channel_layers[alias], alias)
    try:
        registry.register(collector)
    except ValueError:
        if registry not in _registered:
            raise
        return _registered[registry]
    _registered[registry] = collector
    return collector


def _labels(spec: _Spec) -> list[str]:
    return ["alias"] if spec.label is None else ["alias", spec.label]


def _filled(
    family: CounterMetricFamily | GaugeMetricFamily, spec: _Spec, stats: Mapping[str, Stats]
) -> Metric:
    for alias, values in stats.items():
        for label, key in spec.keys.items():
            value = values[key]  # type: ignore[literal-required]
            if value is not None:
                family.add_metric([alias] if spec.label is None else [alias, label], value)
    return family
