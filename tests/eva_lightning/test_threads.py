from __future__ import annotations

import threading
import time

import pytest

from eva_lightning.threads import ordered_map


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_keeps_the_order_of_map(workers: int) -> None:
    def slow_at_first(number: int) -> int:
        time.sleep(0.01 if number < 3 else 0)
        return number * number

    assert list(ordered_map(slow_at_first, range(50), workers)) == [number * number for number in range(50)]


def test_does_not_run_far_ahead() -> None:
    done = 0
    lock = threading.Lock()

    def count(number: int) -> int:
        nonlocal done
        with lock:
            done += 1
        return number

    results = ordered_map(count, range(1000), 2)
    assert next(results) == 0
    time.sleep(0.05)
    assert done <= 8
    results.close()  # type: ignore[attr-defined]
    assert done <= 8


def test_error_comes_out_and_nothing_starts_after_it() -> None:
    started: list[int] = []

    def fail_at_five(number: int) -> int:
        started.append(number)
        if number == 5:
            raise ValueError("five")
        return number

    with pytest.raises(ValueError, match="five"):
        list(ordered_map(fail_at_five, range(1000), 2))
    assert len(started) < 30
