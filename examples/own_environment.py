"""An environment of your own, from a simulator to a fine-tuned policy: Gymnasium's HalfCheetah-v5 (MuJoCo).

1. A simple expert acts, and what it does becomes a Minari data set. So does what it does at a slower pace.
2. A small Decision Transformer is trained on the slow pace.
3. EVA fine-tunes it on eight episodes of the expert, with rollouts in the simulator on the way.

The expert is an open-loop gait: each joint's torque is a sine of the time, and it looks at nothing. A cross-entropy
search found its 19 numbers (``--search`` runs it and prints them). It is no strong policy: trained ones run several
times as fast. Episodes have 200 steps here, 1,000 elsewhere. Needs the extra ``rl``.
"""

import argparse
import os
import tempfile
import warnings

import gymnasium
import lightning as L
import minari
import numpy as np
from minari.data_collector.episode_buffer import EpisodeBuffer

from eva_lightning import EVAInitCallback
from eva_lightning.rl.module import DecisionTransformerModule
from eva_lightning.rl.rollout_callback import RolloutCallback
from eva_lightning.rl.rollouts import evaluate
from eva_lightning.rl.trajectories import TrajectoryDataModule

NAME, JOINTS, HORIZON, SECONDS_PER_STEP = "HalfCheetah-v5", 6, 200, 0.05
#: Frequency in hertz, then amplitudes, phases and offsets of the six torques: what ``--search`` prints.
GAIT = np.array([
    2.445,
    0.752, 0.998, -0.154, 0.651, 0.268, 0.404,
    -2.486, -1.829, 1.594, -0.636, -0.682, -2.275,
    0.144, 0.053, 0.191, 0.032, -0.257, -0.105,
])  # fmt: skip
#: Evaluation episodes begin with seeds that no demonstration began with.
EVALUATION_SEED = 1000


def make_env():
    return gymnasium.make(NAME, max_episode_steps=HORIZON)


def act(gait, step, pace=1.0):
    """What a gait does at a step, ``(6,)``; `pace` is a factor on its frequency."""
    amplitudes, phases, offsets = gait[1:].reshape(3, JOINTS)
    return np.clip(amplitudes * np.sin(2 * np.pi * pace * gait[0] * SECONDS_PER_STEP * step + phases) + offsets, -1, 1)


def play(env, gait, seed, pace=1.0, noise=0.0):
    """One episode: observations ``(T + 1, 17)``, actions ``(T, 6)``, rewards ``(T,)``."""
    rng = np.random.default_rng(seed)
    observations, actions, rewards = [env.reset(seed=seed)[0]], [], []
    for step in range(HORIZON):
        action = np.clip(act(gait, step, pace) + noise * rng.standard_normal(JOINTS), -1, 1).astype(np.float32)
        observation, reward, *_ = env.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(reward)
    return np.array(observations), np.array(actions), np.array(rewards)


def record(name, paces, noise=0.1):
    """A Minari data set of one episode for each pace, and its returns."""
    buffers = []
    with make_env() as env:
        for number, pace in enumerate(paces):
            observations, actions, rewards = play(env, GAIT, number, pace, noise)
            ends = [False] * (HORIZON - 1) + [True]
            buffers.append(
                EpisodeBuffer(
                    id=number,
                    seed=number,
                    observations=observations,
                    actions=actions,
                    rewards=list(rewards),
                    terminations=[False] * HORIZON,
                    truncations=ends,
                )
            )
        with warnings.catch_warnings():  # of what a published data set should say besides
            warnings.simplefilter("ignore", UserWarning)
            minari.create_dataset_from_buffers(name, buffers, env=env)
    return np.array([sum(buffer.rewards) for buffer in buffers])


def trainer(steps, *callbacks):
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return L.Trainer(
        max_steps=steps, max_epochs=-1, val_check_interval=steps // 2, check_val_every_n_epoch=None,
        num_sanity_val_steps=0, enable_progress_bar=False, callbacks=list(callbacks), **options,
    )  # fmt: skip


def tell(what, returns):
    print(f"{what}: return {np.mean(returns):.0f} ({min(returns):.0f} to {max(returns):.0f}), {len(returns)} episodes")


class Rollouts(RolloutCallback):
    """Rollouts whenever there is validation, told as they come."""

    def on_validation_epoch_end(self, trainer, pl_module):
        super().on_validation_epoch_end(trainer, pl_module)
        tell(f"EVA fine-tuning, after {trainer.global_step} steps", self.results[NAME].returns)


def main(training_steps=400, fine_tuning_steps=200, episodes=10):
    L.seed_everything(0, verbose=False)
    paces = np.linspace(0.3, 0.7, 20)
    tell("slow gait, to train on", record("halfcheetah/slow-v0", np.random.default_rng(0).permutation(paces)))
    tell("expert, to fine-tune on", record("halfcheetah/gait-v0", [1.0] * 9))

    with make_env() as env:
        played = [play(env, GAIT, EVALUATION_SEED + number)[2].sum() for number in range(episodes)]
    tell("expert without noise, from the states that are evaluated", played)

    slow = TrajectoryDataModule.from_minari("halfcheetah/slow-v0", context=10, batch_size=32)
    module = DecisionTransformerModule(
        **slow.module_options, width=64, layers=2, heads=4, context=10, dropout=0.1, lr=2e-3, warmup_steps=50
    )
    trainer(training_steps).fit(module, slow)

    expert = TrajectoryDataModule.from_minari("halfcheetah/gait-v0", context=10, batch_size=32)
    target = expert.max_return["halfcheetah/gait-v0"]
    # the environment of the demonstrations, from the data set: here make_env would do as well
    recovered = minari.load_dataset("halfcheetah/gait-v0").recover_environment
    asked = {"target_return": target, "episodes": episodes, "seed": EVALUATION_SEED}
    tell(f"before fine-tuning, asked for {target:.0f}", before := evaluate(module, recovered, **asked).returns)

    eva = EVAInitCallback(
        rho=2, r=4, head=module.head_name, exclude=module.embedding_names(), mask_fn=module.mask_fn, verbose=False
    )
    rollouts = Rollouts({NAME: recovered}, episodes, 1, {NAME: target}, seed=EVALUATION_SEED)
    module.lr = 2e-3
    trainer(fine_tuning_steps, eva, rollouts).fit(module, expert)
    return before, rollouts.results[NAME].returns


def search(rounds=20, population=40, best=8):
    """The gait with the largest return that a cross-entropy search finds: draw, keep the best, draw around them."""
    rng = np.random.default_rng(0)
    mean = np.repeat([2.0, 0.6, 0.0, 0.0], [1, JOINTS, JOINTS, JOINTS])
    spread = np.repeat([1.0, 0.4, 2.0, 0.2], [1, JOINTS, JOINTS, JOINTS])
    with make_env() as env:
        for number in range(rounds):
            gaits = mean + spread * rng.standard_normal((population, len(mean)))
            returns = np.array([play(env, gait, seed=number)[2].sum() for gait in gaits])
            chosen = gaits[np.argsort(returns)[-best:]]
            mean, spread = chosen.mean(axis=0), 0.9 * chosen.std(axis=0) + 0.02
            print(f"round {number + 1} of {rounds}: largest return {returns.max():.0f}", flush=True)
    return mean


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", action="store_true", help="search for the expert's gait and print it")
    if parser.parse_args().search:
        print(np.array2string(search(), precision=3, separator=", "))
    else:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["MINARI_DATASETS_PATH"] = folder  # leave this out to keep the data sets
            main()
