"""What KVM must do, as named cases that run on any back end, and a fuzzer that compares two.

`case` says what a case is, `bench` what it works with, `cases` are the cases, a module a chip.
"""
