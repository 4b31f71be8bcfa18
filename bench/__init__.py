"""The benchmark against peers: rows of data, an engine that knows no method, and the reports made
of its results.

rows/    what is raced, one file a part; a new file is found by itself
peers/   what a user would pick instead, one adapter each
case     the words that rows are written in: Case, Contender, Target
"""
