"""TL-Align (arXiv 2210.06455): targets of mixed images that follow the tokens through the model.

    aligned = TLAlign(timm.create_model("deit_small_patch16_224"))
    logits, share = aligned(batch.images, batch.plan)          # images that the plan has mixed
    targets = batch.plan.mix_targets(batch.targets, share)     # share * own + (1 - share) * partner's

The published code carries a label embedding [B, N, 1000] through the network. Rows of attention sum to one, so every
token's label stays ``share * own label + (1 - share) * partner's label``: one number per token says the same, exactly,
and label smoothing does not change it.

tl_align.py   `TLAlign`, around a timm classifier, LV-ViT or `DenseClassifier`
transmix.py   TransMix, which looks at the attention of the class token in the last block alone
attention.py  labels through attention, by three backends
operations.py what else moves labels: residuals, pooling, spatial mixing (Table 10)
rules.py      which rule belongs to which kind of block, and running blocks by their rules
vit.py        ViT, DeiT, LV-ViT
swin.py       Swin v1 and v2
pvt.py        PVT v2
pvt_v1.py     PVT, of `tokenlabels.models`
mixer.py      MLP-Mixer
convnext.py   ConvNeXt v1 and v2

A kind of block that is not listed is refused by name. For one of your own, write its rule and mark it with
`rules.block_rule`; vit.py shows how.
"""

from tokenlabels.align.attention import Backend
from tokenlabels.align.rules import AlignmentError
from tokenlabels.align.tl_align import TLAlign
from tokenlabels.align.transmix import TransMix, transmix

__all__ = ["AlignmentError", "Backend", "TLAlign", "TransMix", "transmix"]
