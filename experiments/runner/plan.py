"""What a comparison would do, and how long that takes."""

from __future__ import annotations

from collections.abc import Callable

from experiments.runner.jobs import Job
from experiments.runner.options import RunnerOptions
from experiments.runner.progress import span
from experiments.runner.schedule import Schedule


def plan(
    schedule: Schedule, seconds: Callable[[Job], float], notes: Callable[[], list[str]], options: RunnerOptions
) -> str:
    """What there is to do, and how long it takes by the speed measured now.

    Args:
        schedule: The runs, none of them under way.
        seconds: Of a run.
        notes: Further lines.
        options: How many runs happen at a time.
    """
    later = schedule.later()
    known = list(schedule.rows.values())
    todo = [row.job for row in known if row.status == "pending"]
    lines = []
    for phase, title in (("tune", "tuning"), ("final", "final")):
        jobs = [row for row in known if row.job.phase == phase]
        finished = sum(row.status == "done" for row in jobs)
        number = len(jobs) + sum(job.phase == phase for job in later)
        lines.append(f"{title}: {number} runs, {finished} of them finished")
    total = sum(map(seconds, [*todo, *later]))
    slots = options.slots_here()
    plural = "" if slots == 1 else "s"
    estimate = f"estimate: {span(total / slots)} with {slots} run{plural} at a time, if nothing else needs the machine"
    return "\n".join([*lines, *notes(), estimate])
