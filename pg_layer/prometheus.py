"""A collector of the layer's statistics for Prometheus: ``pip install pg-layer[prometheus]``.

    from pg_layer import prometheus

    prometheus.register()

This module needs `prometheus_client`. No other module of the package imports it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

from channels.layers import BaseChannelLayer, channel_layers
from django.core.exceptions import ImproperlyConfigured

from pg_layer._configured_layers import aliases as configured_aliases
from pg_layer._state.counters import Stats
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


class _Metric(NamedTuple):
    """A metric and the keys of its values in `Stats`.

    ``keys`` maps each value of ``label`` to a key. Without a label it has one item, for "".
    """

    name: str
    help: str
    keys: Mapping[str, str]
    label: str | None = None


def _unlabelled(name: str, help: str, key: str) -> _Metric:
    return _Metric(name, help, {"": key})


_COUNTERS = (
    _Metric(
        "pg_layer_messages_sent",
        "Messages that the database accepted, to a channel or to a group.",
        {"channel": "sent", "group": "group_sent"},
        "to",
    ),
    _unlabelled(
        "pg_layer_messages_refused",
        "Messages that were refused because their channel was full.",
        "refused_full",
    ),
    _unlabelled(
        "pg_layer_batches", "Statements that carried sent and refused messages.", "batches"
    ),
    _unlabelled(
        "pg_layer_messages_received",
        "Messages that reached this process; a group message once for all its members.",
        "received",
    ),
    _unlabelled("pg_layer_messages_delivered", "Messages that receive() returned.", "delivered"),
    _Metric(
        "pg_layer_messages_dropped",
        "Messages that were dropped before they were received, by reason.",
        {
            "full": "dropped_full",
            "expired": "dropped_expired",
            "undecodable": "dropped_undecodable",
        },
        "reason",
    ),
    _unlabelled(
        "pg_layer_inline_messages",
        "Messages delivered inside the notification, without a read.",
        "inline_messages",
    ),
    _unlabelled("pg_layer_reads", "Statements that read announced messages.", "reads"),
    _unlabelled(
        "pg_layer_reconnects",
        "Times the listening connection was lost and made again.",
        "reconnects",
    ),
    _unlabelled(
        "pg_layer_expired_leases",
        "Times the lease of this process had expired, so that messages may have been missed.",
        "expired_leases",
    ),
    _unlabelled(
        "pg_layer_notifications_refused",
        "Statements for which the server refused NOTIFY, and that were repeated without it.",
        "refused_notifications",
    ),
    _unlabelled(
        "pg_layer_notifications_ignored",
        "Notifications that the layer did not send, and messages for channels that this process "
        "has not made.",
        "ignored_notifications",
    ),
)
_GAUGES = (
    _unlabelled("pg_layer_channels", "Channels for which this process has a queue.", "channels"),
    _unlabelled(
        "pg_layer_queued_messages", "Messages in those queues, not yet received.", "queued_messages"
    ),
    _unlabelled(
        "pg_layer_pending_announcements",
        "Announcements that are not dispatched yet.",
        "pending_announcements",
    ),
    _unlabelled(
        "pg_layer_pending_operations",
        "Sends and membership changes that wait for the statement in flight.",
        "pending_operations",
    ),
    _unlabelled("pg_layer_memberships", "Memberships of this process's channels.", "memberships"),
    _unlabelled(
        "pg_layer_remembered_keys",
        "Keys of messages that are remembered, so that no message is delivered twice.",
        "remembered_keys",
    ),
    _unlabelled(
        "pg_layer_lease_age_seconds",
        "Time since the lease was renewed; absent without a lease.",
        "lease_age",
    ),
    _unlabelled(
        "pg_layer_failing_tasks",
        "Tasks of the layer that fail with an unexpected error.",
        "failing_tasks",
    ),
)
_LISTENER = "pg_layer_listener"
_LISTENER_HELP = "1 for the current state of the listener, 0 for the others."
_LISTENER_STATES = ("off", "connecting", "listening", "polling")


class Collector(BaseCollector):
    """A collector of `PostgresChannelLayer.stats` for a registry of `prometheus_client`.

    ``alias``: the value of the label ``alias`` for this layer. A registry accepts a metric from
    one collector only; pass further layers to `add`. A scrape reads the layers of the process
    that answers it. Raises `TypeError` for a layer of another class.
    """

    def __init__(self, layer: BaseChannelLayer | None, alias: str = "default") -> None:
        self._layers: dict[str, PostgresChannelLayer] = {}
        self.add(layer, alias)

    def add(self, layer: BaseChannelLayer | None, alias: str) -> None:
        """Add a layer.

        Raises `ValueError` if the alias is in use, `TypeError` for a layer of another class.
        """
        if not isinstance(layer, PostgresChannelLayer):
            raise TypeError(
                f"The layer {alias!r} must be a PostgresChannelLayer, not {type(layer).__name__}: "
                "other classes have no stats()."
            )
        if alias in self._layers:
            raise ValueError(
                f"The collector already has a layer with the alias {alias!r}. Use another alias."
            )
        self._layers[alias] = layer

    def collect(self) -> Iterator[Metric]:
        """Return all metrics. The registry calls this for each scrape."""
        stats = {alias: layer.stats() for alias, layer in list(self._layers.items())}
        for metric in _COUNTERS:
            yield _filled(
                CounterMetricFamily(metric.name, metric.help, labels=_labels(metric)), metric, stats
            )
        for metric in _GAUGES:
            yield _filled(
                GaugeMetricFamily(metric.name, metric.help, labels=_labels(metric)), metric, stats
            )
        listener = GaugeMetricFamily(_LISTENER, _LISTENER_HELP, labels=["alias", "state"])
        for alias, values in stats.items():
            for state in _LISTENER_STATES:
                listener.add_metric([alias, state], values["listener"] == state)
        yield listener


_registered: WeakKeyDictionary[CollectorRegistry, Collector] = WeakKeyDictionary()


def register(registry: CollectorRegistry = REGISTRY) -> Collector:
    """Register a collector of all layers of this package in ``CHANNEL_LAYERS``, and return it.

    A second call returns the collector of the first. Raises `ImproperlyConfigured` if the settings
    have no layer of this package. Raises the `ValueError` of `prometheus_client` if the registry
    has a `Collector` that was registered in another way.
    """
    aliases = configured_aliases()
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


def _labels(metric: _Metric) -> list[str]:
    return ["alias"] if metric.label is None else ["alias", metric.label]


def _filled(
    family: CounterMetricFamily | GaugeMetricFamily, metric: _Metric, stats: Mapping[str, Stats]
) -> Metric:
    for alias, values in stats.items():
        for label, key in metric.keys.items():
            value = values[key]  # type: ignore[literal-required]
            if value is not None:
                family.add_metric([alias] if metric.label is None else [alias, label], value)
    return family
