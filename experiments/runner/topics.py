"""Topics of options, the same for all commands, and which options are common: what ``--help`` shows in which order.

A name means one topic everywhere; where a command means something else by it, its ``option`` says its own ``topic``.
Options that are not listed, which a test wants of none, stand under the last topic.
"""

from __future__ import annotations

#: Topic -> names of options, in the order in which they are shown.
TOPICS: dict[str, tuple[str, ...]] = {
    "data": (
        "runs", "root", "task", "tasks", "data", "demonstrations", "split", "split_file", "hold_out",
        "test_share", "val_share", "split_seed", "image_size", "images",
        "train_images", "validation_images", "test_images", "labels", "normalization", "limit_train", "limit_test",
        "train_episodes", "val_episodes", "held_out", "heldout", "target", "noise", "archive", "from_",
        "from_originals", "check", "source", "downloads", "revision", "minari", "minari_path", "keep_archive",
        "n", "batches",
    ),
    "model": (
        "model", "models", "weights", "init", "checkpoint", "ckpt", "split_fused", "pos_embed", "head", "width",
        "layers", "heads", "context", "positions", "drop_previous_frame", "pretrain_epochs",
    ),
    "method": (
        "method", "methods", "rank", "ranks", "rho", "rhos", "r", "alpha", "bias", "target_modules", "protocol",
        "metric", "tau", "delta", "algorithm", "max_batches", "eva_state", "knowledge", "keep_function",
        "lora_plus_ratio", "engine", "stopping", "components", "map_rank", "orders",
        "state_components", "zero_shot",
    ),
    "training": (
        "lr", "epochs", "max_steps", "steps", "updates", "batch_size", "accumulate", "seed", "seeds", "first_seed",
        "warmup_epochs", "warmup_steps", "min_lr", "weight_decay", "dropout", "gradient_clip", "precision", "dtype",
        "compile", "validate", "val_at", "val_every",
    ),
    "search": (
        "lrs", "rates", "learning_rates", "grid", "grids", "extend", "select", "tune", "tune_per", "tune_seeds",
        "tune_steps", "tune_tasks", "final_seeds", "final_each_rho", "equal_rates", "equal_methods", "equal_epochs",
        "tuning",
    ),
    "evaluation": (
        "eval_episodes", "eval_seed", "eval_epochs", "evaluated", "evaluate_on", "episodes", "horizon",
        "target_return", "mode", "success", "look_at", "rollout_every", "rollout_episodes", "rollout_tasks",
        "rollout_video", "environments", "video", "video_episodes", "video_size", "film_size",
    ),
    "which runs": (
        "plan", "report", "parts", "repeats", "no_peft", "overwrite", "fresh", "retry_failed", "skip_failed",
        "vision_config", "digits_config", "rl_config",
    ),
    "output": (
        "output", "out", "name", "title", "maps", "save", "save_adapter", "export", "plots", "layout", "groups",
        "rows", "about", "baseline", "logger", "gradient_norms", "json", "progress",
    ),
    "machine": (
        "backend", "workers", "accelerator", "device", "devices", "gpus_per_run", "cpus_per_run", "threads",
        "decode_threads", "rollout_workers", "cache", "checkpoint_minutes", "checkpoint_every", "ray_address", "slurm",
        "timeout", "profile",
    ),
    "other": (),
}  # fmt: skip

#: What most calls need; whatever is required is common too.
COMMON = frozenset(
    ("root", "task", "tasks", "data", "model", "weights", "method", "methods", "rank", "ranks", "rho", "lr", "lrs",
     "tune", "epochs", "max_steps", "batch_size", "seed", "seeds", "final_seeds", "output", "out", "plan", "report",
     "overwrite", "workers", "accelerator", "backend")
)  # fmt: skip

_TOPIC_OF = {name: topic for topic, names in TOPICS.items() for name in names}
_PLACE = {name: place for names in TOPICS.values() for place, name in enumerate(names)}


def topic_of(name: str) -> str:
    """The topic of the option called `name`."""
    return _TOPIC_OF.get(name, "other")


def place_of(name: str) -> int:
    """Where it stands in its topic; behind all that are listed where it is not."""
    return _PLACE.get(name, len(_PLACE))
