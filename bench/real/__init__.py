"""Every claim about quality once more, on a real model and real text: `make real`.

subjects/   what is asked, one file a subject; a new file is found by itself
steps       the words that they are written in: Subject, Step, Target
text        the English text, and its division into what calibrates and what is measured on
running     the loop: a process a step, what it took, what is kept
process     what such a process does
page        the tables of docs/real-models.md
"""
