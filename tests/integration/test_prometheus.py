"""The collector for `prometheus_client`, read back with its own parsers; and its page."""

from __future__ import annotations

import ast
import asyncio
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
import yaml
from channels.layers import InMemoryChannelLayer, channel_layers
from django.core.exceptions import ImproperlyConfigured
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from pg_layer import ChannelFull, PostgresChannelLayer
from pg_layer._state.counters import COUNTED
from pg_layer.prometheus import Collector, register
from tests.conftest import MakeLayer, Observer
from tests.processes import listen, new_layer, receive, until
from tests.project.commands import environment, run, succeeded
from tests.project.configured import configured

DOCUMENT = (Path(__file__).parents[2] / "docs" / "reference" / "monitoring.md").read_text(
    encoding="utf-8"
)

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Metric(NamedTuple):
    """A metric in the form of Prometheus."""

    name: str
    type: str
    help: str
    labels: frozenset[str]


def registry_of(*layers: PostgresChannelLayer) -> CollectorRegistry:
    registry = CollectorRegistry()
    collector = Collector(layers[0])
    for index, layer in enumerate(layers[1:], start=1):
        collector.add(layer, f"layer-{index}")
    registry.register(collector)
    return registry


def scrape(registry: CollectorRegistry) -> Values:
    """Return the value of each sample that Prometheus reads."""
    text = generate_latest(registry).decode()
    values: Values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in values, key
            values[key] = sample.value
    return values


def value(values: Values, name: str, **labels: str) -> float:
    return values[name, frozenset({"alias": "default", **labels}.items())]


def metrics(layer: PostgresChannelLayer) -> list[Metric]:
    """Every metric, by the name its samples have."""
    return [
        Metric(
            sample_names.pop(),
            family.type,
            family.documentation,
            frozenset(label for sample in family.samples for label in sample.labels),
        )
        for family in registry_of(layer).collect()
        if (sample_names := {sample.name for sample in family.samples})
    ]


@pytest.fixture
async def used(make_layer: MakeLayer) -> PostgresChannelLayer:
    """A layer with events of most kinds."""
    layer = make_layer(capacity=4)
    slow, quick = [await layer.new_channel() for _ in range(2)]
    for channel in (slow, quick):
        await layer.group_add("room", channel)
    await listen(layer)
    for n in range(6):
        await layer.group_send("room", {"type": "test", "n": n})
        await receive(layer, quick)
    for n in range(4):
        await layer.send("jobs", {"type": "test", "n": n})
    with pytest.raises(ChannelFull):
        await layer.send("jobs", {"type": "test"})
    return layer


# ---------------------------------------------------------------------- what is exposed


async def test_collect_samples_equal_the_stats(used: PostgresChannelLayer) -> None:
    registry = registry_of(used)
    values, stats = scrape(registry), used.stats()
    assert value(values, "pg_layer_messages_sent_total", to="channel") == stats["sent"] == 5
    assert value(values, "pg_layer_messages_sent_total", to="group") == stats["group_sent"] == 6
    assert value(values, "pg_layer_messages_refused_total") == stats["refused_full"] == 1
    assert value(values, "pg_layer_batches_total") == stats["batches"] == 12
    assert value(values, "pg_layer_messages_received_total") == stats["received"] == 7
    assert value(values, "pg_layer_messages_delivered_total") == stats["delivered"] == 7
    assert (
        value(values, "pg_layer_messages_dropped_total", reason="full")
        == stats["dropped_full"]
        == 2
    )
    assert value(values, "pg_layer_messages_dropped_total", reason="expired") == 0
    assert value(values, "pg_layer_messages_dropped_total", reason="undecodable") == 0
    assert value(values, "pg_layer_inline_messages_total") == stats["inline_messages"] > 0
    assert value(values, "pg_layer_queued_messages") == stats["queued_messages"] == 4
    assert value(values, "pg_layer_memberships") == stats["memberships"] == 2
    assert value(values, "pg_layer_channels") == stats["channels"] == 3
    assert value(values, "pg_layer_listener", state="listening") == 1
    assert value(values, "pg_layer_listener", state="polling") == 0
    assert 0 <= value(values, "pg_layer_lease_age_seconds") <= (stats["lease_age"] or 0)


async def test_collect_exposes_every_counter(used: PostgresChannelLayer) -> None:
    counters = used._loops.client.counters
    registry = registry_of(used)
    for name in COUNTED:
        before = scrape(registry)
        if name == "delivered":
            counters.delivered()
        else:
            counters.add(name, 1)
        after = scrape(registry)
        moved = {
            key[0] for key in before if key[0].endswith("_total") and before[key] != after[key]
        }
        assert len(moved) == 1, name


