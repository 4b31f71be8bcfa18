"""A day with a GPU that one can rent for minutes: what is worth knowing of it, in the order of its
worth, each part in a process and a time limit of its own. `recipes/gpu_day.py` runs it.

jobs         processes: so many at a time, each with its limit; what one reported stays, however it
             ended
steps        what is done, in which order, in how many seconds
versions     what is there, and whether the carried cache is found
correctness  every kernel against its definition in fp64
ratios       the headlines, which say whether a kernel is good, with what was predicted of them
headlines    their cases, measured
tuning       the same kernels with other warps and stages
profiler     what the hardware's counters say of the worst
carried      kernels compiled ahead of time, on a machine without a GPU, in a cache that travels
summary      the tables
page         and those of the documentation
site         lets Python find the package in a checkout, without an install
"""
