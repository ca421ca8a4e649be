"""Experiments on real images: each trains, compares and leaves a table.

tiny_imagenet.py  what supervises and what mixes, on 50 classes of Tiny ImageNet; scales.py says how large it is
localisation.py   labels against annotated boxes: whether cells know where the object is
"""
