"""The runs of the papers, each a function that returns its whole config.

token_labeling.py  LV-ViT and others with token labels
tl_align.py        targets of mixed images that follow the tokens, and what they are compared with
tokenizers.py      MoTo, TokenProp and other tokenizers
registry.py        runs by name

``python -m jobs.train --list`` prints them; paths of images and labels are left to ``--set``. The number in a run's
line is the top-1 accuracy on ImageNet that its paper reports, in per cent.
"""

# Runs register themselves, and are listed in this order.
from jobs.recipes import token_labeling  # noqa: F401

# isort: split
from jobs.recipes import tl_align  # noqa: F401

# isort: split
from jobs.recipes import tokenizers  # noqa: F401
from jobs.recipes.registry import RECIPES, Recipe, get_recipe, needs_init

__all__ = ["RECIPES", "Recipe", "get_recipe", "needs_init"]
