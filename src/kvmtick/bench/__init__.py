"""What `kvmtick bench` measures, on kvmtick and on what a user would pick instead.

`figures` lists the figures, each with its mark; `run` takes them. Every figure is taken in
processes of its own, pinned to one core, several times in turns with its peers (`peers`: QEMU under
TCG with icount, and Bochs). Start-up is subtracted: each engine runs the same guest twice, for few
and for many ticks, and the difference counts. What a guest reports at its end is checked before its
time is believed.
"""
