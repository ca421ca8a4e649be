"""What papers measure beside accuracy. Nothing here is needed for training.

alignment.py  how mixed images spread through a model (TL-Align, arXiv 2210.06455)
tokenizer.py  what a patch embedding keeps of an image, and how alike its tokens are (arXiv 2212.11115, Figure 2);
              ``python -m jobs.analyse tokenizer`` prints a table of trained models
layout.py     which entities MoTo finds where (Figure 5); `tokenlabels show --layout` draws them
"""

from tokenlabels.analysis.alignment import LayerShares, label_rmse, layer_shares, similarity_share, token_presence
from tokenlabels.analysis.layout import entity_maps
from tokenlabels.analysis.tokenizer import Reconstruction, Tokenizer, reconstruct, token_similarity

__all__ = [
    "LayerShares",
    "Reconstruction",
    "Tokenizer",
    "entity_maps",
    "label_rmse",
    "layer_shares",
    "reconstruct",
    "similarity_share",
    "token_presence",
    "token_similarity",
]
