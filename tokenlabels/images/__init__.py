"""Images as everybody finds and reads them, who makes labels and who trains with them.

shards.py    find image shards, WebDataset tars and ImageFolder trees, by name, glob, braces or URL; the samples of tars
folders.py   ImageFolder trees as shards
samples.py   what every shard gives
decode.py    encoded bytes -> upright RGB
"""

from tokenlabels.images.folders import FolderShard
from tokenlabels.images.samples import EncodedImage, ImageShard, SourceInfo
from tokenlabels.images.shards import TarShard, find_shards

__all__ = ["EncodedImage", "FolderShard", "ImageShard", "SourceInfo", "TarShard", "find_shards"]
