"""What streamtask wants to reach, beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from .results import Ratio, Results

Figure = tuple[str, str, str]  # workload, label, figure


@dataclass(frozen=True)
class Target:
    """``theirs`` may name "peers": the best of them. Without it, our figure itself is what is compared."""

    title: str
    wanted: str
    ours: Figure
    theirs: Figure | None = None
    least_is_best: bool = False

    @property
    def limit(self) -> float:
        return float(self.wanted.lstrip("<>=").rstrip("x%"))

    def met(self, ratio: float) -> bool:
        return ratio >= self.limit if self.wanted.startswith(">") else ratio <= self.limit


ST = "streamtask"
TARGETS = (
    Target("drain no-op / bare redis-py batch consumer", ">=1.2x", ("drain", ST, "rate"), ("drain", "bare", "rate")),
    Target("drain no-op / prepared overlapped socket", ">=0.60x", ("drain", ST, "rate"), ("drain", "socket", "rate")),
    Target("drain no-op / fastest peer", ">=10x", ("drain", ST, "rate"), ("drain", "peers", "rate")),
    Target("drain no-op / Celery prefork -c 1", ">=150x", ("drain", ST, "rate"), ("drain", "celery", "rate")),
    Target("ack=each / bare one by one", ">=0.90x", ("each", ST, "rate"), ("each", "bare", "rate")),
    Target(
        "delay() / prepared EVALSHA, socket",
        ">=0.80x",
        ("enqueue", ST, "one"),
        ("enqueue", "socket, delay's commands", "one"),
    ),
    Target("delay() / Redis.xadd", ">=1.6x", ("enqueue", ST, "one"), ("enqueue", "bare", "one")),
    Target("delay() / fastest peer", ">=1.0x", ("enqueue", ST, "one"), ("enqueue", "peers", "one")),
    Target("send_many / pipelined XADD", ">=1.0x", ("enqueue", ST, "bulk"), ("enqueue", "bare", "bulk")),
    Target("send_many / fastest peer's bulk", ">=2x", ("enqueue", ST, "bulk"), ("enqueue", "peers", "bulk")),
    Target("adelay, 50 at once / redis.asyncio", ">=1.0x", ("enqueue", ST, "at_once"), ("enqueue", "bare", "at_once")),
    Target("latency at rest, p50 / bare", "<=1.5x", ("latency", ST, "p50_ms"), ("latency", "bare", "p50_ms")),
    Target("latency at rest, p99 / bare", "<=2x", ("latency", ST, "p99_ms"), ("latency", "bare", "p99_ms")),
    Target("stream bytes per queued message / XADD", "<=1.15x", ("memory", ST, "stream"), ("memory", ST, "xadd")),
    Target(
        "bytes per dedupe id / key per id",
        "<=0.25x",
        ("ids", "dedupe id", "used_memory"),
        ("ids", "key per id", "used_memory"),
    ),
    Target(
        "bytes per produce id / key per id",
        "<=0.25x",
        ("ids", "produce id", "used_memory"),
        ("ids", "key per id", "used_memory"),
    ),
    Target(
        "worker CPU per task / cheapest peer",
        "<=0.15x",
        ("drain", ST, "cpu_us_per_task"),
        ("drain", "peers", "cpu_us_per_task"),
        least_is_best=True,
    ),
    Target(
        "Redis CPU per task / cheapest peer",
        "<=0.3x",
        ("drain", ST, "redis_cpu_us_per_task"),
        ("drain", "peers", "redis_cpu_us_per_task"),
        least_is_best=True,
    ),
    Target(
        "worker RSS / Celery's (process that runs tasks)",
        "<=1.0x",
        ("drain", ST, "rss_runner"),
        ("drain", "celery", "rss_runner"),
    ),
    Target("idle worker, CPU in % of a core", "<=0.5%", ("idle", ST, "cpu_percent")),
    Target("idle worker, commands/s per process", "<=10", ("idle", ST, "per_process")),
    Target(
        "drain with 1,000,000 queued / 10,000 queued",
        ">=0.95x",
        ("backlog", "1,000,000 queued", "window_rate"),
        ("backlog", "10,000 queued", "window_rate"),
    ),
    Target(
        "2 shards, 2 processes / 1 shard, 1 process",
        ">=1.0x",
        ("two", "streamtask, 2 shards, 2 processes", "rate"),
        ("two", "streamtask, 1 shard, 1 process", "rate"),
    ),
    Target("16 threads, no-op / ThreadPoolExecutor", ">=1.5x", ("threads", ST, "rate"), ("threads", "alone", "rate")),
    Target("16 threads, no-op / fastest peer", ">=5x", ("threads", ST, "rate"), ("threads", "peers", "rate")),
    Target("16 threads, keyless / keyed", ">=1.0x", ("threads", "keyless", "rate"), ("threads", ST, "rate")),
    Target("16 threads, 1 ms / threads alone", ">=0.85x", ("sleep1", ST, "rate"), ("sleep1", "alone", "rate")),
    Target(
        "100 coroutines, no-op / asyncio.gather",
        ">=0.6x",
        ("coroutines", ST, "rate"),
        ("coroutines", "alone", "rate"),
    ),
    Target("100 coroutines, no-op / fastest peer", ">=5x", ("coroutines", ST, "rate"), ("coroutines", "peers", "rate")),
    Target("100 coroutines, keyless / keyed", ">=1.0x", ("coroutines", "keyless", "rate"), ("coroutines", ST, "rate")),
    Target("500 coroutines, 10 ms / asyncio alone", ">=0.85x", ("asleep10", ST, "rate"), ("asleep10", "alone", "rate")),
    Target("Celery drain, -c 1 / redis", ">=1.3x", ("celery_1", ST, "rate"), ("celery_1", "redis", "rate")),
    Target("Celery drain, -c 4 / redis", ">=1.3x", ("celery_4", ST, "rate"), ("celery_4", "redis", "rate")),
    Target("Celery drain, -c 1 / memory", ">=0.85x", ("celery_1", ST, "rate"), ("celery_1", "memory", "rate")),
    Target("Celery drain, -c 4 / memory", ">=0.85x", ("celery_4", ST, "rate"), ("celery_4", "memory", "rate")),
    Target(
        "Celery, Redis CPU per task, -c 1 / redis",
        "<=1.0x",
        ("celery_1", ST, "redis_cpu_us_per_task"),
        ("celery_1", "redis", "redis_cpu_us_per_task"),
    ),
    Target(
        "Celery drain, late acks, -c 1 / redis",
        ">=1.3x",
        ("celery_1", f"{ST}, late", "rate"),
        ("celery_1", "redis, late", "rate"),
    ),
    Target(
        "Celery drain, late acks, -c 4 / redis",
        ">=1.3x",
        ("celery_4", f"{ST}, late", "rate"),
        ("celery_4", "redis, late", "rate"),
    ),
    Target(
        "Celery drain, -c 1, keyed / plain with late acks",
        ">=0.8x",
        ("celery_1", "keyed", "rate"),
        ("celery_1", f"{ST}, late", "rate"),
    ),
    Target(
        "Celery drain, -c 4, keyed / plain with late acks",
        ">=0.8x",
        ("celery_4", "keyed", "rate"),
        ("celery_4", f"{ST}, late", "rate"),
    ),
    Target("Celery delay() / redis", ">=1.0x", ("celery_enqueue", ST, "one"), ("celery_enqueue", "redis", "one")),
    Target(
        "Celery latency at rest, p50 / redis",
        "<=1.0x",
        ("celery_latency", ST, "p50_ms"),
        ("celery_latency", "redis", "p50_ms"),
    ),
    Target(
        "Celery latency at rest, p99 / redis",
        "<=1.0x",
        ("celery_latency", ST, "p99_ms"),
        ("celery_latency", "redis", "p99_ms"),
    ),
)


@dataclass(frozen=True)
class Outcome:
    target: Target
    ratio: Ratio
    against: str
    """The peer that was best, where peers are compared."""

    @property
    def met(self) -> bool:
        return self.target.met(self.ratio.ratio)


def outcomes(results: Results, peers: list[str]) -> list[Outcome]:
    """Those targets for which both figures are there."""
    found = []
    for target in TARGETS:
        against = ""
        if target.theirs is None:
            values = results.values(*target.ours)
            middle = results.median(*target.ours)
            ratio = Ratio(middle, min(values), max(values), middle, 1.0) if middle is not None else None
        else:
            workload, label, figure = target.theirs
            if label == "peers":
                label = against = results.best(workload, peers, figure, most=not target.least_is_best) or ""
            ratio = results.ratio(target.ours, (workload, label, figure))
        if ratio is not None:
            found.append(Outcome(target, ratio, against))
    return found
