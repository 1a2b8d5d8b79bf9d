"""metaworld's environments with less Python around the simulator: the same bits in less time.

What MuJoCo computes in a step is left as it is. Saved are the model's compilation for every further environment of a
task, half of each reset, and most of the time between simulator and observation.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt
from metaworld.env_dict import ALL_V3_ENVIRONMENTS


class QuickSimulator:
    """To be put before an environment's class: overrides methods that are all defined in metaworld's base class."""

    model: Any
    data: Any
    fullpath: str
    width: int
    height: int
    _first_of_two = False

    def _initialize_simulation(self) -> tuple[Any, Any]:
        # goals change the model, so that each environment needs its own: a copy takes a tenth of a compilation's time
        model = copy.copy(_compiled(self.fullpath))
        size = model.vis.global_
        size.offwidth, size.offheight = max(size.offwidth, self.width), max(size.offheight, self.height)
        return model, mujoco.MjData(model)

    def reset(self, *args: Any, **kwargs: Any) -> Any:
        # metaworld resets twice: the second time from nothing but what the first wrote to the model
        self._first_of_two = True
        return super().reset(*args, **kwargs)  # type: ignore[misc]

    def reset_model(self) -> Any:
        observation = super().reset_model()  # type: ignore[misc]
        self._first_of_two = False
        return observation

    def _reset_hand(self, steps: int = 50) -> None:
        if self._first_of_two:  # where the arm comes to in 250 simulator steps is forgotten by the second
            mujoco.mj_forward(self.model, self.data)
            steps = 0
        super()._reset_hand(steps)  # type: ignore[misc]

    def _get_curr_obs_combined_no_goal(self) -> npt.NDArray[np.float64]:
        """Hand, opening of the gripper, and position and orientation of each object, ``(18,)``."""
        apart = self.data.body("rightclaw").xpos - self.data.body("leftclaw").xpos
        positions, orientations = self._get_pos_objects(), self._get_quat_objects()  # type: ignore[attr-defined]
        observation = np.zeros(18)
        observation[:3] = self.get_endeff_pos()  # type: ignore[attr-defined]
        observation[3] = min(max(math.sqrt(apart.dot(apart)) / 0.1, 0.0), 1.0)
        for k in range(len(positions) // 3):
            observation[4 + 7 * k : 7 + 7 * k] = positions[3 * k : 3 * k + 3]
            observation[7 + 7 * k : 11 + 7 * k] = orientations[4 * k : 4 * k + 4]
        return observation

    def touching_object(self, object_geom_id: int) -> bool:
        """Whether both pads of the gripper press on a geom."""
        contact = self.data.contact
        pairs = contact.geom  # (contacts, 2)
        with_object = (pairs == object_geom_id).any(axis=1)

        def force(pad: str) -> float:
            touching = with_object & (pairs == self.data.geom(pad).id).any(axis=1)
            return float(sum(self.data.efc_force[contact.efc_address[touching]]))

        return force("leftpad_geom") > 0 and force("rightpad_geom") > 0


@functools.cache
def quick_class(task: str) -> type[Any]:
    """The environment's class of `task`, a full name, made quick."""
    kind = ALL_V3_ENVIRONMENTS[task]
    return type(kind.__name__, (QuickSimulator, kind), {})


@functools.lru_cache(maxsize=2)
def _compiled(file: str) -> Any:
    return mujoco.MjModel.from_xml_path(file)
