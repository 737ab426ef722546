"""Simulates a queue of trainings on a cluster: throughput, waiting, fairness, cost of failures.

    python -m benchmarks.queue_simulation [--machines 100] [--days 14] [--json FILE]
    python -m benchmarks.queue_simulation --folders 10000

The second form times how long the real launcher takes to check so many run folders.

Each machine trains one run at a time. Users request single runs at random times, more by day than
by night, and sometimes a sweep. If a machine fails, its run loses the work since its last
checkpoint and goes back into the queue. Times are in seconds. Policies:

    oldest     the oldest request first, like the queue of the page
    fair       the oldest request of the person who uses the fewest machines
    shortest   the run with the shortest expected duration; it is wrong by a factor of up to two
"""

import argparse
import heapq
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.jobs.queue import Launcher, LocalExecutor
from trainer import config
from trainer.runs import events, run_folder, run_requests

HOUR = 3600.0
POLICIES = ("oldest", "fair", "shortest")


@dataclass(frozen=True)
class Cluster:
    machines: int = 100
    days: float = 14
    users: int = 60
    load: float = 0.8
    """Requested work, as a fraction of the capacity of the machines."""
    sweep_share: float = 0.3
    """Fraction of the work that is requested as sweeps of 48 runs."""
    minutes: float = 45
    """Median length of a run; one in twenty takes more than five times as long."""
    days_between_failures: float = 30
    """Mean time between two failures of one machine."""
    hours_to_repair: float = 6
    checkpoint_minutes: float = 5
    """Minutes between two checkpoints of a run."""
    start_minutes: float = 1
    """Minutes from the queue to the first step: libraries, base, latents from the shared cache."""


@dataclass
class Run:
    user: int
    requested: float
    seconds: float
    expected: float
    sweep: bool
    left: float = 0.0
    lost: float = 0.0
    tries: int = 0
    began: float = -1.0
    ended: float = -1.0
    order: int = field(default_factory=itertools.count().__next__)


def workload(cluster: Cluster, draws: random.Random) -> list[Run]:
    """Draws the requests of all days. A few users make most of them."""
    spread = math.log(5) / 1.645  # one run in twenty takes more than five medians
    mean = cluster.minutes * 60 * math.exp(spread**2 / 2)
    total = cluster.machines * cluster.days * 24 * HOUR * cluster.load / mean
    weights = [1 / (1 + rank) for rank in range(cluster.users)]
    runs: list[Run] = []
    while len(runs) < total:
        at = draws.uniform(0, cluster.days * 24) * HOUR
        if draws.random() > (1.0 if 8 <= at / HOUR % 24 <= 20 else 0.35):
            continue
        (user,) = draws.choices(range(cluster.users), weights)
        is_sweep = draws.random() < cluster.sweep_share / (
            cluster.sweep_share + 48 * (1 - cluster.sweep_share)
        )
        length = cluster.minutes * 60 * draws.lognormvariate(0, spread)
        for _ in range(48 if is_sweep else 1):
            seconds = length * draws.uniform(0.9, 1.1)
            runs.append(
                Run(user, at, seconds, seconds * 2 ** draws.uniform(-1, 1), is_sweep, left=seconds)
            )
    return sorted(runs, key=lambda run: (run.requested, run.order))


def chooser(policy: str) -> Callable[[list[Run], Counter], int]:
    """Returns a function that chooses the index of the next run from the waiting ones."""
    keys: dict[str, Callable[[Run, Counter], Any]] = {
        "oldest": lambda run, busy: (run.requested, run.order),
        "fair": lambda run, busy: (busy[run.user], run.requested, run.order),
        "shortest": lambda run, busy: (run.expected, run.order),
    }
    return lambda waiting, busy: min(
        range(len(waiting)), key=lambda index: keys[policy](waiting[index], busy)
    )


def simulate(cluster: Cluster, policy: str, seed: int = 1) -> dict[str, Any]:
    draws = random.Random(seed)
    runs = workload(cluster, draws)
    choose, busy, waiting, free = chooser(policy), Counter(), [], list(range(cluster.machines))
    until, worked, failures = cluster.days * 24 * HOUR, 0.0, 0
    state, start = cluster.checkpoint_minutes * 60, cluster.start_minutes * 60
    at_work: dict[int, tuple[Run, float]] = {}
    events: list[tuple[float, int, str, Any]] = []
    number = itertools.count()

    def later(moment: float, kind: str, subject: Any) -> None:
        heapq.heappush(events, (moment, next(number), kind, subject))

    for run in runs:
        later(run.requested, "requested", run)
    for machine in range(cluster.machines):
        later(draws.expovariate(1 / (cluster.days_between_failures * 24 * HOUR)), "fails", machine)
    while events and events[0][0] < until:
        now, _, kind, subject = heapq.heappop(events)
        if kind == "requested":
            waiting.append(subject)
        elif kind == "done":
            machine, run, tries = subject
            if at_work.get(machine, (None, 0.0))[0] is run and run.tries == tries:
                run.ended, run.left = now, 0.0
                worked += run.seconds
                busy[run.user] -= 1
                del at_work[machine]
                free.append(machine)
        elif kind == "fails":
            failures += 1
            if subject in at_work:
                run, began = at_work.pop(subject)
                done = max(0.0, now - began - start)
                kept = done // state * state
                run.left, run.lost = run.left - kept, run.lost + (now - began) - kept
                busy[run.user] -= 1
                waiting.append(run)
            else:
                free.remove(subject)
            later(
                now + draws.expovariate(1 / (cluster.hours_to_repair * HOUR)), "repaired", subject
            )
        elif kind == "repaired":
            free.append(subject)
            later(
                now + draws.expovariate(1 / (cluster.days_between_failures * 24 * HOUR)),
                "fails",
                subject,
            )
        while free and waiting:
            run = waiting.pop(choose(waiting, busy))
            machine = free.pop()
            run.tries, run.began = run.tries + 1, now if run.began < 0 else run.began
            busy[run.user] += 1
            at_work[machine] = (run, now)
            later(now + start + run.left, "done", (machine, run, run.tries))
    return result(cluster, policy, runs, worked, failures)


