"""A label set as one page of HTML that opens anywhere.

sample.py      which images the gallery shows, and why
thumbnails.py  photographs, small and inline
items.py       one image of the gallery, as the page's script reads it
gallery.py     all of them, read from the set and its images
histograms.py  what is measured of all images, as bars
contents.py    all that the page says
page.py        the page
templates/     its HTML, style and script
"""