async def test_collect_before_use_and_after_close(migrated_dsn: str) -> None:
    layer = new_layer(migrated_dsn)
    registry = registry_of(layer)
    unused = scrape(registry)
    assert {key[1] for key in unused if key[0] == "pg_layer_lease_age_seconds"} == set()
    assert value(unused, "pg_layer_listener", state="off") == 1
    assert sum(unused.values()) == 1
    await listen(layer)
    in_use = scrape(registry)
    await layer.close()
    closed = scrape(registry)
    assert value(closed, "pg_layer_listener", state="off") == 1
    counters = [key for key in in_use if key[0].endswith("_total")]
    assert {key: closed[key] for key in counters} == {key: in_use[key] for key in counters}


async def test_collect_counters_never_decrease(migrated_dsn: str, observer: Observer) -> None:
    layer = new_layer(migrated_dsn, capacity=4)
    registry = registry_of(layer)
    seen: list[Values] = [scrape(registry)]
    is_over = asyncio.Event()

    async def watch() -> None:
        while not is_over.is_set():
            seen.append(await asyncio.to_thread(scrape, registry))

    watching = asyncio.create_task(watch())
    for _ in range(3):
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        for n in range(20):
            await layer.group_send("room", {"type": "test", "n": n})
            await layer.send(channel, {"type": "test", "n": n})
            for _ in range(2):
                await receive(layer, channel)
        await layer.close()
    is_over.set()
    await watching
    seen.append(scrape(registry))
    counters = [key for key in seen[0] if key[0].endswith("_total")]
    assert len(counters) == len(COUNTED)
    for key in counters:
        values = [scraped[key] for scraped in seen]
        assert values == sorted(values)
    assert value(seen[-1], "pg_layer_messages_delivered_total") == 120


async def test_collect_several_layers_by_alias(make_layer: MakeLayer) -> None:
    first, second = make_layer(prefix="one"), make_layer(prefix="two")
    await first.send("jobs", {"type": "test"})
    await second.send_many([("jobs", {"type": "test"})] * 2)
    values = scrape(registry_of(first, second))
    assert value(values, "pg_layer_messages_sent_total", to="channel") == 1
    assert value(values, "pg_layer_messages_sent_total", to="channel", alias="layer-1") == 2


async def test_collect_is_valid_openmetrics(used: PostgresChannelLayer) -> None:
    """The strict parser refuses names, units and suffixes that violate the format."""
    text = openmetrics.generate_latest(registry_of(used)).decode()  # type: ignore[no-untyped-call]
    families = {
        family.name: family.type
        for family in parse_openmetrics(text)  # type: ignore[no-untyped-call]
    }
    assert families["pg_layer_messages_sent"] == "counter"
    assert families["pg_layer_lease_age_seconds"] == "gauge"


# ---------------------------------------------------------------------- names

NOT_BASE_UNITS = (
    "milliseconds",
    "ms",
    "minutes",
    "hours",
    "days",
    "kilobytes",
    "megabytes",
    "mb",
    "kb",
    "percent",
)
TYPES = ("counter", "gauge", "histogram", "summary", "metric")


async def test_collect_names_follow_conventions(used: PostgresChannelLayer) -> None:
    """The rules of `promtool check metrics`."""
    found = metrics(used)
    assert len({metric.name for metric in found}) == len(found)
    for name, type, help, labels in found:
        assert re.fullmatch(r"pg_layer(_[a-z]+)+", name)
        assert (type == "counter") == name.endswith("_total")
        assert not name.endswith(("_count", "_sum", "_bucket", "_info"))
        words = name.split("_")
        assert not set(words) & {*NOT_BASE_UNITS, *TYPES}
        assert help[0].isupper() or help[0].isdigit()
        assert help.endswith(".")
        for label in labels:
            assert re.fullmatch(r"[a-z]+", label)
            assert label not in {*words, "le", "quantile", "job", "instance"}


# ---------------------------------------------------------------------- registering

SETTINGS: dict[str, Any] = {
    "default": {"BACKEND": "pg_layer.PostgresChannelLayer"},
    "chat": {"BACKEND": "pg_layer.PostgresChannelLayer"},
    "memory": {"BACKEND": "channels.layers.InMemoryChannelLayer"},
    "missing": {"BACKEND": "not_installed.ChannelLayer"},
    "wrong": {},
}


