"""Whether labels can be trusted, as far as numbers tell.

measures.py    what is measured of every image
"""
