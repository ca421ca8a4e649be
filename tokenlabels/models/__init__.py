"""Models that train with token labels. Importing this registers LV-ViT with timm: ``timm.create_model("lvvit_s")``.

lvvit.py        LV-ViT, a vision transformer with a classifier for its tokens, and its four sizes
patch_embed.py  its convolutional patch embedding
dense.py        any timm classifier with a classifier for its tokens beside it
features.py     how the features of a timm model are laid out
embedding.py    MixToken on the output of a patch embedding
checkpoints.py  released and own checkpoints, at any image size

Every model here takes ``model(images, plan)``, where a `MixPlan` mixes the output of its patch embedding (MixToken).
"""

from tokenlabels.models.checkpoints import CheckpointError, load_checkpoint
from tokenlabels.models.dense import DenseClassifier
from tokenlabels.models.lvvit import LVViT

__all__ = ["CheckpointError", "DenseClassifier", "LVViT", "load_checkpoint"]