def test_register_adds_all_layers_of_the_settings(migrated_dsn: str) -> None:
    registry = CollectorRegistry(auto_describe=True)
    settings = {**SETTINGS, "chat": {**SETTINGS["chat"], "CONFIG": {"dsn": migrated_dsn}}}
    with configured(new_layer(migrated_dsn), CHANNEL_LAYERS=settings):
        collector = register(registry)
        assert "memory" not in channel_layers.backends
        aliases = {dict(labels)["alias"] for _, labels in scrape(registry)}
        assert aliases == {"default", "chat"}
        # A second call returns the collector, to which other layers can be added.
        assert register(registry) is collector
        register(registry).add(new_layer(migrated_dsn), "other")
        assert {dict(labels)["alias"] for _, labels in scrape(registry)} == {*aliases, "other"}
        registry.unregister(collector)
        assert register(registry) is not collector
        taken = CollectorRegistry(auto_describe=True)
        taken.register(Collector(new_layer(migrated_dsn)))
        with pytest.raises(ValueError, match="Duplicated"):
            register(taken)


def test_register_without_a_layer_raises(migrated_dsn: str) -> None:
    settings = {"default": SETTINGS["memory"]}
    with (
        configured(new_layer(migrated_dsn), CHANNEL_LAYERS=settings),
        pytest.raises(
            ImproperlyConfigured, match=r"CHANNEL_LAYERS.*pg_layer\.PostgresChannelLayer"
        ),
    ):
        register(CollectorRegistry())


@pytest.mark.parametrize("layer", [None, InMemoryChannelLayer()], ids=["none", "another kind"])
def test_collector_refuses_layers_of_other_classes(layer: Any) -> None:
    with pytest.raises(TypeError, match=f"PostgresChannelLayer, not {type(layer).__name__}"):
        Collector(layer)


def test_add_same_alias_raises(migrated_dsn: str) -> None:
    collector = Collector(new_layer(migrated_dsn))
    with pytest.raises(ValueError, match="'default'"):
        collector.add(new_layer(migrated_dsn), "default")


WITHOUT_CLIENT = """
import sys
sys.modules["prometheus_client"] = None
import pg_layer
try:
    import pg_layer.prometheus
except ImportError as error:
    print(error)
"""


def test_import_without_prometheus_client_raises(migrated_dsn: str) -> None:
    said = succeeded(run(migrated_dsn, "-c", WITHOUT_CLIENT))
    assert "pip install pg-layer[prometheus]" in said


MULTIPROCESS = """
import json, os, tempfile
directory = os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp()
import django; django.setup()
import shutil
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from channels.layers import get_channel_layer
from pg_layer import prometheus

prometheus.register()
layer = get_channel_layer()
layer.sync.send("jobs", {"type": "test"})
own = Counter("own", "One of the project's.")
own.inc()
if pid := os.fork():
    assert os.waitpid(pid, 0)[1] == 0
else:
    layer.sync.send("jobs", {"type": "test"})
    own.inc()
    os._exit(0)

together = CollectorRegistry()
MultiProcessCollector(together)
first = generate_latest(together).decode()
prometheus.register(together)
second = generate_latest(together).decode()
shutil.rmtree(directory)

def read(text, name):
    return [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(name)]

sent = 'pg_layer_messages_sent_total{alias="default",to="channel"}'
print(json.dumps([read(first, "own_total"), read(first, "pg_layer"), read(second, sent)]))
"""


def test_multiprocess_collector_omits_the_layer(migrated_dsn: str) -> None:
    own, layers, beside = json.loads(succeeded(run(migrated_dsn, "-c", MULTIPROCESS)))
    assert own == ["2.0"]
    assert layers == []
    assert beside == ["1.0"]


# ---------------------------------------------------------------------- the page


