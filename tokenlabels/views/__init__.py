"""Pictures of labels, with PIL and rich alone; matplotlib draws SVG and PDF.

palette.py    a colour for every class and every value, and a map put into colours
typeface.py   fonts, and text that fits and can be read
drawing.py    sizes, sheets of panels, and cells over photographs
aligned.py    labels of mixed images as they follow the tokens through a model
layout.py     the entities that MoTo finds
labelled.py   an image beside its labels, from panels.py, legend.py and crop.py
replayed.py   what training sees of an image in an epoch; targets.py has its targets
figure.py     a picture as data, drawn by Pillow; vector.py draws it as SVG or PDF
terminal.py   a map as coloured blocks
"""

from tokenlabels.views.labelled import overlay
from tokenlabels.views.terminal import block_map

__all__ = ["block_map", "overlay"]
