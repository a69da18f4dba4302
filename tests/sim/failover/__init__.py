"""A simulator of the cluster manager: two nodes' `Manager`s, with their real packets, on a virtual clock.

What is simulated is what they stand on: paths that lose, delay and are cut, in one direction or both; nodes that are
paused, lose power, boot; daemons that are killed and started again; resources that start, stop and fail in their own
time, among them an address with its lease in the kernel. The rules are checked after every step:

- *one holder*: no two nodes show the address of a group, or have it promoted where it is replicated, but while one of
  them cannot know better: it was paused, cut off, or has had no time yet to hear of the other;
- *fenced first*: a replicated group is never promoted on two nodes at all;
- *after a pause*, or when a daemon starts that did not run for longer than deadtime: no address is shown before
  somebody was heard, or listened for long enough;
- *leases*: a machine whose daemon is dead or paused loses its addresses by deadtime and what the kernel is late by;
- *in order*: a resource is stopped only when those on top of it are down, by one program at a time;
- *no haste*: no group fails back to a daemon that was started less than the failback delay ago;
- *it goes on*: when all is well again, each group runs on one node, the preferred one if it is to fail back. What an
  operator has placed stays where it is until the preferred node is started anew.
"""