def snippets(language: str) -> list[str]:
    """Return the code blocks of a language, without the indentation of their list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", DOCUMENT, re.DOTALL | re.MULTILINE)
    return [
        "\n".join(line.removeprefix(indent) for line in text.splitlines()) for indent, text in found
    ]


async def test_documented_metrics_equal_the_exposed(used: PostgresChannelLayer) -> None:
    rows = re.findall(
        r"^\| `(pg_layer_\w+)` \| (\w+) \| (.*?) ?\| (.*) \|$", DOCUMENT, re.MULTILINE
    )
    documented = {
        name: (type, re.findall(r"`(\w+)`", label), help) for name, type, label, help in rows
    }
    exposed: dict[str, tuple[str, list[str], str]] = {}
    for family in registry_of(used).collect():
        further = [
            (label, sample.labels[label])
            for sample in family.samples
            for label in sample.labels
            if label != "alias"
        ]
        labels = [*dict.fromkeys(label for label, _ in further), *(value for _, value in further)]
        exposed[family.samples[0].name] = (family.type, labels, family.documentation)
    assert list(documented) == list(exposed)
    assert documented == exposed


def test_documented_snippets_run(migrated_dsn: str) -> None:
    """But for the server, which needs a port."""
    code = []
    for snippet in snippets("python"):
        ast.parse(snippet)
        if "start_http_server" not in snippet:
            code.append(snippet)
    assert len(code) == 3
    told = succeeded(
        run(
            migrated_dsn,
            "-c",
            "\n".join(
                ["import django; django.setup()", *code, "print(metrics(None).content.decode())"]
            ),
        )
    )
    assert 'pg_layer_messages_sent_total{alias="default",to="group"} 0.0' in told


SERVED = """
import urllib.request
print(urllib.request.urlopen(f"http://127.0.0.1:{os.environ['METRICS_PORT']}/metrics").read().decode())
"""


def test_documented_port_for_each_process_works(
    migrated_dsn: str, unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snippet,) = (snippet for snippet in snippets("python") if "start_http_server" in snippet)
    monkeypatch.setenv("METRICS_PORT", str(unused_tcp_port))
    assert environment(migrated_dsn)["METRICS_PORT"]
    # Its server's thread and socket end with the process.
    end = "import sys; sys.stdout.flush(); os._exit(0)"
    code = f"import django; django.setup()\n{snippet}\n{SERVED}\n{end}"
    assert "pg_layer_memberships" in succeeded(run(migrated_dsn, "-c", code))


async def test_documented_query_for_all_processes_works(
    migrated_dsn: str, make_layer: MakeLayer
) -> None:
    layer = make_layer(heartbeat=0.1, lease=60)
    channel = await layer.new_channel()
    await layer.send(channel, {"type": "test"})
    await receive(layer, channel)
    (query,) = snippets("sql")
    with psycopg.connect(migrated_dsn, autocommit=True) as connection:

        def counters() -> dict[str, int]:
            return {
                name: value for *_, name, value in connection.execute(query.encode()).fetchall()
            }

        await until(lambda: counters().get("delivered"))
        assert set(counters()) == {
            *COUNTED,
            "failing_tasks",
            "queued_messages",
            "without_notifications",
        }
        assert counters()["sent"] == 1
        await layer.close()
        assert counters() == {}


RULES = Path(__file__).parents[2] / "docs" / "how-to" / "pg_layer.rules.yml"
DURATION = re.compile(r"\d+[smhd]")


def test_alert_rules_have_the_syntax_of_prometheus() -> None:
    content = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    assert list(content) == ["groups"]
    (group,) = content["groups"]
    assert set(group) == {"name", "rules"}
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"])
    for rule in group["rules"]:
        assert {"alert", "expr", "annotations"} <= set(rule) <= {*KEYS_OF_A_RULE}
        assert re.fullmatch(r"[a-zA-Z_]\w*", rule["alert"])
        assert DURATION.fullmatch(rule.get("for", "1s"))
        assert list(rule["annotations"]) == ["summary"]
        assert re.fullmatch(rf"{EXPRESSION} [<>=]=? \d+(\.\d+)?", rule["expr"]), rule["expr"]
        templates = re.findall(r"\{\{(.*?)\}\}", rule["annotations"]["summary"])
        assert all(re.fullmatch(r" \$labels\.\w+ ", template) for template in templates)


KEYS_OF_A_RULE = ("alert", "expr", "for", "labels", "annotations")
SELECTOR = r"pg_layer_\w+(\{\w+(=|=~)\"[\w|]+\"\})?"
# The part of PromQL that the rules use: a gauge, or the sum of what a counter has done.
EXPRESSION = (
    rf"(sum by \(\w+(, \w+)*\) \((rate|increase)\({SELECTOR}\[{DURATION.pattern}\]\)\)|{SELECTOR})"
)


async def test_alert_rules_use_exposed_metrics_and_labels(used: PostgresChannelLayer) -> None:
    (group,) = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    exposed = {metric.name: metric.labels | {"instance"} for metric in metrics(used)}
    expressions = [rule["expr"] for rule in group["rules"]]
    expressions += re.findall(r"`\((sum by.*?)`", DOCUMENT, re.DOTALL)
    assert len(expressions) == len(group["rules"]) + 1
    for expression in expressions:
        named = re.findall(r"pg_layer_\w+", expression)
        assert named
        assert set(named) <= set(exposed)
        labels = re.findall(r"by \((.*?)\)", expression) + re.findall(r"(\w+)=~?\"", expression)
        for label in ", ".join(labels).split(", "):
            assert not label or label in exposed[named[0]]
    for rule in group["rules"]:
        (name,) = set(re.findall(r"pg_layer_\w+", rule["expr"]))
        used_labels = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert used_labels <= exposed[name]
