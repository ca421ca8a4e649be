"""Pictures of labels, with PIL and rich alone.

palette.py    a colour for every class, and a map put into colours
drawing.py    sizes, type, and cells over photographs
over_image.py an image beside its map
terminal.py   a map as coloured blocks
aligned.py    labels of mixed images as they follow the tokens through a model
layout.py     the entities that MoTo finds
"""

from tokenlabels.views.over_image import overlay
from tokenlabels.views.terminal import block_map

__all__ = ["block_map", "overlay"]
