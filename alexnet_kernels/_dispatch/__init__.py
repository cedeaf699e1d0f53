"""What the ops share, below their own files.

checks.py           argument checks, and the cache of those that passed
layout.py           memory formats of results
contracts.py        what the implementations of an operator have in common
eager.py            calls of operators in eager mode
registration.py     contracts registered with torch
double_backward.py  second derivatives
"""
