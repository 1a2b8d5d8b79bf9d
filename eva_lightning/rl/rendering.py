"""Which OpenGL renders the simulator without a display: EGL, else OSMesa, else none.

A broken driver can end the process that tries it, so each is tried in a process of its own, once, and only when a
frame is requested: everything but video works without any.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Literal

Backend = Literal["egl", "osmesa"]

_BACKENDS: tuple[Backend, ...] = ("egl", "osmesa")

_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 0 3'/><geom size='.1' rgba='1 0 0 1'/></worldbody></mujoco>"
)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 16, 16)
renderer.update_scene(data)
assert renderer.render().any()
renderer.close()
"""


def rendering_backend() -> Backend | None:
    """What MuJoCo can render with on this machine: ``"egl"``, ``"osmesa"`` or None.

    EGL, which is about twice as fast, is tried first, unless ``MUJOCO_GL`` names the other one. ``MUJOCO_GL`` is set to
    the result, which must happen before the first frame.
    The first call takes about a second.
    """
    backend = _probed(os.environ.get("MUJOCO_GL", "").strip().lower())
    if backend is not None:
        os.environ["MUJOCO_GL"] = backend
    return backend


def no_video_reason() -> str:
    """One sentence for where :func:`rendering_backend` is None: what is missing, and what to install."""
    return (
        "no video: MuJoCo can draw with neither EGL nor OSMesa here; install the system packages "
        "libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0 (EGL) or libosmesa6 (OSMesa)"
    )


@functools.cache
def _probed(wanted: str) -> Backend | None:
    candidates = sorted(_BACKENDS, key=lambda backend: backend != wanted)
    return next((backend for backend in candidates if _draws(backend)), None)


def _draws(backend: Backend) -> bool:
    # PyOpenGL refuses the one when the environment names the other
    environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    try:
        result = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, timeout=60, check=False
        )
    except (subprocess.TimeoutExpired, OSError):
        return False
    return result.returncode == 0
