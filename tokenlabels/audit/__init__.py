"""Whether labels can be trusted, as far as numbers tell.

audit.py       a whole label set: `audit_store` -> `Audit`
measures.py    what is measured of every image
classes.py     what is counted of every class, and of every pair of classes
findings.py    which images and classes are worth a look, and by which rules
duplicates.py  keys, maps and images that are there twice
boxes.py       whether labels know where the object is
images.py      what is asked of the images of a set
box_files.py   boxes from a file, or from the json of samples
compare.py     two label sets of the same images: `compare_stores` -> `Comparison`
pictures.py    an image between the two maps that differ
"""
