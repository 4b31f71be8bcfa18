"""What quantizing the cache costs a model, format by format and layer by layer, and which layer
should get which.
"""
