"""What the figures compare with, and how they are taken. `tokenlabels bench` runs it from a checkout.

dense.py    targets and loss as published: all classes of every cell and token, in our own plain words
targets.py  `tokenlabels bench targets`: time and memory of the sparse form against the dense one
train.py    `tokenlabels bench train`: what token labels and the trainer cost in a step
"""
