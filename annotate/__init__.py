"""Writes dense token labels: image shards and a teacher in, a verified label set out.

images.py    finds image shards (WebDataset tars, ImageFolder trees) and reads their samples
decode.py    encoded bytes -> RGB -> the teacher's input size, with the part of the image that it shows
teachers.py  timm classifiers applied at every position: uint8 images -> top-k scores, classes and tail
shard.py     one shard from start to finish: decode ahead, run the teacher, write
schedule.py  many shards: in this process, through Ray, or as one part of a job array
"""
