from __future__ import annotations

import pytest

from eva_lightning.rl.tasks import CW10, MT40, TASKS, parse_tasks, resolve_task


def test_the_tasks_are_those_of_metaworld() -> None:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP

    assert (len(MT40), len(CW10)) == (40, 10)
    assert sorted(TASKS) == sorted(ALL_V3_ENVIRONMENTS) == sorted(ENV_POLICY_MAP)


@pytest.mark.parametrize(
    ("text", "tasks"),
    [
        ("mt40", MT40),
        ("CW10", CW10),
        ("push", ("push-v3",)),
        ("reach-v3, push", ("reach-v3", "push-v3")),
    ],
)
def test_parses(text: str, tasks: tuple[str, ...]) -> None:
    assert parse_tasks(text) == tasks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("push-v2", "^task 'push-v2' is of another version of Meta-World: did you mean push-v3\\?$"),
        ("reach,push-v1", "did you mean push-v3"),
        ("pussh", "^unknown Meta-World task 'pussh': did you mean push-v3"),
        ("pussh-v2", "did you mean push-v3"),
        ("zzzzzzzzzz", "^unknown Meta-World task 'zzzzzzzzzz'$"),
        ("push,push-v3", "task push-v3 is given 2 times in 'push,push-v3'"),
        ("", "tasks must be mt40, cw10 or task names"),
        ("push,,reach", "tasks must be mt40, cw10 or task names"),
        ("mt50", "unknown Meta-World task 'mt50'"),
    ],
)
def test_says_what_is_wrong_with_names(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_tasks(text)


def test_full_names_stay() -> None:
    assert [resolve_task(task) for task in TASKS] == list(TASKS)
