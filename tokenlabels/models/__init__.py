"""Models that train with token labels. Importing this registers LV-ViT, T2T-ViT and PVT v1 with timm.

lvvit.py           LV-ViT, a vision transformer with a classifier for its tokens, and its four sizes
patch_embed.py     its convolutional patch embedding
t2t_vit.py         T2T-ViT, whose tokens come from overlapping windows
t2t_embed.py       those windows, and the Performers between them
pvt_v1.py          PVT v1, four stages with keys reduced by convolutions
pvt_stage.py       one of its stages: positions, class token and blocks
pvt_weights.py     its weights, initial and published

dense.py           any timm classifier with a classifier for its tokens beside it
features.py        how the features of a timm model are laid out
embedding.py       MixToken on the output of a patch embedding
checkpoints.py     released and own checkpoints, at any image size

tokenizers.py      patch embeddings refined by convolutions or attention, for timm's ``embed_layer=``
modulation.py      a normalisation put into the tokenizer of a model: MoTo, or what it is compared with
moto.py            MoTo, normalisation by the statistics of soft regions
tokenprop.py       TokenProp, a decoder that makes the image again from the tokens while a model learns its task
reconstruction.py  the losses of that decoder
wrapper.py         what training puts around a model, and takes off again

LV-ViT and `DenseClassifier`, which the others go into, take ``model(images, plan)``, where a `MixPlan` mixes the output
of the patch embedding (MixToken).
"""

from tokenlabels.models.checkpoints import CheckpointError, load_checkpoint
from tokenlabels.models.dense import DenseClassifier
from tokenlabels.models.lvvit import LVViT
from tokenlabels.models.modulation import modulate, modulations
from tokenlabels.models.moto import MoTo
from tokenlabels.models.pvt_v1 import PyramidVisionTransformer
from tokenlabels.models.t2t_vit import T2TViT
from tokenlabels.models.tokenizers import tokenizer
from tokenlabels.models.tokenprop import TokenProp

__all__ = [
    "CheckpointError",
    "DenseClassifier",
    "LVViT",
    "MoTo",
    "PyramidVisionTransformer",
    "T2TViT",
    "TokenProp",
    "load_checkpoint",
    "modulate",
    "modulations",
    "tokenizer",
]
