"""Get weights of DINOv2 ViT-S/14 and say what they are: ``python -m tools.dinov2_small``."""

from experiments.runner.ending import leave
from tools.dinov2_small.settings import command_line

if __name__ == "__main__":
    leave(command_line())
