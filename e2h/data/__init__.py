"""From raw image collections to the canonical prepared set, and from images to release formats.

numpy, pyarrow and Pillow only: the functions here run in a plain process, a Ray task or a notebook alike.
"""
