"""Writes dense token labels: image shards and a teacher in, a verified label set out.

The main path, in the order of the data:

fit.py                               an image -> the input size of the teacher, and the view it shows
ahead.py, fitted.py                  decoding in threads ahead of the teacher, bounded in bytes
specs.py, weights.py                 which timm model, and where its weights come from
cells.py, members.py                 its head applied at every cell of its feature map; its normalisation
teachers.py, topk.py                 one model or several: uint8 images -> k best classes, scores and tail per cell
shard.py                             one shard from start to finish: decode ahead, run the teacher, write
ledger.py, schedule.py, progress.py  many shards: here, through Ray, or as one part of a job array

Beside it:

recompute.py                         labels a few images again, for `tokenlabels verify --recompute`
published*.py                        the layout that others publish, in and out
scenes.py, textures.py, demo*.py     generated images with known truth, a small teacher for them, the demo
bench.py, bench_store.py             the project's figures
"""
