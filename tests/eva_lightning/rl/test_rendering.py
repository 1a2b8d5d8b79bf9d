from __future__ import annotations

import os
import subprocess

import numpy as np
import pytest

from eva_lightning.rl import rendering
from eva_lightning.rl.environments import MetaWorldEnvironment


@pytest.fixture(autouse=True)
def _not_probed_yet(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("MUJOCO_GL", "")
    rendering._probed.cache_clear()
    yield
    rendering._probed.cache_clear()


@pytest.mark.parametrize(
    ("named", "works", "result", "tried"),
    [
        ("", {"egl", "osmesa"}, "egl", ["egl"]),
        ("", {"osmesa"}, "osmesa", ["egl", "osmesa"]),
        ("", set(), None, ["egl", "osmesa"]),
        ("osmesa", {"egl", "osmesa"}, "osmesa", ["osmesa"]),
        ("osmesa", {"egl"}, "egl", ["osmesa", "egl"]),
        ("glfw", {"egl"}, "egl", ["egl"]),
    ],
)
def test_falls_back(
    monkeypatch: pytest.MonkeyPatch, named: str, works: set[str], result: str | None, tried: list[str]
) -> None:
    attempts: list[str] = []

    def draws(backend: str) -> bool:
        attempts.append(backend)
        return backend in works

    monkeypatch.setattr(rendering, "_draws", draws)
    monkeypatch.setenv("MUJOCO_GL", named)
    assert rendering.rendering_backend() == result
    assert attempts == tried
    if result is not None:
        assert os.environ["MUJOCO_GL"] == result
    assert rendering.rendering_backend() == result


def test_a_crash_of_the_driver_or_a_hang_counts_as_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_PROBE", "import os; os.abort()")
    assert rendering.rendering_backend() is None

    def hang(*args: object, **kwargs: object) -> object:
        raise subprocess.TimeoutExpired("python", 60)

    monkeypatch.setattr(subprocess, "run", hang)
    rendering._probed.cache_clear()
    assert rendering.rendering_backend() is None


def test_without_opengl_frames_are_refused_and_the_rest_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_draws", lambda backend: False)
    with pytest.raises(ValueError, match=r"^no video: .* install the system packages libegl1 .* or libosmesa6"):
        MetaWorldEnvironment("push", render_mode="rgb_array", render_size=64)
    with MetaWorldEnvironment("push") as environment:
        environment.reset(options={"goal": 0})


def test_frames_are_the_right_way_up() -> None:
    if rendering.rendering_backend() is None:
        pytest.skip(rendering.no_video_reason())
    with MetaWorldEnvironment("reach", render_mode="rgb_array", render_size=64) as environment:
        environment.reset(options={"goal": 0})
        frame = environment.render()
        for _ in range(40):
            environment.step(np.array([0.0, 0.0, 1.0, 0.0]))
        later = environment.render()
    assert frame.shape == (64, 64, 3)
    assert frame.dtype == np.uint8
    assert not np.array_equal(frame, later)
    # the arm is the red thing, and it went up
    assert _height_of_red(later) > _height_of_red(frame)


def _height_of_red(frame: np.ndarray) -> float:
    red = (frame[..., 0] > 100) & (frame[..., 1] < 60) & (frame[..., 2] < 60)
    return float(np.mean(len(frame) - np.nonzero(red)[0]))
