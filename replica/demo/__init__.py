"""``make demo``: two nodes on this machine, a crash, a resync and a switchover, each step checked.

story     what happens, in order (``python -m replica.demo``)
nodes     the temporary folder, the configuration, the two ``replicad`` and the ``replicactl`` calls
load      writes whose every block tells who wrote it, and the check that none of them was lost
nbd_client  a small NBD client over a Unix socket; nothing but the standard library is needed
images    the two backing files, compared byte for byte
screen    lines, ticks and the progress bar
"""
