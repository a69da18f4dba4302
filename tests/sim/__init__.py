"""A deterministic simulator that runs the real node code of two machines through faults. Its fault model:

Time and tasks. One process, one thread, one virtual clock. Every start of `replicad` is an *incarnation* with an event
loop of its own. When it dies, nothing of it ever runs again: callbacks are dropped, and what its last breath (a
`finally` block) does to a disk or a connection is ignored. A machine may die between two events, or in the middle of
one: at its n-th write to a disk or to a connection from now.

Disks. Each machine has a data disk and a metadata disk, both of 512-byte sectors behind a page cache. A write is
readable at once and durable after a flush that began after it. A flush takes time. The kernel may write any sector back
early. A *process kill* keeps the page cache. A *power cut* keeps any subset of the sectors that were not flushed, torn
at 512 bytes. Reads, writes and flushes may fail; a flush that fails has dropped the pages it could not write, and the
next one succeeds. Disks may be slow for a while. While a machine is down, one copy of its superblock, one copy of its
activity log or its bitmap may rot, as long as no copy is damaged already.

Network. Bytes of a connection are never reordered, lost or changed, but delayed, split anywhere and held back. A cut
stops both directions or one of them, and what was on its way is delivered late when it heals, unless an end has given
up. A connection may be reset in the middle of a frame. The connections of a killed process deliver what the kernel had
taken and then end (FIN), or are reset at once. Those of a machine that lost its power fall silent, and are reset when
the machine is back and gets one of their packets. A dial is refused, unanswered or late.

Operator. Shaped like an arbiter: promotes a node only when the other one is dead or Secondary, and only if its data
are as new as the other's records say. In some seeds it accepts split brains (promotes while the other one may be
Primary, or has both serve apart from each other) and resolves them by discarding one side, if the policies that the
seed has drawn do not do it before. All other verbs come at random moments.

Not modelled: bytes that change on their way or on the data disk, disks that lie about flushes, more than two nodes,
clocks that jump, memory that fails, and an operator who promotes with `--force` what is not the newest data (except in
the split-brain seeds and where no good copy is left).

What is checked is told in `tests.sim.oracle`; planted bugs that prove it are in `tests.sim.canaries`.
"""
