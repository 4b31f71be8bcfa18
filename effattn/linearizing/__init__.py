"""From softmax attention to another backend, or to structured projections, with the quality brought
back.
"""
