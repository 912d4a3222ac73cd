"""All metrics of this service. Labels are bounded: models and devices come from the configuration."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

INSTANCES = Gauge(
    "tidegate_instances", "Instances by model and state.", ["model", "state"], registry=REGISTRY
)
LOADS = Counter("tidegate_loads_total", "Successful starts.", ["model"], registry=REGISTRY)
FAILED_LOADS = Counter(
    "tidegate_failed_loads_total", "Failed starts by reason.", ["model", "reason"], registry=REGISTRY
)
RESTARTS = Counter(
    "tidegate_restarts_total",
    "Servers that died or failed their health checks.",
    ["model"],
    registry=REGISTRY,
)
LOAD_SECONDS = Histogram(
    "tidegate_load_seconds",
    "From the order to start until ready.",
    ["model"],
    buckets=(0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800),
    registry=REGISTRY,
)
EVICTIONS = Counter(
    "tidegate_evictions_total", "Drains begun to make room for another model.", ["model"], registry=REGISTRY
)
DRAINS_CUT = Counter(
    "tidegate_drains_cut_total",
    "Drains that ended by their deadline, with leases or requests left.",
    ["model"],
    registry=REGISTRY,
)
ADOPTED = Counter("tidegate_adopted_total", "Servers taken over at start.", ["model"], registry=REGISTRY)
DEVICE_BUDGET = Gauge(
    "tidegate_device_budget_bytes", "What may be used of a device.", ["device"], registry=REGISTRY
)
DEVICE_RESERVED = Gauge(
    "tidegate_device_reserved_bytes", "Reserved for instances and intents.", ["device"], registry=REGISTRY
)
DEVICE_FOREIGN = Gauge("tidegate_device_foreign_bytes", "Used by others.", ["device"], registry=REGISTRY)
DEVICE_SETTLING = Gauge(
    "tidegate_device_settling_bytes",
    "Of servers that have gone, and not shown as free by the driver yet.",
    ["device"],
    registry=REGISTRY,
)
ADMISSION_CONNECTED = Gauge(
    "tidegate_admission_connected", "1 while an admission is connected.", registry=REGISTRY
)
CONFIG_READ = Counter(
    "tidegate_config_reads_total",
    "Changes of the configuration file, by what became of them: taken or refused.",
    ["outcome"],
    registry=REGISTRY,
)
CONFIG_REFUSED = Gauge(
    "tidegate_config_refused",
    "1 while the configuration file can't be used and the one before it is in effect.",
    registry=REGISTRY,
)
OVERCOMMITTED = Counter(
    "tidegate_device_overcommitted_total",
    "Plans after which reservations exceeded a device's budget; stays 0.",
    ["device"],
    registry=REGISTRY,
)
FOOTPRINT = Gauge(
    "tidegate_footprint_bytes",
    "What later starts of a model reserve on each card by its footprints; of several the most, 0 = none.",
    ["model"],
    registry=REGISTRY,
)
MEASURED = Counter(
    "tidegate_footprints_measured_total",
    "Measurements that became a footprint.",
    ["model"],
    registry=REGISTRY,
)
DISCARDED = Counter(
    "tidegate_footprints_discarded_total",
    "Measurements thrown away by reason: changed, gone, implausible, spread, unreadable, no_base, fills.",
    ["model", "reason"],
    registry=REGISTRY,
)
FOOTPRINT_STORE_FAILURES = Counter(
    "tidegate_footprint_store_failures_total",
    "Changes of the footprints that could not be kept.",
    registry=REGISTRY,
)
FOOTPRINT_STORE_REPAIRS = Counter(
    "tidegate_footprint_store_repairs_total",
    "Damaged files that were put aside.",
    registry=REGISTRY,
)
