"""What counts as success, the one place that says so: both definitions, which leads, and which the paper's is.

Success is transient: an episode can be solved and lost again. Every table has both definitions side by side.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Definition:
    """One definition of success.

    Attributes:
        name: What ``--success`` calls it.
        title: What columns call it.
        phrase: What sentences call it.
        short: What a crowded cell calls it.
        rate: Where ``metrics.json`` has the share of solved episodes.
        episodes: Where it has one truth value per episode.
    """

    name: str
    title: str
    phrase: str
    short: str
    rate: str
    episodes: str


ANY_STEP = Definition("any", "any step", "at any step", "any", "success_rate", "successes")
LAST_STEP = Definition("final", "last step", "at the last step", "last", "final_success_rate", "final_successes")
DEFINITIONS = {each.name: each for each in (ANY_STEP, LAST_STEP)}

#: What leads in tables of our own: Meta-World's benchmark counts an episode that was solved at any step.
HEADLINE = ANY_STEP

#: What the paper's numbers are set beside.
PAPERS = LAST_STEP

#: Which definition the paper's numbers are set beside, and why: below every table.
PAPER_NOTE = (
    "The paper's numbers belong beside success at the last step: it gives no definition and builds on the code of "
    'Schmied et al. (ml-jku/L2M), which counts info["success"] of the step that ends an episode.'
)

#: How many episodes the paper's numbers are of.
PAPER_EPISODES = (
    "That code evaluates in 10 episodes, and the paper has three seeds: Table 23 is in steps of 1/30. "
    "--eval-episodes 10 --seeds 3 is that."
)

#: Why success at the last step can be low here where the paper's is not.
EXPERTS_NOTE = (
    "Collected demonstrations are of scripted experts, many of which do not hold what they have solved until the last "
    "step, and a network learns that too; the paper's data are replay buffers of trained agents, which the import "
    "command takes."
)

#: What the columns of both definitions mean.
COLUMNS_NOTE = "any step: share of episodes solved at any of their steps; last step: still solved at the last one"


def definitions(first: str = HEADLINE.name) -> tuple[Definition, Definition]:
    """Both definitions, the one called `first` first."""
    chosen = DEFINITIONS[first]
    (other,) = (each for each in DEFINITIONS.values() if each is not chosen)
    return chosen, other