def result(
    cluster: Cluster, policy: str, runs: Sequence[Run], worked: float, failures: int
) -> dict[str, Any]:
    ended = [run for run in runs if run.ended >= 0]
    waits = [run.began - run.requested for run in ended if not run.sweep]
    slowed: dict[int, list[float]] = {}
    for run in ended:
        slowed.setdefault(run.user, []).append((run.ended - run.requested) / run.seconds)
    by_user = [statistics.fmean(values) for values in slowed.values()]
    hours = cluster.machines * cluster.days * 24
    return {
        "policy": policy,
        "runs": len(ended),
        "per_hour": len(ended) / (cluster.days * 24),
        "at_work": worked / HOUR / hours,
        "wait_median_minutes": statistics.median(waits) / 60,
        "wait_95_minutes": statistics.quantiles(waits, n=20)[-1] / 60,
        "slowdown_worst_user": max(by_user),
        "fairness": sum(by_user) ** 2 / (len(by_user) * sum(value**2 for value in by_user)),
        "failures": failures,
        "runs_hit": sum(run.tries > 1 for run in runs),
        "lost_hours": sum(run.lost for run in runs) / HOUR,
        "lost_share": sum(run.lost for run in runs) / HOUR / hours,
    }


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    columns = (
        "runs per hour",
        "machines in use",
        "single runs wait: median, 95 % (min)",
        "slowdown of the worst user",
        "fairness",
    )
    print(
        f"\n{title}\n\n| | {' | '.join(columns)} | failures, runs hit | lost |\n|---|{'--:|' * 7}"
    )
    for row in rows:
        waits = f"{row['wait_median_minutes']:.0f}, {row['wait_95_minutes']:.0f}"
        print(
            f"| {row['name']} | {row['per_hour']:.1f} | {row['at_work']:.1%} | {waits} "
            f"| {row['slowdown_worst_user']:.1f} | {row['fairness']:.2f} "
            f"| {row['failures']}, {row['runs_hit']} "
            f"| {row['lost_hours']:.1f} h ({row['lost_share']:.2%}) |"
        )


def time_folders(count: int) -> tuple[float, float]:
    """Returns the seconds of a check of the real launcher, and of the extra check before a start.

    Ten of the run folders are queued. During the first check a run is training.
    """
    with tempfile.TemporaryDirectory() as outputs:
        os.environ["ATELIER_OUTPUTS"] = outputs
        text = config.to_toml(config.RunConfig())
        for index in range(count):
            folder = run_folder.runs_folder() / f"2026-01-01-run-{index:06d}"
            folder.mkdir(parents=True)
            (folder / "run.toml").write_text(text, encoding="utf-8")
            (folder / ".lock").touch()
            if index < 10:
                run_requests.request(folder, "queued")
            else:
                events.EventLog(folder / "events.jsonl").append(
                    events.Finished(1, "a.safetensors", 1, 1.0)
                )
        launcher, local = Launcher(FullExecutor()), LocalExecutor()
        return timed(launcher.check), timed(local.has_room)


class FullExecutor(LocalExecutor):
    """An executor whose only place is taken by a run."""

    def has_room(self) -> bool:
        return False


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machines", type=int, default=100)
    parser.add_argument("--days", type=float, default=14)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--folders", type=int, help="only time a check of so many run folders")
    options = parser.parse_args()
    if options.folders:
        at_work, before = time_folders(options.folders)
        print(
            f"one check of {options.folders} run folders: {at_work:.2f} s while a run trains, "
            f"{before:.2f} s more before a start"
        )
        return 0
    common = {"machines": options.machines, "days": options.days}
    tables = {
        "Policies, at a load of 80 %": [
            {"name": policy, **simulate(Cluster(**common), policy, options.seed)}
            for policy in POLICIES
        ],
        "Load, oldest first": [
            {
                "name": f"load {load:.0%}",
                **simulate(Cluster(**common, load=load), "oldest", options.seed),
            }
            for load in (0.5, 0.7, 0.9)
        ],
        "Failures, oldest first; a checkpoint every 5 minutes, or only at the end": [
            {
                "name": f"every {days} days, "
                + ("a checkpoint every 5 min" if minutes < 1e6 else "no checkpoints"),
                **simulate(
                    Cluster(**common, days_between_failures=days, checkpoint_minutes=minutes),
                    "oldest",
                    options.seed,
                ),
            }
            for days in (30, 3)
            for minutes in (5, 1e9)
        ],
    }
    for title, rows in tables.items():
        print_table(title, rows)
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
