"""The differential fuzzer: the same random operations on two back ends, all there is to see
compared after each.

`generate` makes sequences of `operations`; a `side` carries one out on a VM of a back end, with the
guest of `mailbox` for what only a guest can do; `look` says what is compared, and what not;
`search` looks for differences, `shrink` leaves out of a sequence what a difference does not need,
`replay` keeps it in a file.
"""
